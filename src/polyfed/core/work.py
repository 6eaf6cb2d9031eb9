"""One client's work: an algorithm's generator driven to its end against one site's model. Every executor runs this."""

from __future__ import annotations

import traceback
from collections.abc import Generator, Iterator
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from polyfed.core import metrics, wire
from polyfed.core.algorithm import Algorithm, Env, Fit, Predict, Request
from polyfed.core.errors import ClientError, PolyfedError, UsageError
from polyfed.core.message import Memory, Message
from polyfed.core.protocols import Job, Reply, Site
from polyfed.core.rows import Rows
from polyfed.core.tree import Tree, is_under, part_of

Result = TypeVar("Result")
LAST_LINES = 12
#: What stands between a user's file and a caller of it, and tells the user nothing: this package, and `runpy`.
_OURS = str(Path(__file__).resolve().parents[1])
_NOBODYS = ("<frozen ", _OURS)


def drive(steps: Generator[Request, Any, Result], site: Site, env: Env) -> Result:
    """Answers every request of a generator from the site's model."""
    answer: Any = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        answer = ask(site, request, env)


def ask(site: Site, request: Request, env: Env) -> Any:
    """One request's answer, `Fitted` or an array, from the site's model; at the server for one of ``env.trainers``."""
    rows = site.train if request.rows is None else request.rows
    if not isinstance(request, Fit):
        return site.model.predict(request, rows, env)
    if site.trains:
        request = replace(request, part=_thawed(site, request))
    return site.model.fit(request, rows, replace(env, draw=request.draw) if request.draw else env)


def at_server(site: Site, env: Env) -> Env:
    """What a model in ``env.trainers`` is asked in: its rows are the public ones, under every driver, and its own none."""
    return replace(env, public=site.train, train=None, group=site.group)


def _thawed(site: Site, request: Fit) -> tuple[str, ...]:
    """What a request trains of a model a part of which is frozen."""
    part = tuple(name for name in site.trains if not request.part or is_under(name, request.part))
    if not part:
        raise UsageError(
            f"{site.name} is asked to train {', '.join(request.part)}, all of which it keeps frozen; freeze less"
        )
    return part


def evaluate(
    algorithm: Algorithm, message: Message, memory: Memory, site: Site, env: Env, rows: Rows | None
) -> Message:
    """Metrics on the client's own rows: of its personal model, and of the shared one by itself.

    Numbers are named ``accuracy``, ``auc``, ... for the client's model, and ``shared/accuracy``, ... for the model that
    the server's message alone makes, where that differs. ``num_examples`` counts the rows.
    """
    if rows is None or not len(rows) or rows.target is None:
        return Message(numbers={"num_examples": 0.0})
    numbers: dict[str, float] = {"num_examples": float(len(rows))}
    numbers |= scores(site, personal(algorithm, message, memory, site, env), rows, env)
    shared = algorithm.start(message, Message())
    covered = {name for tree in shared for name in tree}
    own = {name for name in memory.trees.get("own", ()) if part_of(name) != "buffers"}
    if own and covered >= own:
        numbers |= {f"shared/{name}": value for name, value in scores(site, shared, rows, env).items()}
    return Message(numbers=numbers)


def personal(algorithm: Algorithm, message: Message, memory: Memory, site: Site, env: Env) -> tuple[Tree, ...]:
    """Trees that, laid over the first state, make the model by which the client predicts."""
    return drive(algorithm.personalise(message, memory, env), site, env)


def scores(site: Site, start: tuple[Tree, ...], rows: Rows, env: Env) -> dict[str, float]:
    """Metrics of one state on rows."""
    assert rows.target is not None
    outputs = site.model.predict(Predict(start=start, rows=rows.unlabelled()), rows, env)
    return metrics.all_of(outputs, rows.target, site.problem)


def perform(algorithm: Algorithm, site: Site, job: Job, *, seed: int) -> Reply:
    """Does a job; a client's failure becomes part of the reply, never an exception.

    An evaluate task is done on the rows that ``job.task.part`` names and leaves the memory as it is; every other kind
    runs the algorithm's `client_update`. The answer is a function of the arguments alone, wherever it runs.
    """
    env = site.env(seed, job.task)
    try:
        if job.task.kind == "evaluate":
            rows = {"train": site.train, "validation": site.validation, "test": site.test}[job.task.part]
            env = replace(env, number=job.task.version)
            message = evaluate(algorithm, job.message, job.memory, site, env, rows)
            return Reply(job.task, message, job.memory)
        message, memory = _returned(drive(algorithm.client_update(job.message, job.memory, env), site, env))
    except (Exception, SystemExit) as error:  # noqa: BLE001  # a client's own code may raise anything, or call exit()
        return Reply(job.task, None, job.memory, failure(site.name, error))
    return Reply(job.task, message, memory)


def _returned(found: Any) -> tuple[Message, Memory]:
    """What a user's own `client_update` returned, if it is what it promised."""
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(part, Message) for part in found):
        kinds = [type(part).__name__ for part in found] if isinstance(found, tuple) else [type(found).__name__]
        raise UsageError(f"client_update returned ({', '.join(kinds)}), wanted (Message, Memory)")
    for name, tree in [*found[0].trees.items(), *found[1].trees.items()]:
        if not isinstance(tree, Tree):
            raise UsageError(f"client_update returned a {type(tree).__name__} as tree {name!r}, wanted a Tree")
    for name, value in [*found[0].numbers.items(), *found[1].numbers.items()]:
        if not isinstance(value, Real):
            raise UsageError(f"client_update returned a {type(value).__name__} as number {name!r}, wanted a number")
    for what, message in zip(("an update", "a memory"), found, strict=True):
        _check_form(what, message)
    return found


def _check_form(what: str, message: Message) -> None:
    """That names and texts are some that can be sent and stored; values of numbers are the server's to judge."""
    try:
        wire.size(replace(message, numbers=dict.fromkeys(message.numbers, 0.0)))
    except (UsageError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"client_update returned {what} that has no form on the wire: {error}") from None


def failure(client: str, error: BaseException) -> ClientError:
    """What a person needs of a client's exception: type, message, and where in the user's own files it was raised."""
    if isinstance(error, ClientError):
        return error
    kept = () if isinstance(error, PolyfedError) else tuple(_lines(error))
    return ClientError(client, type(error).__name__, str(error), kept)


def _lines(error: BaseException) -> list[str]:
    """The last frames outside this package, then the exception; at most `LAST_LINES`, and a frame is whole or not there."""
    end = [line for text in traceback.format_exception_only(error) for line in text.rstrip().splitlines()][-LAST_LINES:]
    kept: list[str] = []
    for frame in reversed([list(_frame(each)) for each in traceback.extract_tb(error.__traceback__)]):
        if len(frame) + len(kept) + len(end) > LAST_LINES:
            break
        kept = frame + kept
    return kept + end


def _frame(frame: traceback.FrameSummary) -> Iterator[str]:
    """A frame as Python prints it, without the marks below the line; nothing for one that is not the user's."""
    if frame.filename.startswith(_NOBODYS):
        return
    yield f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}'
    if frame.line:
        yield f"    {frame.line}"
