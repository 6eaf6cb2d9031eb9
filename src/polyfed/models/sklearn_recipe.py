"""Models without parameters to share (forests, boosting, neighbours, pipelines): the state is the recipe of their fit.

A fit of scikit-learn is a function of its rows and seeds. The rows stay where they are; a state holds the seed and the
soft labels of the public rows, and the estimator is fitted again from it when it is not at hand. So a state is a tree
of a few numbers, it travels through memory, journal and files without pickle, and a resumed process predicts the same.
"""

from __future__ import annotations

import numpy as np
from sklearn.dummy import DummyClassifier
from sklearn.utils.validation import has_fit_parameter

from polyfed.core import seed
from polyfed.core.algorithm import Env
from polyfed.core.errors import DataError, UsageError
from polyfed.core.rows import Problem, Rows
from polyfed.core.tree import Array, Tree
from polyfed.models.sklearn_boosting import labelled as labelled_by_any
from polyfed.models.sklearn_boosting import plain
from polyfed.models.sklearn_estimator import Estimator, Settings, alone, prepared
from polyfed.models.sklearn_rows import Batch, Lesson, Soft, digest, joined, labelled, softened

SEED, WEIGHT, SOFT = "buffers:seed", "buffers:soft_weight", "buffers:soft"
UNTRAINED = -1


class Recipe:
    """Refitted from (own rows, softly labelled public rows, seed)."""

    offers = frozenset({"predict", "distill"})
    needs_rows = True

    def first(self, estimator: Estimator, rows: Rows, env: Env) -> Tree:
        del estimator, rows
        public = 0 if env.public is None else len(env.public)
        return _state(UNTRAINED, 0.0, np.zeros((public, env.problem.outputs)))

    def fit(self, estimator: Estimator, start: Tree, lesson: Lesson, env: Env, settings: Settings) -> tuple[Tree, int]:
        """Own labels draw a new seed and keep the soft labels; soft labels replace the soft labels and keep the seed."""
        del settings
        kind, now = type(estimator).__name__, int(start[SEED])
        if lesson.labelled is not None:
            labelled(lesson.labelled, env.problem)  # what is wrong with the rows is said now, not when they are used
            if lesson.soft or env.train is None or not _equal(lesson.labelled, env.train):
                raise UsageError(f"{kind} is fitted again from its client's training rows; it cannot train on others")
            return _state(env.integer("estimator"), float(start[WEIGHT]), start[SOFT]), 0
        soft = _one(lesson, kind)
        if env.public is None or digest(soft.rows, targets=False) != digest(env.public, targets=False):
            held = 0 if env.public is None else len(env.public)
            raise UsageError(
                f"{kind} takes soft labels for the public rows alone: got {len(soft.rows)} other rows, not those {held}"
            )
        now = env.integer("estimator") if now == UNTRAINED else now
        return _state(now, soft.weight, soft.answers), 0

    def build(
        self, estimator: Estimator, state: Tree, env: Env, settings: Settings, names: Array | None = None
    ) -> Estimator | None:
        value = int(state[SEED])
        if value == UNTRAINED:
            return None
        made, weighted = labelled_by_any(prepared(estimator, value)), takes_weights(estimator)
        batch = self._batch(state, env, settings, weighted=weighted)
        return plain(_fitted(made, batch, env.problem, seed.integer(value, "global"), names, weighted=weighted))

    def _batch(self, state: Tree, env: Env, settings: Settings, *, weighted: bool) -> Batch:
        weight, own = float(state[WEIGHT]), env.train
        batches = [] if own is None or (weight > 0 and not len(own)) else [labelled(own, env.problem)]
        if weight > 0:
            if env.public is None or len(env.public) != len(state[SOFT]):
                raise DataError(
                    "the public rows of this state's soft labels are not here; fit and predict with the same"
                )
            soft = Soft(env.public, state[SOFT], weight)
            batches.append(softened(soft, env.problem, settings.soft_copies, weighted=weighted))
        return joined(batches)


def takes_weights(estimator: Estimator) -> bool:
    """Whether the estimator, or the last step of a pipeline, takes ``sample_weight``."""
    return bool(has_fit_parameter(_last(estimator)[1], "sample_weight"))


def _last(estimator: Estimator) -> tuple[str, Estimator]:
    steps = getattr(estimator, "steps", None)
    if not steps:
        return "", estimator
    name, inner = steps[-1]
    path, last = _last(inner)
    return f"{name}__{path}", last


def _fitted(
    estimator: Estimator, batch: Batch, problem: Problem, value: int, names: Array | None, *, weighted: bool
) -> Estimator:
    y = batch.y if names is None else names[batch.y]
    if problem.is_classification and len(np.unique(batch.y)) == 1:
        # many classifiers refuse a single class; what there is to learn from it is a constant
        return DummyClassifier(strategy="prior").fit(batch.x, y)
    even = not weighted or bool((batch.weight == 1).all())
    given = {} if even else {f"{_last(estimator)[0]}sample_weight": batch.weight}
    with alone(value):
        return estimator.fit(batch.x, y, **given)


def _equal(one: Rows, two: Rows) -> bool:
    return one is two or digest(one, targets=True) == digest(two, targets=True)


def _one(lesson: Lesson, kind: str) -> Soft:
    if len(lesson.soft) != 1:
        raise UsageError(f"{kind} follows one term with soft labels at a time, got {len(lesson.soft)}")
    return lesson.soft[0]


def _state(value: int, weight: float, soft: Array) -> Tree:
    return Tree({SEED: np.int64(value), WEIGHT: np.float64(weight), SOFT: soft})
