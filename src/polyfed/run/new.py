"""`polyfed new NAME`: a small project that runs at once, offline, and has a test."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from string import Template

from polyfed.core.errors import StorageError, UsageError

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
#: file of the project -> its template.
FILES = {
    "federation.py": "federation.py.txt",
    "test_federation.py": "test_federation.py.txt",
    "README.md": "README.md.txt",
}


def create(folder: Path) -> list[Path]:
    """Writes the project's files; `folder` must not be there yet.

    Raises:
        UsageError: the name cannot be used, or the folder is there.
        StorageError: it cannot be written.
    """
    if not NAME.fullmatch(folder.name):
        raise UsageError(
            f"{folder.name!r} cannot be a project's name: use letters, digits, '_', '.', '-'; a letter first"
        )
    if folder.exists():
        raise UsageError(f"{folder} is there already; choose another name")
    try:
        folder.mkdir(parents=True)
        return [_write(folder / name, template) for name, template in FILES.items()]
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from error


def _write(path: Path, template: str) -> Path:
    text = resources.files("polyfed.run").joinpath("templates", template).read_text(encoding="utf-8")
    path.write_text(Template(text).substitute(name=path.parent.name), encoding="utf-8")
    return path
