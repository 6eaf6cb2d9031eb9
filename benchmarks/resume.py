"""Runs with a checkpoint, killed by SIGKILL at many points and resumed in another process: do they end with the same bits?

    python benchmarks/resume.py [--json]

The federations are those of `tests/system/kinds.py`: a personal head in the clients' memories, a random cohort and a
roll-back; an optimizer at the server and batch normalisation; private models of torch, Keras and a forest. Points lie
before, within and after each write of the journal, of a blob and of a memory, inside clients' updates and evaluations,
around uploads and around what the server computes. "Same" is the SHA-256 of model and memories, the history and the test
metrics.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import bench

HELPER = Path(__file__).parents[1] / "tests" / "system" / "killing.py"
#: federation -> every n-th point is tried
TRIED = {"personal": 1, "server state": 2, "different": 6}


def resumed(name: str, nth: int) -> tuple[int, int]:
    """(points at which the run was killed, of those that ended with the same bits); prints a line a hook."""
    env = os.environ | {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(HELPER), name, folder, str(nth)]
        done = subprocess.run(words, env=env, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    killed = [(point, outcome == found["whole"]) for point, was_killed, outcome in found["resumed"] if was_killed]
    if "--json" not in sys.argv:
        tried, same = Counter(point[0] for point, _ in killed), Counter(point[0] for point, good in killed if good)
        hooks = ", ".join(f"{hook} {same[hook]} of {tried[hook]}" for hook in tried)
        print(f"{name:<14} {found['whole'][0][:16]}  the same when killed at: {hooks}", flush=True)
    return len(killed), sum(good for _, good in killed)


def measure() -> list[bench.Result]:
    counts = [resumed(name, nth) for name, nth in TRIED.items()]
    killed, same = (sum(count[i] for count in counts) for i in (0, 1))
    return [
        bench.Result("resume.kills", float(killed), "runs killed and resumed"),
        bench.Result("resume", same / killed, "of them end with the same bits"),
    ]


if __name__ == "__main__":
    bench.main(__doc__, measure)
