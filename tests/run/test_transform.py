"""A transformer fitted by a whole federation, and used as everybody's preprocessing."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_diabetes
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

import polyfed as pf
from polyfed.core.errors import ClientError, DataError, UsageError
from polyfed.data.split import Parts

SIZES = {"north": 61, "south": 141, "west": 240}


def table(offset=0.0):
    x, y = load_diabetes(return_X_y=True)
    frame = pd.DataFrame(x * 10 + offset, columns=[f"c{at}" for at in range(10)])
    frame["y"] = y / 100
    return frame


def clients_of(frame, **given):
    at, clients = 0, []
    for name, size in SIZES.items():
        own = frame.iloc[at : at + size].reset_index(drop=True)
        clients.append(pf.Client(name, pf.sklearn(LinearRegression()), data=own, target="y", **given))
        at += size
    return clients


def training_rows(clients, seed):
    from polyfed import data

    raws = {client.name: client.read() for client in clients}
    parts = {client.name: data.divide(client.name, raws[client.name], client.split, seed=seed) for client in clients}
    return pd.concat([raw.take(parts[name].train).inputs["x"] for name, raw in raws.items()])


def gap(one, other):
    return float(np.nanmax(np.abs(one - other)))


def test_scaler_when_fitted_together_then_equals_the_fit_on_all_training_rows():
    clients = clients_of(table(offset=1e5))  # a float32 would keep three digits of these
    rows = training_rows(clients, seed=4)
    made = pf.federated_transform(StandardScaler(), clients, seed=4)
    pooled = StandardScaler().fit(rows)
    assert gap(made.scale_, pooled.scale_) < 1e-10
    assert gap(made.transform(rows), pooled.transform(rows)) < 1e-9  # 1e5 itself has no more digits
    assert list(made.feature_names_in_) == list(pooled.feature_names_in_)


def test_test_rows_when_they_are_moved_then_change_nothing():
    frame = table()
    there = Parts(train=np.arange(50), validation=np.arange(50, 55), test=np.arange(55, 61))
    one = pf.federated_transform(StandardScaler(), clients_of(frame, split=there))
    frame.iloc[55:61, :10] = 1e6
    assert np.array_equal(one.mean_, pf.federated_transform(StandardScaler(), clients_of(frame, split=there)).mean_)


def test_pipeline_when_fitted_together_then_equals_the_pooled_pipeline():
    frame = table()
    frame.iloc[::9, 2] = np.nan
    clients = clients_of(frame)
    steps = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler(), PCA(4))
    made = pf.federated_transform(steps, clients)
    rows = training_rows(clients, seed=0)
    pooled = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler(), PCA(4)).fit(rows)
    assert gap(made.transform(frame.drop(columns="y")), pooled.transform(frame.drop(columns="y"))) < 1e-10


def test_result_when_it_is_everybodys_preprocess_then_is_not_fitted_again():
    clients = clients_of(table(offset=50.0))
    scaler = pf.federated_transform(StandardScaler(), clients, seed=1)
    prepared = [replace(client, preprocess=scaler) for client in clients]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of clients that preprocess differently
        result = pf.simulate(pf.FedAvg(), prepared, rounds=3, seed=1, baselines=())
    rows = pd.DataFrame(scaler.transform(training_rows(clients, seed=1)).astype(np.float32))
    target = np.concatenate([result.population.sites[name].train.target for name in SIZES])
    pooled = LinearRegression().fit(rows.to_numpy(np.float64), target)
    for model in result.models.values():
        assert gap(model.coef_, pooled.coef_) < 1e-9
    assert result.population.prepared["north"].fitted["x"] is scaler


def test_scaler_when_run_as_a_model_then_is_averaged_like_any():
    result = pf.simulate(
        pf.FedAvg(),
        [replace(client, model=pf.sklearn(StandardScaler())) for client in clients_of(table())],
        rounds=1,
        evaluate_every=0,
        test=False,
        baselines=(),
    )
    rows = training_rows(result.population.clients.values(), seed=0).to_numpy(np.float32).astype(np.float64)
    assert gap(result.models["west"].var_, StandardScaler().fit(rows).var_) < 1e-10


def test_mistake_when_made_then_names_the_client():
    frame = table()
    with pytest.raises(UsageError, match="LinearRegression is no transformer"):
        pf.federated_transform(LinearRegression(), clients_of(frame))
    with pytest.raises(UsageError, match="MinMaxScaler is neither"):
        pf.federated_transform(MinMaxScaler(), clients_of(frame))
    one, two, three = clients_of(frame)
    with pytest.raises(DataError, match="south: has 9 columns, north has 10"):
        pf.federated_transform(StandardScaler(), [one, replace(two, data=two.data.drop(columns="c3")), three])
    with pytest.raises(DataError, match="south: column 'c33' is not at north"):
        pf.federated_transform(StandardScaler(), [one, replace(two, data=two.data.rename(columns={"c3": "c33"}))])
    with pytest.raises(DataError, match="south: a column holds no numbers"):
        pf.federated_transform(StandardScaler(), [one, replace(two, data=two.data.assign(c3="high"))])
    gappy = three.data.copy()
    gappy.iloc[:, 1] = np.nan
    with pytest.raises(ClientError, match=r"west.*PCA cannot sum features that are missing"):
        pf.federated_transform(PCA(), [one, two, replace(three, data=gappy)])
    with pytest.raises(UsageError, match="at least one client"):
        pf.federated_transform(StandardScaler(), [])
