"""Known mistakes, each put in on purpose: a check that lets one pass proves nothing.

They are mistakes found in published federated learning code, and the slips that lie nearest here.
"""

from dataclasses import replace

import numpy as np
import pytest
import test_algorithm_oracles as oracle
from invariants import INVARIANTS, TorchOps
from numpy_model import CLASSES

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
    PFedMe,
    apfl,
    consensus,
    fedavg,
    fedprox,
)
from polyfed.algorithms.fedopt import Adaptive, ServerOptimizer
from polyfed.algorithms.personal import Personal
from polyfed.core.aggregate import Aggregate
from polyfed.core.algorithm import Algorithm
from polyfed.core.message import Message
from polyfed.core.terms import Distill, Near, Own
from polyfed.core.tree import Tree


def term_of_zero(algorithm, request):
    """A term that is next to nothing, in place of none."""
    tensors = {"anchor": request.start[-1].part("params")}
    return replace(request, terms=(Own(), Near(1e-9)), tensors=tensors) if algorithm.mu == 0.0 else request


def request_of(change):
    """FedProx's request with a change made to it."""
    real = FedProx.request
    return lambda self, message, memory: change(self, real(self, message, memory))


def moved_by(stats, start):
    return stats - start


def averaged(mean, start):
    """The mean of means and the mean of variances: what is between clients is lost."""
    return start + mean


def without_empty_guard(self, state, aggregate, env):
    update = aggregate.mean("params") if aggregate.clients else state.trees["params"] * 0.0
    return state.put(trees=self.step(state, update))


def v_from_zero(self, env):
    state = ServerOptimizer.init(self, env)
    return state.put(trees={"v": state.trees["m"] * 0.0})


def corrected(real):
    """Adam's bias correction, as if every round were the first."""
    return lambda self, moments: real(self, {"m": moments["m"] * (1 / (1 - self.beta1)), "v": moments["v"]})


def tau_inside(self, moments):
    m, v = moments["m"], moments["v"]
    return Tree.wrap(m.spec, {d: self.lr * a / np.sqrt(v.buffers[d] + self.tau) for d, a in m.buffers.items()})


REAL_SERVER_STEP = ServerOptimizer.step
REAL_UPLOAD, REAL_REMEMBER, REAL_SERVER_UPDATE = FedAvg.upload, FedAvg.remember, FedAvg.server_update
REAL_SAID, REAL_TEACHER, REAL_DIRECTION = FedMD.said, FedMD.teacher, Adaptive.direction


def negative_upload(self, message, fitted, env):
    upload = REAL_UPLOAD(self, message, fitted, env)
    return upload.put(trees={"params": upload.trees["params"] * -1.0})


def whole_upload(self, message, fitted, env):
    upload = REAL_UPLOAD(self, message, fitted, env)
    return upload.put(trees={"params": fitted.state.part("params")})


def accelerated_stats(self, state, aggregate, env):
    """Statistics moved by the parameters' step, as libraries do that optimize every array they receive."""
    after = REAL_SERVER_UPDATE(self, state, aggregate, env)
    if "stats" not in state.trees or not aggregate.clients:
        return after
    return after.put(trees={"stats": state.trees["stats"] + (after.trees["stats"] - state.trees["stats"]) * 1.5})


def without_buffers(self, memory, fitted):
    own = set(fitted.state) - self.shared_names(fitted.state)
    kept = {**fitted.state.only(own), "buffers:base/count": np.int64(0)}
    return memory.put(trees={"own": Tree(kept)})


def wide_step(self, state, update):
    after = REAL_SERVER_STEP(self, state, update)
    return after | {"params": Tree({n: a.astype(np.float64) for n, a in after["params"].items()})}


def digest_first(self, message, memory, env):
    return REAL_CLIENT(replace(self, order="paper"), message, memory, env)


REAL_CLIENT = FedMD.client_update


def forgetful(self, message, memory, env):
    return REAL_CLIENT(self, message, Message(), env)


def remember_once(self, memory, fitted):
    return memory if memory.trees else REAL_REMEMBER(self, memory, fitted)


def changed(real, change):
    """`client_update` with a change made to each of its requests: (request, its number, the message) -> request."""

    def update(self, message, memory, env):
        steps, answer, number = real(self, message, memory, env), None, 0
        while True:
            try:
                request = steps.send(answer)
            except StopIteration as end:
                return end.value
            answer = yield change(request, number, message)
            number += 1

    return update


def exchanged(request, number, message):
    return replace(request, part=(("head.w",), ("head.b",))[number])


def anchored_once(request, number, message):
    return replace(request, tensors={"anchor": message.trees["params"]})


def by_name(self, names):
    return {name for name in names if "bn" not in name}


def statistics_alone(self, names):
    return {name for name in names if not name.startswith("stats:")}


def uphill(self, memory):
    """An α that moves against what was learned: the slope's sign is lost."""
    return 2 * self.alpha - memory.numbers.get("alpha", self.alpha)


REAL_PFEDME, REAL_REP, REAL_PERSONAL = PFedMe.client_update, FedRep.client_update, Ditto.personal


def anchored_at_trained(self, message, memory, fitted):
    """The anchor is what this client made of the shared model."""
    trained = fitted.state.only(message.trees["params"])
    steps = REAL_PERSONAL(self, message, memory, fitted)
    request = next(steps)
    answer = yield replace(request, tensors={"anchor": trained}) if request.tensors else request
    try:
        steps.send(answer)
    except StopIteration as end:
        return end.value


#: mistake -> (what is patched, with what, the check that must notice)
MUTANTS = {
    "the mean update is subtracted": (FedAvg, "step", lambda s, st, u: {"params": st.trees["params"] - u}, "i14"),
    "an upload is start minus trained": (FedAvg, "upload", negative_upload, "i01"),
    "an upload is the weights, not the update": (FedAvg, "upload", whole_upload, "i40_what"),
    "the mean is not weighted": (FedAvg, "weight", lambda *_: 1.0, "i01"),
    "weights are steps, not rows": (FedAvg, "weight", lambda s, numbers, *_: numbers["steps"], "i19"),
    "the sum in place of the mean": (Aggregate, "mean", Aggregate.sum, "i20"),
    "statistics are averaged as variances": (fedavg, ("moments_of", "stats_of"), (moved_by, averaged), "i59"),
    "statistics are optimized like parameters": (FedAvg, "server_update", accelerated_stats, "i59"),
    "momentum goes on in a round of nobody": (FedAvg, "server_update", without_empty_guard, "i26"),
    "private layers are shared": (FedAvg, "shared_names", lambda _, names: set(names), "i40_what"),
    "private layers stay as they were": (FedAvg, "remember", remember_once, "i36"),
    "buffers are forgotten": (FedAvg, "remember", without_buffers, "i40_buffers"),
    "the server widens the dtype": (ServerOptimizer, "step", wide_step, "i28"),
    "mu twice": (FedProx, "request", request_of(lambda s, r: replace(r, terms=(Own(), Near(2 * s.mu)))), "prox"),
    "no proximal term": (FedProx, "request", request_of(lambda s, r: replace(r, terms=(Own(),))), "prox"),
    "the anchor is zero": (
        FedProx,
        "request",
        request_of(lambda s, r: replace(r, tensors={"anchor": r.tensors["anchor"] * 0.0}) if r.tensors else r),
        "prox",
    ),
    "mu of zero adds a term": (FedProx, "request", request_of(term_of_zero), "i02"),
    "momentum is damped": (
        FedAvgM,
        "moments",
        lambda s, st, u: {"m": st.trees["m"] * s.beta + u * (1 - s.beta)},
        "momentum",
    ),
    "v starts at zero": (Adaptive, "init", v_from_zero, "adam"),
    "bias correction": (Adaptive, "direction", corrected(REAL_DIRECTION), "adam"),
    "tau under the root": (Adaptive, "direction", tau_inside, "yogi"),
    "Adagrad forgets": (FedAdagrad, "second", lambda s, v, q: v * 0.99 + q, "adagrad"),
    "Adam's betas are exchanged": (FedAdam, "second", lambda s, v, q: v * (1 - s.beta2) + q * s.beta2, "adam"),
    "Yogi has Adam's second moment": (FedYogi, "second", FedAdam.second, "yogi"),
    "Yogi without the sign": (FedYogi, "second", lambda s, v, q: v + q * (1 - s.beta2), "yogi"),
    "no T squared": (FedMD, "term", lambda s, p: Distill(s.temperature, s.strength / s.temperature**2), "i47"),
    "T in place of T squared": (FedMD, "term", lambda s, p: Distill(s.temperature, s.strength / s.temperature), "i47"),
    "mean over classes too": (FedMD, "term", lambda s, p: Distill(s.temperature, s.strength / p.outputs), "i47"),
    "a term at another temperature": (FedMD, "term", lambda s, p: Distill(1.0, s.strength), "i46"),
    "the teacher is not softened": (
        FedMD,
        "said",
        lambda s, z, p: REAL_SAID(replace(s, temperature=1.0), z, p),
        "i46",
    ),
    "the teacher is softened twice": (FedMD, "teacher", lambda s, c, p: consensus.softened(c, s.temperature), "i46"),
    "logits are taken for probabilities": (
        FedMD,
        "teacher",
        lambda s, c, p: c,
        "i45",
    ),
    "logits are not centred": (
        FedMD,
        "said",
        lambda s, z, p: z if s.average == "logits" else REAL_SAID(s, z, p),
        "i51",
    ),
    "softmax over rows": (consensus, "softened", lambda z, t: REAL_SOFTENED(z.T, t).T, "i45"),
    "the teacher is trained too": (TorchOps, "stop_gradient", staticmethod(lambda a: a), "i50_the_teacher"),
    "the digest comes first": (FedMD, "client_update", digest_first, "md last"),
    "the model is forgotten": (FedMD, "client_update", forgetful, "md last"),
    "the consensus is weighted by rows": (FedMD, "weight", lambda s, numbers, *_: numbers["num_examples"], "md last"),
    "the consensus is a sum": (Aggregate, "mean", Aggregate.sum, "i44"),
    "an empty round clears the consensus": (
        FedMD,
        "server_update",
        lambda s, state, aggregate, env: state.put(trees={"soft": aggregate.mean("soft")}),
        "i26",
    ),
    "normalisation is told by its name": (FedBN, "shared_names", by_name, "i40_normalisation"),
    "statistics alone are private": (FedBN, "shared_names", statistics_alone, "i40_normalisation"),
    "the base trains before the head": (FedRep, "client_update", changed(REAL_REP, exchanged), "rep"),
    "head and base train together": (
        FedRep,
        "client_update",
        changed(REAL_REP, lambda request, number, message: replace(request, part=())),
        "i40_what_is_held",
    ),
    "the head trains too": (FedBABU, "request", FedAvg.request, "babu"),
    "nobody tunes at the end": (FedBABU, "personalise", Algorithm.personalise, "babu"),
    "a personal model starts afresh": (
        Personal,
        "start",
        lambda s, message, memory: FedAvg.start(s, message, Message()),
        "ditto",
    ),
    "a personal model is pulled twice": (fedprox, "Near", lambda lam: Near(2 * lam), "ditto"),
    "the anchor is what the client trained": (Ditto, "personal", anchored_at_trained, "ditto"),
    "a step of the mixture is alpha's": (apfl, "Own", lambda weight: Own(weight**0.5), "apfl"),
    "alpha is the shared model's share": (apfl, "mixed", lambda a, v, w: apfl_mixed(1 - a, v, w), "apfl"),
    "the mixture is taken for v": (apfl, "unmixed", lambda a, mixture, w: mixture, "apfl"),
    "alpha climbs": (APFL, "_alpha", uphill, "alpha"),
    "the anchor stays where it was sent": (PFedMe, "client_update", changed(REAL_PFEDME, anchored_once), "me"),
    "beta is forgotten": (PFedMe, "step", FedAvg.step, "me"),
    "pFedMe's mean is weighted": (PFedMe, "weight", lambda s, numbers, *_: numbers["num_examples"], "me"),
}
apfl_mixed = apfl.mixed
REAL_SOFTENED = consensus.softened

ORACLES = {
    "rep": oracle.test_fedrep_when_run_equals_the_pseudocode,
    "babu": oracle.test_fedbabu_when_run_equals_the_pseudocode,
    "ditto": lambda: oracle.test_ditto_when_run_equals_the_pseudocode(0.7),
    "apfl": lambda: oracle.test_apfl_when_run_equals_the_pseudocode(0.3, False),
    "alpha": lambda: oracle.test_apfl_when_run_equals_the_pseudocode(0.5, True),
    "me": lambda: oracle.test_pfedme_when_run_equals_the_pseudocode(1.6),
    "prox": lambda: oracle.test_fedavg_and_fedprox_when_run_equal_the_pseudocode(0.7, "num_examples", CLASSES),
    "md last": lambda: oracle.test_fedmd_when_run_equals_the_pseudocode("last", "probabilities", CLASSES),
    **{name: lambda n=name: oracle.test_server_optimizer_when_run_equals_the_pseudocode(n) for name in oracle.SERVER},
}


def check_named(name):
    if name in ORACLES:
        return ORACLES[name]
    found = [check for key, check in INVARIANTS.items() if key.startswith(name)]
    assert found, name
    return lambda: [check() for check in found]


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mistake_when_made_is_noticed(mistake, monkeypatch):
    owner, names, wrongs, check = MUTANTS[mistake]
    check_named(check)()  # passes without the mistake
    pairs = [(names, wrongs)] if isinstance(names, str) else zip(names, wrongs, strict=True)
    for name, wrong in pairs:
        monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        check_named(check)()
