import json
import pickle
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import polyfed as pf
from polyfed.core import records
from polyfed.core.errors import DataError, NeedsError, PeerError, RunError, UsageError
from polyfed.core.events import Persist
from polyfed.core.memory import ClientMemory
from polyfed.core.round import step
from polyfed.network.client import Link
from polyfed.network.limits import NetworkLimits
from polyfed.run.serve import Server

sys.path.insert(0, str(Path(__file__).parent))
import network_sites as sites

PROGRAM = str(Path(__file__).parent / "network_sites.py")
SECONDS = 60


class Thread(threading.Thread):
    """One client of the run in a thread; `outcome` returns or raises what `join` did."""

    def __init__(self, url, client, **options):
        super().__init__(daemon=True)
        self._work = lambda: pf.join(url, client, show=None, **options)
        self._value = self._error = None
        self.start()

    def run(self):
        try:
            self._value = self._work()
        except Exception as error:  # noqa: BLE001  # raised again in `outcome`
            self._error = error

    def outcome(self):
        self.join(SECONDS)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._value


@contextmanager
def process(url=None, *words):
    """A process that joins what it is told on standard input; ended by its id, whatever happens."""
    started = subprocess.Popen([sys.executable, PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if url is not None:
            tell(started, url, *words)
        yield started
    finally:
        started.kill()
        started.communicate()


def tell(started, url, *words):
    started.stdin.write(" ".join([url, *words]) + "\n")
    started.stdin.flush()


def heard(started):
    return json.loads(started.stdout.readline())


def served(algorithm, kind="numpy", names=sites.NAMES, options=None, joining=None, **more):
    """A whole run with its clients in threads: the server's result, and what each client ended with."""
    with Server(algorithm, clients=names, **{"rounds": 3, "seed": 1, **more}) as server:
        threads = [Thread(server.url, sites.client(kind, name), **(joining or {})) for name in names]
        outcomes = {name: thread.outcome() for name, thread in zip(names, threads, strict=True)}
        return server.result(SECONDS), outcomes


def simulated(algorithm, kind="numpy", names=sites.NAMES, **more):
    return pf.simulate(algorithm, sites.clients(kind, names), **{"rounds": 3, "seed": 1, "baselines": (), **more})


def logs(history):
    """The history but for what a clock says."""
    return [replace(log, seconds=0.0, cpu_seconds=0.0) for log in history]


def check_same(result, simulation, digests):
    assert result.state.digest == simulation.state.digest
    assert logs(result.history) == logs(simulation.history)
    assert result.test == simulation.test
    assert (result.reason, result.version) == (simulation.reason, simulation.version)
    for name, said in digests.items():
        assert said["memory"] == simulation.memories[name].digest
        assert said["state"] == simulation.state_of(name).digest


def test_run_when_clients_are_processes_of_their_own_has_the_bits_of_the_simulation():
    runs = [
        ("mixed", lambda: pf.FedMD(public=sites.public())),
        ("torch", lambda: pf.FedAvg()),
        ("torch", lambda: pf.FedProx(mu=0.1)),
    ]
    with process() as c0, process() as c1, process() as c2:
        for kind, algorithm in runs:
            with Server(algorithm(), clients=sites.NAMES, rounds=3, seed=1) as server:
                for name, started in zip(sites.NAMES, (c0, c1, c2), strict=True):
                    tell(started, server.url, kind, name)
                simulation = simulated(algorithm(), kind)
                digests = {name: heard(started) for name, started in zip(sites.NAMES, (c0, c1, c2), strict=True)}
                check_same(server.result(SECONDS), simulation, digests)


@pytest.mark.parametrize(
    "algorithm", [lambda: pf.FedMD(public=sites.public()), lambda: pf.FedAdam(lr=0.1), lambda: pf.Local()]
)
def test_run_when_clients_are_threads_has_the_bits_of_the_simulation(algorithm):
    result, outcomes = served(algorithm())
    digests = {name: {"memory": o.memory.digest, "state": o.state.digest} for name, o in outcomes.items()}
    check_same(result, simulated(algorithm()), digests)
    assert set(result.denials) <= {503}, (
        "nobody is denied anything, but for a client that is early and asked to come again"
    )


def test_run_when_a_stopping_rule_rolls_back_gives_clients_the_memories_of_that_version():
    algorithm = lambda: pf.FedMD(public=sites.public())  # noqa: E731  # made twice
    stop = pf.NoImprovement("accuracy", patience=2, roll_back=True)
    result, outcomes = served(algorithm(), rounds=12, stop=stop)
    simulation = simulated(algorithm(), rounds=12, stop=stop)
    assert simulation.version < len(simulation.history)
    digests = {name: {"memory": o.memory.digest, "state": o.state.digest} for name, o in outcomes.items()}
    check_same(result, simulation, digests)


def test_order_when_only_a_number_is_given_is_that_of_names_whoever_comes_first():
    with Server(pf.FedAvg(), clients=3, rounds=2, seed=1) as server:
        threads = [Thread(server.url, sites.client("numpy", name)) for name in reversed(sites.NAMES)]
        [thread.outcome() for thread in threads]
        result = server.result(SECONDS)
    assert result.state.digest == simulated(pf.FedAvg(), rounds=2).state.digest


def test_model_when_the_run_has_ended_is_each_clients_own_object():
    _, outcomes = served(pf.FedAvg(), rounds=2)
    simulation = simulated(pf.FedAvg(), rounds=2)
    for name, outcome in outcomes.items():
        assert np.array_equal(outcome.model["weight"], simulation.models[name]["weight"])


# ---------------------------------------------------------------------------------------------- the engine is the same one


def plain(record):
    """A record without the times that a clock gave."""
    return replace(record, **{f: 0.0 for f in ("at", "until") if hasattr(record, f)})


def by_collection(trace):
    """The records of each collection, in the order of the plan where only the order of answers was open."""
    found = [[]]
    for _, actions in trace:
        for action in actions:
            for record in action.records if isinstance(action, Persist) else ():
                if isinstance(record, (records.TrainingOpened, records.EvaluationOpened)):
                    found.append([])
                found[-1].append(plain(record))
    order = lambda r: getattr(r, "position", -1) if isinstance(r, records.Accepted) else -1  # noqa: E731  # one use
    return [sorted(group, key=lambda r: (_rank(r), order(r))) for group in found]


def _rank(record):
    """Opened, then answers, then what follows from them."""
    kinds = (records.TrainingOpened, records.EvaluationOpened)
    return 0 if isinstance(record, kinds) else 1 if isinstance(record, records.Accepted) else 2


def test_trace_when_it_is_stepped_again_gives_the_same_actions():
    result, _ = served(pf.FedMD(public=sites.public()), trace=True)
    state = records.State()
    for event, actions in result.trace:
        state, again = step(result.federation.rules, state, event)
        assert again == actions
    assert state.ending == result.reason


def test_trace_when_compared_with_the_loops_holds_the_same_records_but_for_times_and_order_of_answers():
    """Within a collection the order in which clients answer is open; everything else, and each record, is the same."""
    result, _ = served(pf.FedMD(public=sites.public()), trace=True, schedule=pf.Sync())
    run = pf.rounds(pf.FedMD(public=sites.public()), sites.clients("numpy"), rounds=3, seed=1, schedule=pf.Sync())
    coordinator = run.run.driver.coordinator
    begun = [plain(record) for record in _begun(coordinator)]
    coordinator.trace = []
    for _ in run:
        pass
    network, loop = by_collection(result.trace), by_collection(coordinator.trace)
    assert network[0] + network[1][:1] == begun
    assert network[1][1:] == loop[0]
    assert network[2:] == loop[1:]


def _begun(coordinator):
    """What the loop wrote before the trace was asked for: who is there, and the first round."""
    state = coordinator.state
    first = records.TrainingOpened(0.0, 1, 0, state.plan, state.block, None)
    return [*(records.Enrolled(name) for name in state.population), records.Initial(""), first]


# ---------------------------------------------------------------------------------------------- what a site agrees to


def test_algorithm_of_a_users_own_when_it_is_allowed_runs_as_in_simulation():
    result, _ = served(sites.Halved(part=0.25), joining={"allow": [sites.Halved]})
    assert result.state.digest == simulated(sites.Halved(part=0.25)).state.digest


@pytest.mark.parametrize(
    ("algorithm", "options", "said"),
    [
        (sites.Halved(), {}, "'Halved' is not allowed here; allowed are .*FedAdagrad"),
        (pf.FedAvg(), {"confirm": lambda m: m.rounds < 3}, "policy refuses the run"),
        (pf.FedAvg(), {"confirm": lambda m: "too many rounds"}, "refuses the run: too many rounds"),
    ],
)
def test_run_when_a_site_does_not_agree_is_refused_in_a_sentence_on_both_sides(algorithm, options, said):
    with Server(algorithm, clients=["c0"], rounds=3) as server:
        with pytest.raises(PeerError, match=said):
            Thread(server.url, sites.client("numpy", "c0"), **options).outcome()
        with pytest.raises(RunError, match=f"c0 does not take part: c0 refuses: .*{said}"):
            server.result(SECONDS)


def test_model_when_it_lacks_what_the_algorithm_needs_is_refused_in_a_sentence():
    class Blind(sites.Softmax):
        offers = frozenset({"predict"})

    with Server(pf.FedAvg(), clients=["c0"], rounds=3) as server:
        blind = pf.Client("c0", Blind(), sites.rows("c0"))
        with pytest.raises(NeedsError, match="has no parameters to average"):
            Thread(server.url, blind).outcome()
        with pytest.raises(RunError, match="has no parameters to average"):
            server.result(SECONDS)


def test_targets_when_they_do_not_fit_together_call_the_run_off_for_everybody():
    x, y = sites.rows("c1")
    words = pf.Client("c1", sites.Softmax(), (x, np.array(["a", "b", "c"])[y]))
    with Server(pf.FedAvg(), clients=["c0", "c1"], rounds=3) as server:
        threads = [Thread(server.url, sites.client("numpy", "c0")), Thread(server.url, words)]
        for thread in threads:
            with pytest.raises(PeerError, match="called off: c0's target holds numbers, c1's holds text"):
                thread.outcome()
        with pytest.raises(DataError, match="all clients need the same kind"):
            server.result(SECONDS)


def test_server_when_bound_elsewhere_than_to_this_machine_is_refused():
    with pytest.raises(UsageError, match="TLS and enrolment by certificate, which come with a release of their own"):
        pf.serve(pf.FedAvg(), clients=["c0"], rounds=1, host="0.0.0.0")


def test_server_when_aiohttp_is_missing_says_which_extra_brings_it():
    code = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "import polyfed as pf\n"
        "try: pf.serve(pf.FedAvg(), clients=1, rounds=1)\n"
        "except pf.errors.MissingExtraError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'aiohttp is not installed; install it with: pip install "polyfed[network]"' in said


# ---------------------------------------------------------------------------------------------- what is lost on the way


def test_receipt_when_each_first_answer_to_an_upload_is_lost_is_asked_for_again_and_counted_once(monkeypatch):
    whole_answer, whole_accept, lost, accepted = Link._answer, ClientMemory.accept, set(), []

    def answer(self, response, read):
        found = whole_answer(self, response, read)
        verdict = isinstance(found, bytes) and b'"verdict"' in found
        if verdict and (id(self), found) not in lost and len(lost) < 6:
            lost.add((id(self), found))
            raise ConnectionResetError("the answer was lost")
        return found

    def accept(self, receipt):
        done = whole_accept(self, receipt)
        accepted.append((id(self), receipt, done))
        return done

    monkeypatch.setattr(Link, "_answer", answer)
    monkeypatch.setattr(ClientMemory, "accept", accept)
    result, outcomes = served(pf.FedMD(public=sites.public()))
    monkeypatch.undo()
    assert lost
    committed = [(who, receipt) for who, receipt, done in accepted if done]
    assert len(set(committed)) == len(committed) == 3 * 3
    digests = {name: {"memory": o.memory.digest, "state": o.state.digest} for name, o in outcomes.items()}
    check_same(result, simulated(pf.FedMD(public=sites.public())), digests)


@pytest.mark.parametrize("stage", ["_send", "_note"])
def test_client_when_it_is_killed_and_comes_back_ends_with_the_bits_of_an_undisturbed_run(stage, tmp_path):
    folder = f"memory={tmp_path / 'c0'}"
    with Server(pf.FedMD(public=sites.public()), clients=sites.NAMES, rounds=3, seed=1) as server:
        threads = [Thread(server.url, sites.client("numpy", name)) for name in sites.NAMES[1:]]
        with process(server.url, "numpy", "c0", folder, f"die={stage}") as killed:
            assert killed.wait(SECONDS) == -9
        with process(server.url, "numpy", "c0", folder) as again:
            digests = {"c0": heard(again)}
        for thread in threads:
            thread.outcome()
        check_same(server.result(SECONDS), simulated(pf.FedMD(public=sites.public())), digests)
    assert len(list((tmp_path / "c0").glob("*.memory"))) <= 3


@contextmanager
def server_process(port, folder):
    command = [sys.executable, PROGRAM, "serve", str(port), str(folder)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield started, started.stdout.readline().strip()
    finally:
        started.kill()
        started.communicate()


@pytest.mark.parametrize("upload", [2, 5, 9, 16])
def test_server_when_it_is_killed_and_called_again_ends_with_the_bits_of_an_undisturbed_run(
    upload, tmp_path, monkeypatch
):
    whole, counted, lock = Link.upload, [], threading.Lock()
    with server_process(0, tmp_path) as (first, url):

        def kill_at(self, receipt, *more):
            with lock:
                counted.append(receipt)
                if len(counted) == upload:
                    first.kill()
            return whole(self, receipt, *more)

        monkeypatch.setattr(Link, "upload", kill_at)
        threads = [Thread(url, sites.client("numpy", name)) for name in sites.NAMES]
        assert first.wait(SECONDS) == -9
        with server_process(url.rpartition(":")[2], tmp_path) as (second, again):
            assert again == url
            outcomes = {name: thread.outcome() for name, thread in zip(sites.NAMES, threads, strict=True)}
            said = heard(second)
    simulation = simulated(pf.FedMD(public=sites.public()), rounds=4)
    assert said == {"state": simulation.state.digest, "test": simulation.test, "rounds": 4}
    assert {n: o.memory.digest for n, o in outcomes.items()} == {n: m.digest for n, m in simulation.memories.items()}


def test_server_when_it_is_interrupted_says_so_and_keeps_what_it_has(tmp_path, monkeypatch):
    whole, counted, lock = Link.upload, [], threading.Lock()
    with server_process(0, tmp_path) as (started, url):

        def interrupt_at(self, receipt, *more):
            with lock:
                counted.append(receipt)
                if len(counted) == 8:
                    started.send_signal(signal.SIGINT)
            return whole(self, receipt, *more)

        monkeypatch.setattr(Link, "upload", interrupt_at)
        threads = [Thread(url, sites.client("numpy", name)) for name in sites.NAMES]
        assert {thread.outcome().reason for thread in threads} == {"interrupted"}
        assert heard(started)["rounds"] < 4
        assert started.wait(SECONDS) == 0


def test_run_when_every_unpickler_is_out_of_order_goes_its_way(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("something was unpickled")

    for name in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)
    result, _ = served(pf.FedMD(public=sites.public()), rounds=2)
    assert result.version == 2


def test_journal_when_it_belongs_to_another_run_is_refused(tmp_path):
    served(pf.FedAvg(), names=("c0",), rounds=1, journal=tmp_path)
    with pytest.raises(pf.errors.StorageError, match="holds the journal of another run"):
        pf.serve(pf.FedAvg(), clients=["c0"], rounds=2, journal=tmp_path)


def test_memory_when_its_folder_belongs_to_another_client_is_refused(tmp_path):
    served(pf.FedAvg(), names=("c0",), rounds=1, joining={"memory": tmp_path})
    with pytest.raises(pf.errors.StorageError, match="is the memory of 'c0', not of 'c1'"):
        pf.join("http://127.0.0.1:1", sites.client("numpy", "c1"), memory=tmp_path)


def test_client_when_nobody_answers_gives_up_in_a_sentence():
    with pytest.raises(RunError, match="has not answered for 0 seconds: ConnectionRefusedError"):
        pf.join("http://127.0.0.1:9", sites.client("numpy", "c0"), patience=0.0)


def test_client_when_its_own_code_raises_is_left_out_and_named():
    names = ("c0", "c1", "mallory")
    result, _ = served(pf.FedAvg(), names=names)
    assert result.failures == {"mallory": "RuntimeError: no"}
    assert [log.accepted for log in result.history] == [("c0", "c1")] * 3
    assert result.state.digest == simulated(pf.FedAvg(), names=names).state.digest


def test_lease_when_a_client_is_silent_ends_and_the_round_goes_on():
    """A client that enrols and takes its task, and is never heard of again."""
    schedule = pf.Sync(lease=0.3, attempts=1)
    with Server(
        pf.FedAvg(), clients=["c0", "c1"], rounds=1, schedule=schedule, linger_seconds=0.1, test=False, evaluate_every=0
    ) as server:
        thread = Thread(server.url, sites.client("numpy", "c0"))
        link = silent(server.url, "c1")
        thread.outcome()
        result = server.result(SECONDS)
        link.close()
    assert result.history[0].accepted == ("c0",)
    assert result.history[0].left_out == {"c1": "lost: no answer within its lease"}


def silent(url, name):
    from polyfed.run.client import first_env
    from polyfed.run.join import introduction, prepared_site

    client, link = sites.client("numpy", name), Link(url, limits=NetworkLimits(poll_seconds=5))
    raw = client.read()
    link.enrol(introduction(client, raw.target, "0" * 64))
    manifest = link.manifest()
    while manifest is None:
        manifest = link.manifest()
    site = prepared_site(client, raw, manifest, pf.FedAvg(), link)
    link.ready(site.model.first(site.train, first_env(site, manifest.seed)).spec.digest)
    return link
