"""Models with parameters that continue from where they start: linear models by gradient, small networks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.base import is_classifier
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import has_fit_parameter

from polyfed.core.algorithm import Env
from polyfed.core.errors import UsageError
from polyfed.core.rows import Rows
from polyfed.core.tree import Array, Tree
from polyfed.models.sklearn_estimator import Estimator, Settings, alone, first_stream, prepared
from polyfed.models.sklearn_rows import Batch, Lesson, joined, labelled, matrix, softened, with_own
from polyfed.models.sklearn_statistics import ABSENT

COUNT = "buffers:rows_seen"


class Logistic:
    """`LogisticRegression`: a whole fit from the start's coefficients; rows with soft labels join the client's own.

    A fit is among the classes that its rows have; coefficients of the others stay where they start, as in FedRS with
    α = 0 (Li and Zhan, "Restricted Softmax for Label Distribution Non-IID Data", KDD 2021). Otherwise each client would
    push down the classes that it has never seen, as far as its rows allow. On 600 digits at three sites of some four
    classes each, the mean of three such fits finds 0.20 of the classes, this one's 0.83.

    The state also holds the share of the rows that each class has ("class"): a class that no client has stands at the
    floor of the predictions.
    """

    offers = frozenset({"params", "predict", "distill", "iterates"})
    needs_rows = False

    def first(self, estimator: Estimator, rows: Rows, env: Env) -> Tree:
        del estimator
        return Tree({**_linear(matrix(rows).shape[1], env), "class": np.zeros(env.problem.outputs)})

    def fit(self, estimator: Estimator, start: Tree, lesson: Lesson, env: Env, settings: Settings) -> tuple[Tree, int]:
        batch = joined(with_own(lesson, env, settings.soft_copies))
        share = np.bincount(batch.y, batch.weight, env.problem.outputs) / batch.weight.sum()
        seen = np.flatnonzero(share)
        if len(seen) == 1:
            return start.overlay(Tree({"class": share})), 0
        made = prepared(estimator, env.integer("estimator")).set_params(warm_start=True)
        made.coef_, made.intercept_ = among(start["coef"], seen), among(start["intercept"], seen)
        weight = None if (batch.weight == 1).all() else batch.weight
        with alone(env.integer("global")), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # max_iter is a local budget here, not a mistake
            made.fit(batch.x, batch.y, sample_weight=weight)
        intercept = np.broadcast_to(np.asarray(made.intercept_, np.float64), len(made.coef_))
        found = {
            "coef": _put(start["coef"], seen, made.coef_),
            "intercept": _put(start["intercept"], seen, intercept),
            "class": share,
        }
        return Tree(found), int(np.max(made.n_iter_))

    def build(
        self, estimator: Estimator, state: Tree, env: Env, settings: Settings, names: Array | None = None
    ) -> Estimator | None:
        del env, settings
        seen = np.flatnonzero(state["class"] > ABSENT)
        if not len(seen):
            return None
        classes, width = seen if names is None else names[seen], state["coef"].shape[1]
        if len(seen) == 1:
            return DummyClassifier(strategy="prior").fit(np.zeros((1, width)), classes)
        made = prepared(estimator, 0)
        made.coef_, made.intercept_ = among(state["coef"], seen), among(state["intercept"], seen)
        made.n_features_in_, made.classes_ = width, classes
        return made


def among(rows: Array, seen: Array) -> Array:
    """A copy of the classes' own rows of coefficients in scikit-learn's form: of two classes, their difference."""
    if len(rows) == 1 or len(seen) > 2:
        return rows.copy() if len(rows) == 1 else rows[seen]
    return np.asarray(rows[seen[1:]] - rows[seen[:1]])


def _put(rows: Array, seen: Array, fitted: Array) -> Array:
    """The inverse: of two classes among more, their mean stays where it was."""
    if len(rows) == 1:
        return fitted
    made = rows.copy()
    made[seen] = rows[seen].mean(axis=0) + np.concatenate([-fitted, fitted]) / 2 if len(seen) == 2 else fitted
    return made


class Descent:
    """`SGDClassifier`, `SGDRegressor`, `Perceptron`: passes of ``partial_fit`` over rows in an order of our own.

    The count of rows seen, which the learning rate's schedule runs by, is a buffer of the state.
    """

    offers = frozenset({"params", "predict", "distill", "iterates"})
    needs_rows = False

    def first(self, estimator: Estimator, rows: Rows, env: Env) -> Tree:
        if not is_classifier(estimator) and env.problem.outputs > 1:
            raise UsageError(f"{type(estimator).__name__} predicts one value, the problem has {env.problem.outputs}")
        return Tree({**_linear(matrix(rows).shape[1], env), COUNT: np.float64(1.0)})

    def fit(self, estimator: Estimator, start: Tree, lesson: Lesson, env: Env, settings: Settings) -> tuple[Tree, int]:
        batch, steps = _taught(lesson, env, settings), 0
        made = prepared(estimator, env.integer("estimator")).set_params(shuffle=False)
        made.coef_ = start["coef"].copy() if is_classifier(made) else start["coef"][0].copy()
        made.intercept_, made.t_ = start["intercept"].copy(), float(start[COUNT])
        given = {"classes": np.arange(env.problem.outputs)} if is_classifier(made) else {}
        with alone(env.integer("global")):
            for batches in passes(len(batch), settings, env.rng("order")):
                index = np.concatenate(batches)  # its steps are single rows, so a pass is one call
                made.partial_fit(batch.x[index], batch.y[index], sample_weight=batch.weight[index], **given)
                steps += len(batches)
        coef = made.coef_.reshape(start["coef"].shape)
        return Tree({"coef": coef, "intercept": made.intercept_, COUNT: np.float64(made.t_)}), steps

    def build(
        self, estimator: Estimator, state: Tree, env: Env, settings: Settings, names: Array | None = None
    ) -> Estimator | None:
        del settings
        made = _with_linear(prepared(estimator, 0), state, env, names)
        made.t_ = float(state[COUNT])
        return made


class Layers:
    """`MLPClassifier`, `MLPRegressor` with a stochastic solver: minibatches of ``partial_fit``, a fresh optimizer each fit."""

    offers = frozenset({"params", "predict", "distill", "iterates"})
    needs_rows = False

    def first(self, estimator: Estimator, rows: Rows, env: Env) -> Tree:
        """Glorot uniform, as scikit-learn draws it, from the client's own stream."""
        made = self._made(estimator, matrix(rows).shape[1], env, 0)
        draw, arrays = first_stream(env), {}
        for at, coef in enumerate(made.coefs_):
            bound = np.sqrt((2.0 if estimator.activation == "logistic" else 6.0) / sum(coef.shape))
            arrays[f"coefs/{at}"] = draw.uniform(-bound, bound, coef.shape)
            arrays[f"intercepts/{at}"] = draw.uniform(-bound, bound, coef.shape[1])
        return Tree(arrays)

    def fit(self, estimator: Estimator, start: Tree, lesson: Lesson, env: Env, settings: Settings) -> tuple[Tree, int]:
        weighs = has_fit_parameter(estimator, "sample_weight")  # from scikit-learn 1.7 on
        batch, steps = _taught(lesson, env, settings, weighted=weighs), 0
        made = self._with(estimator, start, env, env.integer("estimator"))
        even = not weighs or bool((batch.weight == 1).all())
        with alone(env.integer("global")):
            for batches in passes(len(batch), settings, env.rng("order")):
                for index in batches:
                    given = {} if even else {"sample_weight": batch.weight[index]}
                    made.batch_size = len(index)
                    made.partial_fit(batch.x[index], batch.y[index], **given)
                steps += len(batches)
        return Tree({name: _layer(made, name) for name in start}), steps

    def build(
        self, estimator: Estimator, state: Tree, env: Env, settings: Settings, names: Array | None = None
    ) -> Estimator | None:
        del settings
        made = self._with(estimator, state, env, 0)
        made.set_params(shuffle=estimator.shuffle, batch_size=estimator.batch_size)
        if names is not None:
            made.classes_ = names
            made._label_binarizer.fit(names)  # noqa: SLF001  # predict turns outputs into names by it
            made._label_binarizer.classes_ = names  # noqa: SLF001  # as above, in the problem's order
        return made

    def _made(self, estimator: Estimator, width: int, env: Env, value: int) -> Estimator:
        """All that scikit-learn sets up at a first call, done on rows of zeros."""
        made = prepared(estimator, value).set_params(shuffle=False, batch_size=1)
        if env.problem.is_classification:
            classes = np.arange(env.problem.outputs)
            return made.partial_fit(np.zeros((1, width)), classes[:1], classes=classes)
        y = np.zeros(1) if env.problem.outputs == 1 else np.zeros((1, env.problem.outputs))
        return made.partial_fit(np.zeros((1, width)), y)

    def _with(self, estimator: Estimator, state: Tree, env: Env, value: int) -> Estimator:
        made = self._made(estimator, len(state["coefs/0"]), env, value)
        layers = range(len(made.coefs_))
        made.coefs_ = [state[f"coefs/{at}"].copy() for at in layers]
        made.intercepts_ = [state[f"intercepts/{at}"].copy() for at in layers]
        if hasattr(made, "_optimizer"):
            del made._optimizer  # noqa: SLF001  # it has seen the row of zeros; the next call makes a new one
        made.t_, made.n_iter_, made.loss_curve_ = 0, 0, []
        return made


def _layer(estimator: Estimator, name: str) -> Array:
    which, _, at = name.partition("/")
    return np.asarray(getattr(estimator, f"{which}_")[int(at)])


def passes(n: int, settings: Settings, draw: np.random.Generator) -> Iterator[list[Array]]:
    """For each pass over `n` rows its batches, index arrays, in an order drawn anew; exactly ``steps`` of them if given."""
    size = settings.batch_size
    left = settings.steps if settings.steps is not None else settings.epochs * -(-n // size)
    while left > 0:
        order = draw.permutation(n)
        batches = [order[at : at + size] for at in range(0, n, size)][:left]
        left -= len(batches)
        yield batches


def _taught(lesson: Lesson, env: Env, settings: Settings, *, weighted: bool = True) -> Batch:
    batches = [] if lesson.labelled is None else [labelled(lesson.labelled, env.problem)]
    batches += [softened(soft, env.problem, settings.soft_copies, weighted=weighted) for soft in lesson.soft]
    return joined(batches)


def _linear(width: int, env: Env) -> Tree:
    """Zeros in the shapes of scikit-learn: one row of coefficients for two classes."""
    rows = 1 if env.problem.is_classification and env.problem.outputs == 2 else env.problem.outputs
    return Tree({"coef": np.zeros((rows, width)), "intercept": np.zeros(rows)})


def _with_linear(estimator: Estimator, state: Tree, env: Env, names: Array | None) -> Any:
    estimator.coef_, estimator.intercept_ = state["coef"].copy(), state["intercept"].copy()
    estimator.n_features_in_ = state["coef"].shape[1]
    if env.problem.is_classification:
        estimator.classes_ = np.arange(env.problem.outputs) if names is None else names
    else:
        estimator.coef_ = estimator.coef_[0]
    return estimator
