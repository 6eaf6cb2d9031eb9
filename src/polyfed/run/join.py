"""`join`: one client of a run over the network, from the first call to the model that it ends with."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from polyfed import data as tables
from polyfed.algorithms import REGISTRY, FedAvg
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.errors import (
    ClientError,
    CorruptError,
    NeedsError,
    PeerError,
    PolyfedError,
    RunError,
    StorageError,
    UsageError,
)
from polyfed.core.manifest import Manifest
from polyfed.core.memory import ClientMemory
from polyfed.core.message import Memory, Message
from polyfed.core.protocols import Job, Site
from polyfed.core.records import ACCEPTED
from polyfed.core.tree import Array, Spec, Tree
from polyfed.core.work import perform, personal
from polyfed.data.problem import MOST_CLASSES
from polyfed.data.split import check_labels
from polyfed.network.client import Link
from polyfed.network.forms import RECEIPT, DeniedError, Enrolment, Offer, Start, printable, task_of
from polyfed.network.limits import DEFAULT, NetworkLimits
from polyfed.run.client import Client, check_frozen, check_needs, check_public, first_env, ordered_as, site_of
from polyfed.run.columns import digests_of
from polyfed.storage.memories import FileMemories

Confirm = Callable[[Manifest], bool | str]


@dataclass(frozen=True, eq=False)
class Joined:
    """What a client ends a run with.

    Attributes:
        message: the last one from the server: what is shared.
        memory: what the client keeps: personal layers, its whole private model, ...
        reason: why the run ended.
        version: how many rounds the shared state has seen.
        verdicts: receipt -> what became of it, for this process's own uploads.
    """

    manifest: Manifest
    algorithm: Algorithm = field(repr=False)
    site: Site = field(repr=False)
    message: Message = field(repr=False)
    memory: Memory = field(repr=False)
    reason: str
    version: int
    verdicts: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.site.name

    @cached_property
    def state(self) -> Tree:
        """The whole state of the client's model, personalised as for its last evaluation."""
        state = self.site.model.first(self.site.train, first_env(self.site, self.manifest.seed))
        task = Task("evaluate", self.name, self.version, self.version, number=self.version)
        env = self.site.env(self.manifest.seed, task)
        for tree in personal(self.algorithm, self.message, self.memory, self.site, env):
            state = state.overlay(tree)
        return state

    @cached_property
    def model(self) -> Any:
        """The framework's own object: predicts by itself, belongs to the caller."""
        return self.site.model.export(self.state, self.site.train, first_env(self.site, self.manifest.seed))


def join(
    url: str,
    client: Client,
    *,
    allow: Iterable[type[Algorithm]] = (),
    confirm: Confirm | None = None,
    memory: str | Path | None = None,
    limits: NetworkLimits = DEFAULT,
    patience: float = 60.0,
    show: Callable[[str], None] | None = print,
) -> Joined:
    """Takes part in a run as one client; returns when the run has ended. Ctrl-C leaves the run, which goes on.

    Args:
        url: the server's, such as ``http://127.0.0.1:8000``; loopback only.
        client: this site: a name that the run expects, a model, data. Rows never leave it. Its ``joins_at=`` and
            ``away=`` are told to the server, which does not ask it in other rounds.
        allow: algorithms of this site's own, besides the built-in ones. A manifest selects by name and never imports.
        confirm: is asked with the manifest; False, or a sentence, refuses the run.
        memory: a folder; a client that was killed, or that left, goes on from there when it joins again.
        limits: what this site accepts.
        patience: seconds without any answer after which the client gives up.
        show: is told the manifest in words; None for silence.

    Raises:
        PeerError: the run asks for an algorithm that is not allowed here, or is refused by `confirm`.
        NeedsError, DataError: the model or the rows do not fit the run.
        RunError: the run was called off, or the server is gone.
        StorageError: the folder belongs to another client, or cannot be written.
    """
    raw = client.read()
    notebook = Notebook.open(memory, client.name)
    link = Link(url, limits=limits, patience=patience)
    try:
        link.enrol(replace(introduction(client, raw.target, notebook.ticket), columns=digests_of(raw)))
        manifest = _manifest(link)
        try:
            algorithm = accepted(manifest, allow, confirm, show)
            site = prepared_site(client, raw, manifest, algorithm, link)
            first = site.model.first(site.train, first_env(site, manifest.seed))
            _check_first(algorithm, site, first.spec)
        except PolyfedError as error:
            link.leave(f"{client.name} refuses: {error}")
            raise
        except Exception as error:
            link.leave(f"{client.name} failed: {type(error).__name__}")
            raise
        link.ready(first.spec.digest)
        return _Worker(link, manifest, algorithm, site, first, notebook).run()
    except KeyboardInterrupt:
        with suppress(PolyfedError):
            link.patience = 0.0  # one attempt: somebody waits for this process to end
            link.leave("interrupted")
        raise
    finally:
        link.close()


# ---------------------------------------------------------------------------------------------- before the first round


def introduction(client: Client, target: Array | None, ticket: str) -> Enrolment:
    """What the server must know of a client before a run is agreed: its model's kind, and what its target holds."""
    if target is None:
        raise UsageError(f"{client.name}: there is no target; give data=(x, y) or target=")
    kind, values = _classes(client.name, target)
    model = client.model
    shape = tuple(target.shape[1:])
    return Enrolment(
        client.name,
        ticket,
        model.kind,
        tuple(sorted(model.offers)),
        dict(model.settings),
        kind,
        shape,
        values,
        tuple(client.freeze),
        client.joins_at,
        client.away,
    )


def _classes(name: str, target: Array) -> tuple[Any, tuple[Any, ...]]:
    """What a target holds, and its classes; () for numbers that are no classes, or too many of them."""
    check_labels(name, target)
    first = target.ravel()[0]
    if target.dtype.kind in "US" or isinstance(first, str):
        return "text", tuple(sorted({str(value) for value in target.ravel().tolist()}))
    if target.dtype.kind == "b" or isinstance(first, (bool, np.bool_)):
        return "bool", tuple(sorted({bool(value) for value in target.ravel().tolist()}))
    numbers = np.unique(target.astype(np.float64))
    is_few = len(numbers) <= MOST_CLASSES and bool((numbers == np.floor(numbers)).all())
    return "number", tuple(int(value) for value in numbers.tolist()) if is_few and target.ndim == 1 else ()


def _manifest(link: Link) -> Manifest:
    while (manifest := link.manifest()) is None:
        pass  # each call waits for a poll's time
    return manifest


def accepted(
    manifest: Manifest, allow: Iterable[type[Algorithm]], confirm: Confirm | None, show: Callable[[str], None] | None
) -> Algorithm:
    """The algorithm, built from this site's own registry, if the site agrees to the run."""
    if show is not None:
        show(manifest.describe())
    algorithm = manifest.build({**REGISTRY, **{kind.__name__: kind for kind in allow}})
    said = True if confirm is None else confirm(manifest)
    if said is not True:
        raise PeerError(f"this site's policy refuses the run: {said or 'confirm= said no'}")
    return algorithm


def prepared_site(client: Client, raw: tables.Raw, manifest: Manifest, algorithm: Algorithm, link: Link) -> Site:
    """The client's rows after its own preprocessing, the public ones included; checks what the algorithm needs."""
    public = ordered_as(raw, tables.from_message(link.blob(manifest.public))) if manifest.public else None
    parts = tables.divide(client.name, raw, client.split, seed=manifest.seed)
    if public is not None:
        may_overlap = "overlap" in client.consents
        tables.check_public_apart(client.name, raw, parts, public, may_overlap=may_overlap)
    prepared = tables.prepare(
        client.name, raw, parts, manifest.problem, preprocess=client.preprocess, public=public, seed=manifest.seed
    )
    site = site_of(client, prepared, manifest.problem, "", manifest.seed)
    check_needs(algorithm, {client.name: site})
    check_public(site)
    check_frozen(algorithm, site)
    return site


def _check_first(algorithm: Algorithm, site: Site, state: Spec) -> None:
    """That the client has agreed where the run may take first values of its personal part (`FedBABU`'s one head)."""
    personal = algorithm.personal_spec(state) if isinstance(algorithm, FedAvg) else {}
    taken = [name for name in algorithm.offered(state) if name in personal]
    if taken and "personal" not in site.consents:
        raise NeedsError(
            f"{site.name}: {algorithm.name} may take the first values of {min(taken)!r} from this client and hand them to all, "
            'and it has not agreed that its personal part leaves it (pf.Client(..., consents="personal"))'
        )


# ---------------------------------------------------------------------------------------------- rounds


class _Worker:
    """Answers offers until the run has ended."""

    def __init__(
        self, link: Link, manifest: Manifest, algorithm: Algorithm, site: Site, first: Tree, notebook: Notebook
    ) -> None:
        self.link, self.manifest, self.algorithm, self.first = link, manifest, algorithm, first
        self.site, self.notebook = site, notebook
        self.memory = notebook.memory(site.begins)
        self.verdicts: dict[str, str] = {}

    def run(self) -> Joined:
        while True:
            offer = self.link.next()
            if offer is None:
                continue
            if offer.task is None:
                needed = self.first.only(self.algorithm.offered(self.first.spec))
                self.link.start(Start(needed, self.first.spec).message)
            elif offer.task.get("kind") == "finish":
                if (joined := self._finish(offer)) is not None:
                    return joined
            else:
                self._do(offer)

    def _message(self, offer: Offer) -> Message | None:
        """The offer's message; None where it is no longer there: the server was restarted, or the task is another's now."""
        try:
            return self.link.message(offer.digest, offer.size)
        except DeniedError as denied:
            if denied.status != 404:
                raise
            return None

    def _do(self, offer: Offer) -> None:
        task = task_of(offer)
        if task.client != self.site.name or task.round_num > self.manifest.rounds:
            raise PeerError(f"a task for {task.client} in round {task.round_num} is not what was announced")
        if offer.group != self.site.group:
            self._settle_group(offer.group)
        self._settle()
        if not self._turn_to(offer):
            self._failed(task.receipt, f"the memory of receipt {offer.memory} is lost here")
            return
        started = time.process_time()
        message = self._message(offer)
        if message is None:
            return
        reply = perform(self.algorithm, self.site, Job(task, message, self.memory.current), seed=self.manifest.seed)
        if reply.message is None:
            error = reply.error or ClientError(task.client, "NoAnswer", "no message and no error came back")
            self._failed(task.receipt, f"{error.kind}: {error.message}" if error.message else error.kind)
            return
        if task.kind != "evaluate":
            self.memory.propose(task.receipt, reply.memory)
            self.notebook.pend(task.receipt, reply.memory)
        self._send(task.receipt, reply.message, time.process_time() - started)

    def _send(self, receipt: str, message: Message, cpu_seconds: float) -> None:
        try:
            verdict = self.link.upload(receipt, message, cpu_seconds)
        except PeerError as error:
            verdict = f"not taken: {error}"
            self._failed(receipt, verdict)
        self._note(receipt, verdict)

    def _failed(self, receipt: str, reason: str) -> None:
        """Says that a task will not be answered; a task that the server has forgotten meanwhile needs no word."""
        try:
            self.link.failed(receipt, reason)
        except DeniedError as denied:
            if denied.status != 404:
                raise

    def _note(self, receipt: str, verdict: str) -> None:
        """Settles the memory of one receipt; one that is still open stays pending."""
        self.verdicts[receipt] = verdict
        if verdict == ACCEPTED:
            self.memory.accept(receipt)
        elif verdict:
            self.memory.refuse(receipt)
        self.notebook.write(self.memory)

    def _settle(self) -> None:
        """Asks once more for each verdict that was lost on its way, or was not there yet."""
        for receipt in self.memory.pending:
            try:
                self._note(receipt, self.link.receipt(receipt))
            except PeerError as error:
                self._note(receipt, f"forgotten: {error}")

    def _turn_to(self, offer: Offer) -> bool:
        """Makes the memory current that the server names; False when it is not here."""
        if offer.memory != self.memory.receipt:
            try:
                self.memory.roll_back(offer.memory)
            except KeyError:
                return False
        self.memory.keep(offer.keep)
        self.notebook.write(self.memory, offer.keep)
        return True

    def _settle_group(self, group: str) -> None:
        """The groups were made after this client was ready; the manifest now says which spec each of them has."""
        manifest = self.link.manifest()
        specs = {} if manifest is None else dict(manifest.specs)
        if manifest is None or replace(manifest, specs={}) != replace(self.manifest, specs={}):
            raise PeerError("the manifest is not the one that was agreed to")
        if specs.get(group) != self.first.spec.digest:
            raise PeerError(f"group {group!r} has another spec than this client's model")
        self.manifest, self.site = manifest, replace(self.site, group=group)

    def _finish(self, offer: Offer) -> Joined | None:
        self._settle()
        if offer.failed:
            self.link.leave()
            raise RunError(offer.reason)
        if not self._turn_to(offer):
            raise StorageError(f"the memory of receipt {offer.memory}, with which the run ends, is not here")
        message = self._message(offer)
        if message is None:
            return None
        self.link.leave()
        version = task_of(offer).version
        return Joined(
            self.manifest, self.algorithm, self.site, message, self.memory.current, offer.reason, version, self.verdicts
        )


# ---------------------------------------------------------------------------------------------- what outlives the process


class Notebook:
    """What a client must know to go on after it was killed: its ticket, and which memories are current and pending.

    Guarantees: a memory is on the disk before its upload is sent; the notebook names only memories that are.
    """

    def __init__(self, folder: Path | None, name: str) -> None:
        self.name, self.ticket = name, secrets.token_hex(32)
        self._folder = folder
        self._files = None if folder is None else FileMemories(folder)
        self._current, self._kept, self._pending = "", list[str](), list[str]()

    @classmethod
    def open(cls, folder: str | Path | None, name: str) -> Notebook:
        """The notebook in a folder, made if there is none; raises `StorageError` for another client's or a damaged one."""
        self = cls(None if folder is None else Path(folder), name)
        if self._folder is None:
            return self
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            self._save()
            return self
        except OSError as error:
            raise StorageError(f"{self._path} cannot be read: {error}") from error
        self._read(text)
        return self

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / "site.json"

    def _read(self, text: str) -> None:
        try:
            found = json.loads(text)
            name, self.ticket = str(found["name"]), str(found["ticket"])
            receipts = [found["current"], *found["kept"], *found["pending"]]
            if any(receipt and not RECEIPT.fullmatch(receipt) for receipt in receipts):
                raise ValueError("a receipt")  # noqa: TRY301  # one way out below
            self._current, self._kept, self._pending = found["current"], list(found["kept"]), list(found["pending"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptError(f"{self._path} cannot be read back: {printable(str(error))}") from error
        if name != self.name:
            raise StorageError(f"{self._folder} is the memory of {name!r}, not of {self.name!r}; use another folder")

    def memory(self, begins: Memory) -> ClientMemory:
        """The memory as the notebook has it; `begins` before the first task."""
        memory = ClientMemory(begins)
        if self._files is not None:
            for receipt in [r for r in (*self._kept, self._current) if r]:
                memory.propose(receipt, self._files.get(receipt))
                memory.accept(receipt)
            memory.roll_back(self._current)
            for receipt in self._pending:
                memory.propose(receipt, self._files.get(receipt))
        return memory

    def pend(self, receipt: str, memory: Memory) -> None:
        """Writes a memory down before its upload is sent."""
        if self._files is not None:
            self._files.put(receipt, memory)
            self._pending = [*(r for r in self._pending if r != receipt), receipt]
            self._save()

    def write(self, memory: ClientMemory, keep: Iterable[str] = ()) -> None:
        """Notes what has become current and what is still pending; memories that nobody can ask for any more go."""
        if self._files is None:
            return
        said = (memory.receipt, sorted({*keep} or self._kept), list(memory.pending))
        if said != (self._current, self._kept, self._pending):
            self._current, self._kept, self._pending = said
            self._save()
            self._files.keep({self._current, *self._kept, *self._pending})

    def _save(self) -> None:
        said = {
            "name": self.name,
            "ticket": self.ticket,
            "current": self._current,
            "kept": self._kept,
            "pending": self._pending,
        }
        part = self._path.with_suffix(".part")
        try:
            file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(file, "w") as out:
                json.dump(said, out)
                out.flush()
                os.fsync(out.fileno())
            part.replace(self._path)
        except OSError as error:
            raise StorageError(f"{self._path} cannot be written: {error}") from error


__all__ = ["Joined", "join"]
