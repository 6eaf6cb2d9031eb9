"""The fold of 25 M float32 entries against a memcpy of the same bytes, with numba and with numpy alone.

    python benchmarks/fold.py [--json]

Uploads are folded in blocks of 4, so that block sums are merged as they are in a run. Copy and the two kernels take
turns, upload by upload; the figure is the median of copy time over fold time, in CPU seconds. Memory is what the fold
holds beside the uploads at its peak, in models of 100 MB: two accumulators and a scratch.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time
import tracemalloc

import bench
import numpy as np

from polyfed.core import kernels
from polyfed.core.aggregate import Fold
from polyfed.core.message import Message
from polyfed.core.tree import Tree, aligned

SIZE = 25_000_000
UPLOADS = 24
BLOCK = 4
ALL_KERNELS = kernels.compiled


def numpy_only() -> None:
    """Stands in for `kernels.compiled` on a machine without numba."""


def upload(seed: int) -> Message:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((SIZE // 5000, 5000), np.float32)
    return Message({"params": Tree({"base.weight": rows})}, {"num_examples": 100.0 + seed})


def add(fold: Fold, position: int, message: Message, kernel: str) -> float:
    """CPU seconds of one upload: another process on the core must not count."""
    kernels.compiled = ALL_KERNELS if kernel == "numba" else numpy_only
    begin = time.thread_time()
    fold.add(position, message, lambda _: message.numbers["num_examples"])
    return time.thread_time() - begin


def copied(target: np.ndarray, source: np.ndarray) -> float:
    begin = time.thread_time()
    np.copyto(target, source)
    return time.thread_time() - begin


def measure() -> list[bench.Result]:
    messages = [upload(seed) for seed in range(3)]
    target = aligned(SIZE, "float32")
    names = ["numba", "numpy"] if ALL_KERNELS() else ["numpy"]
    folds = {name: Fold(BLOCK) for name in names}
    for position in range(2 * BLOCK):  # pages touched, numba compiled
        for name in names:
            add(folds[name], position, messages[position % 3], name)
        copied(target, messages[position % 3].trees["params"].flat)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for position in range(2 * BLOCK, 2 * BLOCK + UPLOADS):
        message = messages[position % 3]
        for name in names if position % 2 else reversed(names):
            copy = copied(target, message.trees["params"].flat)
            ratios[name].append(copy / add(folds[name], position, message, name))
    sums = {name: fold.finish().sum("params") for name, fold in folds.items()}
    equal = len({tree.digest for tree in sums.values()}) == 1
    del folds, sums, target
    results = [bench.Result("fold.accumulators", held(messages), "models held by the fold at its peak")]
    if len(names) == 2:
        results.append(bench.Result("fold.equal_bits", float(equal), "1 = numba and numpy give equal bits"))
    for name in reversed(names):
        median = statistics.median(ratios[name])
        results.append(bench.Result(f"fold.{name}", median, "of the speed of memcpy", tuple(ratios[name])))
    return results


def held(messages: list[Message]) -> float:
    """Peak memory of a fold of three blocks, in models, by numpy's own account of its arrays."""
    kernels.compiled = ALL_KERNELS
    tracemalloc.start()
    fold = Fold(BLOCK)
    for position in range(3 * BLOCK):
        add(fold, position, messages[position % 3], "numpy")
    fold.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / (4 * SIZE)


if __name__ == "__main__":
    bench.main(__doc__, measure)
