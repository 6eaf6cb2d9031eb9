"""Algorithms over the real adapters: averaging of torch models with normalisation, distillation between frameworks."""

from dataclasses import replace

import numpy as np
import pytest
from numpy_model import VALUES, sites_of
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression
from torch import nn

from polyfed.algorithms import APFL, Ditto, FedAdam, FedAvg, FedBABU, FedBN, FedMD, FedProx, FedRep, Local, PFedMe
from polyfed.core.checks_algorithm import check_algorithm, client_env, play, server_env
from polyfed.core.message import Message
from polyfed.core.work import evaluate
from polyfed.models.keras import keras as pf_keras
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
PERSONAL = [
    FedBN(),
    FedRep(shared="shared", head_epochs=2),
    FedBABU(shared="!personal", fine_tune=2),
    Ditto(0.5),
    APFL(0.5),
    PFedMe(lam=2.0, lr=0.2, steps=2, local_rounds=4),
]
DISTILLING = [FedMD(range(9)), FedMD(range(9), order="paper", average="logits")]


@pytest.mark.parametrize("algorithm", AVERAGING + PERSONAL, ids=repr)
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


# ---------------------------------------------------------------- personal models


def keras_normalised():
    import keras

    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((5,)),
        keras.layers.Dense(6, name="shared"),
        keras.layers.BatchNormalization(name="shared_norm"),
    ]
    return keras.Sequential([*layers, keras.layers.ReLU(), keras.layers.Dense(3, name="personal")])


FRAMEWORKS = {
    "torch": lambda: sites_of(torch(shared=base, personal=lambda: nn.Linear(6, 3), batch_size=4, lr=0.05, epochs=3)),
    "keras": lambda: sites_of(pf_keras(keras_normalised, batch_size=4, lr=0.05, epochs=3)),
}
#: What a base is called by each framework.
BASE = {"torch": ("shared",), "keras": ("shared", "shared_norm")}


def losses(algorithm, sites, rounds):
    """Loss on the training rows of every client's own model."""
    played, found = play(algorithm, sites, rounds=rounds), {}
    for name, site in sites.items():
        env = client_env(site, 0, rounds + 1)
        sent = algorithm.broadcast(played.state, name, server_env(sites, 0))
        memory = played.memories.get(name, Message())
        found[name] = evaluate(algorithm, sent, memory, site, env, site.train).numbers["loss"]
    return found


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("algorithm", PERSONAL, ids=lambda algorithm: algorithm.name)
def test_personal_model_when_trained_is_better_than_its_start(algorithm, framework):
    algorithm = replace(algorithm, shared=BASE[framework]) if algorithm.shared else algorithm
    sites = FRAMEWORKS[framework]()
    before, after = (losses(algorithm, sites, rounds) for rounds in (0, 4))
    if isinstance(algorithm, FedBABU):  # the start is tuned too
        before = losses(FedAvg(), sites, 0)
    assert all(after[name] < 0.9 * before[name] for name in sites), (before, after)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_fedbn_when_layers_normalise_keeps_them_private_in_both_frameworks(framework):
    played = play(FedBN(), FRAMEWORKS[framework](), rounds=2)
    norm = {"torch": ("shared.1",), "keras": ("shared_norm",)}[framework]
    assert set(played.state.trees) == {"params"} and not played.state.trees["params"].under(norm)
    for memory in played.memories.values():
        own = memory.trees["own"]
        assert len(own.under(norm).part("params")) == len(own.part("stats")) == 2
        assert not np.array_equal(own.part("stats").flat, played.memories["north"].trees["own"].part("stats").flat) or (
            memory is played.memories["north"]
        )


def test_lg_fedavg_when_bases_are_of_two_kinds_shares_one_head():
    def wide():
        return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 6), nn.BatchNorm1d(6))

    def deep_keras():
        import keras

        return keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.Dense(8, "relu"),
                keras.layers.Dense(6, "relu"),
                keras.layers.Dense(3, name="head"),
            ]
        )

    def head():
        return nn.Linear(6, 3)

    models = {
        "north": torch(shared=base, personal=head, batch_size=4),
        "south": torch(shared=wide, personal=head, batch_size=4),
    }
    sites = sites_of(models, sizes={"north": 12, "south": 7})
    played = play(FedAvg(shared="personal"), sites, rounds=3)
    assert set(played.state.trees["params"]) == {"personal.weight", "personal.bias"}
    assert played.memories["south"].trees["own"]["shared.0.weight"].shape == (9, 5)
    assert all(
        losses(FedAvg(shared="personal"), sites, 3)[name] < loss for name, loss in losses(Local(), sites, 0).items()
    )
    alike = {"north": pf_keras(deep_keras), "south": pf_keras(lambda: keras_headed())}
    played = play(FedAvg(shared="head"), sites_of(alike, sizes={"north": 12, "south": 7}), rounds=2)
    assert set(played.state.trees["params"]) == {"head/kernel", "head/bias"}


def keras_headed():
    import keras

    layers = [keras.Input((5,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(3, name="head")]
    return keras.Sequential(layers)


@pytest.mark.parametrize("algorithm", [Ditto(0.5), APFL(0.5)], ids=repr)
def test_buffers_when_models_are_personal_go_on_by_themselves(algorithm):
    adam = sites_of(torch(net(), optimizer="adam", lr=0.01, keep_optimizer=True))
    played = play(algorithm, adam, rounds=2)
    memory = played.memories["north"].trees
    slots = memory["own"].part("buffers")
    assert slots.spec == memory["kept"].spec and slots != memory["kept"], "both models have one optimizer"
    if isinstance(algorithm, Ditto):
        assert play(FedAvg(), adam, rounds=2).memories["north"].trees["own"] == memory["kept"]
