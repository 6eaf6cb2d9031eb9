"""`pf.losses`: the distillation loss as a function of two sets of logits, in every framework."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch.nn import functional

import polyfed as pf
from polyfed.core.errors import UsageError
from polyfed.core.rows import Problem
from polyfed.core.terms import Distill
from polyfed.models import losses
from polyfed.models.losses import distillation
from polyfed.models.torch_losses import OPS, Head, TorchStep


def logits(seed, rows=7, classes=5):
    return np.random.default_rng(seed).normal(0, 2, (rows, classes))


def in_keras(array):
    import keras

    return keras.ops.convert_to_tensor(array)


FRAMEWORKS = {"numpy": np.asarray, "torch": torch.tensor, "keras": in_keras}
TEMPERATURES = (0.5, 1.0, 4.0)


def gradient(student, teacher, temperature):
    """By torch's autograd, in float64."""
    z = torch.tensor(student, requires_grad=True)
    distillation(z, torch.tensor(teacher), temperature).backward()
    return z.grad.numpy()


@pytest.mark.parametrize("make", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_when_computed_is_t_squared_times_the_batch_mean_of_kl(make, temperature):
    s, t = logits(0), logits(1)
    p, q = softmax(t / temperature, -1), softmax(s / temperature, -1)
    wanted = temperature**2 * (p * np.log(p / q)).sum() / len(s)
    np.testing.assert_allclose(float(distillation(make(s), make(t), temperature)), wanted, rtol=1e-6)


def test_loss_when_compared_with_torchs_own_kl_is_its_batchmean():
    s, t = torch.tensor(logits(0)), torch.tensor(logits(1))
    own = functional.kl_div((s / 3).log_softmax(-1), (t / 3).log_softmax(-1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(distillation(s, t, 3.0), own * 9)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_when_student_equals_teacher_is_zero(temperature):
    """Invariant 46; also where they differ by a constant a row (51)."""
    z = logits(0)
    np.testing.assert_allclose(gradient(z, z, temperature), 0, atol=1e-12)
    assert float(distillation(z, z + 3.0, temperature)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_when_measured_is_the_finite_difference(temperature):
    """Invariant 47."""
    s, t, step = logits(0, 3, 4), logits(1, 3, 4), 1e-6
    found = np.zeros_like(s)
    for at in np.ndindex(s.shape):
        moved = [s.copy(), s.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        found[at] = (distillation(moved[0], t, temperature) - distillation(moved[1], t, temperature)) / (2 * step)
    np.testing.assert_allclose(gradient(s, t, temperature), found, atol=1e-7)
    formula = temperature * (softmax(s / temperature, -1) - softmax(t / temperature, -1)) / len(s)
    np.testing.assert_allclose(gradient(s, t, temperature), formula, atol=1e-12)


def test_gradient_when_the_temperature_is_large_matches_centred_logits():
    """Invariant 48."""
    s, t = logits(0), logits(1)
    centred = (s - s.mean(-1, keepdims=True)) - (t - t.mean(-1, keepdims=True))
    np.testing.assert_allclose(gradient(s, t, 1e4), centred / s.size, rtol=1e-2, atol=1e-5)
    wanted = (centred**2).sum() / (2 * s.size)
    assert float(distillation(s, t, 1e4)) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("impossible", [-np.inf, -1e30])
@pytest.mark.parametrize("make", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_loss_when_impossible_classes_or_the_same_rows_are_added_is_unchanged(make, impossible):
    """Invariant 49."""
    s, t = logits(0), logits(1)
    wanted = float(distillation(s, t, 2.0))
    wide = [np.pad(z, ((0, 0), (0, 4)), constant_values=impossible) for z in (s, t)]
    assert float(distillation(*map(make, wide), 2.0)) == pytest.approx(wanted, rel=1e-6)
    assert float(distillation(make(np.tile(s, (2, 1))), make(np.tile(t, (2, 1))), 2.0)) == pytest.approx(
        wanted, rel=1e-6
    )


def test_gradient_when_classes_are_impossible_is_finite():
    wide = [np.pad(z, ((0, 0), (0, 2)), constant_values=-np.inf) for z in (logits(0), logits(1))]
    found = gradient(*wide, 2.0)
    np.testing.assert_allclose(found[:, :5], gradient(logits(0), logits(1), 2.0), rtol=1e-9)
    np.testing.assert_array_equal(found[:, 5:], 0)


def test_teacher_when_it_could_be_trained_gets_no_gradient():
    """Invariant 50."""
    s, t = (torch.tensor(logits(i), requires_grad=True) for i in (0, 1))
    distillation(s, t, 2.0).backward()
    assert t.grad is None
    assert s.grad.abs().sum() > 0


@pytest.mark.parametrize("make", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_loss_when_a_constant_is_added_to_every_logit_is_unchanged(make):
    """Invariant 51."""
    s, t = logits(0), logits(1)
    wanted = float(distillation(s, t, 2.0))
    assert float(distillation(make(s + 30.0), make(t - 50.0), 2.0)) == pytest.approx(wanted, rel=1e-6)


def test_loss_when_logits_are_huge_is_finite():
    s, t = np.array([[1e4, 0.0, -1e4]]), np.array([[-1e4, 0.0, 1e4]])
    assert float(distillation(s, t)) == pytest.approx(2e4)
    assert np.isfinite(gradient(s, t, 1.0)).all()


def test_loss_when_it_is_that_of_the_algorithms_has_the_same_gradient():
    """`Distill` leaves the teacher's entropy out of its value, which has no gradient."""
    s, t = logits(0), torch.tensor(logits(1))
    z = torch.tensor(s, requires_grad=True)
    head = Head(Problem(tuple("abcde"), 5), None, None, "net")
    step = TorchStep(head, z, None, params={}, tensors={}, targets={"teacher": (t / 3).softmax(-1)})
    Distill(3.0)(OPS, step).backward()
    np.testing.assert_allclose(z.grad.numpy(), gradient(s, t.numpy(), 3.0), atol=1e-12)


def test_loss_when_parameters_or_more_axes_are_given_works():
    s = torch.nn.Parameter(torch.tensor(logits(0, 6)))
    assert distillation(s.reshape(2, 3, 5), torch.tensor(logits(1, 6)).reshape(2, 3, 5)).item() == pytest.approx(
        float(distillation(logits(0, 6), logits(1, 6)))
    )
    distillation(s, torch.tensor(logits(1, 6))).backward()
    assert s.grad is not None


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_when_it_is_none_says_so(temperature):
    with pytest.raises(UsageError, match=r"temperature=.* must be a number above 0"):
        distillation(logits(0), logits(1), temperature)


@pytest.mark.parametrize("teacher", [logits(1, 7, 4), logits(1, 1, 5), np.zeros(())])
def test_shapes_when_they_differ_are_named(teacher):
    with pytest.raises(UsageError, match=r"student_logits have shape \[7, 5\] and teacher_logits \[.*\]; they must be"):
        distillation(logits(0), teacher)


def test_module_when_imported_brings_no_framework():
    program = "import sys, polyfed; polyfed.losses.distillation; print(sorted({'torch', 'keras', 'sklearn'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert pf.losses is losses
