"""What the parts must offer to be joined: model, executor, journal and blobs."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from polyfed.core.algorithm import Algorithm, Env, Fit, Fitted, Predict, Task
from polyfed.core.errors import ClientError
from polyfed.core.message import Memory, Message
from polyfed.core.rows import Problem, Rows
from polyfed.core.tree import Array, Tree


@runtime_checkable
class Model(Protocol):
    """A participant's model in whichever framework; what it does not offer, it need not implement.

    Guarantees of every adapter: `fit` and `predict` are functions of (request, rows, env) alone, whatever ran before;
    every generator that the framework keeps globally is set from ``env`` at the start of a task and put back after it;
    arrays that come in are copied into the framework's own aligned storage, never viewed.

    Attributes:
        kind: the wrapped thing's own type name, for messages to people.
        offers: words of `polyfed.core.algorithm.Needs` without "public".
        key: equal keys mean the same architecture: one resident model, one group of averaging.
        settings: learning rate, epochs, ..., for the report: short values by name.
    """

    @property
    def kind(self) -> str: ...
    @property
    def offers(self) -> frozenset[str]: ...
    @property
    def key(self) -> Hashable: ...
    @property
    def settings(self) -> Mapping[str, str | float | int | bool]: ...

    def first(self, rows: Rows, env: Env) -> Tree:
        """The state that this model starts from, in the spec order that every state of it has."""
        ...

    def fit(self, request: Fit, rows: Rows, env: Env) -> Fitted: ...

    def predict(self, request: Predict, rows: Rows, env: Env) -> Array: ...

    def export(self, state: Tree, rows: Rows, env: Env) -> Any:
        """The framework's own object with this state: predicts by itself, belongs to the caller."""
        ...


@dataclass(frozen=True, eq=False)
class Site:
    """A client as it is prepared on its own machine: its model, and its rows after its own preprocessing.

    Attributes:
        consents: what this client agrees to besides the usual, as words of `Needs`: "personal".
        begins: the memory that it has before its first task, such as the model of an earlier run; empty by default.
        trains: names of the entries that may move, without "stats:" and "buffers:"; () is all of them. The others stay
            frozen whatever is asked.
        frozen: prefixes of the others.
    """

    name: str
    model: Model
    problem: Problem
    train: Rows
    validation: Rows | None = None
    test: Rows | None = None
    public: Rows | None = None
    group: str = ""
    consents: frozenset[str] = frozenset()
    begins: Memory = field(default_factory=Message)
    trains: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def offers(self) -> frozenset[str]:
        """What an algorithm may ask of this client: its model's words, "public", and what it consents to."""
        public = frozenset({"public"}) if self.public is not None else frozenset()
        return frozenset(self.model.offers) | public | self.consents

    def env(self, seed: int, task: Task) -> Env:
        return Env(
            seed=seed,
            problem=self.problem,
            client=self.name,
            round_num=task.round_num,
            number=task.number,
            public=self.public,
            group=self.group,
            frozen=self.frozen,
            train=self.train,
            validation=self.validation,
            test=self.test if task.part == "test" else None,
        )


@dataclass(frozen=True)
class Job:
    """One piece of client work, handed to an executor."""

    task: Task
    message: Message
    memory: Memory


@dataclass(frozen=True)
class Reply:
    """What came of a job: a message and the next memory, or the client's failure.

    Attributes:
        memory: pending until the server's receipt says accepted.
        cpu_seconds: processor time that the client spent.
    """

    task: Task
    message: Message | None = None
    memory: Memory = field(default_factory=Message)
    error: ClientError | None = None
    cpu_seconds: float = 0.0


class Executor(Protocol):
    """Where client work runs. The bits of a reply do not depend on the executor."""

    def open(self, algorithm: Algorithm, sites: Mapping[str, Site], *, seed: int) -> None:
        """Takes the sites; workers start here, once."""
        ...

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hands over jobs; a whole cohort at once, so that they can be balanced."""
        ...

    def replies(self) -> Iterator[Reply]:
        """Replies as they finish, until every submitted job is answered; never raises for a client's failure."""
        ...

    def close(self) -> None: ...


class Journal(Protocol):
    """An append-only list of records; what `append` returned from is durable."""

    def append(self, records: Sequence[bytes]) -> None:
        """All or nothing; raises `StorageError` when it cannot."""
        ...

    def read(self) -> list[bytes]:
        """Every durable record; a torn tail is cut off, anything else that does not check raises `CorruptError`."""
        ...

    def close(self) -> None:
        """Lets go of what `append` needs; another writer may follow."""
        ...


class Blobs(Protocol):
    """Content-addressed bytes."""

    def put(self, data: bytes) -> str: ...
    def get(self, digest: str) -> bytes: ...

    def keep(self, digests: Collection[str]) -> int:
        """Deletes every blob but these; returns how many."""
        ...
