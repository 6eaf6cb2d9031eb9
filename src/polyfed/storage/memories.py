"""Client memories as files: one a receipt, written before the upload that it belongs to is reported."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from polyfed.core import wire
from polyfed.core.errors import CorruptError, PeerError, StorageError
from polyfed.core.message import Memory
from polyfed.storage.files import write_whole

_RECEIPT = re.compile(r"\d{1,12}(\.\d{1,12}){2}")
_LIMITS = wire.Limits(max_bytes=1 << 62)


class FileMemories:
    """Memories in a folder, by receipt; a memory counts only once its receipt is accepted (see `ClientMemory`).

    Guarantees: a file is whole or absent; what `put` returned from survives a crash.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, receipt: str, memory: Memory) -> None:
        path = self._path(receipt)
        try:
            write_whole(path, wire.encode(memory))
        except OSError as error:
            raise StorageError(f"a client's memory cannot be written to {path}: {error}") from error

    def get(self, receipt: str) -> Memory:
        path = self._path(receipt)
        try:
            return wire.decode(path.read_bytes(), _LIMITS)
        except FileNotFoundError as error:
            raise CorruptError(f"the memory of receipt {receipt} is not in {self.folder}") from error
        except PeerError as error:
            raise CorruptError(f"{path} cannot be read back: {error}") from error

    def keep(self, receipts: Collection[str]) -> None:
        """Removes every memory but those of these receipts; one that cannot be removed stays, which costs room alone."""
        for path in self.folder.glob("*.memory"):
            if path.stem not in receipts:
                with suppress(OSError):
                    path.unlink()

    def _path(self, receipt: str) -> Path:
        if not _RECEIPT.fullmatch(receipt):
            raise StorageError(f"{receipt!r} is no receipt")
        return self.folder / f"{receipt}.memory"
