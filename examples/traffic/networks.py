"""The networks: one base that all share, and what each participant puts beside and around it.

frames ──> camera ──> window ─┐
           sensors ─> window ─┴─> base (shared) ─┐
own record, own weather ──> own network ─────────┴─> head: flow in standard deviations, logit of "congested"
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 32  # what the base says of a window


class Base(nn.Module):
    """The shared sequence encoder: a window (batch, 3, 8) and the target's calendar (batch, 4) -> (batch, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Conv1d(3, 24, 3, padding=1)
        self.deeper = nn.Conv1d(24, 24, 3, padding=1)
        self.together = nn.Linear(24 * 8 + 4, 2 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, window: Tensor, calendar: Tensor) -> Tensor:
        x = functional.relu(self.steps(window))
        x = functional.relu(self.deeper(x))
        x = functional.relu(self.together(torch.cat([x.flatten(1), calendar], 1)))
        return functional.relu(self.out(x))


class Forecaster(nn.Module):
    """What all participants have: the base, and a head that also sees the window itself and `own` numbers more."""

    def __init__(self, own: int) -> None:
        super().__init__()
        self.base = Base()
        self.head = nn.Linear(WIDTH + 24 + 4 + own, 2)

    def forecast(self, window: Tensor, calendar: Tensor, *own: Tensor) -> Tensor:
        return self.head(torch.cat([self.base(window, calendar), window.flatten(1), calendar, *own], 1))


class WeekCNN(Forecaster):
    """Minneapolis: a CNN over all hours of the week before, and four columns of weather."""

    def __init__(self) -> None:
        super().__init__(16)
        self.week = nn.Sequential(nn.Conv1d(1, 8, 7, stride=4), nn.ReLU(), nn.Conv1d(8, 8, 5, stride=4), nn.ReLU())
        self.own = nn.Sequential(nn.Linear(80 + 4, 16), nn.ReLU())

    def forward(self, window: Tensor, calendar: Tensor, past: Tensor, weather: Tensor) -> Tensor:
        week = self.week(past[:, None]).flatten(1)
        return self.forecast(window, calendar, self.own(torch.cat([week, weather], 1)))


class DayGRU(Forecaster):
    """Washington: a GRU over the day before, and three columns of weather."""

    def __init__(self) -> None:
        super().__init__(16 + 3)
        self.day = nn.GRU(1, 16, batch_first=True)

    def forward(self, window: Tensor, calendar: Tensor, past: Tensor, weather: Tensor) -> Tensor:
        return self.forecast(window, calendar, self.day(past[:, :, None])[1][0], weather)


class CameraCNN(Forecaster):
    """San Francisco: a CNN makes one number of each frame, (batch, 24, lanes, cells), and those are its window."""

    def __init__(self) -> None:
        super().__init__(0)
        self.camera = nn.Sequential(nn.Conv2d(1, 6, 2, stride=2), nn.ReLU(), nn.Conv2d(6, 8, 2, stride=2), nn.ReLU())
        self.density = nn.Linear(8, 1)

    def forward(self, frames: Tensor, calendar: Tensor) -> Tensor:
        seen = self.camera(frames.flatten(0, 1)[:, None] / 128.0 - 1.0).mean((2, 3))
        return self.forecast(self.density(seen).view(-1, 3, 8), calendar)


class ParkMLP(Forecaster):
    """A car park: a small network over the half hours of the day before."""

    def __init__(self) -> None:
        super().__init__(8)
        self.own = nn.Sequential(nn.Linear(18, 8), nn.ReLU())

    def forward(self, window: Tensor, calendar: Tensor, past: Tensor) -> Tensor:
        return self.forecast(window, calendar, self.own(past))


NETWORKS = {"minneapolis": WeekCNN, "san_francisco": CameraCNN, "washington": DayGRU}  # the others: ParkMLP


def two_outputs(outputs: Tensor, target: Tensor) -> Tensor:
    """The loss: of the flow an absolute error that is smooth below 0.2, and a fifth of the logit's cross entropy."""
    flow = functional.smooth_l1_loss(outputs[:, 0], target[:, 0], beta=0.2)
    return flow + 0.2 * functional.binary_cross_entropy_with_logits(outputs[:, 1], target[:, 1])
