"""`serve`: one run over the network, at the server: it waits for its clients, drives the rounds, and returns what came of them."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from polyfed import data as tables
from polyfed.core import wire
from polyfed.core.aggregate import DEFAULT_POLICY, UpdatePolicy
from polyfed.core.algorithm import Algorithm, Env
from polyfed.core.coordinator import Coordinator, Federation
from polyfed.core.errors import CorruptError, DataError, PeerError, RunError, StorageError, UsageError
from polyfed.core.events import Action, Event
from polyfed.core.history import RoundLog
from polyfed.core.manifest import Manifest, from_values, manifest_of
from polyfed.core.message import Message, State
from polyfed.core.protocols import Model, Site
from polyfed.core.round import Rules
from polyfed.core.rows import Problem, Rows
from polyfed.core.schedule import Schedule, Sync
from polyfed.core.stop import Rounds, Stop
from polyfed.core.tree import Array, Spec, Tree
from polyfed.data import Raw
from polyfed.network.forms import Enrolment, Recalled, Start
from polyfed.network.limits import DEFAULT, NetworkLimits
from polyfed.run.client import check_offers, fitting, laid_over, naming_groups, start_of, used_start
from polyfed.run.columns import check_order
from polyfed.run.student import student_of
from polyfed.run.trainers import check_trainers, given_to_train, trainers_at_server
from polyfed.storage.blobs import FileBlobs
from polyfed.storage.files import write_whole
from polyfed.storage.journal import FileJournal

#: A client from which nothing has come for so long, in seconds, counts as lost; its task is handed out once more.
LEASE = 3600.0


@dataclass(frozen=True, eq=False)
class ServerResult:
    """What came of a run at the server, which never sees a row or a client's private model.

    Attributes:
        state: the algorithm's state that the run ended with.
        history: round by round, validation rows only.
        test: client -> metrics of its own model on its test rows, as it reported them.
        reason: why the run ended, in words.
        version: how many rounds the state has seen.
        failures: client -> what it said when its task failed, the newest.
        denials: requests that were not granted, by status.
        trace: every event with the engine's actions, if that was asked for.
    """

    algorithm: Algorithm
    manifest: Manifest
    federation: Federation = field(repr=False)
    state: State = field(repr=False)
    history: Sequence[RoundLog] = field(repr=False)
    test: Mapping[str, Mapping[str, float]]
    reason: str
    version: int
    seconds: float
    failures: Mapping[str, str] = field(default_factory=dict)
    denials: Mapping[int, int] = field(default_factory=dict)
    trace: Sequence[tuple[Event, list[Action]]] | None = field(default=None, repr=False)

    @property
    def student(self) -> Any:
        """The model that the server taught (`Distill`), as its framework's own object; `UsageError` where there is none."""
        return student_of(self.algorithm, self.federation, self.state)


class Host:
    """What a run is at the server; the network's server asks it when the clients are there."""

    def __init__(
        self,
        algorithm: Algorithm,
        *,
        clients: Sequence[str] | None = None,
        rounds: int | None,
        stop: Stop | None,
        seed: int,
        schedule: Schedule | None,
        policy: UpdatePolicy,
        problem: Problem | None,
        task: str | None,
        classes: Sequence[Any] | None,
        public: Any,
        example: Any,
        evaluate_every: int,
        test: bool,
        journal: str | Path | None,
        others_may_come: bool = False,
    ) -> None:
        self.others_may_come = others_may_come
        self._made: dict[tuple[str, ...], dict[str, Site]] = {}
        self.folder = None if journal is None else Path(journal)
        self.algorithm = _with_public(algorithm, public)
        check_trainers(self.algorithm)
        self.limit, self.stop = _limit(rounds, stop)
        self.stop.check(clients, evaluates=evaluate_every > 0)
        self.rules = Rules(
            schedule=Sync(lease=LEASE) if schedule is None else schedule,
            seed=seed,
            evaluate_every=evaluate_every,
            test=test,
        )
        self.policy, self.problem, self.task, self.classes, self.example = policy, problem, task, classes, example
        Manifest.of(self.algorithm, Problem(None, 1), seed=seed, rounds=self.limit)  # refused before anybody dials in

    def agree(self, enrolments: Mapping[str, Enrolment]) -> tuple[Manifest, Message | None]:
        if self.problem is None:
            self.problem = agreed_problem(enrolments, task=self.task, classes=self.classes)
        public = self._public()
        rows = None if public is None else tables.to_message(public)
        return Manifest.of(self.algorithm, self.problem, seed=self.rules.seed, rounds=self.limit), rows

    def offered(self, whole: Spec) -> Spec:
        names = self.algorithm.offered(whole)
        return whole.select(lambda name: name in names)

    def assemble(
        self, enrolments: Mapping[str, Enrolment], groups: Mapping[str, str], first: Mapping[str, Start]
    ) -> Coordinator:
        self._check_offers(enrolments)
        federation = self._federation(enrolments, groups, first, self._trainers(enrolments, groups, first))
        self._check_start(federation)
        if self.folder is None:
            return Coordinator(federation)
        self._write_down(enrolments, groups, first)
        journal, blobs = FileJournal(self.folder / "journal"), FileBlobs(self.folder / "blobs")
        if journal.read():
            return Coordinator.resume(federation, journal, blobs)
        return Coordinator(federation, journal=journal, blobs=blobs)

    def _check_offers(self, enrolments: Mapping[str, Enrolment]) -> None:
        """What models lack; whether a client has public rows, and what it consents to, it checks by itself."""
        own = {"public", "personal"}
        check_offers(self.algorithm, {n: (e.kind, frozenset(e.offers) | own) for n, e in enrolments.items()})

    def _check_start(self, federation: Federation) -> None:
        """That the groups go together, and a warning of what ``initial=`` or ``model=`` gives in vain."""
        given = self._given(federation.problem, federation.specs)
        if given is None and len(federation.specs) == 1:
            return
        with naming_groups(federation.groups):
            start = self.algorithm.init(federation.env(0, len(federation.groups)))
        if given is not None:
            for note in used_start(self.algorithm, given, start, federation.specs, fitting(given, federation.specs))[1]:
                warnings.warn(note, stacklevel=2)

    def _trainers(
        self, enrolments: Mapping[str, Enrolment], groups: Mapping[str, str], first: Mapping[str, Start]
    ) -> dict[str, Site]:
        """Made once for each set of groups: they are the same whoever comes, and cost a preparation of all public rows."""
        assert self.problem is not None
        learners: dict[str, str] = {}
        for name, enrolment in enrolments.items():
            if "terms" in enrolment.offers:
                learners.setdefault(groups[name], name)
        key = (*first, "", *sorted(learners)) if self.algorithm.trains_groups else ()
        if key not in self._made:
            made = trainers_at_server(
                self.algorithm,
                {group: start.whole for group, start in first.items()},
                learners,
                self._public(),
                self.problem,
                seed=self.rules.seed,
                others_may_come=self.others_may_come,
            )
            self._made = {**dict(list(self._made.items())[-1:]), key: made}  # those of the run, and of a trial
        return self._made[key]

    def _public(self) -> Raw | None:
        """The public rows, raw, if the job gives them."""
        public = getattr(self.algorithm, "public", None)
        return None if public is None else tables.read_public(public).unlabelled()

    def _federation(
        self,
        enrolments: Mapping[str, Enrolment],
        groups: Mapping[str, str],
        first: Mapping[str, Start],
        trainers: Mapping[str, Site],
    ) -> Federation:
        assert self.problem is not None
        starts = {group: start.given for group, start in first.items()}
        specs = {group: start.whole for group, start in first.items()}
        given = self._given(self.problem, specs)
        if given is not None:
            starts = laid_over(starts, given, fitting(given, specs))
        check_order(self.algorithm, {name: said.columns for name, said in enrolments.items()}, groups, starts)
        return Federation(
            algorithm=self.algorithm,
            problem=self.problem,
            rules=self.rules,
            stop=self.stop,
            first=starts,
            specs=specs,
            groups=groups,
            frozen={name: enrolment.frozen for name, enrolment in enrolments.items() if enrolment.frozen},
            trainers=trainers,
            policy=self.policy,
        )

    def admit(
        self,
        coordinator: Coordinator,
        enrolments: Mapping[str, Enrolment],
        groups: Mapping[str, str],
        first: Mapping[str, Start],
        *,
        is_trial: bool = False,
    ) -> None:
        known = coordinator.federation
        self._check_offers({name: said for name, said in enrolments.items() if name not in known.groups})
        federation = self._federation(enrolments, groups, first, known.trainers)
        if new := [group for group in first if group not in known.first]:
            self._check_new(new, federation, coordinator.final)
        federation = replace(federation, trainers=self._trainers(enrolments, groups, first))
        if is_trial:
            self._try(federation, coordinator)
            return
        if self.folder is not None:
            self._write_down(enrolments, groups, first)
        coordinator.federation = federation

    def _check_new(self, new: Sequence[str], federation: Federation, state: State) -> None:
        """That a run which goes on can take groups up: they go together, and its state has all that they start from.

        Raises:
            UsageError: the algorithm keeps something of each group from the start, and of these it has nothing.
        """
        begun = self.algorithm.init(federation.env(0, len(federation.groups)))
        if lacking := sorted(begun.trees.keys() - state.trees.keys()):
            raise UsageError(
                f"{self.algorithm.name} keeps {lacking[0]} for {' and '.join(new)}, and this run began without it; a run "
                f"of {self.algorithm.name} begins with a client of each architecture"
            )

    def _try(self, federation: Federation, coordinator: Coordinator) -> None:
        """What the server does for a client in a round, for those that are new."""
        for name in federation.groups.keys() - coordinator.federation.groups.keys():
            env = federation.env(coordinator.state.round_num + 1, len(federation.groups), name)
            self.algorithm.expects(self.algorithm.broadcast(coordinator.final, name, env), env)

    def _write_down(
        self, enrolments: Mapping[str, Enrolment], groups: Mapping[str, str], first: Mapping[str, Start]
    ) -> None:
        """Everything that a server must be told to go on where this one stops, before the first round."""
        assert self.folder is not None
        path = self.folder / "run.json"
        blobs = FileBlobs(self.folder / "blobs")
        said = {
            "run": self._said(),
            "clients": [asdict(enrolment) for enrolment in enrolments.values()],
            "groups": dict(groups),
            "first": {group: blobs.put(wire.to_bytes(start.message)) for group, start in first.items()},
        }
        try:
            write_whole(path, [json.dumps(said, sort_keys=True, indent=1).encode()])
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error}") from error

    def _said(self) -> dict[str, Any]:
        said: dict[str, Any] = {"algorithm": manifest_of(self.algorithm), "seed": self.rules.seed, "rounds": self.limit}
        said["schedule"] = repr(self.rules.schedule)
        if trained := given_to_train(self.algorithm):
            said["trainers"] = {name: [model.kind, dict(model.settings)] for name, model in trained.items()}
        return said

    def recall(self) -> Recalled | None:
        """What was written down before the first round.

        Raises:
            StorageError: the folder holds another run, or what it holds cannot be read back.
        """
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path, blobs = self.folder / "run.json", FileBlobs(self.folder / "blobs")
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            enrolments = tuple(from_values(Enrolment, values, "a client") for values in found["clients"])
            first = {group: Start.of(wire.decode(blobs.get(digest))) for group, digest in found["first"].items()}
            groups, run = dict(found["groups"]), found["run"]
        except (OSError, ValueError, KeyError, TypeError, PeerError) as error:
            raise CorruptError(f"{path} cannot be read back: {error}") from error
        if run != json.loads(json.dumps(self._said())):
            raise StorageError(f"{self.folder} holds the journal of another run; use another folder")
        return Recalled(enrolments, groups, first)

    def _given(self, problem: Problem, specs: Mapping[str, Spec]) -> Tree | None:
        """The state that the job itself gives to start from; None where the clients offer it."""
        initial, model = getattr(self.algorithm, "initial", None), getattr(self.algorithm, "model", None)
        if initial is not None:
            return start_of(initial, "initial=", specs)
        if model is None:
            return None
        if not isinstance(model, Model):
            raise UsageError(
                "model= must be wrapped like a client's: pf.torch(module), pf.keras(model), pf.sklearn(...)"
            )
        if self.example is None:
            raise UsageError(
                "model= at a server, which has no rows, needs example=: a few rows as a client's model sees them"
            )
        inputs = self.example if isinstance(self.example, Mapping) else {"x": self.example}
        rows = _labelled({name: np.asarray(array) for name, array in inputs.items()}, problem)
        return model.first(rows, Env(seed=self.rules.seed, problem=problem, train=rows))


class Server:
    """A server in a thread of its own, for tests and notebooks: ``with Server(...) as server: ... server.result()``.

    Takes the arguments of `serve`.

    Attributes:
        url: where clients reach it.
    """

    def __init__(self, algorithm: Algorithm, **options: Any) -> None:
        self._work = _Serving(algorithm, **options)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="polyfed-server", daemon=True)
        self._result: ServerResult | None = None
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.url = ""

    def _run(self) -> None:
        try:
            self._result = asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001  # raised again where the result is asked for
            self._error = error
        finally:
            self._ready.set()

    async def _main(self) -> ServerResult:
        self._loop = asyncio.get_running_loop()
        return await self._work.run(self._is_up)

    def _is_up(self, url: str) -> None:
        self.url = url
        self._ready.set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(linger_seconds=0.0)
        self._thread.join()

    def stop(self, reason: str = "interrupted", *, linger_seconds: float | None = None) -> None:
        """Ends the run in its present state, if it still goes on."""
        if self._loop is not None and self._thread.is_alive():
            with suppress(RuntimeError):  # the loop has closed meanwhile: the run is over
                self._loop.call_soon_threadsafe(partial(self._work.stop, reason, linger_seconds=linger_seconds))

    def result(self, timeout: float | None = None) -> ServerResult:
        """Waits for the run's end.

        Raises:
            TimeoutError: it has not ended yet.
            PolyfedError: as `serve` raises it.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the run has not ended within {timeout} seconds")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


async def serve_async(
    algorithm: Algorithm, *, started: Callable[[str], None] | None = None, **options: Any
) -> ServerResult:
    """As `serve`, inside an event loop of the caller's; `started` is told the url."""
    return await _Serving(algorithm, **options).run(started)


def serve(
    algorithm: Algorithm,
    *,
    clients: Sequence[str] | int,
    late: Sequence[str] | int = 0,
    rounds: int | None = None,
    stop: Stop | None = None,
    seed: int = 0,
    schedule: Schedule | None = None,
    policy: UpdatePolicy = DEFAULT_POLICY,
    public: Any = None,
    problem: Problem | None = None,
    task: str | None = None,
    classes: Sequence[Any] | None = None,
    example: Any = None,
    evaluate_every: int = 1,
    test: bool = True,
    journal: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: NetworkLimits = DEFAULT,
    linger_seconds: float = 30.0,
    trace: bool = False,
    started: Callable[[str], None] | None = print,
) -> ServerResult:
    """Serves one run over the network and returns what came of it; clients dial in with `join`.

    The server never sees a row: it gets parameters or predictions, and metrics.

    Args:
        algorithm: such as ``pf.FedAvg()``. Its numbers and texts are announced; public rows and models are not.
        clients: the names that take part, in the order in which they are folded; or how many, then ordered by name.
        late: the names of those that may come after the run has begun, or how many may. Nobody waits for them; each
            takes part from the next round after it came, or from its own ``joins_at=``, and its model must fit the run.
            A client that left comes back in the same way, with its ``memory=``.
        rounds: how many at most; sites are told. 10 if neither `rounds` nor `stop` gives a number.
        stop: when to stop, on validation metrics only; combined with `rounds` by "or".
        seed: of the whole run.
        policy: what the server accepts of one client.
        evaluate_every: rounds between two evaluations; 0 for none.
        test: whether clients read their test rows at the end.
        schedule: as in `simulate`; by default everybody is asked, and a silent client counts as lost after an hour.
        public: public rows, raw, that every client pushes through its own preprocessing.
        problem: what is predicted; by default agreed from the classes that clients announce.
        task: "classification" or "regression", where the targets leave it open.
        classes: all classes in the order of the outputs, where they are known beforehand.
        example: rows as a model sees them, needed only to make the start of ``model=`` at the server.
        journal: a folder; a server that was killed goes on there, with the same bits, when called again with the same
            arguments and port.
        host: loopback only.
        port: 0 takes a free one.
        limits: of everything that arrives.
        linger_seconds: how long the server waits at the end for clients to fetch the final message.
        trace: whether every event is recorded with the engine's actions.
        started: is told the url.

    Raises:
        UsageError: another host than this machine, or a run that cannot be announced.
        MissingExtraError: aiohttp is not installed.
        RunError: a client refuses the run, or no quorum.
        DataError, SpecError: the clients' targets or models do not fit together.

    Guarantees: with the same clients, the bits are those of `simulate` with the same seed and schedule; the order in
    which clients come and answer decides nothing. Ctrl-C ends the run cleanly with the result so far.
    """
    options = {name: value for name, value in locals().items() if name not in ("algorithm", "started")}
    return asyncio.run(_interruptible(_Serving(algorithm, **options), _told(started)))


async def _interruptible(work: _Serving, started: Callable[[str], None] | None) -> ServerResult:
    """Ctrl-C ends the run cleanly, and clients are told; the second one ends the process."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        work.stop("interrupted")

    with suppress(RuntimeError, ValueError, NotImplementedError):  # only a main thread has signals
        loop.add_signal_handler(signal.SIGINT, interrupt)
    return await work.run(started)


def _told(started: Callable[[str], None] | None) -> Callable[[str], None] | None:
    return None if started is None else lambda url: started(f"serving at {url}, on this machine only")


class _Serving:
    """One run at a server, from its arguments to its result."""

    def __init__(
        self,
        algorithm: Algorithm,
        *,
        clients: Sequence[str] | int,
        late: Sequence[str] | int = 0,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: NetworkLimits = DEFAULT,
        linger_seconds: float = 30.0,
        trace: bool = False,
        rounds: int | None = None,
        stop: Stop | None = None,
        seed: int = 0,
        schedule: Schedule | None = None,
        policy: UpdatePolicy = DEFAULT_POLICY,
        public: Any = None,
        problem: Problem | None = None,
        task: str | None = None,
        classes: Sequence[Any] | None = None,
        example: Any = None,
        evaluate_every: int = 1,
        test: bool = True,
        journal: str | Path | None = None,
    ) -> None:
        from polyfed.network import server  # aiohttp, only when somebody serves

        if port not in range(65536):
            raise UsageError(f"port={port!r} must be a whole number from 0 (takes a free one) to 65535")
        self.host = Host(
            algorithm,
            clients=None if isinstance(clients, (int, str)) else clients,
            rounds=rounds,
            stop=stop,
            seed=seed,
            schedule=schedule,
            policy=policy,
            problem=problem,
            task=task,
            classes=classes,
            public=public,
            example=example,
            evaluate_every=evaluate_every,
            test=test,
            journal=journal,
            others_may_come=bool(late),
        )
        self.server = server.Server(
            self.host,
            clients,
            late=late,
            address=(host, port),
            limits=limits,
            linger_seconds=linger_seconds,
            trace=trace,
        )

    def stop(self, reason: str, *, linger_seconds: float | None = None) -> None:
        self.server.interrupt(reason, linger_seconds=linger_seconds)

    async def run(self, started: Callable[[str], None] | None) -> ServerResult:
        server = self.server
        await server.start()
        try:
            if started is not None:
                started(server.url)
            finish = await server.wait()
        finally:
            await server.close()
            if server.coordinator is not None and isinstance(server.coordinator.journal, FileJournal):
                server.coordinator.journal.close()
        if finish.failed:
            said = [f"{client}: {reason}" for client, reason in server.failures.items()]
            raise RunError("\n".join([finish.reason, *said]))
        return self._result()

    def _result(self) -> ServerResult:
        server, coordinator = self.server, self.server.coordinator
        assert coordinator is not None
        assert server.manifest is not None
        test = {
            client: {name: value for name, value in numbers.items() if name != "num_examples"}
            for client, numbers in coordinator.tested.items()
            if numbers.get("num_examples")
        }
        return ServerResult(
            algorithm=self.host.algorithm,
            manifest=server.manifest,
            federation=coordinator.federation,
            state=coordinator.final,
            history=tuple(coordinator.history),
            test=test,
            reason=coordinator.state.ending,
            version=coordinator.state.version,
            seconds=server.now,
            failures=dict(server.failures),
            denials=dict(server.denials),
            trace=coordinator.trace,
        )


# ---------------------------------------------------------------------------------------------- what clients agree on


def agreed_problem(
    enrolments: Mapping[str, Enrolment], *, task: str | None = None, classes: Sequence[Any] | None = None
) -> Problem:
    """The one problem that fits what all clients announced: as `polyfed.data.problem_of`, from classes instead of rows."""
    if task not in (None, "classification", "regression"):
        raise UsageError(f'task={task!r} is unknown; write "classification" or "regression"')
    unclear = [name for name, enrolment in enrolments.items() if not enrolment.values]
    if unclear and task == "classification" and classes is None:
        raise DataError(f"{unclear[0]}'s target holds no classes, or too many to announce; give classes=")
    targets = {name: _stand_in(enrolment) for name, enrolment in enrolments.items()}
    return tables.problem_of(targets, task=task, classes=classes)  # type: ignore[arg-type]  # checked above


def _stand_in(enrolment: Enrolment) -> Array:
    """A target with the classes that a client announced, one row each; half numbers where it announced none."""
    if not enrolment.values:
        return np.full((1, *enrolment.shape), 0.5)
    if enrolment.target == "text":
        return np.array(enrolment.values, dtype=object)
    return np.array(enrolment.values)


def _limit(rounds: int | None, stop: Stop | None) -> tuple[int, Stop]:
    if rounds is None:
        rounds = getattr(stop, "limit", None) if stop is not None else 10
        if not isinstance(rounds, int):
            raise UsageError("a run over the network is announced with the most rounds that it may have: give rounds=")
        return rounds, stop if stop is not None else Rounds(rounds)
    return rounds, Rounds(rounds) if stop is None else Rounds(rounds) | stop


def _with_public(algorithm: Algorithm, public: Any) -> Algorithm:
    if public is None:
        return algorithm
    if not any(f.name == "public" for f in fields(algorithm)):  # type: ignore[arg-type]  # every algorithm is a dataclass
        raise UsageError(f"{algorithm.name} takes no public rows; leave public= out, or use FedMD")
    if getattr(algorithm, "public", None) is not None:
        raise UsageError(f"public= and {algorithm.name}(public=...) both name the public rows; give one of them")
    return replace(algorithm, public=public)  # type: ignore[type-var]  # a dataclass, as checked


def _labelled(inputs: dict[str, Array], problem: Problem) -> Rows:
    count = len(next(iter(inputs.values())))
    shape = (count,) if problem.is_classification or problem.outputs == 1 else (count, problem.outputs)
    return Rows(inputs, np.zeros(shape, np.int64 if problem.is_classification else np.float32))


__all__ = ["Server", "ServerResult", "serve", "serve_async"]
