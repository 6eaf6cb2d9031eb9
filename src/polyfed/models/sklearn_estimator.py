"""scikit-learn estimators made repeatable: seeds, one thread, no global generator; and their answers as arrays."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from sklearn.base import clone
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]  # it ships no types

from polyfed.core import seed
from polyfed.core.algorithm import Env
from polyfed.core.errors import UsageError
from polyfed.core.rows import Problem, Rows
from polyfed.core.tree import Array, Tree
from polyfed.models.sklearn_boosting import repeatable
from polyfed.models.sklearn_rows import Lesson

Estimator = Any  # scikit-learn has no types

FLOOR = 1e-6  # smallest probability of a prediction: log-probabilities stay finite, missing classes too


@dataclass(frozen=True)
class Settings:
    """What `sklearn` was given beside the estimator; see there."""

    epochs: int
    batch_size: int
    soft_copies: float
    soft_weight: float
    steps: int | None = None


class Family(Protocol):
    """Estimators whose state is made, trained and turned into a fitted estimator in one way."""

    offers: frozenset[str]
    needs_rows: bool  # whether `build` reads env.train and env.public, beside the state

    def first(self, estimator: Estimator, rows: Rows, env: Env) -> Tree: ...

    def fit(self, estimator: Estimator, start: Tree, lesson: Lesson, env: Env, settings: Settings) -> tuple[Tree, int]:
        """The next state and the optimizer steps done; `estimator` is the template, never changed."""
        ...

    def build(
        self, estimator: Estimator, state: Tree, env: Env, settings: Settings, names: Array | None = None
    ) -> Estimator | None:
        """A fitted estimator with class numbers, or `names`, as its classes; None when `state` was never trained."""
        ...


def prepared(estimator: Estimator, value: int) -> Estimator:
    """A clone whose nested ``random_state`` all come from `value`, with ``n_jobs`` of one everywhere.

    None stands for one job: some estimators deprecate the parameter and warn of any number.
    """
    made = clone(estimator)
    found = made.get_params(deep=True)
    given: dict[str, Any] = {n: seed.integer(value, n) for n in found if n.rpartition("__")[2] == "random_state"}
    given |= {n: None for n, v in found.items() if n.rpartition("__")[2] == "n_jobs" and v is not None}
    given |= repeatable(made)
    for name, inner in found.items():
        given |= repeatable(inner, f"{name}__")
    for name, inner in found.items():  # splitters hold a random_state but are no estimators: reached by no name
        if hasattr(inner, "random_state") and not hasattr(inner, "get_params"):
            given[name] = copy.copy(inner)
            # a splitter without shuffling refuses to be built with a seed, but never looks at it
            given[name].random_state = seed.integer(value, name)
    return made.set_params(**given) if given else made


@cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries: milliseconds, so once


@contextmanager
def alone(value: int) -> Iterator[None]:
    """One thread, and the global generators set from `value` and put back after.

    Nothing of scikit-learn needs them once every ``random_state`` is set; a user's own transformer may.
    """
    state, python = np.random.get_state(), random.getstate()  # noqa: NPY002  # the global generator is what is guarded
    np.random.seed(value)  # noqa: NPY002  # as above
    random.seed(value)
    try:
        with _threads().limit(limits=1):
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002  # as above
        random.setstate(python)


def answers(estimator: Estimator | None, x: Array, problem: Problem) -> Array:
    """(n, outputs) float32: log-probabilities in the problem's class order, or values.

    A model that was never trained finds every class equally likely, and answers 0 to a regression.
    """
    if estimator is None:
        constant = -np.log(problem.outputs) if problem.is_classification else 0.0
        return np.full((len(x), problem.outputs), constant, np.float32)
    if not problem.is_classification:
        return _values(estimator.predict(x), problem)
    full = np.zeros((len(x), problem.outputs))
    with np.errstate(all="ignore"):  # a feature without spread divides by 0; what is not finite becomes the floor
        full[:, np.asarray(estimator.classes_, np.int64)] = probabilities(estimator, x)
    full = np.maximum(np.nan_to_num(full), FLOOR)
    full /= full.sum(axis=1, keepdims=True)
    return np.asarray(np.log(full), np.float32)


def _values(values: Array, problem: Problem) -> Array:
    shaped = np.asarray(values, np.float32).reshape(len(values), -1)
    if shaped.shape[1] != problem.outputs:
        raise UsageError(f"the estimator predicts {shaped.shape[1]} values a row, the problem has {problem.outputs}")
    return shaped


def probabilities(estimator: Estimator, x: Array) -> Array:
    """(n, classes of this estimator): its own, else softmax or sigmoid of its decision function, else 0 and 1."""
    if hasattr(estimator, "predict_proba"):
        return np.asarray(estimator.predict_proba(x))
    classes = estimator.classes_
    if hasattr(estimator, "decision_function"):
        score = np.asarray(estimator.decision_function(x))
        score = np.stack([np.zeros(len(x)), score], axis=1) if score.ndim == 1 else score
        if score.shape[1] == len(classes):  # an "ovo" decision function has a column for each pair of classes instead
            score = np.exp(score - score.max(axis=1, keepdims=True))
            return np.asarray(score / score.sum(axis=1, keepdims=True))
    return np.asarray(np.asarray(estimator.predict(x))[:, None] == classes, np.float64)


def parameters(estimator: Estimator) -> Mapping[str, Any]:
    """Its hyper-parameters, without those that change nothing of what is learned."""
    silent = ("random_state", "n_jobs", "verbose")
    found = estimator.get_params(deep=True)
    return {name: value for name, value in sorted(found.items()) if name.rpartition("__")[2] not in silent}


def first_stream(env: Env) -> np.random.Generator:
    """What a first state is drawn from: the same for every client and task of a run."""
    return seed.rng(env.seed, "first")
