"""FedAvg, and beside it a model of each client's own that is pulled towards the shared one."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from polyfed.algorithms.fedprox import check_pull, pulled
from polyfed.algorithms.options import at_least
from polyfed.algorithms.personal import Personal
from polyfed.core.algorithm import Fit, Fitted
from polyfed.core.errors import UsageError
from polyfed.core.message import Memory, Message


@dataclass(frozen=True)
class Ditto(Personal):
    """The shared model is FedAvg's; client i also trains vᵢ on Fᵢ(v) + λ/2 ‖v − θ‖², θ being what was sent.

    Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, algorithm 1:
    vᵢ ← vᵢ − η (∇Fᵢ(vᵢ) + λ (vᵢ − θ)). A client that is new starts its vᵢ at θ.

    λ = 0 asks for no term: vᵢ is then `Local`'s model bit for bit, and θ is FedAvg's at any λ. The larger λ, the nearer
    to θ. Statistics and buffers of vᵢ are its own; the distance is over shared parameters.

    Wire: as FedAvg. Memory: see `Personal`. Needs a model that takes loss terms.
    Invariants: 9 (λ = 0 is local, λ → ∞ global), 36, 40, and FedAvg's 16, 18-20, 26, 28, 52, 59.

    Trap: two trainings a round. λ times the learning rate must stay below 2, or v leaps away (checked for plain SGD).

    Attributes:
        lam: λ ≥ 0; the paper chooses from 0.05 to 2.
        personal_epochs: of vᵢ; None is the client's own setting, as for the shared model.

    >>> Ditto(lam=1.0)
    Ditto(shared=(), weighting='num_examples', lam=1.0, personal_epochs=None)
    """

    lam: float = 0.1
    personal_epochs: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.lam < math.inf:
            raise UsageError(f"lam={self.lam!r} must be a number of at least 0; 0.1 is a usual value")
        at_least(1, personal_epochs=self.personal_epochs)

    def personal(self, message: Message, memory: Memory, fitted: Fitted) -> Generator[Any, Any, Message]:
        check_pull(self.name, self.lam, fitted.lr)
        request = Fit(start=self.start(message, memory), epochs=self.personal_epochs)
        trained: Fitted = yield pulled(request, self.lam, message.trees["params"])
        return Message(trees={"own": trained.state})
