"""`polyfed demo hospitals`: four hospitals, four kinds of model, real patients, two ways to share.

The first division of the patients is shown live; a few more are run without a picture, because one division of a few
hundred patients says little. What is said of a hospital is the mean over the divisions; the interval is a bootstrap over
them: the divisions are drawn again with replacement `DRAWS` times, and the middle 90 % of the means are the interval.
It tells how much the choice of test patients matters; it does not tell how other hospitals would fare.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyfed.core import seed as streams
from polyfed.core.metrics import bootstrap_interval

if TYPE_CHECKING:
    from polyfed.run.hospitals import Mode
    from polyfed.run.report_comparison import Means, Repeats
    from polyfed.run.result import Result
    from polyfed.run.simulate import Watch

DRAWS = 10_000
LEVEL = 0.90
#: mode -> what a reader is told of it.
MODES: dict[Mode, str] = {
    "rows": "each site shares some of its rows without their diagnosis",
    "statistics": "no patient's row leaves its site",
}

INTRO = (
    "Cleveland, Hungary, Switzerland and VA Long Beach: 918 real patients (UCI Heart Disease, 1989), many values missing. "
    "The published files hold 920; two repeat another patient's row exactly and were dropped. Each hospital keeps its own columns, its own way to fill gaps and its own kind of model. They do not exchange "
    "models: each says what it thinks of rows that all look at, and learns from what the others say. This shows a "
    "method; it is no medical device."
)
#: What a reader at a hospital calls the classes of the target.
CLASSES = {"False": "without disease", "True": "with disease"}
ORIGINS: dict[Mode, str] = {
    "rows": "Each hospital sets aside 15 % of its patients, out of those it trains on. These rows go to all four, without the diagnosis.",
    "statistics": (
        "No patient's row leaves its hospital. Each sends statistics of its columns per class, with small cells "
        "suppressed; the rows that all look at are drawn from their sums."
    ),
}


@dataclass(frozen=True)
class Interval:
    """A mean over divisions and where it may lie; both ends None for a single division."""

    mean: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean and percentile bootstrap interval (Efron 1979) of values that are drawn again as they are.

    >>> interval([0.25]), interval([0.5, 0.5])
    (Interval(mean=0.25, low=None, high=None), Interval(mean=0.5, low=0.5, high=0.5))
    """
    known = np.asarray(values, np.float64)
    if known.size < 2:
        return Interval(float(known.mean()))
    low, high = bootstrap_interval(known, LEVEL, streams.rng(seed, "demo", "bootstrap"), DRAWS)
    return Interval(float(known.mean()), low, high)


@dataclass
class Demo:
    """What the demo found.

    Attributes:
        runs: mode -> one result a division, the first one shown live.
        page: the page that was written; None where none was.
        interrupted: the result so far of the run that Ctrl-C ended; then fewer divisions than asked for are here.
    """

    seed: int
    runs: dict[Mode, list[Result]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    page: Path | None = None
    seconds: float = 0.0
    interrupted: Result | None = None

    @property
    def sites(self) -> list[str]:
        first = self.runs["rows"] or self.runs["statistics"]
        return list(first[0].population.sites) if first else []

    def values(self, mode: Mode, column: str, site: str = "") -> list[float]:
        """A division a value: AUC of one site, or the mean over the sites; "gain" is federated minus alone."""
        found = []
        for result in self.runs[mode]:
            rows = {row["client"]: row for row in result.rows("auc")}
            got = [rows[name].get("difference" if column == "gain" else column) for name in ([site] if site else rows)]
            known = [float(value) for value in got if value is not None]
            if known and len(known) == len(got):
                found.append(sum(known) / len(known))
        return found

    def row(self, site: str = "") -> dict[str, Any]:
        """One line of the table: means over the divisions, and the gain of each mode with its interval."""
        said: dict[str, Any] = {"site": site or "mean"}
        if site:
            said["model"] = self.runs["rows"][0].population.sites[site].model.kind
        for column in ("alone", "pooled"):
            values = self.values("rows", column, site)
            said[column] = sum(values) / len(values) if values else None
        for mode in MODES:
            values, gains = self.values(mode, "federated", site), self.values(mode, "gain", site)
            said[mode] = sum(values) / len(values) if values else None
            said[f"{mode} gain"] = interval(gains, seed=self.seed) if gains else None
        return said

    @property
    def what_the_interval_is(self) -> str:
        count = len(self.runs["rows"])
        if count < 2:
            return "One division into training and test patients: no interval."
        return (
            f"Means over {count} divisions into training and test patients (seeds {self.seed} to {self.seed + count - 1}); "
            f"[ ] is a {LEVEL:.0%} bootstrap interval of the gain over these divisions. With {count} of them it is rough."
        )

    def to_dict(self) -> dict[str, Any]:
        """For machines; no arrays."""
        lines = [self.row(site) for site in [*self.sites, ""]] if self.runs["rows"] else []
        return {
            "demo": "hospitals",
            "seed": self.seed,
            "splits": len(self.runs["rows"]),
            "metric": "auc",
            "interval": {"level": LEVEL, "over": "divisions into training and test patients", "draws": DRAWS},
            "sites": [
                {key: vars(value) if isinstance(value, Interval) else value for key, value in line.items()}
                for line in lines
            ],
            "runs": {mode: [result.to_dict() for result in results] for mode, results in self.runs.items()},
            "page": None if self.page is None else str(self.page),
            "seconds": self.seconds,
            "interrupted": self.interrupted is not None,
        }


def run(
    *,
    seed: int = 0,
    splits: int = 5,
    rounds: int | None = None,
    out: Path | None = None,
    watch: Watch | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Runs both modes over a few divisions of the patients and writes one page of both.

    Args:
        seed: of the first division; the others take the numbers after it.
        splits: divisions.
        rounds: of each federation; the recipe's own by default.
        out: where the page goes; None writes none.
        watch: who looks on at the first division.
        say: takes sentences on what is going on.

    Raises:
        MissingExtraError: a framework is not installed.
        StorageError: the page cannot be written.
    """
    started = time.monotonic()
    os.environ.setdefault("KERAS_BACKEND", "torch")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Keras imports tensorflow where it is there, which talks
    demo = Demo(seed)
    for number in range(seed, seed + splits):
        if number == seed + 1:
            say(f"the same with {splits - 1} other divisions of the patients, to see how far chance goes ...")
        for mode, words in MODES.items():
            if number == seed:
                say(f"\n{words}")
            result = _one(mode, number, rounds, watch if number == seed else None, demo)
            if result.interrupted:
                demo.interrupted = result
                break
            demo.runs[mode].append(result)
        if number > seed and demo.interrupted is None:
            say(f"  division {number - seed + 1} of {splits}: {_told(demo)}")
        if demo.interrupted is not None:
            break
    if out is not None and demo.runs["rows"]:
        demo.page = _page(demo, out)
    demo.seconds = time.monotonic() - started
    return demo


def _one(mode: Mode, seed: int, rounds: int | None, watch: Watch | None, demo: Demo) -> Result:
    """One federation. Alone and pooled are the same in both modes: all labelled rows of a site, or of everybody."""
    from polyfed.run import hospitals
    from polyfed.run.simulate import simulate

    algorithm, clients = hospitals.clients(seed, mode=mode)
    compared = ("alone", "pooled") if mode == "rows" else ()
    result = simulate(algorithm, clients, rounds=rounds or hospitals.ROUNDS, seed=seed, baselines=compared, watch=watch)
    known = demo.runs["rows"][-1].baselines if mode == "statistics" and demo.runs["rows"] else result.baselines
    return replace(result, baselines=known)


def _told(demo: Demo) -> str:
    """The newest division in a few words: means over the sites."""
    words: dict[Mode, str] = {"rows": "some rows shared", "statistics": "no row shared"}
    alone = demo.values("rows", "alone")
    said = [f"AUC alone {alone[-1]:.3f}"] if alone else []
    for mode, word in words.items():
        if found := demo.values(mode, "federated"):
            said.append(f"{word} {found[-1]:.3f}")
    return ", ".join(said)


def repeats(demo: Demo, mode: Mode) -> Repeats | None:
    """The numbers of the terminal's table, for the page; None for a single division."""
    from polyfed.run.report_comparison import Repeats

    count = len(demo.runs[mode])
    if count < 2:
        return None
    return Repeats(count, {site: _means(demo, mode, site) for site in demo.sites}, _means(demo, mode))


def _means(demo: Demo, mode: Mode, site: str = "") -> Means:
    from polyfed.run.report_comparison import Means

    known = {column: demo.values(mode, column, site) for column in ("alone", "pooled", "federated", "gain")}
    gain = interval(known["gain"], seed=demo.seed) if known["gain"] else None
    ends = None if gain is None or gain.low is None or gain.high is None else (gain.low, gain.high)
    return Means(**{name: float(np.mean(values)) for name, values in known.items() if values}, interval=ends)


def _divided(demo: Demo) -> str:
    """`Demo.what_the_interval_is` for the page, which has no brackets."""
    count = len(demo.runs["rows"])
    if count < 2:
        return demo.what_the_interval_is
    return (
        f"The patients were divided into training and test {count} times (seeds {demo.seed} to {demo.seed + count - 1}), "
        f"and all was trained anew each time. The numbers are means over these divisions; the {LEVEL * 100:g} % intervals "
        f"tell how far the gain depends on the division (bootstrap). With {count} divisions they are rough, and they do "
        "not tell how other hospitals would fare."
    )


def _page(demo: Demo, out: Path) -> Path:
    """One page of both ways to share: the means over the divisions, and below them the division that was shown."""
    from polyfed.run.report import write

    return write(
        demo.runs["rows"][0],
        out,
        title="Four hospitals learn to recognise heart disease together",
        label=MODES["rows"],
        others={MODES["statistics"]: demo.runs["statistics"][0]} if demo.runs["statistics"] else {},
        intro=INTRO + "\n\n" + _divided(demo),
        origins=dict(zip(MODES.values(), ORIGINS.values(), strict=True)),
        level=LEVEL,
        repeats={MODES[mode]: found for mode in MODES if (found := repeats(demo, mode)) is not None},
        classes=CLASSES,
    )


__all__ = ["LEVEL", "MODES", "Demo", "Interval", "interval", "repeats", "run"]
