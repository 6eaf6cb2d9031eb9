"""Two simulated federations beside the plain PyTorch loop that does the same steps, in one process, round by round.

    python benchmarks/simbench.py [--json]

| work | model | clients | a round | rounds |
|---|---|---|---|---|
| W1 | CNN of 109 k parameters, 62 classes, images 28 x 28 | 200 of 80 to 120 rows | 20, batches of 20 | 10 |
| W2 | MLP of 4.6 k parameters, 10 classes, 60 features | 1000 of log-normal sizes | 100, batches of 10 | 20 |

A client does one epoch of plain SGD (0.05) in stored order; the server averages by rows (McMahan et al. 2017).

The loop executor takes turns with the plain loop in torch's default memory format and in channels_last. Figures are
ratios of CPU seconds a round, medians without the two first rounds. Losses are those of the test rows. They are held
against two plain loops: one that averages with torch's `add_(alpha=)`, a fused multiply-add, and one that averages as
polyfed documents it (updates; round(n * x), then add; blocks of 16; then one division): the second must be equal to
five digits, the first shows what the rounding of a sum makes of the same steps after some rounds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bench
import numpy as np

LR = 0.05
TESTED = 2000
WARM_UP = 2
BLOCK = 16


@dataclass(frozen=True)
class Work:
    """One of the two works; what is drawn, and in which order, decides the losses below.

    Attributes:
        early: the round after which losses must be equal to five digits.
        known: round -> test loss that a plain loop has been seen to reach on this work.
    """

    name: str
    seed: int
    clients: int
    cohort: int
    rounds: int
    batch: int
    classes: int
    shape: tuple[int, ...]
    early: int
    known: Mapping[int, float]

    @property
    def width(self) -> int:
        return int(np.prod(self.shape))

    def cohort_of(self, round_num: int) -> list[int]:
        """Clients of a round, from 1, in the order in which they are folded."""
        return np.random.default_rng(999 + round_num).choice(self.clients, self.cohort, replace=False).tolist()


W1_LOSSES = {1: 4.10299, 2: 4.05699, 3: 3.94303, 4: 3.77899}
W1 = Work("w1", 11, 200, 20, 10, 20, 62, (1, 28, 28), 4, W1_LOSSES)
W2 = Work("w2", 22, 1000, 100, 20, 10, 10, (60,), 6, {2: 2.24990, 6: 2.11904})

Rows = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Data:
    clients: Sequence[Rows]
    test: Rows


def images() -> Data:
    """Noisy prototypes of 62 classes, each a blurred 7 x 7 pattern; clients differ in their mix of classes."""
    rng, k = np.random.default_rng(W1.seed), W1.classes
    sizes = rng.integers(80, 121, W1.clients)
    prototypes = np.kron(rng.normal(size=(k, 7, 7)), np.ones((4, 4))).reshape(k, W1.width)
    labels = [rng.choice(k, size=n, p=rng.dirichlet(np.full(k, 0.3))) for n in sizes]

    def drawn(y: np.ndarray) -> Rows:
        x = prototypes[y] + 0.6 * rng.normal(size=(len(y), W1.width))
        return x.astype(np.float32).reshape(-1, *W1.shape), y.astype(np.int64)

    return Data([drawn(y) for y in labels], drawn(rng.integers(0, k, TESTED)))


def features() -> Data:
    """One linear rule with noise for everybody; clients differ in where their rows lie, and much in how many they have."""
    rng, k = np.random.default_rng(W2.seed), W2.classes
    sizes = np.clip(rng.lognormal(np.log(60) - 0.5, 1.0, W2.clients), 10, 1000).astype(int)
    rule = rng.normal(size=(W2.width, k))
    shifts = rng.normal(scale=0.5, size=(W2.clients, W2.width))
    clients = []
    for n, shift in zip(sizes, shifts, strict=True):
        x = rng.normal(size=(n, W2.width)) + shift
        clients.append((x.astype(np.float32), np.argmax(x @ rule + rng.normal(size=(n, k)), axis=1)))
    x = rng.normal(size=(TESTED, W2.width)) + 0.5 * rng.normal(size=(TESTED, W2.width))
    return Data(clients, (x.astype(np.float32), np.argmax(x @ rule, axis=1)))


def data_of(work: Work) -> Data:
    return images() if work.name == W1.name else features()


# ---------------------------------------------------------------- the model, in torch


def module_of(work: Work) -> Any:
    import torch
    from torch import nn

    class CNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.c2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
            self.f1, self.f2 = nn.Linear(1568, 64), nn.Linear(64, W1.classes)

        def forward(self, x: Any) -> Any:
            x = nn.functional.max_pool2d(self.c1(x).relu(), 2)
            x = nn.functional.max_pool2d(self.c2(x).relu(), 2)
            return self.f2(self.f1(x.flatten(1)).relu())

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f1, self.f2 = nn.Linear(W2.width, 64), nn.Linear(64, W2.classes)

        def forward(self, x: Any) -> Any:
            return self.f2(self.f1(x).relu())

    module, rng = (CNN() if work.name == W1.name else MLP()), np.random.default_rng(7)
    with torch.no_grad():
        for weight, bias in zip(*[iter(module.parameters())] * 2, strict=True):
            bound = weight[0].numel() ** -0.5  # one over the root of the inputs of a unit
            for p in (weight, bias):
                p.copy_(torch.from_numpy(rng.uniform(-bound, bound, tuple(p.shape)).astype(np.float32)))
    return module


def tested(work: Work, state: Sequence[np.ndarray], data: Data) -> float:
    """The loss of a state on the test rows, in torch's default memory format."""
    import torch

    module = module_of(work).eval()
    x, y = (torch.from_numpy(a) for a in data.test)
    with torch.no_grad():
        for p, values in zip(module.parameters(), state, strict=True):
            p.copy_(torch.from_numpy(np.array(values)))
        return float(torch.nn.functional.cross_entropy(module(x), y))


# ---------------------------------------------------------------- the systems

Side = Iterator[Sequence[np.ndarray]]
Average = Callable[[Sequence[Any], Iterator[tuple[int, Sequence[Any]]], int], list[Any]]


def fused(start: Sequence[Any], trained: Iterator[tuple[int, Sequence[Any]]], total: int) -> list[Any]:
    """The mean of models as a plain loop writes it: a running sum, one rounding an addition."""
    import torch

    mean = [torch.zeros_like(p) for p in start]
    for n, params in trained:
        with torch.no_grad():
            for m, p in zip(mean, params, strict=True):
                m.add_(p, alpha=n / total)
    return mean


def documented(start: Sequence[Any], trained: Iterator[tuple[int, Sequence[Any]]], total: int) -> list[Any]:
    """The mean of updates as polyfed documents it, written out in numpy."""
    import torch

    before = [p.numpy() for p in start]
    blocks: list[list[np.ndarray]] = []
    for position, (n, params) in enumerate(trained):
        terms = [(p.detach().numpy() - b) * np.float32(n) for p, b in zip(params, before, strict=True)]
        blocks = [*blocks, terms] if position % BLOCK == 0 else [*blocks[:-1], plus(blocks[-1], terms)]
    sums = blocks[0]
    for block in blocks[1:]:
        sums = plus(sums, block)
    return [torch.from_numpy(b + s / np.float32(total)) for b, s in zip(before, sums, strict=True)]


def plus(a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
    return [x + y for x, y in zip(a, b, strict=True)]


def plain(work: Work, data: Data, *, average: Average = fused, channels_last: bool = False) -> Side:
    """The ordinary loop: one module, its parameters set for each client, torch's own optimizer."""
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    module = module_of(work)
    if channels_last:
        module = module.to(memory_format=layout)
    rows = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in data.clients]
    if channels_last:
        rows = [(x.contiguous(memory_format=layout), y) for x, y in rows]
    state = [p.detach().clone(memory_format=torch.preserve_format) for p in module.parameters()]

    def trained(cohort: list[int]) -> Iterator[tuple[int, Sequence[Any]]]:
        for client in cohort:
            x, y = rows[client]
            with torch.no_grad():
                for p, value in zip(module.parameters(), state, strict=True):
                    p.copy_(value)
            optimizer = torch.optim.SGD(module.parameters(), lr=LR)
            module.train()
            for i in range(0, len(y), work.batch):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(module(x[i : i + work.batch]), y[i : i + work.batch]).backward()
                optimizer.step()
            yield len(y), list(module.parameters())

    for round_num in range(1, work.rounds + 1):
        cohort = work.cohort_of(round_num)
        state = average(state, trained(cohort), sum(len(rows[c][1]) for c in cohort))
        yield [p.numpy() for p in state]


@dataclass(frozen=True)
class Fixed:
    """The cohort that a work names, in its own order."""

    work: Work

    def select(self, population: Sequence[str], round_num: int, run_seed: int) -> tuple[str, ...]:
        del run_seed
        return tuple(population[i] for i in self.work.cohort_of(round_num))

    def note(self, population: Sequence[str]) -> str:
        del population
        return ""


def federation(work: Work, data: Data, memory_format: str = "auto", **more: Any) -> Any:
    """The open loop of polyfed over the same work."""
    import polyfed as pf

    model = pf.torch(module_of(work), lr=LR, batch_size=work.batch, shuffle=False, memory_format=memory_format)
    clients = [
        pf.Client(f"c{i:04}", model, data=rows, split=pf.Parts(np.arange(len(rows[1]))))
        for i, rows in enumerate(data.clients)
    ]
    return pf.rounds(
        pf.FedAvg(),
        clients,
        rounds=work.rounds,
        schedule=pf.Sync(select=Fixed(work)),
        task="classification",
        evaluate_every=0,
        test=False,
        **more,
    )


def ours(work: Work, data: Data, memory_format: str = "auto") -> Side:
    for round_ in federation(work, data, memory_format):
        round_.update()
        params = round_.state.trees["params"]
        yield [params[name] for name in params]


# ---------------------------------------------------------------- measuring


@dataclass
class Measured:
    """CPU seconds and states, round by round, of every side."""

    seconds: dict[str, list[float]]
    losses: dict[str, dict[int, float]]

    def ratio(self, over: str, side: str = "polyfed") -> list[float]:
        return [a / b for a, b in zip(self.seconds[side], self.seconds[over], strict=True)][WARM_UP:]

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side][WARM_UP:])


def compared(work: Work, sides: Mapping[str, Side], data: Data) -> Measured:
    """Lets the sides take turns, in an order that turns with the rounds."""
    found = Measured({name: [] for name in sides}, {name: {} for name in sides})
    for round_num in range(1, work.rounds + 1):
        turned = list(sides)[round_num % len(sides) :] + list(sides)[: round_num % len(sides)]
        for name in turned:
            begin = time.process_time()
            state = next(sides[name])
            found.seconds[name].append(time.process_time() - begin)
            found.losses[name][round_num] = tested(work, state, data)
    return found


def sides_of(work: Work, data: Data) -> dict[str, Side]:
    sides = {
        "plain": plain(work, data),
        "polyfed": ours(work, data),
        "documented": plain(work, data, average=documented),
    }
    if work.name == W1.name:
        sides["plain, channels_last"] = plain(work, data, channels_last=True)
        sides["documented, channels_last"] = plain(work, data, average=documented, channels_last=True)
    return sides


def startup(work: Work) -> float:
    """CPU seconds until round 1 of polyfed's loop, without making the data, beyond those of ``import torch``."""

    def spent(*words: str) -> float:
        done = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1])

    torch = "import torch, time; torch.set_num_threads(1); print(time.process_time())"
    alone = statistics.median(spent("-c", torch) for _ in range(3))
    return statistics.median(spent(__file__, "--until-round-1", work.name) for _ in range(3)) - alone


def until_round_1(name: str) -> None:
    begin = time.process_time()
    work = W1 if name == W1.name else W2
    data = data_of(work)
    made = time.process_time() - begin
    next(iter(federation(work, data)))
    print(time.process_time() - made)


def results_of(work: Work) -> list[bench.Result]:
    data, name = data_of(work), f"simbench.{work.name}"
    found = compared(work, sides_of(work, data), data)
    same = "documented, channels_last" if work.name == W1.name else "documented"
    mine, fold, fma = found.losses["polyfed"], found.losses[same], found.losses["plain"]
    early, last = work.early, work.rounds
    known = max(abs(fma[r] - loss) for r, loss in work.known.items())
    ratio = found.ratio("plain")
    results = [
        bench.Result(f"{name}.startup", startup(work), "CPU s beyond import torch"),
        bench.Result(f"{name}.known", known, "plain loop: |loss - known|, largest"),
        bench.Result(f"{name}.early_fma", abs(mine[early] - fma[early]), f"|loss - plain's| @{early}"),
        bench.Result(f"{name}.early", abs(mine[early] - fold[early]), f"|loss - same fold's| @{early}"),
        bench.Result(f"{name}.end", abs(mine[last] / fma[last] - 1), f"of plain's loss @{last}, relative"),
        bench.Result(f"{name}.round", 1e3 * found.median("polyfed"), "ms CPU a round", found.seconds["polyfed"]),
    ]
    if work.name == W1.name:
        layout = found.ratio("plain, channels_last")
        results.append(bench.Result(f"{name}.same_format", statistics.median(layout), "of channels_last's CPU", layout))
    return [*results, bench.Result(f"{name}.default", statistics.median(ratio), "of the plain loop's CPU", ratio)]


def measure() -> list[bench.Result]:
    return [result for work in (W2, W1) for result in results_of(work)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--until-round-1"]:
        until_round_1(sys.argv[2])
    else:
        bench.main(__doc__, measure)
