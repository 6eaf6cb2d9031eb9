"""A shared base under a head that never trains during the rounds; each client fine-tunes at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fedrep import others
from polyfed.core.algorithm import Env, Fit, Fitted, Needs, Personalised
from polyfed.core.errors import SpecError, UsageError
from polyfed.core.message import Memory, Message, State
from polyfed.core.tree import Spec, Tree, part_of


@dataclass(frozen=True)
class FedBABU(FedAvg):
    """Only the base trains and is averaged, under one head that stays at its first value; then each client fine-tunes.

    Oh, Kim and Yun, "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR 2022,
    algorithm 1: θ ← Σ pᵢ (θ − η ∇_θ fᵢ(θ, h₀)); the personal model is (θ, h₀) after `fine_tune` epochs of everything.

    The head is the server's, so that all bases learn under one, clients that joined late included. Fine-tuning is done
    by `personalise`, at every evaluation and for the result; nothing of it is kept or sent.

    Wire: down "params", "stats" (the base) and "head"; up as FedAvg(shared=...). Needs a model that trains a part of
    itself. Invariants: 36, 40, and FedAvg's 16, 18-20, 26, 28, 52, 59.

    Trap: every evaluation costs the fine-tuning; with many rounds, evaluate every few (``evaluate_every=``).

    Attributes:
        shared: prefixes of the base ("base"), or all but the head ("!head"); must be given.
        fine_tune: epochs of a client's own rows over the whole model; 5 in the paper, 0 for none.

    >>> FedBABU(shared="base").fine_tune
    5
    """

    fine_tune: int = field(default=5, kw_only=True)

    needs = Needs.all("params", "part")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fine_tune < 0:
            raise UsageError(f"fine_tune={self.fine_tune} must be at least 0 epochs")
        others(self.name, tuple(self.shared))

    def init(self, env: Env) -> State:
        """FedAvg's, and "head".

        Raises:
            UsageError: `shared` leaves no head.
            SpecError: the heads of two groups differ; names both groups and the entries.
        """
        state, heads = super().init(env), {group: self.head(first) for group, first in env.first.items()}
        chosen, *rest = heads
        if not heads[chosen]:
            raise UsageError(f"FedBABU: shared={self.shared!r} is all of {chosen or 'the model'}; leave it a head")
        for group in rest:
            if difference := heads[group].spec.difference(heads[chosen].spec):
                raise SpecError(f"FedBABU trains all bases under one head, {group} has another: {difference}")
        return state.put(trees={"head": heads[chosen]})

    def head(self, first: Tree) -> Tree:
        """All of a state but base and buffers."""
        shared = self.shared_names(first)
        return first.only({name for name in first if name not in shared and part_of(name) != "buffers"})

    def broadcast(self, state: State, client: str, env: Env) -> Message:
        return super().broadcast(state, client, env).put(trees={"head": state.trees["head"]})

    def start(self, message: Message, memory: Memory) -> tuple[Tree, ...]:
        return (*super().start(message, memory), message.trees["head"])

    def request(self, message: Message, memory: Memory) -> Fit:
        return Fit(start=self.start(message, memory), part=tuple(self.shared))

    def expects(self, sent: Message, env: Env) -> Mapping[str, Spec]:
        return {name: spec for name, spec in super().expects(sent, env).items() if name != "head"}

    def personalise(self, message: Message, memory: Memory, env: Env) -> Personalised:
        """The whole model after `fine_tune` epochs; its order of rows is that of the version (``env.number``)."""
        del env
        start = self.start(message, memory)
        if not self.fine_tune:
            return start
        fitted: Fitted = yield Fit(start=start, epochs=self.fine_tune)
        return (fitted.state,)
