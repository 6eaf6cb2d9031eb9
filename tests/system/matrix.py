"""One federation run in every way that must give the same bits; as a script, so that each PYTHONHASHSEED has a process.

    python tests/system/matrix.py '{"cells": [["FedAvg", "torch", "dropout"]], "ways": ["loop", "shuffled"]}'

prints {cell: {way: SHA-256}} as JSON.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import kinds
import numpy as np

import polyfed as pf
from polyfed.core import aggregate, wire
from polyfed.core.aggregate import Fold
from polyfed.core.coordinator import Coordinator
from polyfed.executors.loop import Loop
from polyfed.executors.processes import Processes
from polyfed.run.serve import Server


class Shuffled:
    """The loop, whose replies come in another order each time: every permutation is an arrival that may happen."""

    def __init__(self):
        self.loop, self.order = Loop(), np.random.default_rng(8)
        self.submit, self.open, self.close = self.loop.submit, self.loop.open, self.loop.close

    def replies(self):
        while waiting := list(self.loop.replies()):
            yield from (waiting[i] for i in self.order.permutation(len(waiting)))


@contextmanager
def one_ulp():
    """A fold whose additions each end one step of their dtype too high."""
    true = aggregate.add_scaled

    def wrong(total, x, weight, scratch):
        true(total, x, weight, scratch)
        total[:] = np.nextafter(total, np.inf, dtype=total.dtype)

    with mock.patch.object(aggregate, "add_scaled", wrong):
        yield "loop"


@contextmanager
def fused():
    """A fold that rounds once an addition, as a fused multiply-add does: off by one step in a part of the entries."""

    def wrong(total, x, weight, scratch):
        total[:] = total.astype(np.longdouble) + x.astype(np.longdouble) * np.longdouble(weight)

    with mock.patch.object(aggregate, "add_scaled", wrong):
        yield "loop"


@contextmanager
def arrival_order():
    """A fold in the order in which uploads come, without regard to the plan."""

    def folded(self):
        fold = Fold(self.state.block)
        for place, upload in enumerate(self._uploads.values()):
            fold.add(place, upload.message, upload.weights.__getitem__)
        return fold.finish()

    with (
        mock.patch.object(Coordinator, "_fold_in", lambda self, action: None),
        mock.patch.object(Coordinator, "_aggregate", folded),
    ):
        yield Shuffled()


@contextmanager
def plainly(make):
    yield make()


def networked(settings):
    """The run over HTTP on loopback: a server here, each client in a process of its own that joins it."""
    options = {k: v for k, v in settings.items() if k not in ("algorithm", "clients", "baselines")}
    joined = [(client.name, *joining(client)) for client in settings["clients"]]
    with Server(settings["algorithm"], clients=[client.name for client in settings["clients"]], **options) as server:
        for _, url, _ in joined:
            url.send(server.url)
        memories = {name: wire.decode(url.recv()) for name, url, _ in joined}
        result = server.result(60)
    for _, _, process in joined:
        process.join()
    return SimpleNamespace(state=result.state, memories=memories)


def joining(client):
    """(pipe, process) of a client that waits for the url and answers with its memory."""
    here, there = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_join, args=(client, there), daemon=True)
    process.start()
    return here, process


def _join(client, pipe):
    pipe.send(wire.to_bytes(pf.join(pipe.recv(), client, show=None).memory))


#: name -> context in which an executor is at hand. Workers are forked where nothing but their number is looked at.
WAYS = {
    "loop": lambda: plainly(lambda: "loop"),
    "shuffled": lambda: plainly(Shuffled),
    "processes 1": lambda: plainly(lambda: Processes(1, start="fork")),
    "processes 2": lambda: plainly(lambda: Processes(2, start="fork")),
    "processes 3": lambda: plainly(lambda: Processes(3, start="fork")),
    "new processes": lambda: plainly(lambda: Processes(2)),
    "network": networked,
}
MUTANTS = {"one ulp": one_ulp, "fused": fused, "arrival order": arrival_order}


def digest(cell, way):
    if way == "network":
        return kinds.digest_of(networked(kinds.settings_of(cell)))
    with {**WAYS, **MUTANTS}[way]() as executor:
        return kinds.digest_of(kinds.run(kinds.settings_of(cell), executor=executor))


def tables(cells, ways, hash_seeds=(0, 1)):
    """{(cell, way, PYTHONHASHSEED): digest}, from one process a seed, all at once; `ways` may differ by seed."""
    by_seed = ways if isinstance(ways, dict) else dict.fromkeys(hash_seeds, ways)
    started = {seed: _start(json.dumps({"cells": list(cells), "ways": list(w)}), seed) for seed, w in by_seed.items()}
    found = {}
    for seed, process in started.items():
        out, err = process.communicate()
        assert process.returncode == 0, err[-4000:]
        for cell, way, value in json.loads(out.splitlines()[-1]):
            found[tuple(cell), way, seed] = value
    return found


def _start(asked, seed):
    env = os.environ | {"PYTHONHASHSEED": str(seed), "KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(Path(__file__)), asked]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def disagreements(found):
    """The cells of which not all digests are equal."""
    by_cell = {}
    for (cell, _, _), value in found.items():
        by_cell.setdefault(cell, set()).add(value)
    return [cell for cell, values in by_cell.items() if len(values) > 1]


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    print(json.dumps([(cell, way, digest(cell, way)) for cell in request["cells"] for way in request["ways"]]))
