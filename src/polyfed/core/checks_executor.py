"""What every executor promises, as a test that anybody can run over their own: `check_executor`.

The clients are toys of numpy alone, with a state, a memory and random numbers, so that an executor that mixes up clients,
loses a memory, does a job twice or changes a bit is found within a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from polyfed.core import seed as seeds
from polyfed.core.algorithm import Algorithm, ClientUpdate, Env, Fit, Fitted, Needs, Predict, Task
from polyfed.core.message import Memory, Message, State
from polyfed.core.protocols import Executor, Job, Reply, Site
from polyfed.core.rows import Problem, Rows
from polyfed.core.tree import Array, Tree
from polyfed.core.work import perform

SEED = 7
PROBLEM = Problem(classes=("no", "yes"), outputs=2)


@dataclass(eq=False)
class ToyModel:
    """Logistic regression by plain SGD: small, and its order of rows is drawn anew for every task."""

    width: int = 3
    lr: float = 0.1
    kind: str = "toy"
    offers: frozenset[str] = frozenset({"params", "predict"})
    key: Hashable = "toy"
    settings: Mapping[str, str | float | int | bool] = field(default_factory=dict)

    def first(self, rows: Rows, env: Env) -> Tree:
        """Zeros: every client starts alike."""
        del rows, env
        return Tree({"weight": np.zeros((self.width, 2), np.float32), "bias": np.zeros(2, np.float32)})

    def state(self, start: Sequence[Tree], rows: Rows, env: Env) -> Tree:
        state = self.first(rows, env)
        for tree in start:
            state = state.overlay(tree)
        return state

    def fit(self, request: Fit, rows: Rows, env: Env) -> Fitted:
        """One step a row, in an order drawn from the task's own stream."""
        state = self.state(request.start, rows, env)
        weight, bias = state["weight"].copy(), state["bias"].copy()
        assert rows.target is not None
        for row in env.rng("order").permutation(len(rows)):
            x = rows.x[row]
            gap = _softmax((x[:, None] * weight).sum(0) + bias)
            gap[rows.target[row]] -= 1
            weight -= np.float32(self.lr) * x[:, None] * gap
            bias -= np.float32(self.lr) * gap
        return Fitted(
            Tree({"weight": weight, "bias": bias}), steps=len(rows), lr=self.lr, metrics={"loss": float(gap.sum())}
        )

    def predict(self, request: Predict, rows: Rows, env: Env) -> Array:
        """Logits, (n, 2)."""
        state = self.state(request.start, rows, env)
        return (rows.x[:, :, None] * state["weight"]).sum(1) + state["bias"]  # type: ignore[no-any-return]  # numpy: Any

    def export(self, state: Tree, rows: Rows, env: Env) -> Tree:
        """The state itself: there is no framework."""
        del rows, env
        return state


def _softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum()  # type: ignore[no-any-return]  # numpy: Any


@dataclass(frozen=True)
class ToyAlgorithm(Algorithm):
    """Averages parameters; each client counts its tasks and keeps its last update.

    Attributes:
        broken: clients whose code raises.
        quits: clients whose code calls ``sys.exit``.
    """

    broken: tuple[str, ...] = ()
    quits: tuple[str, ...] = ()
    needs = Needs.all("params")

    def init(self, env: Env) -> State:
        return Message(trees={"params": ToyModel().first(Rows({"x": np.zeros((1, 3), np.float32)}), env)})

    def client_update(self, message: Message, memory: Memory, env: Env) -> ClientUpdate:
        """Trains, looks at its own predictions, and answers with update, counts and a text."""
        if env.client in self.broken:
            raise ValueError("this client is broken")
        if env.client in self.quits:
            raise SystemExit(3)
        start = message.trees["params"]
        fitted = yield Fit(start=(start,))
        outputs = yield Predict(start=(fitted.state,))
        update = fitted.state - start
        mask = Tree({"sign": (outputs[:, 1] > outputs[:, 0]), "count": np.array([len(outputs)], np.int64)})
        tasks = memory.numbers.get("tasks", 0.0) + 1
        sent = Message(
            trees={"params": update, "votes": mask},
            numbers={"num_examples": float(env.num_examples), "tasks": tasks, **fitted.metrics},
            text={"seen": (*memory.text.get("seen", ()), env.client)},
        )
        return sent, memory.put(trees={"last": update}, numbers={"tasks": tasks}, text={"seen": (env.client,)})


def toy_sites(names: Sequence[str]) -> dict[str, Site]:
    """Clients of 5 to 40 rows, drawn from their names."""
    return {
        name: Site(name, ToyModel(), PROBLEM, _rows(name, "train"), _rows(name, "validation"), _rows(name, "test"))
        for name in names
    }


def _rows(name: str, part: str) -> Rows:
    rng = seeds.rng(SEED, name, part)
    x = rng.normal(size=(int(rng.integers(5, 40)), 3)).astype(np.float32)
    return Rows({"x": x}, (x.sum(1) > 0).astype(np.int64))


def toy_jobs(sites: Mapping[str, Site], memories: Mapping[str, Memory] | None = None, *, number: int = 0) -> list[Job]:
    """A cohort of all clients, sent one and the same message."""
    message = Message(
        trees={"params": Tree({"weight": np.full((3, 2), 0.1, np.float32), "bias": np.zeros(2, np.float32)})}
    )
    found = memories or {}
    return [
        Job(Task("train", name, number + 1, number, position=place, number=number), message, found.get(name, Message()))
        for place, name in enumerate(sites)
    ]


def difference(got: Reply, wanted: Reply) -> str:
    """Where two replies differ in any bit, processor time aside; empty when they do not."""
    if got.task != wanted.task:
        return f"task {got.task}, expected {wanted.task}"
    if str(got.error) != str(wanted.error):
        return f"error {got.error}, expected {wanted.error}"
    for what, a, b in (("message", got.message, wanted.message), ("memory", got.memory, wanted.memory)):
        if a is None or b is None:
            if a is not b:
                return f"{what}: {a}, expected {b}"
        elif list(a.trees) != list(b.trees) or a.trees != b.trees:
            return f"{what}: the trees differ"
        elif repr((a.numbers, a.text)) != repr((b.numbers, b.text)):
            return f"{what}: {a.numbers} {a.text}, expected {b.numbers} {b.text}"
    return ""


def check_executor(factory: Callable[[], Executor]) -> None:
    """Raises `AssertionError`, saying which promise is broken, unless the executors that `factory` makes keep them all.

    Every job is answered exactly once; replies have the bits that `perform` gives in this process; memories come back
    and go in again; a client that raises or exits harms no other; jobs may be submitted while replies are read; reading
    may be broken off and taken up; `close` may be called twice and `open` after it.
    """
    executor = factory()
    checks = (_cohorts, _failures, _evaluations, _asynchronous, _broken_off, _empty)
    try:
        for check in checks:
            check(executor)
            executor.close()
    finally:
        executor.close()
        executor.close()


@dataclass
class _Oracle:
    """An opened executor beside what it must answer."""

    executor: Executor
    names: Sequence[str]
    algorithm: ToyAlgorithm = field(default_factory=ToyAlgorithm)

    def __post_init__(self) -> None:
        self.sites = toy_sites(self.names)
        self.executor.open(self.algorithm, self.sites, seed=SEED)

    def compare(self, jobs: Sequence[Job], replies: Sequence[Reply]) -> dict[str, Memory]:
        """Every job once, with the bits of `perform`; returns the next memories."""
        answered = sorted((reply.task.client, reply.task.number) for reply in replies)
        asked = sorted((job.task.client, job.task.number) for job in jobs)
        assert answered == asked, f"not every job was answered exactly once: asked {asked}, answered {answered}"
        by_task = {reply.task: reply for reply in replies}
        for job in jobs:
            wanted = perform(self.algorithm, self.sites[job.task.client], job, seed=SEED)
            assert job.task in by_task, f"{job.task.client}: its reply carries another task than its job"
            found = difference(by_task[job.task], wanted)
            assert not found, f"{job.task.client}, task {job.task.number}: {found}"
            assert by_task[job.task].cpu_seconds >= 0
        return {reply.task.client: reply.memory for reply in replies}


def _cohorts(executor: Executor) -> None:
    oracle = _Oracle(executor, [f"client-{i}" for i in range(7)])
    memories: dict[str, Memory] = {}
    for number in range(3):
        jobs = toy_jobs(oracle.sites, memories, number=number)
        executor.submit(jobs[:4])
        executor.submit(jobs[4:])
        memories = oracle.compare(jobs, list(executor.replies()))
    tasks = {name: memory.numbers["tasks"] for name, memory in memories.items()}
    assert set(tasks.values()) == {3.0}, f"a memory was lost on the way: tasks done {tasks}"


def _failures(executor: Executor) -> None:
    oracle = _Oracle(executor, ["a", "b", "c", "d"], ToyAlgorithm(broken=("b",), quits=("d",)))
    jobs = toy_jobs(oracle.sites, {"b": Message(numbers={"kept": 1.0})})
    executor.submit(jobs)
    replies = list(executor.replies())
    memories = oracle.compare(jobs, replies)
    failed = {reply.task.client: reply.error.kind for reply in replies if reply.error is not None}
    assert failed == {"b": "ValueError", "d": "SystemExit"}, f"failures of other clients than were broken: {failed}"
    assert memories["b"].numbers == {"kept": 1.0}, "a client that failed must have its memory back as it was"


def _evaluations(executor: Executor) -> None:
    oracle = _Oracle(executor, ["a", "b", "c"])
    for part in ("validation", "test"):
        jobs = [replace(job, task=replace(job.task, kind="evaluate", part=part)) for job in toy_jobs(oracle.sites)]
        executor.submit(jobs)
        oracle.compare(jobs, list(executor.replies()))


def _asynchronous(executor: Executor) -> None:
    oracle = _Oracle(executor, ["a", "b", "c"])
    jobs = toy_jobs(oracle.sites)
    executor.submit(jobs)
    replies: list[Reply] = []
    for reply in executor.replies():
        replies.append(reply)
        if reply.task.number < 3:
            name, number = reply.task.client, reply.task.number + 1
            (job,) = toy_jobs({name: oracle.sites[name]}, {name: reply.memory}, number=number)
            jobs.append(job)
            executor.submit([job])
    assert len(replies) == 12, f"of 12 jobs, 9 submitted while replies were read, {len(replies)} were answered"
    oracle.compare(jobs, replies)


def _broken_off(executor: Executor) -> None:
    oracle = _Oracle(executor, ["a", "b", "c", "d"])
    jobs = toy_jobs(oracle.sites)
    executor.submit(jobs)
    oracle.compare(jobs, [*_first(executor.replies()), *executor.replies()])


def _first(replies: Iterator[Reply]) -> list[Reply]:
    for reply in replies:
        return [reply]
    return []


def _empty(executor: Executor) -> None:
    _Oracle(executor, ["a"])
    executor.submit([])
    left = list(executor.replies())
    assert not left, f"nothing was asked, yet {len(left)} replies came"
