"""`simulate(..., checkpoint=DIR)`: killed anywhere and called again, it ends with the bits of a run that nobody killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import killing
import kinds
import numpy as np
import pytest

import polyfed as pf
from polyfed.core.errors import CorruptError, StorageError
from polyfed.executors.loop import Loop

HELPER = Path(killing.__file__)


def started(*words):
    env = os.environ | {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, words)], env=env, capture_output=True, text=True, check=False)


def resumed(name, folder, points):
    done = started(HELPER, name, folder, json.dumps(points))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"][0] != "failed", found["whole"][1]
    return found


def check(found):
    assert found["journalled"] == found["whole"], "a checkpoint changes the run that writes it"
    assert found["again"] == found["whole"], "a finished checkpoint gives another result when it is called again"
    assert found["resumed"]
    for point, was_killed, outcome in found["resumed"]:
        assert was_killed, f"{point} was not passed"
        assert outcome[0] != "failed", f"killed at {point}: {outcome[1]}"
        assert outcome == found["whole"], f"killed at {point}, the run ended otherwise"


@pytest.mark.parametrize(("name", "nth"), [("personal", 23), ("server state", 31)])
def test_resume_when_killed_at_some_points_gives_the_same_bits(tmp_path, name, nth):
    check(resumed(name, tmp_path, nth))


def test_resume_when_private_models_of_three_frameworks_were_at_work_gives_the_same_bits(tmp_path):
    points = [["request", 7, "before"], ["upload", 5, "after"], ["compute", 3, "before"], ["journal", 20, "torn"]]
    check(resumed("different", tmp_path, points))


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "nth"), [("personal", 4), ("server state", 6), ("different", 12)])
def test_resume_when_killed_at_many_points_gives_the_same_bits(tmp_path, name, nth):
    check(resumed(name, tmp_path, nth))


def test_resume_when_killed_again_and_again_in_fresh_interpreters_gives_the_same_bits(tmp_path):
    once = "import sys, json, killing; print(json.dumps(killing.killed(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))"
    words = ["-c", f"import sys; sys.path.insert(0, {str(HELPER.parent)!r}); {once}", "trivial"]
    for number in (9, 5, 2):
        killed = started(*words, tmp_path / "run", json.dumps(["journal", number, "after"]))
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    last = started(*words, tmp_path / "run", "null")
    whole = started(*words, tmp_path / "other", "null")
    assert whole.returncode == 0, whole.stderr[-4000:]
    assert json.loads(last.stdout) == json.loads(whole.stdout)


# ---------------------------------------------------------------- a checkpoint belongs to one run


def bayes(**more):
    return kinds.run(kinds.trivial(), **more)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 12}, "seed"),
        ({"rounds": 3}, "when to stop"),
        ({"algorithm": pf.FedAvg(weighting="uniform")}, "algorithm"),
        ({"schedule": pf.Sync(block=3)}, "schedule"),
        ({"evaluate_every": 0}, "evaluation"),
    ],
)
def test_checkpoint_when_it_is_of_another_run_is_refused(tmp_path, change, said):
    bayes(checkpoint=tmp_path)
    with pytest.raises(StorageError, match=rf"another run: .*{said}.* differs; use another folder"):
        bayes(**{"checkpoint": tmp_path} | change)


def test_checkpoint_when_one_value_of_one_row_differs_is_refused(tmp_path):
    settings = kinds.trivial()
    kinds.run(settings, checkpoint=tmp_path)
    client = settings["clients"][2]
    x, _ = client.data
    x[3, 1] = np.nextafter(x[3, 1], 9, dtype=x.dtype)
    with pytest.raises(StorageError, match="the clients, their models' settings or their rows differs"):
        kinds.run(settings, checkpoint=tmp_path)


def test_checkpoint_when_a_function_is_among_the_settings_is_taken_up_again(tmp_path):
    def half(number):
        return {"north", "west", "east"} if number % 2 else {"south", "centre"}

    first = bayes(checkpoint=tmp_path, schedule=pf.Sync(select=pf.Available(None, lambda number: half(number))))
    again = bayes(checkpoint=tmp_path, schedule=pf.Sync(select=pf.Available(None, lambda number: half(number))))
    assert kinds.digest_of(again) == kinds.digest_of(first)


def test_checkpoint_when_its_journal_is_damaged_says_so(tmp_path):
    bayes(checkpoint=tmp_path)
    path = tmp_path / "journal"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="the journal is damaged"):
        bayes(checkpoint=tmp_path)


@pytest.mark.parametrize("part", ["blobs", "memories"])
def test_checkpoint_when_a_file_of_it_is_damaged_says_so(tmp_path, part):
    settings = kinds.personal() | {"rounds": 1, "stop": None, "evaluate_every": 0, "test": False}
    kinds.run(settings, checkpoint=tmp_path)
    for path in (tmp_path / part).iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError):
        kinds.run(settings, checkpoint=tmp_path)


def test_checkpoint_when_the_folder_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        bayes(checkpoint=tmp_path / "file" / "run")


def test_checkpoint_when_the_run_is_long_does_not_grow_by_its_uploads(tmp_path):
    def files(rounds):
        settings = kinds.personal() | {"rounds": rounds, "stop": None, "evaluate_every": 0}
        kinds.run(settings, checkpoint=tmp_path / str(rounds))
        return [len(list((tmp_path / str(rounds) / part).iterdir())) for part in ("blobs", "memories")]

    (blobs, memories), (more_blobs, more_memories) = files(4), files(9)
    assert more_blobs == blobs + 5, "of a round nothing but its entry in the history may stay"
    assert max(memories, more_memories) <= len(kinds.SIZES)


# ---------------------------------------------------------------- ends that are no kill


class Interrupted:
    """The loop, in which somebody presses Ctrl-C at one reply."""

    def __init__(self, at):
        self.loop, self.at = Loop(), at
        self.submit, self.open, self.close = self.loop.submit, self.loop.open, self.loop.close

    def replies(self):
        for reply in self.loop.replies():
            self.at -= 1
            if not self.at:
                raise KeyboardInterrupt
            yield reply


@pytest.mark.parametrize("at", [2, 6, 8, 12])
def test_checkpoint_when_interrupted_is_taken_up_by_the_same_call(tmp_path, at):
    whole = kinds.run(kinds.personal())
    first = kinds.run(kinds.personal(), checkpoint=tmp_path, executor=Interrupted(at))
    assert (first.reason, first.interrupted) == ("interrupted", True)
    second = kinds.run(kinds.personal(), checkpoint=tmp_path)
    assert kinds.digest_of(second) == kinds.digest_of(whole)
    assert kinds.said_of(second) == kinds.said_of(whole)


def test_checkpoint_when_the_open_loop_is_left_is_taken_up_by_simulate(tmp_path):
    settings = kinds.personal()
    settings.pop("baselines")
    for round_ in pf.rounds(**settings, checkpoint=tmp_path):
        if round_.number == 2:
            break
    whole, second = (
        kinds.run(kinds.personal()),
        kinds.run(kinds.personal(), checkpoint=tmp_path),
    )
    assert kinds.digest_of(second) == kinds.digest_of(whole)
