import gc
import os
import random
import select
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import polyfed
from polyfed.core.algorithm import Algorithm
from polyfed.core.checks_executor import (
    SEED,
    ToyAlgorithm,
    ToyModel,
    check_executor,
    difference,
    toy_jobs,
    toy_sites,
)
from polyfed.core.errors import RunError, UsageError
from polyfed.core.message import Message
from polyfed.core.tree import Tree
from polyfed.executors import launch, worker
from polyfed.executors.channel import Channel
from polyfed.executors.loop import Loop
from polyfed.executors.processes import THREADED, Processes

NAMES = [f"client-{i}" for i in range(9)]


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Children and descriptors are as before every test; nothing ever has a name that could be left behind."""
    before = left()
    yield
    gc.collect()
    assert left() == before


def left():
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    return children, len(list(Path("/proc/self/fd").iterdir()))


def answers(executor, jobs, algorithm=None, names=NAMES):
    executor.open(algorithm or ToyAlgorithm(), toy_sites(names), seed=SEED)
    try:
        executor.submit(jobs)
        return {reply.task.client: reply for reply in executor.replies()}
    finally:
        executor.close()


@pytest.mark.parametrize("start", ["forkserver", "spawn", "fork"])
def test_processes_keep_the_contract(start):
    check_executor(lambda: Processes(2, start=start))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_replies_have_the_same_bits_for_any_number_of_workers_and_order_of_jobs(workers):
    jobs = toy_jobs(toy_sites(NAMES))
    wanted = answers(Loop(), jobs)
    random.Random(workers).shuffle(jobs)
    got = answers(Processes(workers), jobs)
    assert [difference(got[name], wanted[name]) for name in NAMES] == [""] * len(NAMES)


@dataclass(frozen=True)
class Echo(Algorithm):
    """Sends the message back larger, and keeps it."""

    def client_update(self, message, memory, env):
        tree = message.trees["params"] * 2.0
        return Message(trees={"params": tree}), memory.put(trees={"was": message.trees["params"], "now": tree})
        yield


def test_large_trees_come_back_bit_for_bit_in_aligned_memory():
    params = Tree({"w": np.arange(300_000, dtype=np.float32), "b": np.arange(7, dtype=np.float64)})
    jobs = [type(job)(job.task, Message(trees={"params": params}), job.memory) for job in toy_jobs(toy_sites(NAMES))]
    wanted, got = answers(Loop(), jobs, Echo()), answers(Processes(2), jobs, Echo())
    for name in NAMES:
        assert not difference(got[name], wanted[name])
        assert got[name].memory.trees["was"] is params
        for buffer in got[name].message.trees["params"].buffers.values():
            assert buffer.ctypes.data % 64 == 0


def test_a_message_for_all_clients_is_sent_once_to_each_worker(monkeypatch):
    sent, send = [], Channel.send
    monkeypatch.setattr(Channel, "send", lambda *args: sent.append(send(*args)) or sent[-1])
    params = Tree({"w": np.zeros(10_000, np.float32)})
    executor = Processes(2, start="fork")
    executor.open(Echo(), toy_sites(NAMES), seed=SEED)
    for _ in range(2):
        jobs = [
            type(job)(job.task, Message(trees={"params": params}), job.memory) for job in toy_jobs(toy_sites(NAMES))
        ]
        executor.submit(jobs)
        assert len(list(executor.replies())) == len(NAMES)
    executor.close()
    assert len(sent) == 2 * len(NAMES) and sum(size > 40_000 for size in sent) == 2


def test_a_worker_forgets_trees_that_no_job_uses():
    executor = Processes(1, start="fork")
    executor.open(Echo(), toy_sites(["a"]), seed=SEED)
    for number in range(5):
        (job,) = toy_jobs(toy_sites(["a"]), number=number)
        executor.submit([job])
        list(executor.replies())
        (only,) = executor._pool._workers
        assert len(only.holds) == 1
    executor.close()


@dataclass(frozen=True)
class Dying(ToyAlgorithm):
    """Clients that kill their worker, as often as they are given lives."""

    how: str = "kill"
    folder: str = ""
    lives: int = 1
    dies: tuple[str, ...] = ("client-3",)

    def client_update(self, message, memory, env):
        marks = Path(self.folder) / env.client
        if env.client in self.dies and (deaths := len(marks.read_text()) if marks.exists() else 0) < self.lives:
            marks.write_text("x" * (deaths + 1))
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(3)
        return super().client_update(message, memory, env)


@pytest.mark.parametrize("start", ["forkserver", "spawn", "fork"])
def test_a_worker_that_dies_once_costs_nothing(tmp_path, start):
    jobs = toy_jobs(toy_sites(NAMES))
    wanted = answers(Loop(), jobs)
    got = answers(Processes(2, start=start), jobs, Dying(folder=str(tmp_path)))
    assert [difference(got[name], wanted[name]) for name in NAMES] == [""] * len(NAMES)
    assert (tmp_path / "client-3").read_text() == "x"


@pytest.mark.parametrize(
    ("start", "how", "said"),
    [
        ("forkserver", "kill", "was killed by SIGKILL"),
        ("forkserver", "exit", "exited with code 3"),
        ("spawn", "kill", "was killed by SIGKILL"),
        ("spawn", "exit", "exited with code 3"),
        ("fork", "kill", "was killed by SIGKILL"),
    ],
)
def test_a_client_that_kills_two_workers_has_failed_and_no_other(tmp_path, start, how, said):
    jobs = toy_jobs(toy_sites(NAMES), {"client-3": Message(numbers={"kept": 1.0})})
    algorithm = Dying(how=how, folder=str(tmp_path), lives=9, dies=("client-3", "client-7"))
    got = answers(Processes(2, start=start), jobs, algorithm)
    wanted = answers(Loop(), jobs)
    failed = {name: reply.error for name, reply in got.items() if reply.error is not None}
    assert sorted(failed) == ["client-3", "client-7"]
    assert all(error.kind == "WorkerDied" and said in error.message for error in failed.values())
    assert [(tmp_path / name).read_text() for name in failed] == ["xx", "xx"]
    assert got["client-3"].memory.numbers == {"kept": 1.0} and got["client-3"].message is None
    assert not any(difference(got[name], wanted[name]) for name in NAMES if name not in failed)


@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_workers_killed_while_idle_are_replaced(start):
    executor = Processes(2, start=start)
    sites = toy_sites(NAMES)
    executor.open(ToyAlgorithm(), sites, seed=SEED)
    for one in executor._pool._workers:
        os.kill(one.pid, signal.SIGKILL)
    executor.submit(toy_jobs(sites))
    assert sorted(reply.task.client for reply in executor.replies() if reply.error is None) == NAMES
    executor.close()


@pytest.mark.parametrize("workers_too", [True, False])
def test_a_killed_template_is_replaced_when_a_worker_is_needed(workers_too):
    executor = Processes(2, start="forkserver")
    sites = toy_sites(NAMES)
    executor.open(ToyAlgorithm(), sites, seed=SEED)
    os.kill(executor._pool._launcher._process.pid, signal.SIGKILL)
    for one in executor._pool._workers[not workers_too :]:
        os.kill(one.pid, signal.SIGKILL)
    executor.submit(toy_jobs(sites))
    assert sorted(reply.task.client for reply in executor.replies() if reply.error is None) == NAMES
    watched = [os.pidfd_open(one.pid) for one in executor._pool._workers]
    executor.close()
    assert all_ended(watched)


def test_a_hanging_worker_of_a_killed_template_is_ended(tmp_path):
    os.mkfifo(fifo := tmp_path / "fifo")
    executor, sites = Processes(1, start="forkserver"), toy_sites(["a"])
    executor.open(Hanging(fifo=str(fifo)), sites, seed=SEED)
    executor.submit(toy_jobs(sites))
    assert fifo.read_text() == "x"
    os.kill(executor._pool._launcher._process.pid, signal.SIGKILL)
    (pid,) = (one.pid for one in executor._pool._workers)
    watched = os.pidfd_open(pid)
    executor.close()
    assert all_ended([watched])


class CannotBeRebuilt(ToyModel):
    def __setstate__(self, state):
        raise OSError("the model file is gone")


@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_what_a_worker_cannot_rebuild_is_told_by_open(start):
    sites = toy_sites(["a", "b"])
    sites["b"] = type(sites["b"])("b", CannotBeRebuilt(), sites["b"].problem, sites["b"].train)
    with pytest.raises(UsageError, match="the model file is gone"):
        Processes(2, start=start).open(ToyAlgorithm(), sites, seed=SEED)


def test_what_cannot_be_sent_is_told_by_open_and_nothing_starts():
    sites = toy_sites(["a"])
    sites["a"].model.connection = threading.Lock()
    executor = Processes(2)
    with pytest.raises(UsageError, match="client 'a'"):
        executor.open(ToyAlgorithm(), sites, seed=SEED)
    executor.open(ToyAlgorithm(), toy_sites(["a"]), seed=SEED)
    executor.close()


def test_an_interpreter_that_does_not_start_is_told_by_open(monkeypatch):
    monkeypatch.setattr(launch, "_BOOT", "raise SystemExit(5)")
    with pytest.raises(RunError, match="exited with code 5"):
        Processes(1, start="spawn").open(ToyAlgorithm(), toy_sites(["a"]), seed=SEED)
    with pytest.raises(RunError, match="has ended"):
        Processes(1, start="forkserver").open(ToyAlgorithm(), toy_sites(["a"]), seed=SEED)


class Stuck(float):
    """A number like any other, until somebody wants to send it."""

    def __reduce__(self):
        raise TypeError("this number stays here")


@dataclass(frozen=True)
class Unsendable(ToyAlgorithm):
    def client_update(self, message, memory, env):
        return Message(numbers={"n": Stuck(1.0)}), memory
        yield


def test_an_answer_that_cannot_be_sent_is_the_clients_failure():
    got = answers(Processes(1), toy_jobs(toy_sites(["a"])), Unsendable(), ["a"])
    assert got["a"].error.client == "a" and got["a"].error.kind == "TypeError"


def test_a_broken_client_comes_with_its_last_lines():
    got = answers(Processes(1), toy_jobs(toy_sites(["a"])), ToyAlgorithm(broken=("a",)), ["a"])
    assert got["a"].error.lines[-1] == "ValueError: this client is broken"


def test_workers_compute_on_one_thread_whatever_the_driver_was_told(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    polyfed._one_thread()
    assert set(os.environ) <= set(launch.ONE_THREAD), "a driver with more threads would hand them on to its workers"


def test_bad_arguments_are_refused():
    with pytest.raises(UsageError, match="workers is 0"):
        Processes(0)
    with pytest.raises(UsageError, match="not open"):
        Processes(1).submit([])
    executor = Processes(1)
    executor.open(ToyAlgorithm(), toy_sites(["a"]), seed=SEED)
    with pytest.raises(UsageError, match="unknown client 'b'"):
        executor.submit(toy_jobs(toy_sites(["b"])))
    executor.close()


def test_an_executor_that_nobody_holds_ends_its_workers():
    executor = Processes(2)
    executor.open(ToyAlgorithm(), toy_sites(NAMES), seed=SEED)
    pids = [one.pid for one in executor._pool._workers]
    del executor
    gc.collect()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_fork_of_the_driver_leaves_the_workers_alone():
    executor, sites = Processes(1), toy_sites(["a"])
    executor.open(ToyAlgorithm(), sites, seed=SEED)
    pid = os.fork()
    if pid == 0:
        executor.close()
        os._exit(0)
    os.waitpid(pid, 0)
    (before,) = (one.pid for one in executor._pool._workers)
    executor.submit(toy_jobs(sites))
    assert [reply.error for reply in executor.replies()] == [None]
    assert [one.pid for one in executor._pool._workers] == [before]
    executor.close()


class StartsThread(ToyModel):
    def __setstate__(self, state):
        vars(self).update(state)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


def test_auto_forks_unless_a_library_has_threads_that_a_fork_would_lose(monkeypatch):
    def chosen(model):
        sites = toy_sites(["a"])
        sites["a"] = type(sites["a"])("a", model, sites["a"].problem, sites["a"].train)
        executor = Processes(1)
        executor.open(ToyAlgorithm(), sites, seed=SEED)
        executor.submit(toy_jobs(sites))
        assert [reply.error for reply in executor.replies()] == [None]
        try:
            return type(executor._pool._launcher)
        finally:
            executor.close()

    for name in THREADED:  # an earlier test of this process may have used it
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert chosen(ToyModel()) is launch.ForkServer
    assert chosen(StartsThread()) is launch.Spawn
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert chosen(ToyModel()) is launch.Spawn


@dataclass(frozen=True)
class Hanging(ToyAlgorithm):
    """Holds the interpreter's lock for ever once it has said so, and does not listen to SIGTERM."""

    fifo: str = ""

    def client_update(self, message, memory, env):
        import ctypes

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(self.fifo).write_text("x")
        ctypes.PyDLL(None).pause()
        yield


@pytest.mark.parametrize("start", ["forkserver", "spawn", "fork"])
def test_close_ends_a_worker_that_hangs(tmp_path, start, monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.05)
    os.mkfifo(fifo := tmp_path / "fifo")
    executor, sites = Processes(1, start=start), toy_sites(["a"])
    executor.open(Hanging(fifo=str(fifo)), sites, seed=SEED)
    executor.submit(toy_jobs(sites))
    assert fifo.read_text() == "x"
    (pid,) = (one.pid for one in executor._pool._workers)
    executor.close()
    assert not Path(f"/proc/{pid}").exists()


# Whole programs: what a user's own script may do.

MODEL_IN_MAIN = """
    import os, signal, sys, time
    from polyfed.core.checks_executor import ToyAlgorithm, ToyModel, toy_jobs, toy_sites
    from polyfed.executors.processes import Processes

    class Mine(ToyModel):
        def fit(self, request, rows, env):
            return act(lambda: ToyModel.fit(self, request, rows, env))

    class MyAlgorithm(ToyAlgorithm):
        pass

    def federation(start="auto"):
        sites = toy_sites(["a", "b", "c"])
        sites = {n: type(s)(n, Mine(), s.problem, s.train) for n, s in sites.items()}
        executor = Processes(2, start=start)
        executor.open(MyAlgorithm(), sites, seed=1)
        executor.submit(toy_jobs(sites))
        return executor
"""


def program(text):
    return textwrap.dedent(MODEL_IN_MAIN) + textwrap.dedent(text)


def run(arguments, **more):
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments], capture_output=True, text=True, timeout=60, **more
    )


PLAIN = """
    print("main runs")
    def act(do):
        print("client prints")
        sys.stderr.write("client warns\\n")
        return do()
    executor = federation(START)
    print(sorted((reply.task.client, reply.error) for reply in executor.replies()))
"""


@pytest.mark.parametrize(
    ("form", "start"), [("script", "auto"), ("script", "spawn"), ("script", "fork"), ("-c", "auto"), ("stdin", "auto")]
)
def test_a_program_without_a_main_guard_runs_once_and_its_clients_print_to_stderr(tmp_path, start, form):
    text = program(PLAIN).replace("START", repr(start))
    (tmp_path / "script.py").write_text(text)
    arguments = {"script": ["script.py"], "-c": ["-c", text], "stdin": ["-"]}[form]
    done = run(arguments, cwd=tmp_path, input=text if form == "stdin" else "")
    assert done.stdout == "main runs\n[('a', None), ('b', None), ('c', None)]\n", done.stderr
    assert sorted(done.stderr.split("\n")) == ["", *["client prints"] * 3, *["client warns"] * 3]
    assert done.returncode == 0


SLOW = """
    def act(do):
        with open(FIFO, "w") as fifo:
            fifo.write(str(os.getpid()) + " ")
        signal.pause()
    executor = federation(START)
    for reply in executor.replies():
        pass
"""


def busy_program(tmp_path, start):
    """A driver whose two workers are in the middle of a client's work; it, and their process ids."""
    os.mkfifo(fifo := tmp_path / "fifo")
    text = program(SLOW).replace("START", repr(start)).replace("FIFO", repr(str(fifo)))
    command = [sys.executable, "-W", "error", "-c", text]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    pids = set()
    while len(pids) < 2:
        pids |= {int(pid) for pid in fifo.read_text().split()}
    return driver, pids


@pytest.mark.parametrize("start", ["forkserver", "spawn", "fork"])
def test_control_c_ends_the_driver_and_its_workers_with_one_traceback(tmp_path, start):
    driver, pids = busy_program(tmp_path, start)
    watched = [os.pidfd_open(pid) for pid in pids]
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, said = driver.communicate(timeout=5)
    assert said.count("Traceback") == 1 and said.rstrip().endswith("KeyboardInterrupt")
    assert all_ended(watched)


@pytest.mark.parametrize("start", ["forkserver", "spawn", "fork"])
def test_workers_end_when_the_driver_is_killed(tmp_path, start):
    driver, pids = busy_program(tmp_path, start)
    watched = [os.pidfd_open(pid) for pid in pids]
    driver.kill()
    _, said = driver.communicate(timeout=5)
    assert said == ""
    assert all_ended(watched)


def all_ended(watched):
    try:
        return all(select.select([one], [], [], 5)[0] for one in watched)
    finally:
        for one in watched:
            os.close(one)
