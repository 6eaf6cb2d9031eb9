"""Does joining help in the medical showcase? Each part of examples/medical on set-aside rows, paired with training alone.

    python benchmarks/medical.py [--json] [--quick]

Five seeds: of the division of the rows, the starts and the orders. What is compared makes equally many optimizer steps
and has all labelled training rows. Intervals are of the mean paired difference, 90 %, by Student's t over seeds. The
genes are left out where their files are not installed (examples/medical/README.md); `--quick` is two seeds of a few
rounds, judged by no bar. The result is kept in results/medical.json.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import bench
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "medical"))

import genes
import modalities
import paired
import thyroid
from figures import Figures, table
from seeds import interval

from polyfed.core.errors import DataError

HERE = Path(__file__).parent
QUICK = "--quick" in sys.argv
SEEDS = range(2) if QUICK else range(5)
RESULTS = HERE / "results" / "medical.json"
ALONE = tuple(f"{name} alone" for name in thyroid.CLINICS)  # the largest clinic first
IMAGES, PANELS = ("image-1", "image-2"), ("panel-mor", "panel-zer")

Measured = dict[str, Figures]  # part -> method -> participant -> figure


def of_seed(seed: int) -> Measured:
    """Every part, once."""
    found: Measured = {}
    found["thyroid.auc"], found["thyroid.accuracy"] = thyroid.personal(seed, small=QUICK)
    found["thyroid.student"] = thyroid.student_figures(*thyroid.teach(seed, small=QUICK))
    if has_genes():
        found["genes"] = genes.measure(seed, small=QUICK)
    found["modalities"] = modalities.measure(seed, small=QUICK)
    found["paired"] = paired.measure(seed, small=QUICK)
    return found


def has_genes() -> bool:
    try:
        genes.cohort("nki"), genes.cohort("transbig")
    except DataError as error:
        print(f"genes are left out: {error}", file=sys.stderr)
        return False
    return True


def gaps(runs: Mapping[int, Measured], part: str, one: str, other: str, who: tuple[str, ...] = ()) -> np.ndarray:
    """(seeds,) how much higher `one` is than `other`, the mean over participants."""
    made = []
    for found in runs.values():
        names = who or tuple(found[part][one])
        made.append(np.mean([found[part][one][name] - found[part][other][name] for name in names]))
    return np.array(made)


def teaching(runs: Mapping[int, Measured], who: tuple[str, ...]) -> np.ndarray:
    """(seeds,) the student's lead in accuracy over the mean of others."""
    figures = [found["thyroid.student"]["accuracy"] for found in runs.values()]
    return np.array([said["student"] - np.mean([said[name] for name in who]) for said in figures])


def compared(runs: Mapping[int, Measured]) -> dict[str, np.ndarray]:
    """name -> paired differences by seed; the main one last."""
    found = {
        "thyroid.student over ensemble": teaching(runs, ("ensemble",)),
        "thyroid.student over teachers": teaching(runs, thyroid.CLINICS),
        "thyroid.student over alone": teaching(runs, ALONE),
        "thyroid.student over the best alone": teaching(runs, ALONE[:1]),
        "thyroid.one model over alone": gaps(runs, "thyroid.auc", "one model", "alone"),
        "thyroid.heads over one model": gaps(runs, "thyroid.auc", "own heads", "one model"),
        "thyroid.heads over alone": gaps(runs, "thyroid.auc", "own heads", "alone"),
        "thyroid.heads over alone, accuracy": gaps(runs, "thyroid.accuracy", "own heads", "alone"),
        "thyroid.heads over pooled linear, accuracy": gaps(runs, "thyroid.accuracy", "own heads", "linear pooled"),
        "modalities.images over alone": gaps(runs, "modalities", "federated", "alone", IMAGES),
        "modalities.both over alone": gaps(runs, "modalities", "federated", "alone", ("both",)),
    }
    for name in PANELS:
        found[f"modalities.{name} over alone"] = gaps(runs, "modalities", "federated", "alone", (name,))
        found[f"modalities.{name}, every label over alone"] = gaps(runs, "modalities", "every label", "alone", (name,))
    found["paired.images over alone"] = gaps(runs, "paired", "federated", "alone", IMAGES)
    found["paired.genes over alone"] = gaps(runs, "paired", "federated", "alone", ("genes",))
    found["paired.both over alone"] = gaps(runs, "paired", "federated", "alone", ("both-1", "both-2"))
    found["paired.dropout, image missing"] = gaps(runs, "paired", "image missing", "image missing, no dropout")
    found["paired.dropout, genes missing"] = gaps(runs, "paired", "genes missing", "genes missing, no dropout")
    if all("genes" in measured for measured in runs.values()):
        for name in genes.COHORTS:
            found[f"genes.{name} over alone"] = gaps(runs, "genes", "federated", "alone", (name,))
    found["thyroid.heads over pooled linear"] = gaps(runs, "thyroid.auc", "own heads", "linear pooled")
    return found


def means(runs: Mapping[int, Measured]) -> Measured:
    first = next(iter(runs.values()))
    return {
        part: {
            method: {name: float(np.mean([found[part][method][name] for found in runs.values()])) for name in values}
            for method, values in figures.items()
        }
        for part, figures in first.items()
    }


def measure() -> list[bench.Result]:
    begin = time.monotonic()
    runs: dict[int, Measured] = {}
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(SEEDS)), mp_context=get_context("spawn")) as workers:
        for seed, found in zip(SEEDS, workers.map(of_seed, SEEDS), strict=True):
            runs[seed] = found
            print(f"seed {seed}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    differences = compared(runs)
    if not QUICK:
        keep(runs, differences, time.monotonic() - begin)
    if "--json" not in sys.argv:
        for part, figures in means(runs).items():
            print(table(part, figures, list(figures), mean=False), "\n")
        for name, sample in differences.items():
            print(f"{name:<46} {sample.mean():+.3f} [{interval(sample)[0]:+.3f}, {interval(sample)[1]:+.3f}]")
        print()
    prefix = "medical.quick" if QUICK else "medical"
    results = [
        bench.Result(f"{prefix}.{one_word(name)}", float(sample.mean()), "difference, mean over seeds", tuple(sample))
        for name, sample in differences.items()
    ]
    lead = differences["thyroid.heads over pooled linear"]
    lowest = bench.Result(f"{prefix}.thyroid.heads.lowest", interval(lead)[0], "AUC, lower end", tuple(lead))
    return [*results[:-1], lowest, results[-1]]


def one_word(name: str) -> str:
    return name.replace(", ", ".").replace(" ", "_")


def keep(runs: Mapping[int, Measured], differences: Mapping[str, np.ndarray], seconds: float) -> None:
    said = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": bench.commit(),
        "machine": bench.machine(),
        "seconds": round(seconds),
        "differences": {
            name: {"mean": round(float(s.mean()), 4), "interval": [round(x, 4) for x in interval(s)]}
            for name, s in differences.items()
        },
        "means": rounded(means(runs)),
        "runs": {f"seed {seed}": rounded(found) for seed, found in runs.items()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(said, indent=1) + "\n")


def rounded(found: Measured) -> Measured:
    return {
        part: {method: {name: round(value, 5) for name, value in values.items()} for method, values in figures.items()}
        for part, figures in found.items()
    }


if __name__ == "__main__":
    sys.argv = [word for word in sys.argv if word != "--quick"]  # the shared reader of words knows only its own
    bench.main(__doc__, measure)
