"""What the two sides say to one another besides messages: closed JSON forms, read strictly, and refusals in a sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from polyfed.core import wire
from polyfed.core.algorithm import Task
from polyfed.core.errors import MalformedError, PeerError, SpecError, UsageError
from polyfed.core.manifest import from_json, from_values, to_json
from polyfed.core.message import Message
from polyfed.core.tree import Entry, Spec, Tree

DIGEST: Final = re.compile(r"[0-9a-f]{64}")
RECEIPT: Final = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,12}){2}")
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
#: Longest sentence that one side takes from the other.
MAX_SENTENCE: Final = 1000


class DeniedError(PeerError):
    """A request that is not granted.

    Attributes:
        status: of the HTTP answer.
        retry_after: seconds after which the same request may be granted; 0 for never.
    """

    def __init__(self, status: int, sentence: str, *, retry_after: float = 0.0) -> None:
        self.status, self.retry_after = status, retry_after
        super().__init__(sentence)


def printable(text: str) -> str:
    """At most `MAX_SENTENCE` characters on one line, without control or direction characters: safe to print and to send."""
    joined = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    return "".join(char if char.isprintable() else "?" for char in joined)[:MAX_SENTENCE]


def check_loopback(host: str) -> str:
    """The host, if it is this machine; raises `UsageError` for any other."""
    if host not in LOOPBACK:
        raise UsageError(
            f"host {host!r} is not this machine: without TLS and enrolment by certificate, which come with a release of "
            "their own, polyfed speaks over loopback only; use 127.0.0.1 and a tunnel of your own between machines"
        )
    return host


def address_of(url: str) -> tuple[str, int]:
    """Host and port of ``http://127.0.0.1:PORT``; raises `UsageError` for anything else."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise UsageError(f"{url!r} is no address: {error}") from error
    if parts.scheme != "http" or not port or parts.path not in ("", "/") or parts.query or parts.username:
        raise UsageError(f"{url!r} is no address of a server; it reads http://127.0.0.1:PORT")
    return check_loopback(host), port


@dataclass(frozen=True)
class Enrolment:
    """How a client introduces itself. Afterwards it is known by its token alone.

    Attributes:
        ticket: 64 hex digits drawn by the client: who enrols again under this name must show it again.
        kind, offers, settings: of its model.
        target: what its target holds.
        shape: of one row's target: () for one value, (k,) for several.
        values: its classes, distinct and sorted; () for numbers that are no classes.
        frozen: prefixes of what it never trains.
        joins_at, away: the round from which it takes part, and those in which it does not.
        columns: 32 hex digits each, of its columns' names sorted and in its own order; "" where they have no names.
    """

    name: str
    ticket: str
    kind: str
    offers: tuple[str, ...]
    settings: Mapping[str, str | int | float | bool]
    target: Literal["text", "bool", "number"]
    shape: tuple[int, ...]
    values: tuple[str | int | bool, ...]
    frozen: tuple[str, ...] = ()
    joins_at: int = 1
    away: tuple[int, ...] = ()
    columns: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise MalformedError(f"name {self.name[:80]!r}: use ASCII letters, digits, '_', '.', '-', at most 64")
        if not DIGEST.fullmatch(self.ticket):
            raise MalformedError("the ticket is not 64 hexadecimal digits")
        wanted = {"text": str, "bool": bool, "number": int}[self.target]
        if any(type(value) is not wanted for value in self.values):
            raise MalformedError(f"the classes of a target of {self.target} are each a {wanted.__name__}")
        if len(self.shape) > 1 or any(not 1 <= size <= 1 << 16 for size in self.shape):
            raise MalformedError(f"a row's target of shape {list(self.shape)}; it is one value or a short row of them")
        if any(not re.fullmatch(r"[0-9a-f]{32}|", digest) for digest in self.columns):
            raise MalformedError("columns are named by two digests of 32 hexadecimal digits")
        if min((self.joins_at, *self.away)) < 1:
            raise MalformedError("joins_at and away hold a round below 1; rounds count from 1")

    def is_present(self, round_num: int) -> bool:
        """Whether it takes part in a round, by its own word."""
        return round_num >= self.joins_at and round_num not in self.away


_ENTRY = re.compile(r"(.+) ([a-z0-9_]{1,16}) \[((?:[0-9]{1,15}(?:, [0-9]{1,15})*)?)\]")


@dataclass(frozen=True)
class Start:
    """Where the clients of one group start.

    Attributes:
        given: values of what the algorithm needs at the server (`Algorithm.offered`).
        whole: names, dtypes and shapes of the whole first state.
    """

    given: Tree
    whole: Spec

    @classmethod
    def of(cls, message: Message) -> Start:
        """What `message` wrote; `MalformedError` for anything else. Takes no memory for what is only named."""
        if list(message.trees) != ["first"] or list(message.text) != ["whole"] or message.numbers:
            raise MalformedError("a first state is one tree, first, and the text that names its entries")
        given, entries = message.trees["first"], dict[str, Entry]()
        for line in message.text["whole"]:
            if (found := _ENTRY.fullmatch(line)) is None or len(found[3].split(", ")) > 64:
                raise MalformedError(f"{printable(line[:80])!r} is no name, dtype and shape of an entry")
            shape = tuple(int(size) for size in found[3].split(", ") if size)
            entries[wire.check_name(found[1])] = Entry(found[2], shape)
        try:
            whole = Spec(entries)
        except SpecError as error:
            raise MalformedError(str(error)) from error
        if given.spec != whole.select(lambda name: name in given):
            raise MalformedError("the values of a first state are not those of the entries that it names")
        return cls(given, whole)

    @property
    def message(self) -> Message:
        entries = tuple(f"{name} {entry.dtype} {list(entry.shape)}" for name, entry in self.whole.items())
        return Message({"first": self.given}, text={"whole": entries})


@dataclass(frozen=True)
class Recalled:
    """A run before its first round: who takes part, each one's group, and from where each group starts."""

    enrolments: tuple[Enrolment, ...]
    groups: Mapping[str, str]
    first: Mapping[str, Start]


@dataclass(frozen=True)
class Ready:
    """A client has read the manifest, prepared its rows, and takes part; `spec` is the digest of its first state's spec."""

    spec: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{32}", self.spec):
            raise MalformedError("spec is not 32 hexadecimal digits")


@dataclass(frozen=True)
class Sentence:
    """Why a client leaves, or why its task failed."""

    reason: str

    def __post_init__(self) -> None:
        if len(self.reason) > MAX_SENTENCE:
            raise MalformedError(f"a reason of {len(self.reason)} characters; {MAX_SENTENCE} are enough")


@dataclass(frozen=True)
class Offer:
    """What a client is asked to do next.

    Attributes:
        task: fields of `Task`; None asks for the first state of the client's model, from which the run will start.
        group: the client's architecture group.
        memory: receipt of the memory that the client works with; "" is the empty one it began with.
        keep: receipts of memories to which the run may still roll back.
        digest, size: of the message, a blob.
        reason: why the run ended, where the task is "finish".
        failed: it ended without what it was asked for.
    """

    task: Mapping[str, str | int] | None = None
    group: str = ""
    memory: str = ""
    keep: tuple[str, ...] = ()
    digest: str = ""
    size: int = 0
    reason: str = ""
    failed: bool = False

    def __post_init__(self) -> None:
        if self.task is not None and not DIGEST.fullmatch(self.digest) and not self.failed:
            raise MalformedError("an offer names its message by a digest of 64 hexadecimal digits")
        if any(receipt and not RECEIPT.fullmatch(receipt) for receipt in (self.memory, *self.keep)):
            raise MalformedError("an offer names memories by receipts")


def task_fields(task: Task) -> dict[str, str | int]:
    return asdict(task)


def task_of(offer: Offer) -> Task:
    """The task of an offer.

    Raises:
        MalformedError: a field is missing, unknown or of the wrong type, or a count below 0.
    """
    task = from_values(Task, offer.task, "a task")
    if any(isinstance(value, int) and value < 0 for value in asdict(task).values()):
        raise MalformedError("a task counts from 0")
    return task


@dataclass(frozen=True)
class Verdict:
    """What became of an upload: "accepted", why not, or "" while that is open."""

    verdict: str


@dataclass(frozen=True)
class Token:
    token: str


@dataclass(frozen=True)
class Denial:
    """The body of an answer that denies."""

    error: str


Form = Enrolment | Ready | Sentence | Offer | Verdict | Token | Denial


def parse(kind: type[Any], data: bytes) -> Any:
    """A form from JSON; raises `MalformedError` or `LimitError`."""
    return from_json(kind, data, f"the {kind.__name__.lower()}")


def write(form: Form) -> bytes:
    return to_json(form)
