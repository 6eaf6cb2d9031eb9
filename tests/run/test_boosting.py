"""LightGBM, XGBoost and a forest in one federation."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier

import polyfed as pf

lightgbm = pytest.importorskip("lightgbm")
xgboost = pytest.importorskip("xgboost")


def federation(**given):
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    models = {
        "light": lightgbm.LGBMClassifier(n_estimators=8, min_child_samples=3, num_leaves=7),
        "extreme": xgboost.XGBClassifier(n_estimators=8, max_depth=3),
        "forest": RandomForestClassifier(20),
    }
    kept = {name: np.flatnonzero((y != at) & (np.arange(len(y)) % 9 == at)) for at, name in enumerate(models)}
    clients = [
        pf.Client(name, pf.sklearn(model), data=(x[kept[name]], y[kept[name]]), split=pf.Split(test=0.5))
        for name, model in models.items()
    ]
    return pf.simulate(pf.FedMD(public=x[3::9]), clients, rounds=2, seed=0, baselines=(), **given)


def test_federation_when_saved_then_every_model_predicts_the_same_again(tmp_path):
    result = federation()
    assert min(metrics["accuracy"] for metrics in result.test.values()) > 0.6
    result.save(tmp_path / "run")
    saved, x = pf.load(tmp_path / "run"), load_digits().data / 16
    assert saved.notes == ()
    for name, model in result.models.items():
        assert np.array_equal(saved.models[name].predict(x), model.predict(x))
    assert len(result.models["extreme"].classes_) == 10  # the class that its site has never seen came from the others


@pytest.mark.heavy
def test_federation_when_in_worker_processes_then_has_the_same_bits():
    assert federation(executor="processes", workers=2).state.digest == federation().state.digest
