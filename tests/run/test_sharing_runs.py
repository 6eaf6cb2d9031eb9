"""Runs whose models are shared in part, or personal beside a shared one: who may take part, who is away, what is frozen."""

import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.neural_network import MLPClassifier

import polyfed as pf
from polyfed.core.errors import NeedsError, UsageError
from polyfed.run.serve import Server

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
from numpy_model import NumpyModel, rows_of
from test_serve_join import SECONDS, Thread

NAMES = ("north", "south", "west")
ALGORITHMS = {
    "FedBN": lambda: pf.FedBN(),
    "FedRep": lambda: pf.FedRep(shared="shared", head_epochs=2),
    "FedBABU": lambda: pf.FedBABU(shared="shared", fine_tune=2),
    "Ditto": lambda: pf.Ditto(0.5),
    "APFL": lambda: pf.APFL(0.5, adaptive=True),
    "PFedMe": lambda: pf.PFedMe(lam=2.0, lr=0.2, steps=2, local_rounds=3),
}


def normalised():
    from torch import nn

    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU())


def model():
    from torch import nn

    return pf.torch(shared=normalised, personal=lambda: nn.Linear(6, 3), batch_size=8, lr=0.1)


def client(name, made=None, **more):
    rows = rows_of(30, stream=name)
    return pf.Client(name, made or model(), (rows.x, rows.target), split=pf.Split(0.2, 0.2), **more)


def run(algorithm, rounds=3, **more):
    members = [client(name, **more.get(name, {})) for name in NAMES]
    return pf.simulate(ALGORITHMS[algorithm](), members, rounds=rounds, seed=1, baselines=())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_forest_when_it_would_take_part_is_refused_in_a_sentence(algorithm):
    with pytest.raises(NeedsError, match=r"west \(RandomForestClassifier\).*" + algorithm):
        run(algorithm, west={"made": pf.sklearn(RandomForestClassifier(3))})


@pytest.mark.parametrize("algorithm", ["FedRep", "FedBABU", "Ditto"])
def test_perceptron_of_scikit_learn_when_parts_or_terms_are_needed_is_refused(algorithm):
    with pytest.raises(NeedsError, match=r"west \(MLPClassifier\)"):
        run(algorithm, west={"made": pf.sklearn(MLPClassifier((4,), solver="sgd"))})


def test_optimizer_when_alpha_adapts_must_take_plain_steps():
    from torch import nn

    adam = pf.torch(shared=normalised, personal=lambda: nn.Linear(6, 3), optimizer="adam")
    with pytest.raises(NeedsError, match="west"):
        run("APFL", west={"made": adam})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_client_when_it_is_away_finds_its_memory_as_it_was(algorithm):
    before, after = run(algorithm, 1), run(algorithm, 2, south={"away": (2,)})
    assert after.memories["south"].digest == before.memories["south"].digest
    assert after.memories["south"].trees["own"]
    returned = run(algorithm, 3, south={"away": (2,)}).memories["south"]
    assert returned.digest != before.memories["south"].digest


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_newcomer_when_it_joins_is_served(algorithm):
    result = run(algorithm, 3, west={"joins_at": 3})
    assert [log.cohort for log in result.history] == [NAMES[:2]] * 2 + [NAMES]
    assert set(result.test) == set(NAMES) and "west" in result.memories


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_part_when_a_client_freezes_it_never_moves(algorithm):
    loop = pf.rounds(ALGORITHMS[algorithm](), [client("north"), client("west", freeze="shared.0")], rounds=2, seed=1)
    for round_ in loop:
        for reply in round_.train(round_.send()):
            if reply.task.client == "west":
                moved = reply.message.trees["params"]
                assert not any(moved[name].any() for name in moved.under(["shared.0"])), "a frozen layer moved"
                assert any(moved[name].any() for name in moved)
            round_.collect(reply)
        round_.update()


def test_statistics_when_a_client_freezes_another_layer_go_on_and_are_sent():
    loop = pf.rounds(pf.FedAvg(), [client("north"), client("west", freeze="personal")], rounds=1, seed=1)
    for round_ in loop:
        for reply in round_.train(round_.send()):
            assert reply.message.trees["stats"]["stats:shared.1/mean"].any(), reply.task.client
            assert int(reply.memory.trees["own"]["buffers:shared.1.num_batches_tracked"]) == 3
            round_.collect(reply)
        round_.update()


def test_head_when_a_client_freezes_all_of_it_is_refused_with_what_is_asked():
    result = run("FedRep", 1, west={"freeze": "personal"})
    assert "asked to train !shared, all of which it keeps frozen" in str(result.errors["west"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_model_when_the_run_has_ended_is_the_one_that_was_evaluated(algorithm):
    import torch

    result = run(algorithm)
    for name in NAMES:
        held = result.population.sites[name].test
        with torch.no_grad():
            said = result.models[name](torch.tensor(np.array(held.x))).argmax(1).numpy()
        assert np.mean(said == held.target) == pytest.approx(result.test[name]["accuracy"])


def test_shared_model_when_methods_have_one_is_given_and_else_refused():
    for algorithm in ("FedBABU", "Ditto", "APFL", "PFedMe"):
        result = run(algorithm, 1)
        exported = result.model.state_dict()["shared.0.weight"].numpy()
        assert np.array_equal(exported, result.state.trees["params"]["shared.0.weight"])
        assert "shared/accuracy" in result.test["north"]
    for algorithm in ("FedBN", "FedRep"):
        with pytest.raises(UsageError, match="stays with each client"):
            run(algorithm, 1).model  # noqa: B018  # raises


@pytest.mark.parametrize("algorithm", ["FedBABU", "Ditto"])
def test_model_when_joined_over_the_network_is_personalised_as_in_simulation(algorithm):
    made = pf.FedBABU(shared="base") if algorithm == "FedBABU" else pf.Ditto(0.5)
    agreed = {"consents": "personal"} if algorithm == "FedBABU" else {}  # its one head is some client's first one
    with Server(made, clients=NAMES, rounds=3, seed=1) as server:
        threads = {name: Thread(server.url, client(name, NumpyModel(statistics=True), **agreed)) for name in NAMES}
        outcomes = {name: thread.outcome() for name, thread in threads.items()}
        server.result(SECONDS)
    members = [client(name, NumpyModel(statistics=True)) for name in NAMES]
    simulation = pf.simulate(made, members, rounds=3, seed=1, baselines=())
    for name, outcome in outcomes.items():
        assert outcome.state.digest == simulation.state_of(name).digest
