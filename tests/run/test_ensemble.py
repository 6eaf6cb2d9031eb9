"""A joint opinion: every participant reads the raw case as it read its own rows, and the mean is what is said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from federations import rows, run
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

import polyfed as pf
from polyfed.core import metrics
from polyfed.run.ensemble import Ensemble, Member

NAMES = ("net", "forest", "logistic")


def members(**changes):
    """Three kinds of model, three preprocessings; `changes` are arguments of every client."""
    models = {
        "net": (pf.torch(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), lr=0.2), StandardScaler()),
        "forest": (pf.sklearn(RandomForestClassifier(7)), None),
        "logistic": (pf.sklearn(LogisticRegression()), PCA(2)),
    }
    return [
        pf.Client(
            name, model, **{"data": rows(i, n=60 + 20 * i), "preprocess": step, "split": pf.Split(test=0.3)} | changes
        )
        for i, (name, (model, step)) in enumerate(models.items())
    ]


@pytest.fixture(scope="module")
def result():
    return run(pf.Local(), members())


def test_a_vote_is_what_the_participants_own_model_says_through_its_own_preprocessing(result):
    x, _ = rows(9)
    votes = result.ensemble().votes(x)
    assert list(votes) == list(NAMES)
    through = result.population.prepared["logistic"].fitted["x"].transform(x)
    np.testing.assert_allclose(votes["logistic"], result.models["logistic"].predict_proba(through), atol=1e-6)
    np.testing.assert_allclose(votes["forest"], result.models["forest"].predict_proba(x), atol=2e-6)
    for vote in votes.values():
        np.testing.assert_allclose(vote.sum(1), 1.0, atol=1e-6)


def test_votes_on_a_sites_own_test_rows_score_as_the_run_says(result):
    for name in NAMES:
        raw, part = result.population.raws[name], result.population.parts[name]
        vote = result.ensemble(name).votes(raw.inputs["x"][part.test])[name]
        assert metrics.accuracy(vote, raw.target[part.test]) == result.test[name]["accuracy"]


def test_the_joint_opinion_is_the_mean_of_the_votes_weighted_as_asked(result):
    x, _ = rows(9)
    together = result.ensemble()
    votes = together.votes(x)
    np.testing.assert_allclose(together.predict_proba(x), np.mean(list(votes.values()), axis=0))
    sizes = np.array([len(result.population.sites[name].train) for name in NAMES], float)
    assert len(set(sizes)) == 3
    by_rows = result.ensemble(weights="num_examples").predict_proba(x)
    np.testing.assert_allclose(by_rows, np.average(list(votes.values()), axis=0, weights=sizes))
    assert np.array_equal(together.predict(x), together.predict_proba(x).argmax(1))
    np.testing.assert_allclose(together.spread(x), np.std(list(votes.values()), axis=0), atol=1e-12)


def test_one_case_is_a_table_with_a_line_for_each_vote(result):
    x, _ = rows(9)
    text = result.ensemble().explain(x[:1])
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["participant", *NAMES, "together"]
    vote, mean = result.ensemble().votes(x[:1])["forest"][0], result.ensemble().predict_proba(x[:1])[0]
    told = [f"{vote[c]:.3f}" for c in np.argsort(-mean)]  # the likeliest class first, in every line
    assert lines[2].split() == ["forest", "RandomForestClassifier", str(vote.argmax()), *told]
    assert "of 3 participants vote for" in text
    with pytest.raises(pf.errors.DataError, match=r"one case, got 2 rows; write x\[550:551\]"):
        result.ensemble().explain(x[:2])


def test_a_case_by_itself_is_taken_as_one_row(result):
    x, _ = rows(9)
    together = result.ensemble()
    told = together.explain(x[5:6])
    assert together.explain(x[5]) == told
    assert together.explain({"x": x[5]}) == told
    with pytest.raises(pf.errors.DataError, match=r"got 2 rows; write x\[550:551\]"):
        together.explain(x[5, :2])


def test_a_case_of_columns_may_be_a_series_or_a_dict():
    x, y = rows(0)
    frame = pd.DataFrame({"a": x[:, 0], "b": np.where(x[:, 1] > 0, "high", "low"), "c": x[:, 2]})
    client = pf.Client("one", pf.sklearn(LogisticRegression()), data=(frame, y), preprocess=pf.tabular())
    together = run(pf.Local(), [client]).ensemble()
    told = together.explain(frame.iloc[[7]])
    assert together.explain(frame.iloc[7]) == told
    assert together.explain(frame.iloc[7].to_dict()) == told
    with pytest.raises(pf.errors.DataError, match="reads the column 'c', which the rows lack"):
        together.explain({"a": 1.0, "b": "low"})


def test_images_are_cases_by_their_shape():
    x = np.random.default_rng(0).normal(size=(40, 4, 4)).astype(np.float32)
    y = np.arange(40) % 2
    flat = pf.torch(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
    together = run(pf.Local(), [pf.Client("one", flat, data=(x, y))]).ensemble()
    assert together.explain(x[3]) == together.explain(x[3:4])


class Broken(LogisticRegression):
    """Cannot be trained."""

    def fit(self, x, y):
        raise ValueError("all gaps")


def test_who_never_trained_has_no_vote_unless_asked_for(tmp_path):
    models = {"good": LogisticRegression(), "fine": LogisticRegression(), "broken": Broken()}
    clients = [pf.Client(n, pf.sklearn(m), data=rows(i)) for i, (n, m) in enumerate(models.items())]
    result = run(pf.Local(), clients)
    x, _ = rows(9)
    together = result.ensemble()
    assert result.untrained == together.untrained == ("broken",)
    assert list(together.votes(x)) == ["good", "fine"]
    assert together.explain(x[0]).endswith("left out, since nothing that it trained ever counted: broken")
    assert "2 of 2 participants" in together.explain(x[0]) or "1 of 2 participants" in together.explain(x[0])
    assert "the ensemble is without broken" in str(result.comparison())
    np.testing.assert_array_equal(together.predict_proba(x), result.ensemble(["good", "fine"]).predict_proba(x))
    saved = pf.load(result.save(tmp_path / "out"))
    assert list(saved.ensemble().members) == ["good", "fine"]
    assert saved.ensemble().untrained == ("broken",)
    text = (tmp_path / "out" / "result.json").read_text()
    (tmp_path / "out" / "result.json").write_text(
        text.replace('"untrained": [\n   "broken"', '"untrained": [\n   "nobody"')
    )
    with pytest.raises(pf.errors.CorruptError, match="names no clients"):
        pf.load(tmp_path / "out").ensemble()


def test_of_many_classes_the_likeliest_are_shown():
    x, y = rows(0, n=200, width=3)
    y = (np.arange(200) % 8).astype(np.int64)
    result = run(pf.Local(), [pf.Client("one", pf.sklearn(LogisticRegression()), data=(x, y))])
    text = result.ensemble().explain(x[:1])
    assert "2 less likely classes are left out" in text
    assert len(text.splitlines()[1].split()) == 3 + 6


def test_class_names_come_back():
    x, y = rows(0)
    named = np.where(y, "ill", "healthy")
    result = run(pf.Local(), [pf.Client("one", pf.sklearn(LogisticRegression()), data=(x, named))])
    assert set(result.ensemble().predict(x)) == {"ill", "healthy"}
    assert result.ensemble().predict(x[:1])[0] in result.ensemble().explain(x[:1])


def test_a_regression_says_a_mean_and_a_spread():
    def make(seed):
        x, _ = rows(seed)
        return x, x @ np.array([1.0, 2.0, -1.0])

    models = {"line": LinearRegression(), "forest": RandomForestRegressor(5)}
    clients = [pf.Client(n, pf.sklearn(m), data=make(i)) for i, (n, m) in enumerate(models.items())]
    together = run(pf.Local(), clients).ensemble()
    x, y = make(5)
    votes = together.votes(x)
    assert votes["line"].shape == (len(x), 1)
    np.testing.assert_allclose(votes["line"][:, 0], y, atol=1e-4)
    assert together.predict(x).shape == together.spread(x).shape == (len(x),)
    np.testing.assert_allclose(together.predict(x), (votes["line"] + votes["forest"])[:, 0] / 2)
    np.testing.assert_allclose(together.spread(x), np.abs(votes["line"] - votes["forest"])[:, 0] / 2)
    assert [line.split()[0] for line in together.explain(x[:1]).splitlines()[:5]] == [
        "participant", "line", "forest", "together", "spread",
    ]  # fmt: skip
    with pytest.raises(pf.errors.UsageError, match="a regression has no probabilities"):
        together.predict_proba(x)


# ---------------------------------------------------------------- other columns, other inputs


def frames():
    """Two sites that share a column and have one each of their own."""
    x, y = rows(0, n=80)
    whole = pd.DataFrame(x, columns=["age", "pulse", "weight"])
    halves = {"north": ["age", "pulse"], "south": ["weight", "age"]}
    clients = [
        pf.Client(name, pf.sklearn(LogisticRegression()), data=whole[columns].assign(ill=y), target="ill")
        for name, columns in halves.items()
    ]
    return run(pf.Local(), clients), whole, y


def test_each_takes_its_own_columns_of_a_case_by_name_and_in_its_own_order():
    result, whole, y = frames()
    mixed = whole[["weight", "pulse", "age"]].assign(ill=y)
    votes = result.ensemble().votes(mixed)
    for name, columns in (("north", ["age", "pulse"]), ("south", ["weight", "age"])):
        expected = result.models[name].predict_proba(whole[columns].to_numpy())
        np.testing.assert_allclose(votes[name], expected, atol=1e-6)


def test_those_who_lack_a_column_are_named_and_can_be_left_out():
    result, whole, _ = frames()
    with pytest.raises(pf.errors.DataError, match=r"south reads the column 'weight', .*members=\['north'\]"):
        result.ensemble().predict(whole[["age", "pulse"]])
    assert len(result.ensemble(members=["north"]).predict(whole[["age", "pulse"]])) == 80
    with pytest.raises(pf.errors.DataError, match="north reads a DataFrame with 'age', 'pulse', got an array"):
        result.ensemble().predict(whole.to_numpy())
    with pytest.raises(pf.errors.UsageError, match="there is no client 'nobody'"):
        result.ensemble(members=["nobody"])


def test_arrays_of_another_width_and_frames_for_arrays_are_refused(result):
    x, _ = rows(9, width=4)
    with pytest.raises(pf.errors.DataError, match=r"net reads \[3\] a row, got \[4\]"):
        result.ensemble().predict(x)
    with pytest.raises(pf.errors.DataError, match=r"net reads arrays of \[3\] a row, got a DataFrame"):
        result.ensemble().predict(pd.DataFrame(x))


def test_of_several_inputs_each_takes_its_own():
    x, y = rows(0, n=80, width=4)
    inputs = {"image": x[:, :3], "panel": x[:, 3:]}
    clients = [
        pf.Client(name, pf.sklearn(LogisticRegression()), data={name: inputs[name], "y": y}, target="y")
        for name in inputs
    ]
    together = run(pf.Local(), clients).ensemble()
    votes = together.votes(inputs)
    assert set(votes) == {"image", "panel"}
    assert not np.allclose(votes["image"], votes["panel"])
    with pytest.raises(pf.errors.DataError, match="panel reads the input 'panel', the rows have image, other"):
        together.predict({"image": x[:, :3], "other": x})


def test_what_cannot_be_an_ensemble_is_refused(result):
    with pytest.raises(pf.errors.UsageError, match="weights='loudest' is unknown"):
        result.ensemble(weights="loudest")
    with pytest.raises(pf.errors.UsageError, match="at least one member"):
        result.ensemble(members=[])


def test_mutants_of_the_mean_are_seen(result):
    """Votes that are summed, or logits that are averaged, are another answer than the one that is promised."""
    x, _ = rows(9)
    together = result.ensemble()
    logits = {name: np.log(vote) for name, vote in together.votes(x).items()}
    geometric = np.exp(metrics.log_softmax(np.mean(list(logits.values()), axis=0)))
    assert not np.allclose(geometric, together.predict_proba(x), atol=1e-3)
    scaled = Ensemble(
        together.problem, {n: Member(m.name, m.kind, 5, m.wants, m.ask) for n, m in together.members.items()}
    )
    np.testing.assert_allclose(scaled.predict_proba(x), together.predict_proba(x))
