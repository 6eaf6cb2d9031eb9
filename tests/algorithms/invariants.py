"""What must hold whatever the numbers are: each a function that raises AssertionError when it does not.

Their numbers are their names in the algorithms' docstrings; `test_algorithm_mutants.py` shows which mistakes they catch.
"""

from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import oracles
import torch
from numpy_model import CLASSES, VALUES, NumpyModel, rows_of, sites_of, softmax

from polyfed.algorithms import (
    APFL,
    Ditto,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBABU,
    FedBN,
    FedMD,
    FedProx,
    FedRep,
    FedYogi,
    Local,
    PFedMe,
)
from polyfed.core.aggregate import Fold
from polyfed.core.algorithm import Fit, Fitted, Predict
from polyfed.core.checks_algorithm import client_env, play, server_env
from polyfed.core.message import Message
from polyfed.core.rows import Rows
from polyfed.core.terms import Distill, Match, Near
from polyfed.core.tree import Tree, part_of
from polyfed.models.torch import torch as pf_torch

AVERAGING = [FedAvg(), FedProx(mu=0.2), FedAvgM(), FedAdagrad(), FedAdam(), FedYogi(), Ditto(0.2)]
AVERAGING += [
    APFL(0.4, weighting="num_examples"),
    PFedMe(lam=0.5, lr=0.4, steps=1, local_rounds=1, weighting="num_examples"),
]
PERSONAL = [
    FedRep(shared="base", head_epochs=2),
    FedBABU(shared="base", fine_tune=1),
    Ditto(0.2),
    Ditto(0.2, shared="base"),
    APFL(0.4),
    APFL(adaptive=True),
    PFedMe(lam=2.0, lr=0.2, steps=2, local_rounds=2),
]
LINEAR = NumpyModel(hidden=0)
#: number -> tests outside of this file that prove it
ELSEWHERE = {
    12: ("core/test_coordinator.py::test_buffer_of_all_clients_is_their_round_when_nothing_is_stale",),
    17: ("core/test_aggregate.py::test_merge_when_sums_of_two_sets_are_added_is_the_sum_of_their_union",),
    25: ("core/test_aggregate.py::test_entry_when_some_clients_lack_it_is_the_mean_of_those_who_sent_it",),
    27: ("core/test_aggregate.py::test_half_precision_when_ten_thousand_upload_is_within_one_ulp_of_the_exact_mean",),
    35: (
        "system/test_resume.py::test_resume_when_killed_at_some_points_gives_the_same_bits",
        "system/test_resume.py::test_resume_when_killed_again_and_again_in_fresh_interpreters_gives_the_same_bits",
    ),
    37: ("core/test_coordinator.py::test_upload_twice_counts_once_and_is_answered_the_same",),
    43: ("algorithms/test_feddf.py::test_ensemble_when_of_one_or_of_equal_clients_is_the_teacher_and_changes_nothing",),
    53: ("core/test_aggregate.py::test_client_that_claims_a_billion_rows_when_capped_moves_no_more_than_its_share",),
    56: ("core/test_coordinator.py::test_staleness_lowers_the_weight_with_a_cap_as_without_one",),
    57: (
        "system/test_same_bits.py::test_bits_when_run_in_every_way_are_the_same",
        "system/test_same_bits.py::test_bits_when_clients_join_over_the_network_are_the_same",
    ),
    60: (
        "models/test_sklearn_statistics.py::test_one_round_when_features_lie_near_zero_then_equals_the_pooled_fit",
        "models/test_sklearn_discriminant.py::test_one_round_when_sites_lack_classes_then_equals_the_pooled_fit",
        "models/test_sklearn_transformers.py::test_scaler_when_rows_have_gaps_then_equals_the_pooled_fit",
    ),
    61: ("core/test_metrics.py::test_pooled_when_asked_for_an_auc_says_why_not",),
    62: ("core/test_coordinator.py::test_roll_back_ends_with_the_best_version",),
}
#: number -> why nothing proves it yet
ABSENT = {
    **dict.fromkeys(
        (5, 6, 7, 8, 11, 15), "FedNova, SCAFFOLD, HeteroFL, FedProto, MOON, FedNTD, FedLC, DepthFL are not built"
    ),
    **dict.fromkeys((21, 22, 23, 24), "the mean is the only rule of aggregation so far"),
    **dict.fromkeys((29, 30, 31, 32), "SCAFFOLD and FedDyn, whose control variates these are of, are not built"),
    **dict.fromkeys((13, 33, 34), "no update is compressed"),
    **dict.fromkeys((38, 39, 41), "submodels and prototypes are not built"),
    **dict.fromkeys((54, 55), "secure aggregation and differential privacy are not built"),
    58: "the heads of HTTP are not counted, only the bodies",
}
COUNTER = "buffers:downsample.1.num_batches_tracked"
INVARIANTS = {}


def invariant(function):
    INVARIANTS[function.__name__] = function
    return function


def params(algorithm, sites=None, rounds=3, **kw):
    return play(algorithm, sites or sites_of(), rounds=rounds, **kw).state.trees["params"]


def assert_near(one, two, tolerance=1e-9):
    assert list(one) == list(two)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=tolerance, atol=tolerance, err_msg=name)


# ---------------------------------------------------------------- equivalence


@invariant
def i01_one_full_batch_step_is_a_centralised_step():
    sites = sites_of(NumpyModel(epochs=1))
    north = sites["north"]
    together = Rows(
        {"x": np.concatenate([s.train.x for s in sites.values()])},
        np.concatenate([s.train.target for s in sites.values()]),
    )
    centralised = north.model.fit(Fit(), together, client_env(north, 0, 1)).state
    assert_near(params(FedAvg(), sites, 1), centralised)


@invariant
def i02_fedprox_without_mu_is_fedavg_bit_for_bit():
    one, two = sites_of(NumpyModel(batch_size=4)), sites_of(NumpyModel(batch_size=4))
    assert play(FedProx(mu=0.0), one, rounds=3).digest == play(FedAvg(), two, rounds=3).digest


@invariant
def i03_fedavgm_without_momentum_is_fedavg():
    assert_near(params(FedAvgM(beta=0.0, lr=1.0)), params(FedAvg()))


@invariant
def i04_fedadam_with_large_tau_is_fedavg():
    assert_near(params(FedAdam(beta1=0.0, beta2=0.0, lr=1e8, tau=1e8)), params(FedAvg()), 1e-6)


@invariant
def i09_ditto_without_pull_is_local_and_its_shared_model_fedavgs():
    def sites():
        return sites_of(NumpyModel(statistics=True, batch_size=4))

    local, average = play(Local(), sites(), rounds=3), play(FedAvg(), sites(), rounds=3)
    for lam in (0.0, 0.7):
        played = play(Ditto(lam), sites(), rounds=3)
        assert played.state.digest == average.state.digest, "the personal model touches the shared one"
        same = [played.memories[name].trees["own"] == memory.trees["own"] for name, memory in local.memories.items()]
        assert all(same) if lam == 0.0 else not any(same)


@invariant
def i09_ditto_with_a_large_pull_is_global():
    gaps = []
    for lam in (0.0, 1.0, 10.0, 100.0, 1000.0):
        sites = sites_of(NumpyModel(lr=1e-3, epochs=40))
        before = play(Ditto(lam), sites, rounds=2)
        own = play(Ditto(lam), sites, rounds=1, after=before).memories["west"].trees["own"]
        gaps.append((own.part("params") - before.state.trees["params"]).norm())
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.02 * gaps[0], gaps


@invariant
def i10_apfl_at_its_ends_is_global_and_local():
    def sites():
        return sites_of(NumpyModel(statistics=True, batch_size=4))

    average = play(FedAvg(weighting="uniform"), sites(), rounds=3)
    local = play(Local(), sites(), rounds=3)
    for alpha in (0.0, 0.3, 1.0):
        algorithm = APFL(alpha)
        played = play(algorithm, sites(), rounds=3)
        assert played.state.digest == average.state.digest, "the personal model touches the shared one"
        for name, memory in played.memories.items():
            sent = algorithm.broadcast(played.state, name, server_env(sites(), 0))
            state = NumpyModel(statistics=True).first(rows_of(4), client_env(sites()[name], 0, 1))
            for tree in algorithm.start(sent, memory):
                state = state.overlay(tree)
            if alpha == 0.0:
                assert state.only(sent.trees["params"]) == average.state.trees["params"]
                assert state.part("stats") == average.state.trees["stats"]
            else:
                assert (state == local.memories[name].trees["own"]) == (alpha == 1.0)


@invariant
def i02_pfedme_with_one_whole_step_is_fedprox():
    one = params(PFedMe(lam=2.0, lr=0.5, steps=3, local_rounds=1), sites_of(NumpyModel(lr=0.1)))
    two = params(FedProx(mu=2.0, weighting="uniform"), sites_of(NumpyModel(lr=0.1, epochs=3)))
    assert_near(one, two)


@invariant
def i14_one_client_is_local_training():
    sites = sites_of(sizes={"north": 12})
    north = sites["north"]
    alone = north.model.fit(Fit(epochs=6), north.train, client_env(north, 0, 1)).state
    assert_near(params(FedAvg(), sites), alone)
    assert_near(play(FedMD(north.public, digest=0), sites, rounds=3).memories["north"].trees["own"], alone)


# ---------------------------------------------------------------- algebra of the round


@invariant
def i16_the_order_of_clients_changes_rounding_alone():
    backwards = dict(reversed(sites_of().items()))
    for algorithm in [*AVERAGING, *PERSONAL]:
        assert_near(params(algorithm, seed=1), params(algorithm, backwards, seed=1))


@invariant
def i18_weights_times_seven_change_nothing():
    def claim(name, upload):
        return upload.put(numbers={"num_examples": 7 * upload.numbers["num_examples"]})

    for algorithm in [*AVERAGING, *PERSONAL]:
        assert_near(params(algorithm), params(algorithm, tamper=claim))


@invariant
def i19_a_client_cut_in_two_changes_nothing():
    whole = sites_of(NumpyModel(epochs=1), sizes={"north": 12, "west": 20})
    first, last = whole["west"].train.take(np.arange(8)), whole["west"].train.take(np.arange(8, 20))
    cut = {
        "north": whole["north"],
        "west": replace(whole["west"], train=first),
        "east": replace(whole["west"], name="east", train=last),
    }
    for algorithm in AVERAGING:
        assert_near(params(algorithm, whole), params(algorithm, cut), 1e-8)


@invariant
def i20_equal_clients_are_one_client():
    one = sites_of(sizes={"north": 12})
    many = {name: replace(one["north"], name=name) for name in ("a", "b", "c")}
    for algorithm in [*AVERAGING, *PERSONAL]:
        assert_near(params(algorithm, one), params(algorithm, many))


@invariant
def i26_a_round_of_nobody_changes_nothing():
    public = sites_of()["north"].public
    for algorithm in [*AVERAGING, *PERSONAL, FedMD(public)]:
        before = play(algorithm, sites_of(), rounds=2)
        after = play(algorithm, sites_of(), rounds=2, cohort=lambda _: (), after=before)
        assert after.digest == before.digest, f"{algorithm.name} moved without an update"


@invariant
def i28_dtypes_come_back_as_they_went():
    for dtype in ("float16", "float32", "float64", ml_dtypes.bfloat16):
        start = Tree(
            {"w": np.ones(3, dtype), "stats:n/mean": np.zeros(2, dtype), "stats:n/variance": np.ones(2, dtype)}
        )
        for algorithm in AVERAGING:
            env = replace(server_env(sites_of(), 0), first={"g": start})
            state = algorithm.init(env)
            fold = Fold()
            update = {"params": Tree({"w": np.full(3, 0.5, dtype)}), "stats": state.trees["stats"]}
            fold.add(0, Message(update, {"num_examples": 3.0}), lambda _: 3.0)
            after = algorithm.server_update(state, fold.finish(), env)
            for name in ("params", "stats"):
                assert after.trees[name].spec == state.trees[name].spec, (
                    f"{algorithm.name} changed {name} to another dtype"
                )
            assert {n for n, t in state.trees.items() if after.trees[n].spec != t.spec} == set()


# ---------------------------------------------------------------- parts of a model


@invariant
def i36_an_absent_client_finds_its_memory_as_it_was():
    for algorithm in (FedAvg(shared="base"), *PERSONAL, FedMD(sites_of()["north"].public)):
        before = play(algorithm, sites_of(), rounds=1)
        without = play(algorithm, sites_of(), rounds=2, cohort=lambda _: ["north", "south"], after=before)
        assert without.memories["west"].digest == before.memories["west"].digest
        back = play(algorithm, model_sites := sites_of(), rounds=1, after=without)
        starts = [r.start for r in model_sites["west"].model.log if r.start]
        kept = before.memories["west"].trees["own"]
        assert any(tree == kept for start in starts for tree in start), f"{algorithm.name} forgot its own"
        moved = back.memories["west"].digest != without.memories["west"].digest
        assert moved or isinstance(algorithm, FedBABU), "whose head stays"


@invariant
def i40_what_is_private_never_travels():
    algorithm = FedAvg(shared="base")
    played = play(algorithm, sites_of(NumpyModel(statistics=True)), rounds=2)
    shared = {"base.w", "base.b", "stats:base/mean", "stats:base/variance"}
    travelled = [
        played.state,
        *played.uploads.values(),
        algorithm.broadcast(played.state, "new", server_env(sites_of(), 0)),
    ]
    for message in travelled:
        assert {name for tree in message.trees.values() for name in tree} == shared
    heads = [memory.trees["own"] for memory in played.memories.values()]
    assert all(set(head) == {"head.w", "head.b", "buffers:base/count"} for head in heads)
    assert len({head.part("params").digest for head in heads}) == 3, "heads of different clients are equal"
    model = NumpyModel(statistics=True)
    sent = algorithm.broadcast(played.state, "new", server_env(sites_of(model), 0))
    newcomer = model.state_of(algorithm.start(sent, Message()), rows_of(4), client_env(sites_of(model)["north"], 0, 3))
    assert newcomer.only(sent.trees["params"]) == sent.trees["params"]


@invariant
def i40_personal_models_never_travel():
    everything = set(server_env(sites_of(NumpyModel(statistics=True)), 0).first["all"])
    for algorithm in PERSONAL:
        played = play(algorithm, sites_of(NumpyModel(statistics=True)), rounds=2)
        shared = algorithm.shared_names(everything)
        for upload in played.uploads.values():
            sent = {name for tree in upload.trees.values() for name in tree}
            assert sent <= shared, f"{algorithm.name} sends {sent - shared}"
        models = {memory.trees["own"].part("params").digest for memory in played.memories.values()}
        assert len(models) == (1 if isinstance(algorithm, FedBABU) else 3), f"{algorithm.name} has equal models"


def downsampled():
    """Normalisation by type: in a Sequential, under a name without "bn"; and a linear layer that is called so."""
    parts = {
        "0": torch.nn.Linear(5, 4),
        "downsample": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)),
    }
    parts |= {"bn": torch.nn.Linear(4, 4), "norm1": torch.nn.LayerNorm(4), "head": torch.nn.Linear(4, 3)}
    return torch.nn.Sequential(OrderedDict(parts))


@invariant
def i40_normalisation_is_told_by_its_type():
    sites = sites_of(pf_torch(downsampled, lr=0.1, epochs=2))
    played = play(FedBN(), sites, rounds=2)
    private = {"downsample.1.weight", "downsample.1.bias", "stats:downsample.1/mean", "stats:downsample.1/variance"}
    everything = set(server_env(sites, 0).first["all"])
    travelled = {name for upload in played.uploads.values() for tree in upload.trees.values() for name in tree}
    assert travelled == set(played.state.trees["params"]) == everything - private - {COUNTER}
    owns = [memory.trees["own"] for memory in played.memories.values()]
    assert all(set(own) == private | {COUNTER} for own in owns)
    assert len({own.part("params").digest for own in owns}) == len({own.part("stats").digest for own in owns}) == 3


@invariant
def i40_what_is_held_stays_bit_for_bit():
    for algorithm in (FedRep(shared="shared", head_epochs=2), FedBABU(shared="shared")):
        model = pf_torch(
            shared=lambda: torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)),
            personal=lambda: torch.nn.Linear(4, 3),
        )
        site = sites_of(model)["west"]
        env = client_env(site, 0, 1)
        sent = algorithm.broadcast(algorithm.init(server_env({"west": site}, 0)), "west", server_env({"west": site}, 0))
        steps, states = algorithm.client_update(sent, Message(), env), [model.first(site.train, env)]
        request = next(steps)
        try:
            while True:
                states.append(model.fit(request, site.train, env).state)
                request = steps.send(Fitted(states[-1], 1))
        except StopIteration:
            pass
        moved = [{name for name in a if not np.array_equal(a[name], b[name])} for a, b in pairwise(states)]
        head = {"personal.weight", "personal.bias"}
        assert head == moved[0] if isinstance(algorithm, FedRep) else len(moved) == 1, "the head's turn moved the base"
        assert not head & moved[-1] and "stats:shared.1/mean" in moved[-1], "the base's turn moved the head"


@invariant
def i40_buffers_never_travel_and_go_on_where_they_were():
    for shared in ((), ("head",)):
        played = play(FedAvg(shared=shared), sites_of(NumpyModel(statistics=True)), rounds=3)
        names = {name for tree in played.state.trees.values() for name in tree}
        assert "buffers" not in {part_of(name) for name in names}
        counts = [memory.trees["own"]["buffers:base/count"] for memory in played.memories.values()]
        assert [int(count) for count in counts] == [6, 6, 6], "a counter starts afresh"
    plain = play(FedAvg(), sites_of(), rounds=2)
    assert all(not memory.trees for memory in plain.memories.values()), "a fully shared model needs no memory"


@invariant
def i59_statistics_are_those_of_all_rows():
    for algorithm in AVERAGING:
        sites = sites_of(NumpyModel(statistics=True))
        rows = np.concatenate([site.train.x for site in sites.values()]).astype(float)
        for rounds in (1, 3):
            stats = play(algorithm, sites, rounds=rounds).state.trees["stats"]
            np.testing.assert_allclose(stats["stats:base/mean"], rows.mean(0), rtol=1e-9)
            np.testing.assert_allclose(stats["stats:base/variance"], rows.var(0), rtol=1e-9)


# ---------------------------------------------------------------- failure


@invariant
def i52_a_client_that_sends_nan_is_absent():
    def spoil(name, upload):
        if name != "west":
            return upload
        tree, trees = next(iter(upload.trees.items()))
        return upload.put(trees={tree: Tree({n: np.full_like(a, np.nan) for n, a in trees.items()})})

    for algorithm in [*AVERAGING, *PERSONAL, FedAvg(shared="base"), FedMD(sites_of()["north"].public)]:
        spoilt = play(algorithm, sites_of(), rounds=3, tamper=spoil)
        absent = play(algorithm, sites_of(), rounds=3, cohort=lambda _: ["north", "south"])
        assert spoilt.digest == absent.digest, f"{algorithm.name}: a NaN left a trace"


# ---------------------------------------------------------------- distillation


def digested(algorithm, consensus, *, problem=CLASSES, lr=1e-3, public=None, hidden=0):
    """(start, gradient) of one step of what FedMD asks a client to do with a consensus."""
    model = NumpyModel(hidden=hidden, lr=lr)
    site = sites_of(model, problem)["north"]
    env = client_env(site, 0, 1)
    public = site.public if public is None else public
    message = Message({"soft": Tree({"public": consensus})}, {"public_rows": float(len(public))})
    start = model.first(public, env)
    lesson = algorithm.lesson(message, public, problem)
    after = model.fit(replace(lesson, start=(start,)), public, env).state
    return start, {name: (start[name] - after[name]) / lr for name in start}


def public_outputs(scale=1.0):
    site = sites_of(LINEAR)["north"]
    env = client_env(site, 0, 1)
    model = NumpyModel(hidden=0)
    start = model.first(site.public, env)
    return site.public, model.predict(Predict(start=(start,)), site.public, env) * np.float32(scale)


def some_consensus(algorithm, n=9):
    logits = np.random.default_rng(5).normal(size=(n, 3)).astype(np.float32) * 2
    return algorithm.said(logits, CLASSES)


@invariant
def i42_swapping_a_clients_model_leaves_the_others_alone():
    public = sites_of()["north"].public
    wests = (NumpyModel(7), NumpyModel(0, dtype="float32"))
    runs = [
        play(FedMD(public), sites_of({"north": NumpyModel(3), "south": NumpyModel(5), "west": west}), rounds=1)
        for west in wests
    ]
    for name in ("north", "south"):
        assert runs[0].memories[name].digest == runs[1].memories[name].digest


@invariant
def i44_twice_the_same_clients_make_the_same_consensus():
    one = sites_of()
    twice = one | {f"{name} again": replace(site, name=f"{name} again") for name, site in one.items()}
    for weighting in ("uniform", "num_examples"):
        algorithm = FedMD(one["north"].public, weighting=weighting)
        soft = [play(algorithm, sites, rounds=3).state.trees["soft"] for sites in (one, twice)]
        assert_near(*soft, 1e-5)


@invariant
def i45_a_consensus_is_a_distribution():
    for average in ("probabilities", "logits"):
        algorithm = FedMD(sites_of()["north"].public, average=average)
        played = play(algorithm, sites_of(), rounds=2)
        assert len(played.uploads) == 3, "what clients said was refused"
        soft = played.state.trees["soft"]["public"]
        assert soft.dtype == np.float32
        np.testing.assert_allclose(algorithm.teacher(soft, CLASSES).sum(-1), 1.0, rtol=1e-5)


@invariant
def i46_a_student_that_agrees_has_no_gradient():
    public, outputs = public_outputs()
    for average in ("probabilities", "logits"):
        for temperature in (1.0, 2.0, 7.0):
            algorithm = FedMD(public, temperature=temperature, average=average)
            _, gradient = digested(algorithm, algorithm.said(outputs, CLASSES))
            assert max(float(np.abs(g).max()) for g in gradient.values()) < 1e-5, (average, temperature)


@invariant
def i47_the_gradient_is_that_of_the_formula():
    public, _ = public_outputs()
    x = public.x.astype(float)
    for temperature in (1.0, 4.0):
        algorithm = FedMD(public, temperature=temperature)
        consensus = some_consensus(algorithm)
        start, gradient = digested(algorithm, consensus)
        w, wide = {name: np.array(a) for name, a in start.items()}, consensus.astype(float)

        def loss(w=w, t=temperature, teacher=wide):
            return -(t**2) * float((teacher * np.log(softmax((x @ w["head.w"] + w["head.b"]) / t))).sum(1).mean())

        for name, place in (("head.w", (2, 1)), ("head.b", (0,))):
            kept = w[name][place]
            w[name][place] = kept + 1e-5
            up = loss()
            w[name][place] = kept - 1e-5
            down = loss()
            w[name][place] = kept
            np.testing.assert_allclose(gradient[name][place], (up - down) / 2e-5, rtol=1e-5)


@invariant
def i48_at_high_temperature_centred_logits_are_matched():
    public, outputs = public_outputs()
    algorithm = FedMD(public, temperature=1e3, average="logits")
    teacher = np.random.default_rng(6).normal(size=outputs.shape).astype(np.float32)
    _, gradient = digested(algorithm, algorithm.said(teacher, CLASSES))
    gap = (outputs - outputs.mean(1, keepdims=True)) - (teacher - teacher.mean(1, keepdims=True))
    np.testing.assert_allclose(gradient["head.b"], gap.mean(0) / 3, rtol=2e-2, atol=2e-3)


@invariant
def i49_the_size_of_the_public_set_does_not_count():
    public, _ = public_outputs()
    algorithm = FedMD(public)
    consensus = some_consensus(algorithm)
    _, once = digested(algorithm, consensus)
    twice_rows = Rows({"x": np.concatenate([public.x, public.x])})
    _, twice = digested(algorithm, np.concatenate([consensus, consensus]), public=twice_rows)
    assert_near(once, twice, 1e-9)


@invariant
def i51_a_constant_added_to_logits_changes_nothing():
    _, outputs = public_outputs()
    for average in ("probabilities", "logits"):
        algorithm = FedMD(average=average)
        np.testing.assert_allclose(
            algorithm.said(outputs + np.float32(8), CLASSES), algorithm.said(outputs, CLASSES), atol=2e-6
        )


# ---------------------------------------------------------------- terms, in a framework with gradients of its own


class TorchOps:
    """The few operations that the terms here use."""

    sum = staticmethod(lambda a, axis=None: a.sum() if axis is None else a.sum(axis))
    mean = staticmethod(lambda a, axis=None: a.mean() if axis is None else a.mean(axis))
    square = staticmethod(torch.square)
    log_softmax = staticmethod(lambda z: torch.log_softmax(z, -1))
    reshape = staticmethod(torch.reshape)
    stop_gradient = staticmethod(lambda a: a.detach())


class TorchStep:
    def __init__(self, outputs, teacher=None, params=None, anchor=None):
        self.outputs, self.params = outputs, params
        self.targets, self.tensors = {"teacher": teacher}, {"anchor": anchor}

    @staticmethod
    def mean(per_row):
        return per_row.mean()


def drawn(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape), requires_grad=True)


@invariant
def i50_the_teacher_is_a_constant():
    for term in (Distill(2.0), Match()):
        student, teacher = drawn(6, 3), drawn(6, 3, seed=1)
        answer = torch.softmax(teacher, -1) if isinstance(term, Distill) else teacher * 1.0
        term(TorchOps, TorchStep(student, answer)).backward()
        assert teacher.grad is None, f"{type(term).__name__} trains the teacher too"
        assert float(student.grad.abs().max()) > 0


@invariant
def i50_terms_have_the_gradient_of_their_formulas():
    w, anchor = drawn(4), drawn(4, seed=1).detach()
    Near(0.6)(TorchOps, TorchStep(None, params={"w": w}, anchor={"w": anchor})).backward()
    np.testing.assert_allclose(w.grad, 0.6 * (w.detach() - anchor), rtol=1e-12)
    for temperature in (1.0, 3.0):
        z, teacher = drawn(6, 3), torch.softmax(drawn(6, 3, seed=1), -1).detach()
        Distill(temperature, 0.5)(TorchOps, TorchStep(z, teacher)).backward()
        wanted = 0.5 * temperature * (oracles.softmax(z.detach().numpy() / temperature) - teacher.numpy()) / 6
        np.testing.assert_allclose(z.grad, wanted, rtol=1e-10)
    z, teacher = drawn(6, 2), drawn(6, 2, seed=1).detach()
    Match(0.5)(TorchOps, TorchStep(z, teacher)).backward()
    np.testing.assert_allclose(z.grad, 0.5 * 2 * (z.detach() - teacher) / 12, rtol=1e-12)


@invariant
def i52_a_regression_digests_values():
    public = sites_of(LINEAR, VALUES)["north"].public
    algorithm = FedMD(public)
    consensus = np.random.default_rng(5).normal(size=(9, 2)).astype(np.float32)
    start, gradient = digested(algorithm, consensus, problem=VALUES)
    w = {name: np.array(a) for name, a in start.items()}
    assert_near(gradient, oracles.gradient(w, public.x.astype(float), consensus.astype(float), "values"), 1e-7)
