"""What every journal and every blob store promises, as tests that anybody can run over their own."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

from polyfed.core.errors import StorageError
from polyfed.core.protocols import Blobs, Journal

#: Lengths around the sizes at which buffers, sectors and pages end, and bytes that look like framing.
AWKWARD = (
    b"",
    b"\0",
    b"\n",
    b"\xff" * 4,
    b"{}",
    b"a" * 511,
    b"b" * 512,
    b"c" * 513,
    b"\0" * 4096,
    bytes(range(256)) * 300,
)


def check_journal(make: Callable[[], Journal]) -> None:
    """Raises `AssertionError`, saying which promise is broken, unless the journals that `make` opens keep them all.

    `make` is called three times and must open the same journal again, empty at first; the one before is let go of first
    (its `close` is called where it has one). Records come back in order, byte for byte, after appends of any size and
    after reopening; what was read may be changed by the reader; an append of nothing writes nothing.
    """
    journal = make()
    assert journal.read() == [], "a new journal must be empty"
    written: list[bytes] = []
    for batch in ((b"one",), (b"two", b"three"), AWKWARD, ()):
        journal.append(batch)
        written += batch
        assert journal.read() == written, (
            f"after {len(batch)} more records, {len(journal.read())} of {len(written)} came back"
        )
    journal.read().clear()
    assert journal.read() == written, "clearing the list that `read` returned has changed the journal"
    for last in (b"reopened", b"reopened again"):
        _close(journal)
        journal = make()
        assert journal.read() == written, "a reopened journal must hold what was appended"
        journal.append([last])
        written.append(last)
        assert journal.read() == written, "an append after reopening was lost, or took something with it"
    _close(journal)


def check_blobs(make: Callable[[], Blobs]) -> None:
    """Raises `AssertionError`, saying which promise is broken, unless the blobs that `make` opens keep them all.

    `make` is called twice and must open the same store again. Equal bytes have one digest, which is their BLAKE2b of 32
    bytes in hex, and may be put twice; others have another; `get` returns what was put, also after reopening, and
    raises `StorageError` for what is not there and for names that are no digests, paths above all.
    """
    blobs = make()
    digests = [blobs.put(data) for data in AWKWARD]
    assert len(set(digests)) == len(AWKWARD), "different bytes have the same digest"
    for data, digest in zip(AWKWARD, digests, strict=True):
        assert digest == blake2b(data, digest_size=32).hexdigest(), f"{digest} is not the BLAKE2b of its bytes"
        assert blobs.put(data) == digest, "bytes that were put twice have two digests"
        assert blobs.get(digest) == data, f"{len(data)} bytes did not come back as they were put"
    _close(blobs)
    blobs = make()
    assert [blobs.get(digest) for digest in digests] == list(AWKWARD), "a reopened store must hold what was put"
    upper, absent = digests[-1].upper(), blake2b(b"never put", digest_size=32).hexdigest()
    for name in (
        absent,
        upper,
        "",
        ".",
        "..",
        "../" + absent,
        "/etc/passwd",
        absent + "\0",
        absent + "\n",
        absent[:-1],
    ):
        try:
            found = blobs.get(name)
        except StorageError:
            continue
        raise AssertionError(f"get({name!r}) must raise StorageError, it returned {len(found)} bytes")
    _close(blobs)


def _close(store: object) -> None:
    close = getattr(store, "close", None)
    if close is not None:
        close()
