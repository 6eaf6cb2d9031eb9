"""What Ditto, APFL and pFedMe have in common: a whole model of each client's own beside the shared one."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from polyfed.algorithms.fedavg import FedAvg
from polyfed.core.algorithm import ClientUpdate, Env, Fit, Fitted, Needs
from polyfed.core.message import Memory, Message
from polyfed.core.tree import Tree


@dataclass(frozen=True)
class Personal(FedAvg):
    """FedAvg, and beside it a personal model that is evaluated and exported; it never leaves its client.

    Memory: "own" (the personal model whole: parameters, and statistics and buffers of its own) and, where there is
    any, "kept" (what FedAvg keeps of the shared model: buffers, and what is not shared).
    """

    needs = Needs.all("params", "terms")

    def start(self, message: Message, memory: Memory) -> tuple[Tree, ...]:
        """The personal model; of a client that has none yet, the shared one."""
        own = memory.trees.get("own")
        return (*super().start(message, Message()), *([] if own is None else [own]))

    def request(self, message: Message, memory: Memory) -> Fit:
        """The shared model's training; `memory` is what `beside` gives."""
        return Fit(start=super().start(message, memory))

    def client_update(self, message: Message, memory: Memory, env: Env) -> ClientUpdate:
        shared = beside(message, memory)
        fitted: Fitted = yield self.request(message, shared)
        own = yield from self.personal(message, memory, fitted)
        kept = self.remember(shared, fitted).trees
        after = memory.put(trees={**own.trees, **({"kept": kept["own"]} if "own" in kept else {})}, numbers=own.numbers)
        return self.upload(message, fitted, env), after

    def personal(self, message: Message, memory: Memory, fitted: Fitted) -> Generator[Any, Any, Message]:
        """Trains the personal model; `fitted` is the shared one after this round's work. Returns what to remember."""
        raise NotImplementedError  # each method's own


def beside(message: Message, memory: Memory) -> Memory:
    """The memory that FedAvg would have. At first it is empty, or what is not sent of a model from an earlier run."""
    kept = memory.trees.get("kept")
    if kept is None and "own" in memory.trees:
        kept = memory.trees["own"].without({name for tree in message.trees.values() for name in tree})
    return Message(trees={"own": kept}) if kept else Message()
