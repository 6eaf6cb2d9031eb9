"""What every benchmark shares: bars from bars.toml, a line for machines, a table for people, the machine's fingerprint.

    import bench
    bench.main(__doc__, measure)     # measure() -> list[bench.Result]

`--json` prints one JSON object a line; the last line is the last result, which is the benchmark's main one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Result:
    """One measured figure.

    Attributes:
        name: its entry in bars.toml.
        value: the figure that the bar judges, such as the median of the samples.
        unit: in words.
        samples: the raw figures behind it.
    """

    name: str
    value: float
    unit: str
    samples: Sequence[float] = field(default_factory=tuple)

    @property
    def bar(self) -> dict[str, float]:
        """``{"least": x}`` or ``{"most": x}``; empty where no bar is set."""
        return bars().get(self.name, {})

    @property
    def holds(self) -> bool:
        least, most = self.bar.get("least", float("-inf")), self.bar.get("most", float("inf"))
        return least <= self.value <= most

    @property
    def bar_text(self) -> str:
        return " and ".join(f"{'>=' if kind == 'least' else '<='} {x:g}" for kind, x in self.bar.items()) or "none"


def bars() -> dict[str, dict[str, float]]:
    """The bars that the project holds itself to; they change only with a decision note."""
    return tomllib.loads((HERE / "bars.toml").read_text())


def machine() -> dict[str, Any]:
    """What decides speed and bits: processor, instruction set, cores, library versions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = {key.strip(): value for key, _, value in (line.partition(":") for line in info.splitlines())}
    flags = set(lines.get("flags", "").split())
    return {
        "processor": lines.get("model name", platform.processor()).strip(),
        "vector": next((name for name in ("avx512f", "avx2", "sse4_2") if name in flags), platform.machine()),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version for name in ("numpy", "numba", "torch") if (version := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that is measured, with "+" where the working tree differs from it; empty outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))


def as_json(result: Result, where: dict[str, Any], at: str) -> str:
    said = {**asdict(result), "bar": result.bar_text, "holds": result.holds, "commit": at, "machine": where}
    order = ("name", "value", "unit", "bar", "holds", "samples", "commit", "machine")
    return json.dumps({key: said[key] for key in order})


def main(about: str | None, measure: Callable[[], Sequence[Result]]) -> None:
    """Measures and tells; exit code 1 where a bar does not hold."""
    parser = argparse.ArgumentParser(description=(about or "").strip().split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line, the main result last")
    options = parser.parse_args()
    results = measure()
    where, at = machine(), commit()
    if options.json:
        print("\n".join(as_json(result, where, at) for result in results))
    else:
        print(f"{where['processor']}, {where['vector']}, {where['cores']} cores, load {where['load']}, commit {at}\n")
        width = max(len(result.name) for result in results)
        for result in results:
            word = "holds" if result.holds else "MISSED"
            print(f"{result.name:<{width}}  {result.value:>10.3f} {result.unit:<34} bar {result.bar_text:<10} {word}")
    sys.exit(not all(result.holds for result in results))
