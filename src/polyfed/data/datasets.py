"""Real data that comes with the package, each with its natural clients. Sources and licences: ``real/PROVENANCE.md``.

>>> heart().rows
{'cleveland': 304, 'hungary': 292, 'switzerland': 123, 'va': 199}
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import numpy as np

from polyfed.core.errors import DataError, MissingExtraError
from polyfed.core.tree import Array
from polyfed.data.table import Raw

View = Literal["pix", "fou", "kar", "zer", "mor", "fac"]
VIEWS: tuple[View, ...] = ("pix", "fou", "kar", "zer", "mor", "fac")


@dataclass(frozen=True, eq=False)
class Dataset(Mapping[str, Any]):
    """Client name -> its data, in a form that ``pf.Client(data=...)`` takes.

    Attributes:
        name: the data set's.
        clients: client name -> DataFrame, `Raw`, or arrays.
        target: what is predicted: the column of a DataFrame; else a word for it.
        source: origin and licence.
    """

    name: str
    clients: Mapping[str, Any]
    target: str
    source: str

    def __getitem__(self, client: str) -> Any:
        if client not in self.clients:
            raise DataError(f"{self.name} has no client {client!r}; it has {', '.join(self.clients)}")
        return self.clients[client]

    def __iter__(self) -> Iterator[str]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)

    @property
    def rows(self) -> dict[str, int]:
        """Client name -> number of rows."""
        return {name: len(data[1] if isinstance(data, tuple) else data) for name, data in self.clients.items()}


def heart(*, zeros_as_missing: bool = True, drop_repeated: bool = True) -> Dataset:
    """Heart disease at four hospitals: DataFrames with gaps for "cleveland", "hungary", "switzerland" and "va"; needs pandas.

    Columns: age, sex, cp (chest pain), trestbps (blood pressure at rest, mmHg), chol (mg/dl), fbs (fasting sugar
    > 120 mg/dl), restecg, thalch (greatest heart rate), exang (pain in exercise), oldpeak and slope (ST segment), ca
    (vessels coloured), thal, and the target "disease" (bool: the file's ``num > 0``).

    Traps: ca, thal and slope are mostly missing outside Cleveland. A cholesterol of 0 is a gap (all of Switzerland, 49
    rows of VA), and so is one blood pressure of 0. Two rows repeat another in every value but the number: 920 records,
    918 different ones. Switzerland has 8 healthy patients: split by class. Cleveland's last
    record (28 years, no slope, ca or thal) is one more than the 303 that UCI counts there.

    Args:
        zeros_as_missing: False keeps chol = 0 and trestbps = 0 as they are in the file.
        drop_repeated: False keeps all 920 records.

    UCI Heart Disease (Janosi, Steinbrunn, Pfisterer, Detrano 1989), CC BY 4.0.
    """
    pd = _pandas()
    table = pd.read_csv(_open("heart_disease_uci.csv.gz")).drop(columns="id")
    if drop_repeated:
        table = table.drop_duplicates()
    if zeros_as_missing:
        table[["chol", "trestbps"]] = table[["chol", "trestbps"]].replace(0.0, np.nan)
    table["disease"] = table.pop("num") > 0
    names = {"cleveland": "Cleveland", "hungary": "Hungary", "switzerland": "Switzerland", "va": "VA Long Beach"}
    place = table.pop("dataset")
    clients = {name: table[place == there].reset_index(drop=True) for name, there in names.items()}
    return Dataset("heart", clients, "disease", "UCI Heart Disease (1989), CC BY 4.0")


def thyroid(
    *, target: Literal["ill", "diagnosis"] = "ill", errors_as_missing: bool = True, min_rows: int = 50
) -> Dataset:
    """Thyroid records by the clinic that referred them, DataFrames with gaps: "other", "svi", "svhc", "stmw", "svhd"; needs pandas.

    9,172 records, 28 inputs: age, sex, true/false facts of history and complaint, six hormone values (TSH, T3, TT4, T4U,
    FTI, TBG), and for each of them whether it was measured. The patient's number is left out.

    Traps: four ages are errors (455, 65511, 65512, 65526). "X_measured" says that X is no gap. 6,771 are healthy, and the
    32 letters of the diagnosis are from 2,201 others, some of them once.

    Args:
        target: "ill" (bool: any diagnosis) or "diagnosis" (the file's letters, "-" for none).
        errors_as_missing: ages above 120 become gaps; False keeps them.
        min_rows: clinics with fewer records are left out (WEST has 3).

    UCI Thyroid Disease (Garvan Institute, Quinlan 1987), CC BY 4.0.
    """
    pd = _pandas()
    table = pd.read_csv(_open("thyroid.csv.gz")).drop(columns="patient_id")
    diagnosis = table.pop("target")
    for column in table.columns:
        if set(table[column].unique()) <= {"t", "f"}:
            table[column] = table[column] == "t"
    if errors_as_missing:
        table["age"] = table["age"].astype("float64").mask(table["age"] > 120)
    table[target] = diagnosis if target == "diagnosis" else diagnosis != "-"
    place = table.pop("referral_source").str.lower()
    clients = {
        name: table[place == name].reset_index(drop=True)
        for name, count in place.value_counts().items()
        if count >= min_rows
    }
    return Dataset("thyroid", clients, target, "UCI Thyroid Disease (Garvan Institute, 1987), CC BY 4.0")


def mfeat(*views: View) -> Dataset:
    """2,000 handwritten digits seen in six ways: (x, y) with x (2000, width) float32 and y (2000,) int64, rows aligned.

    "pix" 240 (an image of 16 x 15), "fou" 76 Fourier coefficients, "kar" 64 Karhunen-Loève coefficients, "zer" 47
    Zernike moments, "mor" 6 shape measurements, "fac" 216 profile correlations.

    Traps: row i is the same digit in every view, so split all views alike (one name, one seed). The rows are sorted, 200 of
    each digit. The scales of the views' columns differ by a factor of thousands.

    Args:
        views: which of them; all six if none is named.

    UCI Multiple Features (Duin 1998), CC BY 4.0.
    """
    if unknown := [view for view in views if view not in VIEWS]:
        raise DataError(f"mfeat has no view {unknown[0]!r}; it has {', '.join(VIEWS)}")
    return Dataset(
        "mfeat", {view: _view(view) for view in views or VIEWS}, "digit", "UCI Multiple Features (1998), CC BY 4.0"
    )


@cache
def _view_file(view: str) -> Array:
    return np.loadtxt(_open(f"mfeat/{view}.csv.gz"), delimiter=",", skiprows=1, dtype=np.float64)


def _view(view: str) -> tuple[Array, Array]:
    table = _view_file(view)  # the last column is the digit
    return table[:, :-1].astype(np.float32), table[:, -1].astype(np.int64)


@dataclass(frozen=True, eq=False)
class Series:
    """One measured quantity over time.

    Attributes:
        time: (n,) datetime64[s], rising.
        value: (n,) float64.
        step: (n,) int64 place on the regular grid; a jump by more than 1 is a gap in the record.
        week: grid steps a week.
        unit: what is measured.
    """

    time: Array
    value: Array
    step: Array
    week: int
    unit: str

    def __len__(self) -> int:
        return len(self.value)


def traffic(*, car_parks: bool = False) -> Dataset:
    """Four cities' hourly traffic, or 28 car parks' half-hourly occupancy: client name -> `Series`; see `windows`.

    Cities: "minneapolis" (vehicles on I-94, 2012-2018), "san_francisco" (share of time that freeway lanes are occupied,
    2015-2016), "washington" (bicycle trips, 2010-2019), "birmingham" (cars in the largest of the car parks with a full
    record, 2016). With ``car_parks=True`` the clients are Birmingham's car parks, called by their own names.

    Traps: the four measure different things in different units. Minneapolis names an hour once for each kind of weather (7,629
    repeats, dropped), lacks hours, and lacks ten months of 2014-15. The car parks are recorded from 8:00 to 16:30; the grid's
    18 steps a day leave the nights out. Two car parks with hardly any records are left out, negative counts are gaps.

    UCI Metro Interstate Traffic Volume (Hogue 2019), UCI Parking Birmingham (Stolfi 2019), Caltrans PeMS by the Monash
    archive: CC BY 4.0; Capital Bikeshare system data.
    """
    source = "UCI (Hogue 2019; Stolfi 2019), Caltrans PeMS (Monash archive): CC BY 4.0; Capital Bikeshare system data"
    parks = _car_parks()
    if car_parks:
        return Dataset("traffic", parks, "occupancy", source)
    full = max(len(park) for park in parks.values())
    largest = max(
        (name for name in parks if len(parks[name]) == full), key=lambda name: float(parks[name].value.mean())
    )
    clients = {
        "minneapolis": _hourly("traffic_volume", "date_time", "traffic_volume", "vehicles an hour"),
        "san_francisco": _hourly("sf_traffic", "ts", "y", "share of time occupied"),
        "washington": _hourly("bikesharing", "ts", "count", "trips an hour"),
        "birmingham": parks[largest],
    }
    return Dataset("traffic", clients, "next value", source)


def windows(
    series: Series,
    *,
    lags: int = 168,
    horizon: int = 1,
    scale: tuple[float, float] | None = None,
    fill: int = 3,
    train: float = 0.65,
) -> Raw:
    """Supervised rows: the last `lags` values, the hour and the weekday -> the value `horizon` steps later.

    Args:
        series: what is measured.
        lags: how many past steps a row sees; 168 hours are a week.
        horizon: how many steps ahead, from 1.
        scale: mean and deviation to standardise with; None takes them of the first `train` of the values only.
        fill: inputs over gaps of at most so many steps repeat the last value before (never a later one); targets are always
            measured ones. Rows over longer gaps are left out.
        train: see scale.

    Returns:
        x (n, lags + 4) float32: values from the oldest to the newest, then sine and cosine of the time of day and of the
        week of the target; target (n,) float32, standardised; time (n,) the target's grid step. Split with
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
    x = np.concatenate([past[whole], _calendar(when)], axis=1)
    return Raw({"x": x.astype(np.float32)}, grid[at[whole]].astype(np.float32), time=at[whole] + start)


def _scale(series: Series, train: float) -> tuple[float, float]:
    first = series.value[: max(int(len(series) * train), 1)]
    return float(first.mean()), float(first.std()) or 1.0


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


@cache
def _hourly(file: str, time_column: str, value_column: str, unit: str) -> Series:
    table = _csv(f"traffic/{file}.csv.gz", time_column, value_column)
    time, first = np.unique(np.array(table[time_column], "datetime64[s]"), return_index=True)
    value = np.array(table[value_column], np.float64)[first]
    hour = time.astype("datetime64[h]").astype(np.int64)
    return Series(time, value, hour, 168, unit)


@cache
def _car_parks() -> dict[str, Series]:
    table = _csv("traffic/parking.csv.gz", "SystemCodeNumber", "Occupancy", "LastUpdated")
    names = np.array(table["SystemCodeNumber"])
    time = np.array(table["LastUpdated"], "datetime64[s]")
    value = np.array(table["Occupancy"], np.float64)
    parks = {str(name): _park(time[names == name], value[names == name]) for name in np.unique(names)}
    return {name: park for name, park in parks.items() if len(park) >= 500}


def _park(time: Array, value: Array) -> Series:
    """Readings come at odd minutes: each belongs to the nearest half hour, the first one of a half hour counts."""
    time, value = time[value >= 0], value[value >= 0]
    half = (time + np.timedelta64(15, "m")).astype(np.int64) // 1800
    day, slot = np.divmod(half, 48)
    open_hours = (slot >= 16) & (slot <= 33)  # 8:00 to 16:30
    step, first = np.unique((day * 18 + slot - 16)[open_hours], return_index=True)
    return Series(time[open_hours][first], value[open_hours][first], step, 18 * 7, "cars")


def _csv(file: str, *columns: str) -> dict[str, list[str]]:
    with io.TextIOWrapper(_open(file), encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines)
        header = next(rows)
        places = [header.index(column) for column in columns]
        found = [[row[place] for place in places] for row in rows]
    return {column: list(values) for column, values in zip(columns, zip(*found, strict=True), strict=True)}


def _open(file: str) -> Any:
    return gzip.open(io.BytesIO(resources.files("polyfed.data").joinpath("real", file).read_bytes()))


def _pandas() -> Any:
    try:
        import pandas as pd
    except ImportError:
        raise MissingExtraError("pandas", "sklearn") from None
    return pd
