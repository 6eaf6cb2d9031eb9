"""An ensemble read back from files says what the run's own said, and nothing of a file is executed."""

from __future__ import annotations

import json
import threading

import numpy as np
import pandas as pd
import pytest
from federations import rows, run
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from test_ensemble import NAMES, members
from test_files import keras_net
from torch import nn

import polyfed as pf


def sorted_rows(x):
    return np.sort(x, axis=1)


def module():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def result():
    keras = pf.Client("dense", pf.keras(keras_net), data=rows(5), preprocess=StandardScaler(), split=pf.Split(test=0.3))
    return run(pf.Local(), [*members(), keras])


def test_votes_are_those_of_the_run(result, tmp_path):
    saved = pf.load(result.save(tmp_path / "out"))
    x, _ = rows(9)
    before = result.ensemble().votes(x)
    after = saved.ensemble(into={"net": module()}).votes(x)
    assert list(after) == [*NAMES, "dense"]
    for name, vote in after.items():
        np.testing.assert_allclose(vote, before[name], atol=1e-6, err_msg=name)
    by_rows = saved.ensemble(["forest", "logistic"], weights="num_examples").predict_proba(x)
    np.testing.assert_allclose(
        by_rows, result.ensemble(["forest", "logistic"], weights="num_examples").predict_proba(x), atol=1e-6
    )
    with pytest.raises(pf.errors.UsageError, match=r"net is a PyTorch model"):
        saved.ensemble()
    with pytest.raises(pf.errors.UsageError, match="there is no client 'nobody'"):
        saved.ensemble("nobody")


def test_tables_with_gaps_and_text_and_named_classes_come_back(tmp_path):
    x, y = rows(0)
    frame = pd.DataFrame({"a": np.where(x[:, 0] > 1, np.nan, x[:, 0]), "b": np.where(x[:, 1] > 0, "high", "low")})
    frame["c"] = x[:, 2]
    frame["state"] = np.where(y, "ill", "healthy")
    client = pf.Client("one", pf.sklearn(LogisticRegression()), data=frame, target="state", preprocess=pf.tabular())
    result = run(pf.Local(), [client])
    again = pf.load(result.save(tmp_path / "out")).ensemble()
    case = frame.drop(columns="state")
    assert again.predict(case).tolist() == result.ensemble().predict(case).tolist()
    assert set(again.predict(case)) == {"ill", "healthy"}
    with pytest.raises(pf.errors.DataError, match="one reads the columns 'b', 'c', which the rows lack"):
        again.predict(case[["a"]])


def test_a_preprocessing_that_is_code_is_noted_and_its_client_left_out(tmp_path):
    clients = [
        pf.Client("code", pf.sklearn(LogisticRegression()), data=rows(0), preprocess=lambda x: x * 2),
        pf.Client("plain", pf.sklearn(LogisticRegression()), data=rows(1)),
    ]
    saved = pf.load(run(pf.Local(), clients).save(tmp_path / "out"))
    assert any(note.startswith("preprocessing of code: ") and "function" in note for note in saved.notes)
    with pytest.raises(
        pf.errors.UsageError, match=r"preprocessing of code: .* leave it out: name the others in members="
    ):
        saved.ensemble()
    assert len(saved.ensemble("plain").predict(rows(2)[0])) == 60


class Odd(StandardScaler):
    """A transformer of a user's own that holds what no file takes."""

    def fit(self, x, y=None):
        self.lock_ = threading.Lock()
        return super().fit(x, y)


@pytest.mark.parametrize("step", [Odd(), FunctionTransformer(sorted_rows)])
def test_a_transformer_that_no_safe_format_takes_costs_a_note_and_not_the_result(tmp_path, step):
    client = pf.Client("odd", pf.sklearn(LogisticRegression()), data=rows(0), preprocess=step)
    saved = pf.load(run(pf.Local(), [client]).save(tmp_path / "out"))
    assert [note for note in saved.notes if note.startswith("preprocessing of odd: this ")]
    assert saved.models["odd"].predict(rows(1)[0]).shape == (60,)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e["members"]["plain"].update(steps={"x": "../../evil.skops"}),
        lambda e: e["members"]["plain"].update(steps={"x": "plain-0.skops"}),
        lambda e: e["members"]["plain"].update(steps=3),
        lambda e: e["members"]["plain"].update(wants={"x": [{}]}),
        lambda e: e["members"].update(plain=7),
        lambda e: e["members"]["plain"].update(steps={"x": ["plain-0.skops"]}),
        lambda e: e["members"]["plain"].update(num_examples=0),
        lambda e: e["members"]["plain"].update(num_examples=-5),
        lambda e: e["members"]["plain"].update(num_examples=True),
        lambda e: e["members"]["plain"].update(num_examples=2.5),
        lambda e: e.update(classes=["0", "0"]),
        lambda e: e.update(classes=[0, "0"]),
        lambda e: e.update(classes="01"),
        lambda e: e.update(outputs=True, classes=["0"]),
        lambda e: e.update(outputs=-1, classes=None),
        lambda e: e.update(classes=["a", "b"]),
        lambda e: e.update(classes=None),
        lambda e: e.update(classes=["a"]),
        lambda e: e.update(members=[]),
    ],
)
def test_a_description_that_was_changed_is_corrupt(tmp_path, change):
    client = pf.Client("plain", pf.sklearn(LogisticRegression()), data=rows(1))
    folder = run(pf.Local(), [client]).save(tmp_path / "out")
    said = json.loads((folder / "result.json").read_text())
    change(said["ensemble"])
    (folder / "result.json").write_text(json.dumps(said))
    with pytest.raises(pf.errors.CorruptError):
        pf.load(folder).ensemble(weights="num_examples").predict(rows(1)[0])


def test_a_file_of_preprocessing_never_lies_outside_the_folder(tmp_path):
    client = pf.Client("plain", pf.sklearn(LogisticRegression()), data=rows(1), preprocess=StandardScaler())
    folder = run(pf.Local(), [client]).save(tmp_path / "out")
    (folder / "preprocess" / "plain-0.skops").rename(tmp_path / "evil.skops")
    said = json.loads((folder / "result.json").read_text())
    said["ensemble"]["members"]["plain"]["steps"] = {"x": "../../evil.skops"}
    (folder / "result.json").write_text(json.dumps(said))
    with pytest.raises(pf.errors.CorruptError, match="preprocessing of plain is described by"):
        pf.load(folder).ensemble()


def test_a_folder_of_an_earlier_version_says_what_is_missing(tmp_path):
    folder = run().save(tmp_path / "out")
    said = json.loads((folder / "result.json").read_text())
    del said["ensemble"]
    (folder / "result.json").write_text(json.dumps(said))
    with pytest.raises(pf.errors.UsageError, match="save the result again"):
        pf.load(folder).ensemble()
