"""The server's side of a run: the round engine joined with an algorithm, the fold, the stopping rules and a journal.

It has no clock, no network and no workers: a driver (simulation, network server) hands it events and messages, carries
out the actions that it returns, and calls `compute` where it likes (in line, or in a thread), so every driver runs the
same rounds. What is not kept in memory goes through the `Journal` and `Blobs` it is given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

from polyfed.core import records, wire
from polyfed.core.aggregate import (
    DEFAULT_POLICY,
    Aggregate,
    Fold,
    UpdatePolicy,
    capped,
    largest_step,
    validate,
    weights_of,
)
from polyfed.core.algorithm import Algorithm, Env, Task
from polyfed.core.errors import CorruptError, RefusedError, UsageError
from polyfed.core.events import (
    Action,
    Begin,
    Compute,
    Computed,
    ComputeFailed,
    Event,
    Joined,
    Judged,
    Persist,
    Refused,
    Reported,
)
from polyfed.core.events import Fold as FoldAt
from polyfed.core.history import RoundLog
from polyfed.core.message import Message, State
from polyfed.core.protocols import Blobs, Journal, Site
from polyfed.core.records import Phase, Taken
from polyfed.core.round import Rules, step
from polyfed.core.rows import Problem, Rows
from polyfed.core.stop import Rounds, Stop
from polyfed.core.tree import Spec, Tree
from polyfed.core.work import failure


@dataclass(frozen=True)
class Federation:
    """What one run is: everything that all of its drivers share and that does not change.

    Attributes:
        first, specs: for each group of clients of one architecture, of the state to start from what the algorithm needs
            (`Algorithm.offered`), and the spec of the whole.
        groups: client -> its group.
        frozen: client -> prefixes of what it never trains; without an entry where that is nothing.
        trainers: what the server can train by itself: see `Env.trainers`.
        policy: what the server accepts of one client.
    """

    algorithm: Algorithm
    problem: Problem
    rules: Rules = field(default_factory=Rules)
    stop: Stop = field(default_factory=lambda: Rounds(1))
    first: Mapping[str, Tree] = field(default_factory=dict)
    specs: Mapping[str, Spec] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    frozen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    public: Rows | None = None
    trainers: Mapping[str, Site] = field(default_factory=dict)
    policy: UpdatePolicy = DEFAULT_POLICY

    def env(self, round_num: int, population: int, client: str = "") -> Env:
        """The server's view; `client` names the addressee where a message is made for one."""
        return Env(
            seed=self.rules.seed,
            problem=self.problem,
            client=client,
            round_num=round_num,
            number=round_num,
            population=population,
            public=self.public,
            group=self.groups.get(client, ""),
            frozen=self.frozen.get(client, ()),
            first=self.first,
            specs=self.specs,
            trainers=self.trainers,
        )


@dataclass(frozen=True, slots=True)
class _Upload:
    message: Message
    weights: Mapping[str, float]
    num_bytes: int = 0
    cpu_seconds: float = 0.0


class Coordinator:
    """One run at the server.

    Guarantees: what `handle` returns follows from durable records only (the journal's `append` has returned); equal
    events give equal actions and equal bits, whoever drives.
    """

    def __init__(self, federation: Federation, *, journal: Journal | None = None, blobs: Blobs | None = None) -> None:
        self.federation = federation
        self.state = records.State()
        self.history: list[RoundLog] = []
        self.journal, self.blobs = journal, blobs
        #: client -> the receipt of its newest accepted task; the client's memory of that receipt is its current one.
        self.receipts: dict[str, str] = {}
        #: version -> `receipts` when it was made, for the versions that a roll-back may choose.
        self.receipts_at: dict[int, dict[str, str]] = {}
        self._versions: dict[int, State] = {}
        self._digests: dict[int, str] = {}
        self._uploads: dict[str, _Upload] = {}
        self._fold: tuple[int, Fold] = (0, Fold())
        self._trained: records.State | None = None
        self._norms = (0.0, 0.0)
        self._steps: tuple[int, Mapping[str, float]] = (-1, {})
        self._bytes_down: dict[int, int] = {}
        #: digests of what a resume reads besides versions and open uploads: the history, and test metrics.
        self._logged: set[str] = set()
        #: client -> metrics on its test rows, once the run has ended.
        self.tested: dict[str, Mapping[str, float]] = {}
        #: set to [] to record every event with the engine's actions.
        self.trace: list[tuple[Event, list[Action]]] | None = None

    # ------------------------------------------------------------------------------------------ starting

    def begin(self, clients: Iterable[str], *, at: float = 0.0) -> list[Action]:
        """Enrols these clients and opens the first round."""
        actions = [action for client in clients for action in self.handle(Joined(at, client))]
        start = self.federation.algorithm.init(self.federation.env(0, len(self.state.population)))
        return actions + self.handle(Begin(at, self._store(0, start)))

    @classmethod
    def resume(cls, federation: Federation, journal: Journal, blobs: Blobs) -> Coordinator:
        """A coordinator in the state that its journal gives; hand it `Restarted` next.

        Raises:
            CorruptError: the journal or a blob it names cannot be read back.
        """
        self = cls(federation, journal=journal, blobs=blobs)
        for line in journal.read():
            record = records.decode(line)
            before, self.state = self.state, records.apply(self.state, record)
            self._note(before, record)
        self._bring_back()
        return self

    def _bring_back(self) -> None:
        """Loads what the records name: the states that are still wanted, and the uploads of the open collection."""
        assert self.blobs is not None
        wanted = {self.state.version} | {lease.task.version for lease in self.state.leases.values()}
        wanted |= self.federation.stop.keeps(self.history)
        for version in wanted & self._digests.keys():
            self._versions[version] = wire.decode(self.blobs.get(self._digests[version]), _TRUSTED)
        trained = {} if self._trained is None else self._trained.taken
        for taken in (*self.state.taken.values(), *trained.values()):
            self._bring_upload(taken.client, taken.receipt, taken.digest)
        for receipt, digest in self.state.held:
            self._bring_upload(self.state.leases[receipt].task.client, receipt, digest)
        if self.state.phase in (Phase.JUDGING, Phase.EVALUATING) and self.state.version - 1 in self._digests:
            before = wire.decode(self.blobs.get(self._digests[self.state.version - 1]), _TRUSTED)
            self._norms = _norms(before, self._versions[self.state.version])

    def wanted(self) -> set[str]:
        """Digests of the blobs that a resume from here would read; all others may be deleted, between two events."""
        versions = self._versions.keys() | {self.state.version, self.state.version - 1}
        trained = {} if self._trained is None else self._trained.taken
        uploads = (*self.state.taken.values(), *trained.values())
        found = self._logged | {self._digests[version] for version in versions if version in self._digests}
        return (found | {taken.digest for taken in uploads} | {digest for _, digest in self.state.held}) - {""}

    def _bring_upload(self, client: str, receipt: str, digest: str) -> None:
        assert self.blobs is not None
        data, weight = self.blobs.get(digest), self.federation.algorithm.weight
        message = wire.decode(data, _TRUSTED)
        weights = weights_of(message, lambda tree: weight(message.numbers, 0, tree), client)
        self._uploads[receipt] = _Upload(message, weights, len(data))

    # ------------------------------------------------------------------------------------------ events

    def handle(self, event: Event) -> list[Action]:
        """Steps the engine; returns what the driver has to do, in order. `Persist` and `Fold` are done here.

        Raises:
            StorageError: the journal could not be written; nothing has changed and the event may be handed in again.
        """
        state, actions = step(self.federation.rules, self.state, event)
        if self.trace is not None:
            self.trace.append((event, actions))
        outward: list[Action] = []
        for action in actions:
            if isinstance(action, Persist):
                if self.journal is not None:
                    self.journal.append([records.encode(record) for record in action.records])
                for record in action.records:
                    self._note(self.state, record)
                self.state = state
            elif isinstance(action, FoldAt):
                self._fold_in(action)
            else:
                outward.append(action)
        return outward

    def _note(self, before: records.State, record: records.Record) -> None:
        """Keeps what is derived from durable records beside the engine's state; `before` is the state they met."""
        if isinstance(record, records.Accepted):
            self._accepted(before.leases[record.receipt].task, record)
        elif isinstance(record, records.Dropped):
            self._uploads.pop(record.receipt, None)
        elif isinstance(record, records.Abandoned):
            for taken in before.taken.values():
                self._uploads.pop(taken.receipt, None)
            # what was accepted did not count: each client goes on from its memory of the last version
            self.receipts = dict(self.receipts_at.get(before.version, {}))
        elif isinstance(record, records.Initial):
            self._digests[0] = record.digest
        elif isinstance(record, records.Committed):
            self._digests[record.version] = record.digest
            self.receipts_at[record.version] = dict(self.receipts)
            self._trained = before
        elif isinstance(record, (records.WentOn, records.Ended)):
            self._judged(before, record)

    def _accepted(self, task: Task, record: records.Accepted) -> None:
        if task.kind != "evaluate":
            self.receipts[task.client] = record.receipt
        elif task.part == "test":
            if record.receipt not in self._uploads:
                self._bring_upload(task.client, record.receipt, record.digest)
            self.tested[task.client] = self._uploads[record.receipt].message.numbers
            self._logged.add(record.digest)

    def _judged(self, before: records.State, record: records.WentOn | records.Ended) -> None:
        self._logged.add(record.log)
        is_new = not self.history or self.history[-1].round_num < before.round_num
        if is_new and record.log and self.blobs is not None:
            self.history.append(_log_from(self.blobs.get(record.log)))
        if record.version != before.version:  # rolled back: each client's memory is that of the version it ends with
            self.receipts = dict(self.receipts_at.get(record.version, {}))
        kept = {before.version, record.version} | self.federation.stop.keeps(self.history)
        kept |= {lease.task.version for lease in before.leases.values()}
        self._versions = {v: s for v, s in self._versions.items() if v in kept}
        self.receipts_at = {v: r for v, r in self.receipts_at.items() if v in kept}
        self._bytes_down = {}
        self._trained = None

    def upload(
        self, at: float, client: str, receipt: str, message: Message, *, num_bytes: int = 0, cpu_seconds: float = 0.0
    ) -> list[Action]:
        """A client's answer to a task: checks it, stages it and tells the engine. Bad input is data, not an exception."""
        lease = self.state.leases.get(receipt)
        if lease is None or lease.task.client != client:
            return self.handle(Reported(at, client, receipt, ""))
        try:
            message, weights = self._checked(lease.task, message)
        except RefusedError as error:
            return self.handle(
                Refused(at, client, receipt, f"{error.where}: {error.reason}" if error.where else error.reason)
            )
        if receipt in dict(self.state.held):
            return self.handle(Reported(at, client, receipt, ""))
        digest = "" if self.blobs is None else self.blobs.put(wire.to_bytes(message))
        self._uploads[receipt] = _Upload(message, weights, num_bytes, cpu_seconds)
        return self.handle(Reported(at, client, receipt, digest))

    def _checked(self, task: Task, message: Message) -> tuple[Message, Mapping[str, float]]:
        if task.kind == "evaluate":
            return _checked_metrics(message, task.client), {}
        algorithm = self.federation.algorithm
        env = self.federation.env(task.round_num, len(self.state.population), task.client)
        sent = algorithm.broadcast(self._versions[task.version], task.client, env)
        expected, policy = algorithm.expects(sent, env), self.federation.policy
        message = validate(message, expected, task.client, policy, limits=self._limits(task.version))
        algorithm.check(sent, message, env, policy)
        weights = weights_of(message, lambda tree: algorithm.weight(message.numbers, 0, tree), task.client)
        if message.text:
            _check_text(message, task.client)
        return message, weights

    def _limits(self, version: int) -> Mapping[str, float]:
        """How far the parameters of a version may be moved by one update; worked out once for each version."""
        if self._steps[0] != version:
            shared, policy = _params(self._versions[version]), self.federation.policy
            self._steps = (version, {name: largest_step(tree, policy) for name, tree in shared.items()})
        return self._steps[1]

    def message_for(self, task: Task) -> Message:
        """What a task's client is sent; a pure function of the task, so it may be made again."""
        env = self.federation.env(task.round_num, len(self.state.population), task.client)
        return self.federation.algorithm.broadcast(self._versions[task.version], task.client, env)

    def count_down(self, task: Task, num_bytes: int) -> None:
        """Bytes that went down to a client in this round."""
        self._bytes_down[task.round_num] = self._bytes_down.get(task.round_num, 0) + num_bytes

    # ------------------------------------------------------------------------------------------ the fold

    def _fold_in(self, action: FoldAt) -> None:
        """Folds one accepted upload and forgets it, unless a cap on shares needs the weights of the whole cohort first."""
        if self.federation.policy.max_share is not None:
            return
        if self._fold[0] != action.collection:
            self._fold = (action.collection, Fold(self.state.block))
        self._add(self._fold[1], action.position, action.taken, self._weights(action.taken))
        upload = self._uploads[action.taken.receipt]
        bare = Message(numbers=upload.message.numbers, text=upload.message.text)
        self._uploads[action.taken.receipt] = _Upload(bare, upload.weights, upload.num_bytes, upload.cpu_seconds)

    def _add(self, fold: Fold, position: int, taken: Taken, weights: Mapping[str, float]) -> None:
        message = self._uploads[taken.receipt].message
        if type(self.federation.algorithm).receive is not Algorithm.receive:
            message = self._received(position, taken, message)
        fold.add(position, message, weights.__getitem__)

    def _weights(self, taken: Taken) -> Mapping[str, float]:
        """The weight of each of an upload's trees; those it was checked with, unless it lags."""
        upload, weight = self._uploads[taken.receipt], self.federation.algorithm.weight
        if not taken.lag:
            return upload.weights
        return weights_of(upload.message, lambda tree: weight(upload.message.numbers, taken.lag, tree), taken.client)

    def _received(self, position: int, taken: Taken, message: Message) -> Message:
        task = Task("train", taken.client, self.state.round_num, self.state.version - taken.lag, position=position)
        env = self.federation.env(task.round_num, len(self.state.population), taken.client)
        return self.federation.algorithm.receive(self.message_for(task), message, env)

    def _aggregate(self) -> Aggregate:
        share = self.federation.policy.max_share
        if share is None:
            fold = self._fold[1] if self._fold[0] == self.state.collection else Fold()
            return fold.finish()
        fold, taken = Fold(self.state.block), dict(sorted(self.state.taken.items()))
        claims = {position: self._weights(t) for position, t in taken.items()}
        cut: dict[int, dict[str, float]] = {position: {} for position in taken}
        for tree in sorted({tree for weights in claims.values() for tree in weights}):
            having = [position for position, weights in claims.items() if tree in weights]
            for position, weight in zip(having, capped([claims[p][tree] for p in having], share), strict=True):
                cut[position][tree] = weight
        for position, t in taken.items():
            self._add(fold, position, t, cut[position])
        return fold.finish()

    # ------------------------------------------------------------------------------------------ computing

    def compute(self, action: Compute, *, at: float) -> Event:
        """Carries out a `Compute`; returns the event to hand in. Pure but for stored blobs; may run in a thread."""
        if action.what == "judge":
            return self._judge(at)
        try:
            return Computed(at, action.collection, self._update())
        except Exception as error:  # noqa: BLE001  # an algorithm's own code may raise anything; the run ends in a sentence
            said = failure(self.federation.algorithm.name, error)
            return ComputeFailed(at, action.collection, "\n".join((f"server_update of {said}", *said.lines)))

    def _update(self) -> str:
        before = self._versions[self.state.version]
        env = self.federation.env(self.state.round_num, len(self.state.population))
        after = self.federation.algorithm.server_update(before, self._aggregate(), env)
        for name, tree in after.trees.items():
            if not tree.is_finite():
                raise ArithmeticError(f"the next state is not finite in {name}; lower the server's learning rate")
        self._norms = _norms(before, after)
        return self._store(self.state.version + 1, after)

    def _store(self, version: int, state: State) -> str:
        self._versions[version] = state
        return "" if self.blobs is None else self.blobs.put(wire.to_bytes(state))

    def _judge(self, at: float) -> Judged:
        log = self._round_log(at)
        history = [*(entry for entry in self.history if entry.round_num < log.round_num), log]
        self.history = history
        stop, version = self.federation.stop, self.state.version
        reason = stop(history) or ""
        if not reason and self.federation.algorithm.done(self._versions[version]):
            reason = f"{self.federation.algorithm.name} is done"
        digest = "" if self.blobs is None else self.blobs.put(_log_bytes(log))
        final = (stop.rolls_back_to(history) or 0) if reason else 0
        return Judged(at, version, reason, final, digest)

    def _round_log(self, at: float) -> RoundLog:
        trained, state = self._trained or self.state, self.state
        uploads = [(t.client, self._uploads.pop(t.receipt, None)) for _, t in sorted(trained.taken.items())]
        scored = [(t.client, self._uploads.pop(t.receipt, None)) for _, t in sorted(state.taken.items())]
        evaluated = [
            (c, dict(u.message.numbers)) for c, u in scored if u is not None and state.evaluated == state.version
        ]
        sizes = {client: int(numbers.pop("num_examples", 0)) for client, numbers in evaluated}
        return RoundLog(
            round_num=state.round_num,
            seconds=at,
            cohort=trained.plan,
            accepted=tuple(client for client, _ in uploads),
            left_out=dict(state.left_out),
            loss={c: u.message.numbers["loss"] for c, u in uploads if u is not None and "loss" in u.message.numbers},
            metrics={client: numbers for client, numbers in evaluated if numbers},
            num_examples={client: sizes[client] for client, numbers in evaluated if numbers},
            update_norm=self._norms[0],
            state_norm=self._norms[1],
            bytes_down=self._bytes_down.get(state.round_num, 0),
            bytes_up=sum(u.num_bytes for _, u in uploads + scored if u is not None),
            cpu_seconds=sum(u.cpu_seconds for _, u in uploads + scored if u is not None),
        )

    # ------------------------------------------------------------------------------------------ results

    def version(self, version: int) -> State:
        """The algorithm's state at a version that is still kept; raises `KeyError` for another."""
        return self._versions[version]

    @property
    def final(self) -> State:
        """The algorithm's state at the version that the run stands at."""
        return self._versions[self.state.version]


def _norms(before: State, after: State) -> tuple[float, float]:
    """Length of the step of the parameters that are shared, and of themselves; zeros where none are."""
    found, had = _params(after), _params(before)
    if not found or {n: tree.spec for n, tree in found.items()} != {n: tree.spec for n, tree in had.items()}:
        return 0.0, 0.0
    steps = [(tree - had[name]).norm() for name, tree in found.items()]
    return math.hypot(*steps), math.hypot(*(tree.norm() for tree in found.values()))


def _params(state: State) -> dict[str, Tree]:
    """The parameters that a state shares: "params", or "params:<group>" of each group."""
    return {name: tree for name, tree in state.trees.items() if name.partition(":")[0] == "params"}


#: Our own blobs are checked by their digests; they may be larger than what a stranger may send.
_TRUSTED = replace(wire.DEFAULT_LIMITS, max_bytes=1 << 62)


def _checked_metrics(message: Message, client: str) -> Message:
    """Metrics as a client reports them: finite numbers and nothing else."""
    if message.trees or message.text:
        raise RefusedError(client, "", "an evaluation holds numbers only")
    for name, value in message.numbers.items():
        if not math.isfinite(value):
            raise RefusedError(client, f"numbers/{name}", f"is {value}; metrics are finite")
    if not 0 <= message.numbers.get("num_examples", -1) <= DEFAULT_POLICY.max_num_examples:
        raise RefusedError(client, "numbers/num_examples", f"is {message.numbers.get('num_examples')}")
    return message


def _check_text(message: Message, client: str) -> None:
    try:
        wire.size(Message(text=message.text))
    except UsageError as error:
        raise RefusedError(client, "text", str(error)) from None


def _log_bytes(log: RoundLog) -> bytes:
    return json.dumps(asdict(log), sort_keys=True, allow_nan=False).encode()


def _log_from(data: bytes) -> RoundLog:
    try:
        found = json.loads(data)
        return RoundLog(**{**found, "cohort": tuple(found["cohort"]), "accepted": tuple(found["accepted"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptError(f"an entry of the history cannot be read: {error}") from error
