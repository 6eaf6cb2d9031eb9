"""The server: aiohttp around a `Coordinator`. It hands tasks out, takes uploads in and keeps time; it decides nothing.

    POST /enrol               a form; answers with the bearer token that every other request shows
    GET  /manifest?wait=25    the run as data, once all clients are enrolled; 204 until then
    POST /ready               the manifest is accepted
    GET  /next?wait=25        an offer: a task and its message's digest; 204 if there is none yet
    PUT  /start               of a group's first state what the algorithm needs, from the client that was asked for it
    GET  /blob/DIGEST         a message: immutable, with ETag and Range
    PUT  /upload/RECEIPT      the answer to a task, in the wire format; answers with the verdict
    GET  /receipt/RECEIPT     the verdict once more
    POST /failed/RECEIPT      the client's own code raised
    POST /leave               the client refuses the run, or has what it came for

Who is not waited for may enrol while the run goes on: it takes part from the next round on, as far as it has said that
it will (`Enrolment`). Whoever left may come back in the same way.

An offer is repeated until its task is answered, an upload may be repeated at any time, and a token is all that says who
speaks. Nothing that arrives is executed, imported or unpickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from polyfed.core import wire
from polyfed.core.algorithm import Task
from polyfed.core.coordinator import Coordinator
from polyfed.core.errors import MissingExtraError, PeerError, PolyfedError, RunError, StorageError
from polyfed.core.events import (
    Action,
    Compute,
    Failed,
    Finish,
    Interrupted,
    Joined,
    Judged,
    Left,
    Receipt,
    Refused,
    Reported,
    Restarted,
    Send,
    Ticked,
    WakeAt,
)
from polyfed.core.manifest import Manifest
from polyfed.core.message import Message
from polyfed.core.tree import Spec, aligned
from polyfed.network import forms
from polyfed.network.bodies import SMALL, Blob, Inbox, Shelf
from polyfed.network.forms import DeniedError, Enrolment, Offer, Recalled, Start
from polyfed.network.identity import Identities
from polyfed.network.limits import DEFAULT, NetworkLimits

try:
    from aiohttp import web
except ImportError as error:
    raise MissingExtraError("aiohttp", "network") from error

_LOG = logging.getLogger("polyfed.network")
_PLAIN = re.compile(r"/(enrol|manifest|ready|next|start|leave)")
_NAMED = re.compile(rf"/(?:(blob)/({forms.DIGEST.pattern})|(upload|receipt|failed)/({forms.RECEIPT.pattern}))")
#: Bytes of a message beside its arrays, above which no upload to a known spec goes.
_FRAME = 1 << 16


class Host(Protocol):
    """What the server is told of a run; `polyfed.run.serve` knows algorithms, data and models."""

    def agree(self, enrolments: Mapping[str, Enrolment]) -> tuple[Manifest, Message | None]:
        """The manifest and the public rows, once all clients are there; raises `PolyfedError` where they do not fit."""
        ...

    def offered(self, whole: Spec) -> Spec:
        """Those entries of a first state whose values the server takes, and no others."""
        ...

    def assemble(
        self, enrolments: Mapping[str, Enrolment], groups: Mapping[str, str], first: Mapping[str, Start]
    ) -> Coordinator:
        """The coordinator that begins from these first states, or comes back where there is a journal of it."""
        ...

    def admit(
        self,
        coordinator: Coordinator,
        enrolments: Mapping[str, Enrolment],
        groups: Mapping[str, str],
        first: Mapping[str, Start],
        *,
        is_trial: bool = False,
    ) -> None:
        """Makes the run one of these clients, of whom some are new; a trial changes nothing, and may run in a thread.

        Raises:
            PolyfedError: a new client's model does not fit the run.
        """
        ...

    def recall(self) -> Recalled | None:
        """What an earlier process was told before it began, where that was written down."""
        ...


@dataclass
class _Presence:
    """One client as the server sees it."""

    news: asyncio.Event
    tasks: dict[str, Task]
    group: str = ""
    spec: str = ""
    has_left: bool = False
    trials: int = 0
    refusal: str = ""


class Server:
    """Drives one run for clients that dial in.

    Attributes:
        url: where clients reach it, once it is started.
        coordinator: once all first states are there.
        finish: how the run ended; None while it goes on.
        failures: client -> what it said when its task failed, the newest.
        denials: how many requests were not granted, by status.
    """

    def __init__(
        self,
        host: Host,
        clients: Sequence[str] | int,
        *,
        late: Sequence[str] | int = 0,
        address: tuple[str, int] = ("127.0.0.1", 0),
        limits: NetworkLimits = DEFAULT,
        linger_seconds: float = 30.0,
        trace: bool = False,
    ) -> None:
        forms.check_loopback(address[0])
        self.host, self.limits, self.linger_seconds, self.trace = host, limits, linger_seconds, trace
        self.identities = Identities(clients, limits.clients, late)
        self.inbox, self.shelf = Inbox(limits), Shelf()
        self.url = ""
        self.manifest: Manifest | None = None
        self._public: Blob | None = None
        self.coordinator: Coordinator | None = None
        self.finish: Finish | None = None
        self.failures: dict[str, str] = {}
        self.denials: dict[int, int] = {}
        self._address = address
        self._clients: dict[str, _Presence] = {}
        self._counted: set[str] = set()
        self._starts: dict[str, Start] = {}
        self._off: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Binds and listens; `url` is set when it returns."""
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._over, self._agreed = asyncio.Event(), asyncio.Event()
        self._come_back()
        limits = self.limits
        server = _Capped(
            self._answer,
            limits.connections,
            access_log=None,
            keepalive_timeout=limits.idle_seconds,
            lingering_time=limits.linger_seconds,
            max_line_size=limits.line_bytes,
            max_field_size=limits.line_bytes,
            max_headers=limits.max_headers,
            auto_decompress=False,
        )
        self._runner = web.ServerRunner(server, handle_signals=False)
        await self._runner.setup()
        listening = _listening(self._address)
        await web.SockSite(self._runner, listening).start()
        host, port = listening.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def wait(self) -> Finish:
        """Waits until the run has ended and its clients have what they came for, or `linger_seconds` have passed.

        Raises:
            PolyfedError: the run was called off before or in it: clients do not fit together, one refused, a journal
                that cannot be written.
        """
        await self._over.wait()
        until = self._loop.time()
        while not all(client.has_left for client in self._clients.values()):
            left = until + self.linger_seconds - self._loop.time()
            if left <= 0:
                break
            self._over.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._over.wait()
        if self._off is not None:
            raise self._off
        assert self.finish is not None
        return self.finish

    async def close(self) -> None:
        """Stops listening and ends what is open; may be called again."""
        if self._wake is not None:
            self._wake.cancel()
        for task in self._tasks:
            task.cancel()
        for client in self._clients.values():
            client.news.set()
        await self._runner.shutdown()
        await self._runner.cleanup()

    def interrupt(self, reason: str = "interrupted", *, linger_seconds: float | None = None) -> None:
        """Ends the run in its present state, if it still goes on; clients are told while the server lingers."""
        if linger_seconds is not None:
            self.linger_seconds = linger_seconds
        if self.coordinator is not None:
            self._handle(Interrupted(self.now, reason))
        else:
            self._call_off(RunError(reason))
        self._over.set()

    @property
    def now(self) -> float:
        """Seconds since the server started, on a clock that never jumps."""
        return self._loop.time() - self._started

    # ------------------------------------------------------------------------------------------ the coordinator's actions

    def _handle(self, event: Any) -> list[Action]:
        assert self.coordinator is not None
        return self._carry_out(self.coordinator.handle(event))

    def _carry_out(self, actions: list[Action]) -> list[Action]:
        for action in actions:
            if isinstance(action, Send):
                task = action.task
                client = self._clients[task.client]
                client.tasks[task.receipt] = task
                client.news.set()
            elif isinstance(action, Receipt):
                self._clients[action.client].tasks.pop(action.receipt, None)
            elif isinstance(action, Compute):
                self._spawn(self._compute(action))
            elif isinstance(action, WakeAt):
                self._wake_at(action.at)
            elif isinstance(action, Finish):
                self._finished(action)
        return actions

    def _wake_at(self, at: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        self._wake = self._loop.call_at(self._started + at, self._tick)

    def _tick(self) -> None:
        self._guarded(lambda: self._handle(Ticked(self.now)))

    async def _compute(self, action: Compute) -> None:
        assert self.coordinator is not None
        event = await asyncio.to_thread(self.coordinator.compute, action, at=self.now)
        if isinstance(event, Judged) and not event.reason:
            self._come_and_go(self.coordinator.state.version + 1)
        self._handle(event)
        self._forget()

    def _come_and_go(self, round_num: int) -> None:
        """Enrols who takes part from the next round on, and lets go of who does not; before the round is planned."""
        assert self.coordinator is not None
        there, everybody = set(self.coordinator.state.population), self._everybody()
        ready = {name: c for name, c in everybody.items() if c.group in self._starts and not c.has_left}
        for name in [name for name in ready if name not in self.coordinator.federation.groups]:
            try:
                self._admit(name, is_trial=True)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is this client's alone
                self._send_away(name, error)
                del ready[name]
            else:
                self._admit(name)
        for name in everybody:
            present = name in ready and self._enrolments()[name].is_present(round_num)
            if present != (name in there):
                self._handle(Joined(self.now, name) if present else Left(self.now, name))

    def _admit(self, client: str, *, is_trial: bool = False) -> None:
        self.host.admit(*self._with(client, self._starts), is_trial=is_trial)

    def _with(self, client: str, starts: Mapping[str, Start]) -> Any:
        """What the host is told of a run with one client more."""
        assert self.coordinator is not None
        said, names = self._enrolments(), [*self.coordinator.federation.groups, client]
        groups = {name: self._clients[name].group for name in names}
        first = {group: starts[group] for group in dict.fromkeys(groups.values())}
        return self.coordinator, {name: said[name] for name in names}, groups, first

    def _spawn(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except Exception as error:  # noqa: BLE001  # whatever it is, the run cannot go on and must not hang
                self._call_off(error)

        task = asyncio.ensure_future(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  # as in `_spawn`
            self._call_off(error)

    def _forget(self) -> None:
        """Drops what is known of receipts that the engine itself has forgotten."""
        assert self.coordinator is not None
        state = self.coordinator.state
        self._counted &= state.leases.keys()
        for client in self._clients.values():
            client.tasks = {r: task for r, task in client.tasks.items() if r in state.leases}

    def _finished(self, finish: Finish) -> None:
        self.finish = finish
        if self._wake is not None:
            self._wake.cancel()
        self._tell_all()
        self._over.set()

    def _call_off(self, error: Exception) -> None:
        if self._off is None and self.finish is None:
            self._off = error
        if not isinstance(error, PolyfedError):
            _LOG.error("the run was called off", exc_info=error)
        self._tell_all()
        self._over.set()

    def _tell_all(self) -> None:
        self._agreed.set()
        for client in self._clients.values():
            client.news.set()

    # ------------------------------------------------------------------------------------------ requests

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Authenticates, then looks at what is asked; every refusal is a status and a sentence."""
        try:
            return await self._route(request)
        except DeniedError as denied:
            return self._denied(denied.status, str(denied), denied.retry_after)
        except PeerError as error:
            return self._denied(400, str(error))
        except StorageError:
            _LOG.exception("a request could not be stored")
            return self._denied(503, "the server cannot store this now", self.limits.retry_seconds)
        except ConnectionError:
            raise
        except Exception:  # noqa: BLE001  # a fault of ours; the peer is told no more than that
            _LOG.exception("a request could not be answered")
            return self._denied(500, "internal error")

    def _denied(self, status: int, sentence: str, retry_after: float = 0.0) -> web.Response:
        self.denials[status] = self.denials.get(status, 0) + 1
        headers = {"Retry-After": f"{retry_after:g}"} if retry_after else {}
        return _json(forms.Denial(forms.printable(sentence)), status=status, headers=headers)

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        _check_host(request)
        path = request.path_qs.partition("?")[0]
        plain, named = _PLAIN.fullmatch(path), _NAMED.fullmatch(path)
        what, name = (plain[1], "") if plain else (named[1] or named[3], named[2] or named[4]) if named else ("", "")
        if (request.method, what) == ("POST", "enrol"):
            return await self._enrol(request)
        client = self.identities.who(request.headers.get("Authorization", ""))
        handler = _ROUTES.get((request.method, what))
        if handler is None:
            raise DeniedError(404, "there is no such request")
        return await handler(self, request, client, name)

    async def _form(self, request: web.BaseRequest, kind: type[Any], client: str = "") -> Any:
        """A JSON body; another content type could be sent by a page in a browser on this machine."""
        if request.content_type != "application/json":
            raise DeniedError(415, "a form is application/json")
        size = _length(request, self.limits.json_bytes)
        with self.inbox.room(client, size):
            body = bytearray(size)
            await self.inbox.read(request.content, memoryview(body))
        return forms.parse(kind, bytes(body))

    async def _enrol(self, request: web.BaseRequest) -> web.Response:
        enrolment: Enrolment = await self._form(request, Enrolment)
        self._still_on()
        was_complete = self.identities.is_complete
        token = self.identities.enrol(enrolment)
        self._clients.setdefault(enrolment.name, _Presence(asyncio.Event(), {}))
        if self._public is not None:
            self.shelf.put(enrolment.name, "public", self._public)
        if self.identities.is_complete and not was_complete:
            self._guarded(self._agree)
        return _json(forms.Token(token))

    def _agree(self) -> None:
        self.manifest, public = self.host.agree(self.identities.enrolments)
        if public is not None:
            self._public = Blob.of(public)
            self.manifest = replace(self.manifest, public=self._public.digest)
            for client in self._clients:
                self.shelf.put(client, "public", self._public)
        self._agreed.set()

    def _still_on(self, client: str = "") -> None:
        """Raises `DeniedError` once the run was called off; whoever was told so need not be waited for."""
        if self._off is not None:
            said = str(self._off) if isinstance(self._off, PolyfedError) else "the server failed"
            if client:
                self._clients[client].has_left = True
                self._over_if_alone()
            raise DeniedError(410, f"the run was called off: {said}")

    async def _manifest(self, request: web.BaseRequest, client: str, _: str) -> web.Response:
        await self._wait(self._agreed, _patience(request))
        self._still_on(client)
        if self.manifest is None:
            return web.Response(status=204)
        return web.Response(body=self.manifest.to_json(), content_type="application/json")

    async def _wait(self, event: asyncio.Event, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, self.limits.poll_seconds)):
                await event.wait()

    async def _ready(self, request: web.BaseRequest, client: str, _: str) -> web.Response:
        ready: forms.Ready = await self._form(request, forms.Ready, client)
        self._still_on(client)
        if self.manifest is None:
            raise DeniedError(409, "read the manifest first")
        me = self._clients[client]
        if me.group and me.spec != ready.spec:
            raise DeniedError(409, f"{client} has another model than the one with which it is known in this run")
        if me.trials >= self.limits.trials:
            raise DeniedError(403, f"{client} was tried {me.trials} times in this run and did not fit it")
        me.spec, me.refusal = ready.spec, ""
        if client in self.identities.latecomers:
            self._group_late(client)
        elif not me.group and self.identities.is_complete and all(c.spec for c in self._ordered().values()):
            self._group()
        return web.Response(status=204)

    def _group(self) -> None:
        """One group for each kind of model and spec of its state; the first client of each, in order, gives its start."""
        for client in self.identities.enrolments:
            self._put_in_group(client)
        self._tell_all()

    def _put_in_group(self, client: str) -> None:
        said, me = self._enrolments(), self._clients[client]
        known = {
            c.spec: c.group for name, c in self._everybody().items() if c.group and said[name].kind == said[client].kind
        }
        kind, number = said[client].kind, len(known)
        me.group = known.get(me.spec) or (kind if number == 0 else f"{kind}-{number + 1}")
        assert self.manifest is not None
        self.manifest = replace(self.manifest, specs={**self.manifest.specs, me.group: me.spec})

    def _group_late(self, client: str) -> None:
        """As `_group`, for one who is not waited for; once the run has begun, so that it decides nothing of how."""
        me = self._clients[client]
        if self.coordinator is not None and me.spec and not me.group:
            self._put_in_group(client)
            me.news.set()

    def _ordered(self) -> dict[str, _Presence]:
        """Those who are waited for."""
        return {name: self._clients[name] for name in self.identities.enrolments}

    def _enrolments(self) -> dict[str, Enrolment]:
        """Of everybody: those who are waited for, then those who came later."""
        return self.identities.enrolments | self.identities.latecomers

    def _everybody(self) -> dict[str, _Presence]:
        return {name: self._clients[name] for name in self._enrolments()}

    def _gives_start(self, client: str) -> bool:
        group = self._clients[client].group
        firsts = [name for name, c in self._everybody().items() if c.group == group] if group else []
        return bool(firsts) and firsts[0] == client and group not in self._starts

    async def _start(self, request: web.BaseRequest, client: str, _: str) -> web.Response:
        if self.coordinator is None or self._gives_start(client):
            size = _length(request, self.limits.message.max_bytes)
            if not self._gives_start(client):
                raise DeniedError(409, f"{client} is not asked for a first state")
            with self.inbox.room(client, size):
                start = Start.of(await self._message(request, size, None))
                self._still_on(client)
                self._check_first(client, start)
                if self.coordinator is not None:
                    await self._try_on(client, start)
            if self._gives_start(client):
                self._starts[self._clients[client].group] = start
            self._begin_if_due()
        return web.Response(status=204)

    def _check_first(self, client: str, start: Start) -> None:
        """That it is what was announced, and no more of it than the algorithm needs."""
        if start.whole.digest != self._clients[client].spec:
            raise DeniedError(422, "this is not the first state whose spec was announced")
        if start.whole.num_bytes > self.limits.message.max_bytes:
            raise DeniedError(
                413, f"a model of {start.whole.num_bytes} bytes; {self.limits.message.max_bytes} are allowed"
            )
        if difference := start.given.spec.difference(self.host.offered(start.whole)):
            raise DeniedError(422, f"this is not the part of the first state that the server needs: {difference}")
        if not start.given.is_finite():
            raise DeniedError(422, "the first state is not finite")

    async def _try_on(self, client: str, start: Start) -> None:
        """Sends a newcomer away whose model does not fit the run, before it could do harm; others are served meanwhile."""
        run = self._with(client, {**self._starts, self._clients[client].group: start})
        try:
            await asyncio.to_thread(self.host.admit, *run, is_trial=True)
        except Exception as error:  # whatever it is, it is this client's alone
            raise DeniedError(422, self._send_away(client, error)) from error

    def _send_away(self, client: str, error: Exception) -> str:
        """A newcomer that does not fit is out, as if it had never come; returns what it is told."""
        if not isinstance(error, PolyfedError):
            _LOG.error("%s could not be admitted", client, exc_info=error)
        said = (
            str(error) if isinstance(error, PolyfedError) else f"its model fails at the server ({type(error).__name__})"
        )
        me = self._clients[client]
        me.refusal, me.trials = f"{client} cannot join this run: {said}", me.trials + 1
        if all(name == client or c.group != me.group for name, c in self._everybody().items()):
            self._starts.pop(me.group, None)
        me.group, me.has_left = "", True
        me.news.set()
        self._over_if_alone()
        return me.refusal

    def _begin_if_due(self) -> None:
        clients = self._ordered()
        groups = {name: client.group for name, client in clients.items()}
        order = dict.fromkeys(groups.values())
        if self.coordinator is None and self._starts.keys() >= order.keys():
            self._guarded(lambda: self._begin(groups, {group: self._starts[group] for group in order}))

    def _begin(self, groups: Mapping[str, str], first: Mapping[str, Start]) -> None:
        said = self._enrolments()
        coordinator = self.host.assemble({name: said[name] for name in groups}, groups, first)
        coordinator.trace = [] if self.trace else None
        self._started = self._loop.time()
        self.coordinator = coordinator
        if coordinator.state.population:
            for name, client in self._clients.items():
                client.has_left = name not in coordinator.state.population  # until it is heard of again
            self._handle(Restarted(0.0))
        else:
            self._carry_out(coordinator.begin([name for name in groups if said[name].is_present(1)], at=0.0))
        for name in self.identities.latecomers:
            self._group_late(name)

    def _come_back(self) -> None:
        """Goes on with a run that an earlier process began; its clients enrol again with their tickets."""
        recalled = self.host.recall()
        if recalled is None:
            return
        self.identities.restore(recalled.enrolments)
        for name, group in recalled.groups.items():
            spec = recalled.first[group].whole.digest
            self._clients[name] = _Presence(asyncio.Event(), {}, group, spec)
        self._agree()
        assert self.manifest is not None
        self.manifest = replace(self.manifest, specs={c.group: c.spec for c in self._everybody().values()})
        self._starts = dict(recalled.first)
        self._begin(recalled.groups, recalled.first)

    # ------------------------------------------------------------------------------------------ offers

    async def _next(self, request: web.BaseRequest, client: str, _: str) -> web.Response:
        me, patience = self._clients[client], _patience(request)
        me.has_left = False  # whoever asks for work is here
        me.news.clear()
        offer = await self._offer(client)
        if offer is None:
            await self._wait(me.news, patience)
            offer = await self._offer(client)
        return web.Response(status=204) if offer is None else _json(offer)

    async def _offer(self, client: str) -> Offer | None:
        self._still_on(client)
        me = self._clients[client]
        if me.refusal:
            me.has_left = True
            raise DeniedError(422, me.refusal)
        if self.finish is None and self._gives_start(client):
            return Offer(group=me.group)
        if self.coordinator is None:
            return None
        task = self._task(client)
        if task is None:
            return None
        return await self._offered(task, me)

    def _task(self, client: str) -> Task | None:
        """The oldest task of a client that is open; "finish" once the run has ended."""
        assert self.coordinator is not None
        state = self.coordinator.state
        if self.finish is not None:
            return Task("finish", client, state.round_num, state.version)
        held = {receipt for receipt, _ in state.held}
        tasks = self._clients[client].tasks.items()
        return next((task for receipt, task in tasks if receipt in state.leases and receipt not in held), None)

    async def _offered(self, task: Task, me: _Presence) -> Offer:
        coordinator = self.coordinator
        assert coordinator is not None
        state, client = coordinator.state, task.client
        current = (
            coordinator.receipts_at.get(state.version, coordinator.receipts) if state.ending else coordinator.receipts
        )
        memory, kept = current.get(client, ""), {r[client] for r in coordinator.receipts_at.values() if client in r}
        reason, failed = (
            (self.finish.reason, self.finish.failed) if task.kind == "finish" and self.finish else ("", False)
        )
        blob = await self.shelf.offer(client, "task", coordinator.message_for(task))
        if task.receipt not in self._counted and task.kind != "finish":
            self._counted.add(task.receipt)
            coordinator.count_down(task, blob.size)
        fields = forms.task_fields(task)
        said = forms.printable(reason)
        return Offer(fields, me.group, memory, tuple(sorted(kept)), blob.digest, blob.size, said, failed)

    async def _blob(self, request: web.BaseRequest, client: str, digest: str) -> web.StreamResponse:
        blob = self.shelf.get(client, digest)
        headers = {"ETag": f'"{digest}"', "Cache-Control": "immutable, private", "Accept-Ranges": "bytes"}
        start, stop = _range(request, blob.size, digest)
        partial = (start, stop) != (0, blob.size)
        if partial:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
        response = web.StreamResponse(status=206 if partial else 200, headers=headers)
        response.content_type, response.content_length = "application/octet-stream", stop - start
        await response.prepare(request)
        for piece in blob.part(start, stop):
            await response.write(piece)
        await response.write_eof()
        return response

    # ------------------------------------------------------------------------------------------ uploads

    def _mine(self, client: str, receipt: str) -> Coordinator:
        """The coordinator, if this receipt is or was this client's; another's and none are told the same."""
        coordinator = self.coordinator
        lease = None if coordinator is None else coordinator.state.leases.get(receipt)
        is_mine = coordinator is not None and (
            lease.task.client == client if lease else coordinator.state.verdict(client, receipt)
        )
        if coordinator is None or not is_mine:
            raise DeniedError(404, "there is no such task for this client")
        return coordinator

    async def _upload(self, request: web.BaseRequest, client: str, receipt: str) -> web.Response:
        coordinator = self._mine(client, receipt)
        lease = coordinator.state.leases.get(receipt)
        if lease is None:
            return self._verdict(self._handle(Reported(self.now, client, receipt, "")), client, receipt)
        expected = self._expected(lease.task)
        room = sum(spec.num_bytes + 256 * len(spec) for spec in expected.values()) + _FRAME
        size = _length(request, min(room, self.limits.message.max_bytes))
        with self.inbox.room(client, size):
            try:
                message = await self._message(request, size, expected)
            except _UnexpectedError as error:
                return self._verdict(self._handle(Refused(self.now, client, receipt, str(error))), client, receipt)
            cpu = _seconds(request.headers.get("Polyfed-Cpu-Seconds", "0"))
            actions = coordinator.upload(self.now, client, receipt, message, num_bytes=size, cpu_seconds=cpu)
        return self._verdict(self._carry_out(actions), client, receipt)

    def _expected(self, task: Task) -> Mapping[str, Spec]:
        coordinator = self.coordinator
        assert coordinator is not None
        if task.kind == "evaluate":
            return {}
        federation = coordinator.federation
        env = federation.env(task.round_num, len(coordinator.state.population), task.client)
        return federation.algorithm.expects(coordinator.message_for(task), env)

    async def _message(self, request: web.BaseRequest, size: int, expected: Mapping[str, Spec] | None) -> Message:
        """A body in the wire format, judged by its header before the rest is read."""
        limits = self.limits.message
        if size < 8:
            raise DeniedError(400, f"a body of {size} bytes is no message")
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        buffer = aligned(size, "uint8")
        view = buffer.data.cast("B")
        await self.inbox.read(request.content, view[:8])
        start = wire.header_size(view, limits)
        if start > size:
            raise DeniedError(400, f"the header has {start} bytes, the body {size}")
        await self.inbox.read(request.content, view[8:start])
        header = wire.peek(view[:start], limits)
        if header.size != size:
            raise DeniedError(400, f"{size} bytes were announced, the header declares {header.size}")
        if expected is not None and (difference := _difference(header.specs, expected)):
            raise _UnexpectedError(difference)
        await self.inbox.read(request.content, view[start:])
        return await asyncio.to_thread(wire.decode, view, limits) if size > SMALL else wire.decode(view, limits)

    def _verdict(self, actions: list[Action], client: str, receipt: str) -> web.Response:
        said = [a.verdict for a in actions if isinstance(a, Receipt) and (a.client, a.receipt) == (client, receipt)]
        return _json(forms.Verdict(forms.printable(said[0]) if said else ""))

    async def _receipt(self, request: web.BaseRequest, client: str, receipt: str) -> web.Response:
        del request
        coordinator = self._mine(client, receipt)
        if receipt in coordinator.state.leases:
            return _json(forms.Verdict(""))
        return _json(forms.Verdict(forms.printable(coordinator.state.verdict(client, receipt))))

    async def _failed(self, request: web.BaseRequest, client: str, receipt: str) -> web.Response:
        sentence: forms.Sentence = await self._form(request, forms.Sentence, client)
        self._mine(client, receipt)
        reason = forms.printable(sentence.reason) or "failed without a word"
        self.failures[client] = reason
        return self._verdict(self._handle(Failed(self.now, client, receipt, reason)), client, receipt)

    async def _leave(self, request: web.BaseRequest, client: str, _: str) -> web.Response:
        sentence: forms.Sentence = await self._form(request, forms.Sentence, client)
        reason = forms.printable(sentence.reason)
        me = self._clients[client]
        me.has_left = True
        if self.finish is None and self._off is None:
            self.failures[client] = reason or "left"
            if self.coordinator is None and client not in self.identities.latecomers:
                self._call_off(RunError(f"{client} does not take part: {reason or 'it gave no reason'}"))
            elif self.coordinator is not None:
                self._handle(Left(self.now, client))
        self._over_if_alone()
        return web.Response(status=204)

    def _over_if_alone(self) -> None:
        if (self.finish is not None or self._off is not None) and all(c.has_left for c in self._clients.values()):
            self._over.set()


_ROUTES: Mapping[tuple[str, str], Callable[[Server, web.BaseRequest, str, str], Awaitable[web.StreamResponse]]] = {
    ("GET", "manifest"): Server._manifest,  # noqa: SLF001  # the table of this file's own class
    ("POST", "ready"): Server._ready,  # noqa: SLF001  # as above
    ("GET", "next"): Server._next,  # noqa: SLF001  # as above
    ("PUT", "start"): Server._start,  # noqa: SLF001  # as above
    ("GET", "blob"): Server._blob,  # noqa: SLF001  # as above
    ("PUT", "upload"): Server._upload,  # noqa: SLF001  # as above
    ("GET", "receipt"): Server._receipt,  # noqa: SLF001  # as above
    ("POST", "failed"): Server._failed,  # noqa: SLF001  # as above
    ("POST", "leave"): Server._leave,  # noqa: SLF001  # as above
}


class _UnexpectedError(Exception):
    """A well-formed message that is not what its task asks for."""


class _Capped(web.Server):
    """Closes connections beyond a number before anything of them is read."""

    def __init__(self, handler: Any, most: int, **options: Any) -> None:
        super().__init__(handler, **options)
        self._most = most

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self.connections) > self._most:
            transport.abort()


def _listening(address: tuple[str, int]) -> socket.socket:
    """A socket on which a peer that vanished is noticed in half a minute; accepted ones inherit its options."""
    host, port = ("127.0.0.1", address[1]) if address[0] == "localhost" else address
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("KEEPIDLE", 15), ("KEEPINTVL", 5), ("KEEPCNT", 3), ("USER_TIMEOUT", 30_000)):
            if hasattr(socket, f"TCP_{name}"):
                listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return listening


def _json(form: forms.Form, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=forms.write(form), status=status, headers=headers, content_type="application/json")


def _check_host(request: web.BaseRequest) -> None:
    """Another name for this machine is how a page in a browser would reach it."""
    found = re.fullmatch(r"\[?([0-9a-zA-Z.:]+?)\]?(:[0-9]{1,5})?", request.headers.get("Host", "")[:80])
    if found is None or found[1].lower() not in forms.LOOPBACK:
        raise DeniedError(421, "this server answers to 127.0.0.1, ::1 and localhost")


def _patience(request: web.BaseRequest) -> float:
    """Seconds that a poll may last, as its sender wants it."""
    asked = request.query.get("wait", "0")
    if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,3})?", asked):
        raise DeniedError(400, "wait= is a number of seconds")
    return float(asked)


def _length(request: web.BaseRequest, most: int) -> int:
    """The declared length of a body, once it is known to be allowed."""
    if "Transfer-Encoding" in request.headers or "Content-Encoding" in request.headers:
        raise DeniedError(411, "a body has a Content-Length and no encoding")
    declared = request.headers.get("Content-Length", "")
    if not re.fullmatch(r"[0-9]{1,18}", declared):
        raise DeniedError(411, "a body has a Content-Length")
    if int(declared) > most:
        raise DeniedError(413, f"{int(declared)} bytes, at most {most} are allowed here")
    return int(declared)


def _range(request: web.BaseRequest, size: int, digest: str) -> tuple[int, int]:
    """First byte and end of what is asked for: one range that is open to the right, or everything."""
    asked = request.headers.get("Range")
    if asked is None or request.headers.get("If-Range", f'"{digest}"') != f'"{digest}"':
        return 0, size
    found = re.fullmatch(r"bytes=([0-9]{1,18})-([0-9]{0,18})", asked)
    start, stop = (int(found[1]), min(int(found[2] or size) + bool(found[2]), size)) if found else (size, size)
    if start >= stop:
        raise DeniedError(416, f"the blob has {size} bytes")
    return start, stop


def _seconds(written: str) -> float:
    """Processor seconds as a client claims them; anything but a plain number counts as none."""
    return float(written) if re.fullmatch(r"[0-9]{1,8}(\.[0-9]{1,9})?", written) else 0.0


def _difference(got: Mapping[str, Spec], wanted: Mapping[str, Spec]) -> str:
    """What keeps trees of one spec from being taken for those of another, in words; the order of entries does not."""
    for name in got.keys() | wanted.keys():
        if name not in wanted:
            return f"{name}: this tree is not expected; expected are {', '.join(wanted) or 'none'}"
        if name not in got:
            return f"{name}: this tree is missing"
        if dict(got[name]) != dict(wanted[name]):
            return f"{name}: {got[name].difference(wanted[name])}"
    return ""
