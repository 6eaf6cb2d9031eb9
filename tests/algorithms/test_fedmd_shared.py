"""A base that some clients share by averaging, while others join the same rounds through predictions alone."""

from dataclasses import replace

import numpy as np
import pytest
from numpy_model import NumpyModel, sites_of
from sklearn.ensemble import RandomForestClassifier
from torch import nn

from polyfed.algorithms import FedAvg, FedMD
from polyfed.core.checks_algorithm import addressed, check_algorithm, play, server_env
from polyfed.core.errors import SpecError, UsageError
from polyfed.models.sklearn import sklearn
from polyfed.models.torch import torch

PUBLIC = range(9)
SHARING = ("north", "south")


def mixed():
    """North and south have a base of one shape; west is linear, and has none."""
    return sites_of({"north": NumpyModel(3), "south": NumpyModel(3, lr=0.1), "west": NumpyModel(0)})


def frameworks():
    """Two nets whose bases are equal and whose heads are not, and a forest."""
    base = lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU())  # noqa: E731  # a factory
    deep = lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))  # noqa: E731  # a factory
    one = torch(shared=base, personal=lambda: nn.Linear(6, 3), batch_size=4)
    two = torch(shared=base, personal=deep, batch_size=4)
    return sites_of({"north": one, "south": two, "west": sklearn(RandomForestClassifier(5, max_depth=3))})


@pytest.mark.parametrize(("make", "shared"), [(mixed, "base"), (frameworks, "shared")])
def test_contract_when_some_share_a_base_holds(make, shared):
    check_algorithm(FedMD(PUBLIC, shared=shared, digest=2), make, rounds=2)


def test_base_when_nobody_digests_is_that_of_fedavg_among_those_who_have_it():
    together = play(FedMD(PUBLIC, shared="base", digest=0), mixed(), rounds=3)
    those = play(FedAvg(shared="base"), {name: mixed()[name] for name in SHARING}, rounds=3)
    assert together.state.trees["params"].digest == those.state.trees["params"].digest
    for name in SHARING:
        assert together.memories[name].trees["own"].digest == those.memories[name].trees["own"].digest


def test_base_when_one_client_has_it_makes_the_run_that_it_would_be_without_sharing():
    """What is averaged is the base after the digest: the model of a lone sharer is FedMD's own."""
    sites = sites_of({"north": NumpyModel(3), "south": NumpyModel(0), "west": NumpyModel(0)})
    alone, shared = play(FedMD(PUBLIC, digest=3), sites, rounds=4), FedMD(PUBLIC, digest=3, shared="base")
    played = play(shared, sites, rounds=4)
    base, own = played.state.trees["params"], played.memories["north"].trees["own"]
    assert set(base) == {"base.w", "base.b"}
    assert set(own) == {"head.w", "head.b"}
    for name, array in alone.memories["north"].trees["own"].items():
        np.testing.assert_allclose({**base, **own}[name], array, rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(
        played.state.trees["soft"]["public"], alone.state.trees["soft"]["public"], rtol=1e-5, atol=1e-7
    )


def test_messages_when_made_differ_by_who_has_the_base():
    algorithm, sites = FedMD(PUBLIC, shared="base"), mixed()
    played, env = play(algorithm, sites, rounds=1), server_env(sites, 0, 2)
    sent = {
        name: set(algorithm.broadcast(played.state, name, addressed(env, site)).trees) for name, site in sites.items()
    }
    assert sent == {"north": {"params", "soft"}, "south": {"params", "soft"}, "west": {"soft"}}
    assert {name: set(upload.trees) for name, upload in played.uploads.items()} == sent
    assert set(played.memories["west"].trees["own"]) == {"head.w", "head.b"}


def test_weights_when_predictions_are_uniform_leave_the_base_weighted_by_rows():
    played, sites = play(FedMD(PUBLIC, shared="base", digest=0), mixed(), rounds=1), mixed()
    start = play(FedMD(PUBLIC, shared="base"), sites, rounds=0).state.trees["params"]
    steps = [played.uploads[name].trees["params"] for name in SHARING]
    sizes = [len(sites[name].train) for name in SHARING]
    wanted = start["base.w"] + np.average([step["base.w"] for step in steps], axis=0, weights=sizes)
    np.testing.assert_allclose(played.state.trees["params"]["base.w"], wanted, rtol=1e-6)
    said = [upload.trees["soft"]["public"] for upload in played.uploads.values()]
    np.testing.assert_allclose(played.state.trees["soft"]["public"], np.mean(said, axis=0), rtol=1e-6)


def test_round_when_nobody_who_shares_takes_part_leaves_the_base():
    algorithm = FedMD(PUBLIC, shared="base")
    before = play(algorithm, mixed(), rounds=1)
    after = play(algorithm, mixed(), rounds=1, cohort=lambda _: ["west"], after=before)
    assert after.state.trees["params"].digest == before.state.trees["params"].digest
    assert after.state.trees["soft"].digest != before.state.trees["soft"].digest


def test_client_when_it_freezes_the_base_does_not_hold_it_back():
    sites = mixed()
    sites["south"] = replace(sites["south"], trains=("head.w", "head.b"), frozen=("base",))
    algorithm = FedMD(PUBLIC, shared="base", digest=0)
    frozen = play(algorithm, sites, rounds=1).state.trees["params"]
    north = play(algorithm, {"north": sites["north"]}, rounds=1).state.trees["params"]
    np.testing.assert_allclose(frozen["base.w"], north["base.w"], rtol=1e-12)


def test_shared_when_nobody_has_it_names_what_there_is():
    with pytest.raises(UsageError, match="names no parameter of group 0; it has base, head"):
        play(FedMD(PUBLIC, shared="encoder"), mixed(), rounds=1)
    with pytest.raises(UsageError, match="empty prefix"):
        FedMD(shared=("base", ""))


def test_shared_when_it_differs_between_groups_names_both():
    sites = sites_of({"north": NumpyModel(3), "south": NumpyModel(6), "west": NumpyModel(0)})
    with pytest.raises(SpecError, match=r"^FedMD cannot average group 1 with group 0: base\.w") as told:
        play(FedMD(PUBLIC, shared="base"), sites, rounds=1)
    assert "FedMD, which needs" not in str(told.value)
    assert str(told.value).endswith("equal in all who have it, or leave shared= out")
    with pytest.raises(SpecError, match=r"^FedAvg cannot average .* or use FedMD, which needs no equal models$"):
        play(FedAvg(shared="base"), sites, rounds=1)
    with pytest.raises(UsageError, match=r"^FedMD: 'neck' in shared=\('base', 'neck'\) names no entry"):
        play(FedMD(PUBLIC, shared=("base", "neck")), mixed(), rounds=1)
