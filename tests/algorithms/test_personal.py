"""Personal models beside the shared one: Ditto, APFL and pFedMe."""

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy_model import NumpyModel, sites_of

from polyfed.algorithms import APFL, Ditto, PFedMe
from polyfed.algorithms.apfl import mixed, unmixed
from polyfed.core.algorithm import Needs
from polyfed.core.checks_algorithm import client_env, play, server_env, work
from polyfed.core.errors import UsageError
from polyfed.core.message import Message
from polyfed.core.terms import Near, Own
from polyfed.core.tree import Tree
from polyfed.core.work import evaluate

PERSONAL = [Ditto(0.2), APFL(0.4), PFedMe(lam=2.0, lr=0.2, steps=2, local_rounds=3)]


def sent_to(algorithm, played, sites, name="west"):
    return algorithm.broadcast(played.state, name, server_env(sites, 0))


# ---------------------------------------------------------------- all three


@pytest.mark.parametrize("algorithm", PERSONAL, ids=repr)
def test_personal_model_when_evaluated_is_scored_beside_the_shared_one(algorithm):
    sites = sites_of(NumpyModel(statistics=True))
    played = play(algorithm, sites, rounds=6)
    site, env = sites["west"], client_env(sites["west"], 0, 7)
    sent, memory = sent_to(algorithm, played, sites), played.memories["west"]
    numbers = evaluate(algorithm, sent, memory, site, env, site.train).numbers
    assert numbers["loss"] < numbers["shared/loss"]
    fresh = evaluate(algorithm, sent, Message(), site, env, site.train).numbers
    assert fresh["loss"] == numbers["shared/loss"], "a newcomer's model is the shared one"


@pytest.mark.parametrize("algorithm", PERSONAL, ids=repr)
def test_statistics_and_counters_when_personal_are_the_clients_own(algorithm):
    sites = sites_of(NumpyModel(statistics=True))
    played = play(algorithm, sites, rounds=3)
    for name, site in sites.items():
        own = played.memories[name].trees["own"]
        np.testing.assert_allclose(own["stats:base/mean"], site.train.x.mean(0), rtol=1e-6)
        steps = 2 * 3 if not isinstance(algorithm, PFedMe) else 2 * 3 * 3
        assert int(own["buffers:base/count"]) == steps
        if not isinstance(algorithm, PFedMe):  # whose one model is trained
            kept = played.memories[name].trees["kept"]
            assert dict(kept) == {"buffers:base/count": np.int64(steps)}
    rows = np.concatenate([site.train.x for site in sites.values()]).astype(float)
    if algorithm.weighting == "num_examples":
        np.testing.assert_allclose(played.state.trees["stats"]["stats:base/mean"], rows.mean(0), rtol=1e-9)


@pytest.mark.parametrize("algorithm", PERSONAL, ids=repr)
def test_personal_model_when_a_base_is_shared_keeps_a_head_for_both(algorithm):
    sites, algorithm = sites_of(), replace(algorithm, shared="base")
    played = play(algorithm, sites, rounds=2)
    assert set(played.state.trees["params"]) == {"base.w", "base.b"}
    memory = played.memories["north"]
    assert set(memory.trees["own"]) == {"base.w", "base.b", "head.w", "head.b"}
    if not isinstance(algorithm, PFedMe):
        assert set(memory.trees["kept"]) == {"head.w", "head.b"}
        assert memory.trees["kept"] != memory.trees["own"].under(["head"])


@pytest.mark.parametrize("algorithm", PERSONAL, ids=repr)
def test_personal_model_when_of_an_earlier_run_goes_on(algorithm):
    sites = sites_of()
    before = play(algorithm, sites, rounds=2).memories["west"].trees["own"]
    played = replace(play(algorithm, sites, rounds=0), memories={"west": Message({"own": before})})
    sent = sent_to(algorithm, played, sites)
    if isinstance(algorithm, APFL):
        v = before.only(sent.trees["params"])
        assert algorithm.start(sent, played.memories["west"])[-1] == mixed(0.4, v, sent.trees["params"])
    else:
        assert algorithm.start(sent, played.memories["west"])[-1] == before
    _, upload, memory = work(algorithm, sites["west"], played, server_env(sites, 0, 1))
    assert upload.trees["params"].spec == sent.trees["params"].spec and memory.trees["own"] != before


@pytest.mark.parametrize("algorithm", [Ditto(lam=7.0), PFedMe(lam=7.0)], ids=repr)
def test_pull_when_too_strong_for_the_learning_rate_is_refused_with_the_limit(algorithm):
    with pytest.raises(UsageError, match=r"lam=7.0 diverges at a learning rate of 0.3: it must be below 0.286"):
        play(algorithm, sites_of(NumpyModel(lr=0.3)), rounds=1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Ditto(-1.0), "at least 0"),
        (lambda: Ditto(math.nan), "at least 0"),
        (lambda: Ditto(personal_epochs=0), "at least 1"),
        (lambda: APFL(1.5), "from 0.001 to 1"),
        (lambda: APFL(1e-9), "must be 0, or"),
        (lambda: APFL(math.nan), "must be 0, or"),
        (lambda: APFL(0.0, adaptive=True), "never adapts"),
        (lambda: PFedMe(lam=0.0), "above 0"),
        (lambda: PFedMe(beta=math.inf), "above 0"),
        (lambda: PFedMe(lam=15.0, lr=0.1), "leap"),
        (lambda: PFedMe(steps=0), "at least 1"),
        (lambda: PFedMe(local_rounds=0), "at least 1"),
    ],
)
def test_option_when_wrong_says_what_to_write(make, words):
    with pytest.raises(UsageError, match=words):
        make()


# ---------------------------------------------------------------- each


def test_ditto_when_without_pull_asks_for_no_term():
    sites = sites_of()
    play(Ditto(0.0, personal_epochs=5), {"west": sites["west"]}, rounds=1)
    shared, own = sites["west"].model.log
    assert shared.terms == own.terms == (Own(),) and not own.tensors
    assert (shared.epochs, own.epochs) == (None, 5)


def test_ditto_when_the_pull_grows_is_nearer_to_the_shared_model():
    gaps = []
    for lam in (0.0, 0.3, 1.0, 3.0):
        played = play(Ditto(lam), sites_of(), rounds=4)
        gaps.append((played.memories["west"].trees["own"] - played.state.trees["params"]).norm())
    assert gaps == sorted(gaps, reverse=True)


def test_apfl_when_it_adapts_needs_plain_steps():
    assert APFL().needs == Needs.all("params", "terms")
    assert APFL(adaptive=True).needs == Needs.all("params", "terms", "sgd")
    assert APFL(adaptive=True) == APFL(adaptive=True)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9, 1.0])
def test_mixture_when_undone_is_what_it_was_made_of(alpha):
    r = np.random.default_rng(1)
    v, w = (Tree({"a": r.normal(size=(3, 2)), "b": r.normal(size=2)}) for _ in range(2))
    back = unmixed(alpha, mixed(alpha, v, w), w)
    np.testing.assert_allclose(back.flat, v.flat, rtol=1e-12)
    assert mixed(0.0, v, w) is w and mixed(1.0, v, w) is v


def test_apfl_when_its_alpha_fell_to_zero_is_the_shared_model_and_may_come_back():
    sites, algorithm = sites_of(), APFL(adaptive=True)
    played = play(algorithm, sites, rounds=2)
    fallen = played.memories["west"].put(numbers={"alpha": 0.0})
    sent = sent_to(algorithm, played, sites)
    assert algorithm.start(sent, fallen)[-1] == sent.trees["params"]
    # v lies where a step of w goes: the slope is negative, α rises
    _, upload, _ = work(algorithm, sites["west"], played, server_env(sites, 0, 3))
    ahead = sent.trees["params"] + upload.trees["params"] * 2.0
    memory = fallen.put(trees={"own": ahead})
    _, _, after = work(algorithm, sites["west"], replace(played, memories={"west": memory}), server_env(sites, 0, 3))
    assert after.numbers["alpha"] > 0.0 and after.trees["own"] == ahead


def test_pfedme_when_asked_draws_each_of_its_short_fits_anew():
    sites = sites_of(NumpyModel(batch_size=4))
    play(PFedMe(lam=2.0, lr=0.2, steps=3, local_rounds=4), {"west": sites["west"]}, rounds=1)
    log = sites["west"].model.log
    assert [request.draw for request in log] == [0, 1, 2, 3]
    assert all(request.steps == 3 and request.terms == (Own(), Near(2.0)) for request in log)
    assert len({request.tensors["anchor"].digest for request in log}) == 4, "w does not move between the short fits"
