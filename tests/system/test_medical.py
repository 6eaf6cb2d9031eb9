"""The medical showcase: what its README says of its pieces, and the part that needs files that are not polyfed's."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.tree import DecisionTreeClassifier

import polyfed as pf

FOLDER = Path(__file__).parents[2] / "examples" / "medical"


@pytest.fixture
def pieces(monkeypatch):
    """The showcase's own modules, which lie beside its run.py."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import figures
    import modalities
    import paired
    import thyroid

    yield {"figures": figures, "modalities": modalities, "paired": paired, "thyroid": thyroid}
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def run(*words):
    env = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, FOLDER / "run.py", *words], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_input_of_zeros_counts_as_missing_and_its_half_of_the_network_does_not_matter(pieces):
    net = pieces["paired"].Both(0.25).eval()
    image, genes = torch.rand(4, 1, 28, 28), torch.randn(4, 64)
    with torch.no_grad():
        before = net(torch.zeros_like(image), genes)
        for parameter in net.base.parameters():
            parameter.add_(1.0)
        assert torch.equal(net(torch.zeros_like(image), genes), before)
        assert not torch.equal(net(image, genes), before)


def test_dropout_leaves_out_one_input_of_a_row_and_never_both(pieces):
    net = pieces["paired"].Both(0.5).train()
    net.head = torch.nn.Identity()  # shows the features
    torch.nn.init.ones_(net.base.out.bias)
    torch.nn.init.ones_(net.branch[0].bias)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        features = net(torch.rand(200, 1, 28, 28), torch.randn(200, 64))
    image, genes = features[:, :128].any(1), features[:, 128:].any(1)
    assert (image | genes).all()
    assert 20 < (image & ~genes).sum() < 80
    assert 20 < (genes & ~image).sum() < 80


def test_each_case_is_at_one_hospital_and_no_public_case_is_at_any(pieces):
    public, rows = pieces["modalities"].divided(3)
    together = np.concatenate([public, *rows.values()])
    assert len(np.unique(together)) == len(together) == 1994
    assert set(rows) == set(pieces["modalities"].NETS)


def test_training_alone_makes_at_least_as_many_steps(pieces):
    # 3 epochs of 4 batches in each of 12 rounds, and 2 epochs of 10 public batches in all but the first
    steps = pieces["figures"].steps_a_round(118, 300, batch=32, epochs=3, digest=2, rounds=12)
    assert 12 * (steps - 1) < 12 * 3 * 4 + 11 * 2 * 10 <= 12 * steps


def test_west_is_no_participant_and_every_clinic_reads_the_same_inputs(pieces):
    thyroid = pieces["thyroid"]
    assert thyroid.ASKS not in thyroid.CLINICS
    tables = thyroid.tables()
    assert len(tables[thyroid.ASKS]) == 3
    assert {tuple(table.columns) for table in tables.values()} == {tuple(tables["other"].columns)}
    assert len(tables["other"].columns) == thyroid.INPUTS + 1
    assert len({name for table in tables.values() for name in table[thyroid.TARGET]}) == thyroid.CLASSES


def test_no_diagnosis_is_spoken_of_as_none(pieces, monkeypatch):
    thyroid = pieces["thyroid"]
    x = pd.DataFrame({"TSH": np.arange(40.0)})
    y = np.where(np.arange(40) % 3 == 0, "ill", "-")
    told = x.head(3).assign(**{thyroid.TARGET: ["ill", "-", "-"]})
    members = [pf.Client("one", pf.sklearn(DecisionTreeClassifier(max_depth=1)), data=(x, y), split=pf.Split(0.2, 0.2))]
    result = pf.simulate(pf.Local(), members, rounds=1, baselines=())
    monkeypatch.setattr(thyroid, "tables", lambda: {thyroid.ASKS: told})
    monkeypatch.setattr(thyroid, "opinion", lambda *_: np.array([[0.9, 0.1]] * 3))
    monkeypatch.setattr(type(result), "student", None)
    text = thyroid.west(result, None)
    assert "vote for none" in text or "vote for ill" in text
    assert not any(word == "-" for line in text.splitlines() for word in line.split())


def test_without_the_files_of_the_genes_the_part_is_left_out_and_says_what_to_install(pieces, monkeypatch):
    import genes

    from polyfed.core.errors import DataError
    from polyfed.data import cohorts

    monkeypatch.setattr(cohorts, "find_spec", lambda package: None)
    genes.cohort.cache_clear()
    with pytest.raises(DataError, match="pip install --no-deps oncodatasets scikit-survival"):
        genes.show(0, small=True)


@pytest.mark.heavy
def test_the_genes_run_where_their_files_are_installed():
    said = run("--part", "genes", "--small")
    assert "left out" not in said
    assert "transbig" in said
