"""Personal models as proximal points of the shared one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fedprox import check_pull, pulled
from polyfed.algorithms.options import at_least, positive
from polyfed.algorithms.personal import Personal
from polyfed.core.algorithm import ClientUpdate, Env, Fit, Fitted
from polyfed.core.errors import UsageError
from polyfed.core.message import Memory, Message, State
from polyfed.core.tree import Tree


@dataclass(frozen=True)
class PFedMe(Personal):
    """Client i predicts by θ̃ᵢ(w) ≈ argmin_θ fᵢ(θ) + λ/2 ‖θ − w‖², and w moves towards all θ̃ᵢ.

    Dinh, Tran and Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020, algorithm 1. A round
    at a client: R times, K optimizer steps on that objective and then wᵢ ← wᵢ − η λ (wᵢ − θ̃ᵢ), which is a step down
    the envelope's gradient. Server: w ← (1 − β) w + β mean wᵢ.

    Differences from the paper: each of the K steps has a batch of its own (the paper keeps one for all K), and θ̃ᵢ
    starts at w in a round and then where it was, as in the authors' code.

    With R = 1 and η λ = 1 this is FedProx with μ = λ and K steps. Statistics and buffers are those of θ̃ᵢ, the only
    model that sees rows; its statistics are merged for w as in FedAvg.

    Wire: as FedAvg. Memory: "own" (θ̃ᵢ whole). Needs a model that takes loss terms.
    Invariants: 36, 40, and FedAvg's 16, 18, 20, 26, 28, 52, 59.

    Trap: K steps at the client's own learning rate; times λ it must stay below 2, or θ̃ leaps away from w (checked for
    plain SGD). With the paper's λ = 15 that is a rate below 0.13. A round is R · K steps, 100 by default.

    Attributes:
        lam: λ > 0; 15 in the paper.
        lr: η > 0 of w, with η λ at most 1; 0.005 in the paper.
        steps: K.
        local_rounds: R.
        beta: β > 0; 1 is the plain mean, the paper tries up to 4.

    >>> PFedMe(lam=1.0, lr=0.1).steps
    5
    """

    lam: float = field(default=15.0, kw_only=True)
    lr: float = field(default=0.005, kw_only=True)
    steps: int = field(default=5, kw_only=True)
    local_rounds: int = field(default=20, kw_only=True)
    beta: float = field(default=1.0, kw_only=True)
    weighting: Literal["num_examples", "uniform"] = field(default="uniform", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(lam=self.lam, lr=self.lr, beta=self.beta)
        at_least(1, steps=self.steps, local_rounds=self.local_rounds)
        if self.lr * self.lam > 1.0:
            raise UsageError(f"lr={self.lr} times lam={self.lam} is above 1: w would leap over the personal model")

    def client_update(self, message: Message, memory: Memory, env: Env) -> ClientUpdate:
        w = message.trees["params"]
        start: tuple[Tree, ...] = FedAvg.start(self, message, memory)  # w over what the client keeps
        steps = 0
        for number in range(self.local_rounds):
            fitted: Fitted = yield pulled(Fit(start=start, steps=self.steps, draw=number), self.lam, w)
            check_pull(self.name, self.lam, fitted.lr)
            w = w - (w - fitted.state.like(w.spec)) * (self.lr * self.lam)
            start, steps = (fitted.state,), steps + fitted.steps
        moved = replace(fitted, state=fitted.state.overlay(w), steps=steps)
        return self.upload(message, moved, env), memory.put(trees={"own": fitted.state})

    def step(self, state: State, update: Tree) -> dict[str, Tree]:
        return {"params": state.trees["params"] + update * self.beta}
