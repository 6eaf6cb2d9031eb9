"""What benchmarks over seeds share: seeds in worker processes, paired intervals by Student's t, raw samples kept as JSON.

seeds.main(__doc__, "student", of_seed, judged, table, seeds=range(5))     # of_seed(seed) -> {name: figure}
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import bench
import numpy as np
from scipy.stats import t as student

Figures = dict[str, float]
Found = Mapping[str, np.ndarray]  # figure -> (seeds,)
LEVEL = 0.9
QUICK_SEEDS = range(2)


def interval(sample: np.ndarray) -> tuple[float, float]:
    """90 % interval of the mean by Student's t."""
    half = float(student.ppf((1 + LEVEL) / 2, len(sample) - 1)) * sample.std(ddof=1) / math.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


def told(sample: np.ndarray, digits: int = 3) -> str:
    """Mean and interval of a difference, as text."""
    low, high = interval(sample)
    return f"{sample.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def mean(name: str, sample: np.ndarray, unit: str) -> bench.Result:
    """Judged by the mean over seeds."""
    low, high = interval(sample)
    return bench.Result(name, float(sample.mean()), f"{unit} [{low:.3g}, {high:.3g}]", tuple(map(float, sample)))


def lower_end(name: str, sample: np.ndarray, unit: str) -> bench.Result:
    """Judged by the lower end of the interval: above 0, it leaves 0 out."""
    return bench.Result(name, interval(sample)[0], f"{unit}, lower end", tuple(map(float, sample)))


def main(
    about: str | None,
    name: str,
    of_seed: Callable[[int], Figures],
    judged: Callable[[Found, str], Sequence[bench.Result]],
    table: Callable[[Found], str],
    seeds: Sequence[int],
) -> None:
    """Measures every seed, keeps the samples as results/NAME.json, tells; `--quick` is two seeds, judged by no bar."""
    quick = "--quick" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--quick"]  # the shared reader of words knows only its own
    bench.main(about, partial(_measured, name, of_seed, judged, table, QUICK_SEEDS if quick else seeds, quick))


def _measured(
    name: str,
    of_seed: Callable[[int], Figures],
    judged: Callable[[Found, str], Sequence[bench.Result]],
    table: Callable[[Found], str],
    seeds: Sequence[int],
    quick: bool,
) -> Sequence[bench.Result]:
    begin, runs = time.monotonic(), []
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(seeds)), mp_context=get_context("spawn")) as workers:
        for seed, run in zip(seeds, workers.map(of_seed, seeds), strict=True):
            runs.append(run)
            print(f"seed {seed} done after {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    found = {figure: np.array([run[figure] for run in runs]) for figure in runs[0]}
    seconds = time.monotonic() - begin
    if "--json" not in sys.argv:
        print(table(found), f"\n\n{len(seeds)} seeds, {seconds:.0f} seconds\n", sep="")
    results = judged(found, f"{name}.quick" if quick else name)
    if not quick:
        _keep(name, seeds, seconds, found, results)
    return results


def _keep(name: str, seeds: Sequence[int], seconds: float, found: Found, results: Sequence[bench.Result]) -> None:
    said = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": bench.commit(),
        "machine": bench.machine(),
        "seconds": round(seconds),
        "seeds": list(seeds),
        "judged": {r.name: [round(r.value, 5), r.unit, r.bar_text, "holds" if r.holds else "MISSED"] for r in results},
        "samples": {figure: [float(f"{value:.9g}") for value in sample] for figure, sample in found.items()},
    }
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(said, indent=1) + "\n")
