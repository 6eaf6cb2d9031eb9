"""Distillation over public rows: models of any kind learn from one another by what they predict."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from polyfed.algorithms.consensus import Consensus, public_rows
from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.options import at_least, one_of
from polyfed.core.aggregate import Aggregate
from polyfed.core.algorithm import ClientUpdate, Env, Fit, Fitted, Needs
from polyfed.core.message import Memory, Message, State
from polyfed.core.rows import Problem, Rows
from polyfed.core.tree import Spec, Tree


@dataclass(frozen=True)
class FedMD(Consensus):
    """Clients of any model exchange predictions on public rows and learn the consensus; no parameter travels.

    Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", NeurIPS 2019 workshop, algorithm 1.
    A client's round: revisit (train on its own rows), predict the public rows, digest (learn the consensus on them by
    T² · KL(consensus ‖ softmax(z / T)), batch mean; Hinton et al. 2015). The consensus is the mean over the round's
    clients and a constant to whoever learns from it; it is known from round 2 on. A regression exchanges values, each
    client in the target's own units, and digests by squared error.

    Differences from the paper, each an option: the paper digests before it revisits (``order="paper"``), which lets
    a client forget what it digested; it averages logits (``average="logits"``; ours are centred, as each framework's
    have another zero); and it digests by mean absolute error on logits. Mean accuracy on the digits of scikit-learn
    (two torch nets and a forest, Dirichlet 0.3, 300 public rows, 15 rounds, seeds 0-2): alone 0.67, paper's order
    0.80, digest last 0.85, with logits 0.86.

    With ``shared=`` clients whose models have the named part also average it, as `FedAvg` with the same `shared` does
    (after the digest, by ``num_examples``); the others take part through predictions alone, in the same rounds.

    Wire: tree "soft", entry "public", both ways; up as in `Consensus`, down their mean. Numbers up: ``num_examples``,
    ``steps``, ``loss``. Those who share a part: "params" and "stats" besides, as in `FedAvg`.
    Invariants: 14, 26, 36, 42, 44-49, 51, 52.

    Attributes:
        public, temperature, weighting, average, sharpen, strength: see `Consensus`.
        digest: epochs over the public rows; 0 leaves the consensus unused.
        revisit: epochs over a client's own rows; None is the client's own setting.
        order: "last" (revisit, predict, digest) or "paper" (digest, revisit, predict).
        shared: prefixes of entry names, whole path elements ("base"), that those who have them average; () none.

    >>> FedMD(temperature=3.0)
    FedMD(temperature=3.0, weighting='uniform', average='probabilities', sharpen=0.0, strength=1.0, digest=1,
          revisit=None, order='last', shared=())
    """

    digest: int = field(default=1, kw_only=True)
    revisit: int | None = field(default=None, kw_only=True)
    order: Literal["last", "paper"] = field(default="last", kw_only=True)
    shared: str | tuple[str, ...] = field(default=(), kw_only=True)

    needs = Needs.all("predict", "distill", "public")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shared", FedAvg(shared=self.shared).shared)
        one_of("last", "paper", order=self.order)
        at_least(0, digest=self.digest)
        at_least(1, revisit=self.revisit)

    @property
    def averaging(self) -> FedAvg:
        """What becomes of the shared part, where there is one."""
        return _Averaging(shared=self.shared, host=self.name)

    def offered(self, state: Spec) -> Collection[str]:
        """What is shared, if anything is."""
        return self.averaging.offered(state) if self.shared else ()

    def init(self, env: Env) -> State:
        """No consensus yet, only how many public rows there are; and the first values of the shared part."""
        start = Message(numbers=self.counted(env))
        if not self.shared:
            return start
        having = {group: first for group, first in env.first.items() if self._shares(first)}
        # with nobody to share, all are handed over, so that the sentence names what they have
        return start.put(self.averaging.init(replace(env, first=having or env.first)).trees)

    def _shares(self, first: Tree) -> bool:
        """Whether a model has parameters of the shared part; `first` is what `offered` names of it."""
        return bool(self.shared) and bool(self.averaging.shared_names(first.part("params")))

    def broadcast(self, state: State, client: str, env: Env) -> Message:
        """The consensus; the shared part too for a client whose architecture has it."""
        del client
        has_part = self._shares(env.first.get(env.group, Tree()))
        return state.only("soft", "params", "stats") if has_part else state.only("soft")

    def client_update(self, message: Message, memory: Memory, env: Env) -> ClientUpdate:
        public, start = public_rows(message, env, self.name), self.start(message, memory)
        lesson = self.lesson(message, public, env.problem)
        if lesson is not None and self.order == "paper":
            start = ((yield replace(lesson, start=start)).state,)
        fitted: Fitted = yield Fit(start=start, epochs=self.revisit)
        upload = yield from self.answer(fitted, public, env)
        if lesson is not None and self.order == "last":
            fitted = replace(fitted, state=(yield replace(lesson, start=(fitted.state,))).state)
        if "params" not in message.trees:
            return upload, memory.put(trees={"own": fitted.state})
        return upload.put(self.averaging.upload(message, fitted, env).trees), self.averaging.remember(memory, fitted)

    def lesson(self, message: Message, public: Rows, problem: Problem) -> Fit | None:
        """The request that digests the consensus; None while there is none."""
        if "soft" not in message.trees or not self.digest:
            return None
        return self.teach(message.trees["soft"]["public"], problem, public, self.digest)

    def expects(self, sent: Message, env: Env) -> Mapping[str, Spec]:
        soft = self.soft_spec(sent.numbers["public_rows"], env.problem)
        return {"soft": soft, **self.averaging.expects(sent, env)}

    def server_update(self, state: State, aggregate: Aggregate, env: Env) -> State:
        if not aggregate.clients:
            return state
        if "params" in aggregate.trees:  # a round may have nobody who shares
            state = self.averaging.server_update(state, aggregate, env)
        return state.put(trees={"soft": self.consensus(aggregate)})


@dataclass(frozen=True)
class _Averaging(FedAvg):
    """`FedAvg` of a part, whose mistakes are those of the method that shares it."""

    host: str = field(default="", kw_only=True)

    instead: ClassVar[str] = "name a part in shared= that is equal in all who have it, or leave shared= out"

    @property
    def name(self) -> str:
        return self.host
