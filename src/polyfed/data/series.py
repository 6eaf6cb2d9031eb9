"""A quantity over time, and the supervised rows that forecasting needs: past values -> a later one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from polyfed.core.errors import DataError
from polyfed.core.tree import Array
from polyfed.data.table import Raw

__all__ = ["Series", "windows"]


@dataclass(frozen=True, eq=False)
class Series:
    """One measured quantity over time.

    Attributes:
        time: (n,) datetime64[s], rising.
        value: (n,) float64.
        step: (n,) int64 place on the regular grid; a jump by more than 1 is a gap in the record.
        week: grid steps a week.
        unit: what is measured.
        weather: (n, k) float64, the weather when it was measured; NaN is a gap. k is 0 where the record has none.
        weather_columns: their k names.
    """

    time: Array
    value: Array
    step: Array
    week: int
    unit: str
    weather: Array = field(default_factory=lambda: np.zeros((0, 0)))
    weather_columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.value)


def windows(
    series: Series,
    *,
    lags: int = 168,
    horizon: int = 1,
    scale: tuple[float, float] | None = None,
    fill: int = 3,
    train: float = 0.65,
    weather: bool = False,
) -> Raw:
    """Supervised rows: the last `lags` values, the hour and the weekday -> the value `horizon` steps later.

    The next hour is ``horizon=1`` for a city and ``horizon=2`` for a car park, whose steps are half hours (after its last
    hour of a day comes the next morning).

    Args:
        series: what is measured.
        lags: how many past steps a row sees; 168 hours are a week.
        horizon: how many steps ahead, from 1.
        scale: mean and deviation to standardise with; None takes them of the first `train` of the values only.
        fill: inputs over gaps of at most so many steps repeat the last value before (never a later one); targets are always
            measured ones. Rows over longer gaps are left out.
        train: see scale.
        weather: True adds the series' k weather columns, none where it has none: the last known at the time of the newest
            value, never a later one, each standardised by the first `train` of its values and cut at 5 deviations.

    Returns:
        x (n, lags + 4 + k) float32: values from the oldest to the newest, then sine and cosine of the time of day and of
        the week of the target, then the weather; target (n,) float32, standardised; time (n,) the target's grid step. Split with
        ``Split(by="time", gap=lags + horizon - 1)``: no input of a later part is then a target of an earlier one.

    Raises:
        DataError: no row has so long a past.
    """
    if lags < 1 or horizon < 1:
        raise DataError(f"windows(lags={lags}, horizon={horizon}): both are at least 1")
    mean, sd = _scale(series, train) if scale is None else scale
    start = int(series.step[0])
    grid = np.full(int(series.step[-1]) - start + 1, np.nan)
    grid[series.step - start] = (series.value - mean) / sd
    seen = _carried(grid, fill)
    at = series.step - start
    at = at[at >= lags + horizon - 1]
    past = (
        np.lib.stride_tricks.sliding_window_view(seen, lags)[at - horizon - lags + 1]
        if len(at)
        else np.zeros((0, lags))
    )
    whole = ~np.isnan(past).any(axis=1)
    if not whole.any():
        raise DataError(f"no window of {lags} steps is without a gap longer than fill={fill} in {len(series)} values")
    when = series.time[np.isin(series.step - start, at[whole])]
    columns = [past[whole], _calendar(when)]
    if weather and series.weather_columns:
        newest = np.searchsorted(series.step - start, at[whole] - horizon, side="right") - 1
        columns.append(_weather(series, train)[newest])
    x = np.concatenate(columns, axis=1)
    return Raw({"x": x.astype(np.float32)}, grid[at[whole]].astype(np.float32), time=at[whole] + start)


def _scale(series: Series, train: float) -> tuple[float, float]:
    first = series.value[: max(int(len(series) * train), 1)]
    return float(first.mean()), float(first.std()) or 1.0


def _weather(series: Series, train: float) -> Array:
    """(n, k) standardised, gaps carried forward; before the first value stands the mean, 0."""
    out = np.zeros_like(series.weather)
    first = max(int(len(series) * train), 1)
    for j, column in enumerate(series.weather.T):
        known = ~np.isnan(column)
        seen = column[:first][known[:first]]
        mean, sd = (float(seen.mean()), float(seen.std()) or 1.0) if len(seen) else (0.0, 1.0)
        last = np.maximum.accumulate(np.where(known, np.arange(len(column)), -1))
        out[:, j] = np.where(last >= 0, (column[last] - mean) / sd, 0.0)
    return np.clip(out, -5.0, 5.0)  # rain is 0 in most hours: a storm would be 70 deviations


def _carried(grid: Array, most: int) -> Array:
    """Gaps of at most `most` steps repeat the last value before them."""
    known = ~np.isnan(grid)
    last = np.maximum.accumulate(np.where(known, np.arange(len(grid)), -1))
    following = np.minimum.accumulate(np.where(known, np.arange(len(grid)), len(grid))[::-1])[::-1]
    short = (last >= 0) & (following - last - 1 <= most)
    return np.where(short, grid[last], np.nan)


def _calendar(when: Array) -> Array:
    """(n, 4) sine and cosine of the time of day and of the week."""
    seconds = when.astype("datetime64[s]").astype(np.int64)
    day, week = seconds / 86_400, (seconds / 86_400 - 4) / 7  # 1970-01-01 was a Thursday; weeks begin on Monday
    return np.stack([f(2 * np.pi * t) for t in (day, week) for f in (np.sin, np.cos)], axis=1)
