"""Runs with a checkpoint that kill themselves with SIGKILL at a chosen point, and go on in another process.

    python tests/system/killing.py NAME FOLDER POINTS

NAME is one of `kinds.NAMED`; POINTS is JSON: a list of [hook, number, when], or a number n, for every n-th point
that there is. Prints {"whole": outcome, "counts": {hook: n}, "resumed": [[point, was killed, outcome], ...]} as JSON,
an outcome being [SHA-256, what the run said]. Each run has a process of its own, forked before any run began.
"""

import functools
import json
import os
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import kinds

from polyfed.core import work
from polyfed.core.coordinator import Coordinator
from polyfed.storage.blobs import FileBlobs
from polyfed.storage.journal import FileJournal
from polyfed.storage.memories import FileMemories

#: hook -> (class, method); "request" is each Fit or Predict inside a client's update or evaluation.
HOOKS = {
    "journal": (FileJournal, "append"),
    "blob": (FileBlobs, "put"),
    "memory": (FileMemories, "put"),
    "compute": (Coordinator, "compute"),
    "upload": (Coordinator, "upload"),
}
TORN = 3  # bytes of the last frame that did not reach the disk


class Points:
    """Counts how often each hook is passed, and kills this process at one of the points."""

    def __init__(self, folder, point=None):
        self.folder, self.point, self.counts = folder, point, Counter()

    def kill_at(self, hook, when):
        if self.point is not None and self.point == [hook, self.counts[hook], when]:
            if when == "torn":
                journal = Path(self.folder) / "journal"
                os.truncate(journal, journal.stat().st_size - TORN)
            os.kill(os.getpid(), signal.SIGKILL)

    def hooked(self, hook, true):
        @functools.wraps(true)
        def method(*args, **named):
            self.counts[hook] += 1
            self.kill_at(hook, "before")
            result = true(*args, **named)
            self.kill_at(hook, "torn")
            self.kill_at(hook, "after")
            return result

        return method

    def drive(self, true):
        def counted(steps):
            answer = None
            while True:
                try:
                    request = steps.send(answer)
                except StopIteration as end:
                    return end.value
                self.counts["request"] += 1
                self.kill_at("request", "before")
                answer = yield request

        return lambda steps, site, env: true(counted(steps), site, env)

    def __enter__(self):
        patches = [mock.patch.object(c, m, self.hooked(hook, getattr(c, m))) for hook, (c, m) in HOOKS.items()]
        self.patches = [*patches, mock.patch.object(work, "drive", self.drive(work.drive))]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()


def outcome(name, folder=None):
    result = kinds.run(kinds.NAMED[name](), checkpoint=folder)
    return [kinds.digest_of(result), kinds.said_of(result)]


def counted(name, folder):
    with Points(folder) as points:
        return [outcome(name, folder), dict(points.counts)]


def killed(name, folder, point):
    with Points(folder, point):
        return outcome(name, folder)


def apart(function, *args):
    """A function's JSON from a process of its own; None where it was killed."""
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        with os.fdopen(reader) as file:
            said = file.read()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return None
        return json.loads(said)
    try:
        said = json.dumps(function(*args))
    except BaseException:  # noqa: BLE001  # told to the parent, whatever it is
        said = json.dumps(["failed", traceback.format_exc()])
    with os.fdopen(writer, "w") as file:
        file.write(said)
    os._exit(0)


def every(counts, nth):
    """Every n-th point of all there are, hook by hook, so that each hook has some."""
    for hook, count in counts.items():
        times = {"journal": ("before", "torn", "after"), "request": ("before",)}.get(hook, ("before", "after"))
        points = [[hook, number, when] for number in range(1, count + 1) for when in times]
        yield from points[nth // 2 :: nth]


def import_frameworks(name):
    """Once, before the forks; nothing has run then, so no thread and no state is inherited."""
    kinds.NAMED[name]()


if __name__ == "__main__":
    name, folder, wanted = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    import_frameworks(name)
    whole = apart(outcome, name)
    journalled, counts = apart(counted, name, str(folder / "whole"))
    points = list(every(counts, wanted)) if isinstance(wanted, int) else wanted
    resumed = []
    for number, point in enumerate(points):
        here = str(folder / str(number))
        first = apart(killed, name, here, point)
        resumed.append([point, first is None, apart(outcome, name, here)])
    again = apart(outcome, name, str(folder / "whole"))
    print(json.dumps({"whole": whole, "journalled": journalled, "again": again, "counts": counts, "resumed": resumed}))
