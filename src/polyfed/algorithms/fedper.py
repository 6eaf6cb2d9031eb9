"""A shared base under personal parts, with feedback: what the personal parts have learned may become a newcomer's head."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from polyfed.algorithms.consensus import Consensus, public_rows
from polyfed.algorithms.fedavg import FedAvg, counts_of
from polyfed.algorithms.options import at_least, one_of, positive
from polyfed.core.aggregate import Aggregate, UpdatePolicy, largest_step, moments_of, moments_spec, stats_of
from polyfed.core.algorithm import Algorithm, ClientUpdate, Env, Fitted, Needs
from polyfed.core.errors import RefusedError, UsageError
from polyfed.core.message import Memory, Message, State
from polyfed.core.tree import Spec, Tree, part_of
from polyfed.core.work import ask, at_server

#: Trees of the server's state that hold a default head are called so, and then by the digest of its spec.
HEAD = "head."


@dataclass(frozen=True)
class FedPer(FedAvg):
    """A base that all share under personal parts that stay: as `FedAvg` with ``shared=``, exchanged every `every` passes.

    Arivazhagan et al., "Federated Learning with Personalization Layers", 2019, algorithms 1 and 2 (their K_P personal
    layers are whatever is not under `shared`). Between two exchanges a client makes `every` local passes, each one what
    a round of FedAvg would ask: its own epochs, with orders of its own draw. Then the base, as it was moved by training
    under the personal part, goes up. A pass begins where the one before ended, buffers included, so that an optimizer
    that remembers (Adam) goes on as it does from round to round. ``every=1`` without feedback is ``FedAvg(shared=)``,
    bit for bit.

    Feedback is opt-in, and the only way in which a personal part leaves its client; each client has to agree
    (``pf.Client(consents="personal")``). It makes a default head, which whoever has no head of its own starts from:
        "mean": personal parameters are averaged as the base is, among clients whose personal parts have one spec.
            Normalisation statistics in them are merged as those of the base are. Where no client of a spec was heard
            yet, its newcomers have no default head, and start as usual.
        "distill": clients send what they predict of the public rows; the server trains the head alone, over the new
            base, on the mean prediction (`digest` epochs a round, from the head of the round before), as FedMD's
            clients learn a consensus. Heads of every group learn from all clients, whatever their shapes.

    A client that has a head keeps it. With ``feedback_rounds=r`` nothing personal is sent after round r, and the head
    stays as it was then.

    Wire: as FedAvg; down also "head" (the default head of the client's own spec, once there is one) and, with
    "distill", number ``public_rows``. Up also, while there is feedback, "head.DIGEST" (personal parameters, and float64
    moments about zero of their statistics), or "soft" (see `Consensus`). State: "head.DIGEST" for each spec of a
    personal part. With a frozen part also "head.DIGEST#", as FedAvg's counts. Invariants: 1, 14, 16, 18-20, 26, 28, 36, 40, 52, 59.

    Attributes:
        every: local passes between two exchanges, at least 1.
        feedback: None, "mean" or "distill".
        feedback_rounds: the last round of feedback; None is the run's last.
        temperature, digest: of the distillation: T > 0, and epochs over the public rows, at least 1.
        public: public rows, for "distill"; stays out of the manifest.
        preprocess: how the server reads the public rows, as `pf.Client`'s; stays at the server.
        models: over a network, models of the clients' architectures, for "distill"; stays at the server.

    >>> FedPer(shared="base", every=2, feedback="mean").needs.any_of == (frozenset({"params", "personal"}),)
    True
    """

    shared: str | tuple[str, ...] = field(default=("base",), kw_only=True)
    every: int = field(default=1, kw_only=True)
    feedback: Literal["mean", "distill"] | None = field(default=None, kw_only=True)
    feedback_rounds: int | None = field(default=None, kw_only=True)
    temperature: float = field(default=2.0, kw_only=True)
    digest: int = field(default=1, kw_only=True)
    public: Any = field(default=None, metadata={"local": True}, kw_only=True, repr=False, compare=False)
    preprocess: Any = field(default=None, metadata={"local": True}, kw_only=True, repr=False, compare=False)
    models: Any = field(default=(), metadata={"local": True}, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shared:
            raise UsageError('FedPer shares a part of a model: give shared="base"; FedAvg shares everything')
        one_of("mean", "distill", None, feedback=self.feedback)
        at_least(1, every=self.every, digest=self.digest, feedback_rounds=self.feedback_rounds)
        if self.feedback_rounds is not None and self.feedback is None:
            raise UsageError(f"feedback_rounds={self.feedback_rounds} is the last round of feedback=; give that too")
        positive(temperature=self.temperature)
        object.__setattr__(self, "needs", _NEEDS[self.feedback])
        object.__setattr__(self, "trains_groups", self.feedback == "distill")

    def is_heard(self, round_num: int) -> bool:
        """Whether clients send feedback in a round."""
        return self.feedback is not None and round_num <= (self.feedback_rounds or math.inf)

    # ---------------------------------------------------------------- the message

    def offered(self, state: Spec) -> Collection[str]:
        """As FedAvg; with feedback "distill", which begins from the first head of a group, that too."""
        personal = self.personal_spec(state) if self.feedback == "distill" else ()
        return {*super().offered(state), *personal}

    def init(self, env: Env) -> State:
        state = super().init(env)
        if self.feedback != "distill":
            return state
        if self.public is None and env.public is None:
            raise UsageError('FedPer(feedback="distill") needs public rows that every client can predict: public=rows')
        return state.put(numbers=self._consensus.counted(env))

    def broadcast(self, state: State, client: str, env: Env) -> Message:
        sent = super().broadcast(state, client, env)
        if env.group not in env.first:
            return sent
        head = state.trees.get(head_name(self.personal_spec(env.whole(env.group))))
        return sent if head is None else sent.put(trees={"head": head})

    def start(self, message: Message, memory: Memory) -> tuple[Tree, ...]:
        """The default head lies undermost: a head of the client's own covers it."""
        head = message.trees.get("head")
        return (*(() if head is None else (head,)), *super().start(message, memory))

    # ---------------------------------------------------------------- the client

    def client_update(self, message: Message, memory: Memory, env: Env) -> ClientUpdate:
        request = self.request(message, memory)
        passes: list[Fitted] = []
        for draw in range(self.every):
            start = (passes[-1].state,) if passes else request.start
            passes.append((yield replace(request, start=start, draw=draw)))
        fitted = _one(passes)
        upload = self.upload(message, fitted, env)
        if self.is_heard(env.round_num):
            said = yield from self._said(message, fitted, env)
            upload = upload.put(trees=said)
        return upload, self.remember(memory, fitted)

    def _said(self, message: Message, fitted: Fitted, env: Env) -> Any:
        """What feedback sends of a personal part."""
        if self.feedback == "distill":
            public = public_rows(message, env, self.name)
            return (yield from self._consensus.answer(fitted, public, env)).trees
        personal = fitted.state.only(self.personal_spec(fitted.state.spec))
        stats = personal.part("stats")
        moments = moments_of(stats, Tree.zeros(stats.spec))
        said, name = Tree({**personal.part("params"), **moments}), head_name(personal.spec)
        return {name: said} | ({f"{name}#": counts_of(said.spec, env.frozen)} if env.frozen else {})

    def expects(self, sent: Message, env: Env) -> Mapping[str, Spec]:
        trees = dict(super().expects(sent, env))
        if not self.is_heard(env.round_num):
            return trees
        if self.feedback == "distill":
            return trees | {"soft": self._consensus.soft_spec(sent.numbers["public_rows"], env.problem)}
        spec = self.personal_spec(env.whole(env.group))
        stats = moments_spec(spec.select(lambda name: part_of(name) == "stats"))
        params = spec.select(lambda name: part_of(name) == "params")
        name, said = head_name(spec), Spec({**params, **stats})
        return trees | {name: said} | ({f"{name}#": counts_of(said, env.frozen).spec} if env.frozen else {})

    # ---------------------------------------------------------------- the server

    def check(self, sent: Message, update: Message, env: Env, policy: UpdatePolicy) -> None:
        """What clients say of public rows is as `Consensus.check` has it; a head is no larger than a step may make it.

        The unit is the default head that was sent, and the base where there is none yet: see `UpdatePolicy.max_growth`.

        Raises:
            RefusedError: names the client, the tree and the row, or the head's entry.
        """
        if "soft" in update.trees:
            self._consensus.check(sent, update, env, policy)
        unit = sent.trees.get("head", Tree()).part("params") or sent.trees["params"]
        limit = largest_step(unit, policy)
        for name in (name for name in update.trees if name.startswith(HEAD) and not name.endswith("#")):
            for entry, values in update.trees[name].part("params").items():
                if (size := float(np.abs(values.astype(np.float64)).max(initial=0.0))) > limit:
                    raise RefusedError(env.client, f"{name}/{entry}", f"has {size:g}; at most {limit:g} is accepted")

    def weight(self, numbers: Mapping[str, float], lag: int, tree: str) -> float:
        """Predictions count as `Consensus` counts them; parameters as in FedAvg."""
        return self._consensus.weight(numbers, lag, tree) if tree == "soft" else super().weight(numbers, lag, tree)

    def server_update(self, state: State, aggregate: Aggregate, env: Env) -> State:
        after = super().server_update(state, aggregate, env)
        if not aggregate.clients or not self.is_heard(env.round_num):
            return after
        learned = self._distilled if self.feedback == "distill" else self._means
        return after.put(trees=learned(after, aggregate, env))

    def _means(self, state: State, aggregate: Aggregate, env: Env) -> dict[str, Tree]:
        """The mean head of each spec that was heard; what all who were heard keep frozen stays as it was."""
        heads: dict[str, Tree] = {}
        for group in env.first:
            spec = self.personal_spec(env.whole(group))
            if (name := head_name(spec)) in aggregate.trees:
                mean = aggregate.mean(name)
                moments = mean.part("stats")
                stats = stats_of(moments, Tree.zeros(spec).only(moments))
                known = {**state.trees.get(name, {}), **mean.part("params"), **stats}
                heads[name] = Tree({entry: known[entry] for entry in spec if entry in known})
        return heads

    def _distilled(self, state: State, aggregate: Aggregate, env: Env) -> dict[str, Tree]:
        """Each group's default head, trained on the mean prediction over the new base; nothing else of it moves."""
        consensus, heads = self._consensus.consensus(aggregate)["public"], dict[str, Tree]()
        for group, first in env.first.items():
            spec = self.personal_spec(env.whole(group))
            part = tuple(name for name in spec if part_of(name) == "params")
            name = head_name(spec)
            if not part or name in heads:
                continue
            laid = [state.trees.get(tree) for tree in (name, "params", "stats")]
            start = (first, *(tree for tree in laid if tree is not None))
            site = env.trainers[group]
            lesson = self._consensus.teach(consensus, env.problem, site.train, self.digest)
            fitted: Fitted = ask(site, replace(lesson, start=start, part=part), at_server(site, env))
            heads[name] = fitted.state.only(spec)
        return heads

    @property
    def _consensus(self) -> Consensus:
        return Consensus(self.public, temperature=self.temperature)


_NEEDS: Mapping[str | None, Needs] = {
    None: Algorithm.needs,
    "mean": Needs.all("params", "personal"),
    "distill": Needs.all("params", "personal", "predict", "distill", "part", "public"),
}


def head_name(spec: Spec) -> str:
    """The tree that holds the head of this spec."""
    return HEAD + spec.digest


def _one(passes: Sequence[Fitted]) -> Fitted:
    """Several passes as one: the last state, all steps, the mean loss."""
    if len(passes) == 1:
        return passes[0]
    losses = [each.metrics["loss"] for each in passes if "loss" in each.metrics]
    metrics = {**passes[-1].metrics} | ({"loss": sum(losses) / len(losses)} if losses else {})
    return replace(passes[-1], steps=sum(each.steps for each in passes), metrics=metrics)
