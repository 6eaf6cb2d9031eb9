"""A file is whole or not there, and its name is as durable as its bytes."""

import os
from pathlib import Path

import pytest

from polyfed.storage.files import write_whole


def test_write_whole_when_done_left_the_bytes_and_synced_file_and_folder(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(str(Path(f"/proc/self/fd/{file}").readlink())), real(file))
    )
    write_whole(tmp_path / "a.memory", [b"one", memoryview(b"two")])
    assert (tmp_path / "a.memory").read_bytes() == b"onetwo"
    assert synced == [str(tmp_path / "a.part"), str(tmp_path)]


def test_write_whole_when_it_fails_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "a.memory").write_bytes(b"before")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "a.memory", [b"after"])
    assert (tmp_path / "a.memory").read_bytes() == b"before"
