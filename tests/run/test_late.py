"""Clients that dial in after a run has begun, leave it and come back: the bits of the simulation, and who is sent away."""

import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import polyfed as pf
from polyfed.core.errors import NeedsError, PeerError, UsageError
from polyfed.network.client import Link
from polyfed.run.serve import Server

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
from numpy_model import NumpyModel, rows_of
from test_serve_join import SECONDS, Thread, check_same

NAMES = ("north", "south")


class Waiting(NumpyModel):
    """From a round on it does not train before others are there."""

    kind = "NumpyModel"

    def __init__(self, number, event, **more):
        super().__init__(**more)
        object.__setattr__(self, "wait", (number, event))

    def fit(self, request, rows, env):
        number, event = self.wait
        if env.round_num >= number:
            assert event.wait(SECONDS)
        return super().fit(request, rows, env)


def client(name, model=None, **more):
    rows = rows_of(30, stream=name)
    more = {"consents": "personal", **more}
    return pf.Client(name, model or NumpyModel(), (rows.x, rows.target), split=pf.Split(0.2, 0.2), **more)


@pytest.fixture
def here(monkeypatch):
    """Name -> an event that is set when that client has asked for work."""
    events, ask = {name: threading.Event() for name in ("west", "east")}, Link.next

    def asked(self):
        name = self._enrolment.name
        offer = ask(self)
        if name in events and (offer is None or offer.task is not None):
            events[name].set()
        return offer

    monkeypatch.setattr(Link, "next", asked)
    return events


def limits():
    from polyfed.network.limits import NetworkLimits

    return NetworkLimits(poll_seconds=0.05)  # whoever waits in vain asks again at once


def served(algorithm, members, *, late=(), options=None):
    """A run whose clients are threads; the server's result, and what each client ended with."""
    names = [c.name for c in members if c.name not in late]
    with Server(
        algorithm, clients=names, late=late, limits=limits(), **{"rounds": 5, "seed": 1, **(options or {})}
    ) as server:
        threads = [Thread(server.url, each, limits=limits()) for each in members]
        outcomes = {each.name: thread.outcome() for each, thread in zip(members, threads, strict=True)}
        return server.result(SECONDS), outcomes


def simulated(algorithm, members, **more):
    return pf.simulate(algorithm, members, **{"rounds": 5, "seed": 1, "baselines": (), **more})


def compare(result, simulation, outcomes):
    digests = {n: {"memory": o.memory.digest, "state": o.state.digest} for n, o in outcomes.items()}
    check_same(result, simulation, digests)


COMING = {"south": {"away": (2, 3)}, "west": {"joins_at": 3}}
ALGORITHMS = {
    "FedAvg": lambda: pf.FedAvg(shared="base"),
    "FedPer mean": lambda: pf.FedPer(every=2, feedback="mean"),
    "FedPer distill": lambda: pf.FedPer(
        feedback="distill", public=rows_of(9, stream="public", labelled=False).x, models=NumpyModel()
    ),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_run_when_clients_come_and_go_over_the_network_has_the_bits_of_the_simulation(name):
    members = lambda: [client(n, **COMING.get(n, {})) for n in (*NAMES, "west")]  # noqa: E731  # made twice
    result, outcomes = served(ALGORITHMS[name](), members())
    compare(result, simulated(ALGORITHMS[name](), members()), outcomes)


@pytest.mark.parametrize("late", [("west",), 1])
def test_run_when_a_client_dials_in_later_has_the_bits_of_the_simulation_in_which_it_joins_at_that_round(late, here):
    def members(event):
        return [client("north", Waiting(2, event)), client("south"), client("west", joins_at=3)]

    with Server(pf.FedAvg(shared="base"), clients=NAMES, late=late, rounds=5, seed=1, limits=limits()) as server:
        north, south, west = members(here["west"])
        threads = [Thread(server.url, each, limits=limits()) for each in (north, south)]
        threads.append(Thread(server.url, west, limits=limits()))
        outcomes = {n: t.outcome() for n, t in zip((*NAMES, "west"), threads, strict=True)}
        result = server.result(SECONDS)
    done = threading.Event()
    done.set()
    compare(result, simulated(pf.FedAvg(shared="base"), members(done)), outcomes)
    assert [log.cohort for log in result.history] == [NAMES] * 2 + [(*NAMES, "west")] * 3


def test_newcomer_when_its_model_is_of_a_new_kind_brings_its_first_state(here):
    members = [client("north", Waiting(2, here["west"])), client("west", NumpyModel(hidden=7), joins_at=3)]
    result, outcomes = served(pf.Local(), members, late=("west",))
    done = threading.Event()
    done.set()
    members[0] = client("north", Waiting(2, done))
    compare(result, simulated(pf.Local(), members), outcomes)


def test_newcomer_when_its_base_does_not_fit_is_sent_away_and_the_run_goes_on(here):
    with Server(pf.FedAvg(), clients=NAMES, late=("west",), rounds=4, seed=1, limits=limits()) as server:
        threads = [Thread(server.url, client("north", Waiting(2, here["east"])), limits=limits())]
        threads.append(Thread(server.url, client("south"), limits=limits()))
        with pytest.raises(
            PeerError, match=r"west cannot join this run: FedAvg cannot average NumpyModel-2 with NumpyModel"
        ):
            Thread(server.url, client("west", NumpyModel(hidden=7)), limits=limits()).outcome()
        here["east"].set()
        [thread.outcome() for thread in threads]
        assert {log.cohort for log in server.result(SECONDS).history} == {NAMES}


def test_newcomer_when_it_has_not_agreed_refuses_by_itself_and_the_run_goes_on(here):
    with Server(pf.FedPer(feedback="mean"), clients=NAMES, late=1, rounds=4, seed=1, limits=limits()) as server:
        threads = [Thread(server.url, client("north", Waiting(2, here["east"])), limits=limits())]
        threads.append(Thread(server.url, client("south"), limits=limits()))
        with pytest.raises(NeedsError, match=r"west .* has not agreed that its personal part leaves it"):
            Thread(server.url, client("west", consents=()), limits=limits()).outcome()
        here["east"].set()
        [thread.outcome() for thread in threads]
        assert {log.cohort for log in server.result(SECONDS).history} == {NAMES}


def test_client_when_it_has_not_agreed_to_feedback_calls_the_run_off_before_it_begins():
    with Server(pf.FedPer(feedback="mean"), clients=["north"], rounds=2, limits=limits()) as server:
        with pytest.raises(NeedsError, match='consents="personal"'):
            Thread(server.url, client("north", consents=()), limits=limits()).outcome()
        with pytest.raises(pf.errors.RunError, match=r"north does not take part: .*personal"):
            server.result(SECONDS)


class Leaving(NumpyModel):
    kind = "NumpyModel"

    def fit(self, request, rows, env):
        if env.round_num == 3:
            raise KeyboardInterrupt
        return super().fit(request, rows, env)


def test_client_when_it_leaves_and_comes_back_goes_on_with_its_memory(here, tmp_path):
    """It leaves in the middle of round 3, as by Ctrl-C; the others go on, and wait for it in round 5."""
    options = {"limits": limits(), "memory": tmp_path}
    without = threading.Event()  # a round without it has begun

    class Telling(Waiting):
        def fit(self, request, rows, env):
            if env.round_num == 4:
                without.set()
            return super().fit(request, rows, env)

    with Server(pf.FedAvg(shared="base"), clients=(*NAMES, "west"), rounds=8, seed=1, limits=limits()) as server:
        threads = [Thread(server.url, client("north", Telling(5, here["east"])), limits=limits())]
        threads.append(Thread(server.url, client("south"), limits=limits()))
        with pytest.raises(KeyboardInterrupt):
            _join(server.url, client("west", Leaving()), **options)
        assert without.wait(SECONDS)
        back = Thread(server.url, client("west"), **options)
        here["west"].clear()
        assert here["west"].wait(SECONDS)
        here["east"].set()
        outcome = back.outcome()
        [thread.outcome() for thread in threads]
        result = server.result(SECONDS)
    cohorts = [log.cohort for log in result.history]
    assert cohorts[:2] == [(*NAMES, "west")] * 2
    assert cohorts[3] == NAMES
    assert cohorts[-1] == (*NAMES, "west")
    assert set(result.test) == {*NAMES, "west"}
    assert outcome.memory.trees["own"]["head.w"].shape == (4, 3)


def _join(url, each, **options):
    """`join` in a thread: an interrupt is the thread's own."""
    raised = []

    def work():
        try:
            pf.join(url, each, show=None, **options)
        except KeyboardInterrupt as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if raised:
        raise raised[0]


def test_frozen_client_over_the_network_has_the_bits_of_the_simulation():
    members = lambda: [client("north"), client("south"), client("west", freeze="base")]  # noqa: E731  # made twice
    result, outcomes = served(pf.FedAvg(shared="base"), members())
    compare(result, simulated(pf.FedAvg(shared="base"), members()), outcomes)
    assert result.state.digest == simulated(pf.FedAvg(shared="base"), members()[:2]).state.digest


# ---------------------------------------------------------------- who is sent away


@pytest.mark.parametrize(
    ("late", "said"),
    [(("west",), "east is not expected in this run"), (0, "east is not expected"), (1, "east is not expected")],
)
def test_name_when_it_is_not_allowed_or_there_is_no_room_is_refused(late, said, here):
    with Server(pf.FedAvg(), clients=["north"], late=late, rounds=3, seed=1, limits=limits()) as server:
        north = Thread(server.url, client("north", Waiting(2, here["east"])), limits=limits())
        west = Thread(server.url, client("west"), limits=limits()) if late else None
        if west is not None:
            assert here["west"].wait(SECONDS)
        with pytest.raises(PeerError, match=said):
            Thread(server.url, client("east"), limits=limits()).outcome()
        if west is not None:
            with pytest.raises(PeerError, match="west is enrolled already; a client that comes back shows its ticket"):
                Thread(server.url, client("west"), limits=limits()).outcome()
        here["east"].set()
        [thread.outcome() for thread in (north, west) if thread is not None]
        server.result(SECONDS)


@pytest.mark.parametrize(
    ("clients", "late", "said"),
    [
        (["a"], ["a"], r"a stands in clients= and in late="),
        (["a"], "b", "late='b': give different names"),
        (["a"], -1, "late=-1"),
        (1, 10**9, "1 to "),
    ],
)
def test_late_when_it_names_what_it_must_not_is_refused(clients, late, said):
    with pytest.raises(UsageError, match=said):
        Server(pf.FedAvg(), clients=clients, late=late, rounds=1)


def test_newcomer_when_it_comes_back_with_another_model_is_refused(here, tmp_path):
    with Server(pf.FedAvg(shared="base"), clients=NAMES, rounds=4, seed=1, limits=limits()) as server:
        threads = [Thread(server.url, client("north", Waiting(4, here["east"])), limits=limits())]
        with suppress(KeyboardInterrupt):
            work = threading.Thread(target=lambda: _quietly(server.url, tmp_path), daemon=True)
            work.start()
            work.join(SECONDS)
        with pytest.raises(PeerError, match="south has another model than the one with which it is known"):
            Thread(server.url, client("south", NumpyModel(hidden=7)), limits=limits(), memory=tmp_path).outcome()
        here["east"].set()
        [thread.outcome() for thread in threads]
        server.stop(linger_seconds=0.0)
        server.result(SECONDS)


def _quietly(url, folder):
    with suppress(KeyboardInterrupt):
        pf.join(url, client("south", Leaving()), show=None, limits=limits(), memory=folder)


def test_server_when_it_is_restarted_waits_for_the_late_ones_too(here, tmp_path):
    """What a newcomer brought is written down before it takes part."""
    options = {"clients": ["north"], "late": 1, "rounds": 6, "seed": 1, "limits": limits(), "journal": tmp_path}
    first = Server(pf.Local(), **options)
    with first as server:
        port = int(server.url.rpartition(":")[2])
        north = Thread(server.url, client("north", Waiting(2, here["west"])), limits=limits(), memory=tmp_path / "n")
        west = client("west", NumpyModel(hidden=7), joins_at=3)
        west = Thread(server.url, west, limits=limits(), memory=tmp_path / "w")
        outcomes = [north.outcome(), west.outcome()]
        result = server.result(SECONDS)
    with Server(pf.Local(), **options, port=port, linger_seconds=0.0) as again:
        resumed = again.result(SECONDS)
    assert resumed.test == result.test
    assert set(result.test) == {"north", "west"}
    assert len(resumed.federation.first) == 2
    assert np.all([o.version == 6 for o in outcomes])
