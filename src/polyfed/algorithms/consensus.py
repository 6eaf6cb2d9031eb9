"""What clients of any model say of public rows, and what the server makes of it: the half that distilling methods share."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from polyfed.algorithms.fedavg import numbers_of
from polyfed.algorithms.options import one_of, positive
from polyfed.core.aggregate import Aggregate, UpdatePolicy
from polyfed.core.algorithm import Algorithm, Env, Fit, Fitted, Predict
from polyfed.core.errors import DataError, RefusedError, UsageError
from polyfed.core.message import Message
from polyfed.core.metrics import no_logits
from polyfed.core.rows import Problem, Rows
from polyfed.core.terms import Distill, Match, Term
from polyfed.core.tree import Array, Entry, Spec, Tree

#: how far an honest sum of a row may be from what it should be
ROUNDING = 1e-5
#: the size of a centred logit beyond which a model has diverged: softmax has no use for it
LARGEST_LOGIT = 1e3


@dataclass(frozen=True)
class Consensus(Algorithm):
    """Base of methods whose clients predict public rows; a variant says who learns from the consensus, and how.

    Wire up: tree "soft", entry "public": (public rows, classes) float32 probabilities softmax(z / T), or centred logits;
    for a regression (public rows, outputs) values. With ``weighting="entropy"`` it is w·p, and entry "weight",
    (public rows, 1) float32, is w: both are sums over clients, so a sum is all that a server must see. With
    ``weighting="certainty"`` the number ``certainty``.

    Values of a regression are in the target's own units, at every client: a client that standardises its targets must
    undo it in what it predicts (scikit-learn's TransformedTargetRegressor does). Nothing here can tell units apart.

    Where clients hold few classes each, the weights decide much: accuracy on unseen digits of scikit-learn of all classes
    (four torch nets and a forest, Dirichlet 0.3, 400 public rows, 10 rounds, mean of the nets, seeds 0-2): FedMD uniform
    0.75, "certainty" 0.77, "entropy" 0.86, uniform with ``sharpen=0.5`` 0.84; FedDF uniform 0.66, "entropy" 0.84.

    Attributes:
        public: public rows, in the form that the clients' pipelines take; stays out of the manifest, which names their
            digest. None where the run hands them to the clients by other means.
        temperature: T > 0; larger teaches more about the less likely classes.
        weighting: what a client counts. "uniform": 1. "num_examples": its training rows. "entropy": on each public row
            w = exp(−H(softmax(z))), one over the number of classes that it wavers between. "certainty": the mean of
            that w over the public rows, one weight a client. Both are from 1/classes to 1; a model that is always
            certain, such as a tree grown to its end, has weight 1 whether it is right or not.
        average: "probabilities" or "logits": what is averaged, and sent.
        sharpen: s > 0: learn p^(1/s) / Σ p^(1/s) in place of the consensus p; below 1 sharper, 1 changes nothing, 0 is
            off. Averages of clients that saw different rows are flat; DS-FL (Itahara et al., IEEE TMC 2021) sharpens
            them by softmax(p / 0.1), which depends on the number of classes C and equals ours at s = 0.1 C for p near
            1/C. Ours has the identity, and classes of probability 0 keep it.
        strength: factor of the distillation loss.
    """

    public: Any = field(default=None, metadata={"local": True}, repr=False, compare=False)
    temperature: float = field(default=2.0, kw_only=True)
    weighting: Literal["uniform", "num_examples", "certainty", "entropy"] = field(default="uniform", kw_only=True)
    average: Literal["probabilities", "logits"] = field(default="probabilities", kw_only=True)
    sharpen: float = field(default=0.0, kw_only=True)
    strength: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        positive(temperature=self.temperature, strength=self.strength)
        if not 0.0 <= self.sharpen < math.inf:
            raise UsageError(f"sharpen={self.sharpen!r} must be a number above 0, or 0 for none")
        one_of("uniform", "num_examples", "certainty", "entropy", weighting=self.weighting)
        one_of("probabilities", "logits", average=self.average)

    # ---------------------------------------------------------------- before round 1

    def counted(self, env: Env) -> dict[str, float]:
        """How many public rows there are: the number by which uploads are checked.

        Raises:
            UsageError: there are none, or an option that has no meaning for a regression.
        """
        rows = self.public if env.public is None else env.public
        if rows is None:
            raise UsageError(f"{self.name} needs public rows that every client can predict: {self.name}(public=rows)")
        if not env.problem.is_classification:
            self._check_regression()
        return {"public_rows": float(_count(rows))}

    def _check_regression(self) -> None:
        if self.weighting in ("certainty", "entropy"):
            raise UsageError(
                f'{self.name}(weighting="{self.weighting}") weighs by how sure a client is of a class; a regression says '
                'no such thing. Write weighting="uniform" or "num_examples"'
            )
        if self.sharpen:
            raise UsageError(
                f"{self.name}(sharpen={self.sharpen:g}) sharpens probabilities; a regression has none. Leave it out"
            )

    # ---------------------------------------------------------------- at a client

    def answer(self, fitted: Fitted, public: Rows, env: Env) -> Generator[Predict, Any, Message]:
        """Asks a trained model for its predictions; returns the upload: tree "soft", and the numbers."""
        outputs: Array = yield Predict(start=(fitted.state,), rows=public)
        soft, numbers = self.soft(outputs, env)
        return Message({"soft": soft}, numbers_of(fitted, env) | numbers)

    def soft(self, outputs: Array, env: Env) -> tuple[Tree, dict[str, float]]:
        """What a client sends of its outputs on the public rows: tree "soft", and numbers to go beside.

        Raises:
            UsageError: the outputs of a classification are probabilities or labels where logits are due; names the client.
        """
        if env.problem.is_classification and (wrong := no_logits(outputs)):
            raise UsageError(f"{env.client} {wrong}")
        said = self.said(outputs, env.problem)
        if self.weighting == "entropy":
            weight = np.asarray(certainty(outputs)[:, None], np.float32)
            return Tree({"public": said * weight, "weight": weight}), {}
        numbers = {"certainty": float(certainty(outputs).mean())} if self.weighting == "certainty" else {}
        return Tree({"public": said}), numbers

    def said(self, outputs: Array, problem: Problem) -> Array:
        """What a client says of its outputs on the public rows, before any weight: (n, outputs) float32."""
        if not problem.is_classification:
            return np.ascontiguousarray(outputs, np.float32)
        if self.average == "logits":
            return np.asarray(outputs - outputs.mean(-1, keepdims=True), np.float32)
        return softened(outputs, self.temperature)

    # ---------------------------------------------------------------- at the server

    def soft_spec(self, rows: float, problem: Problem) -> Spec:
        """What tree "soft" of an upload holds."""
        spec = {"public": Entry("float32", (int(rows), problem.outputs))}
        return Spec(spec | ({"weight": Entry("float32", (int(rows), 1))} if self.weighting == "entropy" else {}))

    def check(self, sent: Message, update: Message, env: Env, policy: UpdatePolicy) -> None:
        """What is said of the public rows is in the range that `soft` makes, so that no client moves a mean by more.

        Probabilities are at least 0 and a row's sum is 1, or its weight w; centred logits are at most 1000 in size,
        times w; w is from 1/classes to 1, as ``certainty`` is. All to within 1e-5, far above float32's rounding (6e-8
        of each value). Values of a regression have no range but the policy's.

        Raises:
            RefusedError: names the client, the tree and the first row that is not so.
        """
        del sent, policy
        if not env.problem.is_classification:
            return
        classes, tree = env.problem.outputs, update.trees["soft"]
        said = np.asarray(tree["public"], np.float64)
        weight: Array = np.ones((len(said), 1))
        if self.weighting == "entropy":
            weight = np.asarray(tree["weight"], np.float64)
            bad = (weight[:, 0] < 1.0 / classes - ROUNDING) | (weight[:, 0] > 1.0 + ROUNDING)
            _refuse(env, "soft/weight", bad, weight, f"a row's weight is from 1/{classes} to 1")
        elif self.weighting == "certainty":
            sure = update.numbers.get("certainty", math.nan)
            if not 1.0 / classes - ROUNDING <= sure <= 1.0 + ROUNDING:
                raise RefusedError(env.client, "numbers/certainty", f"is {sure:g}; it is from 1/{classes} to 1")
        if self.average == "logits":
            bad = np.abs(said).max(-1) > LARGEST_LOGIT * weight[:, 0] * (1.0 + ROUNDING)
            _refuse(env, "soft/public", bad, said, f"centred logits are at most {LARGEST_LOGIT:g} in size")
            return
        bad = (said.min(-1) < 0.0) | (np.abs(said.sum(-1) - weight[:, 0]) > ROUNDING)
        total = "its weight" if self.weighting == "entropy" else "1"
        _refuse(env, "soft/public", bad, said, f"probabilities are at least 0, and a row's sum is {total}")

    def weight(self, numbers: Mapping[str, float], lag: int, tree: str) -> float:
        if tree != "soft":
            return super().weight(numbers, lag, tree)  # a part that is shared besides counts by rows
        if self.weighting == "certainty":
            return min(numbers["certainty"], 1.0)  # a larger claim would outweigh everybody
        return numbers["num_examples"] if self.weighting == "num_examples" else 1.0

    def consensus(self, aggregate: Aggregate) -> Tree:
        """The weighted mean of what the round's clients said: entry "public"."""
        if self.weighting != "entropy":
            return aggregate.mean("soft")
        total = aggregate.sum("soft")
        flat = 1.0 / total["public"].shape[1] if self.average == "probabilities" else 0.0
        mean = np.full_like(total["public"], flat)  # stands where nobody gave a row any weight
        np.divide(total["public"], total["weight"], out=mean, where=total["weight"] > 0)
        return Tree({"public": mean})

    # ---------------------------------------------------------------- where it is learned

    def teach(self, consensus: Array, problem: Problem, rows: Rows, epochs: int | None) -> Fit:
        """The request that learns the consensus on the public rows; the model that it starts from is the caller's."""
        targets = {"teacher": self.teacher(consensus, problem)}
        return Fit(terms=(self.term(problem),), targets=targets, rows=rows, epochs=epochs)

    def term(self, problem: Problem) -> Term:
        return Distill(self.temperature, self.strength) if problem.is_classification else Match(self.strength)

    def teacher(self, consensus: Array, problem: Problem) -> Array:
        """What is learned from the consensus: probabilities at T, or a regression's values."""
        if not problem.is_classification:
            return consensus
        if self.average == "logits":
            return softened(consensus, self.temperature * (self.sharpen or 1.0))
        return sharpened(consensus, self.sharpen) if self.sharpen else consensus


def _refuse(env: Env, where: str, bad: Array, values: Array, wanted: str) -> None:
    """Raises `RefusedError` for the first bad row, if there is one."""
    if bad.any():
        row = int(bad.argmax())
        had = ", ".join(f"{value:.6g}" for value in values[row, :4])
        raise RefusedError(env.client, where, f"row {row} is {had}{', ...' * (values.shape[1] > 4)}; {wanted}")


def softened(logits: Array, temperature: float) -> Array:
    """softmax(z / T) along the last axis as float32, computed stably in float64.

    >>> softened(np.array([[0.0, 0.0, 2000.0]]), 2.0).tolist()
    [[0.0, 0.0, 1.0]]
    """
    scaled = np.asarray(logits, np.float64) / temperature
    raised = np.exp(scaled - scaled.max(-1, keepdims=True))
    return np.asarray(raised / raised.sum(-1, keepdims=True), np.float32)


def sharpened(p: Array, s: float) -> Array:
    """p^(1/s) / Σ p^(1/s) along the last axis as float32; p itself at s = 1, but for rounding.

    >>> sharpened(np.array([[0.25, 0.75, 0.0]]), 0.5).round(3).tolist()
    [[0.10000000149011612, 0.8999999761581421, 0.0]]
    """
    positive = np.maximum(np.asarray(p, np.float64), 0.0)
    with np.errstate(divide="ignore"):  # log 0 is -inf, which stays 0
        return softened(np.log(positive), s)


def certainty(logits: Array) -> Array:
    """exp(−H(softmax(z))) of each row, (n,) float64: 1 for one class, 1/classes where all are equally likely.

    >>> certainty(np.array([[0.0, 0.0], [0.0, 50.0]])).round(3).tolist()
    [0.5, 1.0]
    """
    z = np.asarray(logits, np.float64)
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return np.asarray(np.exp((np.exp(log_p) * log_p).sum(-1)))


def public_rows(message: Message, env: Env, algorithm: str) -> Rows:
    """The client's public rows without labels; `DataError` unless they are as many as the server counts."""
    if env.public is None:
        raise DataError(f"{env.client} has no public rows; {algorithm} asks each client to predict them")
    if len(env.public) != message.numbers["public_rows"]:
        raise DataError(
            f"{env.client} has {len(env.public)} public rows after its own pipeline, the server counts "
            f"{int(message.numbers['public_rows'])}; a pipeline must keep every public row, in order"
        )
    return env.public if env.public.target is None else env.public.unlabelled()


def _count(rows: Any) -> int:
    """Rows of an array, a frame, `Rows`, or a mapping of arrays."""
    return len(next(iter(rows.values()))) if isinstance(rows, Mapping) else len(rows)
