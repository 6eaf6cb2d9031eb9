"""FedAvg, and for each client a mixture of the shared model with one of its own."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.personal import Personal, beside
from polyfed.core.algorithm import Fit, Fitted, Needs
from polyfed.core.errors import UsageError
from polyfed.core.message import Memory, Message
from polyfed.core.terms import Own
from polyfed.core.tree import Tree

#: A smaller α counts as 0: v is recovered from the mixture by dividing by α.
SMALLEST = 1e-3


@dataclass(frozen=True)
class APFL(Personal):
    """The shared model w is FedAvg's; client i predicts by v̄ = α v + (1 − α) w and trains its v through v̄.

    Deng, Kamani and Mahdavi, "Adaptive Personalized Federated Learning", 2020, algorithm 1:
    v ← v − η ∇_v f(v̄) = v − η α ∇f(v̄), so that a step moves v̄ by −η α² ∇f(v̄). A fit on α² f from v̄ does these
    steps; v = (v̄ − (1 − α) w) / α afterwards. With ``adaptive=True`` α ← α − η ⟨v − w, ∇f(v̄)⟩ once a round,
    held in [0, 1].

    Differences from the paper. It takes a step of w and one of v in turn; here w is held at what was sent while v
    trains, so that v goes on from the very mixture that was evaluated. The gradient for α is the mean over the fit's
    steps, read from how far it went (v̄ before − after = η α² Σ ∇f), not that of one batch.

    α = 0 is the shared model and α = 1 `Local`'s, both bit for bit; w is FedAvg's at any α. Only parameters are mixed:
    statistics and buffers are v̄'s own (of the shared model at α = 0).

    Wire: as FedAvg. Memory: see `Personal`; "own" holds v, and number "alpha" where it adapts. Needs a model that
    takes loss terms; ``adaptive=True`` plain SGD, whose displacement is a sum of gradients.
    Invariants: 10, 36, 40, and FedAvg's 16, 18-20, 26, 28, 52, 59.

    Trap: with Adam a factor of α² before the loss hardly changes a step: v then moves by 1 / α² as much.

    Attributes:
        alpha: α in [0, 1], at the start where it adapts; above 0 at least 0.001.
        adaptive: each client learns its own α.

    >>> APFL(alpha=0.25).adaptive
    False
    """

    alpha: float = 0.5
    adaptive: bool = field(default=False, kw_only=True)
    weighting: Literal["num_examples", "uniform"] = field(default="uniform", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.alpha == 0.0 or SMALLEST <= self.alpha <= 1.0):
            raise UsageError(f"alpha={self.alpha!r} must be 0, or from {SMALLEST} to 1")
        if self.adaptive and not self.alpha:
            raise UsageError("alpha=0 never adapts, as v then equals w; start higher, such as at 0.5")
        if self.adaptive:
            object.__setattr__(self, "needs", Needs.all("params", "terms", "sgd"))

    def start(self, message: Message, memory: Memory) -> tuple[Tree, ...]:
        """The mixture."""
        alpha, own, w = self._alpha(memory), memory.trees.get("own"), message.trees["params"]
        if own is None or not alpha:
            return FedAvg.start(self, message, beside(message, memory))
        return (*super().start(message, memory), mixed(alpha, _over(w, own), w))

    def personal(self, message: Message, memory: Memory, fitted: Fitted) -> Generator[Any, Any, Message]:
        alpha, own, w = self._alpha(memory), memory.trees.get("own"), message.trees["params"]
        if not alpha and own is None:
            return Message()
        v = w if own is None else _over(w, own)
        if alpha:
            start = self.start(message, memory)
            fitted = yield Fit(start=start, terms=(Own(alpha * alpha),))
            own = fitted.state.overlay(unmixed(alpha, fitted.state.like(w.spec), w))
        assert own is not None
        if not self.adaptive:
            return Message(trees={"own": own})
        went = mixed(alpha, v, w) - fitted.state.like(w.spec)  # at α = 0 the shared model's own way from w
        slope = (v - w).dot(went) / ((alpha * alpha or 1.0) * max(fitted.steps, 1))
        after = min(max(alpha - slope, 0.0), 1.0)
        return Message(trees={"own": own}, numbers={"alpha": after if after >= SMALLEST else 0.0})

    def _alpha(self, memory: Memory) -> float:
        return memory.numbers.get("alpha", self.alpha)


def _over(w: Tree, own: Tree) -> Tree:
    """v: of a model that was given in part, as `pf.Client(start=)` allows, the rest is the shared one's."""
    return w.overlay(own.only(w))


def mixed(alpha: float, v: Tree, w: Tree) -> Tree:
    """α v + (1 − α) w; exactly one of both where α is 0 or 1."""
    if alpha in (0.0, 1.0):
        return v if alpha else w
    return v * alpha + w * (1.0 - alpha)


def unmixed(alpha: float, mixture: Tree, w: Tree) -> Tree:
    """The v of which `mixture` was made; α above 0."""
    return mixture if alpha == 1.0 else (mixture - w * (1.0 - alpha)) * (1.0 / alpha)
