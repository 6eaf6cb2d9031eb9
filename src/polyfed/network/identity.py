"""Who is who: a name is claimed once, with a ticket; afterwards a random token says who speaks, never a body."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256

from polyfed.core.errors import UsageError
from polyfed.network.forms import NAME, DeniedError, Enrolment


class Identities:
    """The clients that a run waits for, and their tokens.

    Guarantees: no token and no ticket is kept, only their digests; an unknown token and a wrong one are told the same.
    """

    def __init__(self, expected: Sequence[str] | int, most: int) -> None:
        names = () if isinstance(expected, int) else tuple(expected)
        self.count = expected if isinstance(expected, int) else len(names)
        if not 1 <= self.count <= most:
            raise UsageError(f"clients={self.count}: a run over the network has 1 to {most} clients")
        if isinstance(expected, str) or len(set(names)) < len(names) or any(not NAME.fullmatch(name) for name in names):
            raise UsageError(f"clients={expected!r}: give different names of ASCII letters, digits, '_', '.', '-'")
        self._names = names
        self._enrolments: dict[str, Enrolment] = {}
        self._tokens: dict[bytes, str] = {}

    @property
    def is_complete(self) -> bool:
        return len(self._enrolments) == self.count

    @property
    def enrolments(self) -> dict[str, Enrolment]:
        """In the order given to the run; where only a number was given, by name: the order of arrival decides nothing."""
        return {name: self._enrolments[name] for name in self._names or sorted(self._enrolments)}

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name in self._names if name not in self._enrolments)

    def enrol(self, enrolment: Enrolment) -> str:
        """A new token for this client; an earlier one of its own no longer counts.

        Raises:
            DeniedError: the name is not expected, or was claimed with another ticket.
        """
        name, known = enrolment.name, self._enrolments.get(enrolment.name)
        if known is not None:
            if not hmac.compare_digest(known.ticket, _hashed(enrolment.ticket).hex()):
                raise DeniedError(
                    409, f"{name} is enrolled already; a client that comes back shows its ticket (memory=)"
                )
        elif self._names and name not in self._names:
            raise DeniedError(403, f"{name} is not expected in this run")
        elif self.is_complete:
            raise DeniedError(403, f"all {self.count} clients of this run are here")
        else:
            self._enrolments[name] = _without_ticket(enrolment)
        self._tokens = {token: client for token, client in self._tokens.items() if client != name}
        token = secrets.token_hex(32)
        self._tokens[_hashed(token)] = name
        return token

    def restore(self, enrolments: Iterable[Enrolment]) -> None:
        """Those who were here before the server was restarted; each enrols again with its ticket."""
        self._enrolments = {enrolment.name: enrolment for enrolment in enrolments}

    def who(self, authorization: str) -> str:
        """The client that this header's bearer token belongs to; raises `DeniedError` for every other header."""
        scheme, _, token = authorization.partition(" ")
        name = self._tokens.get(_hashed(token)) if scheme == "Bearer" else None
        if name is None:
            raise DeniedError(401, "enrol first: this token is unknown")
        return name


def _hashed(secret: str) -> bytes:
    return sha256(secret.encode()).digest()


def _without_ticket(enrolment: Enrolment) -> Enrolment:
    return replace(enrolment, ticket=_hashed(enrolment.ticket).hex())
