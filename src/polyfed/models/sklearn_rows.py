"""What a request teaches, as scikit-learn takes it: one matrix, targets, and a weight for each row.

Soft labels become weighted copies of their rows: one copy for each class whose probability is above a threshold, with
that probability as its weight, so that any estimator with ``sample_weight`` follows a teacher.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyfed.core.algorithm import Env, Fit
from polyfed.core.errors import DataError, UsageError
from polyfed.core.rows import Problem, Rows
from polyfed.core.terms import Own
from polyfed.core.tree import Array, aligned


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows to learn from.

    Attributes:
        x: (n, features) float64.
        y: (n,) int64 class numbers; (n,) or (n, outputs) float64 values.
        weight: (n,) float64.
    """

    x: Array
    y: Array
    weight: Array

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, eq=False)
class Soft:
    """Rows with a teacher's answers.

    Attributes:
        rows: without labels.
        answers: (n, outputs) float64 probabilities, or values of a regression.
        weight: of one row against a labelled row.
    """

    rows: Rows
    answers: Array
    weight: float


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a `Fit` asks to learn: labelled rows, rows with soft labels, or both."""

    labelled: Rows | None
    soft: tuple[Soft, ...]


def lesson(request: Fit, rows: Rows, problem: Problem, kind: str, soft_weight: float) -> Lesson:
    """The request's terms as rows to learn from; raises `UsageError` for a term that needs gradients."""
    if request.part:
        raise UsageError(f"{kind} trains as a whole; it cannot train {', '.join(request.part)} alone")
    over = rows if request.rows is None else request.rows
    labelled, soft = None, []
    for term in request.terms:
        if isinstance(term, Own):
            labelled = over
        elif hasattr(term, "soft_labels"):
            answers = np.asarray(term.soft_labels(request.targets), np.float64).reshape(len(over), -1)
            if answers.shape[1] != problem.outputs:
                raise UsageError(f"{kind}: soft labels have {answers.shape[1]} columns, wanted {problem.outputs}")
            soft.append(Soft(over, answers, float(getattr(term, "weight", 1.0)) * soft_weight))
        else:
            raise UsageError(
                f"{kind} has no gradients and cannot follow the loss term {type(term).__name__}; "
                "it follows its own labels (Own) and terms with soft labels (Distill, Match)"
            )
    return Lesson(labelled, tuple(soft))


def matrix(rows: Rows) -> Array:
    """(n, features) float64 in aligned storage, kept with the rows; images are flattened."""
    kept = rows.cache.get("sklearn.x")
    if kept is None:
        x = rows.x.reshape(len(rows), math.prod(rows.x.shape[1:]))
        kept = aligned(x.size, "float64").reshape(x.shape)
        kept[:] = x
        kept.flags.writeable = False
        rows.cache["sklearn.x"] = kept
    assert isinstance(kept, np.ndarray)
    return kept


def labelled(rows: Rows, problem: Problem) -> Batch:
    """Rows with their own targets, each of weight 1; raises `DataError` when there is nothing to learn."""
    if not len(rows):
        raise DataError("no training rows; a scikit-learn model needs at least one")
    if rows.target is None:
        raise DataError("these rows have no target to learn")
    y = rows.target.astype(np.int64 if problem.is_classification else np.float64)
    if problem.is_classification and (y.min() < 0 or y.max() >= problem.outputs):
        raise DataError(f"class numbers run from {y.min()} to {y.max()}, wanted 0 to {problem.outputs - 1}")
    return Batch(matrix(rows), y.ravel() if problem.outputs == 1 else y, np.ones(len(rows)))


def softened(soft: Soft, problem: Problem, threshold: float, *, weighted: bool = True) -> Batch:
    """Rows with a teacher's answers as rows to learn from.

    Classification: a copy of a row for each class above `threshold`, the weights of a row's copies sum to
    ``soft.weight``; a row with no class above it is left out. Not `weighted` (for estimators that take no weights):
    one copy with the most likely class.
    """
    x = matrix(soft.rows)
    if not problem.is_classification:
        y = soft.answers.ravel() if problem.outputs == 1 else soft.answers
        return Batch(x, y, np.full(len(x), soft.weight if weighted else 1.0))
    kept = np.where(soft.answers > threshold, soft.answers, 0.0)
    if not weighted:
        kept *= np.arange(problem.outputs) == kept.argmax(axis=1)[:, None]
    row, label = np.nonzero(kept)
    share = kept[row, label] / kept.sum(axis=1)[row]
    return Batch(x[row], label.astype(np.int64), share * soft.weight if weighted else np.ones(len(row)))


def joined(batches: Sequence[Batch]) -> Batch:
    """All of them, in order; rows of weight 0 are left out."""
    filled = [batch for batch in batches if len(batch)]
    if not filled:
        raise DataError("no training rows; a scikit-learn model needs at least one")
    if len(filled) == 1:
        one = filled[0]
    else:
        x, y, weight = ([getattr(b, name) for b in filled] for name in ("x", "y", "weight"))
        one = Batch(np.concatenate(x), np.concatenate(y), np.concatenate(weight))
    used = one.weight > 0
    return one if used.all() else Batch(one.x[used], one.y[used], one.weight[used])


def with_own(taught: Lesson, env: Env, threshold: float) -> list[Batch]:
    """What estimators learn that are fitted at once: rows with soft labels join the client's own labelled ones."""
    own = env.train if taught.labelled is None else taught.labelled
    batches = [] if own is None or (taught.soft and not len(own)) else [labelled(own, env.problem)]
    return batches + [softened(soft, env.problem, threshold) for soft in taught.soft]


def digest(rows: Rows, *, targets: bool) -> str:
    """Of the inputs, and of the targets if they are used; kept with the rows."""
    name = f"sklearn.digest.{targets}"
    if name not in rows.cache:
        total = hashlib.blake2b(digest_size=16)
        for array in (matrix(rows), rows.target if targets else None):
            if array is not None:
                total.update(f"{array.dtype}{array.shape}".encode())
                total.update(np.ascontiguousarray(array).view(np.uint8).data)
        rows.cache[name] = total.hexdigest()
    return str(rows.cache[name])
