"""A shared base under a head of each client's own, trained one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.options import at_least
from polyfed.core.algorithm import ClientUpdate, Env, Fit, Fitted, Needs
from polyfed.core.errors import UsageError
from polyfed.core.message import Memory, Message
from polyfed.core.tree import is_under


@dataclass(frozen=True)
class FedRep(FedAvg):
    """The base is averaged, the head is each client's own: in a round the head trains first, then the base under it.

    Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021, algorithm 1:
    hᵢ ← argmin_h fᵢ(h, θ) by `head_epochs` with θ held, then θᵢ ← θ − η ∇_θ fᵢ(hᵢ, θ) by `base_epochs` with hᵢ held,
    θ ← Σ pᵢ θᵢ. The paper averages uniformly (``weighting="uniform"``).

    What is held stays bit for bit: normalisation of the base is in evaluation mode while the head trains.

    Wire: as FedAvg(shared=...). Memory: the head ("own"). Needs a model that trains a part of itself.
    Invariants: 16, 18, 20, 26, 36, 40, 52.

    A client whose whole base is frozen trains its head alone, and its base weighs nothing in the mean.

    Trap: the head sees `head_epochs` of the client's rows each round, not the epochs of its model.

    Attributes:
        shared: prefixes of the base ("base"), or all but the head ("!head"); must be given.
        head_epochs: passes over the rows for the head; 10 in the paper, 5 for its smaller data sets.
        base_epochs: passes for the base; 1 in the paper.

    >>> FedRep(shared="base", head_epochs=5).base_epochs
    1
    """

    head_epochs: int = field(default=10, kw_only=True)
    base_epochs: int = field(default=1, kw_only=True)

    needs = Needs.all("params", "part")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, head_epochs=self.head_epochs, base_epochs=self.base_epochs)
        others(self.name, tuple(self.shared))

    def client_update(self, message: Message, memory: Memory, env: Env) -> ClientUpdate:
        base = tuple(self.shared)
        start, head = self.start(message, memory), others(self.name, base)
        first: Fitted = yield Fit(start=start, part=head, epochs=self.head_epochs)
        if env.frozen and all(is_under(name, env.frozen) for name in message.trees["params"]):
            return self.upload(message, first, env), self.remember(memory, first)  # there is no base to train
        then: Fitted = yield Fit(start=(first.state,), part=base, epochs=self.base_epochs, draw=1)
        fitted = replace(then, steps=first.steps + then.steps)
        return self.upload(message, fitted, env), self.remember(memory, fitted)


def others(name: str, shared: tuple[str, ...]) -> tuple[str, ...]:
    """Prefixes of all that `shared` leaves out, so that one of both trains while the other is held.

    Raises:
        UsageError: nothing is left out, or prefixes with and without "!" are mixed.

    >>> others("FedRep", ("base", "neck")), others("FedRep", ("!head",))
    (('!base', '!neck'), ('head',))
    """
    if not shared:
        raise UsageError(f'{name} shares a base and keeps a head: write shared="base", or shared="!head"')
    if len({prefix.startswith("!") for prefix in shared}) > 1:
        raise UsageError(f'{name}: shared={shared!r} mixes prefixes with and without "!"; write one kind')
    return tuple(prefix[1:] if prefix.startswith("!") else f"!{prefix}" for prefix in shared)
