"""FedAvg with a proximal term that keeps each client near what it was sent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from polyfed.algorithms.fedavg import FedAvg
from polyfed.core.algorithm import Fit, Needs
from polyfed.core.errors import UsageError
from polyfed.core.message import Memory, Message
from polyfed.core.terms import Near
from polyfed.core.tree import Tree


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg whose clients minimise Fᵢ(w) + μ/2 ‖w − θ‖²: a gradient of μ (w − θ) pulls back to what was sent.

    Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation 2 and algorithm 2. The distance
    is over the shared parameters alone; private layers and statistics are free.

    With ``mu=0.0`` the request is FedAvg's own, without the term: the results are FedAvg's bit for bit. (A term times
    zero would not do: adding 0.0 turns −0.0 into 0.0, and 0 · inf into NaN.)

    Wire: as FedAvg. Needs a model that takes loss terms. Invariants: 2 (μ = 0 is
    FedAvg), and FedAvg's 16, 18-20, 26, 28, 52, 59.

    Attributes:
        mu: μ ≥ 0; the paper searches {0.001, 0.01, 0.1, 1}.

    >>> FedProx(mu=0.1).mu
    0.1
    """

    mu: float = 0.01

    needs = Needs.all("params", "terms")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.mu < math.inf:
            raise UsageError(f"mu={self.mu!r} must be a number of at least 0; 0.01 is a usual value")

    def request(self, message: Message, memory: Memory) -> Fit:
        return pulled(super().request(message, memory), self.mu, message.trees["params"])


def pulled(request: Fit, strength: float, anchor: Tree) -> Fit:
    """A request with a loss of strength / 2 · ‖w − anchor‖² besides; itself, without a term, where `strength` is 0."""
    if strength == 0.0:
        return request
    return replace(request, terms=(*request.terms, Near(strength)), tensors={"anchor": anchor})


def check_pull(name: str, lam: float, lr: float) -> None:
    """Raises `UsageError` where plain SGD of this rate would leap away from the anchor: λ lr must stay below 2."""
    if lam * lr >= 2.0:
        raise UsageError(f"{name} with lam={lam} diverges at a learning rate of {lr}: it must be below {2.0 / lam:.3g}")
