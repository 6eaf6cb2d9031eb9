"""The package against the papers' pseudocode, several rounds, to rounding."""

import numpy as np
import oracles
import pytest
from numpy_model import CLASSES, VALUES, NumpyModel, sites_of

from polyfed.algorithms import (
    APFL,
    Ditto,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBABU,
    FedMD,
    FedProx,
    FedRep,
    FedYogi,
    PFedMe,
)
from polyfed.core.checks_algorithm import client_env, play, server_env
from polyfed.core.message import Message
from polyfed.core.work import personal

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


def models_of(algorithm, sites, played):
    """Client -> the parameters by which it predicts."""
    found = {}
    for name, site in sites.items():
        env = client_env(site, 0, played.round_num + 1)
        sent = algorithm.broadcast(played.state, name, server_env(sites, 0))
        start = personal(algorithm, sent, played.memories.get(name, Message()), site, env)
        found[name] = site.model.state_of(start, site.train, env)
    return found


def assert_personal(algorithm, sites, wanted, own, rounds=ROUNDS):
    played = play(algorithm, sites, rounds=rounds)
    assert_close(played.state.trees["params"], wanted)
    for name, model in zip(sites, own, strict=True):
        assert_close(models_of(algorithm, sites, played)[name], model)
    return played


def test_fedrep_when_run_equals_the_pseudocode():
    sites, start, clients = start_and_clients()
    base, heads = oracles.fedrep(start, clients, ROUNDS, head_epochs=4, base_epochs=2, lr=LR)
    algorithm = FedRep(shared="head.w", head_epochs=4, base_epochs=2)
    own = [{"head.w": base, "head.b": head} for head in heads]
    played = assert_personal(algorithm, sites, {"head.w": base}, own)
    assert played.uploads["south"].numbers["steps"] == 6.0


def test_fedbabu_when_run_equals_the_pseudocode():
    sites, start, clients = start_and_clients()
    wanted, own = oracles.fedbabu(start, clients, ROUNDS, epochs=EPOCHS, fine_tune=4, lr=LR)
    assert_personal(FedBABU(shared="head.w", fine_tune=4), sites, {"head.w": wanted["head.w"]}, own)


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_ditto_when_run_equals_the_pseudocode(lam):
    sites, start, clients = start_and_clients()
    wanted, own = oracles.ditto(start, clients, ROUNDS, epochs=EPOCHS, lr=LR, lam=lam)
    assert_personal(Ditto(lam), sites, wanted, own)


@pytest.mark.parametrize(("alpha", "adaptive"), [(0.3, False), (0.0, False), (1.0, False), (0.5, True)])
def test_apfl_when_run_equals_the_pseudocode(alpha, adaptive):
    sites, start, clients = start_and_clients()
    settings = {"epochs": EPOCHS, "lr": LR, "alpha": alpha, "adaptive": adaptive}
    wanted, own, shares = oracles.apfl(start, clients, ROUNDS, **settings)
    played = assert_personal(APFL(alpha, adaptive=adaptive), sites, wanted, own)
    if adaptive:
        found = [played.memories[name].numbers["alpha"] for name in sites]
        np.testing.assert_allclose(found, shares, rtol=1e-9)
        assert len(set(shares)) == 3 and min(shares) > 0.0 and max(shares) < 1.0


@pytest.mark.parametrize("beta", [1.0, 1.6])
def test_pfedme_when_run_equals_the_pseudocode(beta):
    sites, start, clients = start_and_clients()
    settings = {"lr": 0.2, "lam": 1.5, "steps": 3, "local_rounds": 4, "beta": beta}
    wanted, own = oracles.pfedme(start, clients, ROUNDS, inner_lr=LR, **settings)
    played = assert_personal(PFedMe(**settings), sites, wanted, own)
    assert played.uploads["south"].numbers["steps"] == 12.0
