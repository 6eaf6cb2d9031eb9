"""Each check of the store contracts fails on a store that breaks its promise."""

from __future__ import annotations

from hashlib import blake2b

import pytest

from polyfed.core.checks_store import check_blobs, check_journal
from polyfed.core.errors import CorruptError


class Records:
    def __init__(self) -> None:
        self.records: list[bytes] = []

    def append(self, records):
        self.records += records

    def read(self):
        return list(self.records)


class Sorted(Records):
    def read(self):
        return sorted(self.records)


class Stripped(Records):
    def append(self, records):
        self.records += [record.strip(b"\n") for record in records]


class Shared(Records):
    def read(self):
        return self.records


class Once(Records):
    def append(self, records):
        self.records = [*self.records[: 3 + len(self.records) // 13 * 10], *records][: 3 + 10]


@pytest.mark.parametrize("kind", [Sorted, Stripped, Shared, Once])
def test_a_journal_when_it_breaks_a_promise_is_found(kind: type[Records]) -> None:
    journal = kind()
    with pytest.raises(AssertionError):
        check_journal(lambda: journal)


def test_a_journal_when_it_forgets_at_reopening_is_found() -> None:
    with pytest.raises(AssertionError, match="reopened"):
        check_journal(Records)


class Bytes:
    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def put(self, data):
        digest = blake2b(data, digest_size=32).hexdigest()
        self.blobs[digest] = data
        return digest

    def get(self, digest):
        if digest not in self.blobs:
            raise CorruptError(digest)
        return self.blobs[digest]


class Lowered(Bytes):
    def get(self, digest):
        return super().get(digest.lower().rstrip())


class Truncated(Bytes):
    def get(self, digest):
        return super().get(digest)[:4096]


class Numbered(Bytes):
    def put(self, data):
        self.blobs[str(len(self.blobs))] = data
        return str(len(self.blobs) - 1)


class Trusting(Bytes):
    def get(self, digest):
        return self.blobs.get(digest, b"")


@pytest.mark.parametrize("kind", [Lowered, Truncated, Numbered, Trusting])
def test_blobs_when_they_break_a_promise_are_found(kind: type[Bytes]) -> None:
    blobs = kind()
    with pytest.raises(AssertionError):
        check_blobs(lambda: blobs)


def test_blobs_when_they_forget_at_reopening_are_found() -> None:
    with pytest.raises((AssertionError, CorruptError)):
        check_blobs(Bytes)


def test_the_plain_ones_keep_the_contracts() -> None:
    journal, blobs = Records(), Bytes()
    check_journal(lambda: journal)
    check_blobs(lambda: blobs)
