"""A joint opinion on a case: what each participant says of it, and the mean of what they say.

Every participant reads the case as it read its own rows: raw, through the preprocessing that it fit on its own training
rows, with the model that it has at the end. Nobody needs another's columns: of a case each takes those that it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyfed import data as tables
from polyfed.core import metrics
from polyfed.core.algorithm import Predict
from polyfed.core.errors import DataError, UsageError
from polyfed.core.rows import Problem, Rows
from polyfed.core.tree import Array
from polyfed.data import Prepared, Raw
from polyfed.data.table import is_frame, pandas
from polyfed.run.client import first_env
from polyfed.run.text import aligned

if TYPE_CHECKING:
    from polyfed.run.result import Result

Weights = Literal["uniform", "num_examples"]
#: Of more classes a case's table shows those that the ensemble finds most likely.
FEW_CLASSES = 6


@dataclass(frozen=True, eq=False)
class Member:
    """One participant of an ensemble.

    Attributes:
        name: the client's.
        kind: its model's type.
        num_examples: its training rows.
        wants: input name -> names of a DataFrame's columns, or the shape of one row of an array.
        ask: raw rows with just these inputs -> (n, classes) probabilities; (n, outputs) values of a regression.
        reshapes: whether its preprocessing makes of arrays of another shape what its model takes, such as smaller images.
    """

    name: str
    kind: str
    num_examples: int
    wants: Mapping[str, tuple[str, ...] | tuple[int, ...]]
    ask: Callable[[Raw], Array] = field(repr=False)
    reshapes: Callable[[Raw], bool] = field(default=lambda _: False, repr=False)

    def answer(self, raw: Raw) -> Array:
        """(n, classes) probabilities, or (n, outputs) values; raises `DataError` for rows that lack what it reads."""
        return self.ask(self.own_part(raw))

    def own_part(self, raw: Raw) -> Raw:
        """The inputs and columns that this participant knows, in its own order; raises `DataError` for what is lacking."""
        if said := self.lacks(raw):
            raise DataError(f"{self.name} {said}")
        inputs = {key: raw.inputs[self._key(raw, key)] for key in self.wants}
        return Raw({key: value[list(self.wants[key])] if is_frame(value) else value for key, value in inputs.items()})

    def lacks(self, raw: Raw) -> str:
        """Why it cannot read these rows, in words that follow its name; "" where it can."""
        for key, wanted in self.wants.items():
            if (found := self._key(raw, key)) not in raw.inputs:
                return f"reads the input {key!r}, the rows have {', '.join(raw.inputs)}"
            if (said := _misfit(raw.inputs[found], wanted)) and not self._reshapes(raw):
                return said
        return ""

    def _reshapes(self, raw: Raw) -> bool:
        found = {key: self._key(raw, key) for key in self.wants}
        if any(there not in raw.inputs or is_frame(raw.inputs[there]) for there in found.values()):
            return False  # columns are found by name, never made to fit
        return self.reshapes(Raw({key: raw.inputs[there][:1] for key, there in found.items()}))

    def _key(self, raw: Raw, key: str) -> str:
        """A single input is the same whatever it is called."""
        return next(iter(raw.inputs)) if len(self.wants) == len(raw.inputs) == 1 else key


def _misfit(value: Any, wanted: Sequence[Any]) -> str:
    named = bool(wanted) and isinstance(wanted[0], str)
    if not is_frame(value):
        if named:
            return f"reads a DataFrame with {_few(wanted)}, got an array"
        return "" if value.shape[1:] == tuple(wanted) else f"reads {list(wanted)} a row, got {list(value.shape[1:])}"
    if not named:
        return f"reads arrays of {list(wanted)} a row, got a DataFrame"
    missing = [column for column in wanted if column not in value.columns]
    return f"reads the column{'s' * (len(missing) > 1)} {_few(missing)}, which the rows lack" if missing else ""


def _few(names: Sequence[Any]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def wants_of(raw: Raw) -> dict[str, tuple[str, ...] | tuple[int, ...]]:
    """What a client's raw rows are made of: the names of a DataFrame's columns, the shape of an array's row."""
    return {
        key: tuple(str(column) for column in value.columns) if is_frame(value) else tuple(value.shape[1:])
        for key, value in raw.inputs.items()
    }


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Participants asked together. What `x` may be: an array, a DataFrame, or a dict of arrays, raw as the clients' data.

    A frame or dict may hold more than a participant knows: each takes its own columns and inputs, by name.

    Attributes:
        problem: what is predicted.
        members: by name, in the order of the federation.
        weights: "uniform" (every participant counts the same) or "num_examples" (by its training rows).
        untrained: who was left out because nothing that it trained ever counted.
    """

    problem: Problem
    members: Mapping[str, Member]
    weights: Weights = "uniform"
    untrained: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weights not in ("uniform", "num_examples"):
            raise UsageError(f'weights={self.weights!r} is unknown; write "uniform" or "num_examples"')
        if not self.members:
            raise UsageError(f"an ensemble needs at least one member{_without(self.untrained, '; ')}")

    def votes(self, x: Any) -> dict[str, Array]:
        """Participant -> (n, classes) float64 probabilities at temperature 1; of a regression (n, outputs) values.

        Raises:
            DataError: rows that some participants cannot read: names them, what they lack, and `members=`.
        """
        raw = raw_of(x)
        cannot = {name: said for name, member in self.members.items() if (said := member.lacks(raw))}
        if cannot:
            able = [name for name in self.members if name not in cannot]
            hint = f"; leave them out with members={able}" if able else ""
            raise DataError("; ".join(f"{name} {said}" for name, said in cannot.items()) + hint)
        return {name: member.answer(raw) for name, member in self.members.items()}

    def predict_proba(self, x: Any) -> Array:
        """(n, classes) float64: the weighted mean of the votes; raises `UsageError` for a regression."""
        if not self.problem.is_classification:
            raise UsageError(
                "a regression has no probabilities; predict(x) gives the mean, spread(x) how far they differ"
            )
        return self.mean(self.votes(x))

    def predict(self, x: Any) -> Array:
        """(n,) class names, whole numbers where the classes are just "0", "1", ...; of a regression the mean values.

        A regression's are (n,) float64, or (n, outputs) where there are several.
        """
        mean = self.mean(self.votes(x))
        return _narrow(mean) if not self.problem.is_classification else names_of(self.problem)[mean.argmax(1)]

    def spread(self, x: Any) -> Array:
        """How far the participants differ: the weighted standard deviation of their votes about the mean.

        (n,) or (n, outputs) float64 for a regression, in the unit of the target; (n, classes) for classes.
        """
        votes = self.votes(x)
        mean = self.mean(votes)
        squares = self.mean({name: np.square(vote - mean) for name, vote in votes.items()})
        return np.sqrt(squares) if self.problem.is_classification else _narrow(np.sqrt(squares))

    def mean(self, votes: Mapping[str, Array]) -> Array:
        """The weighted mean of these participants' votes, (n, outputs) float64."""
        sizes = {name: 1.0 if self.weights == "uniform" else self.members[name].num_examples for name in votes}
        total = sum(sizes.values())
        return np.asarray(sum(vote * (sizes[name] / total) for name, vote in votes.items()))

    def explain(self, x: Any) -> str:
        """One case as a table to read: a line a participant with its vote, then what they say together.

        Args:
            x: one row, as in `votes`; or the case by itself: an array of the shape of one row, such as ``x[550]``, a
                Series of the columns, such as ``frame.iloc[550]``, or a dict of values by column or input.

        Raises:
            DataError: as `votes`, or not exactly one row.
        """
        raw = raw_of(one_case(x, [member.wants for member in self.members.values()]))
        if len(raw) != 1:
            raise DataError(
                f"explain takes one case, got {len(raw)} rows; write x[550:551] for row 550 of an array, "
                "frame.iloc[[550]] for that of a DataFrame"
            )
        votes = {name: vote[0] for name, vote in self.votes(raw).items()}
        mean = self.mean(votes)
        return self._of_classes(votes, mean) if self.problem.is_classification else self._of_values(votes, mean)

    def _of_classes(self, votes: Mapping[str, Array], mean: Array) -> str:
        assert self.problem.classes is not None
        classes = self.problem.classes
        shown = sorted(np.argsort(-mean, kind="stable")[:FEW_CLASSES].tolist())
        heads = ["participant", "model", "votes for", *(classes[c] for c in shown)]
        lines = [
            [name, self.members[name].kind, classes[int(vote.argmax())], *(f"{vote[c]:.3f}" for c in shown)]
            for name, vote in votes.items()
        ]
        choice = int(mean.argmax())
        lines.append(["together", "", classes[choice], *(f"{mean[c]:.3f}" for c in shown)])
        agree = sum(int(vote.argmax()) == choice for vote in votes.values())
        notes = [f"{agree} of {len(votes)} participants vote for {classes[choice]}; together: {self._how()}"]
        if len(shown) < len(classes):
            notes.append(f"{len(classes) - len(shown)} less likely classes are left out of this print")
        notes += [_without(self.untrained)] if self.untrained else []
        return "\n".join([*aligned([heads, *lines], left=3), "", *notes])

    def _of_values(self, votes: Mapping[str, Array], mean: Array) -> str:
        spread = np.sqrt(self.mean({name: np.square(vote - mean) for name, vote in votes.items()}))
        width = len(mean)
        heads = ["participant", "model", *(["says"] if width == 1 else [f"output {i}" for i in range(width)])]
        lines = [[name, self.members[name].kind, *(f"{v:.4g}" for v in vote)] for name, vote in votes.items()]
        lines.append(["together", "", *(f"{v:.4g}" for v in mean)])
        lines.append(["spread", "", *(f"{v:.4g}" for v in spread)])
        told = f"together: {self._how()}; spread: the standard deviation of what the participants say"
        notes = [told, _without(self.untrained)] if self.untrained else [told]
        return "\n".join([*aligned([heads, *lines]), "", *notes])

    def _how(self) -> str:
        return "their mean" if self.weights == "uniform" else "their mean weighted by training rows"

    def __repr__(self) -> str:
        return f"<Ensemble of {', '.join(self.members)}>"


def ensemble_of(result: Result, members: Sequence[str] | str | None = None, weights: Weights = "uniform") -> Ensemble:
    """The participants of a run, or those named; see `Result.ensemble`."""
    untrained = result.untrained if members is None else ()
    if members is None:
        members = [name for name in result.population.sites if name not in untrained]
    names = [members] if isinstance(members, str) else members
    return Ensemble(result.population.problem, {n: _asked(result, n) for n in names}, weights, untrained)


def _asked(result: Result, name: str) -> Member:
    """A client, or the student where no client has that name."""
    if name == "student" and name not in result.population.sites and result.has_student:
        from polyfed.run.student import student_member  # it is built of what stands here

        return student_member(result)
    return _member(result, name)


def _without(untrained: Sequence[str], before: str = "") -> str:
    """A sentence on who has no vote."""
    said = f"left out, since nothing that it trained ever counted: {', '.join(untrained)}"
    return before + said if untrained else ""


def _member(result: Result, name: str) -> Member:
    site, prepared = result.site(name), result.population.prepared[name]
    env, problem = first_env(site, result.seed), result.population.problem
    state = result.state_of(name)

    def ask(raw: Raw) -> Array:
        outputs = site.model.predict(Predict(start=(state,)), prepared.apply(name, raw), env)
        return said(outputs, problem)

    wants = wants_of(result.population.raws[name])
    return Member(name, site.model.kind, len(site.train), wants, ask, partial(reshapes, prepared, name, site.train))


def reshapes(prepared: Prepared, name: str, own: Rows, raw: Raw) -> bool:
    """Whether a function of the client's own makes of these rows, in another shape than its own, what its model takes."""
    if not all(callable(step) and not hasattr(step, "transform") for step in prepared.fitted.values()):
        return False
    try:
        made = prepared.apply(name, raw)
    except DataError:
        return False
    return {key: a.shape[1:] for key, a in made.inputs.items()} == {key: a.shape[1:] for key, a in own.inputs.items()}


def said(outputs: Array, problem: Problem) -> Array:
    """A model's outputs as a vote: (n, classes) probabilities of logits or log-probabilities, or (n, outputs) values."""
    if problem.is_classification:
        return np.exp(metrics.log_softmax(outputs))
    return np.asarray(outputs, np.float64).reshape(len(outputs), -1)


def one_case(x: Any, wants: Sequence[Mapping[str, Sequence[Any]]]) -> Any:
    """Rows of one, where `x` is a case by itself in a form that somebody with one of these `wants` reads; else `x`."""
    if not is_frame(x) and hasattr(x, "index") and hasattr(x, "to_dict"):  # a Series, of a DataFrame's row
        return _case_of_columns(x.to_dict(), wants) or one_case(x.to_numpy(), wants)
    if isinstance(x, Mapping):
        known = {(key, tuple(wanted)) for inputs in wants for key, wanted in inputs.items()}
        if x and all((key, np.shape(value)) in known for key, value in x.items()):
            return {key: np.asarray(value)[None] for key, value in x.items()}
        flat = bool(x) and all(np.ndim(value) == 0 for value in x.values())
        return (_case_of_columns(x, wants) if flat else None) or x
    shapes = {tuple(wanted) for inputs in wants for wanted in inputs.values()}
    is_case = not is_frame(x) and hasattr(x, "shape") and tuple(x.shape) in shapes and tuple(x.shape[1:]) not in shapes
    return x[None] if is_case else x


def _case_of_columns(x: Mapping[Any, Any], wants: Sequence[Mapping[str, Sequence[Any]]]) -> Raw | None:
    """A DataFrame of one row under the name of the input that somebody reads by columns; None where all read arrays."""
    named = (key for inputs in wants for key, wanted in inputs.items() if wanted and isinstance(wanted[0], str))
    key = next(named, None)
    return None if key is None else Raw({key: pandas().DataFrame({name: [value] for name, value in x.items()})})


def raw_of(x: Any) -> Raw:
    """Rows to judge, in any form that a client's data takes, without a target."""
    return tables.read("x", x, labelled=False).unlabelled()


def names_of(problem: Problem) -> Array:
    """(classes,) names; whole numbers where they are just "0", "1", ..."""
    assert problem.classes is not None
    numbers = tuple(str(k) for k in range(len(problem.classes)))
    return np.arange(len(numbers)) if problem.classes == numbers else np.asarray(problem.classes)


def _narrow(values: Array) -> Array:
    return values[:, 0] if values.shape[1] == 1 else values


__all__ = ["Ensemble", "Member", "ensemble_of"]
