"""Metrics of predictions, and what may be done with them across clients.

A metric that is a mean over rows (accuracy, loss, ...) pools exactly: the mean over clients weighted by their rows is
the metric of all rows. AUC, balanced accuracy and r2 are not: they compare rows with each other, and rows of different
clients were never compared. They are told per client, and `pooled` refuses them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from polyfed.core.errors import DataError, UsageError
from polyfed.core.rows import Problem
from polyfed.core.tree import Array

#: means over rows
ADDITIVE = frozenset({"accuracy", "loss", "brier", "mse", "mae"})
LOWER_IS_BETTER = frozenset({"loss", "brier", "mse", "mae", "rmse"})
#: the log-probability that stands in for the logarithm of 0, so that one confident mistake is dear but countable
LOG_ZERO = math.log(1e-15)


def all_of(outputs: npt.ArrayLike, target: npt.ArrayLike, problem: Problem) -> dict[str, float]:
    """Every metric that these rows allow.

    Args:
        outputs: (n, classes) logits or log-probabilities; for a regression (n,) or (n, targets) values.
        target: (n,) class numbers; for a regression (n,) or (n, targets) values.
        problem: what is predicted.

    Returns:
        accuracy, balanced_accuracy, loss, brier, auc; for a regression loss (= mse), mse, mae, rmse, r2. Without "auc"
        where the rows hold one class only, without "r2" where the target does not vary. All are finite.

    Raises:
        DataError: no rows, shapes that do not fit, an unknown class, or outputs that are not numbers.
    """
    if not problem.is_classification:
        return _regression(outputs, target)
    scores, labels = _checked(outputs, target, problem.outputs)
    log_p = log_softmax(scores)
    found = {
        "accuracy": accuracy(scores, labels),
        "balanced_accuracy": balanced_accuracy(scores, labels),
        "loss": log_loss(log_p, labels),
        "brier": brier(np.exp(log_p), labels),
    }
    if len(np.unique(labels)) > 1:
        found["auc"] = _macro_auc(scores, log_p, labels)
    return found


def _checked(outputs: npt.ArrayLike, target: npt.ArrayLike, classes: int) -> tuple[Array, Array]:
    scores, labels = np.asarray(outputs, np.float64), np.asarray(target)
    if labels.size == 0:
        raise DataError("there are no rows to score")
    if scores.shape != (len(labels), classes):
        raise DataError(f"outputs have shape {list(scores.shape)}, expected [{len(labels)}, {classes}]")
    if labels.ndim != 1 or labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"targets are class numbers from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    bad = np.isnan(scores) | (scores == np.inf)
    if bad.any() or (wrong := np.isneginf(scores).all(axis=1)).any():
        row = int(np.argmax(bad.any(axis=1) if bad.any() else wrong))
        raise DataError(f"the outputs of row {row} are {scores[row].tolist()[:5]}: the model has diverged")
    return scores, labels.astype(np.int64)


def _regression(outputs: npt.ArrayLike, target: npt.ArrayLike) -> dict[str, float]:
    truth = np.asarray(target, np.float64)
    guess = np.asarray(outputs, np.float64)
    if truth.size == 0:
        raise DataError("there are no rows to score")
    if truth.ndim == 1 and guess.shape == (len(truth), 1):
        guess = guess[:, 0]
    if guess.shape != truth.shape:
        raise DataError(f"outputs have shape {list(guess.shape)}, expected {list(truth.shape)}")
    if not np.isfinite(guess).all():
        row = int(np.argmax(~np.isfinite(guess).reshape(len(guess), -1).all(axis=1)))
        raise DataError(f"the output of row {row} is {guess[row]}: the model has diverged")
    gap = guess - truth
    mse = float(np.mean(np.square(gap)))
    found = {"loss": mse, "mse": mse, "mae": float(np.mean(np.abs(gap))), "rmse": math.sqrt(mse)}
    spread = np.square(truth - truth.mean(axis=0)).sum(axis=0)
    if np.all(spread > 0):
        found["r2"] = float(np.mean(1.0 - np.square(gap).sum(axis=0) / spread))
    return found


# ---- one metric each


#: How near to 1 the rows of outputs must sum to be taken for probabilities.
SUM_IS_ONE = 1e-4


def no_logits(outputs: Array) -> str:
    """What outputs of a classification are where they are no logits, and what to do, in words that follow a model's name; else "".

    >>> no_logits(np.array([[0.25, 0.75], [0.5, 0.5]]))[:19], no_logits(np.array([[0.0, 1.0]]))[:17], no_logits(np.zeros((2, 2)))
    ('gives probabilities', 'gives labels only', '')
    """
    if not len(outputs) or outputs.min() < 0 or np.abs(outputs.sum(-1) - 1).max() > SUM_IS_ONE:
        return ""
    if outputs.shape[-1] > 1 and np.isin(outputs, (0.0, 1.0)).all():
        return (
            "gives labels only (one output of a row is 1, the others 0) where logits are due; a label does not say how "
            "sure it is. Take the argmax off the end of the model"
        )
    return (
        "gives probabilities (no output below 0, every row sums to 1) where logits are due; softened once more they "
        "would say next to nothing. Take the softmax off the end of the model"
    )


def log_softmax(logits: npt.ArrayLike) -> Array:
    """(n, classes) logits to log-probabilities, stable for any size; log-probabilities stay as they are."""
    scores = np.asarray(logits, np.float64)
    scores = scores - scores.max(axis=-1, keepdims=True)
    normed: Array = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return normed


def accuracy(outputs: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """Part of the rows whose largest output is the target's; the first class wins a tie.

    >>> accuracy([[0.2, 0.8], [0.9, 0.1]], [1, 1])
    0.5
    """
    return float(np.mean(np.argmax(outputs, axis=1) == np.asarray(target)))


def balanced_accuracy(outputs: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """Mean over the classes present of the part of their rows that is recognised."""
    labels = np.asarray(target)
    right = np.argmax(outputs, axis=1) == labels
    return float(np.mean([right[labels == c].mean() for c in np.unique(labels)]))


def log_loss(outputs: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """Mean cross-entropy in nats of (n, classes) logits or log-probabilities; a probability of 0 counts as 1e-15."""
    log_p = log_softmax(outputs)
    own = log_p[np.arange(len(log_p)), np.asarray(target)]
    return float(-np.where(np.isneginf(own), LOG_ZERO, own).mean())


def brier(probabilities: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """Mean squared error of probabilities (Brier 1950): of class 1 if there are two, summed over classes if more."""
    p, labels = np.asarray(probabilities, np.float64), np.asarray(target)
    if p.shape[1] == 2:
        return float(np.mean(np.square(p[:, 1] - labels)))
    return float(np.mean(np.square(p - np.eye(p.shape[1])[labels]).sum(axis=1)))


def auc(scores: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """Area under the ROC curve: how often a row of class 1 scores above one of class 0, ties counting half.

    The Mann-Whitney statistic by ranks. `scores`: (n,), `target`: (n,) of 0 and 1.

    >>> auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75

    Raises:
        DataError: one class only.
    """
    positive = np.asarray(target).astype(bool)
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        raise DataError("AUC compares rows of two classes; these rows hold one")
    total = float(_ranks(np.asarray(scores))[positive].sum())
    return (total - count * (count + 1) / 2) / (count * others)


def _ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Array = ((last - counts + 1 + last) / 2)[where.reshape(-1)]
    return ranks


def _macro_auc(scores: Array, log_p: Array, labels: Array) -> float:
    """Of two classes, the AUC; of more, the mean over the classes present of each against the rest."""
    if scores.shape[1] == 2:
        return auc(scores[:, 1] - scores[:, 0], labels)  # logits keep the order where probabilities round to 1
    return float(np.mean([auc(log_p[:, c], labels == c) for c in np.unique(labels)]))


def sensitivity_at(specificity: float, scores: npt.ArrayLike, target: npt.ArrayLike) -> float:
    """The largest part of class 1 found by a threshold that leaves at least `specificity` of class 0 alone.

    >>> sensitivity_at(0.5, [0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    1.0

    Raises:
        DataError: one class only.
    """
    values, positive = np.asarray(scores), np.asarray(target).astype(bool)
    if positive.all() or not positive.any():
        raise DataError("sensitivity and specificity need rows of two classes; these rows hold one")
    healthy = np.sort(values[~positive])
    spared = math.ceil(specificity * len(healthy) - 1e-12)  # the limit's own rounding must not cost a row
    found = values[positive] > healthy[spared - 1] if spared else np.ones(int(positive.sum()), bool)
    return float(found.mean())


# ---- over clients


def pooled(metrics: Mapping[str, Mapping[str, float]], num_examples: Mapping[str, float], name: str) -> float:
    """A metric over the rows of all clients that have it: exact, as if they lay in one place.

    Args:
        metrics: client -> name -> value on its own rows.
        num_examples: client -> rows behind its values.
        name: a mean over rows, or "rmse"; may carry a prefix, such as "shared/accuracy".

    Raises:
        UsageError: the metric is not a mean over rows, or no client has it.
    """
    kind = name.rpartition("/")[2]
    if kind == "auc":
        raise UsageError(
            f"{name} is computed per site and never averaged as if additive: rows of different sites are not compared; "
            "show it per client, or its plain mean over clients with mean_over_clients"
        )
    if kind != "rmse" and kind not in ADDITIVE:
        raise UsageError(
            f"{name} is not a mean over rows, so it does not pool; {', '.join(sorted(ADDITIVE))} and rmse do"
        )
    power = 2 if kind == "rmse" else 1
    terms = [(num_examples[c], values[name] ** power) for c, values in metrics.items() if name in values]
    rows = sum(n for n, _ in terms)
    if not rows > 0:
        raise UsageError(f"no client has rows behind {name}")
    return float((sum(n * value for n, value in terms) / rows) ** (1 / power))


def mean_over_clients(metrics: Mapping[str, Mapping[str, float]], name: str) -> float:
    """The plain mean of a metric over the clients that have it: every site counts the same.

    Raises:
        UsageError: no client has it.
    """
    return float(np.mean(list(_having(metrics, name).values())))


def worst(metrics: Mapping[str, Mapping[str, float]], name: str) -> tuple[str, float]:
    """The client whose metric is worst, and its value; the first of equals.

    Raises:
        UsageError: no client has it.
    """
    values = _having(metrics, name)
    choose = max if is_lower_better(name) else min
    client = choose(values, key=values.__getitem__)
    return client, values[client]


def is_lower_better(name: str) -> bool:
    """Whether smaller values of a metric are better; unknown metrics are better when larger."""
    return name.rpartition("/")[2] in LOWER_IS_BETTER


def _having(metrics: Mapping[str, Mapping[str, float]], name: str) -> dict[str, float]:
    values = {client: of_client[name] for client, of_client in metrics.items() if name in of_client}
    if not values:
        known = sorted({key for of_client in metrics.values() for key in of_client})
        raise UsageError(f"no client has the metric {name!r}; there are {', '.join(known) or 'none'}")
    return values


def bootstrap_interval(
    values: Sequence[float] | Array, level: float, rng: np.random.Generator, draws: int = 2000
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (Efron 1979), such as paired differences over seeds.

    Args:
        values: (n,) finite numbers.
        level: coverage, such as 0.9.
        rng: the stream to draw from: the same stream gives the same interval.
        draws: resamples.

    Raises:
        UsageError: no values, or a level outside (0, 1).
    """
    sample = np.asarray(values, np.float64)
    if not sample.size or not 0 < level < 1:
        raise UsageError(
            f"an interval needs values and a level between 0 and 1, got {sample.size} values, level {level}"
        )
    means = sample[rng.integers(0, sample.size, (draws, sample.size))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
