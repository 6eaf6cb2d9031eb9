"""What starting costs: the import, and a whole process that trains a trivial federation.

    python benchmarks/startup.py [--json]

The federation has two clients and three rounds, and a model of the user's own in NumPy, which needs no extra. Figures are
CPU seconds of a new process, medians of seven; the import's are those beyond an empty interpreter's.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import resource
import statistics
import subprocess
import sys
from dataclasses import dataclass, field

import bench
import numpy as np

TIMES = 7


@dataclass(frozen=True, eq=False)
class Softmax:
    """Softmax regression by full-batch gradient steps: a `polyfed` model in thirty lines."""

    lr: float = 0.5
    steps: int = 5
    kind: str = "Softmax"
    offers: frozenset[str] = frozenset({"params", "predict"})
    key: str = "softmax"
    settings: dict[str, float] = field(default_factory=dict)

    def first(self, rows, env):
        from polyfed import Tree

        return Tree({"weight": np.zeros((rows.x.shape[1], env.problem.outputs), np.float32)})

    def weight(self, start, rows, env):
        state = self.first(rows, env)
        for tree in start:
            state = state.overlay(tree)
        return np.array(state["weight"])

    def fit(self, request, rows, env):
        from polyfed import Tree
        from polyfed.core.algorithm import Fitted

        weight, hot = self.weight(request.start, rows, env), np.eye(env.problem.outputs, dtype=np.float32)[rows.target]
        for _ in range(self.steps):
            z = rows.x @ weight
            e = np.exp(z - z.max(1, keepdims=True))
            weight -= self.lr * rows.x.T @ (e / e.sum(1, keepdims=True) - hot) / len(rows)
        return Fitted(Tree({"weight": weight}), self.steps)

    def predict(self, request, rows, env):
        return rows.x @ self.weight(request.start, rows, env)

    def export(self, state, rows, env):
        del rows, env
        return np.array(state["weight"])


def federation() -> None:
    import polyfed as pf

    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 4)).astype(np.float32)
    y = (x.sum(1) > 0).astype(int)
    clients = [pf.Client(name, Softmax(), data=(x[i::2], y[i::2])) for i, name in enumerate(("north", "south"))]
    print(pf.simulate(pf.FedAvg(), clients, rounds=3).table())


def spent(*words: str) -> float:
    """CPU seconds of a new process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure() -> list[bench.Result]:
    kinds = {"nothing": ("-c", ""), "import": ("-c", "import polyfed"), "federation": (__file__, "--federation")}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(TIMES):
        for kind, words in kinds.items():
            seconds[kind].append(spent(*words))
    bare = statistics.median(seconds["nothing"])
    imported = [s - bare for s in seconds["import"]]
    whole = seconds["federation"]
    return [
        bench.Result("startup.import", statistics.median(imported), "CPU s of `import polyfed`", imported),
        bench.Result("startup.federation", statistics.median(whole), "CPU s, whole process", whole),
    ]


if __name__ == "__main__":
    if sys.argv[1:] == ["--federation"]:
        federation()
    else:
        bench.main(__doc__, measure)
