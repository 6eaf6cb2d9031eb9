import pytest

from polyfed.core.checks_executor import SEED, ToyAlgorithm, check_executor, toy_jobs, toy_sites
from polyfed.core.errors import UsageError
from polyfed.executors.loop import Loop


def test_loop_keeps_the_contract():
    check_executor(Loop)


def test_replies_come_in_the_order_of_the_jobs_and_each_is_done_when_asked_for():
    done = []

    class Watched(ToyAlgorithm):
        def client_update(self, message, memory, env):
            done.append(env.client)
            return super().client_update(message, memory, env)

    sites, loop = toy_sites(["c", "a", "b"]), Loop()
    loop.open(Watched(), sites, seed=SEED)
    loop.submit(toy_jobs(sites))
    assert done == []
    names = [(reply.task.client, len(done)) for reply in loop.replies()]
    assert names == [("c", 1), ("a", 2), ("b", 3)]


def test_submit_before_open_or_after_close_is_refused():
    sites, loop = toy_sites(["a"]), Loop()
    with pytest.raises(UsageError, match="not open"):
        loop.submit(toy_jobs(sites))
    loop.open(ToyAlgorithm(), sites, seed=SEED)
    loop.close()
    with pytest.raises(UsageError, match="not open"):
        loop.submit(toy_jobs(sites))


def test_submit_for_an_unknown_client_names_it():
    loop = Loop()
    loop.open(ToyAlgorithm(), toy_sites(["a"]), seed=SEED)
    with pytest.raises(UsageError, match=r"unknown client 'b'.*a"):
        loop.submit(toy_jobs(toy_sites(["b"])))


def test_a_keyboard_interrupt_in_client_code_reaches_the_caller():
    class Interrupted(ToyAlgorithm):
        def client_update(self, message, memory, env):
            raise KeyboardInterrupt

    sites, loop = toy_sites(["a"]), Loop()
    loop.open(Interrupted(), sites, seed=SEED)
    loop.submit(toy_jobs(sites))
    with pytest.raises(KeyboardInterrupt):
        list(loop.replies())
