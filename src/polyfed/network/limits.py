"""Every limit of the network in one place; each is checked before memory is taken for what it bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from polyfed.core import wire
from polyfed.core.errors import UsageError

#: A longer wait would be cut by proxies, of which many give up after 30 or 60 seconds.
LONGEST_POLL: Final = 25.0


@dataclass(frozen=True, slots=True)
class NetworkLimits:
    """What either side accepts at most.

    Attributes:
        message: of one message in the wire format.
        json_bytes: a JSON body or answer.
        line_bytes: the request line, and each header field.
        max_headers: header fields of one request.
        clients: enrolled clients.
        connections: open connections; one more is closed at once.
        uploads: bodies that are being received at the same time; more are told to come again.
        uploads_per_client: of these, by one client.
        spool_bytes: bytes of all bodies being received.
        progress_bytes, progress_seconds: a body must bring so many bytes (or its rest) in so many seconds.
        idle_seconds: until a request's head is whole, and between two requests of one connection.
        linger_seconds: how long what is left of a refused body is read and dropped, so that its sender sees the answer.
        poll_seconds: the longest wait of one poll.
        retry_seconds: what a server that is full asks its clients to wait.
        trials: how often a client may ask to join a run that goes on with a model that does not fit it.
    """

    message: wire.Limits = field(default_factory=wire.Limits)
    json_bytes: int = 1 << 18
    line_bytes: int = 4096
    max_headers: int = 64
    clients: int = 10_000
    connections: int = 20_000
    uploads: int = 64
    uploads_per_client: int = 1
    spool_bytes: int = 8 << 30
    progress_bytes: int = 1 << 16
    progress_seconds: float = 30.0
    idle_seconds: float = 75.0
    linger_seconds: float = 2.0
    poll_seconds: float = LONGEST_POLL
    retry_seconds: float = 1.0
    trials: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.poll_seconds <= LONGEST_POLL:
            raise UsageError(f"poll_seconds={self.poll_seconds}: a poll lasts at most {LONGEST_POLL} seconds")
        if self.idle_seconds <= 0 or self.progress_seconds <= 0:
            raise UsageError("idle_seconds and progress_seconds are above 0: a silent connection is closed after them")


DEFAULT: Final = NetworkLimits()
