"""A run as a person sees it: a table with a row a site in a terminal, one line a round where there is none.

Drawn when something happens (a task goes out, an answer comes, a round ends), by nothing that polls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from polyfed.core.algorithm import Task
from polyfed.core.history import RoundLog
from polyfed.core.metrics import is_lower_better
from polyfed.core.protocols import Model, Reply
from polyfed.run.client import Population
from polyfed.run.files import framework_of
from polyfed.run.result import metric_of

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 16  # rounds that a sparkline shows
BETWEEN = 0.05  # seconds between two drawings of events; the end of a round is always drawn
MOST = 24  # sites with a row of their own; a table longer than a screen cannot be redrawn in place


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """The newest values as bars between their least and their greatest; level ones stand in the middle.

    >>> sparkline([0.1, 0.2, 0.3]), sparkline([0.5, 0.5])
    ('▁▅█', '▄▄')
    """
    kept = [value for value in values if math.isfinite(value)][-width:]
    if not kept:
        return ""
    low, high = min(kept), max(kept)
    if high - low < 1e-12:
        return BARS[3] * len(kept)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] for value in kept)


def spelled_bytes(count: float) -> str:
    """Bytes for a reader.

    >>> spelled_bytes(512), spelled_bytes(2048), spelled_bytes(5 * 1024**3)
    ('512 B', '2.0 kB', '5.0 GB')
    """
    if count < 1024:
        return f"{count:.0f} B"
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}"


@dataclass
class _Row:
    model: str
    checked: int = 0
    status: str = "waiting"
    rounds: int = 0
    values: list[float] = field(default_factory=list)

    @property
    def is_out(self) -> bool:
        return self.status.startswith(("failed", "left out"))


class Table:
    """The live table; a `Watch` of `simulate`.

    Args:
        console: where to draw; standard error where standard output is not for people.
        metric: on the validation rows; AUC for two classes, accuracy for more, mean absolute error for values.
        clock: seconds.
    """

    def __init__(
        self, console: Console | None = None, *, metric: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console()
        self.metric = metric
        self._given = metric
        self._clock = clock
        self._rows: dict[str, _Row] = {}
        self._title, self._limit = "", 0
        self._started = self._drawn = 0.0
        self._round, self._bytes = 0, 0
        self._live: Live | None = None

    # ------------------------------------------------------------------------------------------ what happens

    def start(self, population: Population, rounds: int | None, title: str) -> None:
        self.metric = self._given or metric_of(population.problem)
        self._rows = {
            name: _Row(_kind(site.model), len(site.validation or ())) for name, site in population.sites.items()
        }
        self._title, self._limit = title, rounds or 0
        self._started, self._round, self._bytes = self._clock(), 0, 0
        if self.console.is_terminal:
            self._live = Live(self._picture(), console=self.console, auto_refresh=False, transient=False)
            self._live.start()
        else:
            said = f"{title}: {len(self._rows)} sites, {self.metric} on validation rows{self._checked()}"
            self.console.print(said, highlight=False, soft_wrap=True)

    def sent(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._round = max(self._round, task.round_num)
            if task.kind == "evaluate" and self._rows[task.client].is_out:
                continue  # what went wrong in training stands until the next training
            doing = {"train": "training", "evaluate": "evaluating" if task.part != "test" else "testing"}
            self._rows[task.client].status = doing.get(task.kind, task.kind)
        self._draw()

    def reply(self, reply: Reply) -> None:
        row = self._rows[reply.task.client]
        if reply.error is not None:
            row.status = f"failed: {reply.error.kind}"
        elif reply.task.kind != "evaluate" or not row.is_out:
            row.status = {"train": "trained", "evaluate": "evaluated"}.get(reply.task.kind, "answered")
        self._draw()

    def round(self, log: RoundLog) -> None:
        self._round = log.round_num
        self._bytes += log.bytes_down + log.bytes_up
        for name in log.accepted:
            self._rows[name].rounds += 1
        for name, metrics in log.metrics.items():
            if self.metric in metrics:
                self._rows[name].values.append(metrics[self.metric])
        for name, reason in log.left_out.items():
            row = self._rows[name]
            row.status = row.status if row.is_out else f"left out: {reason}"
        if self._live is None:
            self.console.print(self._line(log), highlight=False, soft_wrap=True)
        self._draw(now=True)

    def stage(self, text: str) -> None:
        self.console.print(f"{text} ...", style="dim", highlight=False)

    def end(self) -> None:
        if self._live is None:
            return
        for row in self._rows.values():
            row.status = row.status if row.is_out else "done"
        self._draw(now=True)
        self._live.stop()
        self._live = None

    # ------------------------------------------------------------------------------------------ what is seen

    def _draw(self, *, now: bool = False) -> None:
        if self._live is None or (not now and self._clock() - self._drawn < BETWEEN):
            return
        self._live.update(self._picture(), refresh=True)
        self._drawn = self._clock()

    def _picture(self) -> Group:
        grid = Grid(box=SIMPLE_HEAD, pad_edge=False)
        for head in ("site", "model"):
            grid.add_column(head, no_wrap=True)
        for head in ("rounds", self.metric):
            grid.add_column(head, justify="right")
        grid.add_column("over rounds", min_width=WIDTH, no_wrap=True)
        grid.add_column("since round 1", justify="right")
        grid.add_column("status", overflow="ellipsis", no_wrap=True, min_width=10)
        for name, row in list(self._rows.items())[:MOST]:
            grid.add_row(name, row.model, str(row.rounds), *self._cells(row), _shown(row.status))
        below = [Text(self._footer(), style="dim")]
        if (more := len(self._rows) - MOST) > 0:
            below.insert(0, Text(f"and {more} more sites", style="dim"))
        return Group(Text(self._title, style="bold"), grid, *below)

    def _cells(self, row: _Row) -> tuple[Text, Text, Text]:
        if not row.values:
            return Text("-"), Text(""), Text("")
        change = row.values[-1] - row.values[0]
        better = change < 0 if is_lower_better(self.metric) else change > 0
        style = "" if abs(change) < 5e-4 else "green" if better else "red"
        said = Text(f"{change:+.3f}" if len(row.values) > 1 else "", style=style)
        value = Text.assemble(f"{row.values[-1]:.3f}", (f" n={row.checked}", "dim"))
        return value, Text(sparkline(row.values), style="cyan"), said

    def _footer(self) -> str:
        of = f" of {self._limit}" if self._limit else ""
        return (
            f"round {self._round}{of} · {self._clock() - self._started:.1f} s · {spelled_bytes(self._bytes)} "
            f"sent both ways · {self.metric} on n validation rows"
        )

    def _checked(self) -> str:
        """How many validation rows stand behind each number: few make it jump, or stay at 1."""
        if len(self._rows) > MOST:
            return ""
        return f" ({', '.join(f'{name} n={row.checked}' for name, row in self._rows.items())})"

    def _line(self, log: RoundLog) -> str:
        known = [f"{name} {m[self.metric]:.3f}" for name, m in log.metrics.items() if self.metric in m]
        shown = known if len(known) <= MOST else [f"mean of {len(known)} sites {self._mean(log):.3f}"]
        out = [f"{name} left out: {reason}" for name, reason in log.left_out.items()]
        of = f"/{self._limit}" if self._limit else ""
        return "; ".join([f"round {log.round_num}{of}  " + "  ".join(shown), *out])

    def _mean(self, log: RoundLog) -> float:
        values = [m[self.metric] for m in log.metrics.values() if self.metric in m]
        return sum(values) / len(values)


def _kind(model: Model) -> str:
    """The model's type, with its framework where the type's name is not enough (Sequential is one of both)."""
    word = {"torch": "PyTorch ", "keras": "Keras "}.get(framework_of(model), "")
    return word + model.kind


def _shown(status: str) -> Text:
    style = {"training": "yellow", "evaluating": "yellow", "testing": "yellow", "done": "green"}.get(status, "")
    return Text(status.splitlines()[0], style="red" if status.startswith(("failed", "left out")) else style)


__all__ = ["Table", "sparkline", "spelled_bytes"]
