"""The coordinator by itself: messages in, actions out, no driver, no clock, no model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from polyfed.core.aggregate import Aggregate, UpdatePolicy
from polyfed.core.algorithm import Algorithm, Env
from polyfed.core.coordinator import Coordinator, Federation
from polyfed.core.errors import StorageError
from polyfed.core.events import Compute, Failed, Finish, Receipt, Refused, Restarted, Send
from polyfed.core.message import Message, State
from polyfed.core.records import ACCEPTED, Phase
from polyfed.core.round import Rules
from polyfed.core.rows import Problem
from polyfed.core.schedule import Buffered, Sync
from polyfed.core.stop import NoImprovement, Rounds
from polyfed.core.tree import Tree
from polyfed.storage.blobs import MemoryBlobs
from polyfed.storage.journal import MemoryJournal

PROBLEM = Problem(("no", "yes"), 2)


@dataclass(frozen=True)
class Mean(Algorithm):
    """Adds the weighted mean of what clients send, or their sum divided by a constant."""

    by_sum: bool = False

    def init(self, env: Env) -> State:
        return Message({"params": Tree({"w": np.zeros(2, np.float32)})})

    def weight(self, numbers: Mapping[str, float], lag: int, tree: str) -> float:
        return numbers["num_examples"] / (1 + lag)

    def server_update(self, state: State, aggregate: Aggregate, env: Env) -> State:
        step = aggregate.sum("params") * 0.1 if self.by_sum else aggregate.mean("params")
        return state.put(trees={"params": state.trees["params"] + step})


def update(*values, rows=1.0):
    return Message({"params": Tree({"w": np.array(values, np.float32)})}, {"num_examples": rows})


def coordinator(clients=("a", "b"), *, algorithm=None, store=None, stop=None, policy=None, evaluate=0, **schedule):
    rules = Rules(schedule=schedule.get("schedule") or Sync(**schedule), evaluate_every=evaluate, test=False)
    more = {} if policy is None else {"policy": policy}
    federation = Federation(algorithm or Mean(), PROBLEM, rules, stop or Rounds(3), **more)
    made = Coordinator(federation, **({} if store is None else {"journal": store[0], "blobs": store[1]}))
    return made, made.begin(clients)


def tasks(actions):
    return {action.task.client: action.task for action in actions if isinstance(action, Send)}


def last(actions, kind):
    return [action for action in actions if isinstance(action, kind)][-1]


def finish_round(made, sent, updates):
    """Hands in updates, computes and judges; returns what comes next."""
    actions = []
    for client, task in sent.items():
        actions = made.upload(0.0, client, task.receipt, updates[client])
    actions = made.handle(made.compute(last(actions, Compute), at=0.0))
    return made.handle(made.compute(last(actions, Compute), at=0.0))


def weights(made):
    return made.final.trees["params"]["w"].tolist()


def test_round_of_two_clients_adds_their_weighted_mean():
    made, actions = coordinator()
    finish_round(made, tasks(actions), {"a": update(1, 0, rows=3.0), "b": update(0, 4, rows=1.0)})
    assert weights(made) == [0.75, 1.0]
    assert made.history[0].accepted == ("a", "b")
    assert made.history[0].update_norm == pytest.approx(1.25)


def test_upload_that_is_not_finite_is_refused_by_name_and_the_round_goes_on():
    made, actions = coordinator()
    sent = tasks(actions)
    said = last(made.upload(0.0, "a", sent["a"].receipt, update(np.nan, 0)), Receipt)
    assert said.verdict.startswith("params/w: ")
    actions = made.upload(0.0, "b", sent["b"].receipt, update(0, 2))
    made.handle(made.compute(last(actions, Compute), at=0.0))
    assert weights(made) == [0.0, 2.0]
    assert made.state.left_out == {"a": said.verdict}


def test_upload_twice_counts_once_and_is_answered_the_same():
    made, actions = coordinator()
    sent = tasks(actions)
    first = made.upload(0.0, "a", sent["a"].receipt, update(1, 1))
    again = made.upload(0.0, "a", sent["a"].receipt, update(100, 100))
    assert last(first, Receipt) == last(again, Receipt)
    assert last(again, Receipt).verdict == ACCEPTED
    actions = made.upload(0.0, "b", sent["b"].receipt, update(1, 1))
    made.handle(made.compute(last(actions, Compute), at=0.0))
    assert weights(made) == [1.0, 1.0]


def test_upload_under_another_clients_receipt_changes_nothing():
    made, actions = coordinator()
    sent = tasks(actions)
    said = last(made.upload(0.0, "b", sent["a"].receipt, update(9, 9)), Receipt)
    assert "another client" in said.verdict
    assert not made.state.taken


def test_shares_are_capped_over_the_whole_cohort():
    made, actions = coordinator(("a", "b", "c"), policy=UpdatePolicy(max_share=0.5))
    sent = {"a": update(1, 0, rows=98.0), "b": update(0, 1, rows=1.0), "c": update(0, 1, rows=1.0)}
    finish_round(made, tasks(actions), sent)
    assert weights(made) == [0.5, 0.5]


def test_staleness_lowers_the_weight_with_a_cap_as_without_one():
    """A lagging update moves the model by its lower weight (sum over a constant), also where shares are capped."""
    for policy in (UpdatePolicy(), UpdatePolicy(max_share=1.0)):
        schedule = Buffered(concurrency=2, goal=1)
        made, actions = coordinator(algorithm=Mean(by_sum=True), schedule=schedule, policy=policy)
        (fast, quick), (slow, stale) = tasks(actions).items()
        finish_round(made, {fast: quick}, {fast: update(0, 10)})
        before = weights(made)
        actions = made.upload(0.0, slow, stale.receipt, update(10, 0))
        made.handle(made.compute(last(actions, Compute), at=0.0))
        assert made.state.taken[0].lag == 1
        assert (np.array(weights(made)) - before).tolist() == [0.5, 0.0]


def test_buffer_of_all_clients_is_their_round_when_nothing_is_stale():
    """Invariant 12; later buffers may hold one client twice, as who is done is asked again."""
    sent = {"a": update(1, 0, rows=2.0), "b": update(0, 4, rows=1.0), "c": update(2, 2, rows=1.0)}
    for schedule in (Sync(), Buffered(concurrency=3, goal=3)):
        made, actions = coordinator(("a", "b", "c"), schedule=schedule)
        finish_round(made, tasks(actions), sent)
        assert weights(made) == [1.0, 1.5]


def test_abandoned_round_keeps_nothing_of_its_uploads():
    made, actions = coordinator(minimum=2)
    sent = tasks(actions)
    made.upload(0.0, "a", sent["a"].receipt, update(1, 1))
    actions = made.handle(Failed(0.0, "b", sent["b"].receipt, "gone"))
    assert made.state.round_num == 1
    assert tasks(actions)["a"].receipt != sent["a"].receipt
    assert not made._uploads


def test_server_update_that_raises_ends_the_run_in_a_sentence():
    @dataclass(frozen=True)
    class Broken(Mean):
        def server_update(self, state, aggregate, env):
            raise ValueError("no such luck")

    made, actions = coordinator(algorithm=Broken())
    for client, task in tasks(actions).items():
        actions = made.upload(0.0, client, task.receipt, update(1, 1))
    finish = last(made.handle(made.compute(last(actions, Compute), at=0.0)), Finish)
    assert finish.failed
    assert "Broken" in finish.reason
    assert "no such luck" in finish.reason


def test_next_state_that_is_not_finite_ends_the_run():
    @dataclass(frozen=True)
    class Exploding(Mean):
        def server_update(self, state, aggregate, env):
            return state.put(trees={"params": state.trees["params"].map(lambda a: a + np.float32(np.inf))})

    made, actions = coordinator(algorithm=Exploding())
    for client, task in tasks(actions).items():
        actions = made.upload(0.0, client, task.receipt, update(1, 1))
    finish = last(made.handle(made.compute(last(actions, Compute), at=0.0)), Finish)
    assert finish.failed
    assert "not finite in params" in finish.reason


@dataclass(frozen=True)
class Scatter(Mean):
    """Clients send one number; it is scattered over the first entry before the fold."""

    def expects(self, sent, env):
        return {"params": Tree({"part": np.zeros(1, np.float32)}).spec}

    def receive(self, sent, message, env):
        assert sent.trees["params"].spec["w"].shape == (2,)
        whole = np.array([message.trees["params"]["part"][0], 0], np.float32)
        return message.put(trees={"params": Tree({"w": whole})})


def test_receive_comes_between_the_check_and_the_fold():
    made, actions = coordinator(algorithm=Scatter())
    part = Message({"params": Tree({"part": np.array([3], np.float32)})}, {"num_examples": 1.0})
    finish_round(made, tasks(actions), {"a": part, "b": part})
    assert weights(made) == [3.0, 0.0]


class FullDisk(MemoryJournal):
    """Fails once, at the given append."""

    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.left = fails_at

    def append(self, records):
        self.left -= 1
        if self.left == 0:
            raise StorageError("no space left")
        super().append(records)


@pytest.mark.parametrize("fails_at", range(1, 9))
def test_journal_that_fails_changes_nothing_and_the_event_may_be_handed_in_again(fails_at):
    def once(handle):
        try:
            return handle()
        except StorageError:
            return handle()

    plain, actions = coordinator()
    finish_round(plain, tasks(actions), {"a": update(1, 2), "b": update(3, 4)})
    store = (FullDisk(10**6), MemoryBlobs())
    made, actions = coordinator(store=store)
    store[0].left = fails_at
    for client, task in tasks(actions).items():
        actions = once(lambda c=client, t=task: made.upload(0.0, c, t.receipt, update(*{"a": (1, 2), "b": (3, 4)}[c])))
    event = made.compute(last(actions, Compute), at=0.0)
    actions = once(lambda: made.handle(event))
    judged = made.compute(last(actions, Compute), at=0.0)
    once(lambda: made.handle(judged))
    assert weights(made) == weights(plain)
    assert [log.round_num for log in made.history] == [1]


@dataclass
class Walk:
    """A run of three rounds with evaluation, over a store, cut after a given number of driver steps and resumed."""

    stop: object = field(default_factory=lambda: Rounds(3))
    store: tuple = field(default_factory=lambda: (MemoryJournal(), MemoryBlobs()))

    def run(self, cut=None):
        made, actions = coordinator(store=self.store, evaluate=1, stop=self.stop)
        queue, steps = list(actions), 0
        while queue:
            if steps == cut:
                made = Coordinator.resume(made.federation, *self.store)
                queue = list(made.handle(Restarted(0.0)))
            steps += 1
            action = queue.pop(0)
            if isinstance(action, Send):
                queue += made.upload(0.0, action.task.client, action.task.receipt, self.answer(action.task))
            elif isinstance(action, Compute):
                queue += made.handle(made.compute(action, at=0.0))
            elif isinstance(action, Finish):
                return made, steps
        raise AssertionError("the run did not end")

    def answer(self, task):
        if task.kind == "evaluate":
            return Message(numbers={"num_examples": 4.0, "accuracy": {1: 0.5, 2: 0.9, 3: 0.6}[task.version]})
        return update(task.round_num, task.number, rows=2.0 if task.client == "a" else 1.0)


@pytest.mark.parametrize("stop", [Rounds(3), Rounds(3) | NoImprovement("accuracy", patience=1, roll_back=True)])
def test_run_that_is_resumed_at_any_step_ends_with_the_same_bits_and_history(stop):
    whole, steps = Walk(stop).run()
    assert whole.state.phase is Phase.DONE
    for cut in range(1, steps):
        resumed, _ = Walk(stop).run(cut)
        assert resumed.final.digest == whole.final.digest
        assert resumed.state.version == whole.state.version
        assert [(log.round_num, log.metrics, log.update_norm) for log in resumed.history] == [
            (log.round_num, log.metrics, log.update_norm) for log in whole.history
        ]
        assert resumed.receipts == whole.receipts


def test_roll_back_ends_with_the_best_version():
    made, _ = Walk(Rounds(3) | NoImprovement("accuracy", patience=1, roll_back=True)).run()
    assert made.state.version == 2
    assert "best 0.9 at round 2" in made.state.ending


def test_refusals_are_events_like_others():
    made, actions = coordinator()
    made.trace = []
    made.upload(0.0, "a", tasks(actions)["a"].receipt, Message())
    assert isinstance(made.trace[0][0], Refused)


@dataclass(frozen=True)
class Started(Mean):
    def init(self, env):
        return Message({"params": Tree({"w": np.array([0.5, -1.0], np.float32)})})


def test_update_of_a_client_whose_training_exploded_is_refused_and_does_not_take_the_others_with_it():
    made, actions = coordinator(algorithm=Started())
    sent = tasks(actions)
    said = last(made.upload(0.0, "a", sent["a"].receipt, update(0, 3e8)), Receipt)
    assert said.verdict == "params/w: value at [1] is 300000000.0; every value is finite and at most 1e+06 in size"
    actions = made.upload(0.0, "b", sent["b"].receipt, update(1, 1))
    made.handle(made.compute(last(actions, Compute), at=0.0))
    assert weights(made) == [1.5, 0.0]


def test_first_update_of_parameters_that_are_all_zero_may_have_any_size_that_the_policy_allows():
    made, actions = coordinator()
    assert last(made.upload(0.0, "a", tasks(actions)["a"].receipt, update(0, 3e8)), Receipt).verdict == ACCEPTED
