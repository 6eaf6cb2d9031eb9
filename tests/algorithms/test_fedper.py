"""FedPer: several passes between exchanges, the default head and who receives it, and mistakes that must be noticed."""

from dataclasses import replace

import numpy as np
import pytest
from numpy_model import VALUES, NumpyModel, sites_of, softmax

from polyfed.algorithms import FedAvg, FedPer, fedper
from polyfed.core.algorithm import Predict
from polyfed.core.checks_algorithm import addressed, check_algorithm, client_env, play, server_env
from polyfed.core.errors import UsageError
from polyfed.core.message import Message
from polyfed.core.tree import Tree

NORMALISED = NumpyModel(statistics=True, batch_size=5, dtype="float32", lr=0.1)


def agreed(models=None, **more):
    """Sites that let their personal parts leave."""
    return {name: replace(s, consents=frozenset({"personal"})) for name, s in sites_of(models, **more).items()}


def heads(state):
    return {name: tree for name, tree in state.trees.items() if name.startswith("head.")}


def head(state):
    (tree,) = heads(state).values()
    return tree


def sent_to(algorithm, state, sites, name="west", round_num=9):
    return algorithm.broadcast(state, name, addressed(server_env(sites, 0, round_num), sites[name]))


# ---------------------------------------------------------------- passes


@pytest.mark.parametrize("model", [NumpyModel(), NumpyModel(batch_size=4), NORMALISED])
@pytest.mark.parametrize("shared", ["base", "head"])
def test_run_when_every_pass_is_exchanged_is_fedavg_bit_for_bit(model, shared):
    one = play(FedPer(shared=shared), sites_of(model), rounds=3)
    two = play(FedAvg(shared=shared), sites_of(model), rounds=3)
    assert one.digest == two.digest
    assert {n: u.digest for n, u in one.uploads.items()} == {n: u.digest for n, u in two.uploads.items()}


def test_passes_when_there_are_several_go_on_where_the_one_before_ended():
    """Without mini-batches nothing is drawn, so that three passes of one epoch are one pass of three."""
    three = play(FedPer(every=3), sites_of(NumpyModel(epochs=1, statistics=True)), rounds=2)
    one = play(FedAvg(shared="base"), sites_of(NumpyModel(epochs=3, statistics=True)), rounds=2)
    assert three.state == one.state
    assert three.memories == one.memories
    for name, upload in three.uploads.items():
        assert upload.numbers["steps"] == 3
        assert upload.numbers["loss"] == pytest.approx(one.uploads[name].numbers["loss"], rel=1e-12)


def test_passes_when_there_are_several_see_the_rows_in_orders_of_their_own():
    model = NumpyModel(batch_size=4)
    play(FedPer(every=3), sites_of(model), rounds=1)
    assert [request.draw for request in model.log] == [0, 1, 2] * 3
    counts = play(FedPer(every=3), sites_of(NORMALISED), rounds=2).memories
    own = {name: int(memory.trees["own"]["buffers:base/count"]) for name, memory in counts.items()}
    assert own == {"north": 2 * 3 * 2 * 3, "south": 2 * 3 * 2 * 2, "west": 2 * 3 * 2 * 4}, "buffers go on too"


# ---------------------------------------------------------------- the mean head


@pytest.mark.parametrize("weighting", ["num_examples", "uniform"])
def test_default_head_when_it_is_a_mean_is_that_of_the_personal_parts(weighting):
    sites = agreed(NumpyModel())
    played = play(FedPer(feedback="mean", weighting=weighting), sites, rounds=2)
    sizes = {name: len(s.train) if weighting == "num_examples" else 1 for name, s in sites.items()}
    for name, array in head(played.state).items():
        own = [sizes[n] * m.trees["own"][name] for n, m in played.memories.items()]
        np.testing.assert_allclose(array, sum(own) / sum(sizes.values()), rtol=1e-9)
    without = play(FedPer(weighting=weighting), sites_of(NumpyModel()), rounds=2)
    assert played.memories == without.memories, "feedback changes nothing for those who give it"
    assert played.state.trees["params"] == without.state.trees["params"]


def test_default_head_when_it_is_normalised_has_the_statistics_of_all_rows():
    sites = agreed(NORMALISED)
    state = play(FedPer(shared="head", feedback="mean"), sites, rounds=2).state
    rows = np.concatenate([site.train.x for site in sites.values()]).astype(float)
    assert head(state)["stats:base/variance"].dtype == np.float32
    np.testing.assert_allclose(head(state)["stats:base/mean"], rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(head(state)["stats:base/variance"], rows.var(0), rtol=1e-5)
    assert "buffers:base/count" not in head(state)


def a_newcomer_starts_from_the_default_head(feedback="mean"):
    algorithm, sites = FedPer(feedback=feedback, public=range(9)), agreed(NumpyModel())
    cohort = lambda _: ["north", "south"]  # noqa: E731  # one use
    played = play(algorithm, sites, rounds=2, cohort=cohort)
    message = sent_to(algorithm, played.state, sites)
    start = algorithm.start(message, Message())
    begun = sites["west"].model.state_of(start, sites["west"].train, client_env(sites["west"], 0, 3))
    expected = {**head(played.state), **played.state.trees["params"]}
    assert {name: a.tobytes() for name, a in begun.items()} == {name: a.tobytes() for name, a in expected.items()}
    kept = algorithm.start(sent_to(algorithm, played.state, sites, "north"), played.memories["north"])
    north = sites["north"].model.state_of(kept, sites["north"].train, client_env(sites["north"], 0, 3))
    assert north.only(head(played.state)) == played.memories["north"].trees["own"], "who has a head keeps it"


@pytest.mark.parametrize("feedback", ["mean", "distill"])
def test_newcomer_when_it_has_no_memory_starts_from_the_default_head(feedback):
    a_newcomer_starts_from_the_default_head(feedback)


def test_heads_when_they_differ_in_shape_are_averaged_among_equals():
    models = {"north": NumpyModel(4), "south": NumpyModel(4), "west": NumpyModel(9)}
    algorithm = FedPer(shared="head.b", feedback="mean")
    sites = agreed(models)
    played = play(algorithm, sites, rounds=2, cohort=lambda r: ["north", "south"] if r == 1 else list(sites))
    early = play(algorithm, sites, rounds=1, cohort=lambda _: ["north", "south"])
    assert len(heads(early.state)) == 1
    assert len(heads(played.state)) == 2
    assert "head" not in sent_to(algorithm, early.state, sites).trees, "nobody of its shape was heard yet"
    assert sent_to(algorithm, played.state, sites).trees["head"]["base.w"].shape == (5, 9)
    west = sent_to(algorithm, played.state, sites).trees["head"]
    for name, array in west.items():
        np.testing.assert_allclose(array, played.memories["west"].trees["own"][name], rtol=1e-12)


def test_feedback_when_its_rounds_are_over_leaves_the_head_as_it_was():
    algorithm = FedPer(feedback="mean", feedback_rounds=2)
    played = [play(algorithm, agreed(), rounds=n) for n in (2, 4)]
    assert head(played[0].state) == head(played[1].state)
    assert any(name.startswith("head.") for name in played[0].uploads["west"].trees)
    assert set(played[1].uploads["west"].trees) == {"params"}
    assert "head" in sent_to(algorithm, played[1].state, agreed()).trees, "newcomers receive it all the same"


# ---------------------------------------------------------------- the distilled head


def test_default_head_when_it_is_distilled_comes_nearer_to_the_clients_mean_prediction():
    sites = agreed(NumpyModel(lr=0.1))
    public = sites["north"].public

    def gap(digest):
        algorithm = FedPer(feedback="distill", digest=digest, temperature=1.0, public=range(9))
        played = play(algorithm, sites, rounds=1)
        soft = np.average([u.trees["soft"]["public"] for u in played.uploads.values()], axis=0, weights=[12, 7, 20])
        start = algorithm.start(sent_to(algorithm, played.state, sites), Message())
        outputs = sites["west"].model.predict(Predict(start=start), public, client_env(sites["west"], 0, 2))
        return -float((soft * np.log(softmax(outputs))).sum(1).mean()), played

    (far, _), (near, played) = gap(1), gap(60)
    assert near < far
    without = play(FedPer(), sites_of(NumpyModel(lr=0.1)), rounds=1)
    assert played.state.trees["params"] == without.state.trees["params"], "the base is not trained by the server"
    assert list(head(played.state)) == ["head.w", "head.b"]


def test_default_head_when_nobody_of_its_shape_is_there_is_distilled_from_all_the_others():
    models = {"north": NumpyModel(4), "south": NumpyModel(4), "west": NumpyModel(9)}
    algorithm, sites = FedPer(shared="head.b", feedback="distill", public=range(9)), agreed(models)
    played = play(algorithm, sites, rounds=2, cohort=lambda _: ["north", "south"])
    assert sent_to(algorithm, played.state, sites).trees["head"]["base.w"].shape == (5, 9)


def test_default_head_of_a_regression_is_distilled_from_values():
    sites = agreed(NumpyModel(), problem=VALUES)
    assert head(play(FedPer(feedback="distill", public=range(9)), sites, rounds=2).state)["head.w"].shape == (4, 2)


# ---------------------------------------------------------------- options and the contract


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shared": ()}, "FedPer shares a part"),
        ({"every": 0}, "at least 1"),
        ({"digest": 0}, "at least 1"),
        ({"feedback": "average"}, 'write "mean", "distill" or leave it out'),
        ({"feedback_rounds": 3}, "the last round of feedback="),
        ({"feedback": "mean", "feedback_rounds": 0}, "at least 1"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_option_when_wrong_says_what_to_write(options, words):
    with pytest.raises(UsageError, match=words):
        FedPer(**options)


def test_needs_when_there_is_feedback_hold_consent_and_without_it_do_not():
    assert FedPer().needs.missing(frozenset({"params"})) == frozenset()
    assert FedPer(feedback="mean").needs.missing(frozenset({"params"})) == {"personal"}
    assert FedPer(feedback="distill").trains_groups
    assert not FedPer(feedback="mean").trains_groups
    assert replace(FedPer(feedback="distill"), feedback=None).needs == FedPer().needs


@pytest.mark.parametrize("model", [NumpyModel(), NORMALISED])
@pytest.mark.parametrize("shared", ["base", "head"])
@pytest.mark.parametrize("feedback", ["mean", "distill"])
def test_contract_when_there_is_feedback_holds(model, shared, feedback):
    algorithm = FedPer(shared=shared, every=2, feedback=feedback, feedback_rounds=2, public=range(9))
    check_algorithm(algorithm, lambda: agreed(model))


# ---------------------------------------------------------------- mistakes


def nothing_personal_leaves_without_feedback():
    algorithm, sites = FedPer(every=2), sites_of(NORMALISED)
    played = play(algorithm, sites, rounds=2)
    shared = {"base.w", "base.b", "stats:base/mean", "stats:base/variance"}
    for message in (played.state, *played.uploads.values(), sent_to(algorithm, played.state, sites)):
        assert {name for tree in message.trees.values() for name in tree} <= shared
    silent = FedPer(feedback="mean", feedback_rounds=1)
    late = play(silent, agreed(NORMALISED), rounds=2).uploads
    assert all({name for tree in u.trees.values() for name in tree} <= shared for u in late.values())


def consent_is_needed():
    for feedback in ("mean", "distill"):
        assert "personal" in FedPer(feedback=feedback).needs.missing(frozenset({"params", "predict", "part"}))


def passes_draw_anew():
    test_passes_when_there_are_several_see_the_rows_in_orders_of_their_own()


def the_head_is_weighted():
    test_default_head_when_it_is_a_mean_is_that_of_the_personal_parts("num_examples")


def only_the_head_is_distilled():
    sites = agreed(NumpyModel())
    played = play(FedPer(feedback="distill", public=range(9)), sites, rounds=1)
    request = sites["north"].model.log[-1]
    assert request.part == ("head.w", "head.b")
    assert head(played.state).keys() == {"head.w", "head.b"}


def personal_statistics_are_merged():
    test_default_head_when_it_is_normalised_has_the_statistics_of_all_rows()


#: mistake -> (what is patched, with what, the check that must notice)
MUTANTS = {
    "a head leaves without consent": (
        fedper,
        "_NEEDS",
        dict.fromkeys((None, "mean", "distill"), FedAvg.needs),
        consent_is_needed,
    ),
    "a head leaves though feedback was not asked for": (
        FedPer,
        "is_heard",
        lambda self, round_num: True,
        nothing_personal_leaves_without_feedback,
    ),
    "feedback does not stop": (
        FedPer,
        "is_heard",
        lambda self, round_num: self.feedback is not None,
        nothing_personal_leaves_without_feedback,
    ),
    "a newcomer starts from the first state": (FedPer, "start", FedAvg.start, a_newcomer_starts_from_the_default_head),
    "a newcomer is not sent the head": (FedPer, "broadcast", FedAvg.broadcast, a_newcomer_starts_from_the_default_head),
    "the default head covers the client's own": (
        FedPer,
        "start",
        lambda self, message, memory: (*FedAvg.start(self, message, memory), message.trees["head"]),
        a_newcomer_starts_from_the_default_head,
    ),
    "all passes see one order": (
        fedper,
        "replace",
        lambda it, **new: replace(it, **(new | {"draw": 0} if "draw" in new else new)),
        passes_draw_anew,
    ),
    "the mean head is not weighted": (FedPer, "weight", lambda *_: 1.0, the_head_is_weighted),
    "the server trains the base too": (
        fedper,
        "replace",
        lambda it, **new: replace(it, **{k: v for k, v in new.items() if k != "part"}),
        only_the_head_is_distilled,
    ),
    "personal statistics are averaged as variances": (
        fedper,
        ("moments_of", "stats_of"),
        (
            lambda stats, start: Tree({n: a.astype(np.float64) for n, a in stats.items()}),
            lambda mean, start: Tree({n: mean[n].astype(a.dtype) for n, a in start.items()}),
        ),
        personal_statistics_are_merged,
    ),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mistake_when_made_is_noticed(mistake, monkeypatch):
    owner, names, wrongs, check = MUTANTS[mistake]
    check()  # passes without the mistake
    pairs = [(names, wrongs)] if isinstance(names, str) else zip(names, wrongs, strict=True)
    for name, wrong in pairs:
        monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, KeyError)):
        check()
