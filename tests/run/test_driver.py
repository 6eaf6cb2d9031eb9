"""The simulation's driver where a person has a hand in it: steps left out, a clock that stops and goes on."""

from dataclasses import dataclass

import numpy as np
import pytest

import polyfed as pf
from polyfed.core.checks_executor import ToyModel
from polyfed.run.driver import Driver

RNG = np.random.default_rng(0)
ROWS = {name: (RNG.normal(size=(40, 3)).astype(np.float32), np.arange(40) % 2) for name in ("north", "south", "west")}


def clients():
    return [pf.Client(name, ToyModel(), data=rows) for name, rows in ROWS.items()]


def run(step):
    loop = pf.rounds(pf.FedAvg(), clients(), rounds=2, seed=0)
    for round_ in loop:
        step(round_)
    return loop.result


def all_steps(round_):
    for reply in round_.train(round_.send()):
        round_.collect(reply)
    round_.update()


def no_step(round_):
    del round_


def send_only(round_):
    round_.send()


def train_two_of_three(round_):
    for reply in round_.train(round_.send()[:2]):
        round_.collect(reply)


def train_and_collect_nothing(round_):
    list(round_.train(round_.send()))


@dataclass(frozen=True)
class Counting(pf.FedAvg):
    """Each client counts its rounds in its memory; south fails in its first two tasks."""

    def client_update(self, message, memory, env):
        if env.client == "south" and env.number < 2:
            raise ValueError("not yet")
        update, memory = yield from super().client_update(message, memory, env)
        return update, memory.put(numbers={"rounds": memory.numbers.get("rounds", 0.0) + 1.0})


@pytest.mark.parametrize("checkpoint", [False, True])
def test_memories_of_a_round_that_was_abandoned_do_not_count(tmp_path, checkpoint):
    folder = tmp_path if checkpoint else None
    schedule = pf.Sync(minimum=3)
    result = pf.simulate(Counting(), clients(), rounds=2, schedule=schedule, checkpoint=folder, baselines=())
    assert {name: memory.numbers["rounds"] for name, memory in result.memories.items()} == dict.fromkeys(ROWS, 2.0)


@pytest.mark.parametrize("step", [no_step, send_only, train_two_of_three, train_and_collect_nothing])
def test_step_of_a_round_that_is_not_taken_is_taken_for_you(step):
    taken, left = run(all_steps), run(step)
    assert left.state.digest == taken.state.digest
    assert [log.accepted for log in left.history] == [log.accepted for log in taken.history]


def test_time_of_a_run_that_is_resumed_goes_on_where_it_stood(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(Driver.__init__, "__kwdefaults__", {**Driver.__init__.__kwdefaults__, "clock": lambda: now[0]})
    first = pf.rounds(pf.FedAvg(), clients(), rounds=3, seed=0, checkpoint=tmp_path)
    for round_ in first:
        now[0] += 50.0
        round_.update()
        break
    now[0] = 7.0
    again = pf.rounds(pf.FedAvg(), clients(), rounds=3, seed=0, checkpoint=tmp_path)
    for round_ in again:
        now[0] += 1.0
        round_.update()
    assert [log.seconds for log in again.result.history] == [50.0, 51.0, 52.0]


BAD = {
    "a number's name": {"numbers": {3: 1.0}},
    "a line break in a name": {"numbers": {"a\nb": 1.0}},
    "a text that is none": {"text": {"hello": 3}},
    "a tree's name": {"trees": {"a/b": pf.Tree({"w": np.zeros(1, np.float32)})}},
}


@dataclass(frozen=True)
class Odd(pf.FedAvg):
    """South's answer, or its memory, has no form on the wire."""

    bad: str = "a number's name"
    in_memory: bool = False

    def client_update(self, message, memory, env):
        update, memory = yield from super().client_update(message, memory, env)
        if env.client != "south":
            return update, memory
        return (update, memory.put(**BAD[self.bad])) if self.in_memory else (update.put(**BAD[self.bad]), memory)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_answer_that_has_no_form_on_the_wire_leaves_its_client_out_and_no_other(tmp_path, bad, in_memory, checkpoint):
    folder = tmp_path if checkpoint else None
    result = pf.simulate(Odd(bad=bad, in_memory=in_memory), clients(), rounds=1, checkpoint=folder, baselines=())
    assert result.history[0].accepted == ("north", "west")
    assert "no form on the wire" in result.history[0].left_out["south"]


def test_alone_starts_from_the_given_state_as_the_federation_does():
    """Otherwise a head start would be taken for what joining gave."""
    trained = pf.simulate(pf.FedAvg(), clients(), rounds=30, seed=0, baselines=())
    few = pf.simulate(pf.FedAvg(initial=trained), clients(), rounds=1, seed=0)
    fresh = pf.simulate(pf.FedAvg(), clients(), rounds=1, seed=0)
    assert few.baselines["alone"] != fresh.baselines["alone"]
    lone = [pf.Client("north", ToyModel(), data=ROWS["north"])]
    result = pf.simulate(pf.FedAvg(initial=trained), lone, rounds=1, seed=0)
    assert result.baselines["alone"]["north"]["loss"] == pytest.approx(result.test["north"]["loss"], rel=1e-5)


def test_checkpoint_that_cannot_be_read_says_so_and_is_not_locked_afterwards(tmp_path):
    pf.simulate(pf.FedAvg(), clients(), rounds=1, checkpoint=tmp_path, baselines=())
    said = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(said[:40])
    with pytest.raises(pf.errors.CorruptError, match=r"run\.json cannot be read back"):
        pf.simulate(pf.FedAvg(), clients(), rounds=1, checkpoint=tmp_path, baselines=())
    (tmp_path / "run.json").write_text(said)
    journal = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(journal[:20] + b"!" + journal[21:])
    with pytest.raises(pf.errors.CorruptError):
        pf.simulate(pf.FedAvg(), clients(), rounds=1, checkpoint=tmp_path, baselines=())
    (tmp_path / "journal").write_bytes(journal)
    again = pf.simulate(pf.FedAvg(), clients(), rounds=1, checkpoint=tmp_path, baselines=())
    assert len(again.history) == 1
