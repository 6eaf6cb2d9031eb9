"""A client's memory, transactional: what a task makes of it is pending until the server's receipt says accepted.

Refused or expired, the pending memory is dropped; a receipt that was lost is asked for again by its name; a task that
ran twice has two pendings of which at most one becomes current.
"""

from __future__ import annotations

from collections.abc import Iterable

from polyfed.core.message import Memory, Message


class ClientMemory:
    """One client's current memory, the pending ones by receipt, and the ones to which a run may still roll back.

    Guarantees: `current` changes in `accept` alone, and each receipt changes it at most once.
    """

    def __init__(self, current: Memory | None = None, receipt: str = "") -> None:
        self.receipt = receipt
        self._committed: dict[str, Memory] = {receipt: current or Message()}
        self._pending: dict[str, Memory] = {}

    @property
    def current(self) -> Memory:
        return self._committed[self.receipt]

    def is_old(self, receipt: str) -> bool:
        """Whether a task of this receipt is one that was done, or was given up, before the current memory was made.

        Such a task came twice, or late. Doing it again would count it twice, for its receipt may be "accepted" still.
        A client has one task at a time, so the collection and position with which receipts begin rise.
        """
        return _place(receipt) <= _place(self.receipt)

    def propose(self, receipt: str, memory: Memory) -> None:
        self._pending[receipt] = memory

    def accept(self, receipt: str) -> bool:
        """Makes a pending memory current; False when there is none of this receipt (any more)."""
        memory = self._pending.pop(receipt, None)
        if memory is None:
            return False
        self._committed[receipt] = memory
        self.receipt = receipt
        return True

    def refuse(self, receipt: str) -> None:
        self._pending.pop(receipt, None)

    @property
    def pending(self) -> tuple[str, ...]:
        """Receipts to be asked for again."""
        return tuple(self._pending)

    @property
    def is_single(self) -> bool:
        """Whether there is nothing but the current memory that `keep` could forget."""
        return len(self._committed) == 1

    def keep(self, receipts: Iterable[str]) -> None:
        """Forgets every committed memory but the current one and those of these receipts."""
        kept = {self.receipt, *receipts}
        self._committed = {receipt: memory for receipt, memory in self._committed.items() if receipt in kept}

    def roll_back(self, receipt: str) -> None:
        """Makes an earlier committed memory current; raises `KeyError` if it was not kept."""
        self._committed[receipt]  # the check
        self.receipt = receipt


def _place(receipt: str) -> tuple[int, ...]:
    """The collection and position of a receipt; before all of them for none."""
    return tuple(int(part) for part in receipt.split(".")[:2]) if receipt else ()
