"""When a run ends: rules over the history of finished rounds, and which round's state is kept.

A rule is a frozen value, called with the history; it answers with the reason to stop, in words, or None. Rules read the
clients' validation metrics, never test rows, and the time that the history carries, never a clock; so a replay stops
where the run did. ``a | b`` stops when one of them does, ``a & b`` when both do at once.

`over` says whose metric counts: "mean" (the plain mean over the clients that report it: every client counts the same;
each client's AUC is its own, AUCs are never computed across clients), "worst" (the client that does worst), or a
client's name. Rounds without a value of the metric are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Literal

from polyfed.core.errors import UsageError
from polyfed.core.history import RoundLog
from polyfed.core.metrics import LOWER_IS_BETTER

Better = Literal["higher", "lower"]
History = Sequence[RoundLog]

#: what `polyfed.core.metrics` reports besides
HIGHER_IS_BETTER = frozenset({"accuracy", "auc", "balanced_accuracy", "r2"})


def direction(metric: str, better: Better | None = None) -> Better:
    """Which way a metric is good; "shared/auc" is good as "auc" is.

    Raises:
        UsageError: the metric is not known and `better` does not say.
    """
    if better is not None:
        return better
    name = metric.rpartition("/")[2]
    if name in LOWER_IS_BETTER:
        return "lower"
    if name in HIGHER_IS_BETTER:
        return "higher"
    known = ", ".join(sorted(LOWER_IS_BETTER | HIGHER_IS_BETTER))
    raise UsageError(f'metric {metric!r} is not known ({known}); say which way is good: better="higher" or "lower"')


def value_of(log: RoundLog, metric: str, over: str, better: Better) -> float | None:
    """A metric of one round over the clients; None if nobody reports a finite value. Worked out once a round."""
    asked = (metric, over, better)
    if asked not in log.memo:
        log.memo[asked] = _over_clients(log, *asked)
    return log.memo[asked]


def _over_clients(log: RoundLog, metric: str, over: str, better: Better) -> float | None:
    values = {name: m[metric] for name, m in log.metrics.items() if metric in m and math.isfinite(m[metric])}
    if over not in ("mean", "worst"):
        return values.get(over)
    if not values:
        return None
    if over == "mean":
        return math.fsum(values.values()) / len(values)
    return min(values.values()) if better == "higher" else max(values.values())


def series(history: History, metric: str, over: str, better: Better) -> list[tuple[int, float]]:
    """(round number, value) of every round that has a value."""
    pairs = ((log.round_num, value_of(log, metric, over, better)) for log in history)
    return [(round_num, value) for round_num, value in pairs if value is not None]


def best_round(history: History, metric: str, over: str = "mean", better: Better | None = None) -> int:
    """The number of the round with the best value of a metric; the earliest of equals.

    Raises:
        UsageError: no round has a value.
    """
    way = direction(metric, better)
    found = series(history, metric, over, way)
    if not found:
        raise UsageError(f"no round has a value of {metric} over {over}; {_reported(history)}")
    return _best(found, way)[0]


@dataclass(frozen=True)
class Stop:
    """Base of all rules.

    Attributes:
        min_rounds: no reason is given before this round is finished.
    """

    min_rounds: int = field(default=1, kw_only=True)

    def __call__(self, history: History) -> str | None:
        if not history or history[-1].round_num < self.min_rounds:
            return None
        return self.reason(history)

    def reason(self, history: History) -> str | None:
        """Why to stop after the last of these rounds (there is at least one); None to go on."""
        raise NotImplementedError

    def rolls_back_to(self, history: History) -> int | None:
        """The round whose state the result holds; None: the last one, or this rule does not stop the run here."""
        del history
        return None

    def keeps(self, history: History) -> frozenset[int]:
        """The earlier rounds that this rule may still roll back to; a driver holds on to their states."""
        del history
        return frozenset()

    def unmet(self, history: History) -> str:
        """What the user asked for and a run that ended here did not reach; "" if nothing."""
        del history
        return ""

    def check(self, clients: Collection[str] | None, *, evaluates: bool) -> None:
        """Refuses, before round 1, a rule that could never speak in this run.

        Args:
            clients: names of all clients; None where they are not known yet.
            evaluates: whether clients report validation metrics (`evaluate_every` is not 0).

        Raises:
            UsageError: the rule waits for a metric that nobody reports, or for a client that is not there.
        """

    def __or__(self, other: Stop) -> Stop:
        return Either((*_members(self, Either), *_members(other, Either)))

    def __and__(self, other: Stop) -> Stop:
        return Both((*_members(self, Both), *_members(other, Both)))


@dataclass(frozen=True)
class Either(Stop):
    """Stops when one of its rules does; written ``a | b``. Reasons are joined."""

    rules: tuple[Stop, ...]

    def reason(self, history: History) -> str | None:
        return "; ".join(said for rule in self.rules if (said := rule(history))) or None

    def rolls_back_to(self, history: History) -> int | None:
        """The first answer; a rule that does not stop has none."""
        answers = (rule.rolls_back_to(history) for rule in self.rules)
        return next((answer for answer in answers if answer is not None), None)

    def keeps(self, history: History) -> frozenset[int]:
        return frozenset[int]().union(*(rule.keeps(history) for rule in self.rules))

    def unmet(self, history: History) -> str:
        return "; ".join(said for rule in self.rules if (said := rule.unmet(history)))

    def check(self, clients: Collection[str] | None, *, evaluates: bool) -> None:
        for rule in self.rules:
            rule.check(clients, evaluates=evaluates)


@dataclass(frozen=True)
class Both(Either):
    """Stops when all of its rules do at once; written ``a & b``. Reasons are joined."""

    def reason(self, history: History) -> str | None:
        said = [rule(history) for rule in self.rules]
        return " and ".join(reason for reason in said if reason) if all(said) else None

    def rolls_back_to(self, history: History) -> int | None:
        return super().rolls_back_to(history) if self(history) else None


@dataclass(frozen=True)
class Rounds(Stop):
    """Stops after round `limit`.

    >>> Rounds(2)([RoundLog(1)]), Rounds(2)([RoundLog(1), RoundLog(2)])
    (None, '2 rounds are done')
    """

    limit: int

    def __post_init__(self) -> None:
        _at_least_one(rounds=self.limit)

    def reason(self, history: History) -> str | None:
        done = "1 round is done" if self.limit == 1 else f"{self.limit} rounds are done"
        return done if history[-1].round_num >= self.limit else None


@dataclass(frozen=True)
class TimeBudget(Stop):
    """Stops after the first round that ends `seconds` or more after the start of the run. A round is never cut."""

    seconds: float

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise UsageError(f"TimeBudget({self.seconds!r}): seconds must be above 0")

    def reason(self, history: History) -> str | None:
        spent = history[-1].seconds
        return f"{spent:.1f} s have passed, the budget is {self.seconds:g} s" if spent >= self.seconds else None


@dataclass(frozen=True)
class Target(Stop):
    """Stops when a metric reaches a value: at least it where higher is better, at most it where lower is.

    ``Target("auc", 0.85, over="worst")`` waits until every client that reports an AUC has at least 0.85.

    Attributes:
        metric: name, as clients report it on their validation rows.
        value: to be reached in the last round (an earlier round does not count).
        over: "mean", "worst" or a client's name: see the head of this file.
        better: which way is good, for a metric that is not known here.
    """

    metric: str
    value: float
    over: str = "mean"
    better: Better | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        direction(self.metric, self.better)
        if not math.isfinite(self.value):
            raise UsageError(f"Target({self.metric!r}, {self.value!r}): the value must be a finite number")

    def reason(self, history: History) -> str | None:
        way = direction(self.metric, self.better)
        value = value_of(history[-1], self.metric, self.over, way)
        if value is None or _improves(self.value, value, way):
            return None
        return f"{self.over} {self.metric} is {value:.4g}, the target is {self.value:g}"

    def unmet(self, history: History) -> str:
        if history and self(history):
            return ""
        way = direction(self.metric, self.better)
        found = series(history, self.metric, self.over, way)
        if not found:
            return f"target {self.over} {self.metric} {self.value:g}: no value of it; {_reported(history)}"
        round_num, best = _best(found, way)
        return f"target {self.over} {self.metric} {self.value:g} was not reached: best {best:.4g} at round {round_num}"

    def check(self, clients: Collection[str] | None, *, evaluates: bool) -> None:
        _can_be_read(f"Target({self.metric!r})", self.over, clients, evaluates=evaluates)


@dataclass(frozen=True)
class NoImprovement(Stop):
    """Stops when the best value of a metric is `patience` measured rounds old.

    A round improves on the best so far if it is better by more than `min_delta`.

    Attributes:
        metric, over, better: as in `Target`.
        patience: rounds with a value since the best one.
        min_delta: what does not count as better, in the metric's own unit.
        roll_back: whether the result holds the best round's state instead of the last.

    >>> logs = [RoundLog(r, metrics={"a": {"loss": v}}) for r, v in enumerate([3.0, 1.0, 2.0, 1.5], 1)]
    >>> NoImprovement("loss", patience=2)(logs)
    'mean loss has not improved for 2 rounds: best 1 at round 2'
    """

    metric: str
    patience: int
    min_delta: float = 0.0
    over: str = "mean"
    better: Better | None = field(default=None, kw_only=True)
    roll_back: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        direction(self.metric, self.better)
        _at_least_one(patience=self.patience)
        if not 0 <= self.min_delta < math.inf:
            raise UsageError(f"min_delta={self.min_delta!r} must be a number of at least 0")

    def reason(self, history: History) -> str | None:
        way = direction(self.metric, self.better)
        found = series(history, self.metric, self.over, way)
        if not found:
            return None
        best = 0
        for i, (_, value) in enumerate(found):
            if _improves(value, found[best][1], way, self.min_delta):
                best = i
        if (waited := len(found) - 1 - best) < self.patience:
            return None
        round_num, value = found[best]
        return f"{self.over} {self.metric} has not improved for {waited} rounds: best {value:.4g} at round {round_num}"

    def rolls_back_to(self, history: History) -> int | None:
        return max(self.keeps(history), default=None) if self(history) else None

    def keeps(self, history: History) -> frozenset[int]:
        if not self.roll_back or not series(history, self.metric, self.over, direction(self.metric, self.better)):
            return frozenset()
        return frozenset({best_round(history, self.metric, self.over, self.better)})

    def check(self, clients: Collection[str] | None, *, evaluates: bool) -> None:
        _can_be_read(f"NoImprovement({self.metric!r})", self.over, clients, evaluates=evaluates)


@dataclass(frozen=True)
class Converged(Stop):
    """Stops when nothing moves any more, over a window of rounds.

    ``on="loss"``: in the last `window` rounds with a validation loss, the mean loss over clients stayed within a band
    no wider than `tolerance` times its mean there. ``on="update_norm"``: in each of the last `window` rounds that
    accepted an update, the step of the server's parameters was at most `tolerance` times as long as the parameters
    themselves (L2 norms). An algorithm without shared parameters never converges by its update norm.
    """

    on: Literal["loss", "update_norm"] = "loss"
    window: int = 5
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.on not in ("loss", "update_norm"):
            raise UsageError(f'Converged(on={self.on!r}) is unknown; write "loss" or "update_norm"')
        if self.window < 2 or not 0 <= self.tolerance < math.inf:
            raise UsageError(
                f"Converged: window={self.window} must be at least 2, tolerance={self.tolerance} at least 0"
            )

    def reason(self, history: History) -> str | None:
        return self._flat_loss(history) if self.on == "loss" else self._short_steps(history)

    def check(self, clients: Collection[str] | None, *, evaluates: bool) -> None:
        if self.on == "loss":
            _can_be_read('Converged(on="loss")', "mean", clients, evaluates=evaluates)

    def _flat_loss(self, history: History) -> str | None:
        values = (value_of(log, "loss", "mean", "lower") for log in reversed(history))
        last = list(islice((value for value in values if value is not None), self.window))
        band = (max(last) - min(last)) if last else 0.0
        if len(last) < self.window or band > self.tolerance * abs(math.fsum(last) / len(last)):
            return None
        return f"mean loss stayed within {band:.3g} for {self.window} rounds"

    def _short_steps(self, history: History) -> str | None:
        last = list(islice((log for log in reversed(history) if log.accepted), self.window))
        moved = [log.update_norm / log.state_norm for log in last if log.state_norm > 0]
        if len(moved) < self.window or not max(moved) <= self.tolerance:
            return None
        return f"steps were at most {max(moved):.3g} of the parameters' norm for {self.window} rounds"


@dataclass(frozen=True)
class Diverged(Stop):
    """Stops when a loss runs away, and rolls the result back to the best round.

    That is: a client reports a value that is not finite, or the value over clients was more than `factor` times the
    best so far in each of the last `patience` measured rounds. A run refuses values that are not finite before any rule
    sees them; where nobody has others left, it ends without a quorum, and its error names the clients.

    Attributes:
        metric: one of which lower is better and which is never negative.
        factor: above 1.
        patience: rounds in a row.
        over: as in `Target`.
    """

    metric: str = "loss"
    factor: float = 2.0
    patience: int = 1
    over: str = "mean"

    roll_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if direction(self.metric, None) != "lower":
            raise UsageError(f"Diverged({self.metric!r}): use a metric of which lower is better, such as loss")
        if not self.factor > 1:
            raise UsageError(f"Diverged: factor={self.factor!r} must be above 1")
        _at_least_one(patience=self.patience)

    def reason(self, history: History) -> str | None:
        last = history[-1]
        for name, metrics in last.metrics.items():
            if not math.isfinite(metrics.get(self.metric, 0.0)):
                return f"{self.metric} of {name} is {metrics[self.metric]} at round {last.round_num}"
        found = series(history, self.metric, self.over, "lower")
        if not found:
            return None
        round_num, best = _best(found, "lower")
        if any(value <= self.factor * best for _, value in found[-self.patience :]):
            return None
        return (
            f"{self.over} {self.metric} is {found[-1][1]:.4g}, "
            f"more than {self.factor:g} times its best, {best:.4g} at round {round_num}"
        )

    def rolls_back_to(self, history: History) -> int | None:
        return max(self.keeps(history), default=None) if self(history) else None

    def keeps(self, history: History) -> frozenset[int]:
        if not series(history, self.metric, self.over, "lower"):
            return frozenset()
        return frozenset({best_round(history, self.metric, self.over)})

    def check(self, clients: Collection[str] | None, *, evaluates: bool) -> None:
        _can_be_read(f"Diverged({self.metric!r})", self.over, clients, evaluates=evaluates)


def _can_be_read(rule: str, over: str, clients: Collection[str] | None, *, evaluates: bool) -> None:
    """Raises `UsageError` where a rule's metric will never have a value."""
    if not evaluates:
        raise UsageError(f"{rule} reads validation metrics, and evaluate_every=0 measures none; give evaluate_every=1")
    if clients is not None and over not in ("mean", "worst", *clients):
        raise UsageError(f'{rule}: over={over!r} is no client; write "mean", "worst", or one of {", ".join(clients)}')


def _improves(value: float, best: float, way: Better, margin: float = 0.0) -> bool:
    return value > best + margin if way == "higher" else value < best - margin


def _best(found: Sequence[tuple[int, float]], way: Better) -> tuple[int, float]:
    """The earliest of the best."""
    return max(found, key=lambda pair: pair[1]) if way == "higher" else min(found, key=lambda pair: pair[1])


def _members(rule: Stop, kind: type[Either]) -> tuple[Stop, ...]:
    """The rules of a combination of the same kind, so that ``a | b | c`` is one list; else the rule itself."""
    return rule.rules if isinstance(rule, Either) and type(rule) is kind and rule.min_rounds <= 1 else (rule,)


def _reported(history: History) -> str:
    names: set[str] = set()
    for log in history:
        names.update(*[set(metrics) for metrics in log.metrics.values()])
    return f"clients report {', '.join(sorted(names))}" if names else "clients report no validation metric"


def _at_least_one(**fields: int) -> None:
    for name, value in fields.items():
        if type(value) is not int or value < 1:
            raise UsageError(f"{name}={value!r} must be a whole number of at least 1")
