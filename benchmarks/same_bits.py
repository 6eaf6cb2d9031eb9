"""The same federation in every way that must give the same bits: a table of SHA-256 of model and client memories.

    python benchmarks/same_bits.py [--json]

Every algorithm, framework and style of training of `tests/system/kinds.py`, under the loop, shuffled arrival and 1,
2 and 3 worker processes, each with two values of PYTHONHASHSEED; and once with a fold that is wrong on purpose, which
must be seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import bench

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "system"))

import kinds
import matrix

WAYS = [way for way in matrix.WAYS if way != "new processes"]
SEEDS = (0, 1)


def measure() -> list[bench.Result]:
    cells = list(kinds.cells())
    found = matrix.tables(cells, WAYS, SEEDS)
    apart = matrix.disagreements(found)
    if "--json" not in sys.argv:
        for cell in cells:
            digests = sorted({value[:16] for (name, _, _), value in found.items() if name == cell})
            print(f"{', '.join(cell):<40} {' != '.join(digests)}")
        print(f"\n{len(WAYS)} ways ({', '.join(WAYS)}), PYTHONHASHSEED {SEEDS}\n")
    wrong = ("FedAdam", "torch", "mini-batches")
    seen = [m for m in matrix.MUTANTS if matrix.disagreements(matrix.tables([wrong], ["loop", m], (0,)))]
    return [
        bench.Result("same_bits.mutants", len(seen) / len(matrix.MUTANTS), "of the wrong folds are seen"),
        bench.Result("same_bits.runs", float(len(found)), "runs"),
        bench.Result("same_bits", 1 - len(apart) / len(cells), "of federations have one digest"),
    ]


if __name__ == "__main__":
    bench.main(__doc__, measure)
