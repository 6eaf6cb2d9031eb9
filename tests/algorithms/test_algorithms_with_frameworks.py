"""Algorithms over the real adapters: averaging of torch models with normalisation, distillation between frameworks."""

import numpy as np
import pytest
from numpy_model import VALUES, sites_of
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression
from torch import nn

from polyfed.algorithms import FedAdam, FedAvg, FedMD, FedProx
from polyfed.core.checks_algorithm import check_algorithm, play
from polyfed.models.sklearn import sklearn
from polyfed.models.torch import torch


def base():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU())


def net(outputs=3):
    return lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, outputs))


def normalised():
    return sites_of(torch(shared=base, personal=lambda: nn.Linear(6, 3), batch_size=4, lr=0.05))


def different():
    forest = RandomForestClassifier(n_estimators=5, max_depth=3)
    return sites_of(
        {"north": torch(net(), batch_size=4), "south": sklearn(LogisticRegression()), "west": sklearn(forest)}
    )


def regressors():
    forest = RandomForestRegressor(n_estimators=5, max_depth=3)
    return sites_of({"north": torch(net(2)), "south": torch(net(2), optimizer="adam"), "west": sklearn(forest)}, VALUES)


AVERAGING = [FedAvg(), FedAvg(shared="shared"), FedProx(mu=0.3), FedAdam(lr=0.03)]
DISTILLING = [FedMD(range(9)), FedMD(range(9), order="paper", average="logits")]


@pytest.mark.parametrize("algorithm", AVERAGING, ids=repr)
def test_averaging_when_torch_models_normalise_keeps_the_contract(algorithm):
    check_algorithm(algorithm, normalised, rounds=2)


@pytest.mark.parametrize("algorithm", DISTILLING, ids=repr)
@pytest.mark.parametrize("make", [different, regressors])
def test_distillation_when_frameworks_differ_keeps_the_contract(algorithm, make):
    check_algorithm(algorithm, make, rounds=2)


def test_fedprox_when_mu_is_zero_is_fedavg_bit_for_bit_in_torch():
    one, two = play(FedProx(mu=0.0), normalised(), rounds=3), play(FedAvg(), normalised(), rounds=3)
    assert one.digest == two.digest


def test_counter_when_the_layer_is_shared_goes_on_in_memory_alone():
    played = play(FedAvg(), normalised(), rounds=2)
    for name, steps in {"north": 6, "south": 4, "west": 10}.items():
        own = played.memories[name].trees["own"]
        assert [int(count) for entry, count in own.items() if "count" in entry or "tracked" in entry] == [steps]
    assert (played.state.trees["stats"].flat != 0).all()


def test_optimizer_when_kept_goes_on_in_memory_and_changes_the_run():
    def momentum(keep):
        return sites_of(torch(net(), optimizer="adam", lr=0.01, keep_optimizer=keep))

    fresh, kept = (play(FedAvg(), momentum(keep), rounds=3) for keep in (False, True))
    assert not fresh.memories["north"].trees
    assert kept.memories["north"].trees["own"]
    assert set(kept.state.trees["params"]) == set(fresh.state.trees["params"])
    assert not np.array_equal(kept.state.trees["params"].flat, fresh.state.trees["params"].flat)
