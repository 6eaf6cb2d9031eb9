"""The model that a server taught from its clients' answers: as its framework's own object, and set against its teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from polyfed import data as tables
from polyfed.core import metrics
from polyfed.core.algorithm import Algorithm, Env, Predict
from polyfed.core.coordinator import Federation
from polyfed.core.errors import UsageError
from polyfed.core.message import State
from polyfed.core.protocols import Site
from polyfed.core.rows import Problem
from polyfed.core.tree import Array, Tree
from polyfed.data import Raw
from polyfed.data.prepare import Prepared
from polyfed.data.problem import encode_target
from polyfed.run.ensemble import Member, reshapes, said, wants_of
from polyfed.run.text import aligned

if TYPE_CHECKING:
    from polyfed.run.result import Result

#: Coverage of the intervals of a comparison.
LEVEL = 0.9
STUDENT = "student"

# ------------------------------------------------------------------------------------------ the model


def student_state(algorithm: Algorithm, federation: Federation, state: State) -> tuple[Site, Tree]:
    """The student as a site of the server, and its whole state.

    Raises:
        UsageError: the algorithm teaches no student.
    """
    if STUDENT not in federation.trainers or STUDENT not in state.trees:
        raise UsageError(f"{algorithm.name} teaches no student; pf.Distill(student=..., public=...) does")
    return federation.trainers[STUDENT], state.trees[STUDENT]


def student_env(site: Site, federation: Federation) -> Env:
    """What a student is asked in: the public rows are all that it has, as when it was taught."""
    return Env(seed=federation.rules.seed, problem=federation.problem, public=site.train, group=site.group)


def student_of(algorithm: Algorithm, federation: Federation, state: State) -> Any:
    """The student as its framework's own object; it takes rows as the algorithm's ``preprocess=`` makes them.

    Before round 1 it is what it starts from.

    Raises:
        UsageError: the algorithm teaches no student.
    """
    site, tree = student_state(algorithm, federation, state)
    return site.model.export(tree, site.train, student_env(site, federation))


def student_member(result: Result) -> Member:
    """The student as somebody who can be asked with raw rows, through the server's own preprocessing."""
    site, tree = student_state(result.algorithm, result.federation, result.state)
    public, env, problem = result.population.public, student_env(site, result.federation), result.population.problem
    assert public is not None  # nobody teaches a student without public rows
    where = f"the student of {result.algorithm.name}"
    preprocess = getattr(result.algorithm, "preprocess", None)
    rows, fitted = tables.prepare_unlabelled(where, public, preprocess=preprocess, seed=result.seed)
    through = Prepared(rows, None, None, None, fitted, "")

    def ask(raw: Raw) -> Array:
        return said(site.model.predict(Predict(start=(tree,)), through.apply(where, raw), env), problem)

    return Member(STUDENT, site.model.kind, len(rows), wants_of(public), ask, partial(reshapes, through, where, rows))


# ------------------------------------------------------------------------------------------ against its teachers


@dataclass(frozen=True)
class Score:
    """A metric on some rows; None where the rows cannot be read, or leave it undefined.

    Attributes:
        value: of the metric.
        rows: test rows behind it.
        gain: how much better the student is on the same rows: above 0 is better, also where lower numbers are.
        interval: of `gain`; None for a metric that is no mean over rows.
    """

    value: float | None = None
    rows: int = 0
    gain: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Standing:
    """One participant: what it reaches on its own test rows and on everyone's, alone and as it came out of the run."""

    client: str
    model: str
    own_alone: float | None
    own: float | None
    all_alone: Score
    all: Score


@dataclass(frozen=True)
class Standings:
    """Student, teachers, their ensemble, and each teacher alone, on test rows; `str` of it is a table.

    "Everyone's" rows are the test rows of all sites, raw, read by each model through its own preprocessing; rows that a
    model cannot read (other columns) are left out of its line, and of the ensemble those who cannot read a site's rows.
    Intervals are of the paired difference per row, models held fixed: they tell what other test rows would change, not
    another training.

    Attributes:
        metric: what is compared.
        num_rows: all test rows.
        lines: one for each participant.
        ensemble: the mean of the participants' answers, uniform weights, without `untrained`.
        student: None where the algorithm teaches none.
        level: coverage of the intervals.
        untrained: participants of whose training nothing ever counted.
    """

    metric: str
    num_rows: int
    lines: Sequence[Standing]
    ensemble: Score
    student: Score | None
    student_model: str = ""
    level: float = LEVEL
    untrained: tuple[str, ...] = ()

    @property
    def is_lower_better(self) -> bool:
        return metrics.is_lower_better(self.metric)

    def mean(self, name: str) -> float | None:
        """The plain mean over the participants of "own_alone", "own", "all_alone" or "all"."""
        found = [getattr(line, name) for line in self.lines]
        values = [one.value if isinstance(one, Score) else one for one in found]
        known = [value for value in values if value is not None]
        return math.fsum(known) / len(known) if known else None

    def rows(self) -> list[dict[str, Any]]:
        """One row a participant, then "ensemble" and "student": the numbers of the table."""
        made: list[dict[str, Any]] = [
            {
                "who": line.client,
                "model": line.model,
                "own alone": line.own_alone,
                "own": line.own,
                "everyone's alone": line.all_alone.value,
                "everyone's": line.all.value,
                "rows": line.all.rows,
                "student gain": line.all.gain,
                "interval": line.all.interval,
            }
            for line in self.lines
        ]
        for who, score in (("ensemble", self.ensemble), (STUDENT, self.student)):
            if score is not None:
                told: dict[str, Any] = {"everyone's": score.value, "rows": score.rows}
                told |= {"student gain": score.gain, "interval": score.interval} if who == "ensemble" else {}
                made.append({"who": who, "model": self.student_model if who == STUDENT else "", **told})
        return made

    @property
    def no_interval(self) -> str:
        """Said where the metric is no mean over rows, such as AUC; "" where there are intervals."""
        return "" if self.metric in _PER_ROW else f"no interval for {self.metric}"

    def sentence(self) -> str:
        """Student, ensemble, mean teacher and mean alone on everyone's rows, in one line."""
        if self.student is None or self.student.value is None:
            return ""
        beside = [f"their ensemble {_number(self.ensemble.value)}{_gap(self.ensemble, 'student ', self.no_interval)}"]
        beside.append(f"mean of the teachers {_number(self.mean('all'))}")
        if (alone := self.mean("all_alone")) is not None:
            beside.append(f"mean of each alone {_number(alone)}")
        rows = (
            f"all {self.student.rows} test rows" if self.student.rows == self.num_rows else f"{self.student.rows} rows"
        )
        return f"student: {self.metric} {_number(self.student.value)} on {rows}; {'; '.join(beside)}"

    def __str__(self) -> str:
        columns = ["own alone", "own", "everyone's alone", "everyone's", "rows", "student gain"]
        rows = self.rows()
        mean = {"own alone": "own_alone", "own": "own", "everyone's alone": "all_alone", "everyone's": "all"}
        told = {"who": "mean", "model": ""} | {column: self.mean(name) for column, name in mean.items()}
        rows.insert(len(self.lines), told)
        shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
        lines = [[row["who"], row["model"], *(_cell(row, name) for name in shown)] for row in rows]
        lines.insert(len(self.lines), [])
        return "\n".join([*aligned([[self.metric, "model", *shown], [], *lines]), "", self._said()])

    def _said(self) -> str:
        better = "lower is better" if self.is_lower_better else "higher is better"
        said = f"{self.metric} on a site's own test rows, and on everyone's ({self.num_rows}); {better}"
        if self.untrained:
            said = f"the ensemble is without {', '.join(self.untrained)}: nothing trained there ever counted\n{said}"
        if self.student is None:
            return said
        of = f", {self.level * 100:g} % interval over rows" if self.ensemble.interval else ""
        of = f"; {self.no_interval}" if self.no_interval else of
        return f"{said}; gain: how much better the student is on the same rows{of}"


def standings_of(result: Result, metric: str | None = None) -> Standings:
    """See `Result.comparison`."""
    if not result.test:
        raise UsageError("the test rows of this run were not read (test=False, or it was interrupted): no comparison")
    metric = metric or result.metric
    field_ = _Field.of(result)
    names = list(result.population.sites)
    teachers = dict(result.ensemble(names).members)
    solo = [] if result.alone is None else [name for name in names if name not in result.alone.untrained]
    alone = dict(result.alone.ensemble(solo).members) if result.alone is not None and solo else {}
    student = student_member(result) if result.has_student else None
    answers = {name: {} if name in result.untrained else field_.ask(member) for name, member in teachers.items()}
    taught = None if student is None else field_.ask(student)
    lines = [
        Standing(
            client=name,
            model=member.kind,
            own_alone=result.baselines.get("alone", {}).get(name, {}).get(metric),
            own=result.test.get(name, {}).get(metric),
            all_alone=field_.score(field_.ask(alone[name]), metric) if name in alone else Score(),
            all=field_.score(answers[name], metric, taught),
        )
        for name, member in teachers.items()
    ]
    if metric != result.metric and all(line.all.value is None for line in lines):
        there = sorted({name for values in result.test.values() for name in values})
        raise UsageError(f"there is no metric {metric!r} to compare by; there are {', '.join(there)}")
    return Standings(
        metric=metric,
        num_rows=field_.num_rows,
        lines=lines,
        ensemble=field_.score(_together(answers), metric, taught),
        student=None if taught is None else field_.score(taught, metric),
        student_model="" if student is None else student.kind,
        untrained=result.untrained,
    )


#: site -> a model's answers on that site's test rows; without an entry where it cannot read them.
Answers = Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class _Field:
    """Everyone's test rows, raw, by site, with their targets as class numbers or values."""

    problem: Problem
    raws: Mapping[str, Raw]
    targets: Mapping[str, Array]

    @classmethod
    def of(cls, result: Result) -> _Field:
        population = result.population
        parts = {name: part.test for name, part in population.parts.items() if len(part.test)}
        raws = {name: population.raws[name].take(index) for name, index in parts.items()}
        targets = {
            name: encode_target(raw.target, population.problem, client=name)
            for name, raw in raws.items()
            if raw.target is not None
        }
        return cls(population.problem, {name: raw.unlabelled() for name, raw in raws.items()}, targets)

    @property
    def num_rows(self) -> int:
        return sum(len(raw) for raw in self.raws.values())

    def ask(self, member: Member) -> Answers:
        return {name: member.answer(raw) for name, raw in self.raws.items() if not member.lacks(raw)}

    def score(self, answers: Answers, metric: str, student: Answers | None = None) -> Score:
        """A model's metric on all rows that it answers, and the student's gain on those that both answer."""
        if not answers:
            return Score()
        value = self._metric(answers, list(answers), metric)
        score = Score(value, sum(len(vote) for vote in answers.values()))
        both = [] if student is None else [name for name in answers if name in student]
        if student is None or not both or value is None:
            return score
        theirs, mine = self._metric(answers, both, metric), self._metric(student, both, metric)
        if theirs is None or mine is None:
            return score
        sign = -1.0 if metrics.is_lower_better(metric) else 1.0
        return replace(
            score, gain=sign * (mine - theirs), interval=self._interval(answers, student, both, metric, sign)
        )

    def _joined(self, answers: Answers, sites: Sequence[str]) -> tuple[Array, Array]:
        return np.concatenate([answers[n] for n in sites]), np.concatenate([self.targets[n] for n in sites])

    def _metric(self, answers: Answers, sites: Sequence[str], metric: str) -> float | None:
        votes, target = self._joined(answers, sites)
        return metrics.all_of(_outputs(votes, self.problem), target, self.problem).get(metric)

    def _interval(
        self, answers: Answers, student: Answers, sites: Sequence[str], metric: str, sign: float
    ) -> tuple[float, float] | None:
        """Mean ± z · standard error of the difference per row; None for a metric that is no mean over rows."""
        (theirs, target), (mine, _) = self._joined(answers, sites), self._joined(student, sites)
        if metric not in _PER_ROW or len(target) < 2:
            return None
        per_row = _PER_ROW[metric]
        gaps = sign * (per_row(mine, target) - per_row(theirs, target))
        half = NormalDist().inv_cdf((1 + LEVEL) / 2) * float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
        return float(gaps.mean()) - half, float(gaps.mean()) + half


def _outputs(votes: Array, problem: Problem) -> Array:
    """Votes as `metrics.all_of` takes them: log-probabilities, or values."""
    if not problem.is_classification:
        return votes
    with np.errstate(divide="ignore"):
        return np.log(votes)


def _together(answers: Mapping[str, Answers]) -> Answers:
    """The uniform mean of those that can read a site's rows."""
    sites = dict.fromkeys(site for votes in answers.values() for site in votes)
    return {site: np.mean([votes[site] for votes in answers.values() if site in votes], axis=0) for site in sites}


def _right(votes: Array, target: Array) -> Array:
    return np.asarray(votes.argmax(1) == target, np.float64)


def _distance(votes: Array, target: Array) -> Array:
    return np.asarray(np.abs(votes - target.reshape(votes.shape)).mean(1))


def _square(votes: Array, target: Array) -> Array:
    return np.asarray(np.square(votes - target.reshape(votes.shape)).mean(1))


#: metrics that are means over rows -> their value of each row
_PER_ROW = {"accuracy": _right, "mae": _distance, "mse": _square}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _gap(score: Score, who: str, no_interval: str) -> str:
    if score.gain is None:
        return ""
    span = f", {no_interval}" if no_interval else ""
    span = span if score.interval is None else f" [{score.interval[0]:+.3f}, {score.interval[1]:+.3f}]"
    return f" ({who}{score.gain:+.3f}{span})"


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if name == "student gain" and value is not None:
        low_high = row.get("interval")
        return f"{value:+.3f}" + ("" if low_high is None else f" [{low_high[0]:+.3f}, {low_high[1]:+.3f}]")
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


__all__ = ["Score", "Standing", "Standings", "standings_of", "student_of", "student_state"]
