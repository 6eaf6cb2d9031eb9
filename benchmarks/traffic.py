"""Does joining help to forecast traffic? Three cities and 26 car parks, alone and together, paired per seed.

    python benchmarks/traffic.py [--json] [--quick]

What examples/traffic does, for three seeds: each draws other first weights, other orders of rows, and other car parks that
join late with a quarter of their training rows. Alone is the same network with as many optimizer steps on all of the
participant's training rows. The rows and their parts in time are the same for all seeds.

`--quick` is two seeds of the example's quick size, judged by no bar: it says that this file runs.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import bench
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "traffic"))

import forecasts
from places import CITIES, everybody, newcomers
from seeds import interval

SEEDS = range(3)
RESULTS = Path(__file__).parent / "results" / "traffic.json"

Run = dict[
    str, dict[str, dict[str, float]]
]  # "old", "new", "congested", "delay" -> participant or "all" -> way -> figure


def of_seed(seed: int, *, quick: bool) -> Run:
    """All figures of one seed: what a worker does."""
    settings = replace(forecasts.QUICK if quick else forecasts.Settings(), executor="loop")
    places = everybody(quick=quick)
    few = newcomers(places, seed)
    ways = {
        "alone": forecasts.alone(places, few, seed, settings),
        "federated": forecasts.together(places, few, seed, settings),
    }
    old = [name for name in places if name not in few]
    quarter = {name: ways["alone"][f"{name}.quarter"] for name in few}
    return {
        "old": {
            name: forecasts.naive(places[name])
            | {way: forecasts.error(said[name][:, 0], places[name]) for way, said in ways.items()}
            for name in old
        },
        "new": {
            name: {
                "ridge, all": forecasts.naive(places[name])["ridge"],
                "alone, quarter": forecasts.error(quarter[name][:, 0], place, places[name]),
                "alone, all": forecasts.error(ways["alone"][name][:, 0], places[name]),
                "newcomer": forecasts.error(ways["federated"][name][:, 0], place, places[name]),
            }
            for name, place in few.items()
        },
        "congested": {
            name: {way: forecasts.congested(said[name], places[name]) for way, said in ways.items()} for name in old
        },
        "delay": {"all": forecasts.signal(places, ways, seed)},
    }


# ------------------------------------------------------------------------------------------ what it says


def mean_of(run: Run, part: str, way: str, names: Callable[[str], bool] = lambda _: True) -> float:
    return float(np.nanmean([figures[way] for name, figures in run[part].items() if names(name)]))


def is_city(name: str) -> bool:
    return name in CITIES


def is_park(name: str) -> bool:
    return name not in CITIES


#: figure -> (unit, its value in one seed)
FIGURES: dict[str, tuple[str, Callable[[Run], float]]] = {
    "gain.cities": (
        "sd less MAE than alone",
        lambda run: mean_of(run, "old", "alone", is_city) - mean_of(run, "old", "federated", is_city),
    ),
    "gain.parks": (
        "sd less MAE than alone",
        lambda run: mean_of(run, "old", "alone", is_park) - mean_of(run, "old", "federated", is_park),
    ),
    "ridge": (
        "sd less MAE than ridge",
        lambda run: mean_of(run, "old", "ridge") - mean_of(run, "old", "federated"),
    ),
    "congested": (
        "AUC gained over alone",
        lambda run: mean_of(run, "congested", "federated") - mean_of(run, "congested", "alone"),
    ),
    "delay.alone": (
        "s less delay than alone",
        lambda run: run["delay"]["all"]["alone"] - run["delay"]["all"]["federated"],
    ),
    "delay.fixed": (
        "s less delay than fixed",
        lambda run: run["delay"]["all"]["fixed"] - run["delay"]["all"]["federated"],
    ),
    "newcomers.quarter": (
        "sd less MAE than alone, quarter",
        lambda run: mean_of(run, "new", "alone, quarter") - mean_of(run, "new", "newcomer"),
    ),
    "newcomers": (
        "sd less MAE than alone, all rows",
        lambda run: mean_of(run, "new", "alone, all") - mean_of(run, "new", "newcomer"),
    ),
    "better": (
        "part of participants that gain",
        lambda run: float(np.mean([by["federated"] < by["alone"] for by in run["old"].values()])),
    ),
}


def judged(runs: Mapping[int, Run], prefix: str) -> list[bench.Result]:
    """The aims as figures, means over seeds; the part of participants that gain last, which is the main one."""
    results = []
    for name, (unit, figure) in FIGURES.items():
        sample = [figure(run) for run in runs.values()]
        results.append(bench.Result(f"{prefix}.{name}", float(np.mean(sample)), unit, tuple(sample)))
    return results


def summary(runs: Mapping[int, Run]) -> dict[str, object]:
    """Each figure's mean and paired interval over seeds; each way's mean; each participant's gain over alone."""
    said: dict[str, object] = {}
    for name, (unit, figure) in FIGURES.items():
        sample = np.array([figure(run) for run in runs.values()])
        said[name] = {"unit": unit, "mean and interval": [round(x, 4) for x in (sample.mean(), *interval(sample))]}
    for part in ("old", "new", "congested", "delay"):
        first = next(iter(next(iter(runs.values()))[part].values()))
        said[f"means, {part}"] = {
            way: round(float(np.mean([mean_of(run, part, way) for run in runs.values()])), 4) for way in first
        }
    names = dict.fromkeys(name for run in runs.values() for name in run["old"])
    said["gain by participant"] = {
        name: [
            round(r["old"][name]["alone"] - r["old"][name]["federated"], 4) for r in runs.values() if name in r["old"]
        ]
        for name in names
    }
    return said


def table(runs: Mapping[int, Run]) -> str:
    said = summary(runs)
    lines = [f"{'':<20}{'mean':>9}   90 % interval over {len(runs)} seeds"]
    for name, (unit, _) in FIGURES.items():
        mean, low, high = said[name]["mean and interval"]  # type: ignore[index]  # made above
        lines.append(f"{name:<20}{mean:>+9.4f}   [{low:+.4f}, {high:+.4f}]  {unit}")
    lines += [f"{name}: {value}" for name, value in said.items() if name.startswith("means")]
    return "\n".join(lines)


def keep(runs: Mapping[int, Run], seconds: float) -> None:
    """Writes what is known so far beside the benchmark."""
    said = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": bench.commit(),
        "machine": bench.machine(),
        "seconds": round(seconds),
        "settings": asdict(forecasts.Settings()),
        **summary(runs),
        "runs": {
            f"seed {seed}": {
                part: {name: {way: round(x, 5) for way, x in by.items()} for name, by in names.items()}
                for part, names in run.items()
            }
            for seed, run in runs.items()
        },
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(said, indent=1) + "\n")


def measure() -> list[bench.Result]:
    seeds, runs, begin = list(range(2) if QUICK else SEEDS), {}, time.monotonic()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(seeds)), mp_context=get_context("spawn")) as workers:
        waiting = {seed: workers.submit(of_seed, seed, quick=QUICK) for seed in seeds}
        for seed, answer in waiting.items():
            runs[seed] = answer.result()
            if not QUICK:
                print(f"{len(runs)} seeds: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
                if len(runs) > 1:
                    keep(runs, time.monotonic() - begin)
    if "--json" not in sys.argv:
        print(table(runs), "\n")
    return judged(runs, "traffic.quick" if QUICK else "traffic")


QUICK = "--quick" in sys.argv

if __name__ == "__main__":
    sys.argv = [word for word in sys.argv if word != "--quick"]  # the shared reader of words knows only its own
    bench.main(__doc__, measure)
