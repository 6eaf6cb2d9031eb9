"""Who takes part, and what each of them sees: three cities, and the car parks of a fourth.

Every participant forecasts its own series an hour ahead. All agree on one thing, the window: 24 past values in the
participant's own standard deviations, at places that mean the same whether a series has one value an hour or two:

    row 0: the last 8 hours        row 1: a day before the hour that is forecast, from 4 hours before it to 3 after
    row 2: the same, a week before

Minneapolis, Washington and the car parks read sensors. San Francisco has no values at all but a camera's frames of the
same 24 hours. They are drawn from its recorded occupancy: a stand-in, because no such pictures come with the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

import polyfed as pf
from polyfed.data import Parts, divide

CITIES = ("minneapolis", "san_francisco", "washington")
CAMERA = "san_francisco"
HOURS = 4000  # of a city's record, the latest
LEAST_ROWS = 500  # two car parks have hardly any whole window
NEWCOMERS = 3
BUSY = 0.8  # congested: above this quantile of the training rows
LANES, CELLS = 8, 24  # of a frame; a car fills a cell

#: Training before validation before test. Without a gap: a forecast may see every value that was measured before it, and
#: no value reaches an earlier part.
SPLIT = pf.Split(validation=0.15, test=0.2, by="time")


@dataclass(frozen=True, eq=False)
class Place:
    """One participant's n rows, and how they are divided.

    Attributes:
        inputs: what its model sees, by name.
        target: (n, 2) float32: the value in an hour in standard deviations, and 1.0 where it is congested.
        last, week: (n,) the value an hour and a week before the target: the naive forecasts.
        linear: (n, k) all that a linear model may see: every past value of a week, the calendar, the weather.
        scale: mean and standard deviation of the training rows' values, in the series' own unit.
        step: (n,) place of the target on the series' grid; hours since 1970 for a city.
    """

    name: str
    inputs: Mapping[str, np.ndarray]
    target: np.ndarray
    parts: Parts
    last: np.ndarray
    week: np.ndarray
    linear: np.ndarray
    scale: tuple[float, float]
    step: np.ndarray

    def in_units(self, deviations: np.ndarray) -> np.ndarray:
        """Standard deviations as the series' own unit, never below 0."""
        return np.maximum(deviations * self.scale[1] + self.scale[0], 0.0)


def everybody(*, quick: bool = False) -> dict[str, Place]:
    """All participants by name, the cities first; with `quick` shorter records and 7 car parks."""
    cities, parks = pf.datasets.traffic(), pf.datasets.traffic(car_parks=True)
    found = {name: place(name, latest(cities[name], 1200 if quick else HOURS)) for name in CITIES}
    for name in sorted(parks)[: 7 if quick else None]:
        made = place(called(name), parks[name])
        if len(made.target) >= LEAST_ROWS:
            found[made.name] = made
    return found


def newcomers(found: Mapping[str, Place], seed: int) -> dict[str, Place]:
    """Three car parks, drawn, each with the latest quarter of its training rows."""
    parks = [name for name in found if name not in CITIES]
    drawn = sorted(np.random.default_rng(seed).choice(parks, NEWCOMERS, replace=False).tolist())
    series = {called(name): series for name, series in pf.datasets.traffic(car_parks=True).items()}
    return {name: place(name, series[name], share=0.25) for name in drawn}


def called(park: str) -> str:
    """A car park's name as a client may have it."""
    return park.replace(" ", "_")


def latest(series: pf.datasets.Series, count: int) -> pf.datasets.Series:
    kept = slice(-count, None)
    columns = {name: getattr(series, name)[kept] for name in ("time", "value", "step")}
    return replace(series, **columns, weather=series.weather[kept] if series.weather_columns else series.weather)


def place(name: str, series: pf.datasets.Series, share: float = 1.0) -> Place:
    """Rows of a series. The latest `share` of its training rows is kept; they alone give mean, deviation and BUSY."""
    hour = 1 if series.week == 168 else 2  # steps an hour
    day, lags = series.week // 7, series.week + 4 * hour
    raw = pf.datasets.windows(series, lags=lags, horizon=hour, scale=(0.0, 1.0), weather=True)
    x, value = raw.inputs["x"].astype(np.float64), raw.target.astype(np.float64)
    parts = divide(name, raw, SPLIT)
    kept = parts.train[-round(share * len(parts.train)) :]
    mean, sd = scale = float(value[kept].mean()), float(value[kept].std())
    past, value = (x[:, :lags] - mean) / sd, (value - mean) / sd
    calendar, sky = x[:, lags : lags + 4], x[:, lags + 4 :]

    def back(steps):
        """The column of what was measured so many steps before the target."""
        return lags - 1 + hour - steps

    around = hour * np.arange(4, -4, -1)
    near = np.stack([back(hour * np.arange(8, 0, -1)), back(day + around), back(series.week + around)])
    seen = {"calendar": calendar, "window": past[:, near]}
    if name == CAMERA:
        seen = {"calendar": calendar, "frames": frames(x[:, near.reshape(-1)])}
    elif name == "minneapolis":
        seen |= {"past": past, "weather": sky}
    elif name == "washington":
        seen |= {"past": past[:, -24:], "weather": sky}
    else:
        seen |= {"past": past[:, -day:]}
    return Place(
        name=name,
        inputs={key: a if a.dtype == np.uint8 else a.astype(np.float32) for key, a in seen.items()},
        target=np.stack([value, value > np.quantile(value[kept], BUSY)], axis=1).astype(np.float32),
        parts=replace(parts, train=kept),
        last=past[:, back(hour)],
        week=past[:, back(series.week)],
        linear=np.concatenate([past, calendar, sky], axis=1),
        scale=scale,
        step=raw.time,
    )


def frames(occupancy: np.ndarray) -> np.ndarray:
    """(n, hours) share of time that lanes are occupied -> (n, hours, LANES, CELLS) uint8 pictures of a road with cars.

    Twice the share of the cells is filled, as where cars are densest, each with a car of its own brightness on asphalt of
    its own brightness. Nothing but the share says how many cars there are; one share always makes the same picture.
    """
    values, where = np.unique(occupancy, return_inverse=True)
    cells = LANES * CELLS
    pictures = np.empty((len(values), cells), np.uint8)
    for number, cars in enumerate(np.clip(np.rint(2 * values * cells), 0, cells).astype(int).tolist()):
        rng = np.random.default_rng([number, cars])
        pictures[number] = rng.integers(10, 60, cells)
        pictures[number, rng.permutation(cells)[:cars]] = rng.integers(150, 256, cars)
    return pictures.reshape(-1, LANES, CELLS)[where.reshape(occupancy.shape)]
