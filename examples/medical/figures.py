"""What the parts have in common: a model's answers on test rows, and tables to print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

import polyfed as pf
from polyfed.data import Raw

Figures = dict[str, dict[str, float]]  # method -> participant -> figure


def test_rows(result: pf.Result, name: str) -> Raw:
    """A participant's test rows as they were before any preprocessing."""
    return result.population.raws[name].take(result.population.parts[name].test)


def answers(result: pf.Result, name: str, raw: Raw | None = None) -> np.ndarray:
    """(n, classes) probabilities of a participant's model, on its own test rows if no others are given."""
    raw = test_rows(result, name) if raw is None else raw
    return result.ensemble(name).votes(raw.unlabelled())[name]


def accuracy(probabilities: np.ndarray, names: np.ndarray, target: np.ndarray) -> float:
    return float(np.mean(names[probabilities.argmax(1)] == target))


def steps_a_round(own: int, public: int, *, batch: int, epochs: int, digest: int, rounds: int) -> int:
    """Optimizer steps a round that training alone must have to make as many as a member of FedMD; rounded up."""
    total = rounds * epochs * math.ceil(own / batch) + (rounds - 1) * digest * math.ceil(public / batch)
    return math.ceil(total / rounds)


def table(title: str, found: Figures, methods: Sequence[str], *, mean: bool = True) -> str:
    """A line for each participant, a column for each method."""
    who = list(found[methods[0]])
    lines = [[title, *methods]]
    lines += [[name, *(shown(found[method], name) for method in methods)] for name in who]
    if mean:
        lines.append(["mean", *(f"{np.mean([found[method][name] for name in who]):.3f}" for method in methods)])
    return aligned(lines)


def shown(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.3f}" if name in values else ""


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
