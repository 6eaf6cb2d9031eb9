import numpy as np
import pytest

from polyfed.core.errors import DataError
from polyfed.data import cohorts, read
from polyfed.data.datasets import BREAST_COMMON, breast

pd = pytest.importorskip("pandas")

# The form of the two files, with invented patients.
NKI = """time,event,Diam,N,ER,Grade,Age,TSPYL5,NM_004702,DIAPH3.1
7.7,0,<=2cm,1-3,Positive,Intermediate,50,-0.1,0.5,1
4.9,1,>2cm,>=4,Negative,Poorly diff,41,-0.2,0.6,2
5.1,1,>2cm,1-3,Positive,Well diff,42,-0.3,0.7,3
4.9,0,>2cm,1-3,Positive,Well diff,43,-0.4,0.8,4
5,1,<=2cm,1-3,Positive,Well diff,44,-0.5,0.9,5
5,0,<=2cm,1-3,Positive,Well diff,45,-0.6,1.0,6
"""
TRANSBIG = """% Taken from http://www.ncbi.nlm.nih.gov/geo/query/acc.cgi?acc=GSE7390
@relation tdm.data
@attribute age numeric
@attribute size numeric
@attribute grade {well differentiated,intermediate,poorly differentiated,unkown}
@attribute er {negative,positive}
@attribute t.tdm numeric
@attribute e.tdm {0,1}
@attribute X219340_s_at numeric
@attribute X205034_at numeric
@data
57,3,poorly differentiated,negative,723,1,7.0,9.9
42,2,unkown,positive,6255,0,7.7,8.1
48,2.1,intermediate,positive,1500,0,7.1,8.2
46,0.6,well differentiated,positive,1900,1,6.1,8.3
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / cohorts.NKI[0]).write_text(NKI)
    (tmp_path / cohorts.TRANSBIG[0]).write_text(TRANSBIG)
    return tmp_path


def test_patients_count_as_ill_within_five_years_and_the_lost_are_left_out(folder):
    data = breast(folder)
    assert data.rows == {"nki": 5, "transbig": 3}
    assert data["nki"]["metastasis"].tolist() == [False, True, False, True, False]
    assert data["nki"]["age"].tolist() == [50, 41, 42, 44, 45]
    assert data["transbig"]["metastasis"].tolist() == [True, False, False]


def test_columns_that_mean_the_same_are_called_the_same_and_the_outcome_is_no_input(folder):
    data = breast(folder)
    nki, transbig = data["nki"], data["transbig"]
    assert nki.columns.tolist() == [
        *("age", "er", "grade", "over_2cm", "nodes_4_or_more", "TSPYL5", "CCNE2", "DIAPH3.1", "metastasis")
    ]
    assert transbig.columns.tolist() == [
        *("age", "er", "grade", "over_2cm", "size_cm", "219340_s_at", "CCNE2", "metastasis")
    ]
    assert set(nki.columns) & set(transbig.columns) == {*BREAST_COMMON, "metastasis"}
    assert (nki.dtypes[list(BREAST_COMMON)] == transbig.dtypes[list(BREAST_COMMON)]).all()
    assert nki["grade"].tolist() == ["intermediate", "poor", "well", "well", "well"]
    assert transbig["grade"].isna().tolist() == [False, True, False]
    assert nki["over_2cm"].tolist() == [False, True, True, False, False]
    assert transbig["over_2cm"].tolist() == [True, False, False]
    assert nki["er"].tolist() == [True, False, True, True, True]
    assert nki["nodes_4_or_more"].sum() == 1
    assert read("nki", nki, target="metastasis").target.dtype == bool


def test_what_is_not_installed_is_named_with_the_command(folder, monkeypatch):
    (folder / cohorts.TRANSBIG[0]).unlink()
    with pytest.raises(DataError, match=r"GSE7390-metastasis.arff is not there: give the folder that holds it"):
        breast(folder)
    monkeypatch.setattr(cohorts, "find_spec", lambda package: None)
    with pytest.raises(
        DataError, match=r"nki70.csv is not there: .* pip install --no-deps oncodatasets scikit-survival$"
    ):
        breast()


@pytest.mark.heavy  # `make test-all` installs the files
@pytest.mark.skipif(
    cohorts.find_spec("oncodatasets") is None or cohorts.find_spec("sksurv") is None,
    reason="pip install --no-deps oncodatasets scikit-survival",
)
def test_the_installed_cohorts_have_the_numbers_that_the_docstring_says():
    data = breast()
    assert data.rows == {"nki": 139, "transbig": 189}
    assert {name: int(frame["metastasis"].sum()) for name, frame in data.items()} == {"nki": 34, "transbig": 35}
    assert {name: frame.shape[1] - 1 for name, frame in data.items()} == {"nki": 75, "transbig": 81}
    for frame in data.values():
        assert frame.drop(columns="grade").notna().all().all()
        means = frame["CCNE2"].groupby(frame["grade"]).mean()
        assert means["well"] < means["intermediate"] < means["poor"]
        assert np.isfinite(frame["CCNE2"]).all()
