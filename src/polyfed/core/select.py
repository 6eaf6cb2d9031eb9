"""Which clients a round asks: a function of the population, the round's number and the run's seed alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from polyfed.core import seed
from polyfed.core.errors import UsageError


class Select(Protocol):
    """Chooses a round's cohort. Equal arguments give equal cohorts; a cohort stands in the population's order."""

    def select(self, population: Sequence[str], round_num: int, run_seed: int) -> tuple[str, ...]: ...

    def note(self, population: Sequence[str]) -> str:
        """A sentence for the user about a choice that cannot be met with this population; "" when it can."""
        ...


@dataclass(frozen=True)
class All:
    """Everybody, every round.

    >>> All().select(["north", "south"], 1, 0)
    ('north', 'south')
    """

    def select(self, population: Sequence[str], round_num: int, run_seed: int) -> tuple[str, ...]:
        del round_num, run_seed
        return tuple(population)

    def note(self, population: Sequence[str]) -> str:
        del population
        return ""


@dataclass(frozen=True)
class Uniform:
    """`cohort_size` clients drawn uniformly without replacement (McMahan et al. 2017: C · K clients a round).

    A population smaller than the cohort takes part in full, since clients may still be joining; `note` says so.

    >>> Uniform(2).select(["north", "south", "west"], 1, 0) == Uniform(2).select(["north", "south", "west"], 1, 0)
    True
    """

    cohort_size: int

    def __post_init__(self) -> None:
        _whole(self.cohort_size)

    def select(self, population: Sequence[str], round_num: int, run_seed: int) -> tuple[str, ...]:
        return _drawn(population, self.cohort_size, round_num, run_seed)

    def note(self, population: Sequence[str]) -> str:
        return _too_few(self.cohort_size, population)


@dataclass(frozen=True)
class Available:
    """`cohort_size` clients drawn uniformly from those available in the round; None takes all of them.

    Attributes:
        cohort_size: how many at most.
        available: round number -> names, as a mapping (a round that it lacks: nobody) or a pure function. Names
            that are not in the population are passed over. The cohort may be empty; the round's minimum decides then.

    >>> Available(None, {1: {"south", "west"}}).select(["north", "south", "west"], 1, 0)
    ('south', 'west')
    """

    cohort_size: int | None
    available: Mapping[int, Collection[str]] | Callable[[int], Collection[str]]

    def __post_init__(self) -> None:
        if self.cohort_size is not None:
            _whole(self.cohort_size)

    def select(self, population: Sequence[str], round_num: int, run_seed: int) -> tuple[str, ...]:
        if isinstance(self.available, Mapping):
            names = frozenset(self.available.get(round_num, ()))
        else:
            names = frozenset(self.available(round_num))
        present = [name for name in population if name in names]
        return _drawn(present, self.cohort_size or len(present), round_num, run_seed)

    def note(self, population: Sequence[str]) -> str:
        return _too_few(self.cohort_size or 0, population)


def _drawn(population: Sequence[str], size: int, round_num: int, run_seed: int) -> tuple[str, ...]:
    if size >= len(population):
        return tuple(population)
    chosen = seed.rng(run_seed, "cohort", round_num).choice(len(population), size, replace=False, shuffle=False)
    return tuple(population[i] for i in sorted(chosen.tolist()))


def _too_few(cohort_size: int, population: Sequence[str]) -> str:
    if cohort_size <= len(population):
        return ""
    return f"a cohort of {cohort_size} was asked for and there are {len(population)} clients: all of them take part"


def _whole(cohort_size: int) -> None:
    if type(cohort_size) is not int or cohort_size < 1:
        raise UsageError(f"cohort_size={cohort_size!r} must be a whole number of at least 1")
