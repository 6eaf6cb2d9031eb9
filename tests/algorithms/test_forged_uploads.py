"""Predictions and heads that no honest client sends: the client is refused when it uploads, by row, and the round goes on."""

from dataclasses import replace

import numpy as np
import pytest
from numpy_model import CLASSES, VALUES, NumpyModel, rows_of, sites_of

import polyfed as pf
from polyfed.algorithms import consensus
from polyfed.algorithms.consensus import Consensus, softened
from polyfed.core.aggregate import DEFAULT_POLICY
from polyfed.core.algorithm import Algorithm, Env
from polyfed.core.checks_algorithm import play
from polyfed.core.errors import RefusedError
from polyfed.core.message import Message
from polyfed.core.tree import Tree

PUBLIC = rows_of(12, stream="public").x


def client(name):
    rows = rows_of(30, stream=name)
    return pf.Client(name, NumpyModel(), (rows.x, rows.target), split=pf.Split(0.2, 0.2), consents="personal")


def rounds_with(algorithm, forge, rounds=2):
    """Why "evil" was left out in each round, and the server's last state."""
    loop = pf.rounds(algorithm, [client("north"), client("south"), client("evil")], rounds=rounds, seed=1)
    for step in loop:
        for reply in step.train(step.send()):
            if (reply.task.client, reply.task.kind) == ("evil", "train"):
                reply = replace(reply, message=forge(reply.message))
            step.collect(reply)
        step.update()
    coordinator = loop.run.driver.coordinator
    assert [set(log.accepted) for log in coordinator.history] == [{"north", "south"}] * rounds
    assert all(set(log.left_out) == {"evil"} for log in coordinator.history)
    return [log.left_out["evil"] for log in coordinator.history], coordinator.final


def soft(change):
    """An upload whose tree "soft" is changed in row 4."""

    def forge(message):
        arrays = {name: np.array(array) for name, array in message.trees["soft"].items()}
        change(arrays)
        return message.put(trees={"soft": Tree(arrays)})

    return forge


def put(name, value):
    return lambda arrays: arrays[name].__setitem__(4, value)


FORGED = {
    "huge": (pf.FedMD(PUBLIC), put("public", [1e10, 0, 0]), "soft/public: row 4 is 1e+10, 0, 0; probabilities"),
    "negative": (pf.FedMD(PUBLIC), put("public", [-1e6, 1, 0]), "row 4 is -1e+06"),
    "sums to one": (pf.FedMD(PUBLIC), put("public", [2, -0.5, -0.5]), "row 4 is 2, -0.5"),
    "sums to two": (pf.FedMD(PUBLIC), put("public", [1, 1, 0]), "a row's sum is 1"),
    "student": (pf.Distill(PUBLIC, student=NumpyModel()), put("public", [1e10, 0, 0]), "row 4"),
    "heads": (pf.FedPer(feedback="distill", public=PUBLIC), put("public", [1e10, 0, 0]), "row 4"),
    "logits": (pf.FedDF(PUBLIC), put("public", [1e10, 0, -1e10]), "centred logits are at most 1000 in size"),
    "weight": (
        pf.FedMD(PUBLIC, weighting="entropy"),
        put("weight", 1e6),
        "soft/weight: row 4 is 1e+06; a row's weight",
    ),
    "weight below 0": (pf.FedMD(PUBLIC, weighting="entropy"), put("weight", -5.0), "soft/weight: row 4 is -5"),
    "weight of 0": (pf.FedMD(PUBLIC, weighting="entropy"), put("weight", 0.0), "from 1/3 to 1"),
    "above its weight": (pf.FedMD(PUBLIC, weighting="entropy"), put("public", [2, 0, 0]), "sum is its weight"),
    "logits above their weight": (
        pf.FedDF(PUBLIC, weighting="entropy"),
        lambda arrays: (put("public", [900, 0, -900])(arrays), put("weight", 0.5)(arrays)),
        "centred logits",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_predictions_when_forged_leave_out_their_client_alone(case):
    algorithm, change, complaint = FORGED[case]
    reasons, _ = rounds_with(algorithm, soft(change))
    assert all(complaint in reason for reason in reasons)


@pytest.mark.parametrize("claim", [1e6, 0.01, 0.0, -1.0])
def test_certainty_when_it_cannot_be_is_refused(claim):
    reasons, _ = rounds_with(pf.FedMD(PUBLIC, weighting="certainty"), lambda m: m.put(numbers={"certainty": claim}))
    assert all("numbers/certainty" in reason for reason in reasons)


def test_certainty_when_it_is_not_sent_is_refused():
    def forge(message):
        return replace(message, numbers={n: v for n, v in message.numbers.items() if n != "certainty"})

    reasons, _ = rounds_with(pf.FedMD(PUBLIC, weighting="certainty"), forge)
    assert all("numbers/certainty" in reason for reason in reasons)


def test_regression_when_values_are_large_has_no_limit_but_the_policys():
    env = Env(seed=0, problem=VALUES, client="north")
    algorithm, tree = Consensus(), Tree({"public": np.full((4, VALUES.outputs), -1e9, np.float32)})
    algorithm.check(Message(), Message({"soft": tree}), env, DEFAULT_POLICY)


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("weighting", ["uniform", "certainty", "entropy"])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_predictions_when_honestly_rounded_pass(classes, scale, weighting, average):
    problem = replace(CLASSES, classes=tuple(map(str, range(classes))), outputs=classes)
    env, algorithm = Env(seed=0, problem=problem, client="north"), Consensus(weighting=weighting, average=average)
    z = np.clip(np.random.default_rng(0).normal(0, scale, (50, classes)), -499, 499).astype(np.float32)
    for outputs in (z, np.log(np.maximum(softened(z, 1.0), 1e-9))):
        tree, numbers = algorithm.soft(outputs, env)
        algorithm.check(Message(), Message({"soft": tree}, numbers), env, DEFAULT_POLICY)


# ---------------------------------------------------------------- heads


def head(change):
    def forge(message):
        (name,) = (name for name in message.trees if name.startswith("head."))
        arrays = {entry: np.array(array) for entry, array in message.trees[name].items()}
        change(arrays)
        return message.put(trees={name: Tree(arrays)})

    return forge


def test_head_when_it_exploded_is_refused_and_never_handed_to_newcomers():
    reasons, final = rounds_with(pf.FedPer(feedback="mean"), head(lambda arrays: arrays["head.w"].__setitem__(0, 1e15)))
    assert all("/head.w: has 1e+15; at most" in reason for reason in reasons)
    (found,) = (tree for name, tree in final.trees.items() if name.startswith("head."))
    assert max(float(np.abs(array).max()) for array in found.values()) < 100.0


def frozen_head(**more):
    sites = {n: replace(s, consents=frozenset({"personal"})) for n, s in sites_of().items()}
    sites["south"] = replace(sites["south"], trains=("base.w", "base.b"), frozen=("head",), **more)
    return sites


def test_head_when_a_client_keeps_it_frozen_does_not_count():
    algorithm = pf.FedPer(feedback="mean")
    played = play(algorithm, frozen_head(), rounds=1)
    (found,) = (tree for name, tree in played.state.trees.items() if name.startswith("head."))
    said = {name: upload for name, upload in played.uploads.items() if name != "south"}
    sizes = {name: upload.numbers["num_examples"] for name, upload in said.items()}
    for entry in ("head.w", "head.b"):
        (name,) = (n for n in said["north"].trees if n.startswith("head."))
        wanted = sum(sizes[n] * said[n].trees[name][entry] for n in said) / sum(sizes.values())
        np.testing.assert_allclose(found[entry], wanted, rtol=1e-12)


def test_head_when_all_who_are_heard_keep_it_frozen_stays_as_it_was():
    algorithm, sites = pf.FedPer(feedback="mean"), frozen_head()
    alone = play(algorithm, sites, rounds=1, cohort=lambda _: ["south"])
    assert not any(len(tree) for name, tree in alone.state.trees.items() if name.startswith("head."))
    known = play(algorithm, sites, rounds=1)
    after = play(algorithm, sites, rounds=1, cohort=lambda _: ["south"], after=known)
    for name, tree in known.state.trees.items():
        if name.startswith("head."):
            assert after.state.trees[name] == tree


# ---------------------------------------------------------------- weights, starts


def test_feedback_when_distilled_weighs_clients_as_its_consensus_does():
    algorithm = pf.FedPer(feedback="distill", public=PUBLIC)
    assert algorithm.weight({"num_examples": 7.0}, 0, "soft") == 1.0
    assert algorithm.weight({"num_examples": 7.0}, 0, "params") == 7.0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_own_model_when_given_in_part_takes_the_rest_from_the_shared_one(alpha):
    algorithm, sites = pf.APFL(alpha=alpha), sites_of()
    start = play(algorithm, sites, rounds=0)
    params = start.state.trees["params"]
    partial = Message({"own": params.only({"base.w"}).map(lambda a: a + 1.0)})
    whole = Message({"own": params.overlay(partial.trees["own"])})
    runs = [play(algorithm, sites, rounds=2, after=replace(start, memories={"north": m})) for m in (partial, whole)]
    if alpha:
        assert runs[0].memories["north"].trees["own"].only(params) == runs[1].memories["north"].trees["own"].only(
            params
        )
    assert runs[0].state == runs[1].state


# ---------------------------------------------------------------- mistakes

REAL_CHECK = Consensus.check


def only_finite(self, sent, update, env, policy):
    Algorithm.check(self, sent, update, env, policy)


def refuses_everybody(self, sent, update, env, policy):
    raise RefusedError(env.client, "soft/public", "row 4")


def sums_alone(self, sent, update, env, policy):
    """Rows that sum to 1 with values below 0 pass."""
    tree = update.trees["soft"]
    up = tree.overlay(Tree({"public": np.abs(tree["public"]) / np.abs(tree["public"]).sum(-1, keepdims=True)}))
    REAL_CHECK(self, sent, update.put(trees={"soft": up}), env, policy)


MUTANTS = {
    "nothing is checked": (Consensus, "check", only_finite, "huge"),
    "everybody is refused": (Consensus, "check", refuses_everybody, "huge"),
    "values below 0 pass": (Consensus, "check", sums_alone, "sums to one"),
    "logits have no limit": (consensus, "LARGEST_LOGIT", 1e30, "logits"),
    "weights have no limit": (consensus, "ROUNDING", 1e7, "weight"),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mistake_when_made_is_noticed(mistake, monkeypatch):
    owner, name, wrong, case = MUTANTS[mistake]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, pf.errors.RunError)):
        test_predictions_when_forged_leave_out_their_client_alone(case)


def test_rounding_when_there_is_no_room_for_it_is_noticed(monkeypatch):
    monkeypatch.setattr(consensus, "ROUNDING", 0.0)
    with pytest.raises(RefusedError):
        test_predictions_when_honestly_rounded_pass(10, 1.0, "uniform", "probabilities")
