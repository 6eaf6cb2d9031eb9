"""FedAvg's own choices: where it starts, what it shares, what it says."""

from dataclasses import replace

import numpy as np
import pytest
from numpy_model import NumpyModel, sites_of

from polyfed.algorithms import FedAvg
from polyfed.core.checks_algorithm import client_env, play, server_env, work
from polyfed.core.errors import SpecError, UsageError
from polyfed.core.message import Message
from polyfed.core.tree import Tree


def test_start_when_groups_share_an_equal_part_is_the_first_groups():
    sites = sites_of({"north": NumpyModel(3), "south": NumpyModel(3, lr=0.1), "west": NumpyModel(3)})
    assert len(server_env(sites, 0).first) == 1
    first = {
        "a": Tree({"base.w": np.ones(2), "head.w": np.ones(3)}),
        "b": Tree({"base.w": np.zeros(2), "head.w": np.ones(5)}),
    }
    env = replace(server_env(sites, 0), first=first)
    assert FedAvg(shared="base").init(env).trees["params"]["base.w"].tolist() == [1.0, 1.0]


def test_start_when_groups_differ_names_both_and_what_to_do():
    first = {"cnn": Tree({"w": np.ones(2)}), "mlp": Tree({"w": np.ones(3)})}
    env = replace(server_env(sites_of(), 0), first=first)
    with pytest.raises(
        SpecError, match=r"cannot average mlp with cnn: w is float64\[3\], expected float64\[2\].*shared="
    ):
        FedAvg().init(env)


def test_start_when_statistics_of_groups_differ_is_refused():
    def state(n):
        return Tree({"w": np.ones(2), "stats:bn/mean": np.ones(n), "stats:bn/variance": np.ones(n)})

    env = replace(server_env(sites_of(), 0), first={"a": state(2), "b": state(3)})
    with pytest.raises(SpecError, match="stats:bn/mean"):
        FedAvg().init(env)


def test_start_when_nobody_has_parameters_says_so():
    env = replace(server_env(sites_of(), 0), first={})
    with pytest.raises(UsageError, match="no model to start from"):
        FedAvg().init(env)


def test_shared_when_it_names_nothing_lists_what_there_is():
    with pytest.raises(UsageError, match=r"shared=\('bse',\) names no parameter of all; it has base, head"):
        FedAvg(shared="bse").init(server_env(sites_of(), 0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shared": ""}, "empty prefix"),
        ({"shared": ("base", "")}, "empty prefix"),
        ({"weighting": "rows"}, "num_examples"),
        ({"model": object(), "initial": object()}, "give one"),
    ],
)
def test_option_when_wrong_says_what_to_write(options, words):
    with pytest.raises(UsageError, match=words):
        FedAvg(**options)


def test_shared_when_a_text_or_a_list_is_a_tuple():
    assert FedAvg(shared="base") == FedAvg(shared=("base",)) == FedAvg(shared=["base"])
    assert FedAvg(model=object()) == FedAvg(), "what stays at this machine is no part of the value"


def test_upload_when_made_says_rows_steps_and_loss():
    sites = sites_of(NumpyModel(epochs=3))
    algorithm, env = FedAvg(), server_env(sites, 0, 1)
    _, upload, memory = work(algorithm, sites["south"], play(algorithm, sites, rounds=0), env)
    assert upload.numbers["num_examples"] == 7.0
    assert upload.numbers["steps"] == 3.0
    assert 0 < upload.numbers["loss"] < 5
    assert memory.trees == {}


def test_upload_when_the_model_reports_no_loss_has_none():
    site = sites_of()["north"]
    algorithm, env = FedAvg(), client_env(site, 0, 1)
    message = algorithm.broadcast(algorithm.init(server_env(sites_of(), 0)), "north", env)
    steps = algorithm.client_update(message, Message(), env)
    request = next(steps)
    fitted = replace(site.model.fit(request, site.train, env), metrics={})
    with pytest.raises(StopIteration) as end:
        steps.send(fitted)
    assert set(end.value.value[0].numbers) == {"num_examples", "steps"}


def test_state_when_shared_in_part_holds_that_part_alone_and_others_differ_freely():
    sites = sites_of({"north": NumpyModel(4), "south": NumpyModel(4), "west": NumpyModel(4, dtype="float64")})
    played = play(FedAvg(shared="head"), sites, rounds=2)
    assert set(played.state.trees["params"]) == {"head.w", "head.b"}
    assert set(played.memories["west"].trees["own"]) == {"base.w", "base.b"}


def test_learning_when_run_lowers_the_loss():
    sites = sites_of(NumpyModel(epochs=5))
    losses = [play(FedAvg(), sites, rounds=n).uploads["west"].numbers["loss"] for n in (1, 4, 12)]
    assert losses[0] > losses[1] > losses[2]
