"""Every exception that polyfed raises.

PolyfedError
├── UsageError            the caller's own mistake; the message says what to write instead
│   ├── NeedsError        an algorithm asks of a client's model what it does not offer
│   ├── SpecError         two trees that must agree in names, shapes and dtypes do not
│   ├── MissingExtraError  an optional framework is not installed
│   └── DataError         rows that cannot be used: empty, ragged, not finite, one class where two are needed
├── PeerError             what came from the other side is not acceptable; never ends a run by itself
│   ├── MalformedError    bytes that are no message
│   ├── LimitError        a declared or actual size beyond its limit, found before memory is taken
│   └── RefusedError      a well-formed update that the round does not accept: names client, tree, entry, reason
├── ClientError           a client's own code raised; carries its name, the exception's type and last lines
├── RunError              the federation cannot go on: quorum not reached, no client left
└── StorageError          the journal or a file cannot be written or read back
    └── CorruptError      what was read back is not what was written
"""

from __future__ import annotations


class PolyfedError(Exception):
    """Root of all of them."""


class UsageError(PolyfedError):
    """The caller's own mistake."""


class NeedsError(UsageError):
    """An algorithm asks of a client's model what it does not offer."""


class SpecError(UsageError):
    """Names, shapes or dtypes of two trees differ where they must be equal."""


class MissingExtraError(UsageError, ImportError):
    """An optional framework is not installed; the message holds the command that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f'{package} is not installed; install it with: pip install "polyfed[{extra}]"')


class DataError(UsageError):
    """Rows that cannot be used."""


class PeerError(PolyfedError):
    """What came from the other side is not acceptable."""


class MalformedError(PeerError):
    """Bytes that are no message."""


class LimitError(PeerError):
    """A declared or actual size beyond its limit."""


class RefusedError(PeerError):
    """A well-formed update that the round does not accept.

    Attributes:
        client: name of the client, from the connection or the lease, never from a body.
        where: tree and entry, such as ``params/base.0.weight``; empty when the whole message is meant.
        reason: what is wrong, with the value got and the value wanted.
    """

    def __init__(self, client: str, where: str, reason: str) -> None:
        self.client, self.where, self.reason = client, where, reason
        super().__init__(f"{client}: {where}: {reason}" if where else f"{client}: {reason}")


class ClientError(PolyfedError):
    """A client's own code raised.

    Attributes:
        client: name of the client.
        kind: type name of the original exception.
        lines: the last lines of its traceback, for the person at that client.
    """

    def __init__(self, client: str, kind: str, message: str, lines: tuple[str, ...] = ()) -> None:
        self.client, self.kind, self.message, self.lines = client, kind, message, lines
        super().__init__(f"{client}: {kind}: {message}" if message else f"{client}: {kind}")

    def __reduce__(self) -> tuple[type[ClientError], tuple[str, str, str, tuple[str, ...]]]:
        return type(self), (self.client, self.kind, self.message, self.lines)


class RunError(PolyfedError):
    """The federation cannot go on."""


class StorageError(PolyfedError):
    """The journal or a file cannot be written or read back."""


class CorruptError(StorageError):
    """What was read back is not what was written."""
