from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from polyfed.core.checks_store import check_blobs
from polyfed.core.errors import CorruptError, StorageError
from polyfed.storage import blobs as blob_files
from polyfed.storage.blobs import FileBlobs, MemoryBlobs, digest_of


def test_file_blobs_keep_the_contract(tmp_path: Path) -> None:
    check_blobs(lambda: FileBlobs(tmp_path / "deep" / "blobs"))


def test_memory_blobs_keep_the_contract() -> None:
    blobs = MemoryBlobs()
    check_blobs(lambda: blobs)


def test_a_blob_when_damaged_is_refused_and_put_again_is_whole(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    digest = blobs.put(b"right")
    for wrong in (b"wrong", b"righ", b""):
        (tmp_path / digest).write_bytes(wrong)
        with pytest.raises(CorruptError, match="damaged"):
            blobs.get(digest)
        assert blobs.put(b"right") == digest
        assert blobs.get(digest) == b"right"


def test_a_name_that_is_a_path_never_reaches_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    blobs = FileBlobs(tmp_path / "blobs")
    for name in ("../secret", str(tmp_path / "secret"), "a" * 63 + "/", "\ud800" * 64):
        with pytest.raises(StorageError, match="no digest"):
            blobs.get(name)


def test_a_put_is_written_synced_renamed_and_its_folder_synced_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    blobs, sync, rename = FileBlobs(tmp_path), os.fsync, Path.rename

    def fsync(file):
        path = Path(f"/proc/self/fd/{file}").readlink()
        done.append(
            f"sync {path.name if path == tmp_path else path.name[:5]} {path.stat().st_size if path.is_file() else ''}"
        )
        sync(file)

    def renamed(self, target):
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr(blob_files.os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    blobs.put(b"12345")
    assert done == ["sync .put- 5", "rename", f"sync {tmp_path.name} "]
    done.clear()
    blobs.put(b"12345")
    assert done == [f"sync {tmp_path.name} "]  # whoever wrote it may have been killed before its folder was synced


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_put_when_the_disk_is_full_raises_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    blobs = FileBlobs(tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, "no space left on the device")

    with monkeypatch.context() as patch:
        patch.setattr(blob_files.os if step == "fsync" else Path, step, full)
        with pytest.raises(StorageError, match="no space"):
            blobs.put(b"bytes")
    assert list(tmp_path.iterdir()) == []
    assert blobs.get(blobs.put(b"bytes")) == b"bytes"


def test_keep_when_called_deletes_the_others_and_what_was_left_unfinished(tmp_path: Path) -> None:
    files, memory = FileBlobs(tmp_path), MemoryBlobs()
    (tmp_path / ".put-left").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not ours")
    for blobs, deleted in ((files, 2), (memory, 1)):
        kept, gone = blobs.put(b"kept"), blobs.put(b"gone")
        assert blobs.keep([kept, digest_of(b"never put")]) == deleted
        assert blobs.get(kept) == b"kept"
        with pytest.raises(CorruptError):
            blobs.get(gone)
    assert (tmp_path / "notes.txt").exists()


def test_blobs_in_a_place_that_cannot_be_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be made"):
        FileBlobs(tmp_path / "file" / "blobs")
    blobs = FileBlobs(tmp_path / "blobs")
    (tmp_path / "blobs" / digest_of(b"x")).mkdir()
    with pytest.raises(StorageError, match="cannot be read"):
        blobs.get(digest_of(b"x"))
