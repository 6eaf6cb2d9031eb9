"""Every client by itself: nothing of a model travels. What a client reaches alone is what joining is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from polyfed.algorithms.fedavg import numbers_of
from polyfed.core.aggregate import Aggregate
from polyfed.core.algorithm import Algorithm, ClientUpdate, Env, Fit, Fitted, Needs
from polyfed.core.message import Memory, Message, State
from polyfed.core.tree import Spec, Tree


@dataclass(frozen=True)
class Local(Algorithm):
    """Each client goes on training its own model on its own rows; the server learns numbers only.

    Invariants: 9, 10 (the limits of other algorithms in which they must equal it).

    Attributes:
        epochs, steps: a round's training; None is the client's own setting.
        starts: architecture group -> state to start from, in place of the client's own first state; stays here.

    >>> Local().needs.any_of
    (frozenset({'predict'}),)
    """

    epochs: int | None = None
    steps: int | None = None
    starts: Mapping[str, Tree] = field(
        default_factory=dict, metadata={"local": True}, kw_only=True, repr=False, compare=False
    )

    needs = Needs.all("predict")

    def init(self, env: Env) -> State:
        del env
        return Message()

    def client_update(self, message: Message, memory: Memory, env: Env) -> ClientUpdate:
        begun = self.start(message, memory)
        start = begun or ((self.starts[env.group],) if env.group in self.starts else ())
        fitted: Fitted = yield Fit(start=start, epochs=self.epochs, steps=self.steps)
        return Message(numbers=numbers_of(fitted, env)), memory.put(trees={"own": fitted.state})

    def expects(self, sent: Message, env: Env) -> Mapping[str, Spec]:
        del sent, env
        return {}

    def server_update(self, state: State, aggregate: Aggregate, env: Env) -> State:
        del aggregate, env
        return state
