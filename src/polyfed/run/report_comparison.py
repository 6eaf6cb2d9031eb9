"""What joining did for each site, in numbers and in words: the first thing that a report says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from polyfed.core import metrics
from polyfed.core.protocols import Model
from polyfed.run.result import Result

Interval = tuple[float, float]
Direction = Literal["up", "down", "same", "none"]

#: Test rows of the rarest class (of a regression: test rows) below which a number is called weak.
FEW_CASES = 10
#: Names that a sentence may hold.
FEW_NAMES = 5
SHORT = {"auc": "AUC", "mae": "MAE", "mse": "MSE", "rmse": "RMSE", "r2": "R²", "brier": "Brier score"}
MEANING = {
    "auc": "AUC: how often a row of one class scores above a row of the other; 0.5 is guessing, 1 is perfect",
    "accuracy": "accuracy: part of the rows whose class is recognised; 1 is perfect",
    "balanced_accuracy": "balanced accuracy: part of a class's rows that is recognised, every class counting the same",
    "mae": "MAE: mean absolute error, in the unit of the target",
    "mse": "MSE: mean squared error, in the squared unit of the target",
    "rmse": "RMSE: root of the mean squared error, in the unit of the target",
    "brier": "Brier score: mean squared error of the probabilities; 0 is perfect",
    "loss": "loss: what training lowers",
}


@dataclass(frozen=True)
class Means:
    """Means over repeated divisions of the rows, as in `Line`; `interval` is of `gain`. None where not worked out."""

    alone: float | None = None
    pooled: float | None = None
    federated: float | None = None
    gain: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True)
class Repeats:
    """One run repeated over `divisions` divisions of the rows: the means of each site, and of the mean over the sites."""

    divisions: int
    sites: Mapping[str, Means]
    overall: Means


@dataclass(frozen=True)
class Line:
    """One site.

    Attributes:
        alone, pooled, federated: its metric on its own test rows, or the mean over repeats; None where not worked out.
        gain: how much better the federation is than alone: above 0 is better, also where lower numbers are.
        interval: of the gain, where the caller knows one.
        cases: class -> its test rows; empty for a regression.
        margin: half width of the 90 % interval of `federated`, by the formula of its metric; None where there is none.
        failed: what the site's own code raised, or why its updates never counted; "" where nothing is known.
    """

    client: str
    model: str
    framework: str
    rows: int
    aside: int
    alone: float | None
    pooled: float | None
    federated: float | None
    gain: float | None
    interval: Interval | None
    test_rows: int
    cases: Mapping[str, int]
    margin: float | None
    failed: str

    @property
    def is_weak(self) -> bool:
        """Too few test rows (of one class) to lean on."""
        counts = list(self.cases.values()) or [self.test_rows]
        return self.federated is not None and min(counts) < FEW_CASES

    @property
    def plain(self) -> str:
        """The kind of model in words that need no library; its type where there are none."""
        return _plain(self.model, self.framework)


@dataclass(frozen=True)
class Comparison:
    """All sites of one run, for one metric."""

    metric: str
    lines: Sequence[Line]
    level: float
    is_lower_better: bool
    repeats: Repeats | None = None
    classes: Mapping[str, str] = field(default_factory=dict)

    @property
    def short(self) -> str:
        return SHORT.get(self.metric, self.metric.replace("_", " "))

    @property
    def meaning(self) -> str:
        better = "lower is better" if self.is_lower_better else "higher is better"
        return f"{MEANING.get(self.metric, self.short)} ({better})"

    @property
    def percent(self) -> str:
        return f"{self.level * 100:g} %"

    @cached_property
    def compared(self) -> list[Line]:
        return [line for line in self.lines if line.gain is not None]

    @cached_property
    def digits(self) -> int:
        """Decimals that tell the numbers apart: 3 for a metric between 0 and 1, fewer for larger ones."""
        shown = [abs(v) for line in self.lines for v in (line.alone, line.pooled, line.federated) if v is not None]
        largest = max(shown, default=1.0)
        size = math.floor(math.log10(largest)) if largest > 0 else 0
        return min(6, max(0, 3 - max(0, size) if size >= 0 else 2 - size))

    # ------------------------------------------------------------------------------------------ one site

    def value(self, number: float | None) -> str:
        return "–" if number is None else _minus(f"{number:.{self.digits}f}")

    def rough(self, number: float) -> str:
        """One decimal less, and at least one: of what is itself uncertain."""
        return f"{number:.{max(1, self.digits - 1)}f}"

    def signed(self, number: float | None) -> str:
        """With its sign; a true minus; 0 has none."""
        if number is None:
            return "–"
        text = f"{number:+.{self.digits}f}"
        return text[1:] if float(text) == 0 else _minus(text)

    def change(self, gain: float) -> str:
        """Such as "AUC +0.081", "MAE lower by 2.1"."""
        if not self.is_lower_better:
            return f"{self.short} {self.signed(gain)}"
        return f"{self.short} {'lower' if gain > 0 else 'higher'} by {self.value(abs(gain))}"

    def span(self, interval: Interval) -> str:
        return f"{self.signed(interval[0])} to {self.signed(interval[1])}"

    def direction(self, line: Line) -> Direction:
        """Which way a site went, as far as the shown digits tell."""
        if line.gain is None:
            return "none"
        if float(f"{line.gain:.{self.digits}f}") == 0:
            return "same"
        return "up" if line.gain > 0 else "down"

    def verdict(self, line: Line) -> str:
        """A few words on one site."""
        way = self.direction(line)
        if line.federated is None:
            return "no result"
        if way == "none":
            return "nothing to compare"
        word = {"up": "gain", "down": "loss", "same": "no change"}[way]
        if line.interval is not None:
            told = _repeated(word, way, line.interval)
            return told.removeprefix("clear ") if line.is_weak else told
        if way == "same" or line.margin is None or abs(line.gain or 0.0) >= line.margin:
            return word
        return f"{word}, may be chance"

    def cases(self, line: Line) -> list[str]:
        """Such as "2 of class False" or, with words for the classes, "29 with disease"; of many only the rarest."""
        if len(line.cases) > 3:
            rarest = min(line.cases, key=lambda name: (line.cases[name], name))
            return [f"{self._case(rarest, line.cases[rarest])}, the rarest"]
        return [self._case(name, count) for name, count in line.cases.items()]

    def _case(self, name: str, count: int) -> str:
        return f"{count} {self.classes[name]}" if name in self.classes else f"{count} of class {name}"

    # ------------------------------------------------------------------------------------------ all sites

    def headline(self) -> str:
        """One or two sentences: how many sites gained, who gained and lost most. Never kinder than the numbers."""
        compared = self.compared
        if not compared:
            if any(line.federated is not None for line in self.lines):
                return "Whether joining helped is not known: this run did not work out what each site reaches alone."
            return "Whether joining helped is not known: no site has a result on test rows."
        ups = [line for line in compared if self.direction(line) == "up"]
        downs = [line for line in compared if self.direction(line) == "down"]
        over = f"On average over {self.repeats.divisions} divisions of the rows, " if self.repeats else ""
        gained = self._gained(ups, len(compared))
        gained = over + gained[0].lower() + gained[1:] if over else gained
        said = [gained, self._lost(downs, len(compared))]
        same = [line.client for line in compared if self.direction(line) == "same"]
        if same:
            said.append(f"{len(same)} did not change{f' ({_some(same)})' if len(same) <= FEW_NAMES else ''}.")
        if missing := [line.client for line in self.lines if line.gain is None]:
            said.append(f"{_sites(len(missing))} without a comparison: {_some(missing)}.")
        return " ".join(part for part in said if part)

    def _gained(self, ups: Sequence[Line], total: int) -> str:
        if not ups:
            if total == 1:
                return "The only site that can be compared did not do better together than alone."
            return f"None of {total} sites did better together than alone."
        best = max(ups, key=lambda line: line.gain or 0.0)
        if total == 1:
            return f"The only site that can be compared, {best.client}, did better together than alone: {self._told(best)}."
        who = f"All {total} sites" if len(ups) == total else f"{len(ups)} of {total} sites"
        most = "most at " if len(ups) > 1 else "at "
        return f"{who} did better together than alone, {most}{best.client}: {self._told(best)}."

    def _lost(self, downs: Sequence[Line], total: int) -> str:
        if not downs:
            return "None did worse." if total > 1 else ""
        worst = min(downs, key=lambda line: line.gain or 0.0)
        if total == 1:
            return f"It did worse: {self._told(worst)}."
        most = "most at " if len(downs) > 1 else "at "
        return f"{len(downs)} did worse, {most}{worst.client}: {self._told(worst)}."

    def _told(self, line: Line) -> str:
        assert line.gain is not None
        told = self.change(line.gain)
        if line.interval is None:
            return told
        what = "of the gain " if self.is_lower_better else ""
        return f"{told} ({self.percent} interval {what}over repeats {self.span(line.interval)})"

    def caution(self) -> str:
        """How far the numbers can be trusted, in words; "" where there is nothing to compare."""
        compared = self.compared
        if not compared:
            return ""
        known = [line.interval for line in compared if line.interval is not None]
        if known:
            above, below = sum(low > 0 for low, _ in known), sum(high < 0 for _, high in known)
            return (
                f"Over repeated divisions of the rows, the {self.percent} interval of the gain lies above zero at "
                f"{above} and below zero at {below} of {_sites(len(known))}.{self._overall()}{self._weak()}"
            )
        said = "These numbers come from one division of the rows into training and test"
        margins = [(line.margin, line) for line in compared if line.margin is not None]
        if not margins:
            return f"{said}; how much they would vary with another is not known."
        low, high = min(m for m, _ in margins), max(m for m, _ in margins)
        reach = " to ".join(dict.fromkeys(f"±{self.rough(number)}" for number in (low, high)))
        return (
            f"{said}. With this many test rows one {self.short} is known to about {reach} (90 %). "
            f"{_chance(sum(abs(line.gain or 0.0) < margin for margin, line in margins), len(compared))}"
        )

    def _weak(self) -> str:
        """The sites whose numbers few test rows carry, where such a headline could be read as certain."""
        weak = [line.client for line in self.compared if line.is_weak]
        if not weak:
            return ""
        rows = "test rows of one class" if any(line.cases for line in self.compared) else "test rows"
        return f" Few {rows} (under {FEW_CASES}) carry the numbers at {_some(weak)}: read them with care."

    def _overall(self) -> str:
        """The mean over the sites, with its interval, where the run was repeated."""
        if self.repeats is None or self.repeats.overall.gain is None:
            return ""
        mean = self.repeats.overall
        said = f" Mean over the sites: {self.change(self.repeats.overall.gain)}"
        return f"{said} ({self.span(mean.interval)})." if mean.interval is not None else f"{said}."

    def means(self) -> dict[str, float | None]:
        """Plain means over the sites that can be compared: each site counts the same."""
        if self.repeats is not None:
            mean = self.repeats.overall
            return {"alone": mean.alone, "pooled": mean.pooled, "federated": mean.federated, "gain": mean.gain}
        compared = self.compared
        return {
            name: mean_of([getattr(line, name) for line in compared])
            for name in ("alone", "pooled", "federated", "gain")
        }


def compare(
    result: Result,
    intervals: Mapping[str, Interval] | None = None,
    *,
    level: float = 0.9,
    repeats: Repeats | None = None,
    classes: Mapping[str, str] | None = None,
) -> Comparison:
    """What a result says of each site.

    Args:
        result: the run.
        intervals: client -> (low, high) of its gain at `level`; not read where there are `repeats`.
        level: coverage of the intervals.
        repeats: what is said instead of the numbers of `result`, which is one of the divisions.
        classes: class -> words after a count, such as "with disease".
    """
    metric = result.metric
    lower = metrics.is_lower_better(metric)
    lines = [_line(result, row, metric, -1.0 if lower else 1.0, intervals or {}) for row in result.rows(metric)]
    if repeats is not None:
        lines = [_over(line, repeats.sites.get(line.client, Means())) for line in lines]
    return Comparison(metric, lines, level, lower, repeats, classes or {})


def _over(line: Line, means: Means) -> Line:
    """A line of means instead of one division's numbers; the margin's formula is for one division."""
    return replace(
        line,
        alone=means.alone,
        pooled=means.pooled,
        federated=means.federated,
        gain=means.gain,
        interval=means.interval,
        margin=None,
    )


def _line(result: Result, row: Mapping[str, Any], metric: str, sign: float, intervals: Mapping[str, Interval]) -> Line:
    name = str(row["client"])
    cases = _cases(result, name)
    federated, difference = row.get("federated"), row.get("difference")
    error = result.errors.get(name)
    return Line(
        client=name,
        model=model_name(result, name)[0],
        framework=model_name(result, name)[1].strip("()"),
        rows=int(row["rows"]),
        aside=len(result.population.parts[name].public),
        alone=row.get("alone"),
        pooled=row.get("pooled"),
        federated=federated,
        gain=None if difference is None else sign * float(difference),
        interval=intervals.get(name),
        test_rows=int(row["test rows"]),
        cases=cases,
        margin=None if federated is None else margin(metric, federated, list(cases.values())),
        failed="" if error is None else f"{error.kind}: {error.message}",
    )


FRAMEWORKS = {"torch": "PyTorch", "keras": "Keras", "sklearn": "scikit-learn"}
NETWORKS = ("PyTorch", "Keras")
PLAIN = {
    "LogisticRegression": "logistic regression",
    "RandomForestClassifier": "random forest",
    "RandomForestRegressor": "random forest",
    "LinearRegression": "linear regression",
    "Ridge": "ridge regression",
    "DecisionTreeClassifier": "decision tree",
    "DecisionTreeRegressor": "decision tree",
    "GradientBoostingClassifier": "boosted trees",
    "GradientBoostingRegressor": "boosted trees",
    "HistGradientBoostingClassifier": "boosted trees",
    "HistGradientBoostingRegressor": "boosted trees",
}


def model_name(result: Result, name: str) -> tuple[str, str]:
    """The wrapped thing's type, and its framework in brackets: two frameworks have types of one name."""
    model = result.population.sites[name].model
    framework = _framework(model)
    return model.kind, f"({framework})" if framework else ""


def plain_name(model: Model) -> str:
    """A model in words that need no library, as `Line.plain`."""
    return _plain(model.kind, _framework(model))


def _framework(model: Model) -> str:
    return FRAMEWORKS.get(type(model).__module__.rpartition(".")[2].partition("_")[0], "")


def _plain(kind: str, framework: str) -> str:
    return f"neural network ({framework})" if framework in NETWORKS else PLAIN.get(kind, kind)


def _cases(result: Result, name: str) -> dict[str, int]:
    classes, test = result.population.problem.classes, result.population.sites[name].test
    if classes is None or test is None or test.target is None:
        return {}
    counts = np.bincount(np.asarray(test.target, np.int64), minlength=len(classes))
    return {word: int(count) for word, count in zip(classes, counts, strict=True)}


def margin(metric: str, value: float, cases: Sequence[int], *, level: float = 0.9) -> float | None:
    """Half width of the interval of a metric on so many test rows of each class.

    AUC of two classes: Hanley and McNeil, "The meaning and use of the area under a receiver operating characteristic
    (ROC) curve", Radiology 1982. Accuracy: the normal approximation of the binomial. None for others, and at the ends
    of the scale, where both formulas give 0.

    >>> round(margin("auc", 0.8, [50, 50]), 3)
    0.073
    """
    rows = sum(cases)
    if not 0.0 < value < 1.0 or not rows:
        return None
    if metric == "accuracy":
        variance = value * (1 - value) / rows
    elif metric == "auc" and len(cases) == 2 and min(cases) > 0:
        ones, zeros = cases[1], cases[0]
        both_ones, both_zeros = value / (2 - value), 2 * value**2 / (1 + value)
        variance = value * (1 - value) + (ones - 1) * (both_ones - value**2) + (zeros - 1) * (both_zeros - value**2)
        variance /= ones * zeros
    else:
        return None
    return NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(max(0.0, variance))


def mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _repeated(word: str, way: Direction, interval: Interval) -> str:
    """This run and its repetitions in a few words; says so where they disagree."""
    low, high = interval
    if low <= 0 <= high:
        return word if way == "same" else f"{word}, not certain"
    over: Direction = "up" if low > 0 else "down"
    told = "gain" if over == "up" else "loss"
    return f"clear {told}" if way == over else f"{word} in this run, {told} over repeats"


def _chance(small: int, total: int) -> str:
    """How many differences chance alone may have made."""
    if small == 0:
        return "No difference shown here is smaller than that at its site."
    if small == total:
        return "Every difference shown here is smaller than that at its site, so chance alone may have made it."
    if small == 1:
        return (
            f"1 of {total} differences shown here is smaller than that at its site, so chance alone may have made it."
        )
    return f"{small} of {total} differences are smaller than that at their sites, so chance alone may have made them."


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _sites(count: int) -> str:
    return f"{count} site" if count == 1 else f"{count} sites"


def _some(names: Sequence[str], most: int = FEW_NAMES) -> str:
    """The first few of many names."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
