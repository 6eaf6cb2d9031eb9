"""Content-addressed bytes: a blob's name is the digest of what it holds, so it is written once and never changes."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from polyfed.core.errors import CorruptError, StorageError
from polyfed.storage.files import sync_folder

_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = ".put-"


def digest_of(data: bytes) -> str:
    """BLAKE2b, 32 bytes, as 64 hex digits."""
    return blake2b(data, digest_size=32).hexdigest()


def _checked(digest: str) -> str:
    """A name may come from a stranger; nothing but a digest ever becomes part of a path."""
    if not _DIGEST.fullmatch(digest):
        raise StorageError(f"{digest[:80]!r} is no digest: wanted 64 digits 0-9a-f")
    return digest


class FileBlobs:
    """Blobs as files of one folder.

    Guarantees: what `put` returned from is on the disk; a file with a digest's name is whole, whenever the machine
    stopped; `get` returns what was put or raises. May be used from several threads and processes at once.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
        except OSError as error:
            raise StorageError(f"the folder {folder} cannot be made: {error}") from error

    def put(self, data: bytes) -> str:
        """Stores bytes durably and returns their digest; bytes that are there already are not written again.

        Raises:
            StorageError: they cannot be written; nothing was changed.
        """
        digest = digest_of(data)
        try:
            if not self._has(digest, data):
                self._write(digest, data)
            # Also where the file was there: whoever wrote it may have been killed before this.
            sync_folder(self.folder)
        except OSError as error:
            raise StorageError(f"a blob of {len(data)} bytes cannot be written to {self.folder}: {error}") from error
        return digest

    def _has(self, digest: str, data: bytes) -> bool:
        try:
            return (self.folder / digest).read_bytes() == data
        except FileNotFoundError:
            return False

    def _write(self, digest: str, data: bytes) -> None:
        file, name = tempfile.mkstemp(prefix=_UNFINISHED, dir=self.folder)
        try:
            with os.fdopen(file, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            Path(name).rename(self.folder / digest)
        except OSError:
            with suppress(OSError):
                Path(name).unlink()
            raise

    def get(self, digest: str) -> bytes:
        """The bytes of a digest.

        Raises:
            CorruptError: they are not there, or are not what was put.
            StorageError: this is no digest, or the file cannot be read.
        """
        try:
            data = (self.folder / _checked(digest)).read_bytes()
        except FileNotFoundError:
            raise CorruptError(f"the blob {digest} is not in {self.folder}") from None
        except OSError as error:
            raise StorageError(f"the blob {digest} cannot be read: {error}") from error
        if digest_of(data) != digest:
            raise CorruptError(f"the blob {digest} in {self.folder} is damaged: its bytes have another digest")
        return data

    def keep(self, digests: Collection[str]) -> int:
        """Deletes every blob but these, and what unfinished puts left; returns how many. Nobody may put meanwhile."""
        wanted = set(digests)
        found = [p for p in self.folder.iterdir() if _DIGEST.fullmatch(p.name) or p.name.startswith(_UNFINISHED)]
        unwanted = [path for path in found if path.name not in wanted]
        for path in unwanted:
            path.unlink(missing_ok=True)
        return len(unwanted)


class MemoryBlobs:
    """Blobs that live as long as this process.

    >>> blobs = MemoryBlobs()
    >>> blobs.get(blobs.put(b"bytes"))
    b'bytes'
    """

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    def put(self, data: bytes) -> str:
        """Keeps bytes and returns their digest."""
        digest = digest_of(data)
        self._blobs[digest] = bytes(data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of a digest; raises `CorruptError` if they are not there."""
        try:
            return self._blobs[_checked(digest)]
        except KeyError:
            raise CorruptError(f"the blob {digest} is not here") from None

    def keep(self, digests: Collection[str]) -> int:
        """Forgets every blob but these; returns how many."""
        unwanted = self._blobs.keys() - set(digests)
        for digest in unwanted:
            del self._blobs[digest]
        return len(unwanted)
