"""polyfed alone on one of the works of `simbench.py`: one line of JSON, to be set beside other systems' runs.

    python benchmarks/sys_polyfed.py w1|w2 [loop | PROCESSES]

The line has the fields that an adapter of another simulator prints: rounds, start-up, CPU and wall time of a round (median
without the two first), loss on the test rows; workers' CPU is counted when they have ended, so a round's is the driver's.
Where SIMBENCH_OUT names a file, the line is written there too; SIMBENCH_ROUNDS shortens the run.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import simbench
from simbench import W1, W2, data_of, federation, tested


def main(name: str = "w2", workers: str = "loop") -> None:
    work = W1 if name == W1.name else W2
    work = replace(work, rounds=int(os.environ.get("SIMBENCH_ROUNDS", work.rounds)))
    data, start, cpu = data_of(work), time.time(), time.process_time()
    more = {} if workers == "loop" else {"executor": "processes", "workers": int(workers)}
    marks = []
    for round_ in federation(work, data, **more):
        begun = marks[-1][1] if marks else (time.time(), time.process_time())
        round_.update()
        marks.append((begun, (time.time(), time.process_time())))
    walls, cpus = ([b[i] - a[i] for a, b in marks][simbench.WARM_UP :] or [0.0] for i in (0, 1))
    params = round_.state.trees["params"]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = {
        "system": f"polyfed_{workers}",
        "work": name,
        "rounds": len(marks),
        "startup_s": round(marks[0][0][0] - start, 3),
        "startup_cpu_s": round(marks[0][0][1] - cpu, 3),
        "round_ms": round(1e3 * statistics.median(walls), 2),
        "round_cpu_ms": round(1e3 * statistics.median(cpus), 2),
        "workers_cpu_s": round(children.ru_utime + children.ru_stime, 2),
        "loss": round(tested(work, [params[entry] for entry in params], data), 5),
    }
    if out := os.environ.get("SIMBENCH_OUT"):
        Path(out).write_text(json.dumps(said))
    print("RESULT " + json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
