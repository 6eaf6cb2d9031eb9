"""The student as the user sees it: an ordinary object that predicts, set against its teachers, saved and read back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from federations import rows, run
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from torch import nn

import polyfed as pf
from polyfed.algorithms import Distill
from polyfed.data.split import Parts
from polyfed.run import student as module
from polyfed.run.student import Score

PUBLIC = rows(30, n=80)[0]


def net():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


def keras_net():
    import keras

    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.layers.Dense(4, activation="relu"), keras.layers.Dense(2)])


STUDENTS = {
    "torch": lambda: pf.torch(net, lr=0.2, epochs=10),
    "keras": lambda: pf.keras(keras_net, lr=0.3, epochs=10),
    "forest": lambda: pf.sklearn(RandomForestClassifier(9)),
    "logistic": lambda: pf.sklearn(LogisticRegression()),
}


def teachers(names=("north", "south"), **changes):
    models = [pf.sklearn(LogisticRegression()), pf.sklearn(RandomForestClassifier(9))]
    given = {"split": pf.Split(test=0.4)} | changes
    return [pf.Client(n, m, data=rows(i, n=60), **given) for i, (n, m) in enumerate(zip(names, models, strict=True))]


def taught(kind="torch", **options):
    return run(Distill(public=PUBLIC, student=STUDENTS[kind](), **options.pop("fields", {})), teachers(), **options)


@pytest.fixture(scope="module")
def result():
    return taught(fields={"preprocess": StandardScaler()}, baselines=None)


def probabilities(model, x):
    """Of a framework's own object."""
    if hasattr(model, "predict_proba"):
        return model.predict_proba(x)
    given = torch.tensor(x) if isinstance(model, nn.Module) else x
    made = model(given)
    return torch.softmax(torch.as_tensor(np.asarray(made.detach() if hasattr(made, "detach") else made)), 1).numpy()


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_student_is_an_ordinary_object_that_predicts_what_the_comparison_asks(kind, tmp_path):
    result = taught(kind)
    x, y = rows(9, n=200)
    told = module.student_member(result).answer(pf.data.read("x", x, labelled=False))
    np.testing.assert_allclose(probabilities(result.student, x), told, atol=1e-5)
    assert (told.argmax(1) == y).mean() > 0.8
    saved = pf.load(result.save(tmp_path / "out"))
    again = saved.student_into(net()) if kind == "torch" else saved.student
    np.testing.assert_array_equal(probabilities(again, x), probabilities(result.student, x))
    assert saved.student_kind["framework"] == ("sklearn" if kind in ("forest", "logistic") else kind)


def test_a_run_without_a_student_says_so(tmp_path):
    result = run()
    saved = pf.load(result.save(tmp_path / "out"))
    for ask in (lambda: result.student, lambda: saved.student, lambda: saved.student_into(net())):
        with pytest.raises(pf.errors.UsageError, match=r"no student; pf\.Distill"):
            ask()
    assert "student" not in result.table()
    assert result.to_dict()["comparison"] == []


def test_a_saved_torch_student_needs_a_module_to_fill(result, tmp_path):
    saved = pf.load(result.save(tmp_path / "out"))
    with pytest.raises(pf.errors.UsageError, match=r"saved.student_into\(MyNet\(\)\)"):
        _ = saved.student
    with pytest.raises(pf.errors.SpecError):
        saved.student_into(nn.Linear(3, 2))
    assert repr(saved) == f"<Saved Distill in {str(saved.folder)!r}: 2 rounds, 2 clients, a student>"


def test_one_call_asks_the_student_with_raw_rows_through_the_servers_preprocessing(result):
    x, y = rows(9)
    student = result.ensemble("student")
    scaled = StandardScaler().fit(PUBLIC).transform(x).astype(np.float32)
    np.testing.assert_allclose(student.predict_proba(x), probabilities(result.student, scaled), atol=1e-5)
    assert (student.predict(x) == y).mean() > 0.8
    assert "student" in student.explain(x[5])
    with pytest.raises(pf.errors.UsageError, match="no client 'student'"):
        run().ensemble("student")


def test_a_hostile_description_of_the_student_is_refused(result, tmp_path):
    folder = result.save(tmp_path / "out")
    text = (folder / "result.json").read_text()
    (folder / "result.json").write_text(text.replace('"file": "student.polyfed"', '"file": "../student.polyfed"'))
    with pytest.raises(pf.errors.CorruptError):
        pf.load(folder)


# ---------------------------------------------------------------- against its teachers


def everyone(result):
    raws, parts = result.population.raws, result.population.parts
    x = np.concatenate([raws[n].inputs["x"][parts[n].test] for n in raws])
    return x, np.concatenate([raws[n].target[parts[n].test] for n in raws])


def test_every_number_of_the_comparison_is_that_of_its_own_pipeline_on_the_pooled_test_rows(result):
    x, y = everyone(result)
    found = result.comparison("accuracy")
    assert found.num_rows == len(y) == 48
    votes = result.ensemble().votes(x)
    for line in found.lines:
        assert line.all.value == (votes[line.client].argmax(1) == y).mean()
        assert line.own == result.test[line.client]["accuracy"]
        assert line.own_alone == result.baselines["alone"][line.client]["accuracy"]
        solo = result.alone.ensemble().votes(x)[line.client]
        assert line.all_alone.value == (solo.argmax(1) == y).mean()
    assert found.ensemble.value == (result.ensemble().predict(x) == y).mean()
    scaler = StandardScaler().fit(PUBLIC)
    right = probabilities(result.student, scaler.transform(x).astype(np.float32)).argmax(1) == y
    assert found.student.value == right.mean()
    told = module.student_member(result).answer(pf.data.read("x", x, labelled=False))
    np.testing.assert_allclose(told, probabilities(result.student, scaler.transform(x).astype(np.float32)), atol=1e-5)


def test_gains_are_paired_over_rows_with_the_normal_interval(result):
    x, y = everyone(result)
    found = result.comparison("accuracy")
    student = module.student_member(result).answer(pf.data.read("x", x, labelled=False)).argmax(1) == y
    north = result.ensemble().votes(x)["north"].argmax(1) == y
    gap = student.astype(float) - north
    score = found.lines[0].all
    assert score.gain == pytest.approx(gap.mean())
    half = 1.6448536 * gap.std(ddof=1) / np.sqrt(len(gap))
    assert score.interval == pytest.approx((gap.mean() - half, gap.mean() + half))
    assert result.comparison("auc").lines[0].all.interval is None
    loss = result.comparison("loss")
    assert loss.lines[0].all.gain == pytest.approx(loss.lines[0].all.value - loss.student.value)


def test_the_table_says_it_in_a_line_and_the_comparison_in_a_table(result):
    found = result.comparison()
    line = next(line for line in result.table().splitlines() if line.startswith("student: "))
    assert line == found.sentence()
    assert found.metric == result.metric == "auc"
    assert f"auc {found.student.value:.3f} on all 48 test rows" in line
    assert f"ensemble {found.ensemble.value:.3f} (student {found.ensemble.gain:+.3f}, no interval for auc)" in line
    assert str(found).endswith("; no interval for auc")
    assert "no interval" not in result.comparison("accuracy").sentence()
    assert "mean of each alone" in line
    text = str(found)
    assert [line.split()[0] for line in text.splitlines()[2:4]] == ["north", "south"]
    assert {"mean", "ensemble", "student"} <= {line.split()[0] for line in text.splitlines() if line}
    assert result.to_dict()["comparison"] == found.rows()
    assert result.comparison() is found


def test_without_read_test_rows_there_is_no_comparison():
    result = taught(test=False)
    assert not any(line.startswith("student: ") for line in result.table().splitlines())
    with pytest.raises(pf.errors.UsageError, match="test rows of this run were not read"):
        result.comparison()


def test_an_unknown_metric_is_named(result):
    with pytest.raises(pf.errors.UsageError, match=r"no metric 'luck'.* accuracy"):
        result.comparison("luck")


def test_without_a_student_teachers_and_ensemble_are_compared():
    result = run(pf.Local(), teachers(), baselines=None)
    found = result.comparison()
    assert found.student is None
    assert found.sentence() == ""
    assert found.lines[0].all_alone == Score()
    assert found.lines[0].own_alone is not None
    assert "gain" not in str(found)
    assert found.ensemble.gain is None


def test_a_regression_is_compared_by_error():
    def make(seed):
        x, _ = rows(seed, n=60)
        return x, (x @ np.array([1.0, 2.0, -1.0])).astype(np.float32)

    models = {"line": LinearRegression(), "ridge": Ridge(50.0)}
    clients = [
        pf.Client(n, pf.sklearn(m), data=make(i), split=pf.Split(test=0.4)) for i, (n, m) in enumerate(models.items())
    ]
    found = run(Distill(public=PUBLIC, student=pf.sklearn(LinearRegression())), clients, baselines=None).comparison()
    assert found.metric == "mae"
    assert found.lines[0].all.value < 1e-4 < found.student.value < found.lines[1].all.value
    assert found.lines[1].all.gain > 0 > found.lines[0].all.gain  # a lower error is a gain
    assert found.lines[1].all.gain == pytest.approx(found.lines[1].all.value - found.student.value)
    assert "lower is better" in str(found)


def test_the_table_says_that_only_the_student_learns_and_not_so_where_clients_do(result):
    said = "what the run made is the student: the clients learn nothing from one another here"
    assert said in result.table().splitlines()
    for fields in ({"digest": 1}, {"digest": 1, "feedback": True}):
        learning = taught("logistic", fields=fields)
        assert not learning.only_student_learns
        assert said not in learning.table()
    assert not run(pf.Local()).only_student_learns


def test_test_rows_of_one_class_leave_auc_without_a_value_and_the_table_whole():
    one = [
        pf.Client(f"site{i}", pf.sklearn(LogisticRegression()), data=sorted_by_class(i), split=Parts(*parts()))
        for i in range(2)
    ]
    result = run(Distill(public=PUBLIC, student=STUDENTS["logistic"]()), one)
    assert result.comparison().sentence() == ""
    assert not any(line.startswith("student: ") for line in result.table().splitlines())


def sorted_by_class(seed):
    x, y = rows(seed)
    order = np.argsort(y, kind="stable")
    return x[order], y[order]


def parts():
    return np.arange(10, 60), np.array([], int), np.arange(10), np.array([], int)


# ---------------------------------------------------------------- who came late


def test_a_client_that_joined_late_never_or_was_away_is_told_of():
    clients = teachers()
    late = [
        clients[0],
        pf.Client("south", clients[1].model, data=rows(1), joins_at=2, away=(3, 4)),
        pf.Client("west", clients[1].model, data=rows(2), joins_at=9),
    ]
    result = run(pf.Local(), late, rounds=4, baselines=None)
    text = result.table().splitlines()
    assert "south joined at round 2 and was away in rounds 3 and 4" in text
    assert "west was to join at round 9, after the run's last" in text
    assert "north" not in result.presence
    assert result.to_dict()["presence"] == result.presence
    assert len(result.ensemble(members=["north", "west"]).predict(rows(5)[0])) == 60


def test_checkpoint_of_a_student_that_was_prepared_otherwise_is_another_run(tmp_path):
    options = {"rounds": 1, "checkpoint": tmp_path / "run"}
    first = taught("logistic", fields={"preprocess": StandardScaler()}, **options)
    again = taught("logistic", fields={"preprocess": StandardScaler()}, **options)
    assert again.version == first.version
    with pytest.raises(pf.errors.StorageError, match="what the server trains, or the rows that it trains on differs"):
        taught("logistic", **options)
