"""The package against the papers' pseudocode, several rounds, to rounding."""

import numpy as np
import oracles
import pytest
from numpy_model import CLASSES, VALUES, NumpyModel, sites_of

from polyfed.algorithms import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedMD, FedProx, FedYogi
from polyfed.core.checks_algorithm import play, server_env

LR, EPOCHS, ROUNDS = 0.3, 3, 5
LINEAR = NumpyModel(hidden=0, lr=LR, epochs=EPOCHS)


def start_and_clients(problem=CLASSES):
    sites = sites_of(LINEAR, problem)
    start = {name: np.array(a) for name, a in server_env(sites, 0).first["all"].items()}
    hot = (lambda y: np.eye(3)[y]) if problem.is_classification else (lambda y: y.astype(float))
    return sites, start, [(site.train.x.astype(float), hot(site.train.target)) for site in sites.values()]


def assert_close(tree, wanted, tolerance=1e-12):
    assert list(tree) == list(wanted)
    for name in wanted:
        np.testing.assert_allclose(tree[name], wanted[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("mu", [0.0, 0.7])
@pytest.mark.parametrize("weighting", ["num_examples", "uniform"])
@pytest.mark.parametrize("problem", [CLASSES, VALUES])
def test_fedavg_and_fedprox_when_run_equal_the_pseudocode(mu, weighting, problem):
    sites, start, clients = start_and_clients(problem)
    kind = "classes" if problem.is_classification else "values"
    uniform = weighting == "uniform"
    wanted = oracles.fedavg(start, clients, ROUNDS, epochs=EPOCHS, lr=LR, mu=mu, kind=kind, uniform=uniform)
    algorithm = FedProx(mu=mu, weighting=weighting) if mu else FedAvg(weighting=weighting)
    assert_close(play(algorithm, sites, rounds=ROUNDS).state.trees["params"], wanted)


SERVER = {
    "momentum": (FedAvgM(lr=0.7, beta=0.6), {"lr": 0.7, "beta1": 0.6, "beta2": 0.0, "tau": 0.0}),
    "adagrad": (FedAdagrad(lr=0.2, beta1=0.3, tau=0.01), {"lr": 0.2, "beta1": 0.3, "beta2": 0.0, "tau": 0.01}),
    "adam": (FedAdam(lr=0.2, beta1=0.8, beta2=0.95), {"lr": 0.2, "beta1": 0.8, "beta2": 0.95, "tau": 1e-3}),
    "yogi": (FedYogi(lr=0.2, beta1=0.8, beta2=0.95), {"lr": 0.2, "beta1": 0.8, "beta2": 0.95, "tau": 1e-3}),
}


@pytest.mark.parametrize("which", SERVER)
def test_server_optimizer_when_run_equals_the_pseudocode(which):
    sites, start, clients = start_and_clients()
    algorithm, settings = SERVER[which]
    wanted = oracles.fedopt(start, clients, ROUNDS, epochs=EPOCHS, client_lr=LR, which=which, **settings)
    assert_close(play(algorithm, sites, rounds=ROUNDS).state.trees["params"], wanted, 1e-11)


@pytest.mark.parametrize("order", ["last", "paper"])
@pytest.mark.parametrize(("average", "problem"), [("probabilities", CLASSES), ("logits", CLASSES), ("logits", VALUES)])
def test_fedmd_when_run_equals_the_pseudocode(order, average, problem):
    sites, start, clients = start_and_clients(problem)
    public = next(iter(sites.values())).public
    kind = "classes" if problem.is_classification else "values"
    options = {"epochs": EPOCHS, "digest": 2, "lr": LR, "t": 2.5 if problem.is_classification else 1.0}
    wanted, consensus = oracles.fedmd(
        [start] * 3,
        clients,
        public.x.astype(float),
        ROUNDS,
        order=order,
        logits=average == "logits",
        kind=kind,
        **options,
    )
    algorithm = FedMD(public, temperature=2.5, digest=2, order=order, average=average)
    played = play(algorithm, sites, rounds=ROUNDS)
    for name, model in zip(sites, wanted, strict=True):
        assert_close(played.memories[name].trees["own"], model, 1e-6)  # predictions travel as float32
    said = played.state.trees["soft"]["public"]
    teacher = algorithm.teacher(said, problem)
    np.testing.assert_allclose(teacher, consensus, rtol=1e-5, atol=1e-6)
