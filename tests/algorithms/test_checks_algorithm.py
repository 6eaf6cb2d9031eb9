"""The public checks notice what they promise to notice: a broken algorithm or rule for every one of them."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy_model import NumpyModel, sites_of

from polyfed.algorithms import FedAvg
from polyfed.core.algorithm import Fit, Needs
from polyfed.core.checks_algorithm import ALGORITHM_CHECKS, Case, check_aggregator, check_algorithm
from polyfed.core.message import Message
from polyfed.core.tree import Tree

COUNT = {"calls": 0}


def drift():
    COUNT["calls"] += 1
    return float(COUNT["calls"])


@dataclass(frozen=True)
class Broken(FedAvg):
    """FedAvg with one promise broken."""

    promise: str = ""

    @property
    def needs(self):
        return Needs.all("params", "sgd", "public", "telepathy") if self.promise == "needs" else Needs.all("params")

    def breaks(self, promise):
        return self.promise == promise

    def init(self, env):
        return super().init(env).put(numbers={"n": drift()} if self.breaks("init") else {})

    def broadcast(self, state, client, env):
        if self.breaks("broadcast"):
            return super().broadcast(state, client, env).put(numbers={"n": drift()})
        return super().broadcast(state, client, env)

    def client_update(self, message, memory, env):
        if self.breaks("requests"):
            yield "train, please"
        if self.breaks("newcomer") and env.round_num > 1 and "seen" not in memory.numbers:
            return Message(), memory
        upload, after = yield from super().client_update(message, memory, env)
        if self.breaks("newcomer"):
            after = after.put(numbers={"seen": 1.0})
        if self.breaks("expected"):
            upload = upload.put(trees={"extra": upload.trees["params"]})
        if self.breaks("unweighted"):
            upload = upload.put(numbers={"num_examples": 0.0})
        if self.breaks("function"):
            upload = upload.put(numbers={"n": drift()})
        if self.breaks("memory"):
            after = after.put(numbers={"n": drift()})
        if self.breaks("pair"):
            return upload
        return upload, after

    def server_update(self, state, aggregate, env):
        if self.breaks("nobody") and not aggregate.clients:
            return state.put(numbers={"rounds": state.numbers.get("rounds", 0.0) + 1})
        if self.breaks("server"):
            return super().server_update(state, aggregate, env).put(numbers={"n": drift()} if aggregate.clients else {})
        if self.breaks("alone") and aggregate.clients == 1 and env.round_num == 3:
            return state.put(trees={"params": state.trees["params"].map(lambda a: np.full_like(a, np.inf))})
        return super().server_update(state, aggregate, env)

    def start(self, message, memory):
        if self.breaks("start"):
            return (Tree({"elsewhere": np.zeros(2)}),)
        return super().start(message, memory)

    def request(self, message, memory):
        return Fit(start=super().start(message, memory))

    def done(self, state):
        return 1 if self.breaks("done") else False


@dataclass(frozen=True)
class Hidden(FedAvg):
    """Its rate is lost on the way to a site."""

    rate: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "rate", self.rate / 2)


#: promise -> words of the failure
WORDS = {
    "needs": "does not offer telepathy",
    "init": "init gives another state",
    "broadcast": "broadcast sends north another message",
    "requests": "neither Fit nor Predict",
    "expected": "the tree is not expected",
    "unweighted": "num_examples",
    "function": "another upload",
    "memory": "another memory",
    "nobody": "without updates changed the state",
    "server": "server_update gives another state",
    "alone": "not finite",
    "newcomer": "refused",
    "done": "done answers",
    "start": "start gives does not lie over the first state of north",
}
CHECKS = {
    "needs": "needs_are_met",
    "init": "init_is_a_function",
    "broadcast": "broadcast_is_a_function",
    "requests": "requests_are_known",
    "expected": "update_is_expected",
    "unweighted": "update_is_expected",
    "function": "update_is_a_function",
    "memory": "update_is_a_function",
    "nobody": "nobody_changes_nothing",
    "server": "server_update_is_a_function",
    "alone": "one_client_is_enough",
    "newcomer": "newcomers_are_served",
    "done": "done_is_a_fact",
    "start": "start_makes_a_model",
}


def case_of(algorithm):
    return Case(algorithm, sites_of, registry={algorithm.name: type(algorithm)})


def test_checks_when_nothing_is_broken_pass():
    check_algorithm(Broken(), sites_of)


@pytest.mark.parametrize("promise", CHECKS)
def test_check_when_its_promise_is_broken_fails(promise):
    check = ALGORITHM_CHECKS[CHECKS[promise]]
    check(case_of(Broken()))
    with pytest.raises(AssertionError, match=WORDS[promise]):
        check(case_of(Broken(promise=promise)))


def test_check_when_the_manifest_builds_another_fails():
    with pytest.raises(AssertionError, match="builds another algorithm"):
        ALGORITHM_CHECKS["manifest_comes_back"](case_of(Hidden()))


def test_check_when_a_refused_update_leaves_a_trace_fails():
    @dataclass(frozen=True)
    class Counting(FedAvg):
        def broadcast(self, state, client, env):
            COUNT["asked", self.weighting] = COUNT.get(("asked", self.weighting), 0) + 1
            return super().broadcast(state, client, env)

        def server_update(self, state, aggregate, env):
            asked = COUNT.pop(("asked", self.weighting))
            return super().server_update(state, aggregate, env).put(numbers={"asked": float(asked)})

    with pytest.raises(AssertionError, match="left a trace"):
        ALGORITHM_CHECKS["refused_is_absent"](case_of(Counting()))


def test_check_when_something_outside_state_and_memory_decides_fails():
    seen = {}

    @dataclass(frozen=True)
    class Secretive(FedAvg):
        def server_update(self, state, aggregate, env):
            seen[id(self)] = seen.get(id(self), 0.0) + 1.0
            return super().server_update(state, aggregate, env).put(numbers={"rounds": seen[id(self)]})

    algorithm = Secretive()
    with pytest.raises(AssertionError, match="ends with other bits"):
        ALGORITHM_CHECKS["resumes_from_data"](case_of(algorithm))


def test_check_when_fit_requests_ask_for_more_than_offered_is_told_by_needs():
    poor = NumpyModel(offers=frozenset({"predict"}))
    with pytest.raises(AssertionError, match=r"north \(NumpyModel\) does not offer params"):
        ALGORITHM_CHECKS["needs_are_met"](Case(FedAvg(), lambda: sites_of(poor)))


# ---------------------------------------------------------------- rules


def mean(tile, weights):
    return ((weights[:, None] * tile).sum(0) / weights.sum()).astype(np.float32)


def median(tile, weights):
    return np.median(tile, 0).astype(np.float32)


def trimmed(tile, weights):
    return np.sort(tile, 0)[2:-2].mean(0).astype(np.float32)


@pytest.mark.parametrize("rule", [mean, median, trimmed])
def test_rule_when_sound_passes(rule):
    check_aggregator(rule)


CALLS = []


def writing(tile, weights):
    out = mean(tile, weights)
    tile[0] = 0
    return out


def counting(tile, weights):
    CALLS.append(1)
    return mean(tile, weights) + np.float32(len(CALLS))


RULES = {
    "returns shape": lambda t, w: t,
    "wanted is float32": lambda t, w: mean(t, w).astype(np.float64),
    "writes into": writing,
    "second time": counting,
    "equal updates": lambda t, w: mean(t, w) * np.float32(0.9),
    "order of clients": lambda t, w: t[0],
    "shifted by 2": lambda t, w: t[np.abs(t).sum(1).argmin()],
    "weights times 7": lambda t, w: mean(t, w) if w.sum() < 50 else median(t, w),
    "outside of all": lambda t, w: mean(t, w) + (mean(t, w) - median(t, w)) * np.float32(50),
}


@pytest.mark.parametrize("words", RULES)
def test_rule_when_broken_fails(words):
    CALLS.clear()
    with pytest.raises(AssertionError, match=words):
        check_aggregator(RULES[words])
