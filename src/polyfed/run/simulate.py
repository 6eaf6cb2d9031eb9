"""One federation on one machine: `simulate` in one call, `open_rounds` (`pf.rounds`) as an open loop with every step in the user's hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from polyfed.algorithms import Local
from polyfed.core.aggregate import DEFAULT_POLICY, UpdatePolicy
from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.coordinator import Coordinator, Federation
from polyfed.core.errors import CorruptError, PolyfedError, RunError, StorageError, UsageError
from polyfed.core.history import RoundLog
from polyfed.core.manifest import manifest_of
from polyfed.core.message import Message, State
from polyfed.core.protocols import Executor, Job, Reply, Site
from polyfed.core.round import Rules
from polyfed.core.schedule import Schedule, Sync
from polyfed.core.select import All, Select, Uniform
from polyfed.core.stop import Rounds, Stop
from polyfed.executors.loop import Loop
from polyfed.executors.processes import Processes
from polyfed.run.client import (
    Client,
    Population,
    TaskKind,
    listed,
    naming_groups,
    populate,
    trainers_of,
    with_everything,
    with_replaced_starts,
    with_used_start,
)
from polyfed.run.driver import Driver
from polyfed.run.result import Result
from polyfed.storage.files import write_whole
from polyfed.storage.memories import FileMemories

#: Up to this many clients the "alone" baseline is worked out without being asked for.
FEW = 20


class Watch(Protocol):
    """Somebody who looks on; `polyfed.run.live` draws a table."""

    def start(self, population: Population, rounds: int | None, title: str) -> None: ...
    def sent(self, tasks: Sequence[Task]) -> None: ...
    def reply(self, reply: Reply) -> None: ...
    def round(self, log: RoundLog) -> None: ...
    def stage(self, text: str) -> None:
        """What is done after the last round, in words."""
        ...

    def end(self) -> None: ...


#: Who looks on at runs that name nobody: `polyfed run` sets it around a user's file.
WATCH: ContextVar[Watch | None] = ContextVar("WATCH", default=None)


@dataclass
class Round:
    """One round, a step at a time; a step that is not taken is taken for you when the loop goes on.

    >>> # for round in pf.rounds(FedAvg(), clients, rounds=3):
    >>> #     jobs = round.send()                # a message and its memory for each client of the cohort
    >>> #     for reply in round.train(jobs):    # at the clients, as they finish
    >>> #         round.collect(reply)           # validate, accept or refuse
    >>> #     log = round.update()               # aggregate, update the server's state, evaluate, ask the stopping rules
    """

    driver: Driver
    number: int
    log: RoundLog | None = None

    @property
    def cohort(self) -> tuple[str, ...]:
        """Who is asked, in the plan's order."""
        return self.driver.coordinator.state.plan

    @property
    def state(self) -> State:
        """The server's state that this round starts from; after `update`, the one it made."""
        return self.driver.coordinator.final

    def send(self) -> list[Job]:
        return self.driver.jobs()

    def train(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        yield from self.driver.work(jobs)

    def collect(self, reply: Reply) -> None:
        self.driver.collect(reply)

    def update(self) -> RoundLog | None:
        """Finishes the round; None where it ended without a new version (no quorum)."""
        if self.log is None:
            done = len(self.driver.coordinator.history)
            self.driver.run_round()
            history = self.driver.coordinator.history
            self.log = history[-1] if len(history) > done else None
        return self.log


@dataclass
class OpenLoop:
    """The rounds of one run; iterate over it, then read `result`."""

    run: Run

    def __iter__(self) -> Iterator[Round]:
        driver = self.run.driver
        try:
            while driver.finish is None:
                round_ = Round(driver, driver.coordinator.state.round_num)
                yield round_
                log = round_.update()
                if log is not None and self.run.watch is not None:
                    self.run.watch.round(log)
        except KeyboardInterrupt:
            self.run.interrupt()
            raise
        finally:
            driver.interrupt("the loop was left")
            self.run.close()

    @property
    def result(self) -> Result:
        return self.run.result()


@dataclass
class Run:
    """What one simulation consists of."""

    algorithm: Algorithm
    population: Population
    driver: Driver
    executor: Executor
    watch: Watch | None = None
    baselines: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    alone: Result | None = None

    def interrupt(self) -> None:
        self.interrupted = True
        self.driver.interrupt()

    def close(self) -> None:
        self.executor.close()
        if self.watch is not None:
            self.watch.end()
        if self.driver.coordinator.journal is not None:
            self.driver.coordinator.journal.close()

    def result(self) -> Result:
        return Result.of(
            self.algorithm,
            self.population,
            self.driver,
            self.baselines,
            notes=[*self.notes, *self._absent()],
            interrupted=self.interrupted,
            alone=self.alone,
        )

    def _absent(self) -> Iterator[str]:
        """A sentence for each client that was not there when the run ended: nobody asked it about its test rows."""
        state = self.driver.coordinator.state
        for name, client in self.population.clients.items():
            if name in state.population or client.is_present(state.round_num):
                continue
            if client.joins_at <= state.round_num:  # the others are in `Result.presence`
                yield f"{name} was away when the run ended, in round {state.round_num}: its test rows were not read"


def open_rounds(
    algorithm: Algorithm,
    clients: Iterable[Client],
    *,
    rounds: int | None = None,
    stop: Stop | None = None,
    seed: int = 0,
    cohort_size: int | None = None,
    schedule: Schedule | None = None,
    executor: str | Executor = "loop",
    workers: int | None = None,
    evaluate_every: int = 1,
    test: bool = True,
    policy: UpdatePolicy = DEFAULT_POLICY,
    checkpoint: str | Path | None = None,
    task: TaskKind | None = None,
    watch: Watch | Literal["live"] | None = None,
) -> OpenLoop:
    """The open loop: ``for round in pf.rounds(...)``, the same bits as `simulate` with the same arguments.

    See `simulate` for the arguments, and `Round` for the steps.
    """
    _check(algorithm, stop, seed)
    rule = _stop(rounds, stop)
    population = populate(algorithm, clients, seed=seed, task=task)
    rule.check(list(population.sites), evaluates=evaluate_every > 0)
    plan = _schedule(schedule, cohort_size, population)
    _somebody_is_there(population, plan, rounds)
    federation = Federation(
        algorithm=algorithm,
        problem=population.problem,
        rules=Rules(schedule=plan, seed=seed, evaluate_every=evaluate_every, test=test),
        stop=rule,
        first={group: tree.only(algorithm.offered(tree.spec)) for group, tree in population.first.items()},
        specs={group: tree.spec for group, tree in population.first.items()},
        groups=population.groups,
        frozen={name: site.frozen for name, site in population.sites.items() if site.frozen},
        public=next(iter(population.sites.values())).public,
        trainers=trainers_of(algorithm, population, seed=seed),
        policy=policy,
    )
    if population.given:
        with naming_groups(population.groups):
            start = algorithm.init(federation.env(0, len(population.sites)))
        population = with_used_start(population, algorithm, start)
    if begun := [name for name, site in population.sites.items() if site.begins.trees]:
        population = with_replaced_starts(population, algorithm, _first_messages(federation, begun, population.groups))
    works = _executor(executor, workers)
    onlooker = _watch(watch)
    coordinator, files, is_new = _coordinator(federation, population, checkpoint)
    driver = Driver(
        coordinator,
        works,
        files=files,
        watch=None if onlooker is None else onlooker.reply,
        sent=None if onlooker is None else onlooker.sent,
        begins={name: site.begins for name, site in population.sites.items()},
        presence=lambda name, round_num: population.clients[name].is_present(round_num),
    )
    try:
        works.open(algorithm, population.sites, seed=seed)
        if onlooker is not None:
            onlooker.start(population, rounds, algorithm.name)
        if is_new:
            with naming_groups(population.groups):
                driver.begin(list(population.sites))
        else:
            driver.come_back(list(population.sites))
    except BaseException:
        works.close()
        if coordinator.journal is not None:
            coordinator.journal.close()
        raise
    return OpenLoop(Run(algorithm, population, driver, works, onlooker))


def _first_messages(federation: Federation, names: Iterable[str], groups: Mapping[str, str]) -> dict[str, Message]:
    """What the server would send these clients if they came in round 1."""
    algorithm, count = federation.algorithm, len(groups)
    with naming_groups(groups):
        state = algorithm.init(federation.env(0, count))
    return {name: algorithm.broadcast(state, name, federation.env(1, count, name)) for name in names}


def _watch(watch: Watch | Literal["live"] | None) -> Watch | None:
    if watch is None:
        return WATCH.get()
    if watch != "live":
        return watch
    from polyfed.run.live import Table  # a table is drawn only where somebody looks

    return Table()


def simulate(
    algorithm: Algorithm,
    clients: Iterable[Client],
    *,
    rounds: int | None = None,
    stop: Stop | None = None,
    seed: int = 0,
    cohort_size: int | None = None,
    schedule: Schedule | None = None,
    executor: str | Executor = "loop",
    workers: int | None = None,
    evaluate_every: int = 1,
    test: bool = True,
    policy: UpdatePolicy = DEFAULT_POLICY,
    checkpoint: str | Path | None = None,
    task: TaskKind | None = None,
    baselines: Iterable[str] | None = None,
    watch: Watch | Literal["live"] | None = None,
) -> Result:
    """Trains a federation on this machine and returns what came of it.

    Args:
        algorithm: such as ``pf.FedAvg()``.
        clients: the participants; what the algorithm needs of each is checked before round 1.
        rounds: how many at most; 10 if neither `rounds` nor `stop` is given.
        stop: when to stop, on validation rows only; combined with `rounds` by "or".
        seed: of the whole run: splits, starts, orders, cohorts.
        cohort_size: clients drawn a round; all by default.
        schedule: goal counts, deadlines, minima: `pf.Sync`; replaces `cohort_size`.
        executor: "loop", "processes", or an executor of your own.
        workers: processes, for "processes"; one for each core by default.
        evaluate_every: rounds between two evaluations; 0 for none. An evaluation asks every client, also those outside
            the round's cohort, to predict its validation rows: with many clients and a small cohort it can cost more
            than the training, and a larger number here saves that. Rules that read metrics then speak at those rounds.
        test: whether the test rows are read at the end.
        policy: what the server accepts of one client.
        checkpoint: a folder; a run that was killed goes on there, with the same bits, when called again.
        task: "classification" or "regression", where the targets leave it open.
        baselines: "alone" (each client by itself, in as many rounds as it takes part, on all of its rows, those it set
            aside as public included) and "pooled" (each client's model on everybody's rows, which a real federation could not do).
            None is "alone" for up to 20 clients.
        watch: somebody who looks on; "live" draws a table in the terminal, a line a round where there is none.

    Raises:
        NeedsError: an algorithm that asks of a client what its model does not offer.
        DataError: rows that cannot be used.
        RunError: no quorum: names the clients and what they said. ``error.result`` holds the result so far.
        StorageError: the checkpoint cannot be written, or belongs to another run.

    Guarantees: the same arguments give the same bits under every executor and number of workers, between machines of
    one fingerprint (instruction set and library versions). Ctrl-C ends the run cleanly with the result so far.
    """
    clients = listed(clients)
    open_loop = open_rounds(
        algorithm,
        clients,
        rounds=rounds,
        stop=stop,
        seed=seed,
        cohort_size=cohort_size,
        schedule=schedule,
        executor=executor,
        workers=workers,
        evaluate_every=evaluate_every,
        test=test,
        policy=policy,
        checkpoint=checkpoint,
        task=task,
        watch=watch,
    )
    run: Run = open_loop.run
    wanted = _baselines(baselines, clients, test=test)
    try:
        for _ in open_loop:
            pass
        finish = run.driver.finish
        if finish is not None and finish.failed:
            raise _failed(finish.reason, run)
        for name in wanted:
            if run.watch is not None:
                run.watch.stage(_STAGES[name])
            _compare(run, name, seed, executor, workers)
    except KeyboardInterrupt:
        run.interrupt()
    return run.result()


def _compare(run: Run, name: str, seed: int, executor: str | Executor, workers: int | None) -> None:
    """A baseline that cannot be worked out costs a sentence, not the trained federation."""
    try:
        result = baseline(name, run.population, run.driver.coordinator.history, seed, executor, workers)
        run.baselines[name] = {client: dict(metrics) for client, metrics in result.test.items()}
        if run.population.replaced:
            names = ", ".join(run.population.replaced)
            run.notes.append(f"{name!r} of {names} began from the shared part of start=, and the federation did not")
        if name == "alone" and "student" in run.driver.coordinator.federation.trainers:
            run.alone = result  # its models are asked about everyone's rows
    except PolyfedError as error:
        run.notes.append(f"the baseline {name!r} could not be worked out: {str(error).partition(chr(10))[0]}")


_STAGES = {
    "alone": "each site trains alone, to compare",
    "pooled": "each model trains on everybody's rows, to compare",
}


def _failed(reason: str, run: Run) -> RunError:
    errors, left_out = run.driver.errors, run.driver.coordinator.state.left_out
    said = [str(error) + "".join(f"\n    {line}" for line in error.lines) for error in errors.values()]
    said += [f"{name}: {why}" for name, why in left_out.items() if name not in errors]
    error = RunError("\n".join([reason, *said]))
    error.result = run.result()  # type: ignore[attr-defined]  # for those who want what there is
    return error


def _check(algorithm: object, stop: object, seed: object) -> None:
    """Arguments of the wrong kind, refused before they end in somebody else's TypeError."""
    if isinstance(algorithm, type) and issubclass(algorithm, Algorithm):
        raise UsageError(f"algorithm is the class {algorithm.__name__}; give an object of it: {algorithm.__name__}()")
    if not isinstance(algorithm, Algorithm):
        raise UsageError(f"algorithm is a {type(algorithm).__name__}; give an algorithm, such as pf.FedAvg()")
    if stop is not None and not isinstance(stop, Stop):
        raise UsageError(f'stop is a {type(stop).__name__}; give a rule, such as pf.Target("auc", 0.85)')
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed={seed!r} must be a whole number of at least 0")


def _stop(limit: int | None, stop: Stop | None) -> Stop:
    if limit is None:
        return stop if stop is not None else Rounds(10)
    return Rounds(limit) if stop is None else Rounds(limit) | stop


def _schedule(schedule: Schedule | None, cohort_size: int | None, population: Population) -> Schedule:
    if schedule is not None and cohort_size is not None:
        raise UsageError("schedule= and cohort_size= both say who is asked; put the cohort size into the schedule")
    if schedule is not None:
        _can_be_met(schedule, len(population.sites))
        return schedule
    select: Select = All() if cohort_size is None else Uniform(cohort_size)
    if note := select.note(list(population.sites)):
        object.__setattr__(population, "notes", (*population.notes, note))
    return Sync(select=select)


def _can_be_met(schedule: Schedule, clients: int) -> None:
    """A minimum above all clients, those that join later included, is never met."""
    if schedule.minimum > clients:
        raise UsageError(
            f"minimum={schedule.minimum} updates a round cannot be met by {clients} client{'s' * (clients != 1)}; "
            "lower it, or add clients"
        )


def _somebody_is_there(population: Population, schedule: Schedule, rounds: int | None) -> None:
    """A round for which too few are there could never be done. Who is there changes in these rounds alone."""
    clients = population.clients.values()
    changes = {
        1,
        *(c.joins_at for c in clients),
        *(number + more for c in clients for number in c.away for more in (0, 1)),
    }
    needed = 1 if schedule.max_lag else schedule.minimum
    for number in sorted(n for n in changes if rounds is None or n <= rounds):
        absent = [client for client in clients if not client.is_present(number)]
        if len(clients) - len(absent) < needed:
            said = [f"{c.name} is away" if c.joins_at <= number else f"{c.name} joins at {c.joins_at}" for c in absent]
            least = "one" if needed == 1 else needed
            instead = f"let at least {least} have joins_at=1" if number == 1 else "change joins_at= or away="
            raise UsageError(
                f"round {number} needs {needed} of the clients and {len(clients) - len(absent)} take part: "
                f"{', '.join(said)}; {instead}"
            )


def _executor(executor: str | Executor, workers: int | None) -> Executor:
    if executor == "processes":
        return Processes(workers)
    if workers is not None and workers > 1 and executor == "loop":
        raise UsageError('workers= needs executor="processes"; the loop has none')
    if executor == "loop":
        return Loop()
    if isinstance(executor, str):
        raise UsageError(f'executor={executor!r} is unknown; use "loop", "processes", or an executor of your own')
    return executor


def _coordinator(
    federation: Federation, population: Population, checkpoint: str | Path | None
) -> tuple[Coordinator, FileMemories | None, bool]:
    if checkpoint is None:
        return Coordinator(federation), None, True
    from polyfed.storage.blobs import FileBlobs  # only with a checkpoint
    from polyfed.storage.journal import FileJournal  # as above

    folder = Path(checkpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"checkpoint={folder} cannot be made: {error}") from error
    _same_run(folder, federation, population)
    blobs, files = FileBlobs(folder / "blobs"), FileMemories(folder / "memories")
    journal = FileJournal(folder / "journal")
    try:
        if journal.read():
            return Coordinator.resume(federation, journal, blobs), files, False
    except BaseException:
        journal.close()  # its lock must not outlive a checkpoint that could not be read
        raise
    return Coordinator(federation, journal=journal, blobs=blobs), files, True


#: What a field of run.json means, for those whose call differs from the one that made the checkpoint.
_MEANING = {
    "clients": "when clients take part, the clients, their models' settings or their rows",
    "first": "the models' first weights (a module built without a seed? give a factory, or set torch's seed)",
    "stop": "when to stop",
    "trainers": "what the server trains, or the rows that it trains on",
}
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _same_run(folder: Path, federation: Federation, population: Population) -> None:
    """A checkpoint belongs to one run; another one in the same folder is refused before anything is read."""
    rules = federation.rules
    said: dict[str, Any] = {
        "algorithm": manifest_of(federation.algorithm),
        "seed": rules.seed,
        "schedule": repr(rules.schedule),
        "stop": repr(federation.stop),
        "evaluation": [rules.evaluate_every, rules.test],
        "policy": repr(federation.policy),
        "clients": {n: _said_of(population.clients[n], site) for n, site in population.sites.items()},
        "first": {group: tree.digest for group, tree in population.first.items()},
    }
    if federation.trainers:
        trained = federation.trainers.items()
        said["trainers"] = {n: [s.model.kind, dict(s.model.settings), _digest_of(s)] for n, s in trained}
    # a function is named by its address, which another process has elsewhere
    path, text = folder / "run.json", _ADDRESS.sub("", json.dumps(said, sort_keys=True, indent=1, default=str))
    if not path.exists():
        try:
            write_whole(path, [text.encode()])
        except OSError as error:
            raise StorageError(f"the checkpoint cannot be written to {path}: {error}") from error
    elif (found := path.read_text()) != text:
        old, new = _read_json(path, found), json.loads(text)
        differs = "; ".join(_MEANING.get(key, key) for key in new if old.get(key) != new[key]) or "its form"
        raise StorageError(f"{folder} holds the checkpoint of another run: {differs} differs; use another folder")


def _said_of(client: Client, site: Site) -> list[Any]:
    there = [client.joins_at, client.away, client.freeze, site.begins.digest]
    return [site.model.kind, dict(site.model.settings), _digest_of(site), *there]


def _read_json(path: Path, text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise CorruptError(f"{path} cannot be read back: {error}; this checkpoint is damaged") from error


def _digest_of(site: Site) -> str:
    """Hex digest of a site's prepared rows."""
    total = blake2b(digest_size=16)
    for rows in (site.train, site.validation, site.test, site.public):
        arrays = {} if rows is None else {**rows.inputs, **({} if rows.target is None else {"": rows.target})}
        for name, array in arrays.items():
            total.update(f"{name} {array.dtype} {array.shape}\n".encode())
            total.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
        total.update(b"|")
    return total.hexdigest()


def _baselines(wanted: Iterable[str] | None, clients: Sequence[Client], *, test: bool) -> tuple[str, ...]:
    if not test:
        return ()
    names = tuple(("alone",) if len(clients) <= FEW else ()) if wanted is None else tuple(wanted)
    if unknown := [name for name in names if name not in ("alone", "pooled")]:
        raise UsageError(f"baselines={unknown} are unknown; there are 'alone' and 'pooled'")
    return names


def baseline(
    name: str,
    population: Population,
    history: Sequence[RoundLog],
    seed: int,
    executor: str | Executor,
    workers: int | None,
) -> Result:
    """Every client trained without the federation, for as many rounds.

    "alone": its own rows, those that it set aside as public included. "pooled": the training rows of all clients.
    """
    together = "pooled" if name == "pooled" else ""
    clients = [_baseline_client(client, population, together) for client in population.clients.values()]
    nobody = WATCH.set(None)
    try:
        return _alone(clients, population, max(1, len(history)), seed, executor, workers)
    finally:
        WATCH.reset(nobody)


def _alone(
    clients: Sequence[Client],
    population: Population,
    rounds: int,
    seed: int,
    executor: str | Executor,
    workers: int | None,
) -> Result:
    result = simulate(
        Local(starts=population.given),
        clients,
        rounds=rounds,
        seed=seed,
        executor=executor if isinstance(executor, str) else "loop",
        workers=workers,
        evaluate_every=0,
        task="classification" if population.problem.is_classification else "regression",
        baselines=(),
    )
    if result.interrupted:  # the inner run has swallowed it
        raise KeyboardInterrupt
    return result


def _baseline_client(client: Client, population: Population, together: str) -> Client:
    raw, parts = population.raws[client.name], population.parts[client.name]
    own = with_everything(client, raw, parts)
    if not together:
        return own
    from polyfed import data as tables  # only the pooled baseline joins tables

    others = [n for n in population.raws if n != client.name]
    raws = [raw, *(population.raws[n].take(population.parts[n].with_public().train) for n in others)]
    targets = [each.target for each in raws if each.target is not None]
    joined = replace(tables.concat(raws), target=np.concatenate(targets))  # `concat` is for rows that travel: no labels
    train = [*own.split.train.tolist(), *range(len(raw), len(joined))]  # type: ignore[union-attr]  # Parts by construction
    return replace(own, data=joined, split=replace(own.split, train=train))  # type: ignore[arg-type]  # as above


__all__ = ["OpenLoop", "Round", "Run", "Watch", "baseline", "open_rounds", "simulate"]
