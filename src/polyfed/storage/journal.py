"""The journal as a file: what `append` returned from survives a crash of the process and of the machine.

A file is `MAGIC`, then one frame for each append, so that the records of one append are there together or not at all:

    length    u32, of the body
    check     u32, CRC-32 of the body, continued from the check of the frame before: a frame lost or moved is seen
    head      u32, CRC-32 of these two, so that a damaged length is not taken for a torn frame
    body      each record as its length (u32) and its bytes

A crash while a frame is written leaves a torn tail: fewer bytes than the frame says, or sectors at the end that were
never written and read as zeros. It was not acknowledged and is cut off. Anything else that does not check is damage,
and raises `CorruptError`.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from polyfed.core.errors import CorruptError, StorageError
from polyfed.storage.files import sync_folder

MAGIC = b"polyfed journal 1\n"
_HEAD = struct.Struct("<III")
_LENGTH = struct.Struct("<I")
#: Disks write whole sectors; of one that was never written a crash leaves zeros.
_SECTOR = 512

#: Lock files that this process holds: a POSIX lock keeps out other processes only.
_held: set[tuple[int, int]] = set()


def frame(records: Sequence[bytes], check: int) -> tuple[bytes, int]:
    """One append as bytes, after a frame with this check; returns its own check too."""
    body = b"".join([part for record in records for part in (_LENGTH.pack(len(record)), record)])
    check = zlib.crc32(body, check)
    return _HEAD.pack(len(body), check, zlib.crc32(_LENGTH.pack(len(body)) + _LENGTH.pack(check))) + body, check


def scan(data: bytes) -> tuple[list[bytes], int, int]:
    """The records of a journal's bytes, where its whole frames end, and the check of the last one.

    Raises:
        CorruptError: the bytes are not a journal that was cut short, at worst, while it was written.
    """
    if not data.startswith(MAGIC):
        if MAGIC.startswith(data) or not any(data):
            return [], 0, 0  # a crash while it was created
        raise CorruptError("this file is no journal: it does not begin with the line that every journal begins with")
    records: list[bytes] = []
    end, check = len(MAGIC), 0
    while end < len(data):
        body = _body(data, end, check)
        if body is None:
            break
        records += _split(body, end)
        check = zlib.crc32(body, check)
        end += _HEAD.size + len(body)
    return records, end, check


def _body(data: bytes, at: int, before: int) -> bytes | None:
    """The body of the frame at `at`; None if it is the torn tail."""
    if len(data) - at < _HEAD.size:
        return None
    if not _is_head(data, at):
        if _is_unwritten(data, at, at + _HEAD.size) and not any(_is_head(data, i) for i in range(at + 1, len(data))):
            return None
        raise CorruptError(f"the journal is damaged at byte {at}: the head of a frame does not check")
    length, check, _ = _HEAD.unpack_from(data, at)
    stop = at + _HEAD.size + length
    if stop > len(data):
        return None
    body = data[at + _HEAD.size : stop]
    if zlib.crc32(body, before) == check:
        return body
    if stop == len(data) and _is_unwritten(data, at, stop):
        return None
    raise CorruptError(f"the journal is damaged at byte {at}: a frame of {length} bytes does not check")


def _is_head(data: bytes, at: int) -> bool:
    return at + _HEAD.size <= len(data) and zlib.crc32(data[at : at + 8]) == _LENGTH.unpack_from(data, at + 8)[0]


def _is_unwritten(data: bytes, start: int, stop: int) -> bool:
    """Whether some sector's share of these bytes is all zeros."""
    edges = [start, *range(start - start % _SECTOR + _SECTOR, stop, _SECTOR), stop]
    return any(not any(data[a:b]) for a, b in pairwise(edges))


def _split(body: bytes, at: int) -> list[bytes]:
    records, start = [], 0
    while start < len(body):
        (length,) = _LENGTH.unpack_from(body, start) if start + 4 <= len(body) else (len(body),)
        stop = start + 4 + length
        if stop > len(body):
            raise CorruptError(f"the journal is damaged at byte {at}: a record reaches beyond its frame")
        records.append(body[start + 4 : stop])
        start = stop
    return records


def read_journal(path: str | os.PathLike[str]) -> list[bytes]:
    """The durable records of a journal that somebody else may be writing; changes nothing.

    Raises:
        StorageError: it cannot be read.
        CorruptError: it is damaged.
    """
    try:
        return scan(Path(path).read_bytes())[0]
    except OSError as error:
        raise StorageError(f"the journal {path} cannot be read: {error}") from error


class FileJournal:
    """A journal in one file, with one writer at a time.

    Guarantees: what `append` returned from is on the disk, as is the file's entry in its folder; an append that raised
    left nothing behind and may be tried again.

    Raises:
        StorageError: the file cannot be made or read, or another writer has it.
        CorruptError: it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = _locked(self.path.with_name(self.path.name + ".lock"))
        self._file = -1
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _, self._end, self._check = scan(self.path.read_bytes())
            self._is_clean = False
            self._mend()
        except OSError as error:
            self.close()
            raise StorageError(f"the journal {path} cannot be opened: {error}") from error
        except StorageError:
            self.close()
            raise

    def _mend(self) -> None:
        """Cuts off what follows the last whole frame: a torn tail, or what a failed append left."""
        if self._is_clean:
            return
        os.ftruncate(self._file, self._end)
        if self._end == 0:
            _write(self._file, MAGIC, 0)
            self._end = len(MAGIC)
        os.fsync(self._file)
        sync_folder(self.path.parent)
        self._is_clean = True

    def append(self, records: Sequence[bytes]) -> None:
        """Writes records, durably, all or none; raises `StorageError` when it cannot, and may then be called again."""
        if self._file < 0:
            raise StorageError(f"the journal {self.path} is closed")
        if not records:
            return
        data, check = frame(records, self._check)
        try:
            self._mend()
            self._is_clean = False
            _write(self._file, data, self._end)
            os.fsync(self._file)
        except OSError as error:
            self._undo()
            raise StorageError(f"the journal {self.path} cannot be written: {error}") from error
        self._end, self._check, self._is_clean = self._end + len(data), check, True

    def _undo(self) -> None:
        try:
            self._mend()
        except OSError:
            return  # the next append mends first

    def read(self) -> list[bytes]:
        """Every durable record.

        Raises:
            CorruptError: the file is damaged.
        """
        return read_journal(self.path)

    def close(self) -> None:
        """Lets another writer in. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._lock >= 0:
            _held.discard(_identity(os.fstat(self._lock)))
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write(file: int, data: bytes, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], at + done)


def _locked(path: Path) -> int:
    """A held lock beside the journal: forked workers do not inherit it, and it ends with the process.

    A file of its own, because a process loses a POSIX lock as soon as it closes any handle of the locked file.
    """
    if path.exists() and _identity(path.stat()) in _held:
        raise StorageError(f"the journal beside {path} is open already in this process")
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"the journal's lock {path} cannot be made: {error}") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise StorageError(f"the journal beside {path} is written by another process") from error
    _held.add(_identity(os.fstat(file)))
    return file


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


class MemoryJournal:
    """A journal that lives as long as this process: for simulation and tests.

    >>> journal = MemoryJournal()
    >>> journal.append([b"one", b"two"])
    >>> journal.read()
    [b'one', b'two']
    """

    def __init__(self) -> None:
        self._records: list[bytes] = []

    def append(self, records: Sequence[bytes]) -> None:
        """Keeps records."""
        self._records += records

    def read(self) -> list[bytes]:
        """Every record."""
        return list(self._records)

    def close(self) -> None:
        """Nothing is held."""
