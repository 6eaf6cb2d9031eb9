"""The scikit-learn adapter: exact federated statistics, refitted recipes, soft labels, files."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    BaggingClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, Perceptron, Ridge, SGDClassifier, SGDRegressor
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.naive_bayes import BernoulliNB, ComplementNB, GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor
from sklearn_sites import (
    TEN,
    TWO,
    VALUE,
    accuracy,
    averaged,
    cut,
    diabetes,
    digits,
    env_of,
    pooled_gap,
    rows_of,
    trained,
)

from polyfed.core.algorithm import Fit, Predict
from polyfed.core.checks_model import MODEL_CHECKS, Case
from polyfed.core.errors import CorruptError, DataError, UsageError
from polyfed.core.protocols import Model
from polyfed.core.rows import Problem
from polyfed.core.terms import Distill, Match, Near, Own
from polyfed.core.tree import Tree
from polyfed.models import sklearn_statistics
from polyfed.models.sklearn import SklearnModel, sklearn
from polyfed.models.sklearn_estimator import FLOOR, answers
from polyfed.models.sklearn_file import from_file, to_file
from polyfed.models.sklearn_rows import Soft, softened

CLASSIFIERS = [
    RandomForestClassifier(5),
    HistGradientBoostingClassifier(max_iter=2),
    make_pipeline(StandardScaler(), SVC()),
    KNeighborsClassifier(3),
    LogisticRegression(max_iter=15),
    GaussianNB(),
    MultinomialNB(),
    BernoulliNB(binarize=0.4),
    ComplementNB(),
    SGDClassifier(),
    Perceptron(),
    MLPClassifier((8,)),
]
REGRESSORS = [
    Ridge(),
    LinearRegression(),
    SGDRegressor(),
    MLPRegressor(hidden_layer_sizes=(8,)),
    RandomForestRegressor(4),
    HistGradientBoostingRegressor(max_iter=2),
]


# ---------------------------------------------------------------- the contract of every adapter
@pytest.mark.parametrize("check", MODEL_CHECKS.values(), ids=MODEL_CHECKS)
@pytest.mark.parametrize("estimator", CLASSIFIERS + REGRESSORS, ids=lambda e: type(e).__name__)
def test_adapter_when_checked_then_keeps_the_contract(estimator, check):
    regresses = any(estimator is e for e in REGRESSORS)
    (x, y), problem = (diabetes(), VALUE) if regresses else (digits(), TEN)
    rows = rows_of(x[:50], y[:50])
    env = env_of(rows, problem, public=rows_of(x[:50]))
    model = sklearn(estimator)
    assert isinstance(model, Model)
    check(Case(model, rows, env, lambda fitted, r: answers(fitted, r.x.astype(np.float64), problem)))


# ---------------------------------------------------------------- invariant 60: one round equals the pooled fit
BAYES = [
    GaussianNB(),
    GaussianNB(var_smoothing=1e-2, priors=[0.1] * 10),
    MultinomialNB(),
    MultinomialNB(alpha=20.0, fit_prior=False),
    BernoulliNB(binarize=0.4, alpha=5.0),
    ComplementNB(norm=True),
    ComplementNB(alpha=3.0),
]


@pytest.mark.parametrize("estimator", BAYES, ids=repr)
def test_naive_bayes_when_averaged_over_sites_then_equals_the_pooled_fit(estimator):
    x, y = digits()
    order = np.argsort(y[:400], kind="stable")  # sites that have never seen most classes
    assert pooled_gap(estimator, x[:400][order], y[:400][order], cut(400, (37, 3, 160, 199, 1)), TEN) < 1e-10


LEAST_SQUARES = [
    LinearRegression(),
    LinearRegression(fit_intercept=False),
    Ridge(),
    Ridge(alpha=30.0),
    Ridge(alpha=0.0),
    Ridge(alpha=3.0, fit_intercept=False, solver="svd"),
]


@pytest.mark.parametrize("estimator", LEAST_SQUARES, ids=repr)
@pytest.mark.parametrize("outputs", [1, 3])
def test_least_squares_when_averaged_over_sites_then_equals_the_pooled_fit(estimator, outputs):
    x, y = diabetes()
    y = y if outputs == 1 else np.stack([y, y**2, x[:, 0]], 1)
    assert pooled_gap(estimator, x, y, cut(442, (12, 130, 300)), Problem(None, outputs)) < 1e-10


def test_ridge_when_each_target_has_a_penalty_then_equals_the_pooled_fit():
    x, y = diabetes()
    estimator = Ridge(alpha=np.array([0.5, 50.0]))
    assert pooled_gap(estimator, x, np.stack([y, -y], 1), cut(442, (42, 400)), Problem(None, 2)) < 1e-10


@pytest.mark.parametrize("estimator", [MultinomialNB(alpha=20.0), Ridge(alpha=30.0)], ids=repr)
def test_pooled_fit_when_clients_are_counted_as_rows_then_is_missed(estimator, monkeypatch):
    """Mutant: 1/N read as the sum over places is the number of clients over N."""
    monkeypatch.setattr(sklearn_statistics, "num_rows", lambda state: float(1 / state["site"].sum()))
    (x, y), problem = (diabetes(), VALUE) if isinstance(estimator, Ridge) else (digits(), TEN)
    assert pooled_gap(estimator, x[:400], y[:400], cut(400, (100, 100, 200)), problem) > 1e-4


def test_number_of_rows_when_many_clients_share_places_then_is_found():
    x, y = diabetes()
    model, theta = averaged(Ridge(), x[:400], y[:400], cut(400, (4,) * 100), VALUE)
    assert model.kind == "Ridge"
    assert sklearn_statistics.num_rows(theta) == pytest.approx(400, rel=1e-12)


def test_number_of_rows_when_earlier_means_left_residues_then_ignores_them():
    assert sklearn_statistics.num_rows(Tree({"site": np.array([2 / 40, 1 / 40, 1e-18, -1e-18])})) == pytest.approx(40)
    assert sklearn_statistics.num_rows(Tree({"site": np.zeros(4)})) == 0


def test_class_when_no_site_has_it_then_stands_at_the_floor():
    x, y = digits()
    kept = y < 7
    model, theta = averaged(GaussianNB(), x[kept][:300], y[kept][:300], cut(300, (100, 200)), TEN)
    rows = rows_of(x[:20], y[:20])
    outputs = model.predict(Predict((theta,)), rows, env_of(rows))
    assert np.allclose(outputs[:, 7:], np.log(FLOOR), atol=1e-4)
    assert accuracy(outputs[y[:20] < 7], y[:20][y[:20] < 7]) > 0.7


def test_statistics_when_features_cannot_be_summed_then_say_so():
    bad = rows_of(np.array([[np.nan, 1.0]], np.float32), np.zeros(1, np.int64))
    with pytest.raises(DataError, match="GaussianNB cannot sum features that are missing"):
        sklearn(GaussianNB()).fit(Fit(), bad, env_of(bad, TWO))
    negative = rows_of(np.array([[-1.0, 1.0]], np.float32), np.zeros(1, np.int64))
    with pytest.raises(DataError, match="must not be negative"):
        sklearn(MultinomialNB()).fit(Fit(), negative, env_of(negative, TWO))


# ---------------------------------------------------------------- parameters
def test_logistic_when_alone_then_equals_scikit_learn():
    x, y = digits()
    rows = rows_of(x[:200], y[:200])
    model = sklearn(LogisticRegression(max_iter=500, tol=1e-8))
    fitted = model.export(trained(model, rows, env_of(rows)), rows, env_of(rows))
    plain = LogisticRegression(max_iter=500, tol=1e-8).fit(x[:200].astype(np.float64), y[:200])
    assert np.allclose(fitted.coef_, plain.coef_, atol=1e-6)
    assert (fitted.predict(x) == plain.predict(x)).all()


def test_logistic_when_started_from_its_optimum_then_takes_few_steps():
    x, y = digits()
    rows = rows_of(x[:200], y[:200])
    model = sklearn(LogisticRegression(max_iter=500))
    once = model.fit(Fit(), rows, env_of(rows))
    again = model.fit(Fit(start=(once.state,)), rows, env_of(rows))
    assert again.steps < once.steps / 4


def test_descent_when_order_is_replayed_then_equals_partial_fit():
    x, y = digits()
    rows, plain = rows_of(x[:100], y[:100]), SGDClassifier(shuffle=False)
    env = env_of(rows)
    state = trained(sklearn(SGDClassifier(), epochs=2, batch_size=30), rows, env)
    draw = env.rng("order")
    for _ in range(2):
        order = draw.permutation(100)
        plain.partial_fit(x[order].astype(np.float64), y[order], classes=np.arange(10))
    assert np.array_equal(state["coef"], plain.coef_)
    assert float(state["buffers:rows_seen"]) == plain.t_ == 201
    model = sklearn(SGDClassifier(), batch_size=30)
    assert model.fit(Fit(start=(state,)), rows, env).state["buffers:rows_seen"] == 301


@pytest.mark.parametrize("estimator", [SGDClassifier(), MLPClassifier((8,))], ids=lambda e: type(e).__name__)
def test_budget_of_steps_when_given_then_is_kept(estimator):
    x, y = digits()
    rows, model = rows_of(x[:70], y[:70]), sklearn(estimator, epochs=2)
    assert model.fit(Fit(), rows, env_of(rows)).steps == 6
    assert model.fit(Fit(epochs=1), rows, env_of(rows)).steps == 3
    assert model.fit(Fit(steps=5), rows, env_of(rows)).steps == 5
    first = model.first(rows, env_of(rows))
    assert model.fit(Fit(steps=0), rows, env_of(rows)).state == first


def test_layers_when_one_step_is_taken_then_move_by_the_gradient():
    """A fresh optimizer from the start's own layers: nothing of the setting-up leaks in."""
    x, y = diabetes()
    rows = rows_of(x[:16], y[:16])
    estimator = MLPRegressor(
        hidden_layer_sizes=(4,),
        solver="sgd",
        learning_rate_init=0.1,
        nesterovs_momentum=False,
        alpha=0.0,
        activation="tanh",
    )
    model, env = sklearn(estimator, batch_size=16), env_of(rows, VALUE)
    start = model.first(rows, env)
    state = model.fit(Fit(start=(start,)), rows, env).state
    z = np.tanh(x[:16].astype(np.float64) @ start["coefs/0"] + start["intercepts/0"])
    error = z @ start["coefs/1"] + start["intercepts/1"] - y[:16, None]
    assert np.allclose(state["coefs/1"], start["coefs/1"] - 0.1 * z.T @ error / 16, atol=1e-12)


def test_layers_when_first_drawn_then_lie_within_glorots_bound():
    x, y = digits()
    rows = rows_of(x[:5], y[:5])
    for activation, factor in (("relu", 6), ("logistic", 2)):
        first = sklearn(MLPClassifier((30,), activation=activation)).first(rows, env_of(rows))
        bound = np.sqrt(factor / (64 + 30))
        assert 0.98 * bound < np.abs(first["coefs/0"]).max() < bound


def test_federated_descent_when_sites_lack_classes_then_learns_all():
    x, y = digits()
    order = np.argsort(y[:600], kind="stable")
    parts = cut(600, (200, 200, 200))
    for estimator in (SGDClassifier(loss="log_loss"), LogisticRegression(max_iter=3), MLPClassifier((32,))):
        model, theta = averaged(_spread(estimator), x[:600][order], y[:600][order], parts, TEN, rounds=6)
        rows = rows_of(x[600:1000], y[600:1000])
        assert accuracy(model.predict(Predict((theta,)), rows, env_of(rows)), y[600:1000]) > 0.5


def _spread(estimator):
    """Networks learn little in six rounds of one epoch at scikit-learn's own rate."""
    return estimator.set_params(learning_rate_init=0.02) if isinstance(estimator, MLPClassifier) else estimator


@pytest.mark.parametrize(
    "estimator",
    [
        SGDClassifier(early_stopping=True),
        SGDClassifier(average=True),
        SGDClassifier(class_weight="balanced"),
        MLPClassifier(solver="lbfgs"),
        Ridge(positive=True),
        make_pipeline(StandardScaler(), LogisticRegression()),
        type("MyBayes", (GaussianNB,), {})(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_estimator_when_it_cannot_be_continued_then_takes_part_by_predictions(estimator):
    assert sklearn(estimator).offers == {"predict", "distill"}


def test_descent_of_several_values_when_asked_then_is_refused():
    rows = rows_of(np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32))
    with pytest.raises(UsageError, match="SGDRegressor predicts one value, the problem has 2"):
        sklearn(SGDRegressor()).first(rows, env_of(rows, Problem(None, 2)))


# ---------------------------------------------------------------- recipes
def test_recipe_when_fitted_then_is_a_few_numbers_of_constant_spec():
    x, y = digits()
    rows, public = rows_of(x[:40], y[:40]), rows_of(x[40:60])
    env, model = env_of(rows, public=public), sklearn(RandomForestClassifier(3))
    first = model.first(rows, env)
    own = trained(model, rows, env)
    digested = model.fit(_distil(own, public, np.full((20, 10), 0.1)), public, env).state
    assert list(first) == ["buffers:seed", "buffers:soft_weight", "buffers:soft"]
    assert first.spec == own.spec == digested.spec
    assert first["buffers:soft"].shape == (20, 10)
    assert own["buffers:seed"] == digested["buffers:seed"] == env.integer("estimator")
    assert trained(model, rows, replace(env, number=1))["buffers:seed"] != own["buffers:seed"]
    kept = model.fit(Fit(start=(digested,)), rows, replace(env, number=1)).state
    assert np.array_equal(kept["buffers:soft"], digested["buffers:soft"])
    assert kept["buffers:soft_weight"] == digested["buffers:soft_weight"] == 1.0


def _distil(start, rows, teacher, weight=1.0, temperature=1.0):
    return Fit((start,), (Distill(temperature, weight),), targets={"teacher": teacher}, rows=rows)


def test_untrained_recipe_when_asked_then_finds_all_classes_equally_likely():
    x, y = digits()
    rows, model = rows_of(x[:5], y[:5]), sklearn(RandomForestClassifier(3))
    assert np.allclose(model.predict(Predict(), rows, env_of(rows)), np.log(0.1))
    with pytest.raises(UsageError, match="never trained"):
        model.export(model.first(rows, env_of(rows)), rows, env_of(rows))
    rows, model = rows_of(x[:5], np.ones(5, np.float32)), sklearn(RandomForestRegressor(3))
    assert (model.predict(Predict(), rows, env_of(rows, VALUE)) == 0).all()


FRESH = """
import json, sys
import numpy as np
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from polyfed.core.algorithm import Env, Predict
from polyfed.core.rows import Problem, Rows
from polyfed.core.tree import Tree
from polyfed.models.sklearn import sklearn
x, y, public, state = (np.asarray(a) for a in json.load(sys.stdin).values())
x, public = x.astype(np.float32), public.astype(np.float32)
rows, soft = Rows({"x": x}, y), state
env = Env(seed=7, problem=Problem(tuple(str(k) for k in range(10)), 10), client="west", train=rows, public=Rows({"x": public}))
tree = Tree({"buffers:seed": np.int64(SEED), "buffers:soft_weight": np.float64(1.0), "buffers:soft": soft})
print(sklearn(RandomForestClassifier(20)).predict(Predict((tree,)), rows, env).tobytes().hex())
"""


def test_recipe_when_refitted_in_a_fresh_process_then_predicts_the_same():
    x, y = digits()
    rows, public = rows_of(x[:60], y[:60]), rows_of(x[60:90])
    env, model = env_of(rows, public=public), sklearn(RandomForestClassifier(20, n_jobs=2, random_state=3))
    state = model.fit(_distil(trained(model, rows, env), public, _one_hot(y[60:90])), public, env).state
    here = model.predict(Predict((state,)), rows, env).tobytes().hex()
    given = {"x": x[:60], "y": y[:60], "public": x[60:90], "soft": state["buffers:soft"]}
    there = subprocess.run(
        [sys.executable, "-c", FRESH.replace("SEED", str(int(state["buffers:seed"])))],
        input=json.dumps({name: array.tolist() for name, array in given.items()}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here


def _one_hot(y, sure=0.9):
    p = np.full((len(y), 10), (1 - sure) / 9)
    p[np.arange(len(y)), y] = sure
    return p


def test_recipe_when_shared_by_clients_then_keeps_them_apart():
    x, y = digits()
    one, two = rows_of(x[:40], y[:40]), rows_of(x[40:80], y[40:80])
    model = sklearn(RandomForestClassifier(5))
    state = trained(model, one, env_of(one))
    first = model.predict(Predict((state,), rows=one), one, env_of(one))
    other = model.predict(Predict((state,), rows=one), one, env_of(two))
    assert not np.array_equal(first, other)
    assert np.array_equal(first, model.predict(Predict((state,), rows=one), one, env_of(one)))


@pytest.mark.parametrize(
    "weak",
    [
        RandomForestClassifier(30),
        HistGradientBoostingClassifier(max_iter=8, min_samples_leaf=5),
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=50)),
        KNeighborsClassifier(3),
        LogisticRegression(max_iter=50),
        GaussianNB(var_smoothing=1e-2),
        SGDClassifier(loss="log_loss"),
        MLPClassifier((32,), learning_rate_init=0.01),
    ],
    ids=lambda e: type(e).__name__,
)
def test_distillation_when_the_teacher_knows_more_then_raises_accuracy(weak):
    x, y = digits()
    rows, public, test = rows_of(x[:30], y[:30]), rows_of(x[100:400]), rows_of(x[800:1300])
    env, model = env_of(rows, public=public), sklearn(weak, epochs=10)
    temperature = 2.0
    teacher = _one_hot(y[100:400]) ** (1 / temperature)
    teacher /= teacher.sum(1, keepdims=True)
    alone = trained(model, rows, env)
    state = model.fit(_distil(alone, public, teacher, temperature=temperature), public, env).state
    before, after = (accuracy(model.predict(Predict((s,), rows=test), test, env), y[800:1300]) for s in (alone, state))
    assert after > before + 0.1, (before, after)
    again = model.fit(_distil(alone, public, teacher, temperature=temperature), public, env).state
    assert again == state


def test_distillation_of_values_when_given_then_is_followed():
    x, y = diabetes()
    rows, public = rows_of(x[:15], y[:15]), rows_of(x[100:400])
    env = env_of(rows, VALUE, public=public)
    for estimator in (RandomForestRegressor(30), Ridge(0.1), MLPRegressor(hidden_layer_sizes=(16,))):
        model = sklearn(estimator, epochs=20)
        alone = trained(model, rows, env)
        asked = Fit((alone,), (Match(),), targets={"teacher": y[100:400]}, rows=public)
        state = model.fit(asked, public, env).state
        gaps = [
            float(((model.predict(Predict((s,), rows=public), public, env)[:, 0] - y[100:400]) ** 2).mean())
            for s in (alone, state)
        ]
        assert gaps[1] < gaps[0]


def test_soft_labels_when_repeated_over_rounds_then_do_not_drift_to_uniform():
    """A model that learns its own softened answers again and again keeps them: labels are taken back to temperature 1."""
    x, y = digits()
    rows, public = rows_of(x[:80], y[:80]), rows_of(x[100:200])
    env, model, temperature = env_of(rows, public=public), sklearn(RandomForestClassifier(30)), 3.0
    state, sure = trained(model, rows, env), []
    for _ in range(4):
        p = np.exp(model.predict(Predict((state,), rows=public), public, env) / temperature)
        p /= p.sum(1, keepdims=True)
        state = model.fit(_distil(state, public, p, temperature=temperature), public, env).state
        sure.append(float(p.max(1).mean()))
    assert sure[-1] > sure[0] - 0.02, sure


def test_soft_copies_when_made_then_weigh_a_row_as_stated():
    soft = Soft(rows_of(np.array([[1.0], [2.0], [3.0]])), np.array([[0.5, 0.5], [0.99, 0.01], [0.0, 1.0]]), 0.5)
    batch = softened(soft, TWO, 0.02)
    assert batch.x[:, 0].tolist() == [1, 1, 2, 3]
    assert batch.y.tolist() == [0, 1, 0, 1]
    assert batch.weight.tolist() == [0.25, 0.25, 0.5, 0.5]
    hard = softened(soft, TWO, 0.02, weighted=False)
    assert (hard.y.tolist(), hard.weight.tolist()) == ([0, 0, 1], [1, 1, 1])
    assert len(softened(replace(soft, answers=np.full((3, 2), 0.01)), TWO, 0.02)) == 0


@pytest.mark.parametrize("estimator", [RandomForestClassifier(4), GaussianNB(), SGDClassifier()], ids=repr)
def test_term_when_it_needs_gradients_then_is_refused_by_name(estimator):
    x, y = digits()
    rows, model = rows_of(x[:20], y[:20]), sklearn(estimator)
    with pytest.raises(UsageError, match=f"{model.kind} has no gradients and cannot follow the loss term Near"):
        model.fit(Fit(terms=(Own(), Near(0.1))), rows, env_of(rows))
    with pytest.raises(UsageError, match="it cannot train base alone"):
        model.fit(Fit(part=("base",)), rows, env_of(rows))
    with pytest.raises(UsageError, match="has no features"):
        model.predict(Predict(what="features"), rows, env_of(rows))


def test_recipe_when_given_rows_it_could_not_find_again_then_refuses():
    x, y = digits()
    rows, public = rows_of(x[:20], y[:20]), rows_of(x[20:30])
    model, env = sklearn(RandomForestClassifier(4)), env_of(rows, public=public)
    other = rows_of(x[30:50], y[30:50])
    with pytest.raises(UsageError, match="it cannot train on others"):
        model.fit(Fit(rows=other), other, env)
    state = trained(model, rows, env)
    with pytest.raises(UsageError, match="for the public rows alone: got 20 other rows, not those 10"):
        model.fit(_distil(state, other, _one_hot(y[30:50])), other, env)
    digested = model.fit(_distil(state, public, _one_hot(y[20:30])), public, env).state
    with pytest.raises(DataError, match="public rows of this state's soft labels are not here"):
        model.export(digested, rows, replace(env, public=other))
    same_length = rows_of(x[30:40])
    with pytest.raises(UsageError, match="for the public rows alone: got 10 other rows"):
        model.fit(_distil(state, same_length, _one_hot(y[30:40])), same_length, env)
    with pytest.raises(UsageError, match="soft labels have 2 columns, wanted 10"):
        model.fit(_distil(state, public, np.ones((10, 2))), public, env)


# ---------------------------------------------------------------- seeds, clones, threads
def test_estimator_when_wrapped_then_is_never_changed():
    x, y = digits()
    rows, estimator = rows_of(x[:60], y[:60]), RandomForestClassifier(4, n_jobs=2)
    model = sklearn(estimator)
    fitted = model.export(trained(model, rows, env_of(rows)), rows, env_of(rows))
    assert not hasattr(estimator, "estimators_")
    assert estimator.random_state is None
    assert model.estimator.random_state is None
    assert fitted.n_jobs == 2


def test_nested_seeds_when_set_then_all_follow_the_task():
    x, y = digits()
    rows = rows_of(x[:120], y[:120])
    nested = StackingClassifier(
        [("bag", make_pipeline(StandardScaler(), BaggingClassifier(DecisionTreeClassifier(max_features=4), 3)))],
        RandomForestClassifier(3),
        cv=KFold(3, shuffle=True),
    )
    model = sklearn(nested)
    one, two = (model.export(trained(model, rows, env), rows, env) for env in (env_of(rows), env_of(rows, number=1)))
    names = [name for name in one.get_params() if name.endswith("random_state")]
    assert len(names) == len({one.get_params()[name] for name in names}) == 3
    assert one.cv.random_state != two.cv.random_state
    assert all(one.get_params()[name] != two.get_params()[name] for name in names)
    assert nested.cv.random_state is None
    same = sklearn(nested)
    states = [trained(m, rows, env_of(rows)) for m in (model, same)]
    outputs = [m.predict(Predict((s,)), rows, env_of(rows)) for m, s in zip((model, same), states, strict=True)]
    assert np.array_equal(*outputs)


class Jitter(TransformerMixin, BaseEstimator):
    """A user's transformer that draws from the global generator."""

    def fit(self, x, y=None):
        self.shift_ = np.random.random(x.shape[1])  # noqa: NPY002  # the global generator is the subject
        return self

    def transform(self, x):
        return x + self.shift_


def test_global_generator_when_a_users_step_draws_from_it_then_is_seeded_and_put_back():
    x, y = digits()
    rows = rows_of(x[:60], y[:60])
    np.random.seed(5)  # noqa: NPY002  # the global generator is the subject
    expected = np.random.random(3)  # noqa: NPY002  # the global generator is the subject
    shifts = []
    for _ in range(2):
        np.random.seed(5)  # noqa: NPY002  # the global generator is the subject
        model = sklearn(make_pipeline(Jitter(), DecisionTreeClassifier()))
        state = trained(model, rows, env_of(rows))
        shifts.append(model.export(state, rows, env_of(rows))[0].shift_)
        assert np.array_equal(np.random.random(3), expected)  # noqa: NPY002  # the global generator is the subject
    assert np.array_equal(*shifts)


def test_key_when_hyper_parameters_differ_then_differs():
    same = sklearn(LogisticRegression(C=2, random_state=1)).key, sklearn(LogisticRegression(C=2, random_state=2)).key
    assert same[0] == same[1] != sklearn(LogisticRegression(C=3)).key
    assert sklearn(Ridge(1.0), key="ours").key == sklearn(Ridge(2.0), key="ours").key
    assert sklearn(LogisticRegression(C=2)).settings == {"C": 2}
    assert sklearn(SGDClassifier(alpha=0.1), epochs=3).settings == {"epochs": 3, "batch_size": 32, "alpha": 0.1}


# ---------------------------------------------------------------- odd data
@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=lambda e: type(e).__name__)
def test_single_class_when_it_is_all_a_client_has_then_is_predicted(estimator):
    x, _ = digits()
    rows = rows_of(x[:20], np.full(20, 3))
    model, env = sklearn(estimator, epochs=100), env_of(rows)
    state = trained(model, rows, env)
    outputs = model.predict(Predict((state,)), rows, env)
    assert (outputs.argmax(1) == 3).mean() > 0.8
    assert np.isfinite(outputs).all()
    assert set(model.export(state, rows, env).predict(x[:20].astype(np.float64))) <= set(range(10))


@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=lambda e: type(e).__name__)
def test_missing_classes_when_others_have_them_then_stand_below_those_seen(estimator):
    x, y = digits()
    seen = y[:120] % 2 == 1
    rows = rows_of(x[:120][seen], y[:120][seen])
    model, env = sklearn(estimator, epochs=30), env_of(rows)
    outputs = model.predict(Predict((trained(model, rows, env),)), rows, env)
    assert np.isin(outputs.argmax(1), [1, 3, 5, 7, 9]).mean() > 0.95
    assert np.allclose(np.exp(outputs.astype(np.float64)).sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=lambda e: type(e).__name__)
def test_no_rows_when_training_then_is_a_sentence(estimator):
    rows = rows_of(np.zeros((0, 64), np.float32), np.zeros(0, np.int64))
    with pytest.raises(DataError, match="no training rows"):
        sklearn(estimator).fit(Fit(), rows, env_of(rows))


def test_estimator_when_of_another_kind_than_the_problem_then_is_refused():
    x, y = digits()
    rows = rows_of(x[:20], y[:20])
    with pytest.raises(UsageError, match="Ridge predicts values, the problem asks for classes"):
        sklearn(Ridge()).first(rows, env_of(rows))
    with pytest.raises(UsageError, match="GaussianNB predicts classes, the problem asks for values"):
        sklearn(GaussianNB()).first(rows, env_of(rows, VALUE))
    with pytest.raises(
        UsageError, match=r"neither a classifier nor a regressor.* StandardScaler, SimpleImputer, PCA can"
    ):
        sklearn(MinMaxScaler())
    with pytest.raises(UsageError, match=r"takes a scikit-learn estimator such as RandomForestClassifier\(\)"):
        sklearn(RandomForestClassifier)
    with pytest.raises(UsageError, match="count from 1, got 0"):
        sklearn(SGDClassifier(), epochs=0)
    with pytest.raises(UsageError, match="soft_copies is in"):
        sklearn(SGDClassifier(), soft_copies=1.0)
    wild = rows_of(x[:20], y[:20] + 5)
    with pytest.raises(DataError, match="class numbers run from 5 to 14, wanted 0 to 9"):
        sklearn(GaussianNB()).fit(Fit(), wild, env_of(wild))


def test_fitted_estimator_when_given_then_is_warned_of_and_fitted_anew():
    x, y = digits()
    with pytest.warns(UserWarning, match="GaussianNB is fitted already"):
        model = sklearn(GaussianNB().fit(x, y))
    assert not hasattr(model.estimator, "theta_")


def test_images_when_given_then_are_flattened():
    x, y = digits()
    flat, square = rows_of(x[:50], y[:50]), rows_of(x[:50].reshape(50, 8, 8), y[:50])
    states = [trained(sklearn(GaussianNB()), rows, env_of(rows)) for rows in (flat, square)]
    assert states[0] == states[1]


def test_decision_function_when_there_are_no_probabilities_then_is_used():
    x, y = digits()
    rows = rows_of(x[:100], y[:100] % 2)
    for estimator in (
        SVC(),
        make_pipeline(SVC(decision_function_shape="ovo")),
        GridSearchCV(SVC(), {"C": [1, 9]}, cv=2),
    ):
        model, env = sklearn(estimator), env_of(rows, TWO)
        outputs = model.predict(Predict((trained(model, rows, env),)), rows, env)
        assert accuracy(outputs, rows.target) > 0.9
    ovo = sklearn(SVC(decision_function_shape="ovo"))
    rows = rows_of(x[:100], y[:100])
    outputs = ovo.predict(Predict((trained(ovo, rows, env_of(rows)),)), rows, env_of(rows))
    assert accuracy(outputs, y[:100]) > 0.9


# ---------------------------------------------------------------- the user's own object, and files
@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=lambda e: type(e).__name__)
def test_export_when_classes_have_names_then_predicts_them(estimator):
    x, y = digits()
    kept = y[:200] < 2
    rows = rows_of(x[:200][kept], y[:200][kept])
    model, env = sklearn(estimator, epochs=5), env_of(rows, TWO)
    state = trained(model, rows, env)
    fitted, names = model.export(state, rows, env), np.array(TWO.classes)
    expected = names[model.predict(Predict((state,)), rows, env).argmax(1)]
    assert (fitted.predict(rows.x.astype(np.float64)) == expected).mean() > 0.97
    assert set(fitted.classes_) == set(TWO.classes)


FILED = [
    RandomForestClassifier(5),
    GradientBoostingClassifier(n_estimators=2),
    HistGradientBoostingClassifier(max_iter=2),
    LogisticRegression(max_iter=10),
    GaussianNB(),
    MLPClassifier((4,)),
    make_pipeline(StandardScaler(), SVC()),
    CalibratedClassifierCV(GaussianNB(), cv=2),
    KNeighborsClassifier(algorithm="brute"),
]


@pytest.mark.parametrize("estimator", FILED, ids=lambda e: type(e).__name__)
def test_file_when_read_back_then_predicts_the_same(estimator, tmp_path):
    x, y = digits()
    rows = rows_of(x[:150], y[:150])
    model = sklearn(estimator)
    fitted = model.export(trained(model, rows, env_of(rows)), rows, env_of(rows))
    to_file(fitted, tmp_path / "model.skops")
    again = from_file(tmp_path / "model.skops")
    assert type(again) is type(fitted)
    assert np.array_equal(again.predict(x.astype(np.float64)), fitted.predict(x.astype(np.float64)))


class Foreign(ClassifierMixin, BaseEstimator):
    pass


def test_file_when_it_holds_foreign_types_then_is_refused_both_ways(tmp_path):
    with pytest.raises(UsageError, match=r"cannot be saved: it holds .*Foreign, which cannot be loaded safely"):
        to_file(Foreign(), tmp_path / "model.skops")
    import skops.io

    skops.io.dump(make_pipeline(FunctionTransformer(json.dumps), Foreign()), tmp_path / "evil.skops")
    with pytest.raises(UsageError, match=r"evil.skops is not loaded: it holds json"):
        from_file(tmp_path / "evil.skops")
    x, y = digits()
    with pytest.raises(UsageError, match='give it algorithm="brute"'):
        to_file(KNeighborsClassifier().fit(x[:20, 20:23], y[:20]), tmp_path / "model.skops")


def test_file_when_damaged_then_is_a_sentence(tmp_path):
    to_file(GaussianNB().fit(*digits()), tmp_path / "model.skops")
    data = (tmp_path / "model.skops").read_bytes()
    for name, bad in (
        ("cut", data[: len(data) // 2]),
        ("flipped", data[:60] + b"\xff" * 40 + data[100:]),
        ("none", b""),
    ):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(CorruptError, match="cannot be read as an estimator"):
            from_file(tmp_path / name)


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("left_child", 0, "nodes"),
        ("right_child", 10**9, "nodes"),
        ("feature", 99, "features"),
        ("feature", -7, "features"),
    ],
)
def test_file_when_its_trees_lead_astray_then_is_refused(column, value, complaint, tmp_path):
    """Compiled code follows these numbers without a look: outside the array it reads foreign memory, in a circle for ever."""
    x, y = digits()
    forest = RandomForestClassifier(2, random_state=0).fit(x[:80], y[:80])
    for member in (forest, DecisionTreeRegressor(random_state=0).fit(x[:80], y[:80])):
        tree = (member.estimators_[1] if member is forest else member).tree_
        state = tree.__getstate__()
        state["nodes"][column][0] = value
        tree.__setstate__(state)
        if member is forest:
            forest.estimators_[1].n_features_in_ = 1000  # a forest does not ask its trees
        to_file(member, tmp_path / "model.skops")
        with pytest.raises(CorruptError, match=f"{complaint} that are not there"):
            from_file(tmp_path / "model.skops")
    boosted = HistGradientBoostingClassifier(max_iter=1).fit(x[:80], y[:80])
    renamed = {"left_child": "left", "right_child": "right", "feature": "feature_idx"}[column]
    boosted._predictors[0][0].nodes[renamed][0] = value
    to_file(boosted, tmp_path / "model.skops")
    with pytest.raises(CorruptError, match=f"{complaint} that are not there"):
        from_file(tmp_path / "model.skops")


def test_constant_client_when_exported_then_is_an_ordinary_estimator(tmp_path):
    x, _ = digits()
    rows = rows_of(x[:10], np.zeros(10, np.int64))
    model = sklearn(SVC())
    fitted = model.export(trained(model, rows, env_of(rows, TWO)), rows, env_of(rows, TWO))
    assert isinstance(fitted, DummyClassifier)
    assert fitted.predict(x[:2]).tolist() == ["sick", "sick"]
    to_file(fitted, tmp_path / "model.skops")
    assert from_file(tmp_path / "model.skops").predict(x[:1]).tolist() == ["sick"]


def test_model_when_pickled_for_a_worker_then_works_the_same():
    import cloudpickle

    x, y = digits()
    rows, model = rows_of(x[:50], y[:50]), sklearn(RandomForestClassifier(4))
    state = trained(model, rows, env_of(rows))
    there = cloudpickle.loads(cloudpickle.dumps(model))
    assert isinstance(there, SklearnModel)
    assert np.array_equal(
        there.predict(Predict((state,)), rows, env_of(rows)), model.predict(Predict((state,)), rows, env_of(rows))
    )
    assert there.key == model.key


def test_training_when_it_stops_at_its_budget_then_does_not_warn():
    x, y = digits()
    rows = rows_of(x[:80], y[:80])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(trained(sklearn(LogisticRegression(max_iter=1)), rows, env_of(rows)), Tree)


def test_soft_labels_when_softened_by_a_temperature_then_are_taken_back_to_one():
    p = np.array([[0.7, 0.2, 0.1]])
    soft = np.sqrt(p) / np.sqrt(p).sum()
    assert np.allclose(Distill(temperature=2.0).soft_labels({"teacher": soft}), p, atol=1e-12)
