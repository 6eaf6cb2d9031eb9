"""Faulted rounds of the round engine per CPU second: step, record codec, journal framing and replay under all faults.

The simulation of tests/core/engine_simulation.py, seeds that its tests do not use; one core. Violations must be none.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import bench

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "core"))
import engine_simulation  # it lies beside the tests that it serves

ROUNDS, SAMPLES, FIRST = 4_000, 7, 5_000_000


def measure() -> list[bench.Result]:
    engine_simulation.tally(range(FIRST - 50, FIRST))
    runs = [
        engine_simulation.tally(range(start, start + ROUNDS), ROUNDS)
        for start in range(FIRST, FIRST + SAMPLES * ROUNDS, ROUNDS)
    ]
    for run in runs:
        for seed, what in run.violations:
            print(f"seed {seed}: {what}", file=sys.stderr)
    rates = [run.rounds / run.cpu_seconds for run in runs]
    crashes = sum(run.crashes for run in runs) / sum(run.rounds for run in runs)
    return [
        bench.Result("engine.violations", sum(len(run.violations) for run in runs), "violations"),
        bench.Result("engine.crashes", crashes, "coordinator crashes per round"),
        bench.Result("engine.faulted_rounds", statistics.median(rates), "rounds per CPU second", rates),
    ]


if __name__ == "__main__":
    bench.main(__doc__, measure)
