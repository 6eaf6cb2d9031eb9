"""Does joining help? Four hospitals, four models: out-of-fold AUC alone, federated and pooled, paired per seed.

    python benchmarks/hospitals.py [--json] [--quick] [--choose]

Each hospital's rows are cut into 4 folds, stratified by outcome; every row is scored by models that never saw it, and
the scores of a hospital's four folds make one AUC a seed. Alone: the same model, preprocessing, hyper-parameters and
number of optimizer steps on all labelled training rows, those that the federation sets aside included. Pooled: the
same model on the training rows of all hospitals, for reference. All four rotations of the models over the hospitals.

`--quick` is two seeds of one rotation, judged by no bar. `--choose` compares other settings as the chosen ones were:
on other seeds, and of each only on folds within the training part of its first fold.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "torch")

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import bench
import numpy as np
from scipy.stats import t as student

import polyfed as pf
from polyfed import data as tables
from polyfed.core.algorithm import Predict
from polyfed.core.metrics import auc
from polyfed.core.protocols import Model
from polyfed.core.tree import Array
from polyfed.data import LeakWarning, Parts, Raw, Split
from polyfed.run import hospitals
from polyfed.run.client import first_env
from polyfed.run.hospitals import SITES, Settings

FOLDS = 4
SEEDS, ROTATIONS = range(10), range(4)
#: Splits that the settings were chosen on; none of them is reported.
CHOOSING = range(100, 103)
METHODS = ("alone", "rows", "alone longer", "statistics", "pooled")
#: What each way to share is measured against: a drawn set is larger, so its digests are more steps.
AGAINST = {"rows": "alone", "statistics": "alone longer"}
RESULTS = Path(__file__).parent / "results" / "hospitals.json"

Cut = Mapping[str, Parts]
Scores = Mapping[str, Array]  # hospital -> a score for each test row
Figures = dict[str, dict[str, float]]  # method -> hospital -> AUC


# ------------------------------------------------------------------------------------------ who sees which rows


@cache
def rows_of(site: str) -> Raw:
    return hospitals.frame_rows(site)


def labels(site: str) -> Array:
    target = rows_of(site).target
    assert target is not None
    return target.astype(np.int64)


def cuts(seed: int, within: Mapping[str, Array] | None = None) -> list[Cut]:
    """Each hospital's rows, or those `within`, cut into folds; the public rows come out of the training part."""
    folds = []
    for number in range(FOLDS):
        cut = {}
        for site in SITES:
            all_rows = np.arange(len(labels(site))) if within is None else within[site]
            test = all_rows[tables.folds(labels(site)[all_rows], FOLDS, seed=seed)[number]]
            cut[site] = with_public(site, np.setdiff1d(all_rows, test), test, seed)
        folds.append(cut)
    return folds


def inner_cuts(seed: int) -> list[Cut]:
    """Folds within the training part of the seed's first fold: its test rows are never looked at."""
    first = cuts(seed)[0]
    return cuts(seed + 1000, {site: part.with_public().train for site, part in first.items()})


def with_public(site: str, train: Array, test: Array, seed: int) -> Parts:
    share = hospitals.PUBLIC * FOLDS / (FOLDS - 1)  # PUBLIC is a share of all rows
    parts = tables.divide(site, rows_of(site).take(train), Split(0.0, 0.0, share, "class"), seed=seed)
    return Parts(train[parts.train], test=test, public=train[parts.public])


# ------------------------------------------------------------------------------------------ what is compared


@cache
def models(rotation: int, settings: Settings) -> dict[str, Model]:
    """Made once: a network that is built again for each fold costs more than its training."""
    return hospitals.models(rotation, settings)


def clients(cut: Cut, seed: int, rotation: int, settings: Settings, mode: hospitals.Mode) -> tuple[pf.FedMD, list]:
    algorithm, joining = hospitals.clients(seed, parts=cut, mode=mode, rotation=rotation, settings=settings)
    return algorithm, [replace(client, model=models(rotation, settings)[client.name]) for client in joining]


def rows(cut: Cut, seed: int, rotation: int, settings: Settings) -> Scores:
    """Federated on rows that are set aside."""
    algorithm, joining = clients(cut, seed, rotation, settings, "rows")
    return scored(algorithm, joining, settings.rounds, seed)


def statistics(cut: Cut, seed: int, rotation: int, settings: Settings) -> Scores:
    """Federated on drawn rows: each hospital trains on all of its own."""
    whole = {site: parts.with_public() for site, parts in cut.items()}
    algorithm, joining = clients(whole, seed, rotation, settings, "statistics")
    return scored(algorithm, joining, settings.rounds, seed)


def alone(cut: Cut, seed: int, rotation: int, settings: Settings) -> Scores:
    """Each hospital by itself, on all of its training rows, with as many optimizer steps as in mode "rows"."""
    shared = sum(len(parts.public) for parts in cut.values())
    steps = {site: federated_steps(len(cut[site].train), shared, settings) for site in SITES}
    return by_itself(cut, seed, rotation, settings, steps)


def alone_longer(cut: Cut, seed: int, rotation: int, settings: Settings) -> Scores:
    """As `alone`, with as many optimizer steps as in mode "statistics"."""
    own = {site: len(parts.with_public().train) for site, parts in cut.items()}
    steps = {site: federated_steps(own[site], settings.drawn, settings) for site in SITES}
    return by_itself(cut, seed, rotation, settings, steps)


def federated_steps(own: int, shared: int, settings: Settings) -> int:
    """Optimizer steps of a network in the federation: on its own rows, and on the shared ones."""

    def batches(count: int) -> int:
        return math.ceil(count / settings.batch_size)

    return settings.rounds * settings.epochs * batches(own) + (settings.rounds - 1) * settings.digest * batches(shared)


def by_itself(cut: Cut, seed: int, rotation: int, settings: Settings, steps: Mapping[str, int]) -> Scores:
    found: dict[str, Array] = {}
    for client in clients(cut, seed, rotation, settings, "rows")[1]:
        own = replace(client, split=cut[client.name].with_public())
        algorithm = pf.Local(steps=math.ceil(steps[client.name] / settings.rounds))
        found |= scored(algorithm, [own], settings.rounds, seed)
    return found


def pooled(cut: Cut, seed: int, rotation: int, settings: Settings) -> Scores:
    """Each hospital's model and preprocessing on the training rows of all, by as many epochs: nobody could do that."""
    joining = []
    for client in clients(cut, seed, rotation, settings, "rows")[1]:
        site = client.name
        taken = [(other, cut[other].with_public().train) for other in SITES]
        parts = [rows_of(site).take(cut[site].test), *(rows_of(other).take(train) for other, train in taken)]
        count = len(cut[site].test)
        target = np.concatenate([part.target for part in parts if part.target is not None])
        together = replace(tables.concat(parts), target=target)
        split = Parts(np.arange(count, len(together)), test=np.arange(count))
        joining.append(replace(client, data=together, target=None, split=split))
    return scored(pf.Local(), joining, settings.rounds, seed)


def scored(algorithm: pf.Algorithm, joining: list[pf.Client], rounds: int, seed: int) -> Scores:
    """Trains, and gives each hospital's test rows the log odds that its own model sees."""
    options = {"evaluate_every": 0, "test": False, "task": "classification"}
    result = pf.simulate(algorithm, joining, rounds=rounds, seed=seed, **options)
    found = {}
    for name, site in result.population.sites.items():
        assert site.test is not None
        request = Predict(start=result.starts(name), rows=site.test.unlabelled())
        logits = site.model.predict(request, site.test, first_env(site, seed))
        found[name] = logits[:, 1] - logits[:, 0]
    return found


COMPARED: dict[str, Callable[[Cut, int, int, Settings], Scores]] = {
    "alone": alone,
    "rows": rows,
    "alone longer": alone_longer,
    "statistics": statistics,
    "pooled": pooled,
}


def figures(folds: list[Cut], seed: int, rotation: int, settings: Settings, methods: Iterable[str]) -> Figures:
    """method -> hospital -> AUC of the scores of all folds together; "METHOD by fold" -> the mean of each fold's AUC."""
    found: Figures = {}
    for method in methods:
        by_fold = [COMPARED[method](cut, seed, rotation, settings) for cut in folds]
        found[method], found[f"{method} by fold"] = {}, {}
        for site in SITES:
            scores = [of_fold[site] for of_fold in by_fold]
            truth = [labels(site)[cut[site].test] for cut in folds]
            found[method][site] = auc(np.concatenate(scores), np.concatenate(truth))
            found[f"{method} by fold"][site] = float(np.mean([auc(s, t) for s, t in zip(scores, truth, strict=True)]))
    return found


# ------------------------------------------------------------------------------------------ what it says


Runs = dict[tuple[int, int], Figures]  # (seed, rotation) -> figures


def per_seed(runs: Runs, method: str, site: str, rotations: Iterable[int]) -> Array:
    """(seeds,) AUC, the mean over rotations; "mean" is the mean over hospitals."""
    wanted, sites = list(rotations), SITES if site == "mean" else (site,)
    seeds = sorted({seed for seed, _ in runs})
    return np.array([np.mean([runs[s, r][method][at] for r in wanted for at in sites]) for s in seeds])


def interval(sample: Array) -> tuple[float, float]:
    """90 % interval of the mean by Student's t: how much the cut into folds, the starts and the orders matter."""
    half = float(student.ppf(0.95, len(sample) - 1)) * sample.std(ddof=1) / math.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


def summary(runs: Runs, rotations: Iterable[int]) -> dict[str, dict[str, object]]:
    """hospital -> mean AUC of each method, and gain over alone with its interval for each way to share."""
    wanted, said = list(rotations), {}
    for site in (*SITES, "mean"):
        line: dict[str, object] = {
            name: round(float(per_seed(runs, name, site, wanted).mean()), 4) for name in next(iter(runs.values()))
        }
        for mode, baseline in AGAINST.items():
            for by in ("", " by fold"):
                gain = per_seed(runs, mode + by, site, wanted) - per_seed(runs, baseline + by, site, wanted)
                line[f"gain {mode}{by}"] = [round(x, 4) for x in (float(gain.mean()), *interval(gain))]
        said[site] = line
    return said


def table(said: Mapping[str, Mapping[str, object]], title: str) -> str:
    lines = [
        title,
        f"{'':<13}" + "".join(f"{name:>14}" for name in METHODS) + "    gain rows [90 %]         statistics",
    ]
    for site, line in said.items():
        gains = [line["gain rows"], line["gain statistics"]]
        text = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain) for gain in gains]  # type: ignore[misc]  # triples
        lines.append(f"{site:<13}" + "".join(f"{line[name]:>14.3f}" for name in METHODS) + "    " + "  ".join(text))
    return "\n".join(lines)


def judged(runs: Runs, rotations: Iterable[int], prefix: str) -> list[bench.Result]:
    """The aims as figures: the mean gain last, which is the main one."""
    wanted, results = list(rotations), []
    for mode in ("statistics", "rows"):
        gains = {
            site: per_seed(runs, mode, site, wanted) - per_seed(runs, AGAINST[mode], site, wanted)
            for site in (*SITES, "mean")
        }
        lows = [interval(gains[site])[0] for site in SITES]
        results.append(
            bench.Result(f"{prefix}.{mode}.lowest", min(lows), "AUC, least lower end of a site", tuple(lows))
        )
        for site in ("switzerland", "va", "mean"):
            gain = gains[site]
            results.append(bench.Result(f"{prefix}.{mode}.{site}", float(gain.mean()), "AUC gained", tuple(gain)))
    return results


def of_seed(seed: int, rotations: Iterable[int]) -> Runs:
    """Every method of one seed: what a worker does."""
    warnings.simplefilter("ignore", LeakWarning)  # some patients equal another in every input
    folds = cuts(seed)
    return {(seed, rotation): figures(folds, seed, rotation, hospitals.DEFAULT, METHODS) for rotation in rotations}


def measure() -> list[bench.Result]:
    seeds, rotations = (range(2), range(1)) if QUICK else (SEEDS, ROTATIONS)
    runs: Runs = {}
    begin = time.monotonic()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(seeds)), mp_context=get_context("spawn")) as workers:
        for done in workers.map(of_seed, seeds, [rotations] * len(seeds)):
            runs |= done
            if not QUICK:
                print(f"{len(runs)} runs: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
                if len(runs) > len(rotations):
                    keep(runs, time.monotonic() - begin)
    if "--json" not in sys.argv:
        print(table(summary(runs, rotations), "AUC, mean over seeds and rotations"))
        print(table(summary(runs, [0]), "\nAUC, mean over seeds, the default assignment alone"), "\n")
    return judged(runs, rotations, "hospitals.quick" if QUICK else "hospitals")


def keep(runs: Runs, seconds: float) -> None:
    """Writes what is known so far beside the benchmark."""
    said = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": bench.commit(),
        "machine": bench.machine(),
        "seconds": round(seconds),
        "seeds": sorted({seed for seed, _ in runs}),
        "settings": asdict(hospitals.DEFAULT),
        "all rotations": summary(runs, ROTATIONS),
        **{f"rotation {rotation}": summary(runs, [rotation]) for rotation in ROTATIONS},
        "runs": {
            f"seed {s}, rotation {r}": {
                method: {site: round(value, 5) for site, value in by_site.items()} for method, by_site in found.items()
            }
            for (s, r), found in runs.items()
        },
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(said, indent=1) + "\n")


# ------------------------------------------------------------------------------------------ how the settings were chosen


CHOSEN_BY = ("alone", "rows", "statistics")


def candidates() -> dict[str, Settings]:
    """One setting changed at a time from the chosen ones."""
    changes: list[dict[str, object]] = [
        {"lr": 0.01},
        {"decay": 0.1},
        {"hidden": 32},
        {"c": 0.05},
        {"c": 1.0},
        {"leaf": 1},
        {"leaf": 10},
        {"temperature": 2.0},
        {"digest": 4},
        {"digest": 16},
        {"rounds": 2},
        {"rounds": 5},
        {"soft_weight": 0.3},
        {"soft_weight": 3.0},
    ]
    changed = {", ".join(f"{k}={v}" for k, v in change.items()): change for change in changes}
    default = hospitals.DEFAULT
    return {"as chosen": default, **{n: replace(default, **c) for n, c in changed.items()}}  # type: ignore[arg-type]  # its fields


def choose() -> None:
    """Prints mean AUC over hospitals, rotations and `CHOOSING`, for each candidate."""
    warnings.simplefilter("ignore", LeakWarning)
    print(f"{'inner folds':<18}" + "".join(f"{name:>12}" for name in CHOSEN_BY))
    for name, settings in candidates().items():
        runs = {
            (seed, rotation): figures(inner_cuts(seed), seed, rotation, settings, CHOSEN_BY)
            for seed in CHOOSING
            for rotation in ROTATIONS
        }
        means = [per_seed(runs, method, "mean", ROTATIONS).mean() for method in CHOSEN_BY]
        print(f"{name:<18}" + "".join(f"{mean:>12.4f}" for mean in means), flush=True)


QUICK = "--quick" in sys.argv

if __name__ == "__main__":
    if "--choose" in sys.argv:
        choose()
    else:
        sys.argv = [word for word in sys.argv if word != "--quick"]  # the shared reader of words knows only its own
        bench.main(__doc__, measure)
