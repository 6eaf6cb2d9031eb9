"""Participants whose model is a scikit-learn estimator.

=====================================  ============================================================  ==================
estimator                              state                                                         one federated round
=====================================  ============================================================  ==================
GaussianNB, MultinomialNB,             sufficient statistics, mean over rows                         equals the fit on
BernoulliNB, ComplementNB,                                                                           all rows together
LinearRegression, Ridge,
LinearDiscriminantAnalysis
StandardScaler, PCA, SimpleImputer     the same; they predict nothing, see `pf.federated_transform`  as above
LogisticRegression                     coefficients; a whole fit from where they stand               a mean of fits
SGDClassifier, SGDRegressor,           coefficients or layers; `epochs` passes of ``partial_fit``    local SGD
Perceptron, MLPClassifier,
MLPRegressor
anything else: forests, boosting       the recipe of the fit: its seed, the soft labels of the       by predictions only
(LightGBM's and XGBoost's too), SVC,   public rows
neighbours, pipelines, ensembles
=====================================  ============================================================  ==================

Only the estimators themselves count, not their subclasses, which may compute something else: a subclass takes part
through its predictions, as do those above with ``early_stopping``, ``average``, ``positive``, ``solver="lbfgs"`` (of
the networks) or ``class_weight="balanced"`` (of the SGD family), which their own way of continuing does not know; and
LinearDiscriminantAnalysis where pooled scatter does not tell its fit (``shrinkage="auto"``, given priors with other
solvers than "svd"). So does a pipeline: coefficients behind a scaler that each client fits for itself are not about the
same features. To share parameters, give the bare estimator and put preprocessing into the client's data.
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np

from polyfed.core.errors import MissingExtraError, UsageError

try:
    from sklearn.base import clone, is_classifier, is_regressor
except ImportError as error:
    raise MissingExtraError("scikit-learn", "sklearn") from error

from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression, Perceptron, Ridge, SGDClassifier, SGDRegressor
from sklearn.naive_bayes import BernoulliNB, ComplementNB, GaussianNB, MultinomialNB
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.utils.validation import check_is_fitted

from polyfed.core.algorithm import Env, Fit, Fitted, Predict
from polyfed.core.rows import Problem, Rows
from polyfed.core.tree import Array, Tree
from polyfed.models import sklearn_transformers as transformers
from polyfed.models.sklearn_discriminant import LINEAR_DISCRIMINANT, is_exact
from polyfed.models.sklearn_estimator import Estimator, Family, Settings, alone, answers, parameters
from polyfed.models.sklearn_parameters import Descent, Layers, Logistic
from polyfed.models.sklearn_recipe import Recipe
from polyfed.models.sklearn_rows import digest, lesson, matrix
from polyfed.models.sklearn_statistics import COUNTED_BAYES, LEAST_SQUARES, NAIVE_BAYES

RESIDENT = 32  # fitted estimators kept by a process, whatever the number of clients


def sklearn(
    estimator: Estimator,
    *,
    epochs: int = 1,
    batch_size: int = 32,
    soft_copies: float = 0.02,
    soft_weight: float = 1.0,
    key: Hashable = None,
) -> SklearnModel:
    """A client's model from a scikit-learn classifier or regressor, which is cloned and never changed.

    A given fit is not used (with a warning): every client starts from scratch. A classifier that gives neither
    probabilities nor a decision function is warned of too: each of its labels counts as certain. Every nested ``random_state`` is set
    from the run's seed, whatever was given, and ``n_jobs`` is one inside a task.

    Args:
        estimator: a classifier or regressor, or a pipeline that ends in one; or StandardScaler, PCA or SimpleImputer,
            which have parameters and predict nothing.
        epochs: passes over the rows in one fit, for those that train by ``partial_fit``.
        batch_size: rows of one of their steps.
        soft_copies: probability from which a class of a soft label becomes a weighted copy of its row.
        soft_weight: of a softly labelled row against one of the client's own, times the term's own weight. Estimators
            without ``sample_weight`` in their `fit` (neighbours, Gaussian processes, voting, stacking, searches) take the
            most likely class, at weight 1.
        key: equal keys say that two models may be averaged; the estimator's type and hyper-parameters by default.

    Raises:
        UsageError: none of these, or a setting out of its range.

    >>> from sklearn.ensemble import RandomForestClassifier
    >>> model = sklearn(RandomForestClassifier(50))
    >>> model.kind, sorted(model.offers)
    ('RandomForestClassifier', ['distill', 'predict'])
    """
    if isinstance(estimator, type) or not hasattr(estimator, "get_params"):
        raise UsageError(
            f"pf.sklearn takes a scikit-learn estimator such as RandomForestClassifier(), got {estimator!r}"
        )
    if type(estimator) in transformers.FAMILIES:
        transformers.check(estimator)
    elif not (is_classifier(estimator) or is_regressor(estimator)):
        known = ", ".join(kind.__name__ for kind in transformers.FAMILIES)
        raise UsageError(
            f"{type(estimator).__name__} is neither a classifier nor a regressor: it predicts no target; "
            f"of transformers, {known} can be fitted together"
        )
    if epochs < 1 or batch_size < 1:
        raise UsageError(f"epochs and batch_size count from 1, got {epochs} and {batch_size}")
    if not (0 <= soft_copies < 1 and soft_weight >= 0):
        raise UsageError(f"soft_copies is in [0, 1) and soft_weight not negative, got {soft_copies} and {soft_weight}")
    if _is_fitted(estimator):
        warnings.warn(
            f"this {type(estimator).__name__} is fitted already; polyfed takes its settings and fits it anew",
            stacklevel=2,
        )
    if is_classifier(estimator) and not any(hasattr(estimator, how) for how in ("predict_proba", "decision_function")):
        warnings.warn(
            f"{type(estimator).__name__} says labels only, not how sure it is: where predictions are exchanged or scored, "
            "each label counts as certain",
            stacklevel=2,
        )
    return SklearnModel(estimator, Settings(epochs, batch_size, soft_copies, soft_weight), key)


class SklearnModel:
    """See `sklearn`. Implements `polyfed.core.protocols.Model`.

    Predictions of a classifier are log-probabilities in the problem's class order, none below log 1e-6: classes that a
    client has never seen stand there. Without ``predict_proba`` they come from the decision function by softmax.
    """

    kind: str
    offers: frozenset[str]
    key: Hashable
    settings: Mapping[str, str | float | int | bool]

    def __init__(self, estimator: Estimator, settings: Settings, key: Hashable = None) -> None:
        self.estimator = clone(estimator)
        self.kind = type(estimator).__name__
        self._settings, self._family = settings, family_of(estimator)
        self.offers = self._family.offers
        self.key = ("sklearn", self.kind, repr(parameters(self.estimator))) if key is None else ("sklearn", key)
        self.settings = _report(self.estimator, settings, self._family)
        self._first: tuple[Hashable, Tree] | None = None  # the last one made: every request starts with it
        self._token = object()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_token"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _token=object())

    def first(self, rows: Rows, env: Env) -> Tree:
        """The untrained state; what is drawn in it depends on the run's seed alone, so that all clients draw the same."""
        self._check(env.problem)
        public = 0 if env.public is None else len(env.public)
        name = (env.seed, env.problem, matrix(rows).shape[1], public)
        if self._first is None or self._first[0] != name:
            self._first = name, self._family.first(self.estimator, rows, env)
        return self._first[1]

    def fit(self, request: Fit, rows: Rows, env: Env) -> Fitted:
        """Trains from the request's start; raises `UsageError` for a term that needs gradients, `DataError` without rows.

        Guarantees: a single class, or classes that others have and this client has not, are no error.
        """
        taught = lesson(request, rows, env.problem, self.kind, self._settings.soft_weight)
        epochs = self._settings.epochs if request.epochs is None else request.epochs
        settings = replace(self._settings, epochs=epochs, steps=request.steps)
        start = self._start(request.start, rows, env)
        if 0 in (epochs, request.steps):
            return Fitted(start)
        state, steps = self._family.fit(self.estimator, start, taught, env, settings)
        return Fitted(state, steps)

    def predict(self, request: Predict, rows: Rows, env: Env) -> Array:
        """(n, classes) log-probabilities or (n, outputs) values, float32; the rows' targets are not looked at."""
        if "predict" not in self.offers:
            raise UsageError(
                f"{self.kind} predicts nothing; fit it by pf.federated_transform, or run it with "
                "evaluate_every=0, test=False, baselines=()"
            )
        if request.what != "logits":
            raise UsageError(f"{self.kind} has no {request.what}; it predicts")
        over = rows if request.rows is None else request.rows
        fitted = self._fitted(self._start(request.start, over, env), env)
        x = matrix(over)
        with alone(0):
            return answers(fitted, x, env.problem)

    def export(self, state: Tree, rows: Rows, env: Env) -> Estimator:
        """An ordinary fitted estimator with this state, the caller's own.

        It predicts the problem's class names; numbers where the names are just "0", "1", ... An estimator that takes part
        through its predictions is fitted again on `rows` and the public ones; with a single class it is a DummyClassifier.

        Raises:
            UsageError: the state was never trained.
        """
        if env.train is None and rows.target is not None:
            env = replace(env, train=rows)
        names = _names(env.problem)
        made = self._family.build(self.estimator, state, env, self._settings, names)
        if made is None:
            raise UsageError(f"this {self.kind} was never trained: there is nothing to export")
        jobs = {n: v for n, v in self.estimator.get_params().items() if n.rpartition("__")[2] == "n_jobs"}
        held = made.get_params()
        return made.set_params(**{name: value for name, value in jobs.items() if name in held})

    def _start(self, start: tuple[Tree, ...], rows: Rows, env: Env) -> Tree:
        state = self.first(rows, env)
        for tree in start:
            state = state.overlay(tree)
        return state

    def _fitted(self, state: Tree, env: Env) -> Estimator | None:
        name: tuple[Hashable, ...] = (self._token, env.problem, state.digest)
        if self._family.needs_rows:
            read = ((env.train, True), (env.public, False))
            name += tuple(None if rows is None else digest(rows, targets=own) for rows, own in read)
        with _lock:
            if name in _resident:
                _resident.move_to_end(name)
                return _resident[name]
        made = self._family.build(self.estimator, state, env, self._settings)
        with _lock:
            _resident[name] = made
            while len(_resident) > RESIDENT:
                _resident.popitem(last=False)
        return made

    def _check(self, problem: Problem) -> None:
        if "predict" not in self.offers or is_classifier(self.estimator) == problem.is_classification:
            return
        asked, does = ("classes", "values") if problem.is_classification else ("values", "classes")
        raise UsageError(f"{self.kind} predicts {does}, the problem asks for {asked}: take the other kind of estimator")


# The fits that a process has at hand; a state's digest and the rows' name one, so that nothing here decides an answer.
_resident: OrderedDict[Hashable, Estimator | None] = OrderedDict()
_lock = Lock()


def family_of(estimator: Estimator) -> Family:
    """How this estimator's state is made: the table at the head of this file."""
    kind, given = type(estimator), estimator.get_params(deep=False)
    if kind in transformers.FAMILIES:
        return transformers.FAMILIES[kind]
    if kind is GaussianNB:
        return NAIVE_BAYES
    if kind in (MultinomialNB, BernoulliNB, ComplementNB):
        return COUNTED_BAYES
    if kind in (LinearRegression, Ridge) and not given["positive"]:
        return LEAST_SQUARES
    if kind is LinearDiscriminantAnalysis and is_exact(estimator):
        return LINEAR_DISCRIMINANT
    if kind is LogisticRegression:
        return Logistic()
    stops, balances = given.get("early_stopping"), given.get("class_weight") == "balanced"
    if kind in (SGDClassifier, SGDRegressor, Perceptron) and not (stops or balances or given.get("average")):
        return Descent()
    if kind in (MLPClassifier, MLPRegressor) and not stops and given["solver"] != "lbfgs":
        return Layers()
    return Recipe()


def _is_fitted(estimator: Estimator) -> bool:
    try:
        check_is_fitted(estimator)
    except NotFittedError:
        return False
    return True


def _names(problem: Problem) -> Array | None:
    classes = problem.classes
    if classes is None or classes == tuple(str(k) for k in range(len(classes))):
        return None
    return np.asarray(classes)


def _report(estimator: Estimator, settings: Settings, family: Family) -> Mapping[str, str | float | int | bool]:
    """Hyper-parameters that differ from the estimator's own defaults, and how it trains."""
    told: dict[str, str | float | int | bool] = {}
    if isinstance(family, (Descent, Layers)):
        told |= {"epochs": settings.epochs, "batch_size": settings.batch_size}
    usual: dict[str, Any] = {}
    for kind in reversed(type(estimator).__mro__):  # XGBoost's parameters are declared by its base classes
        usual |= {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    for name, value in estimator.get_params(deep=False).items():
        if name in ("random_state", "n_jobs", "verbose") or repr(value) == repr(usual.get(name)):
            continue
        told[name] = value if isinstance(value, (str, float, int, bool)) else " ".join(repr(value).split())[:200]
    return told
