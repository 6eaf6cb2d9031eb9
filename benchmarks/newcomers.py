"""What a newcomer gains from a shared base and a default head: steps and labelled rows to the quality of training alone.

    python benchmarks/newcomers.py [--json] [--quick]

Handwritten digits (scikit-learn, 8x8). Four members with 120 rows each of unlike classes (Dirichlet 0.5) train FedPer
for 20 rounds: a base of 64-32, personal heads of 10 outputs; 200 rows without labels are public. Then a newcomer comes
with 120 rows of all classes. Alone it trains from a fresh start for 300 steps; its accuracy on 497 test rows at the end
is the aim. Measured is the first step, in tens, at which it reaches the aim when it starts from the base that the run
ended with: with a fresh head, or the default head that feedback made, base frozen or fine-tuned. A start that does not
reach it counts 300. And the smallest part of its rows with which it reaches the aim by the end, as a share of 1.

What stopping costs, in accuracy: the default head of round 5 in place of the last one's, as a newcomer receives it; and
members that go on alone after round 5 in place of exchanging to the end. And members that exchange after every fourth
pass, with as many passes.

Test rows decide nothing: no setting was chosen by them. Figures are means over seeds with paired 90 % intervals.
`--quick` is two seeds, judged by no bar.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import bench
import numpy as np
from seeds import interval
from sklearn.datasets import load_digits

import polyfed as pf
from polyfed.core.algorithm import Predict
from polyfed.core.metrics import all_of
from polyfed.run.client import first_env

SEEDS = range(8)
ROUNDS, STOPPED, EVERY = 20, 5, 4
MEMBERS, ROWS, PUBLIC = 4, 120, 200
STEPS, BETWEEN = 300, 10
PARTS = (0.1, 0.25, 0.5, 0.75, 1.0)
HEADS: dict[str, str | None] = {"fresh": None, "mean": "mean", "distill": "distill"}
RESULTS = Path(__file__).parent / "results" / "newcomers.json"

Figures = dict[str, float]


def net() -> Any:
    from torch import nn

    base = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    return nn.Sequential(OrderedDict(base=base, head=nn.Linear(32, 10)))


MODEL = pf.torch(net, lr=0.1, epochs=2, batch_size=16)


class Rows:
    """Who has which rows in one seed; no two hold the same."""

    def __init__(self, seed: int) -> None:
        x, y = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(y))
        self.x, self.y = (x / 16).astype(np.float32)[order], y[order]
        cuts = np.cumsum([PUBLIC, ROWS, 497])
        self.public, self.newcomer, self.test, rest = np.split(np.arange(len(y)), cuts)
        shares = pf.data.dirichlet(self.y[rest], clients=MEMBERS, alpha=0.5, seed=seed)
        self.members = {f"m{i}": rest[held][:ROWS] for i, held in enumerate(shares.values())}

    def client(self, name: str, held: Any, **more: Any) -> pf.Client:
        """Scored on the common test rows, as validation rows, so that they can be seen after every round."""
        held = np.asarray(held)
        rows = np.concatenate([held, self.test])
        parts = pf.Parts(np.arange(len(held)), validation=np.arange(len(held), len(rows)))
        return pf.Client(name, MODEL, (self.x[rows], self.y[rows]), split=parts, **more)


def ran(algorithm: pf.Algorithm, members: list[pf.Client], rounds: int, seed: int, *, every: int = 1) -> pf.Result:
    return pf.simulate(algorithm, members, rounds=rounds, seed=seed, evaluate_every=every, test=False, baselines=())


def federation(rows: Rows, seed: int, rounds: int = ROUNDS, **options: Any) -> pf.Result:
    members = [rows.client(name, held, consents="personal") for name, held in rows.members.items()]
    algorithm = pf.FedPer(shared="base", public=rows.x[rows.public], **options)
    return ran(algorithm, members, rounds, seed, every=rounds)


def of_members(result: pf.Result) -> float:
    return float(np.mean([metrics["accuracy"] for metrics in result.history[-1].metrics.values()]))


def curve(rows: Rows, seed: int, part: float, **start: Any) -> list[float]:
    """Accuracy of a newcomer before its first step and after every tenth."""
    held = rows.newcomer[: round(part * ROWS)]
    result = ran(pf.Local(steps=BETWEEN), [rows.client("newcomer", held, **start)], STEPS // BETWEEN, seed)
    return [at_once(result), *(log.metrics["newcomer"]["accuracy"] for log in result.history)]


def at_once(result: pf.Result) -> float:
    """Accuracy of what a newcomer starts from."""
    site = result.site("newcomer")
    held = site.validation
    assert held is not None
    start = tuple(site.begins.trees.values())
    outputs = site.model.predict(Predict(start=start, rows=held.unlabelled()), held, first_env(site, result.seed))
    assert held.target is not None
    return float(all_of(outputs, held.target, site.problem)["accuracy"])


def steps_to(aim: float, seen: list[float]) -> int:
    return next((i * BETWEEN for i, value in enumerate(seen) if value >= aim), STEPS)


def rows_to(aim: float, ends: Mapping[float, float]) -> float:
    """The smallest part of the rows with which the end reaches the aim; 1 where none does."""
    return min((part for part, end in ends.items() if end >= aim), default=1.0)


def of_seed(seed: int) -> Figures:
    """Every way of one seed: what a worker does."""
    rows, found = Rows(seed), Figures()
    runs = {name: federation(rows, seed, feedback=feedback) for name, feedback in HEADS.items()}
    ways: dict[str, dict[str, Any]] = {"alone": {}}
    for name, run in runs.items():
        ways[f"{name} head, tuned base"] = {"start": run}
        ways[f"{name} head, frozen base"] = {"start": run, "freeze": "base"}
    curves = {way: {part: curve(rows, seed, part, **start) for part in PARTS} for way, start in ways.items()}
    aim = curves["alone"][1.0][-1]
    for way, by_part in curves.items():
        found[f"{way}: at once"] = by_part[1.0][0]
        found[f"{way}: end"] = by_part[1.0][-1]
        found[f"{way}: steps"] = steps_to(aim, by_part[1.0])
        found[f"{way}: rows"] = rows_to(aim, {part: seen[-1] for part, seen in by_part.items()})
        found |= {f"{way}: end with {part:g}": seen[-1] for part, seen in by_part.items()}
    return found | stopping(rows, seed, runs)


def stopping(rows: Rows, seed: int, runs: Mapping[str, pf.Result]) -> Figures:
    """What it costs that feedback, or the exchange, stops after round 5; and to exchange less often."""
    found = Figures()
    for name in ("mean", "distill"):
        stopped = federation(rows, seed, feedback=HEADS[name], feedback_rounds=STOPPED)
        seen = ran(pf.Local(steps=1), [rows.client("newcomer", rows.newcomer, start=stopped)], 1, seed)
        found[f"{name} head of round {STOPPED}: at once"] = at_once(seen)
    early = federation(rows, seed, rounds=STOPPED)
    alone = [rows.client(name, held, start=early) for name, held in rows.members.items()]
    found["members, exchange to the end"] = of_members(runs["fresh"])
    found[f"members, exchange to round {STOPPED}"] = of_members(ran(pf.Local(), alone, ROUNDS - STOPPED, seed))
    found[f"members, exchange every {EVERY}"] = of_members(federation(rows, seed, ROUNDS // EVERY, every=EVERY))
    solo = [rows.client(name, held) for name, held in rows.members.items()]
    found["members, alone"] = of_members(ran(pf.Local(), solo, ROUNDS, seed))
    return found


# ------------------------------------------------------------------------------------------ what it says


def table(found: Mapping[str, np.ndarray]) -> str:
    lines = [f"{'mean over seeds':<28}{'at once':>9}{'end':>8}{'steps':>8}{'rows':>7}   steps less than alone [90 %]"]
    for way in dict.fromkeys(name.partition(":")[0] for name in found if name.endswith(": steps")):
        at, end, steps, share = (found[f"{way}: {what}"] for what in ("at once", "end", "steps", "rows"))
        gain = found["alone: steps"] - steps
        low, high = interval(gain)
        means = f"{at.mean():>9.3f}{end.mean():>8.3f}{steps.mean():>8.0f}{share.mean():>7.2f}"
        lines.append(f"{way:<28}{means}   {gain.mean():+.0f} [{low:+.0f}, {high:+.0f}]")
    others = [name for name in found if "round" in name or name.startswith("members")]
    return "\n".join([*lines, "", *(f"{name:<40}{found[name].mean():.3f}" for name in others)])


def judged(found: Mapping[str, np.ndarray], prefix: str) -> list[bench.Result]:
    """The figures with bars: the main one, steps with the default head, last."""

    def result(name: str, sample: np.ndarray, unit: str) -> bench.Result:
        low, high = interval(sample)
        return bench.Result(f"{prefix}.{name}", float(sample.mean()), f"{unit} [{low:.3g}, {high:.3g}]", tuple(sample))

    alone = found["alone: steps"]
    whole, part = found["members, exchange to the end"], found[f"members, exchange to round {STOPPED}"]
    seldom = found[f"members, exchange every {EVERY}"]
    results = [
        result("stopped.exchange", whole - part, "accuracy lost by members"),
        result("seldom.exchange", whole - seldom, "accuracy lost by members"),
    ]
    for head in ("mean", "distill"):
        lost = found[f"{head} head, tuned base: at once"] - found[f"{head} head of round {STOPPED}: at once"]
        results.append(result(f"stopped.{head}", lost, "accuracy lost by newcomers at once"))
    for base in ("frozen", "tuned"):
        for head in ("fresh", "distill", "mean"):
            way = f"{head} head, {base} base"
            results.append(result(f"rows.{base}.{head}", found[f"{way}: rows"], "of the rows"))
            results.append(result(f"steps.{base}.{head}", found[f"{way}: steps"] / alone, "of the steps alone"))
    return results


def measure() -> list[bench.Result]:
    seeds, begin = (range(2) if QUICK else SEEDS), time.monotonic()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(seeds)), mp_context=get_context("spawn")) as workers:
        runs = list(workers.map(of_seed, seeds))
    found = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    seconds = time.monotonic() - begin
    if "--json" not in sys.argv:
        print(table(found), f"\n\n{len(seeds)} seeds, {seconds:.0f} seconds\n")
    if not QUICK:
        said = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": bench.commit(),
            "machine": bench.machine(),
            "seconds": round(seconds),
            "seeds": list(seeds),
            "samples": {name: [round(float(value), 5) for value in sample] for name, sample in found.items()},
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(said, indent=1) + "\n")
    return judged(found, "newcomers.quick" if QUICK else "newcomers")


QUICK = "--quick" in sys.argv

if __name__ == "__main__":
    sys.argv = [word for word in sys.argv if word != "--quick"]  # the shared reader of words knows only its own
    bench.main(__doc__, measure)
