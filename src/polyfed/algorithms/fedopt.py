"""FedAvg with an optimizer at the server, which takes the mean update for a gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.options import fraction, positive
from polyfed.core.algorithm import Env, Needs
from polyfed.core.message import State
from polyfed.core.tree import Tree


@dataclass(frozen=True)
class ServerOptimizer(FedAvg):
    """What the server optimizers have in common: a momentum beside the parameters, in at least float32.

    They move the parameters only; normalisation statistics are merged as in FedAvg (an optimizer could make a variance
    negative). A round without an accepted update changes nothing, momentum included. Nor do they take models that are
    made of exact statistics (naive Bayes, least squares): one mean is their answer, and momentum would go past it.
    """

    needs = Needs.all("params", "iterates") | Needs.all("params", "terms")

    def init(self, env: Env) -> State:
        state = super().init(env)
        return state.put(trees={"m": Tree.zeros(_wide(state.trees["params"]).spec)})

    def step(self, state: State, update: Tree) -> dict[str, Tree]:
        params, moved = state.trees["params"], self.moments(state, _wide(update))
        return {"params": _like(_wide(params) + self.direction(moved), params), **moved}

    def moments(self, state: State, update: Tree) -> dict[str, Tree]:
        """The next "m" (and "v") from Δ, the mean of trained − start."""
        raise NotImplementedError

    def direction(self, moments: dict[str, Tree]) -> Tree:
        """What is added to the parameters."""
        raise NotImplementedError


@dataclass(frozen=True)
class FedAvgM(ServerOptimizer):
    """FedAvg with momentum at the server: m ← β m + Δ, θ ← θ + η m.

    Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
    2019, section 4. Δ is the mean update, trained − start, so that it is added.
    State: "params", "m" of the same spec (zeros at the start), "stats". Invariants: 3 (β = 0, η = 1 is FedAvg),
    and FedAvg's 16, 18-20, 26, 28, 52, 59.

    Attributes:
        lr: η > 0.
        beta: β in [0, 1).

    >>> FedAvgM().beta
    0.9
    """

    lr: float = field(default=1.0, kw_only=True)
    beta: float = field(default=0.9, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(lr=self.lr)
        fraction(beta=self.beta)

    def moments(self, state: State, update: Tree) -> dict[str, Tree]:
        return {"m": state.trees["m"] * self.beta + update}

    def direction(self, moments: dict[str, Tree]) -> Tree:
        return moments["m"] * self.lr


@dataclass(frozen=True)
class Adaptive(ServerOptimizer):
    """What FedAdagrad, FedAdam and FedYogi have in common (Reddi et al. 2021, algorithm 2).

    mₜ = β₁ mₜ₋₁ + (1 − β₁) Δₜ;  vₜ by the variant;  θ ← θ + η mₜ / (√vₜ + τ).
    No bias correction, and v₋₁ = τ² (not 0): both as in the algorithm.
    """

    lr: float = field(default=0.1, kw_only=True)
    beta1: float = field(default=0.9, kw_only=True)
    tau: float = field(default=1e-3, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(lr=self.lr, tau=self.tau)
        fraction(beta1=self.beta1)

    def init(self, env: Env) -> State:
        state = super().init(env)
        return state.put(trees={"v": state.trees["m"].map(lambda a: np.full_like(a, self.tau**2))})

    def moments(self, state: State, update: Tree) -> dict[str, Tree]:
        m = state.trees["m"] * self.beta1 + update * (1.0 - self.beta1)
        return {"m": m, "v": self.second(state.trees["v"], update.map(np.square))}

    def second(self, v: Tree, square: Tree) -> Tree:
        """vₜ from vₜ₋₁ and Δₜ²."""
        raise NotImplementedError

    def direction(self, moments: dict[str, Tree]) -> Tree:
        root = moments["v"].map(np.sqrt)
        return Tree.wrap(
            root.spec,
            {d: self.lr * m / (root.buffers[d] + m.dtype.type(self.tau)) for d, m in moments["m"].buffers.items()},
        )


@dataclass(frozen=True)
class FedAdagrad(Adaptive):
    """Adagrad at the server: vₜ = vₜ₋₁ + Δₜ², so that steps only shrink.

    Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2. State: "params", "m", "v", "stats".
    Invariants: FedAvg's 16, 18-20, 26, 28, 52, 59.

    Attributes:
        lr: η > 0; the paper searches powers of ten around 0.1.
        beta1: β₁ in [0, 1); 0 in the paper.
        tau: τ > 0, the degree of adaptivity: large is close to plain averaging.
    """

    beta1: float = field(default=0.0, kw_only=True)

    def second(self, v: Tree, square: Tree) -> Tree:
        return v + square


@dataclass(frozen=True)
class FedAdam(Adaptive):
    """Adam at the server: vₜ = β₂ vₜ₋₁ + (1 − β₂) Δₜ².

    Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2. State: "params", "m", "v", "stats".
    Invariants: 4 (β₁ = β₂ = 0, η = τ → ∞ is FedAvg), and FedAvg's 16, 18-20, 26, 28, 52, 59.

    Attributes:
        lr: η > 0.
        beta1: β₁ in [0, 1), of the momentum.
        beta2: β₂ in [0, 1), of the squares.
        tau: τ > 0, the degree of adaptivity.

    >>> FedAdam(lr=0.03)
    FedAdam(shared=(), weighting='num_examples', lr=0.03, beta1=0.9, tau=0.001, beta2=0.99)
    """

    beta2: float = field(default=0.99, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction(beta2=self.beta2)

    def second(self, v: Tree, square: Tree) -> Tree:
        return v * self.beta2 + square * (1.0 - self.beta2)


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """`FedAdam` with Yogi's squares: vₜ = vₜ₋₁ − (1 − β₂) Δₜ² sign(vₜ₋₁ − Δₜ²), which follow a sudden change slowly.

    Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2. State: "params", "m", "v", "stats".
    Invariants: FedAvg's 16, 18-20, 26, 28, 52, 59.

    Attributes:
        lr, beta1, beta2, tau: as `FedAdam`'s.
    """

    def second(self, v: Tree, square: Tree) -> Tree:
        signed = Tree.wrap(v.spec, {d: s * np.sign(v.buffers[d] - s) for d, s in square.buffers.items()})
        return v - signed * (1.0 - self.beta2)


def _wide(tree: Tree) -> Tree:
    """The tree in at least float32: a second moment of 1e-6 is nothing in float16."""
    if all(dtype in ("float32", "float64") for dtype in tree.buffers):
        return tree
    return Tree({name: a.astype(np.promote_types(a.dtype, np.float32)) for name, a in tree.items()})


def _like(tree: Tree, model: Tree) -> Tree:
    """The tree in the dtypes of another."""
    if tree.spec == model.spec:
        return tree
    return Tree({name: a.astype(model[name].dtype) for name, a in tree.items()})
