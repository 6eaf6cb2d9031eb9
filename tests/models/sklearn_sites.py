"""Rows, sites and the mean over them, for the tests of the scikit-learn adapter."""

from functools import cache

import numpy as np
from sklearn.datasets import load_diabetes, load_digits

from polyfed.core.algorithm import Env, Fit
from polyfed.core.rows import Problem, Rows
from polyfed.models.sklearn import sklearn

TEN = Problem(tuple(str(k) for k in range(10)), 10)
TWO = Problem(("sick", "healthy"), 2)  # not in alphabetical order
VALUE = Problem(None, 1)


@cache
def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.Generator(np.random.Philox(1)).permutation(len(x))
    return (x[order] / 16).astype(np.float32), y[order].astype(np.int64)


@cache
def diabetes():
    x, y = load_diabetes(return_X_y=True)
    return (x * 10).astype(np.float32), (y / 100).astype(np.float32)


def rows_of(x, y=None):
    return Rows({"x": x}, y)


def env_of(rows, problem=TEN, client="west", public=None, number=0):
    return Env(seed=7, problem=problem, client=client, train=rows, public=public, number=number)


def trained(model, rows, env):
    return model.fit(Fit(), rows, env).state


def accuracy(outputs, y):
    return float((outputs.argmax(1) == y).mean())


def cut(n, sizes):
    ends = np.cumsum(sizes)
    assert ends[-1] == n
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def averaged(estimator, x, y, parts, problem, rounds=2):
    """FedAvg's own formula over states: θ + Σ pᵢ (sᵢ − θ), from the clients' first state on."""
    model, theta = sklearn(estimator), None
    for number in range(rounds):
        total, sites = sum(p.stop - p.start for p in parts), []
        for at, part in enumerate(parts):
            rows = rows_of(x[part], y[part])
            env = env_of(rows, problem, client=f"site {at}", number=number)
            theta = model.first(rows, env) if theta is None else theta
            state = model.fit(Fit(start=(theta,)), rows, env).state
            sites.append((state - theta) * ((part.stop - part.start) / total))
        theta = sum(sites[1:], sites[0]) + theta
    return model, theta


def pooled_gap(estimator, x, y, parts, problem, rounds=2):
    """Largest relative difference between what federated and pooled fit say of all rows."""
    model, theta = averaged(estimator, x, y, parts, problem, rounds)
    env = env_of(rows_of(x[parts[0]], y[parts[0]]), problem)
    federated = model.export(theta, env.train, env)
    pooled = type(estimator)(**estimator.get_params()).fit(x.astype(np.float64), y)
    if not problem.is_classification:
        return np.abs(federated.predict(x) - pooled.predict(x.astype(np.float64))).max()
    said = "decision_function" if hasattr(pooled, "decision_function") else "predict_joint_log_proba"
    got, expected = (getattr(fitted, said)(x.astype(np.float64)) for fitted in (federated, pooled))
    assert np.array_equal(federated.classes_, pooled.classes_)
    return (np.abs(got - expected) / np.maximum(1, np.abs(expected))).max()
