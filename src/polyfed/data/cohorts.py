"""The two breast cancer cohorts of `polyfed.data.datasets.breast`: found where they are installed, and named alike."""

from __future__ import annotations

import io
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from polyfed.core.errors import DataError
from polyfed.core.tree import Array

TARGET = "metastasis"
CLINICAL = ("age", "er", "grade", "over_2cm")
COMMON_GENE = "CCNE2"
YEARS = 5.0
DAYS_A_YEAR = 365.25
NKI = ("breast_cancer_nki70.csv", "oncodatasets", "oncodatasets", "data")
TRANSBIG = ("breast_cancer_GSE7390-metastasis.arff", "scikit-survival", "sksurv", "datasets/data")
GRADES = {"Well diff": "well", "well differentiated": "well", "Intermediate": "intermediate"}
GRADES |= {"intermediate": "intermediate", "Poorly diff": "poor", "poorly differentiated": "poor"}


def cohorts(pd: Any, path: str | Path | None) -> dict[str, Any]:
    """Client name -> DataFrame; `pd` is pandas, `path` a folder with both files or None for the installed packages."""
    return {"nki": _nki(pd, _text(path, *NKI)), "transbig": _transbig(pd, _text(path, *TRANSBIG))}


def _text(path: str | Path | None, file: str, distribution: str, package: str, folder: str) -> str:
    """The file's text; of a package only its place is looked up, nothing of it is imported."""
    if path is not None:
        place = Path(path) / file
        hint = "give the folder that holds it"
    else:
        spec = find_spec(package)
        homes = list(spec.submodule_search_locations or ()) if spec is not None else []
        place = Path(homes[0], folder, file) if homes else Path(file)
        both = " ".join((NKI[1], TRANSBIG[1]))
        hint = f"it comes with {distribution}; install both with: pip install --no-deps {both}"
    try:
        return place.read_text(encoding="utf-8")
    except OSError:
        raise DataError(f"{file} is not there: {hint}") from None


def _nki(pd: Any, text: str) -> Any:
    table = pd.read_csv(io.StringIO(text))
    years, event = table.pop("time").to_numpy(), table.pop("event").to_numpy() == 1
    clinical = {
        "age": table.pop("Age").astype("float64"),
        "er": table.pop("ER") == "Positive",
        "grade": table.pop("Grade").map(GRADES),
        "over_2cm": table.pop("Diam") == ">2cm",
        "nodes_4_or_more": table.pop("N") == ">=4",
    }
    genes = table.rename(columns={"NM_004702": COMMON_GENE})
    return _within_five_years(pd.concat([pd.DataFrame(clinical), genes], axis=1), years, event)


def _transbig(pd: Any, text: str) -> Any:
    names = re.findall(r"(?m)^@attribute (\S+)", text)
    body = text.split("@data\n", maxsplit=1)[1]
    table = pd.read_csv(io.StringIO(body), header=None, names=names)
    years, event = table.pop("t.tdm").to_numpy() / DAYS_A_YEAR, table.pop("e.tdm").to_numpy() == 1
    size = table.pop("size").astype("float64")
    clinical = {
        "age": table.pop("age").astype("float64"),
        "er": table.pop("er") == "positive",
        "grade": table.pop("grade").map(GRADES),  # the file's "unkown" becomes a gap
        "over_2cm": size > 2.0,
        "size_cm": size,
    }
    probes = table.rename(columns=lambda name: COMMON_GENE if name == "X205034_at" else name.removeprefix("X"))
    return _within_five_years(pd.concat([pd.DataFrame(clinical), probes], axis=1), years, event)


def _within_five_years(table: Any, years: Array, event: Array) -> Any:
    table[TARGET] = event & (years <= YEARS)
    known = event | (years >= YEARS)
    return table[np.asarray(known)].reset_index(drop=True)
