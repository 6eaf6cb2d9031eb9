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
    """The clients that a run waits for, those that may come later, and their tokens.

    Guarantees: no token and no ticket is kept, only their digests; an unknown token and a wrong one are told the same.
    """

    def __init__(self, expected: Sequence[str] | int, most: int, late: Sequence[str] | int = 0) -> None:
        self.count, self._names = _counted(expected, "clients")
        self._most_late, self._late_names = _counted(late, "late")
        if not 1 <= self.count <= self.count + self._most_late <= most:
            raise UsageError(
                f"clients={self.count}, late={self._most_late}: a run over the network has 1 to {most} clients"
            )
        if twice := set(self._names) & set(self._late_names):
            raise UsageError(
                f"{min(twice)} stands in clients= and in late=; the first are waited for, the others are not"
            )
        self._enrolments: dict[str, Enrolment] = {}
        self._late: dict[str, Enrolment] = {}
        self._tokens: dict[bytes, str] = {}

    @property
    def is_complete(self) -> bool:
        return len(self._enrolments) == self.count

    @property
    def enrolments(self) -> dict[str, Enrolment]:
        """In the order given to the run; where only a number was given, by name: the order of arrival decides nothing."""
        return {name: self._enrolments[name] for name in self._names or sorted(self._enrolments)}

    @property
    def latecomers(self) -> dict[str, Enrolment]:
        """Those who are not waited for: in the order given, or by name."""
        return {name: self._late[name] for name in self._late_names or sorted(self._late) if name in self._late}

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name in self._names if name not in self._enrolments)

    def enrol(self, enrolment: Enrolment) -> str:
        """A new token for this client; an earlier one of its own no longer counts.

        Raises:
            DeniedError: the name is not expected, or was claimed with another ticket, or there is no room for it.
        """
        name, here = enrolment.name, self._place_of(enrolment.name)
        known = here.get(name)
        if known is not None:
            if not hmac.compare_digest(known.ticket, _hashed(enrolment.ticket).hex()):
                raise DeniedError(
                    409, f"{name} is enrolled already; a client that comes back shows its ticket (memory=)"
                )
        elif here is self._enrolments and self._names and name not in self._names:
            raise DeniedError(403, f"{name} is not expected in this run")
        elif here is self._enrolments and self.is_complete:
            raise DeniedError(403, f"all {self.count} clients of this run are here")
        else:
            here[name] = _without_ticket(enrolment)
        self._tokens = {token: client for token, client in self._tokens.items() if client != name}
        token = secrets.token_hex(32)
        self._tokens[_hashed(token)] = name
        return token

    def _place_of(self, name: str) -> dict[str, Enrolment]:
        """Whether a name is waited for, or may come later."""
        if name in self._enrolments or name in self._names:
            return self._enrolments
        if name in self._late or name in self._late_names:
            return self._late
        has_room = not self._late_names and len(self._late) < self._most_late
        return self._late if has_room and (self._names or self.is_complete) else self._enrolments

    def restore(self, enrolments: Iterable[Enrolment]) -> None:
        """Those who were here before the server was restarted, in their order; each enrols again with its ticket."""
        for enrolment in enrolments:
            self._place_of(enrolment.name)[enrolment.name] = enrolment

    def who(self, authorization: str) -> str:
        """The client that this header's bearer token belongs to; raises `DeniedError` for every other header."""
        scheme, _, token = authorization.partition(" ")
        name = self._tokens.get(_hashed(token)) if scheme == "Bearer" else None
        if name is None:
            raise DeniedError(401, "enrol first: this token is unknown")
        return name


def _counted(given: Sequence[str] | int, what: str) -> tuple[int, tuple[str, ...]]:
    """How many, and their names where those are given."""
    names = () if isinstance(given, int) else tuple(given)
    if isinstance(given, str) or len(set(names)) < len(names) or any(not NAME.fullmatch(name) for name in names):
        raise UsageError(f"{what}={given!r}: give different names of ASCII letters, digits, '_', '.', '-'")
    return given if isinstance(given, int) else len(names), names


def _hashed(secret: str) -> bytes:
    return sha256(secret.encode()).digest()


def _without_ticket(enrolment: Enrolment) -> Enrolment:
    return replace(enrolment, ticket=_hashed(enrolment.ticket).hex())
