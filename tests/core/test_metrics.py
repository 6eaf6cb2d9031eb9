"""Metrics: hand-computed numbers, scikit-learn as oracle, and what may be pooled (invariant 61)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from polyfed.core import metrics
from polyfed.core.errors import DataError, UsageError
from polyfed.core.rows import Problem

BINARY = Problem(("no", "yes"), 2)
THREE = Problem(("a", "b", "c"), 3)
VALUE = Problem(None, 1)


def logits(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, classes)).astype(np.float32).round(1), rng.integers(0, classes, n)


# ---- hand-computed


def test_binary_metrics_when_computed_by_hand_agree():
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]])
    got = metrics.all_of(np.log(p), [0, 0, 1, 1], BINARY)
    assert got == pytest.approx(
        {
            "accuracy": 0.75,
            "balanced_accuracy": 0.75,
            "loss": -(math.log(0.9) + math.log(0.6) + math.log(0.35) + math.log(0.8)) / 4,
            "brier": (0.01 + 0.16 + 0.4225 + 0.04) / 4,
            "auc": 0.75,
        }
    )


def test_regression_metrics_when_computed_by_hand_agree():
    wanted = {"loss": 2.5, "mse": 2.5, "mae": 1.5, "rmse": math.sqrt(2.5), "r2": -4.0}
    assert metrics.all_of([1.0, 5.0], [2.0, 3.0], VALUE) == pytest.approx({**wanted, "r2": 1 - 5 / 0.5})
    assert metrics.all_of([[1.0], [5.0]], [2.0, 3.0], VALUE)["mse"] == 2.5


def test_loss_when_logits_are_huge_is_stable():
    got = metrics.all_of([[1000.0, 0.0], [0.0, 1000.0]], [0, 0], BINARY)
    assert (got["loss"], got["brier"]) == (500.0, 0.5)


def test_loss_when_a_forest_gives_probability_zero_is_dear_but_finite():
    got = metrics.all_of([[0.0, -np.inf], [-np.inf, 0.0], [0.0, -np.inf]], [0, 0, 1], BINARY)
    assert got["loss"] == pytest.approx(2 / 3 * -math.log(1e-15))
    assert all(math.isfinite(value) for value in got.values())


def test_loss_when_a_constant_is_added_to_the_logits_is_the_same():
    outputs, target = logits(50, 3)
    shifted = metrics.all_of(outputs.astype(np.float64) + 100, target, THREE)
    assert shifted == pytest.approx(metrics.all_of(outputs, target, THREE))


def test_auc_when_probabilities_would_round_to_one_still_ranks():
    outputs = np.array([[0.0, 800.0], [0.0, 900.0]])
    assert metrics.all_of(outputs, [0, 1], BINARY)["auc"] == 1.0


@pytest.mark.parametrize("target", [[0, 0, 0], [1, 1, 1]])
def test_metrics_when_one_class_only_have_no_auc(target):
    got = metrics.all_of(np.zeros((3, 2)), target, BINARY)
    assert "auc" not in got
    assert {"accuracy", "loss"} <= set(got)
    with pytest.raises(DataError, match="one"):
        metrics.auc([1, 2, 3], target)
    with pytest.raises(DataError, match="one"):
        metrics.sensitivity_at(0.9, [1, 2, 3], target)


def test_constant_model_when_scored_has_an_auc_of_one_half():
    assert metrics.all_of(np.zeros((4, 2)), [0, 1, 1, 0], BINARY)["auc"] == 0.5


def test_r2_when_the_target_does_not_vary_is_absent():
    assert "r2" not in metrics.all_of([1.0, 2.0], [3.0, 3.0], VALUE)


def test_sensitivity_when_specificity_is_fixed_counts_those_above_the_threshold():
    scores, target = [0.1, 0.2, 0.3, 0.4, 0.25, 0.35, 0.9], [0, 0, 0, 0, 1, 1, 1]
    found = [metrics.sensitivity_at(s, scores, target) for s in (1.0, 0.75, 0.5, 0.0)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert metrics.sensitivity_at(0.9, [0.5] * 10, [0, 1] * 5) == 0.0  # a tie cannot be told apart


# ---- scikit-learn as oracle


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(0, 10_000))
def test_auc_when_scores_tie_agrees_with_scikit_learn(n, seed):
    rng = np.random.default_rng(seed)
    scores, target = rng.integers(0, 6, n) / 3, rng.integers(0, 2, n)
    target[:2] = [0, 1]
    assert metrics.auc(scores, target) == pytest.approx(oracle.roc_auc_score(target, scores))
    for specificity in (0.5, 0.8, 0.9):
        fpr, tpr, _ = oracle.roc_curve(target, scores, drop_intermediate=False)
        wanted = tpr[fpr <= 1 - specificity + 1e-9].max()
        assert metrics.sensitivity_at(specificity, scores, target) == pytest.approx(wanted)


@pytest.mark.parametrize(("problem", "classes"), [(BINARY, 2), (THREE, 3)])
def test_classification_when_compared_with_scikit_learn_agrees(problem, classes):
    outputs, target = logits(300, classes)
    outputs = outputs.astype(np.float64)
    p = np.exp(metrics.log_softmax(outputs))
    got = metrics.all_of(outputs, target, problem)
    area = oracle.roc_auc_score(target, outputs[:, 1] - outputs[:, 0] if classes == 2 else p, multi_class="ovr")
    assert got == pytest.approx(
        {
            "accuracy": oracle.accuracy_score(target, p.argmax(1)),
            "balanced_accuracy": oracle.balanced_accuracy_score(target, p.argmax(1)),
            "loss": oracle.log_loss(target, p),
            "brier": oracle.brier_score_loss(target, p[:, 1]) if classes == 2 else got["brier"],
            "auc": area,
        },
        abs=1e-9,
    )


def test_brier_of_three_classes_when_computed_by_hand_agrees():
    assert metrics.brier([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [0, 1]) == pytest.approx((0.38 + 1.46) / 2)


def test_multiclass_auc_when_a_class_is_absent_is_over_those_present():
    outputs, _ = logits(40, 3)
    target = np.arange(40) % 2
    log_p = metrics.log_softmax(outputs)
    wanted = np.mean([oracle.roc_auc_score(target == c, log_p[:, c]) for c in (0, 1)])
    assert metrics.all_of(outputs, target, THREE)["auc"] == pytest.approx(wanted)


def test_regression_when_compared_with_scikit_learn_agrees():
    rng = np.random.default_rng(2)
    truth, guess = rng.standard_normal((50, 2)), rng.standard_normal((50, 2))
    got = metrics.all_of(guess, truth, Problem(None, 2))
    assert got["r2"] == pytest.approx(oracle.r2_score(truth, guess))
    assert got["mae"] == pytest.approx(oracle.mean_absolute_error(truth, guess))
    assert got["loss"] == got["mse"] == pytest.approx(oracle.mean_squared_error(truth, guess))


# ---- refusals


@pytest.mark.parametrize(
    ("outputs", "target", "problem", "said"),
    [
        (np.zeros((0, 2)), [], BINARY, "no rows"),
        (np.zeros(0), [], VALUE, "no rows"),
        (np.zeros((3, 3)), [0, 1, 0], BINARY, r"\[3, 3\], expected \[3, 2\]"),
        (np.zeros((2, 2)), [0, 2], BINARY, "class numbers from 0 to 1"),
        (np.zeros((2, 2)), [0, -1], BINARY, "class numbers from 0 to 1"),
        ([[0, 1], [np.nan, 0]], [0, 1], BINARY, "row 1.*diverged"),
        ([[np.inf, 1], [0, 0]], [0, 1], BINARY, "row 0.*diverged"),
        ([[0, 1], [-np.inf, -np.inf]], [0, 1], BINARY, "row 1.*diverged"),
        ([0.0, np.nan], [0.0, 1.0], VALUE, "row 1.*diverged"),
        (np.zeros((2, 2)), [0.0, 1.0], VALUE, r"\[2, 2\], expected \[2\]"),
    ],
)
def test_outputs_when_they_cannot_be_scored_are_refused(outputs, target, problem, said):
    with pytest.raises(DataError, match=said):
        metrics.all_of(outputs, target, problem)


# ---- over clients


def test_pooled_when_additive_equals_the_metric_of_all_rows():
    sites = {name: logits(n, 2, seed) for seed, (name, n) in enumerate({"north": 20, "south": 70}.items())}
    by_site = {name: metrics.all_of(*rows, BINARY) for name, rows in sites.items()}
    rows = {name: len(target) for name, (_, target) in sites.items()}
    together = metrics.all_of(*(np.concatenate(parts) for parts in zip(*sites.values(), strict=True)), BINARY)
    for name in ("accuracy", "loss", "brier"):
        assert metrics.pooled(by_site, rows, name) == pytest.approx(together[name])
    naive = (20 * by_site["north"]["auc"] + 70 * by_site["south"]["auc"]) / 90
    assert abs(naive - together["auc"]) > 1e-3  # which is why AUC is refused


def test_pooled_rmse_when_computed_goes_through_the_squares():
    by_site = {"a": metrics.all_of([1.0], [0.0], VALUE), "b": metrics.all_of([3.0] * 3, [0.0, 0.0, 1.0], VALUE)}
    wanted = metrics.all_of([1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 1.0], VALUE)["rmse"]
    assert metrics.pooled(by_site, {"a": 1, "b": 3}, "rmse") == pytest.approx(wanted)


def test_pooled_when_asked_for_an_auc_says_why_not():
    for name in ("auc", "shared/auc"):
        with pytest.raises(UsageError, match="per site and never averaged as if additive"):
            metrics.pooled({"a": {name: 0.5}}, {"a": 1}, name)
    for name in ("r2", "balanced_accuracy", "own_metric"):
        with pytest.raises(UsageError, match="not a mean over rows"):
            metrics.pooled({"a": {name: 0.5}}, {"a": 1}, name)


def test_pooled_when_a_client_lacks_the_metric_leaves_it_out():
    by_site = {"a": {"accuracy": 0.5, "shared/accuracy": 0.25}, "b": {"accuracy": 1.0}, "c": {}}
    rows = {"a": 1, "b": 3, "c": 100}
    assert metrics.pooled(by_site, rows, "accuracy") == 0.875
    assert metrics.pooled(by_site, rows, "shared/accuracy") == 0.25
    with pytest.raises(UsageError, match="no client has rows"):
        metrics.pooled(by_site, rows, "loss")


def test_worst_and_mean_when_asked_respect_the_metrics_direction():
    by_site = {"a": {"accuracy": 0.5, "loss": 1.0}, "b": {"accuracy": 0.75, "loss": 3.0}, "c": {}}
    assert metrics.worst(by_site, "accuracy") == ("a", 0.5)
    assert metrics.worst(by_site, "loss") == ("b", 3.0)
    assert metrics.mean_over_clients(by_site, "accuracy") == 0.625
    for ask in (metrics.worst, metrics.mean_over_clients):
        with pytest.raises(UsageError, match="there are accuracy, loss"):
            ask(by_site, "auc")


def test_bootstrap_interval_when_drawn_from_one_stream_repeats_and_covers_the_mean():
    values = np.random.default_rng(0).normal(1.0, 0.5, 200)
    low, high = metrics.bootstrap_interval(values, 0.9, np.random.default_rng(1))
    assert (low, high) == metrics.bootstrap_interval(values, 0.9, np.random.default_rng(1))
    half = 1.645 * values.std() / math.sqrt(200)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    assert metrics.bootstrap_interval([2.0, 2.0], 0.9, np.random.default_rng(1)) == (2.0, 2.0)


@pytest.mark.parametrize(("values", "level"), [([], 0.9), ([1.0], 0.0), ([1.0], 1.0)])
def test_bootstrap_interval_when_it_cannot_be_is_refused(values, level):
    with pytest.raises(UsageError, match="interval needs"):
        metrics.bootstrap_interval(values, level, np.random.default_rng(0))
