"""What of a client's model a run begins with over a network: as much as the algorithm needs, and nothing personal."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import polyfed as pf
from polyfed.core import wire
from polyfed.core.errors import MalformedError, NeedsError, PeerError
from polyfed.core.tree import Tree
from polyfed.network.client import Link
from polyfed.network.forms import Start
from polyfed.run import join, serve
from polyfed.run.serve import Server

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
from numpy_model import NumpyModel, rows_of
from test_late import NAMES, Waiting, client, compare, here, limits, served, simulated  # noqa: F401  # here: a fixture
from test_serve_join import SECONDS, Thread

PUBLIC = rows_of(9, stream="public", labelled=False).x
MARK = 42.0


class Trained(NumpyModel):
    """Its head was trained before the run."""

    kind = "NumpyModel"

    def first(self, rows, env):
        first = super().first(rows, env)
        return first.overlay(Tree({"head.w": np.full_like(first["head.w"], MARK)}))


class Deep(NumpyModel):
    """The same base under a larger head."""

    kind = "NumpyModel"

    @property
    def key(self):
        return ("deep", super().key)

    def first(self, rows, env):
        return Tree({**super().first(rows, env), "head.extra": np.zeros(3)})


@pytest.fixture
def sent(monkeypatch):
    """The first states that clients send."""
    messages, start = [], Link.start

    def sending(self, message):
        messages.append(message)
        return start(self, message)

    monkeypatch.setattr(Link, "start", sending)
    return messages


BASE = {"base.w", "base.b"}
HEAD = {"head.w", "head.b"}
BEGINNINGS = {
    "FedAvg": (lambda: pf.FedAvg(shared="base"), BASE),
    "FedRep": (lambda: pf.FedRep(shared="base", head_epochs=1), BASE),
    "FedPer mean": (lambda: pf.FedPer(feedback="mean"), BASE),
    "FedPer distill": (lambda: pf.FedPer(feedback="distill", public=PUBLIC, models=Trained()), BASE | HEAD),
    "FedBABU": (lambda: pf.FedBABU(shared="base", fine_tune=1), BASE | HEAD),
    "Ditto": (lambda: pf.Ditto(0.5, shared="base"), BASE),
    "FedMD": (lambda: pf.FedMD(public=PUBLIC), set()),
    "FedMD shared": (lambda: pf.FedMD(public=PUBLIC, shared="base"), BASE),
    "FedDF": (lambda: pf.FedDF(public=PUBLIC, models=Trained()), BASE | HEAD),
    "Local": (pf.Local, set()),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_first_state_when_it_is_sent_holds_what_the_algorithm_needs_and_the_bits_are_those_of_the_simulation(
    name, sent
):
    make, names = BEGINNINGS[name]
    members = lambda: [client(n, Trained()) for n in NAMES]  # noqa: E731  # made twice
    result, outcomes = served(make(), members(), options={"rounds": 2})
    compare(result, simulated(make(), members(), rounds=2), outcomes)
    (message,) = sent
    assert set(message.trees["first"]) == names
    assert (np.float64(MARK).tobytes() * 2 in wire.to_bytes(message)) == ("head.w" in names)


def test_first_state_when_it_holds_more_than_is_needed_is_not_taken(monkeypatch):
    start = Link.start

    def everything(self, message):
        whole = Start.of(message).whole
        return start(self, Start(Tree({n: np.zeros(e.shape, e.dtype) for n, e in whole.items()}), whole).message)

    monkeypatch.setattr(Link, "start", everything)
    with Server(pf.FedAvg(shared="base"), clients=["north"], rounds=1, limits=limits()) as server:
        with pytest.raises(PeerError, match=r"not the part of the first state that the server needs: unexpected 'head"):
            Thread(server.url, client("north"), limits=limits()).outcome()
        server.stop(linger_seconds=0.0)


def test_first_head_when_its_client_has_not_agreed_stays_with_it(sent):
    with Server(pf.FedBABU(shared="base"), clients=["north"], rounds=1, limits=limits()) as server:
        with pytest.raises(NeedsError, match=r"north: FedBABU may take the first values of 'head\.b' .*has not agreed"):
            Thread(server.url, client("north", consents=()), limits=limits()).outcome()
        with pytest.raises(pf.errors.RunError, match="north does not take part"):
            server.result(SECONDS)
    assert not sent


@pytest.mark.parametrize(
    "change",
    [
        {"trees": {}},
        {"text": {}},
        {"numbers": {"a": 1.0}},
        {"text": {"whole": ("base.w float64 [1]",)}},
        {"text": {"whole": ("base.w float64 [2, 3]", "base.w float64 [2, 3]", "x nothing [1]")}},
        {"text": {"whole": ("base.w float64 [2, 3]", "../x float64 [1]")}},
        {"text": {"whole": ("base.w float64 [2, 3]", "x float64 [-1]")}},
        {"text": {"whole": ("base.w float64 [2, 3]", "x float64 [" + ", ".join(["1"] * 65) + "]")}},
        {"text": {"whole": ("other float64 [2, 3]",)}},
    ],
)
def test_first_state_when_it_is_no_first_state_is_malformed(change):
    given = Tree({"base.w": np.ones((2, 3))})
    whole = Tree({**given, "head.w": np.ones(()), "head.b": np.ones(4, "float32")}).spec
    message = Start(given, whole).message
    assert Start.of(wire.decode(wire.to_bytes(message))) == Start(given, whole)
    with pytest.raises(MalformedError):
        Start.of(replace(message, **change))


def test_initial_when_it_is_the_state_of_a_server_optimizer_starts_from_its_parameters():
    """Its moments have the names of the parameters."""
    members = lambda: [client(n) for n in NAMES]  # noqa: E731  # made thrice
    ended = simulated(pf.FedAdam(lr=0.1), members(), rounds=2)
    for given in (ended, ended.state):
        result, outcomes = served(pf.FedAvg(initial=given), members(), options={"rounds": 1})
        compare(result, simulated(pf.FedAvg(initial=ended.state.trees["params"]), members(), rounds=1), outcomes)


# ---------------------------------------------------------------- who comes late with a model that does not fit


def sent_away(algorithm, newcomer, said, until, times=1, **joining):
    """A run whose newcomer is told in a sentence, each time that it comes, that it does not fit; the others go on.

    Returns how often the server has made what it trains.
    """
    made, trainers_at_server = [], serve.trainers_at_server
    joining = {"limits": limits(), **joining}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "trainers_at_server", lambda *a, **k: made.append(1) or trainers_at_server(*a, **k))
        with Server(algorithm, clients=NAMES, late=("west",), rounds=4, seed=1, limits=limits()) as server:
            threads = [Thread(server.url, client("north", Waiting(2, until)), **{**joining, "memory": None})]
            threads.append(Thread(server.url, client("south"), **{**joining, "memory": None}))
            for _ in range(times):
                with pytest.raises(PeerError, match=said):
                    Thread(server.url, newcomer, **joining).outcome()
            if times > 1:
                with pytest.raises(PeerError, match=f"west was tried {times} times in this run and did not fit it"):
                    Thread(server.url, newcomer, **joining).outcome()
            until.set()
            [thread.outcome() for thread in threads]
            result = server.result(SECONDS)
    assert {log.cohort for log in result.history} == {NAMES}
    assert len(result.history) == 4
    return len(made)


def test_newcomer_when_the_state_has_no_head_of_its_spec_is_sent_away(here):  # noqa: F811  # the fixture
    said = r"west cannot join this run: FedBABU keeps head\.\w+ for NumpyModel-2, and this run began without it"
    sent_away(pf.FedBABU(shared="base", fine_tune=1), client("west", Deep()), said, here["east"])


def test_newcomer_when_each_group_has_parameters_at_the_server_is_sent_away(here):  # noqa: F811  # as above
    algorithm = pf.FedDF(public=PUBLIC, models=[NumpyModel(), Deep()])
    said = r"west cannot join this run: FedDF keeps params:NumpyModel-2 for NumpyModel-2"
    made = sent_away(algorithm, client("west", Deep()), said, here["east"])
    assert made == 1, "what the server trains is made once"


@pytest.mark.parametrize(("model", "until"), [(NumpyModel(), "west"), (Deep(), "east")])
def test_newcomer_when_it_offers_less_than_is_needed_is_sent_away_by_the_server(model, until, here, monkeypatch):  # noqa: F811
    """One of a known group is told between two rounds, one of a new group at once."""
    introduction = join.introduction

    def modest(member, target, ticket):
        said = introduction(member, target, ticket)
        return replace(said, offers=()) if member.name == "west" else said

    monkeypatch.setattr(join, "introduction", modest)
    algorithm = pf.FedPer(feedback="distill", public=PUBLIC, models=NumpyModel())
    sent_away(algorithm, client("west", model), r"west \(NumpyModel\) .*cannot train a part of itself", here[until])


@dataclass(frozen=True)
class Fragile(pf.FedAvg):
    """Raises for one client what a mistake in an algorithm raises."""

    def broadcast(self, state, client, env):
        return {}[client] if client == "west" else super().broadcast(state, client, env)


def test_newcomer_when_the_algorithm_raises_for_it_is_sent_away_and_may_not_come_for_ever(here, tmp_path):  # noqa: F811
    said = r"west cannot join this run: its model fails at the server \(KeyError\)"
    joining = {"allow": [Fragile], "memory": tmp_path}
    sent_away(Fragile(shared="base"), client("west", Deep()), said, here["east"], times=3, **joining)


def test_newcomer_when_the_server_has_a_model_of_its_architecture_gets_a_head_from_then_on(here):  # noqa: F811
    """FedPer's state holds nothing of a group before its first head; until then its model in ``models=`` waits."""
    algorithm = pf.FedPer(feedback="distill", public=PUBLIC, models=[NumpyModel(), Deep()])
    members = [client("north", Waiting(2, here["west"])), client("south"), client("west", Deep(), joins_at=3)]
    result, outcomes = served(algorithm, members, late=("west",))
    assert [log.cohort for log in result.history] == [NAMES] * 2 + [(*NAMES, "west")] * 3
    heads = sorted(sorted(tree) for name, tree in result.state.trees.items() if name.startswith("head."))
    assert heads == [["head.b", "head.extra", "head.w"], ["head.b", "head.w"]]
    assert set(outcomes["west"].message.trees["head"]) == HEAD | {"head.extra"}


def test_newcomer_of_a_new_architecture_when_nothing_of_it_is_kept_has_the_bits_of_the_simulation(here):  # noqa: F811
    def members(event):
        return [client("north", Waiting(2, event)), client("south"), client("west", Deep(), joins_at=3)]

    result, outcomes = served(pf.FedRep(shared="base", head_epochs=1), members(here["west"]), late=("west",))
    compare(result, simulated(pf.FedRep(shared="base", head_epochs=1), members(here["west"])), outcomes)
