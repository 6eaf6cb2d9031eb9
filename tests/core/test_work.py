from dataclasses import replace

import pytest

from polyfed.core.checks_executor import SEED, ToyAlgorithm, toy_jobs, toy_sites
from polyfed.core.errors import ClientError
from polyfed.core.message import Message
from polyfed.core.work import LAST_LINES, failure, perform, scores


def job_for(kind="train", **task):
    sites = toy_sites(["a"])
    (job,) = toy_jobs(sites)
    return sites["a"], replace(job, task=replace(job.task, kind=kind, **task))


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_an_evaluate_task_uses_the_rows_that_it_names(part):
    site, job = job_for("evaluate", part=part)
    reply = perform(ToyAlgorithm(), site, job, seed=SEED)
    assert reply.message.numbers["num_examples"] == len(getattr(site, part))
    assert reply.memory is job.memory


def test_an_evaluate_task_is_about_validation_rows_unless_it_says_otherwise():
    site, job = job_for("evaluate")
    assert len(site.validation) != len(site.test)
    assert perform(ToyAlgorithm(), site, job, seed=SEED).message.numbers["num_examples"] == len(site.validation)


def test_a_client_without_such_rows_has_no_metrics():
    site, job = job_for("evaluate", part="test")
    reply = perform(ToyAlgorithm(), replace(site, test=None), job, seed=SEED)
    assert reply.message == Message(numbers={"num_examples": 0.0}) and reply.error is None


def test_a_task_done_twice_gives_the_same_bits_and_another_number_others():
    site, job = job_for()
    first, again = (perform(ToyAlgorithm(), site, job, seed=SEED).message for _ in range(2))
    other = perform(ToyAlgorithm(), site, replace(job, task=replace(job.task, number=5)), seed=SEED).message
    assert first.trees["params"] == again.trees["params"] != other.trees["params"]


@pytest.mark.parametrize(("algorithm", "kind"), [({"broken": ("a",)}, "ValueError"), ({"quits": ("a",)}, "SystemExit")])
def test_what_client_code_raises_is_in_the_reply_and_its_memory_is_kept(algorithm, kind):
    site, job = job_for()
    job = replace(job, memory=Message(numbers={"kept": 1.0}))
    reply = perform(ToyAlgorithm(**algorithm), site, job, seed=SEED)
    assert (reply.error.client, reply.error.kind, reply.message) == ("a", kind, None)
    assert reply.memory is job.memory and len(reply.error.lines) <= LAST_LINES


def test_a_keyboard_interrupt_is_nobodys_failure():
    class Interrupted(ToyAlgorithm):
        def client_update(self, message, memory, env):
            raise KeyboardInterrupt

    site, job = job_for()
    with pytest.raises(KeyboardInterrupt):
        perform(Interrupted(), site, job, seed=SEED)


def test_a_client_error_stays_as_it_is():
    error = ClientError("a", "Kind", "message", ("line",))
    assert failure("b", error) is error


def deep(levels):
    return 1 / 0 if levels == 0 else deep(levels - 1)


def raised(function, *args):
    try:
        function(*args)
    except Exception as error:  # noqa: BLE001  # whatever it is
        return error
    raise AssertionError("nothing was raised")


def test_the_last_lines_are_whole_frames_without_marks_that_end_in_the_exception():
    lines = failure("a", raised(deep, 40)).lines
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert lines[0].startswith('  File "') and len(lines) <= LAST_LINES
    assert not [line for line in lines if not line.strip(" ^~")]


def test_the_last_lines_hold_the_users_frames_and_none_of_our_own():
    lines = failure("a", raised(scores, None, (), None, None)).lines
    assert [line for line in lines if line.startswith("  File")] == [lines[0]] and "test_work.py" in lines[0]
    assert "work.py" not in "".join(lines).replace("test_work.py", "")


def test_the_last_lines_of_a_long_message_hold_its_end():
    lines = failure("a", raised(lambda: (_ for _ in ()).throw(ValueError("\n".join(map(str, range(50))))))).lines
    assert len(lines) <= LAST_LINES and lines[-1] == "49"
