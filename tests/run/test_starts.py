"""`start=` and `initial=`: which of what a run left lies over what, and whose group's parameters are taken."""

import numpy as np
import pytest
from torch import nn

import polyfed as pf
from polyfed.core.errors import SpecError

PERSONAL = [pf.Ditto(0.5), pf.APFL(0.6), pf.PFedMe(lam=2.0, lr=0.2, steps=2, local_rounds=2)]


def rows(seed):
    x = np.random.default_rng(seed).normal(size=(30, 4)).astype(np.float32)
    return x, (x[:, 0] > x[:, 1]).astype(np.int64)


def net(width=3):
    return pf.torch(
        lambda: nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2)), lr=0.2, batch_size=8
    )


def client(name, model=None, **more):
    return pf.Client(name, model or net(), data=rows(len(name)), **more)


def run(clients, algorithm, rounds=2, **more):
    return pf.simulate(algorithm, clients, rounds=rounds, seed=4, baselines=(), test=False, evaluate_every=0, **more)


def begun(given, name, model=None):
    (site,) = run([client(name, model, start=given)], pf.Local(), rounds=1).population.sites.values()
    return site.begins.trees["own"]


@pytest.mark.parametrize("algorithm", PERSONAL, ids=lambda a: a.name)
def test_start_when_a_client_had_a_personal_model_is_that_and_for_others_the_shared_one(algorithm, tmp_path):
    result = run([client("north"), client("south-west")], algorithm)
    shared = result.state.trees["params"]
    for given in (result, pf.load(result.save(tmp_path / "run"))):
        assert begun(given, "north") == result.state_of("north")
        assert begun(given, "north").only(shared) != shared
        assert begun(given, "east").only(shared) == shared


def test_start_when_what_a_client_once_had_is_old_takes_the_newest_shared_part():
    old = run([client("north"), client("south-west")], pf.FedAvg(), rounds=1)
    members = [client("north"), client("south-west"), client("east", start=old, joins_at=9)]
    new = run(members, pf.FedAvg(), rounds=3)
    stale, shared = new.memories["east"].trees["own"], new.state.trees["params"]
    assert stale.only(shared) == old.state.trees["params"] != shared
    assert begun(new, "east").only(shared) == shared


def two_groups():
    public = rows(99)[0]
    narrow, wide = net(), net(5)
    members = [client("north", narrow), client("south-west", wide), client("far", wide)]
    return run(members, pf.FedDF(public, epochs=1))


def test_start_when_each_group_has_parameters_is_that_of_the_group_that_fits(tmp_path):
    result = two_groups()
    narrow, wide = result.population.groups["north"], result.population.groups["far"]
    for given in (result, pf.load(result.save(tmp_path / "run"))):
        for name, width, group in (("east", 3, narrow), ("east", 5, wide), ("far", 5, wide)):
            own = begun(given, name, net(width))
            assert own.part("params") == result.state.trees[f"params:{group}"]
            assert own.part("stats") == result.state.trees[f"stats:{group}"]
    with pytest.raises(SpecError, match=r"east: what start= shares does not fit its model"):
        begun(result, "east", net(7))


def test_initial_when_each_group_has_parameters_is_that_of_the_group_that_fits():
    result = two_groups()
    wide = result.population.groups["far"]
    for round_ in pf.rounds(pf.FedAvg(initial=result), [client("east", net(5))], rounds=1):
        assert round_.state.trees["params"] == result.state.trees[f"params:{wide}"]
    with pytest.raises(SpecError, match="the state to start from does not fit"):
        run([client("east", net(7))], pf.FedAvg(initial=result))
