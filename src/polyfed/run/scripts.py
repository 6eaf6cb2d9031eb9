"""A user's file as `polyfed run FILE` runs it."""

from __future__ import annotations

import inspect
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyfed.core.errors import UsageError
from polyfed.run.result import Result
from polyfed.run.simulate import simulate

#: `__name__` in the file: a block under ``if __name__ == "__main__"`` is for ``python FILE`` and does not run.
NAME = "__polyfed__"


def result_of(file: Path, given: Mapping[str, Any]) -> Result:
    """Runs a file and returns its result.

    Args:
        file: a folder with a federation.py, or a file that defines federation(), or main(), or `result`: see `polyfed run --help`.
        given: arguments of `simulate` that go before those of federation().

    Raises:
        UsageError: there is no such file, or it defines none of the three.
    """
    if file.is_dir() and (file / "federation.py").is_file():
        file = file / "federation.py"
    if not file.is_file():
        raise UsageError(f"there is no file {file}; make a project with: polyfed new NAME")
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        found = runpy.run_path(str(file), run_name=NAME)
        return _result(file, found, given)
    finally:
        sys.path.remove(folder)


def _result(file: Path, found: Mapping[str, Any], given: Mapping[str, Any]) -> Result:
    if callable(found.get("federation")):
        made = found["federation"]()
        if isinstance(made, Result):
            return made
        return _simulated(file, made, given)
    if given:
        raise UsageError(f"{', '.join(given)}: {file} does not define federation(), which these options are for")
    made = found["main"]() if callable(found.get("main")) else found.get("result")
    if isinstance(made, Result):
        return made
    raise UsageError(
        f"{file} defines no federation(); write one that returns a dict of the arguments of pf.simulate, "
        "main() that returns a result, or result = pf.simulate(...)"
    )


def _simulated(file: Path, made: Any, given: Mapping[str, Any]) -> Result:
    if not isinstance(made, Mapping):
        raise UsageError(
            f"federation() of {file} returned a {type(made).__name__}, wanted a dict of simulate's arguments"
        )
    known = inspect.signature(simulate).parameters
    if unknown := [name for name in made if name not in known]:
        raise UsageError(
            f"federation() of {file} gives {unknown[0]!r}, which pf.simulate does not take; it takes {', '.join(known)}"
        )
    if missing := [name for name in ("algorithm", "clients") if name not in made]:
        raise UsageError(f"federation() of {file} gives no {missing[0]!r}")
    return simulate(**{**made, **given})
