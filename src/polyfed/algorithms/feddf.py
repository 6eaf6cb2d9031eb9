"""Averaging inside each architecture, then distillation of each average towards the ensemble of everybody."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from polyfed.algorithms.consensus import Consensus, public_rows
from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.options import at_least
from polyfed.core.aggregate import Aggregate, Sums
from polyfed.core.algorithm import ClientUpdate, Env, Fit, Fitted, Needs
from polyfed.core.errors import UsageError
from polyfed.core.message import Memory, Message, State
from polyfed.core.tree import Array, Spec, Tree
from polyfed.core.work import ask, at_server


@dataclass(frozen=True)
class FedDF(Consensus):
    """Each group of one architecture averages its parameters; the server distils every average towards all clients.

    Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020, algorithms 1 and 3:
    θ_g ← Σ_{i in g} nᵢ θᵢ / Σ nᵢ, then min over θ_g of T² · KL(softmax(z̄ / T) ‖ softmax(z_θg / T)) on unlabelled public
    rows, with z̄ the mean of the logits of all clients of all groups. A group of one works, and so does a client without
    parameters, such as a forest: it is one more teacher, and its own model stays as its own rows made it.

    Differences from the paper: its server runs every model that it received over the public rows. Here clients send
    what their models say of them, as in `FedMD`: so anything that predicts can teach, and the server needs sums alone.
    And a server's step is that of the group's own model, with its own optimizer: the paper's is Adam at 1e-3 with a
    cosine, at most 10000 steps, stopped early on validation rows (``models=[pf.torch(net, optimizer="adam", lr=1e-3)]``
    without the cosine and the stop). Adam moves every parameter by about its rate even where the gradient is rounding
    alone, so a group that says already what the ensemble says stays put under SGD, not under Adam.

    Models that do not learn by gradient (scikit-learn's) are averaged where they have parameters, never distilled: most
    are fitted anew, on the public rows alone, and would forget everybody's own.

    Wire: down "params" and "stats" of the client's own group; up "params:<group>" and "stats:<group>", as `FedAvg` has
    them, and "soft" as in `Consensus`. State: those of each group, and "soft". Invariants: 14, 26, 36, 42, 43, 46-49, 51, 52.

    Attributes:
        public, weighting, sharpen, strength: see `Consensus`; parameters are averaged by ``num_examples``.
        temperature, average: see `Consensus`; 1 and logits, as in the paper.
        models: wrapped models that the server trains, each for the group whose states have its names and shapes; stays
            at this machine. A simulation has the clients' own; a server over the network has none but these.
        preprocess: an unfitted transformer of the public rows for the server's models, as a client's ``preprocess=``.
        epochs, steps: of a group's distillation in a round; None is the model's own setting. Not both.

    >>> FedDF(steps=200).average
    'logits'
    """

    models: Any = field(default=(), metadata={"local": True}, kw_only=True, repr=False, compare=False)
    preprocess: Any = field(default=None, metadata={"local": True}, kw_only=True, repr=False, compare=False)
    temperature: float = field(default=1.0, kw_only=True)
    average: Literal["probabilities", "logits"] = field(default="logits", kw_only=True)
    epochs: int | None = field(default=None, kw_only=True)
    steps: int | None = field(default=None, kw_only=True)

    needs = Needs.all("predict", "public")
    trains_groups = True
    #: a mean is over one group's clients alone
    averages_within_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, epochs=self.epochs, steps=self.steps)
        if self.epochs is not None and self.steps is not None:
            raise UsageError("epochs= and steps= both say how long the server trains; give one of them")

    def offered(self, state: Spec) -> Collection[str]:
        return _AVERAGING.offered(state)

    def init(self, env: Env) -> State:
        trees: dict[str, Tree] = {}
        for group, first in env.first.items():
            if first.part("params"):
                start = _AVERAGING.init(replace(env, first={group: first}))
                trees |= {_of(name, group): tree for name, tree in start.trees.items()}
        return Message(trees, self.counted(env))

    def broadcast(self, state: State, client: str, env: Env) -> Message:
        del client
        return Message(_group(state.trees, env.group), state.numbers)

    def client_update(self, message: Message, memory: Memory, env: Env) -> ClientUpdate:
        public = public_rows(message, env, self.name)
        fitted: Fitted = yield Fit(start=self.start(message, memory))
        upload = yield from self.answer(fitted, public, env)
        if "params" not in message.trees:
            return upload, memory.put(trees={"own": fitted.state})
        shared = _AVERAGING.upload(message, fitted, env).trees
        trees = {_of(name, env.group): tree for name, tree in shared.items()}
        return upload.put(trees), _AVERAGING.remember(memory, fitted)

    def expects(self, sent: Message, env: Env) -> Mapping[str, Spec]:
        shared = {_of(name, env.group): spec for name, spec in _AVERAGING.expects(sent, env).items()}
        return {"soft": self.soft_spec(sent.numbers["public_rows"], env.problem), **shared}

    def server_update(self, state: State, aggregate: Aggregate, env: Env) -> State:
        if not aggregate.clients:
            return state
        soft, trees = self.consensus(aggregate), dict(state.trees)
        for group in env.first:
            if parts := _group(state.trees, group):
                own = _of_group(aggregate, group)
                averaged = _AVERAGING.server_update(Message(parts), own, env).trees if "params" in own.trees else parts
                learned = self._distilled(group, averaged, soft["public"], env)
                trees |= {_of(name, group): tree for name, tree in learned.items()}
        return state.put(trees=trees | {"soft": soft})

    def _distilled(self, group: str, parts: Mapping[str, Tree], consensus: Array, env: Env) -> Mapping[str, Tree]:
        """The group's model after the server's own training, where it learns by gradient."""
        site = env.trainers.get(group)
        if site is None or "terms" not in site.model.offers:
            return parts
        lesson = self.teach(consensus, env.problem, site.train, self.epochs)
        request = replace(lesson, start=tuple(parts.values()), steps=self.steps)
        fitted: Fitted = ask(site, request, at_server(site, env))
        return {name: fitted.state.like(tree.spec) for name, tree in parts.items()}


_AVERAGING = FedAvg()
_PARTS = ("params", "stats")


def _of(tree: str, group: str) -> str:
    """The name of a group's tree, or of its counts: "params" and "params#" become "params:<group>" and "params:<group>#"."""
    name, counts, _ = tree.partition("#")
    return f"{name}:{group}{counts}"


def _group(trees: Mapping[str, Tree], group: str) -> dict[str, Tree]:
    """A group's "params" and "stats" out of those of all groups; empty where it has no parameters."""
    return {name: trees[_of(name, group)] for name in _PARTS if _of(name, group) in trees}


def _of_group(aggregate: Aggregate, group: str) -> Aggregate:
    """What the clients of one group came to, under the names that `FedAvg` knows."""
    sums = Sums()
    sums.clients, found = aggregate.clients, aggregate.sums.trees
    sums.trees = {name: found[_of(name, group)] for name in _PARTS if _of(name, group) in found}
    return Aggregate(sums)
