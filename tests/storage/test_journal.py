from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from polyfed.core.checks_store import check_journal
from polyfed.core.errors import CorruptError, StorageError
from polyfed.storage import journal as journal_file
from polyfed.storage.journal import MAGIC, FileJournal, MemoryJournal, frame, read_journal, scan

BATCHES = [[b"one"], [b"two", b""], [b"x" * 700, b"three"], [b"four"]]


def written(path: Path) -> bytes:
    with FileJournal(path) as journal:
        for batch in BATCHES:
            journal.append(batch)
    return path.read_bytes()


def ends() -> list[int]:
    """Where each whole frame ends."""
    found, check = [len(MAGIC)], 0
    for batch in BATCHES:
        data, check = frame(batch, check)
        found.append(found[-1] + len(data))
    return found


def test_a_file_journal_keeps_the_contract(tmp_path: Path) -> None:
    check_journal(lambda: FileJournal(tmp_path / "journal"))


def test_a_memory_journal_keeps_the_contract() -> None:
    journal = MemoryJournal()
    check_journal(lambda: journal)


def test_a_journal_when_cut_at_any_byte_holds_every_whole_append_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    data, edges = written(path), ends()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        whole = sum(edge <= size for edge in edges[1:])
        expected = [record for batch in BATCHES[:whole] for record in batch]
        assert scan(data[:size])[0] == expected, f"cut at byte {size}"
        if size % 7 == 0 or size in edges:
            with FileJournal(path) as journal:
                assert journal.read() == expected
                journal.append([b"on"])
                assert journal.read() == [*expected, b"on"]


def test_a_journal_when_sectors_of_the_last_append_were_never_written_holds_the_others() -> None:
    rng = Random(5)
    data, check = MAGIC, 0
    for number in range(300):
        last, check = frame([rng.randbytes(rng.randrange(1, 900))], check)
        start, stop = len(data), len(data) + len(last)
        edges = [start, *range(start - start % 512 + 512, stop, 512), stop]
        for a, b in pairwise(edges):
            torn = bytearray(data + last)
            torn[a:b] = bytes(b - a)
            if torn != data + last:
                assert len(scan(bytes(torn))[0]) == number, f"bytes {a}:{b} of append {number}"
        data += last


def test_a_journal_when_its_file_grew_by_zeros_only_holds_what_was_written(tmp_path: Path) -> None:
    data = written(tmp_path / "journal")
    assert scan(data + bytes(3000))[0] == [record for batch in BATCHES for record in batch]


def test_a_journal_when_any_bit_of_an_acknowledged_append_changed_is_refused(tmp_path: Path) -> None:
    data, edges = written(tmp_path / "journal"), ends()
    for at in range(len(MAGIC), len(data)):
        for bit in (0, 7):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(CorruptError):
                scan(bytes(damaged))
    assert scan(data)[1] == edges[-1]


def test_a_journal_when_an_append_was_taken_out_or_moved_is_refused(tmp_path: Path) -> None:
    data, edges = written(tmp_path / "journal"), ends()
    first, second = data[edges[0] : edges[1]], data[edges[1] : edges[2]]
    with pytest.raises(CorruptError):
        scan(data[: edges[1]] + data[edges[2] :])
    with pytest.raises(CorruptError):
        scan(data[: edges[0]] + second + first + data[edges[2] :])


def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary, today I was not a journal")
    with pytest.raises(CorruptError, match="no journal"):
        FileJournal(path)
    assert path.read_text().startswith("dear diary")


def test_a_record_that_reaches_beyond_its_frame_is_refused() -> None:
    body = (100).to_bytes(4, "little") + b"short"
    check = journal_file.zlib.crc32(body)
    head = len(body).to_bytes(4, "little") + check.to_bytes(4, "little")
    with pytest.raises(CorruptError, match="beyond"):
        scan(MAGIC + head + journal_file.zlib.crc32(head).to_bytes(4, "little") + body)


# ---------------------------------------------------------------------------------------- one writer


def test_a_journal_when_it_is_open_in_this_process_is_refused_and_stays_locked(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with FileJournal(path) as journal:
        for _ in range(2):
            with pytest.raises(StorageError, match="open already"):
                FileJournal(path)
        assert _opens_elsewhere(path) == "StorageError"
        journal.append([b"still mine"])
        assert read_journal(path) == [b"still mine"]
        assert _opens_elsewhere(path) == "StorageError"
    assert _opens_elsewhere(path) == "opened"


def _opens_elsewhere(path: Path) -> str:
    code = """
import sys
from polyfed.storage.journal import FileJournal
try:
    FileJournal(sys.argv[1]).close()
    print("opened")
except Exception as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_journal_when_its_writer_was_forked_and_died_can_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    code = """
import os, sys, time
from polyfed.storage.journal import FileJournal
journal = FileJournal(sys.argv[1])
if os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
print("ready", flush=True)
os._exit(0)
"""
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    assert parent.stdout.readline() == "ready\n"
    parent.wait()
    FileJournal(path).close()  # the child lives on, waiting for its input
    parent.stdin.close()
    parent.stdout.close()


def test_a_closed_journal_when_appended_to_says_so(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "journal")
    journal.close()
    journal.close()
    with pytest.raises(StorageError, match="closed"):
        journal.append([b"late"])


def test_a_journal_in_a_folder_that_is_not_there_names_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent"):
        FileJournal(tmp_path / "absent" / "journal")
    with pytest.raises(StorageError, match="absent"):
        read_journal(tmp_path / "absent")


def test_a_journal_when_its_path_is_a_folder_lets_go_of_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.mkdir()
    with pytest.raises(StorageError, match="cannot be opened"):
        FileJournal(path)
    path.rmdir()
    FileJournal(path).close()


# ---------------------------------------------------------------------------------------- full disks


def _failing(right: Callable[..., int], fails_at: int, do: Callable[..., int] | None = None) -> Callable[..., int]:
    calls = 0

    def call(*args):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            if do is not None:
                do(*args)
            raise OSError(errno.ENOSPC, "no space left on the device")
        return right(*args)

    return call


@pytest.mark.parametrize("name", ["pwrite", "fsync", "ftruncate"])
@pytest.mark.parametrize("is_partial", [False, True])
def test_an_append_when_the_nth_call_fails_leaves_nothing_and_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_partial: bool
) -> None:
    """Every call of the file system that an append makes fails once; and the mending after it fails too."""
    right = getattr(os, name)
    half = (lambda file, data, at: right(file, data[: len(data) // 2], at)) if is_partial and name == "pwrite" else None
    for fails_at in range(1, 12):
        path = tmp_path / f"journal{fails_at}"
        journal, kept = FileJournal(path), []
        monkeypatch.setattr(journal_file.os, name, _failing(right, fails_at, half))
        failures = 0
        for batch in BATCHES:
            try:
                journal.append(batch)
            except StorageError:
                failures += 1
                assert read_journal(path) in (kept, [*kept, *batch])  # after a failed sync it may be there or not
                journal.append(batch)
            kept += batch
            assert journal.read() == kept
        monkeypatch.setattr(journal_file.os, name, right)
        journal.close()
        assert read_journal(path) == kept
        assert failures <= 1


def test_an_append_when_nothing_works_any_more_fails_until_it_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = FileJournal(tmp_path / "journal")
    journal.append([b"before"])

    def full(*args):
        raise OSError(errno.ENOSPC, "no space left on the device")

    with monkeypatch.context() as patch:
        for name in ("pwrite", "fsync", "ftruncate"):
            patch.setattr(journal_file.os, name, full)
        for _ in range(3):
            with pytest.raises(StorageError, match="no space"):
                journal.append([b"lost"])
    journal.append([b"after"])
    assert journal.read() == [b"before", b"after"]
    journal.close()


def test_an_append_when_the_system_writes_in_small_pieces_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = os.pwrite
    monkeypatch.setattr(journal_file.os, "pwrite", lambda file, data, at: right(file, data[:5], at))
    with FileJournal(tmp_path / "journal") as journal:
        journal.append([b"more than five bytes"])
        assert journal.read() == [b"more than five bytes"]


def test_a_new_journal_is_on_the_disk_with_its_folder_before_anything_is_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    right = os.fsync

    def fsync(file):
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        right(file)

    monkeypatch.setattr(journal_file.os, "fsync", fsync)
    with FileJournal(tmp_path / "journal") as journal:
        assert synced == [str(tmp_path / "journal"), str(tmp_path)]
        journal.append([b"one"])
    assert synced[2:] == [str(tmp_path / "journal")]


# ---------------------------------------------------------------------------------------- killed processes

WRITER = """
import os, signal, sys
from polyfed.storage import journal
name, step, half = sys.argv[2], int(sys.argv[3]), sys.argv[4] == "half"
right, calls = getattr(os, name), 0
def call(*args):
    global calls
    calls += 1
    if calls == step:
        if half:
            right(args[0], args[1][: len(args[1]) // 2], *args[2:]) if name == "pwrite" else right(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    return right(*args)
setattr(journal.os, name, call)
found = journal.FileJournal(sys.argv[1])
for number in range(len(found.read()) // 2, 4):
    found.append([b"%d" % number, b"and its pair"])
    print(number, flush=True)
"""


@pytest.mark.parametrize(("name", "steps"), [("pwrite", (1, 2, 3, 5)), ("fsync", (1, 2, 3, 4, 6)), ("ftruncate", (1,))])
@pytest.mark.parametrize("how", ["before", "half"])
def test_a_writer_when_killed_at_a_step_of_its_writing_loses_nothing_that_it_had_acknowledged(
    tmp_path: Path, name: str, steps: tuple[int, ...], how: str
) -> None:
    for step in steps:
        path = tmp_path / f"journal{step}"
        done = subprocess.run(
            [sys.executable, "-c", WRITER, path, name, str(step), how], capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        acknowledged = len(done.stdout.split())
        found = read_journal(path) if path.exists() else []
        assert len(found) in (2 * acknowledged, 2 * acknowledged + 2), "a pair was torn, or lost"
        again = subprocess.run(
            [sys.executable, "-c", WRITER, path, name, "0", how], capture_output=True, text=True, check=True
        )
        assert len(again.stdout.split()) == 4 - len(found) // 2
        assert read_journal(path) == [part for n in range(4) for part in (b"%d" % n, b"and its pair")]
