"""What an algorithm is: one object, the same class at the server and at every client, stating only what is odd about it.

A round: the server's `broadcast` makes a message for each client of the cohort; `client_update` turns it into an update
by yielding `Fit` and `Predict` requests, which an executor answers (an algorithm never holds a model, so the same text
runs a client at a time, in worker processes, over a network, or many clients as one batch); accepted updates are folded;
`server_update` makes the next state from the fold.

Sign of an update, everywhere: trained minus start, added by the server.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyfed.core import seed
from polyfed.core.message import Memory, Message, State
from polyfed.core.rows import Problem, Rows
from polyfed.core.terms import Own, Term
from polyfed.core.tree import Array, Spec, Tree, part_of

if TYPE_CHECKING:
    from polyfed.core.aggregate import Aggregate, UpdatePolicy
    from polyfed.core.protocols import Site

Kind = Literal["train", "evaluate", "query", "finish"]
EvaluatedRows = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Task:
    """A lease: what the server asks of one client. Identity and version come from here, never from a body.

    Attributes:
        kind: train, evaluate, query (one stage of a multi-stage protocol) or finish.
        client: who it is for.
        round_num: from 1.
        version: of the server's state from which the message was made; 0 is the start.
        collection: running number of this collection in the whole run; a round that is tried again has a new one.
        stage: which step of a multi-stage protocol this is, from 0.
        position: place in the round's plan; the fold follows it.
        number: the client's own count of tasks of this kind; seeds are made from it. A retry keeps it.
        attempt: from 0; a retry raises it. `receipt` names the attempt.
        part: which of the client's rows an evaluate task asks for: "validation" during a run, "test" once at its end.
    """

    kind: Kind
    client: str
    round_num: int
    version: int
    collection: int = 0
    stage: int = 0
    position: int = 0
    number: int = 0
    attempt: int = 0
    part: EvaluatedRows = "validation"

    @property
    def receipt(self) -> str:
        """Names this attempt; what a client asks by when the answer to its upload was lost."""
        return f"{self.collection}.{self.position}.{self.attempt}"


@dataclass(frozen=True, slots=True)
class Fit:
    """A request: train. A state goes in, a state comes out.

    Attributes:
        start: trees laid over the client's first state, in this order; () starts from the first state.
        terms: the loss is their sum; the client's own loss alone by default.
        tensors: trees that terms read, by name.
        targets: arrays that terms read, one entry a row.
        rows: what to train on; None is the client's own training rows.
        part: prefixes of the names that train (whole path elements); () trains everything.
        epochs: passes over the rows; None is the client's own setting.
        steps: optimizer steps instead of epochs, cycling over the rows; None is the client's own setting.
        draw: which draw of everything random (orders, dropout). Fits of one task with equal draws see the rows in equal
            orders; an algorithm that asks for several short fits numbers them from 0.
    """

    start: tuple[Tree, ...] = ()
    terms: tuple[Term, ...] = (Own(),)
    tensors: Mapping[str, Tree] = field(default_factory=dict)
    targets: Mapping[str, Array] = field(default_factory=dict)
    rows: Rows | None = None
    part: tuple[str, ...] = ()
    epochs: int | None = None
    steps: int | None = None
    draw: int = 0


@dataclass(frozen=True, slots=True)
class Fitted:
    """The answer to a `Fit`.

    Attributes:
        state: the whole state after training, all parts, in the spec order of the client's first state.
        steps: optimizer steps done; 0 where the notion has no meaning.
        lr: the learning rate that the steps had (plain SGD's); 0.0 where the notion has no meaning.
        metrics: such as the mean training loss.
    """

    state: Tree
    steps: int = 0
    lr: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Predict:
    """A request: the model's answers on rows.

    Attributes:
        start: as in `Fit`.
        rows: None is the client's own training rows.
        what: "logits": (n, classes) float32, log-probabilities where a model has no logits; for a regression
            (n, outputs) float32 values. "features": (n, width) representation before the last layer.
    """

    start: tuple[Tree, ...] = ()
    rows: Rows | None = None
    what: Literal["logits", "features"] = "logits"


Request = Fit | Predict


@dataclass(frozen=True)
class Env:
    """What a run hands to every hook; nothing is global.

    Attributes:
        seed: the run's.
        problem: what is predicted.
        client: whose turn it is; "" at the server.
        round_num: from 1; 0 before the first round.
        number: the client's task number: see `Task`.
        population: clients that the run knows at this moment.
        public: the public rows after this client's own pipeline; None if there are none. At the server only their number
            means something (the first client's in a simulation, None over a network); trainers: see `work.at_server`.
        train, validation, test: the client's own rows; None at the server. `test` is None but in the one task at the
            end of a run that reads it.
        group: name of the client's architecture group; clients of one group may average all of their parameters.
        frozen: prefixes of what the client never trains; what it sends of them weighs nothing.
        first: at the server, of each group's state to start from what `Algorithm.offered` names; at a client, empty.
        specs: at the server, the spec of each group's whole state, where `first` holds a part of it. See `whole`.
        trainers: at the server, models that it trains or asks by itself, their rows being the public ones: by group where
            the algorithm has `trains_groups`, and "student" where it has one. At a client, empty. See `work.ask`.
        draw: of the `Fit` that is being answered; 0 elsewhere.
        device: where tensors live.
    """

    seed: int
    problem: Problem
    client: str = ""
    round_num: int = 0
    number: int = 0
    population: int = 0
    public: Rows | None = None
    train: Rows | None = None
    validation: Rows | None = None
    test: Rows | None = None
    group: str = ""
    frozen: tuple[str, ...] = ()
    first: Mapping[str, Tree] = field(default_factory=dict)
    specs: Mapping[str, Spec] = field(default_factory=dict)
    trainers: Mapping[str, Site] = field(default_factory=dict)
    draw: int = 0
    device: str = "cpu"

    def rng(self, purpose: str) -> np.random.Generator:
        """The stream of this client's task for one purpose."""
        return seed.rng(self.seed, *self._stream(purpose))

    def integer(self, purpose: str) -> int:
        """A 31-bit seed for a library that takes one number."""
        return seed.integer(self.seed, *self._stream(purpose))

    def _stream(self, purpose: str) -> tuple[str | int, ...]:
        stream = (self.client, self.number, purpose)
        return (*stream, self.draw) if self.draw else stream

    def whole(self, group: str) -> Spec:
        """The spec of a group's whole state, personal parts and buffers included; `KeyError` for an unknown group."""
        return self.specs[group] if group in self.specs else self.first[group].spec

    @property
    def num_examples(self) -> int:
        """The client's own training rows."""
        return 0 if self.train is None else len(self.train)


@dataclass(frozen=True)
class Needs:
    """What an algorithm asks of each client's model: all words of at least one alternative.

    Words: "params" (a state that can be averaged), "predict", "features", "terms" (loss terms by gradient), "distill"
    (follows soft labels), "part" (trains a part of itself), "sgd" (plain SGD steps of a known rate),
    "iterates" (goes on from wherever its parameters were moved to, which exact statistics cannot), "public" (the
    federation has public rows), "personal" (the client has agreed that its personal part leaves it).
    """

    any_of: tuple[frozenset[str], ...]

    @classmethod
    def all(cls, *words: str) -> Needs:
        return cls((frozenset(words),))

    def __or__(self, other: Needs) -> Needs:
        return Needs(self.any_of + other.any_of)

    def missing(self, offers: frozenset[str]) -> frozenset[str]:
        """The words lacking from the alternative that is nearest; empty when one is met."""
        return min((alternative - offers for alternative in self.any_of), key=len)


ClientUpdate = Generator[Request, Any, tuple[Message, Memory]]
Personalised = Generator[Request, Any, tuple[Tree, ...]]


class Algorithm:
    """Base of all algorithms; `client_update` and `server_update` have no default.

    An algorithm is a frozen dataclass whose fields are its public parameters: they are what a manifest announces, so
    they are numbers, texts, booleans, or tuples of those. Fields that are not (a start model, public rows) are marked
    ``metadata={"local": True}`` and never travel.
    """

    needs: Needs = Needs.all("params")
    #: Whether `server_update` trains models of the clients' architectures: `Env.trainers` then has one for each group.
    trains_groups: bool = False

    @property
    def name(self) -> str:
        return type(self).__name__

    def offered(self, state: Spec) -> Collection[str]:
        """Names of those entries of a model's whole first state whose values the server needs.

        Over a network the first client of each group sends these and no others, and `Env.first` holds these alone under
        every driver. By default all but buffers where `needs` asks for "params", and nothing where it does not; an
        algorithm that keeps a part personal leaves it out here.
        """
        is_needed = any("params" in words for words in self.needs.any_of)
        return {name for name in state if is_needed and part_of(name) != "buffers"}

    def init(self, env: Env) -> State:
        """The server's state before round 1; ``env.first`` holds the parameters to start from."""
        raise NotImplementedError

    def broadcast(self, state: State, client: str, env: Env) -> Message:
        """What one client is sent; by default the whole state."""
        del client, env
        return state

    def client_update(self, message: Message, memory: Memory, env: Env) -> ClientUpdate:
        """The client's work: yields requests, returns the update and its next memory (both pure values)."""
        raise NotImplementedError

    def start(self, message: Message, memory: Memory) -> tuple[Tree, ...]:
        """Trees that, laid over the first state in this order, make this client's model: for evaluation and the result.

        By default what the client keeps ("own" in its memory) and what the server sent ("params", "stats").
        """
        found = (memory.trees.get("own"), message.trees.get("params"), message.trees.get("stats"))
        return tuple(tree for tree in found if tree is not None)

    def personalise(self, message: Message, memory: Memory, env: Env) -> Personalised:
        """The client's model as it predicts, for evaluation and the result: yields requests, returns trees as `start` does.

        By default `start` without any further training. A method that ends with a fine-tuning (FedBABU) does it here;
        ``env.number`` is the version, so that a model that is evaluated and one that is exported have equal bits.
        """
        del env
        yield from ()
        return self.start(message, memory)

    def expects(self, sent: Message, env: Env) -> Mapping[str, Spec]:
        """Which trees an upload holds, exactly; by default those that were sent."""
        del env
        return {name: tree.spec for name, tree in sent.trees.items()}

    def check(self, sent: Message, update: Message, env: Env, policy: UpdatePolicy) -> None:
        """What an upload's values mean, once its trees have the expected specs and are finite; before it counts. Pure.

        Raises:
            RefusedError: a value that no honest client of this method sends. It leaves this client out of the round.
        """
        del sent, update, env, policy

    def receive(self, sent: Message, update: Message, env: Env) -> Message:
        """An upload after validation, before the fold: scatter a slice, factors to a product. Pure."""
        del sent, env
        return update

    def weight(self, numbers: Mapping[str, float], lag: int, tree: str) -> float:
        """The factor of a client's tree in the fold; pure, so that it can run at the client under secure aggregation."""
        del lag, tree
        return numbers["num_examples"]

    def server_update(self, state: State, aggregate: Aggregate, env: Env) -> State:
        """The next state. Pure; it may train, and runs outside the engine."""
        raise NotImplementedError

    def done(self, state: State) -> bool:
        """True when the algorithm itself has nothing left to do."""
        del state
        return False
