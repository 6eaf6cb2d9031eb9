"""A shared base under a head that never trains during the rounds; each client fine-tunes at the end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fedper import head_name
from polyfed.algorithms.fedrep import others
from polyfed.algorithms.options import at_least
from polyfed.core.algorithm import Env, Fit, Fitted, Needs, Personalised
from polyfed.core.errors import UsageError
from polyfed.core.message import Memory, Message, State
from polyfed.core.tree import Spec, Tree


@dataclass(frozen=True)
class FedBABU(FedAvg):
    """Only the base trains and is averaged, under one head that stays at its first value; then each client fine-tunes.

    Oh, Kim and Yun, "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR 2022,
    algorithm 1: θ ← Σ pᵢ (θ − η ∇_θ fᵢ(θ, h₀)); the personal model is (θ, h₀) after `fine_tune` epochs of everything.

    The head is the server's, so that all bases learn under one, clients that joined late included; groups whose heads
    differ in shape have one each. Its first value comes from one client, which over a network has to agree that this much
    of its personal part leaves it (``pf.Client(consents="personal")``). Fine-tuning is done by `personalise`, at every
    evaluation and for the result; nothing of it is kept or sent.

    Wire: down "params", "stats" (the base) and "head"; up as FedAvg(shared=...). State: "head.DIGEST" for each spec of
    a head. Needs a model that trains a part of itself. Invariants: 16, 18, 20, 26, 36, 40, 52.

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
        at_least(0, fine_tune=self.fine_tune)
        others(self.name, tuple(self.shared))

    def offered(self, state: Spec) -> Collection[str]:
        """The head too: its first value is the server's, which hands it to all."""
        return {*super().offered(state), *self.personal_spec(state)}

    def init(self, env: Env) -> State:
        """FedAvg's, and a head for each spec that heads have: that of the first group with it.

        Raises:
            UsageError: `shared` leaves a group no head.
        """
        state, heads = super().init(env), dict[str, Tree]()
        for group, first in env.first.items():
            if not (spec := self.personal_spec(first.spec)):
                raise UsageError(f"FedBABU: shared={self.shared!r} is all of {group or 'the model'}; leave it a head")
            heads.setdefault(head_name(spec), first.only(spec))
        return state.put(trees=heads)

    def broadcast(self, state: State, client: str, env: Env) -> Message:
        group = env.group if env.group in env.first else next(iter(env.first))
        head = state.trees[head_name(self.personal_spec(env.whole(group)))]
        return super().broadcast(state, client, env).put(trees={"head": head})

    def start(self, message: Message, memory: Memory) -> tuple[Tree, ...]:
        return (*super().start(message, memory), message.trees["head"])

    def request(self, message: Message, memory: Memory) -> Fit:
        return Fit(start=self.start(message, memory), part=tuple(self.shared))

    def personalise(self, message: Message, memory: Memory, env: Env) -> Personalised:
        """The whole model after `fine_tune` epochs; its order of rows is that of the version (``env.number``)."""
        del env
        start = self.start(message, memory)
        if not self.fine_tune:
            return start
        fitted: Fitted = yield Fit(start=start, epochs=self.fine_tune)
        return (fitted.state,)
