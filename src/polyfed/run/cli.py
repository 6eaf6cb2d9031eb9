"""The command line. Every command ends with one of these codes, and never with a traceback (but see POLYFED_DEBUG):

| code | meaning |
|---|---|
| 0 | done: every client took part in every round, every target was reached |
| 1 | failed: no quorum, a file that cannot be written or read, or an error in the user's own file |
| 2 | the command, the file or its arguments cannot be used; the message says what to write instead |
| 3 | finished, but not as asked: a client failed or was left out of a round, or a target was not reached |
| 130 | interrupted (Ctrl-C); what there was by then is shown |
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from polyfed.run.demo import Demo
    from polyfed.run.result import Result

DONE, FAILED, USAGE, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130
CODES = (
    "Exit codes: 0 done, 1 failed, 2 usage, 3 finished but a client was left out or a target missed, 130 interrupted."
)
LAST_LINES = 6

Args = ParamSpec("Args")
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else there.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the run.", min=0)]
Limit = Annotated[int | None, typer.Option(help="Rounds of each federation.", min=1)]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated learning for participants who differ: models, frameworks, data and machines in one federation.",
    epilog=CODES,
)
demos = typer.Typer(no_args_is_help=True, help="Federations on real data that comes with polyfed.", epilog=CODES)
app.add_typer(demos, name="demo")


def _version(wanted: bool) -> None:
    if wanted:
        from polyfed import __version__

        print(f"polyfed {__version__}")  # noqa: T201  # the command line prints
        raise typer.Exit


@app.callback()
def start(
    *,
    version: Annotated[  # noqa: ARG001  # `_version` has answered it
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; so does POLYFED_DEBUG=1.")] = False,
) -> None:
    if debug:
        os.environ["POLYFED_DEBUG"] = "1"


# ---------------------------------------------------------------------------------------------- ends


def ends(command: Callable[Args, int]) -> Callable[Args, None]:
    """A command that returns its exit code; what goes wrong becomes one message and a code."""

    @functools.wraps(command)
    def run(*args: Args.args, **kwargs: Args.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            code = command(*args, **kwargs)
        except KeyboardInterrupt:
            code = _said("interrupted", INTERRUPTED, as_json=as_json)
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:  # the reader has had enough (polyfed datasets | head)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = FAILED
        except Exception as error:  # a user's file may raise anything; it becomes a message
            if os.environ.get("POLYFED_DEBUG"):
                raise
            code = _failed(error, as_json=as_json)
        raise typer.Exit(code)

    return run


def _failed(error: Exception, *, as_json: bool) -> int:
    from polyfed.core.errors import PolyfedError, UsageError
    from polyfed.core.work import failure

    result = getattr(error, "result", None)
    if isinstance(error, UsageError):
        return _said(str(error), USAGE, as_json=as_json)
    if isinstance(error, PolyfedError):
        return _said(str(error), FAILED, as_json=as_json, result=result)
    lines = list(failure("the file", error).lines[-LAST_LINES:])
    while len(lines) > 1 and not lines[0].startswith("  File"):  # the rest of a frame that was cut
        del lines[0]
    told = "\n".join([f"{type(error).__name__}: {error}", *(f"    {line}" for line in lines[:-1])])
    return _said(told, FAILED, as_json=as_json)


def _said(message: str, code: int, *, as_json: bool, result: Result | None = None) -> int:
    print(f"error: {message}" if code != INTERRUPTED else message, file=sys.stderr)  # noqa: T201  # the command line prints
    if as_json:
        _print_json(
            {"error": message, "code": code} | ({} if result is None else {"result": result.to_dict()}),
        )
    return code


def _print_json(said: dict[str, Any]) -> None:
    print(json.dumps(said, indent=1, allow_nan=False))  # noqa: T201  # as above


def code_of(result: Result) -> int:
    """The exit code that a result stands for."""
    if result.interrupted:
        return INTERRUPTED
    return DONE if result.is_complete else INCOMPLETE


@contextlib.contextmanager
def _stdout_kept(*, wanted: bool) -> Iterator[None]:
    """While somebody waits for JSON, everything that prints meanwhile goes to standard error, also from workers."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _console(*, as_json: bool) -> Console:
    from rich.console import Console

    return Console(stderr=as_json)


# ---------------------------------------------------------------------------------------------- commands


@demos.command(epilog=CODES)
@ends
def hospitals(
    seed: Annotated[int, typer.Option(help="Seed of the first division of the patients.", min=0)] = 0,
    splits: Annotated[int, typer.Option(help="Divisions of the patients; 1 gives no interval.", min=1)] = 5,
    rounds: Limit = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    page: Annotated[bool, typer.Option(help="Whether to write a page.")] = True,
    as_json: Json = False,
) -> int:
    """Four hospitals with four kinds of model learn together on real patients, in two ways."""
    from polyfed.run import demo
    from polyfed.run.live import Table

    console = _console(as_json=as_json)
    _check_page(out if page else None)
    with _stdout_kept(wanted=as_json):
        found = demo.run(
            seed=seed,
            splits=splits,
            rounds=rounds,
            out=out if page else None,
            watch=Table(console),
            say=lambda text: console.print(text, style="bold", highlight=False),
        )
        _show_demo(found, console)
    if as_json:
        _print_json(found.to_dict())
    if found.interrupted is not None:
        return INTERRUPTED
    return max((code_of(result) for results in found.runs.values() for result in results), default=DONE)


def _check_page(path: Path | None) -> None:
    """Refuses a page that could not be written before a minute is spent on what it would say."""
    from importlib.util import find_spec

    from polyfed.core.errors import MissingExtraError, StorageError

    if path is None:
        return
    if find_spec("jinja2") is None:
        raise MissingExtraError("jinja2", "report")
    if path.is_dir():
        raise StorageError(f"{path} is a folder; name a file, such as {path / 'report.html'}")
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if there != path and not there.is_dir():
        raise StorageError(f"{path} cannot be written: {there} is a file")
    _try_file(path, there)


def _try_file(path: Path, there: Path) -> None:
    """Really opens a file: rights alone do not tell of a full or read-only disk."""
    import tempfile

    from polyfed.core.errors import StorageError

    try:
        with there.open("ab") if there.is_file() else tempfile.TemporaryFile(dir=there) as file:
            file.flush()
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def _show_demo(found: Demo, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Grid

    from polyfed.run.demo import MODES

    if found.interrupted is not None:
        console.print("\ninterrupted; so far:", style="bold")
        console.print(found.interrupted.table(), highlight=False, soft_wrap=True)
    if not found.runs["rows"]:
        return
    for mode, words in MODES.items():
        if not found.runs[mode]:
            continue
        console.print(f"AUC on test patients; {words}", style="bold", highlight=False)
        grid = Grid(box=SIMPLE_HEAD, pad_edge=False)
        grid.add_column("site", no_wrap=True, min_width=12)
        for head in ("alone", "pooled", "federated", "gain over alone"):
            grid.add_column(head, justify="right", no_wrap=True)
        for site in [*found.sites, ""]:
            grid.add_row(*_demo_cells(found.row(site), mode), end_section=site == found.sites[-1])
        console.print(grid)
    console.print(found.what_the_interval_is, highlight=False)
    if found.page is not None:
        console.print(f"page: {found.page}", highlight=False, soft_wrap=True)
    console.print(f"{found.seconds:.1f} s", style="dim", highlight=False)


def _demo_cells(row: dict[str, Any], mode: str) -> list[str]:
    numbers = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("alone", "pooled", mode)]
    return [row["site"], *numbers, str(row[f"{mode} gain"] or "-")]


@app.command(epilog=CODES)
@ends
def run(
    file: Annotated[Path, typer.Argument(help="A Python file, see above; or a folder with a federation.py.")],
    rounds: Limit = None,
    seed: Seed = None,
    executor: Annotated[str | None, typer.Option(help='"loop" or "processes".')] = None,
    out: Annotated[Path | None, typer.Option(help="A page to write.")] = None,
    save: Annotated[Path | None, typer.Option(help="A folder for state, models and numbers.")] = None,
    as_json: Json = False,
) -> int:
    """Run the federation that FILE describes, with a live table.

    FILE defines federation(), which returns a dict of the arguments of pf.simulate (algorithm, clients, rounds, ...); or
    main(), which returns a result; or it runs pf.simulate itself and keeps what it returns as `result`.
    """
    from polyfed.run.live import Table
    from polyfed.run.scripts import result_of
    from polyfed.run.simulate import WATCH

    console = _console(as_json=as_json)
    _check_page(out)
    given = {"rounds": rounds, "seed": seed, "executor": executor}
    with _stdout_kept(wanted=as_json):
        token = WATCH.set(Table(console))
        try:
            result = result_of(file, {name: value for name, value in given.items() if value is not None})
        finally:
            WATCH.reset(token)
    console.print()
    console.print(result.table(), highlight=False, soft_wrap=True, markup=False)
    for error in result.errors.values():
        lines = "".join(f"\n    {line}" for line in error.lines)
        console.print(f"{error}{lines}", highlight=False, soft_wrap=True, markup=False, style="red")
    if as_json:
        _print_json(result.to_dict())
    with _stdout_kept(wanted=as_json):
        code = _written(result, file, out=out, save=save)
    return code or code_of(result)


def _written(result: Result, file: Path, *, out: Path | None, save: Path | None) -> int:
    """Writes the folder and the page after the result was shown; what goes wrong now costs a code, not the result."""
    try:
        if save is not None:
            result.save(save)
        if out is not None:
            result.report(out, title=file.stem)
    except Exception as error:  # each kind ends as a message: the training is done
        if os.environ.get("POLYFED_DEBUG"):
            raise
        return _said(str(error) or type(error).__name__, FAILED, as_json=False)
    return DONE


@app.command(epilog=CODES)
@ends
def new(name: Annotated[Path, typer.Argument(help="The folder to make.")]) -> int:
    """Write a small project that runs at once, offline: a federation, its test, a page of text."""
    from polyfed.run.new import create

    for path in create(name):
        print(path)  # noqa: T201  # as above
    print(f"\nRun it:  cd {name} && polyfed run federation.py")  # noqa: T201  # as above
    return DONE


@app.command(epilog=CODES)
@ends
def version(as_json: Json = False) -> int:
    """Print the version; with --json those of everything that decides bits."""
    from polyfed import __version__

    if not as_json:
        print(f"polyfed {__version__}")  # noqa: T201  # as above
        return DONE
    from polyfed.run.result import versions

    _print_json(versions())
    return DONE


@app.command(epilog=CODES)
@ends
def datasets(as_json: Json = False) -> int:
    """List the real data that comes with polyfed."""
    from polyfed.data import datasets as home

    found = [home.heart(), home.thyroid(), home.mfeat(), home.digits(), home.traffic()]
    if as_json:
        _print_json({each.name: {"clients": each.rows, "target": each.target, "source": each.source} for each in found})
        return DONE
    for each in found:
        rows = ", ".join(f"{name} {count}" for name, count in each.rows.items())
        print(f"pf.datasets.{each.name}()  target: {each.target}\n    {rows}\n    {each.source}")  # noqa: T201  # as above
    return DONE


def main() -> None:
    """The entry point `polyfed`."""
    try:
        app()
    except KeyboardInterrupt:  # before a command began, or while it said its last words
        sys.exit(INTERRUPTED)
