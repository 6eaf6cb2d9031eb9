"""Known mistakes of distillation, each put in on purpose: a check that lets one pass proves nothing."""

from dataclasses import replace

import numpy as np
import pytest
import test_distill as taught
import test_feddf as fused
import test_fedmd_consensus as agreed
import test_fedmd_shared as shared
from numpy_model import CLASSES

from polyfed.algorithms import Distill, FedAvg, FedDF, FedMD, consensus, feddf
from polyfed.algorithms.consensus import Consensus
from polyfed.core.algorithm import Fitted
from polyfed.core.errors import SpecError
from polyfed.core.terms import Distill as Term

REAL_SOFT, REAL_CONSENSUS, REAL_TEACH = Consensus.soft, Consensus.consensus, Consensus.teach
REAL_UPDATE, REAL_DF, REAL_MD = Distill.server_update, FedDF.server_update, FedMD.server_update
REAL_CERTAINTY, REAL_BROADCAST = consensus.certainty, FedDF.broadcast
REAL_MD_BROADCAST, REAL_CLIENT, REAL_DISTILLED = FedMD.broadcast, FedMD.client_update, FedDF._distilled


def unweighted_numerator(self, outputs, env):
    """w is sent, but p is not multiplied by it."""
    tree, numbers = REAL_SOFT(self, outputs, env)
    said = self.said(outputs, env.problem)
    return tree.overlay(type(tree)({"public": said})), numbers


def undivided(self, aggregate):
    return aggregate.mean("soft").only(["public"])


def upload_before_digest(self, message, memory, env):
    """What is averaged is the base as it was before the consensus was learned."""
    steps = REAL_CLIENT(self, message, memory, env)
    answer, first = None, None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as end:
            upload, memory = end.value
            break
        answer = yield request
        first = answer if first is None and isinstance(answer, Fitted) else first
    if "params" not in message.trees:
        return upload, memory
    return upload.put(self.averaging.upload(message, first, env).trees), memory


def everybody(self, state, client, env):
    return state


def from_scratch(self, state, aggregate, env):
    """The student begins each round where it began the first."""
    site, own = self._student(env)
    return REAL_UPDATE(self, state.put(trees={"student": site.model.first(site.train, own)}), aggregate, env)


def student_told(self, state, client, env):
    return state


def not_distilled(self, group, parts, consensus, env):
    return parts


def not_averaged(aggregate, group):
    found = REAL_OF_GROUP(aggregate, group)
    found.sums.trees = {}
    return found


REAL_OF_GROUP = feddf._of_group


def own_group_alone(self, aggregate):
    """The teacher is one client's logits, not everybody's."""
    return REAL_CONSENSUS(self, aggregate).map(lambda a: a * 0.5)


def other_first(self, state, client, env):
    """Every client is sent the first group's parameters."""
    return REAL_BROADCAST(self, state, client, replace(env, group="group 0"))


def sharpened_again(self, message, public, problem):
    return FedMD.lesson(self, message, public, problem)


def steps_forgotten(self, group, parts, consensus, env):
    return REAL_DISTILLED(replace(self, epochs=None, steps=None), group, parts, consensus, env)


def always(function, *arguments):
    return lambda: function(*arguments)


WEIGHTED = always(agreed.test_consensus_when_weighted_equals_the_formula, "entropy", "probabilities")
CERTAIN = always(agreed.test_consensus_when_weighted_equals_the_formula, "certainty", "probabilities")
TAUGHT = always(taught.test_student_when_taught_in_rounds_goes_on_from_where_it_stood, CLASSES)
EQUAL = always(fused.test_ensemble_when_of_one_or_of_equal_clients_is_the_teacher_and_changes_nothing, 3, {})

#: mistake -> (what is patched, with what, the check that must notice)
MUTANTS = {
    "weights are not in the numerator": (Consensus, "soft", unweighted_numerator, WEIGHTED),
    "the sum is not divided by the weights": (Consensus, "consensus", undivided, WEIGHTED),
    "the certain weigh less": (consensus, "certainty", lambda z: 1 / REAL_CERTAINTY(z), WEIGHTED),
    "certainty is one minus entropy": (consensus, "certainty", lambda z: 1 + np.log(REAL_CERTAINTY(z)), WEIGHTED),
    "certainty is not sent": (
        Consensus,
        "soft",
        lambda s, z, env: (REAL_SOFT(s, z, env)[0], {"certainty": 1.0}),
        CERTAIN,
    ),
    "a boast of certainty counts": (
        Consensus,
        "weight",
        lambda s, numbers, lag, tree: numbers.get("certainty", 1.0),
        agreed.test_certainty_when_claimed_above_one_counts_as_one,
    ),
    "sharpening multiplies by T": (
        consensus,
        "sharpened",
        lambda p, s: consensus.softened(np.log(np.maximum(p, 1e-30)), 1 / s),
        agreed.test_run_when_sharpened_leaves_surer_models,
    ),
    "probabilities pass as logits": (
        consensus,
        "no_logits",
        lambda z: "",
        agreed.test_client_when_its_model_ends_in_softmax_is_refused_by_name,
    ),
    "the base leaves before the digest": (
        FedMD,
        "client_update",
        upload_before_digest,
        shared.test_base_when_one_client_has_it_makes_the_run_that_it_would_be_without_sharing,
    ),
    "the base goes to everybody": (
        FedMD,
        "broadcast",
        everybody,
        shared.test_messages_when_made_differ_by_who_has_the_base,
    ),
    "the base is weighted like predictions": (
        FedMD,
        "weight",
        lambda s, numbers, lag, tree: Consensus.weight(s, numbers, lag, "soft"),
        shared.test_weights_when_predictions_are_uniform_leave_the_base_weighted_by_rows,
    ),
    "the student begins anew each round": (Distill, "server_update", from_scratch, TAUGHT),
    "the student learns at another temperature": (Distill, "term", lambda s, p: Term(1.0), TAUGHT),
    "the student learns for as long as it likes": (
        Consensus,
        "teach",
        lambda s, c, p, rows, epochs: REAL_TEACH(s, c, p, rows, None),
        TAUGHT,
    ),
    "the student travels": (
        Distill,
        "broadcast",
        student_told,
        always(taught.test_broadcast_when_made_never_holds_the_student, {}, set()),
    ),
    "feedback is sharpened twice": (
        Distill,
        "lesson",
        sharpened_again,
        taught.test_feedback_when_given_is_what_the_student_says,
    ),
    "groups are not distilled": (FedDF, "_distilled", not_distilled, fused.test_round_when_run_equals_the_pseudocode),
    "groups are not averaged": (feddf, "_of_group", not_averaged, fused.test_round_when_run_equals_the_pseudocode),
    "the server's epochs are forgotten": (
        FedDF,
        "_distilled",
        steps_forgotten,
        fused.test_round_when_run_equals_the_pseudocode,
    ),
    "the ensemble's logits are halved": (Consensus, "consensus", own_group_alone, EQUAL),
    "logits are taken for probabilities": (FedDF, "teacher", lambda s, c, p: c, EQUAL),
    "a group is sent another's parameters": (
        FedDF,
        "broadcast",
        other_first,
        fused.test_messages_when_made_hold_the_clients_own_group_alone,
    ),
    "predictions are weighted by rows": (
        FedDF,
        "weight",
        lambda s, numbers, lag, tree: FedAvg().weight(numbers, lag, tree),
        fused.test_round_when_run_equals_the_pseudocode,
    ),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_mistake_when_made_is_noticed(mistake, monkeypatch):
    owner, name, wrong, check = MUTANTS[mistake]
    check()  # passes without the mistake
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, SpecError, pytest.fail.Exception)):
        check()
