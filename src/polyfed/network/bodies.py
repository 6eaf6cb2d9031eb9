"""Bodies on their way in, bounded before memory is taken, and messages on their way out, named by their content."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

from polyfed.core import wire
from polyfed.core.message import Message
from polyfed.network.forms import DeniedError
from polyfed.network.limits import NetworkLimits

#: Messages larger than this are framed and checked in a thread.
SMALL = 1 << 20


class Stream(Protocol):
    async def read(self, n: int = -1) -> bytes: ...


class Inbox:
    """Room for bodies: how many at once, how many of one client, how many bytes in all.

    Attributes:
        num_bytes: taken at this moment.
        peak: the most that was ever taken.
    """

    def __init__(self, limits: NetworkLimits) -> None:
        self.limits = limits
        self.num_bytes = self.peak = 0
        self._open: Counter[str] = Counter()

    @contextmanager
    def room(self, client: str, size: int) -> Iterator[None]:
        """Takes room for one body while it is received.

        Raises:
            DeniedError: there is none at the moment, with the seconds after which to come again.
        """
        limits = self.limits
        full = self._open.total() >= limits.uploads or self.num_bytes + size > limits.spool_bytes
        if size > limits.spool_bytes:
            raise DeniedError(
                413, f"{size} bytes, at most {limits.spool_bytes} are allowed (NetworkLimits.spool_bytes)"
            )
        if full or self._open[client] >= limits.uploads_per_client:
            raise DeniedError(503, "the server receives as many uploads as it may", retry_after=limits.retry_seconds)
        self._open[client] += 1
        self.num_bytes += size
        self.peak = max(self.peak, self.num_bytes)
        try:
            yield
        finally:
            self._open[client] -= 1
            self.num_bytes -= size

    async def read(self, stream: Stream, view: memoryview) -> None:
        """Fills `view` from a body, as long as it makes progress.

        Raises:
            DeniedError: the body ended early or came too slowly.
        """
        at, limits = 0, self.limits
        while at < len(view):
            goal = min(at + limits.progress_bytes, len(view))
            try:
                async with asyncio.timeout(limits.progress_seconds):
                    at = await _read_until(stream, view, at, goal)
            except TimeoutError:
                said = f"{limits.progress_bytes} bytes in {limits.progress_seconds:g} seconds"
                raise DeniedError(408, f"the body came too slowly: a body brings {said}") from None


async def _read_until(stream: Stream, view: memoryview, at: int, goal: int) -> int:
    while at < goal:
        chunk = await stream.read(goal - at)
        if not chunk:
            raise DeniedError(400, f"the body ended after {at} bytes, {len(view)} were declared")
        view[at : at + len(chunk)] = chunk
        at += len(chunk)
    return at


@dataclass(frozen=True)
class Blob:
    """Bytes of a message in pieces that are never joined: views of its own buffers."""

    digest: str
    size: int
    pieces: tuple[memoryview, ...] = field(repr=False)

    @classmethod
    def of(cls, message: Message) -> Blob:
        return cls.made(tuple(memoryview(piece).cast("B") for piece in wire.encode(message)))

    @classmethod
    def made(cls, pieces: tuple[memoryview, ...]) -> Blob:
        total = blake2b(digest_size=32)
        for piece in pieces:
            total.update(piece)
        return cls(total.hexdigest(), sum(map(len, pieces)), pieces)

    def part(self, start: int, stop: int, step: int = 1 << 18) -> Iterator[memoryview]:
        """The bytes from `start` to `stop`, at most `step` at a time."""
        at = 0
        for piece in self.pieces:
            begin, end = max(start - at, 0), min(stop - at, len(piece))
            for low in range(begin, end, step):
                yield piece[low : min(low + step, end)]
            at += len(piece)


class Shelf:
    """Messages that are out, each framed once however many clients fetch it; a client sees its own ones only."""

    def __init__(self) -> None:
        self._blobs: dict[str, Blob] = {}
        self._uses: Counter[str] = Counter()
        self._of: dict[str, dict[str, str]] = {}
        self._known: dict[tuple[object, ...], tuple[Message, Blob]] = {}
        self._lock = asyncio.Lock()

    async def offer(self, client: str, what: str, message: Message) -> Blob:
        """Puts a message out for one client, in place of the one that it had for the same purpose."""
        async with self._lock:
            key = (
                *((name, id(tree)) for name, tree in message.trees.items()),
                *message.numbers.items(),
                str(message.text),
            )
            found = self._known.get(key)
            if found is None:
                made = await asyncio.to_thread(Blob.of, message) if message.num_bytes > SMALL else Blob.of(message)
                found = (message, made)  # the message is held, so that its trees' ids stay its own
                if message.trees:
                    self._known[key] = found
        blob = found[1]
        self.put(client, what, blob)
        return blob

    def put(self, client: str, what: str, blob: Blob) -> None:
        """Puts a blob out; what the client had for the same purpose is no longer its own."""
        mine = self._of.setdefault(client, {})
        if (before := mine.get(what)) == blob.digest:
            return
        mine[what] = blob.digest
        self._blobs[blob.digest] = blob
        self._uses[blob.digest] += 1
        if before is not None:
            self._release(before)

    def _release(self, digest: str) -> None:
        self._uses[digest] -= 1
        if not self._uses[digest]:
            del self._uses[digest], self._blobs[digest]
            self._known = {key: found for key, found in self._known.items() if found[1].digest != digest}

    def get(self, client: str, digest: str) -> Blob:
        """A blob that this client was offered; raises `DeniedError` for another's and for none in the same words."""
        if digest not in self._of.get(client, {}).values():
            raise DeniedError(404, "there is no such blob for this client")
        return self._blobs[digest]
