"""Losses for a training loop of one's own, equal to what the algorithms of this package use; no framework is imported here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from polyfed.core.errors import UsageError

Tensor = Any  # the framework's own


def distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T² / n · Σ over n rows of KL(softmax(t / T) ‖ softmax(s / T)), the teacher being a constant.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015. T² keeps the size of the gradient
    when T grows: in the limit it is that of Σ (s̄ − t̄)² / (2 n C), with s̄ and t̄ centred over the C classes. The sum is over
    classes and the mean over rows: a mean over both would make the loss C times too small.

    Args:
        student_logits: (..., classes), floating: torch or Keras tensors, of any backend of Keras, or numpy arrays.
        teacher_logits: of the same shape; no gradient reaches it. A class of logit -inf is impossible.
        temperature: T > 0.

    Returns:
        a scalar of the student's framework; 0 where both say the same, or differ by a constant a row.

    Raises:
        UsageError: shapes that differ, or a temperature that is not above 0.

    >>> round(float(distillation(np.array([[0.0, 2.0]]), np.array([[0.0, 0.0]]), temperature=2.0)), 4)
    0.4805
    """
    if not 0.0 < temperature < math.inf:
        raise UsageError(f"temperature={temperature!r} must be a number above 0")
    one, two = tuple(student_logits.shape), tuple(teacher_logits.shape)
    if one != two or not one:
        raise UsageError(f"student_logits have shape {list(one)} and teacher_logits {list(two)}; they must be equal")
    if isinstance(student_logits, np.ndarray):
        return _numpy(student_logits, teacher_logits, temperature)
    if _is_of("torch", student_logits):
        return _torch(student_logits, teacher_logits, temperature)
    return _keras(student_logits, teacher_logits, temperature)


def _is_of(package: str, value: object) -> bool:
    return any(kind.__module__.partition(".")[0] == package for kind in type(value).__mro__)


def _torch(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    import torch  # it is there: the caller's tensors are of it

    log_q = torch.log_softmax(student / temperature, -1)
    log_p = torch.log_softmax(teacher.detach() / temperature, -1)
    p = log_p.exp()
    divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)  # 0 · -inf is 0 here
    return divergence.mean() * temperature**2


def _keras(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    from keras import ops  # as above

    log_q = ops.log_softmax(student / temperature, axis=-1)
    log_p = ops.log_softmax(ops.stop_gradient(teacher) / temperature, axis=-1)
    p = ops.exp(log_p)
    divergence = ops.sum(ops.where(p > 0, p * (log_p - log_q), ops.zeros_like(p)), axis=-1)
    return ops.mean(divergence) * temperature**2


def _numpy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q, log_p = _log_softmax(student / temperature), _log_softmax(np.asarray(teacher) / temperature)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # as above
        divergence = np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return divergence.mean() * temperature**2


def _log_softmax(z: Tensor) -> Tensor:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))
