"""What is shared and what is each client's own: FedBN, FedRep, FedBABU, and LG-FedAvg, which is FedAvg(shared="head")."""

from dataclasses import replace

import numpy as np
import pytest
from numpy_model import NumpyModel, sites_of

from polyfed.algorithms import FedAvg, FedBABU, FedBN, FedRep
from polyfed.core.algorithm import Needs
from polyfed.core.checks_algorithm import client_env, play, server_env, work
from polyfed.core.errors import SpecError, UsageError
from polyfed.core.message import Message
from polyfed.core.tree import Tree
from polyfed.core.work import evaluate

HEADS = {"north": NumpyModel(3), "south": NumpyModel(5), "west": NumpyModel(3)}

# ---------------------------------------------------------------- FedBN


def test_fedbn_when_no_model_normalises_says_to_use_fedavg():
    with pytest.raises(UsageError, match=r"no model here has one that keeps statistics.*use FedAvg"):
        FedBN().init(server_env(sites_of(), 0))


def test_fedbn_when_one_group_normalises_shares_the_rest_with_those_that_do_not():
    rest, norm = (
        {"w": np.ones(2)},
        {"bn.weight": np.ones(3), "stats:bn/mean": np.ones(3), "stats:bn/variance": np.ones(3)},
    )
    env = replace(server_env(sites_of(), 0), first={"a": Tree(rest | norm), "b": Tree(rest)})
    assert set(FedBN().init(env).trees["params"]) == {"w"}


@pytest.mark.parametrize(
    ("names", "private"),
    [
        (("conv.weight", "bn.weight"), ()),
        (("0.weight", "1.weight", "1.bias", "stats:1/mean", "stats:1/variance"), ("1.weight", "1.bias")),
        (("a/norm/gamma", "a/norm_1/gamma", "stats:a/norm_1/mean"), ("a/norm_1/gamma",)),
        (("down.1.weight", "down.10.weight", "stats:down.1/mean"), ("down.1.weight",)),
    ],
)
def test_fedbn_when_layers_have_statistics_keeps_those_layers_alone(names, private):
    stats = {name for name in names if name.startswith("stats:")}
    assert FedBN().shared_names(names) == set(names) - set(private) - stats


def test_fedbn_when_a_part_is_shared_keeps_the_rest_too():
    names = ("base.0.weight", "base.1.weight", "stats:base.1/mean", "head.weight")
    assert FedBN(shared="base").shared_names(names) == {"base.0.weight"}


# ---------------------------------------------------------------- FedRep and FedBABU


@pytest.mark.parametrize("kind", [FedRep, FedBABU])
@pytest.mark.parametrize(
    ("shared", "words"),
    [((), "shares a base and keeps a head"), (("base", "!base.bn"), "mixes prefixes"), ("!", "empty prefix")],
)
def test_shared_when_it_leaves_no_head_says_what_to_write(kind, shared, words):
    with pytest.raises(UsageError, match=words):
        kind(shared=shared)


@pytest.mark.parametrize("options", [{"head_epochs": 0}, {"base_epochs": 0}])
def test_fedrep_when_a_turn_is_empty_is_refused(options):
    with pytest.raises(UsageError, match="at least 1"):
        FedRep(shared="base", **options)


@pytest.mark.parametrize("kind", [FedRep, FedBABU])
def test_shared_when_written_as_all_but_the_head_is_the_same(kind):
    one, two = (play(kind(shared=shared), sites_of(), rounds=2).digest for shared in ("base", "!head"))
    assert one == two
    assert kind(shared="base").needs == Needs.all("params", "part")


def test_fedrep_when_asked_trains_head_then_base_in_orders_of_their_own():
    sites = sites_of()
    play(FedRep(shared="base", head_epochs=4), {"north": sites["north"]}, rounds=1)
    one, two = sites["north"].model.log
    assert (one.part, one.epochs, one.draw) == (("!base",), 4, 0)
    assert (two.part, two.epochs, two.draw) == (("base",), 1, 1)


def test_fedbabu_when_a_group_has_no_head_is_refused():
    with pytest.raises(UsageError, match="leave it a head"):
        FedBABU(shared=("base", "head")).init(server_env(sites_of(), 0))


def test_fedbabu_when_tuning_is_negative_is_refused():
    with pytest.raises(UsageError, match="fine_tune=-1 must be at least 0"):
        FedBABU(shared="base", fine_tune=-1)


def test_fedbabu_when_first_states_differ_trains_all_under_the_servers_head():
    sites, algorithm = sites_of(), FedBABU(shared="base")
    head = sites["north"].model.first(sites["north"].train, client_env(sites["north"], 0, 1)).under(["head"])

    class Elsewhere(NumpyModel):
        def first(self, rows, env):
            drawn = super().first(rows, env)
            return drawn.overlay(drawn.under(["head"]) * 3.0)

    sites["west"] = replace(sites["west"], model=Elsewhere())
    played = play(algorithm, sites, rounds=2)
    assert all(memory.trees["own"].under(["head"]) == head for memory in played.memories.values())


def test_fedbabu_when_heads_differ_sends_each_group_its_own():
    head = {f"g{n}": Tree({"base.w": np.ones(2), "head.w": np.full(n, float(n))}) for n in (3, 5)}
    env = replace(server_env(sites_of(), 0), first=head)
    state = FedBABU(shared="base").init(env)
    for n in (3, 5):
        sent = FedBABU(shared="base").broadcast(state, "x", replace(env, group=f"g{n}"))
        assert sent.trees["head"]["head.w"].tolist() == [float(n)] * n
        assert set(sent.trees) == {"params", "head"}
        assert set(FedBABU(shared="base").expects(sent, env)) == {"params"}


def test_fedbabu_when_evaluated_scores_the_tuned_model_beside_the_shared_one():
    sites = sites_of(NumpyModel(epochs=4))
    algorithm = FedBABU(shared="base", fine_tune=30)
    played = play(algorithm, sites, rounds=3)
    site, env = sites["west"], client_env(sites["west"], 0, 4)
    sent = algorithm.broadcast(played.state, "west", server_env(sites, 0))
    one, two = (evaluate(algorithm, sent, played.memories["west"], site, env, site.train).numbers for _ in range(2))
    assert one == two and one["loss"] < one["shared/loss"]


# ---------------------------------------------------------------- bases that differ


def test_lg_fedavg_when_bases_differ_shares_the_head():
    sites = sites_of({name: NumpyModel(4, statistics=name == "west", lr=0.1) for name in HEADS})
    played = play(FedAvg(shared="head"), sites, rounds=3)
    assert set(played.state.trees["params"]) == {"head.w", "head.b"} and set(played.state.trees) == {"params"}
    assert "stats:base/mean" in played.memories["west"].trees["own"]


def test_lg_fedavg_when_heads_do_not_fit_names_groups_and_entry():
    with pytest.raises(SpecError, match=r"cannot average group 1 with group 0: head\.w"):
        play(FedAvg(shared="head"), sites_of(HEADS), rounds=1)


# ---------------------------------------------------------------- who comes late


@pytest.mark.parametrize("algorithm", [FedRep(shared="base"), FedBABU(shared="base")], ids=repr)
def test_newcomer_when_it_joins_starts_under_the_shared_base(algorithm):
    sites = sites_of()
    played = play(algorithm, sites, rounds=2, cohort=lambda _: ["north", "south"])
    work(algorithm, sites["west"], played, server_env(sites, 0, 3))
    start = sites["west"].model.log[-1 if isinstance(algorithm, FedBABU) else -2].start
    assert played.state.trees["params"] in start and not played.memories.get("west", Message()).trees
