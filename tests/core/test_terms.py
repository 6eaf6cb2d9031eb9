"""Promises of loss terms, over torch's operations: knowledge distillation's mathematics and padding."""

import math

import numpy as np
import pytest
import torch

from polyfed.core import terms as terms_module
from polyfed.core.rows import Problem
from polyfed.core.terms import Distill, Match, Near, Own
from polyfed.models.torch_losses import OPS, Head, TorchStep

CLASSES = Problem(("a", "b", "c", "d"), 4)
VALUES = Problem(None, 2)


def softmax(z, temperature=1.0):
    return torch.softmax(z / temperature, -1)


def step_of(outputs, *, problem=CLASSES, target=None, weights=None, params=(), tensors=(), targets=(), loss=None):
    return TorchStep(
        Head(problem, loss, None, "Net"),
        outputs,
        target,
        params=dict(params),
        tensors=dict(tensors),
        targets=dict(targets),
        weights=weights,
    )


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def distill_gradient(term, z, teacher):
    z = z.clone().requires_grad_()
    term(OPS, step_of(z, targets={"teacher": teacher})).backward()
    return z.grad


def cross_entropy_at(z, teacher, temperature):
    """T^2 times the batch mean of CE(teacher, softmax(z / T)), written out in numpy."""
    scaled = z.numpy() / temperature
    log_p = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
    return temperature**2 * -(teacher.numpy() * log_p).sum(1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distill_gradient_when_compared_with_finite_differences_is_that_of_t_squared_cross_entropy(temperature):
    z, teacher = draw(5, 4), softmax(draw(5, 4, seed=1), temperature)
    gradient = distill_gradient(Distill(temperature), z, teacher)
    for i, j in np.ndindex(5, 4):
        up, down = z.clone(), z.clone()
        up[i, j] += 1e-5
        down[i, j] -= 1e-5
        slope = (cross_entropy_at(up, teacher, temperature) - cross_entropy_at(down, teacher, temperature)) / 2e-5
        assert math.isclose(float(gradient[i, j]), slope, rel_tol=1e-5, abs_tol=1e-8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distill_when_the_student_is_the_teacher_has_no_gradient(temperature):
    z = draw(6, 4)
    gradient = distill_gradient(Distill(temperature), z, softmax(z, temperature))
    assert float(gradient.abs().max()) < 1e-12


def test_distill_when_temperature_grows_keeps_the_gradient_of_centred_logit_matching():
    z, teacher = draw(6, 4), draw(6, 4, seed=1)
    gradient = distill_gradient(Distill(1e4), z, softmax(teacher, 1e4))
    gap = z - teacher
    matching = (gap - gap.mean(1, keepdim=True)) / 4 / len(z)
    assert torch.allclose(gradient, matching, rtol=1e-3, atol=1e-6)


def test_distill_when_the_batch_is_doubled_is_equal():
    z, teacher = draw(5, 4), softmax(draw(5, 4, seed=1), 2.0)
    once, twice = (
        Distill(2.0)(OPS, step_of(z.repeat(k, 1), targets={"teacher": teacher.repeat(k, 1)})) for k in (1, 2)
    )
    assert math.isclose(float(once), float(twice), rel_tol=1e-12)


def test_distill_when_impossible_classes_are_added_is_equal():
    z, teacher = draw(5, 4), softmax(draw(5, 4, seed=1), 2.0)
    wide = torch.cat([z, torch.full((5, 3), -1e4, dtype=z.dtype)], 1)
    wide_teacher = torch.cat([teacher, torch.zeros(5, 3, dtype=z.dtype)], 1)
    narrow = Distill(2.0)(OPS, step_of(z, targets={"teacher": teacher}))
    wider = Distill(2.0)(OPS, step_of(wide, problem=Problem(tuple("abcdefg"), 7), targets={"teacher": wide_teacher}))
    assert math.isclose(float(narrow), float(wider), rel_tol=1e-12)


def test_distill_when_a_constant_is_added_to_the_logits_is_unchanged():
    z, teacher = draw(5, 4), softmax(draw(5, 4, seed=1))
    one, two = (Distill(3.0)(OPS, step_of(v, targets={"teacher": teacher})) for v in (z, z + 100.0))
    assert math.isclose(float(one), float(two), rel_tol=1e-10)


@pytest.mark.parametrize("term", [Distill(2.0), Match()])
def test_teacher_when_the_student_learns_gets_no_gradient(term):
    z, teacher = draw(5, 4).requires_grad_(), softmax(draw(5, 4, seed=1)).requires_grad_()
    term(OPS, step_of(z, targets={"teacher": teacher})).backward()
    assert teacher.grad is None
    assert float(z.grad.abs().sum()) > 0


def test_near_gradient_is_mu_times_the_distance_to_the_anchor():
    w, anchor = draw(3, 2).requires_grad_(), draw(3, 2, seed=1)
    near = Near(0.3)(OPS, step_of(None, params={"w": w}, tensors={"anchor": {"w": anchor, "frozen": anchor}}))
    near.backward()
    assert torch.allclose(w.grad, 0.3 * (w.detach() - anchor), rtol=1e-12)
    assert math.isclose(near.item(), 0.15 * ((w - anchor) ** 2).sum().item(), rel_tol=1e-12)


def test_match_when_the_teacher_is_a_vector_pairs_rows_with_rows():
    problem = Problem(None, 1)
    z, teacher = draw(5, 1), draw(5, seed=1)
    value = Match(2.0)(OPS, step_of(z, problem=problem, targets={"teacher": teacher}))
    assert math.isclose(float(value), 2.0 * float(((z[:, 0] - teacher) ** 2).mean()), rel_tol=1e-12)
    flat = Match(2.0)(OPS, step_of(z[:, 0], problem=problem, targets={"teacher": teacher}))
    assert float(flat) == float(value)


def padded_cases():
    z, w = draw(5, 4), draw(3, 2)
    teacher, classes = softmax(draw(5, 4, seed=1)), torch.tensor([0, 3, 1, 2, 2])
    values, aims = draw(5, 2, seed=2), draw(5, 2, seed=3)
    anchor = {"params": {"w": w}, "tensors": {"anchor": {"w": w + 1}}}
    yield "own classes", Own(), {"outputs": z, "target": classes}
    yield (
        "own bce",
        Own(),
        {"outputs": z[:, :2], "target": classes % 2, "problem": Problem(("n", "y"), 2), "loss": "bce"},
    )
    for loss in ("mse", "mae", "huber"):
        yield f"own {loss}", Own(), {"outputs": values, "target": aims, "problem": VALUES, "loss": loss}
    yield "near", Near(0.5), {"outputs": z, **anchor}
    yield "distill", Distill(2.0, 0.5), {"outputs": z, "targets": {"teacher": teacher}}
    yield "match", Match(0.5), {"outputs": values, "problem": VALUES, "targets": {"teacher": aims}}


def with_padding(case, rows):
    """The same step with rows of nonsense appended, which weigh nothing."""

    def pad(tensor):
        extra = torch.full((rows, *tensor.shape[1:]), 1 if tensor.dtype == torch.int64 else 77, dtype=tensor.dtype)
        return torch.cat([tensor, extra])

    padded = {**case, "outputs": pad(case["outputs"])}
    if "target" in case:
        padded["target"] = pad(case["target"])
    if "targets" in case:
        padded["targets"] = {name: pad(tensor) for name, tensor in case["targets"].items()}
    padded["weights"] = torch.tensor([1.0] * 5 + [0.0] * rows, dtype=torch.float64)
    return padded


CASES = [pytest.param(term, case, id=name) for name, term, case in padded_cases()]


@pytest.mark.parametrize(("term", "case"), CASES)
@pytest.mark.parametrize("rows", [0, 3])
def test_term_when_the_batch_is_padded_counts_the_real_rows_alone(term, case, rows):
    plain, padded = term(OPS, step_of(**case)), term(OPS, step_of(**with_padding(case, rows)))
    assert math.isclose(float(plain), float(padded), rel_tol=1e-12)


def test_every_term_of_the_core_is_tested_with_padding():
    written = {
        kind
        for kind in vars(terms_module).values()
        if isinstance(kind, type) and kind.__module__ == terms_module.__name__ and hasattr(kind, "__dataclass_fields__")
    }
    assert written == {type(term) for _, term, _ in padded_cases()}


def mean_over_padding(self, per_row):
    return per_row.mean()


def test_mutant_when_a_mean_counts_padded_rows_the_padding_test_fails(monkeypatch):
    monkeypatch.setattr(TorchStep, "mean", mean_over_padding)
    case = next(case for name, _, case in padded_cases() if name == "distill")
    with pytest.raises(AssertionError):
        test_term_when_the_batch_is_padded_counts_the_real_rows_alone(Distill(2.0, 0.5), case, 3)


def dropped_square(self, ops, step):
    log_p = ops.log_softmax(step.outputs / self.temperature)
    return step.mean(-ops.sum(step.targets["teacher"] * log_p, -1)) * self.weight


def mean_over_classes(self, ops, step):
    log_p = ops.log_softmax(step.outputs / self.temperature)
    return step.mean(-ops.mean(step.targets["teacher"] * log_p, -1)) * (self.weight * self.temperature**2)


def test_mutant_when_t_squared_is_dropped_the_gradient_test_fails(monkeypatch):
    monkeypatch.setattr(Distill, "__call__", dropped_square)
    with pytest.raises(AssertionError):
        test_distill_gradient_when_compared_with_finite_differences_is_that_of_t_squared_cross_entropy(4.0)


def test_mutant_when_the_mean_runs_over_classes_the_class_padding_test_fails(monkeypatch):
    monkeypatch.setattr(Distill, "__call__", mean_over_classes)
    with pytest.raises(AssertionError):
        test_distill_when_impossible_classes_are_added_is_equal()


def test_mutant_when_the_teacher_is_not_detached_the_teacher_test_fails(monkeypatch):
    monkeypatch.setattr(type(OPS), "stop_gradient", lambda self, a: a)
    with pytest.raises(AssertionError):
        test_teacher_when_the_student_learns_gets_no_gradient(Distill(2.0))


def test_operations_when_given_plain_numbers_agree_with_numpy():
    a = draw(3, 4)
    pairs = [
        (OPS.maximum(a, 0.0), np.maximum(a.numpy(), 0.0)),
        (OPS.where(a > 0, a, 0.0), np.where(a.numpy() > 0, a.numpy(), 0.0)),
        (OPS.logsumexp(a), np.log(np.exp(a.numpy()).sum(-1))),
        (OPS.take(a, torch.tensor([2, 0])), a.numpy()[[2, 0]]),
        (OPS.matmul(a, OPS.reshape(a, (4, 3))), a.numpy() @ a.numpy().reshape(4, 3)),
        (OPS.sqrt(OPS.abs(a)), np.sqrt(np.abs(a.numpy()))),
        (OPS.log(OPS.exp(a)), a.numpy()),
        (OPS.mean(a), a.numpy().mean()),
        (OPS.mean(a, 0), a.numpy().mean(0)),
        (OPS.sum(a, 0), a.numpy().sum(0)),
        (OPS.sum(OPS.square(a)), (a.numpy() ** 2).sum()),
    ]
    for got, wanted in pairs:
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 400.0, 1e6])
def test_soft_labels_when_the_temperature_is_large_are_still_probabilities(temperature):
    teacher = np.array([[0.11, *[0.89 / 9] * 9], [1.0, *[0.0] * 9], [0.1] * 10], np.float32)
    labels = Distill(temperature).soft_labels({"teacher": teacher})
    assert np.allclose(labels.sum(1), 1.0, atol=1e-12)
    assert np.array_equal(labels[1], [1.0, *[0.0] * 9])
    assert np.allclose(labels[2], 0.1)
    assert labels[0].argmax() == 0
    if temperature == 4.0:
        assert np.allclose(labels, teacher**4.0 / (teacher**4.0).sum(1, keepdims=True), atol=1e-6)
