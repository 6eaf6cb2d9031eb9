"""Federated averaging, of a whole model or of a part of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar, Literal

import numpy as np

from polyfed.algorithms.options import one_of
from polyfed.core.aggregate import Aggregate, moments_of, moments_spec, stats_of
from polyfed.core.algorithm import Algorithm, ClientUpdate, Env, Fit, Fitted
from polyfed.core.errors import SpecError, UsageError
from polyfed.core.message import Memory, Message, State
from polyfed.core.tree import Spec, Tree, is_under, part_of


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """Federated averaging: θ ← θ + Σᵢ pᵢ (θᵢ − θ), with pᵢ = nᵢ / Σⱼ nⱼ over the clients of the round.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
    algorithm 1. Learning rate, epochs and batch size belong to each client's model.

    With ``shared=`` only a part of the model travels, the rest is the client's own and may differ between clients in
    every way. ``shared="head"`` is LG-FedAvg (Liang et al. 2020): bases of any architecture under one head;
    ``shared="base"`` is FedPer without feedback. `FedRep` and `FedBABU` train the parts in turn.

    What becomes of each part of a model:
        parameters under `shared`: updates (trained − start) are averaged; dtypes come back as they went.
        normalisation statistics under `shared`: merged as if all rows had been seen at one place (law of total
            variance), weighted as the parameters are; never averaged as variances.
        everything not under `shared`: kept in the client's memory ("own"), statistics included.
        buffers (counters, what an optimizer remembers), shared or not: never sent, kept in the client's memory, so
            that they go on where they were. A fully shared model without buffers needs no memory at all.

    What a client keeps frozen (``pf.Client(freeze=)``) weighs nothing: beside its step it sends counts ("params#",
    "stats#"), 0 for each frozen entry, so that a base that it never trains does not hold the others' back.

    Wire: down "params" (θ) and "stats"; up the same names and shapes ("stats" as float64 moments), with numbers
    ``num_examples`` (training rows), ``steps`` and, where the model reports one, ``loss`` (mean training loss).
    Invariants (numbered as in tests/algorithms/invariants.py): 1, 14, 16, 18-20, 26, 28, 36, 40, 52, 59.

    Attributes:
        shared: prefixes of entry names, whole path elements ("base", "encoder.0"), those after "!" taken out ("!head" is
            all but the head); () shares everything.
        weighting: "num_examples" (pᵢ as above) or "uniform" (pᵢ = 1 / number of clients).
        model: a model to start from, in place of the one that the first client offers; stays at this machine.
        initial: a state to start from, such as a saved one; stays at this machine. Not together with `model`.

    >>> FedAvg(shared="base").shared
    ('base',)
    """

    shared: str | tuple[str, ...] = field(default=(), kw_only=True)
    weighting: Literal["num_examples", "uniform"] = field(default="num_examples", kw_only=True)
    model: Any = field(default=None, metadata={"local": True}, kw_only=True, repr=False, compare=False)
    initial: Any = field(default=None, metadata={"local": True}, kw_only=True, repr=False, compare=False)

    #: what to write where the parts of two groups differ
    instead: ClassVar[str] = "share an equal part with shared=, or use FedMD, which needs no equal models"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared", (self.shared,) if isinstance(self.shared, str) else tuple(self.shared))
        if not all(prefix.removeprefix("!") for prefix in self.shared):
            raise UsageError("shared= holds an empty prefix; leave shared out to share everything")
        one_of("num_examples", "uniform", weighting=self.weighting)
        if self.model is not None and self.initial is not None:
            raise UsageError("model= and initial= both say where to start; give one of them")

    def shared_names(self, names: Collection[str]) -> set[str]:
        """Which entries of a model's state are shared, of all its entries."""
        prefixes = tuple(self.shared)
        return {name for name in names if is_under(name, prefixes)}

    def offered(self, state: Spec) -> Collection[str]:
        """What is shared, but for buffers: the personal part stays at its client from the start."""
        return {name for name in self.shared_names(state) if part_of(name) != "buffers"}

    def personal_spec(self, state: Spec) -> Spec:
        """Of a whole model's spec what is not shared: parameters and statistics; buffers never leave."""
        shared = self.shared_names(state)
        return state.select(lambda name: name not in shared and part_of(name) != "buffers")

    def init(self, env: Env) -> State:
        """The shared part of the first state: "params", and "stats" if it has any.

        Several groups are fine while their shared parts have one spec; the first group's values are taken.

        Raises:
            UsageError: no group, or `shared` names nothing that is trained, or a prefix of it nothing of any group.
            SpecError: the shared parts of two groups differ; names both groups and the entries.
        """
        if not env.first:
            raise UsageError(f"{self.name} has no model to start from: no client offers parameters; give model=")
        _check_shared(self, env)
        parts = {group: _part(first, self.shared_names(first)) for group, first in env.first.items()}
        chosen, *others = parts
        for group, name in product(others, parts[chosen]):
            if difference := parts[group][name].spec.difference(parts[chosen][name].spec):
                raise SpecError(f"{self.name} cannot average {group} with {chosen}: {difference}; {self.instead}")
        return Message(trees={name: tree for name, tree in parts[chosen].items() if tree})

    def broadcast(self, state: State, client: str, env: Env) -> Message:
        del client, env
        return state.only("params", "stats")

    def client_update(self, message: Message, memory: Memory, env: Env) -> ClientUpdate:
        fitted: Fitted = yield self.request(message, memory)
        return self.upload(message, fitted, env), self.remember(memory, fitted)

    def request(self, message: Message, memory: Memory) -> Fit:
        """What a client is asked to train; variants add terms."""
        return Fit(start=self.start(message, memory))

    def upload(self, message: Message, fitted: Fitted, env: Env) -> Message:
        """Trained minus start of what was sent, moments of its statistics, and the numbers."""
        sent, state = message.trees, fitted.state
        trees = {"params": state.like(sent["params"].spec) - sent["params"]}
        if "stats" in sent:
            trees["stats"] = moments_of(state.like(sent["stats"].spec), sent["stats"])
        if env.frozen:
            trees |= {f"{name}#": counts_of(tree.spec, env.frozen) for name, tree in trees.items()}
        return Message(trees=trees, numbers=numbers_of(fitted, env))

    def remember(self, memory: Memory, fitted: Fitted) -> Memory:
        """The next memory: buffers and everything that is not shared; nothing new where there is none."""
        shared = self.shared_names(fitted.state)
        own = {name for name in fitted.state if part_of(name) == "buffers" or name not in shared}
        return memory.put(trees={"own": fitted.state.only(own)}) if own else memory

    def expects(self, sent: Message, env: Env) -> Mapping[str, Spec]:
        trees = {name: tree.spec for name, tree in sent.only("params", "stats").trees.items()}
        if "stats" in trees:
            trees["stats"] = moments_spec(trees["stats"])
        if env.frozen:
            trees |= {f"{name}#": counts_of(spec, env.frozen).spec for name, spec in trees.items()}
        return trees

    def weight(self, numbers: Mapping[str, float], lag: int, tree: str) -> float:
        del lag, tree
        return numbers["num_examples"] if self.weighting == "num_examples" else 1.0

    def server_update(self, state: State, aggregate: Aggregate, env: Env) -> State:
        del env
        if not aggregate.clients:
            return state
        trees = self.step(state, _moved(aggregate.mean("params"), state.trees["params"]))
        if "stats" in state.trees:
            start, moments = state.trees["stats"], aggregate.mean("stats")
            trees["stats"] = start.overlay(stats_of(moments, start.only(moments)))
        return state.put(trees=trees)

    def step(self, state: State, update: Tree) -> dict[str, Tree]:
        """The trees of the next state that the mean update changes; server optimizers differ here."""
        return {"params": state.trees["params"] + update}


def numbers_of(fitted: Fitted, env: Env) -> dict[str, float]:
    """What a client says of its training: ``num_examples``, ``steps``, and ``loss`` where the model reports one."""
    numbers = {"num_examples": float(env.num_examples), "steps": float(fitted.steps)}
    return numbers | ({"loss": float(fitted.metrics["loss"])} if "loss" in fitted.metrics else {})


def counts_of(spec: Spec, frozen: tuple[str, ...]) -> Tree:
    """Of each entry, whether a client's value of it counts: 0 for what it keeps frozen, 1 for the rest."""
    return Tree({name: np.float32(not is_under(name, frozen)) for name in spec})


def _moved(update: Tree, params: Tree) -> Tree:
    """A mean update, with no step for the entries that all clients of the round keep frozen."""
    return update if len(update) == len(params) else Tree.zeros(params.spec).overlay(update)


def _part(first: Tree, shared: set[str]) -> dict[str, Tree]:
    """What travels of a model: "params" and "stats"; either may be empty."""
    part = first.only(shared)
    return {"params": part.part("params"), "stats": part.part("stats")}


def _instead(known: str) -> str:
    """What to write for a model of two modules, as `pf.torch(shared=, personal=)` makes it."""
    return '; write shared="shared"' if known == "personal, shared" else ""


def _check_shared(algorithm: FedAvg, env: Env) -> None:
    """Raises `UsageError` where `shared` names nothing that the first group trains, or a prefix nothing of any group."""
    group, first = next(iter(env.first.items()))
    chosen, params = group or "the model", [name for name in env.whole(group) if part_of(name) == "params"]
    known = ", ".join(sorted({name.replace("/", ".").partition(".")[0] for name in params})[:8])
    if not first.only(algorithm.shared_names(first)).part("params"):
        raise UsageError(f"shared={algorithm.shared!r} names no parameter of {chosen}; it has {known}{_instead(known)}")
    names = {name for group in env.first for name in env.whole(group)}
    for prefix in algorithm.shared:
        if not any(is_under(name, (prefix.removeprefix("!"),)) for name in names):
            raise UsageError(
                f"{algorithm.name}: {prefix!r} in shared={algorithm.shared!r} names no entry of {' or '.join(env.first)}; "
                f"{chosen} has {known}"
            )
