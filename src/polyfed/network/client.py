"""The client's end of the line: it dials out, polls, and asks again for what was lost. Standard library only."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

from polyfed.core import wire
from polyfed.core.errors import LimitError, MalformedError, PeerError, RunError
from polyfed.core.manifest import Manifest
from polyfed.core.message import Message
from polyfed.core.tree import aligned
from polyfed.network import forms
from polyfed.network.forms import DeniedError, Enrolment, Offer
from polyfed.network.limits import DEFAULT, NetworkLimits

#: Longest pause between two attempts, in seconds.
LONGEST_PAUSE = 5.0


class Link:
    """One client's connection to a server; reconnects by itself.

    Every request may be sent twice without harm, so each is repeated until it is answered or `patience` seconds have
    passed without any answer. Nothing counts as received that is shorter than was declared or has another digest.
    """

    def __init__(
        self,
        url: str,
        *,
        limits: NetworkLimits = DEFAULT,
        patience: float = 60.0,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url, self.limits, self.patience = url, limits, patience
        self._address = forms.address_of(url)
        self._pause, self._clock = pause, clock
        self._token = ""
        self._enrolment: Enrolment | None = None
        self._connection: HTTPConnection | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # ------------------------------------------------------------------------------------------ requests

    def enrol(self, enrolment: Enrolment) -> None:
        """Introduces the client; every other request shows the token that this one brought."""
        self._enrolment, self._token = enrolment, ""
        self._token = self._form("POST", "/enrol", forms.Token, enrolment).token

    def manifest(self) -> Manifest | None:
        """The run as data; None while clients are missing."""
        body = self._read(f"/manifest?wait={self.limits.poll_seconds:g}")
        return None if body is None else Manifest.from_json(body)

    def ready(self, spec: str) -> None:
        self._call("POST", "/ready", forms.Ready(spec))

    def next(self) -> Offer | None:
        """What to do next; None if nothing came up within one poll."""
        body = self._read(f"/next?wait={self.limits.poll_seconds:g}")
        return None if body is None else forms.parse(Offer, body)

    def start(self, message: Message) -> None:
        """The first state of this client's group."""
        self._call("PUT", "/start", message)

    def message(self, digest: str, size: int) -> Message:
        """The message of a blob, in memory that is aligned to 64 bytes.

        Raises:
            LimitError: it is larger than this site allows.
            MalformedError: its bytes have another digest, or are no message.
        """
        if size > self.limits.message.max_bytes:
            raise LimitError(f"a message of {size} bytes, at most {self.limits.message.max_bytes} are allowed")
        buffer = aligned(size, "uint8")
        view = buffer.data.cast("B")
        self._fetch(digest, view)
        if blake2b(view, digest_size=32).hexdigest() != digest:
            raise MalformedError("a blob's bytes do not have the digest that it is named by")
        return wire.decode(view, self.limits.message)

    def blob(self, digest: str) -> Message:
        """As `message`, where only the digest is known: its size is asked for first."""
        answer = self._attempt(
            "GET",
            f"/blob/{digest}",
            None,
            lambda r: (r.getheader("Content-Range", ""), r.read(1)),
            {"Range": "bytes=0-0"},
        )
        size = answer[0].rpartition("/")[2]
        if not size.isdecimal() or len(size) > 18:
            raise MalformedError("the server does not say how long a blob is")
        return self.message(digest, int(size))

    def upload(self, receipt: str, message: Message, cpu_seconds: float = 0.0) -> str:
        """Sends the answer to a task; returns the verdict, "" while it is open."""
        headers = {"Polyfed-Cpu-Seconds": f"{cpu_seconds:.6f}"}
        return str(self._form("PUT", f"/upload/{receipt}", forms.Verdict, message, headers).verdict)

    def receipt(self, receipt: str) -> str:
        """The verdict once more; "" while it is open."""
        return str(self._form("GET", f"/receipt/{receipt}", forms.Verdict).verdict)

    def failed(self, receipt: str, reason: str) -> None:
        self._call("POST", f"/failed/{receipt}", forms.Sentence(forms.printable(reason)))

    def leave(self, reason: str = "") -> None:
        self._call("POST", "/leave", forms.Sentence(forms.printable(reason)))

    # ------------------------------------------------------------------------------------------ how

    def _form(
        self, method: str, path: str, kind: type[Any], body: Any = None, headers: dict[str, str] | None = None
    ) -> Any:
        answer = self._call(method, path, body, headers)
        if answer is None:
            raise MalformedError(f"{path}: an empty answer, expected a {kind.__name__.lower()}")
        return forms.parse(kind, answer)

    def _read(self, path: str) -> bytes | None:
        return self._call("GET", path)

    def _call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> bytes | None:
        answer: bytes | None = self._attempt(method, path, body, self._small, headers)
        return answer

    def _small(self, response: HTTPResponse) -> bytes | None:
        if response.status == 204:
            response.read()  # nothing; but a response that is not read to its end blocks the connection's next one
            return None
        return _exactly(response, self.limits.json_bytes)

    def _fetch(self, digest: str, view: memoryview) -> None:
        """Fills `view`; a connection that was cut is taken up where it broke off."""
        at = 0

        def fill(response: HTTPResponse) -> None:
            nonlocal at
            if response.status != (206 if at else 200) or response.length != len(view) - at:
                raise MalformedError(f"a blob of {response.length} bytes came, {len(view) - at} were announced")
            while at < len(view):
                got = response.readinto(view[at:])
                if not got:
                    raise HTTPException("the body was cut off")
                at += got

        if len(view):
            self._attempt("GET", f"/blob/{digest}", None, fill, lambda: {"Range": f"bytes={at}-"} if at else {})

    def _attempt(
        self, method: str, path: str, body: Any, read: Callable[[HTTPResponse], Any], headers: Any = None
    ) -> Any:
        """One request, repeated while there is no answer, or one that asks to come again."""
        given_up, pause = self._clock() + self.patience, 0.05
        pieces, kind = _body(body)
        may_enrol = path != "/enrol"
        while True:
            more = headers() if callable(headers) else headers or {}
            try:
                return self._once(method, path, pieces, {**kind, **more}, read)
            except DeniedError as denied:
                if denied.status == 401 and self._enrolment is not None and may_enrol:
                    may_enrol = False
                    self.enrol(self._enrolment)  # the server came back from its journal, which holds no tokens
                    continue
                if not denied.retry_after:
                    raise
                pause, failure = min(denied.retry_after, LONGEST_PAUSE), f"{denied}"
            except (OSError, HTTPException) as error:
                self.close()
                failure = f"{type(error).__name__}: {error}"
            if self._clock() > given_up:
                raise RunError(f"{self.url} has not answered for {self.patience:g} seconds: {failure}")
            self._pause(pause * random.uniform(0.5, 1.5))  # noqa: S311  # spreads clients out, decides nothing
            pause = min(pause * 2, LONGEST_PAUSE)

    def _once(
        self,
        method: str,
        path: str,
        pieces: Sequence[memoryview | bytes],
        headers: dict[str, str],
        read: Callable[[HTTPResponse], Any],
    ) -> Any:
        if self._connection is None:
            self._connection = HTTPConnection(*self._address, timeout=self.limits.poll_seconds + 15)
        connection = self._connection
        connection.putrequest(method, path, skip_accept_encoding=True)
        if self._token:
            connection.putheader("Authorization", f"Bearer {self._token}")
        for name, value in headers.items():
            connection.putheader(name, value)
        if pieces or method != "GET":
            connection.putheader("Content-Length", str(sum(map(len, pieces))))
        try:
            connection.endheaders()
            for piece in pieces:
                connection.send(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server may have refused before it read everything: its answer says so, or fails below
        return self._answer(connection.getresponse(), read)

    def _answer(self, response: HTTPResponse, read: Callable[[HTTPResponse], Any]) -> Any:
        if response.status >= 300:
            said = _exactly(response, self.limits.json_bytes)
            after = response.getheader("Retry-After", "0")
            raise DeniedError(response.status, _sentence(response, said), retry_after=_seconds(after))
        answer = read(response)
        if response.will_close:
            self.close()
        return answer


def _body(body: Any) -> tuple[list[memoryview | bytes], dict[str, str]]:
    if body is None:
        return [], {}
    if isinstance(body, Message):
        return [memoryview(piece).cast("B") for piece in wire.encode(body)], {
            "Content-Type": "application/octet-stream"
        }
    return [forms.write(body)], {"Content-Type": "application/json"}


def _exactly(response: HTTPResponse, most: int) -> bytes:
    """A whole body of declared length; an end of the stream is no end of a body."""
    declared = response.length
    if declared is None or declared > most:
        raise LimitError(f"an answer of {declared} bytes, at most {most} are allowed")
    return response.read()  # raises IncompleteRead when it is shorter


def _sentence(response: HTTPResponse, body: bytes) -> str:
    try:
        return forms.printable(forms.parse(forms.Denial, body).error)
    except PeerError:
        return f"{response.status} {forms.printable(response.reason)}"


def _seconds(written: str) -> float:
    try:
        return min(max(float(written), 0.0), LONGEST_PAUSE) if len(written) < 16 else 0.0
    except ValueError:
        return 0.0
