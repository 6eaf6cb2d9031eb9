"""Forests, boosting and trees as students: what soft labels give them that they do not have alone."""

import numpy as np
import pytest
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    ExtraTreesClassifier,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    VotingClassifier,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from sklearn_sites import accuracy, digits, env_of, rows_of, trained

from polyfed.core.algorithm import Fit, Predict
from polyfed.core.terms import Distill
from polyfed.models.sklearn import sklearn
from polyfed.models.sklearn_recipe import takes_weights

WEIGHTED = [
    RandomForestClassifier(40),
    ExtraTreesClassifier(40),
    DecisionTreeClassifier(),
    HistGradientBoostingClassifier(max_iter=5, min_samples_leaf=5),
    BaggingClassifier(n_estimators=10),
    AdaBoostClassifier(DecisionTreeClassifier(max_depth=5), n_estimators=10),
    SVC(),
    make_pipeline(StandardScaler(), RandomForestClassifier(20)),
]
UNWEIGHTED = [
    KNeighborsClassifier(3),
    make_pipeline(StandardScaler(), KNeighborsClassifier(3)),
    VotingClassifier([("forest", RandomForestClassifier(10)), ("neighbours", KNeighborsClassifier(3))], voting="soft"),
]


def sites(seed, public):
    """30 labelled rows, public ones, 500 test rows; and a forest of 300 other rows as the teacher of the public ones."""
    x, y = digits()
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(x))
    x, y = x[order], y[order]
    teacher = RandomForestClassifier(60, random_state=seed).fit(x[500:800], y[500:800])
    soft = teacher.predict_proba(x[100 : 100 + public])
    return rows_of(x[:30], y[:30]), rows_of(x[100 : 100 + public]), rows_of(x[800:1300], y[800:1300]), soft


def taught(estimator, seed=0, public=200):
    """Accuracy alone, after the teacher's soft labels, and after its most likely classes alone."""
    rows, public_rows, test, soft = sites(seed, public)
    env, model = env_of(rows, public=public_rows), sklearn(estimator)
    alone = trained(model, rows, env)
    states = [alone]
    for teacher in (soft, np.eye(10)[soft.argmax(1)]):
        asked = Fit((alone,), (Distill(),), targets={"teacher": teacher}, rows=public_rows)
        states.append(model.fit(asked, public_rows, env).state)
    return [accuracy(model.predict(Predict((state,)), test, env), test.target) for state in states]


@pytest.mark.parametrize("estimator", WEIGHTED, ids=lambda e: type(e).__name__)
def test_student_when_it_takes_weights_then_gains_from_soft_labels(estimator):
    assert takes_weights(estimator)
    alone, soft, _ = taught(estimator)
    assert soft > alone + 0.15


@pytest.mark.parametrize("estimator", UNWEIGHTED, ids=lambda e: type(e).__name__)
def test_student_when_it_takes_no_weights_then_follows_the_most_likely_class(estimator):
    assert not takes_weights(estimator)
    alone, soft, hard = taught(estimator)
    assert soft == hard > alone + 0.15


def test_boosting_when_public_rows_are_few_then_learns_more_from_soft_labels_than_from_hard_ones():
    pairs = np.array([taught(GradientBoostingClassifier(n_estimators=8), seed, public=100)[1:] for seed in range(3)])
    assert (pairs[:, 0] - pairs[:, 1]).mean() > 0.02, pairs
