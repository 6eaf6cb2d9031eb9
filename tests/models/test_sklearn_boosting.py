"""LightGBM and XGBoost as participants: teachers, students, files."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

lightgbm = pytest.importorskip("lightgbm")
xgboost = pytest.importorskip("xgboost")

from sklearn_sites import TEN, TWO, VALUE, accuracy, diabetes, digits, env_of, rows_of, trained  # noqa: E402  # as above

from polyfed.core.algorithm import Fit, Predict  # noqa: E402  # after the two that may be absent
from polyfed.core.checks_model import MODEL_CHECKS, Case  # noqa: E402  # as above
from polyfed.core.errors import CorruptError, UsageError  # noqa: E402  # as above
from polyfed.core.rows import Problem  # noqa: E402  # as above
from polyfed.core.terms import Distill, Match  # noqa: E402  # as above
from polyfed.models.sklearn import sklearn  # noqa: E402  # as above
from polyfed.models.sklearn_boosting import Labelled  # noqa: E402  # as above
from polyfed.models.sklearn_boosting_file import from_bytes, to_bytes  # noqa: E402  # as above
from polyfed.models.sklearn_boosting_trees import checked_lightgbm, checked_xgboost  # noqa: E402  # as above
from polyfed.models.sklearn_estimator import answers  # noqa: E402  # as above
from polyfed.models.sklearn_file import from_file, to_file  # noqa: E402  # as above

THREE = Problem(("mild", "none", "grave"), 3)  # not in alphabetical order
LGBM = partial(lightgbm.LGBMClassifier, n_estimators=8, min_child_samples=3, num_leaves=7)
XGB = partial(xgboost.XGBClassifier, n_estimators=8, max_depth=3)
CLASSIFIERS = [LGBM(), XGB(), make_pipeline(StandardScaler(), XGB())]
REGRESSORS = [
    lightgbm.LGBMRegressor(n_estimators=8, min_child_samples=3, subsample=0.7, subsample_freq=1),
    xgboost.XGBRegressor(n_estimators=8, max_depth=3, subsample=0.7),
]


def name_of(estimator):
    return type(estimator).__name__


@pytest.mark.parametrize("check", MODEL_CHECKS.values(), ids=MODEL_CHECKS)
@pytest.mark.parametrize("estimator", CLASSIFIERS + REGRESSORS, ids=name_of)
def test_adapter_when_checked_then_keeps_the_contract(estimator, check):
    regresses = any(estimator is e for e in REGRESSORS)
    (x, y), problem = (diabetes(), VALUE) if regresses else (digits(), TEN)
    rows = rows_of(x[:50], y[:50])
    env = env_of(rows, problem, public=rows_of(x[:50]))
    check(Case(sklearn(estimator), rows, env, lambda fitted, r: answers(fitted, r.x.astype(np.float64), problem)))


@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=name_of)
def test_classes_when_some_are_absent_then_stand_below_those_seen(estimator):
    x, y = digits()
    kept = np.isin(y[:200], (1, 5, 8))
    rows, model = rows_of(x[:200][kept], y[:200][kept]), sklearn(estimator)
    outputs = model.predict(Predict((trained(model, rows, env_of(rows)),)), rows, env_of(rows))
    assert accuracy(outputs, rows.target) > 0.95
    assert np.delete(outputs, (1, 5, 8), axis=1).max() < np.log(1e-5)
    fitted = model.export(trained(model, rows, env_of(rows)), rows, env_of(rows))
    assert set(fitted.predict(rows.x.astype(np.float64))) == {1, 5, 8}


@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=name_of)
def test_export_when_classes_have_names_then_predicts_them(estimator):
    x, y = digits()
    kept = y[:200] < 3
    rows, model = rows_of(x[:200][kept], y[:200][kept]), sklearn(estimator)
    env = env_of(rows, THREE)
    fitted = model.export(trained(model, rows, env), rows, env)
    assert (fitted.predict(rows.x.astype(np.float64)) == np.array(THREE.classes)[rows.target]).mean() > 0.95


def test_export_when_all_classes_are_numbers_then_is_the_librarys_own():
    x, y = digits()
    rows = rows_of(x[:200], y[:200])
    for estimator in (LGBM(n_jobs=2), XGB(n_jobs=2)):
        model = sklearn(estimator)
        fitted = model.export(trained(model, rows, env_of(rows)), rows, env_of(rows))
        assert type(fitted) is type(estimator)
        assert fitted.n_jobs == 2
        assert model.settings["n_estimators"] == 8
        assert "missing" not in model.settings


FRESH = """
import sys, numpy as np
sys.path.insert(0, SITES)
from sklearn_sites import *
from test_sklearn_boosting import CLASSIFIERS, REGRESSORS, said_of
print([said_of(e) for e in CLASSIFIERS + REGRESSORS])
"""


def said_of(estimator):
    regresses = name_of(estimator).endswith("Regressor")
    (x, y), problem = (diabetes(), VALUE) if regresses else (digits(), TEN)
    rows = rows_of(x[:120], y[:120])
    env, model = env_of(rows, problem), sklearn(estimator)
    return model.predict(Predict((trained(model, rows, env),)), rows, env).tobytes().hex()[:200]


@pytest.mark.heavy
def test_fit_when_made_in_a_fresh_process_then_has_the_same_bits():
    from pathlib import Path

    code = FRESH.replace("SITES", repr(str(Path(__file__).parent)))
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str([said_of(e) for e in CLASSIFIERS + REGRESSORS])


@pytest.mark.parametrize("estimator", CLASSIFIERS, ids=name_of)
def test_student_when_the_teacher_knows_more_then_gains(estimator):
    x, y = digits()
    rows, public, test = rows_of(x[:30], y[:30]), rows_of(x[100:400]), rows_of(x[800:1300])
    env, model = env_of(rows, public=public), sklearn(estimator)
    teacher = np.full((300, 10), 0.02)
    teacher[np.arange(300), y[100:400]] = 0.82
    alone = trained(model, rows, env)
    asked = Fit((alone,), (Distill(1.0),), targets={"teacher": teacher}, rows=public)
    state = model.fit(asked, public, env).state
    before, after = (accuracy(model.predict(Predict((s,), rows=test), test, env), y[800:1300]) for s in (alone, state))
    assert after > before + 0.2, (before, after)


@pytest.mark.parametrize("estimator", REGRESSORS, ids=name_of)
def test_student_of_values_when_taught_then_comes_nearer(estimator):
    x, y = diabetes()
    rows, public = rows_of(x[:15], y[:15]), rows_of(x[100:400])
    env, model = env_of(rows, VALUE, public=public), sklearn(estimator)
    alone = trained(model, rows, env)
    state = model.fit(Fit((alone,), (Match(),), targets={"teacher": y[100:400]}, rows=public), public, env).state
    gaps = [
        ((model.predict(Predict((s,), rows=public), public, env)[:, 0] - y[100:400]) ** 2).mean()
        for s in (alone, state)
    ]
    assert gaps[1] < gaps[0]


def test_single_class_when_it_is_all_a_client_has_then_is_predicted():
    x, _ = digits()
    rows = rows_of(x[:20], np.full(20, 3))
    for estimator in CLASSIFIERS:
        model = sklearn(estimator)
        outputs = model.predict(Predict((trained(model, rows, env_of(rows)),)), rows, env_of(rows))
        assert (outputs.argmax(1) == 3).all()


# ---------------------------------------------------------------- files
def exported(estimator, problem, count=150):
    x, y = diabetes() if problem is VALUE else digits()
    kept = np.arange(len(y)) < count
    if problem is not VALUE:
        kept &= y < problem.outputs
    rows, model = rows_of(x[kept], y[kept]), sklearn(estimator)
    env = env_of(rows, problem)
    return model.export(trained(model, rows, env), rows, env), x.astype(np.float64)


CASES = [
    (LGBM(), TEN),
    (lightgbm.LGBMClassifier(n_estimators=8), Problem(("a", "b", "c", "d"), 4)),
    (LGBM(boosting_type="rf", subsample=0.5, subsample_freq=1), THREE),
    (LGBM(), THREE),
    (LGBM(), TWO),
    (XGB(), TEN),
    (XGB(), THREE),
    (XGB(), TWO),
    *((estimator, VALUE) for estimator in REGRESSORS),
]


@pytest.mark.parametrize(("estimator", "problem"), CASES, ids=lambda v: getattr(v, "outputs", None) or name_of(v))
def test_file_when_read_back_then_predicts_the_same(estimator, problem, tmp_path):
    fitted, x = exported(estimator, problem)
    to_file(fitted, tmp_path / "model.skops")
    again = from_file(tmp_path / "model.skops")
    assert type(again) is type(fitted)
    assert np.array_equal(again.predict(x), fitted.predict(x))
    if problem is not VALUE:
        assert np.array_equal(again.predict_proba(x), fitted.predict_proba(x))
        assert list(again.classes_) == list(fitted.classes_)
    told = again.estimator_ if isinstance(again, Labelled) else again
    assert told.get_params()["n_estimators"] == 8
    to_file(again, tmp_path / "again.skops")
    assert np.array_equal(from_file(tmp_path / "again.skops").predict(x), fitted.predict(x))


def xgb_edit(said, path, value):
    model = json.loads(said["model"])
    at = model["learner"]["gradient_booster"]["model"]
    *way, last = path
    for step in way:
        at = at[step]
    at[last] = value
    said["model"] = json.dumps(model)


def lgbm_edit(said, name, value):
    lines = said["model"].splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(name + "="))
    old = lines[at].partition("=")[2].split(" ")
    lines[at] = f"{name}=" + " ".join([str(value), *old[1:]])
    said["model"] = "\n".join(lines)


XGB_BAD = [
    (("trees", 0, "left_children", 0), 10**6, "nodes"),
    (("trees", 0, "right_children", 1), 0, "nodes"),
    (("trees", 0, "left_children", 0), -1, "nodes"),
    (("trees", 0, "split_indices", 0), 64, "features"),
    (("trees", 0, "split_indices", 0), -3, "features"),
    (("trees", 0, "split_conditions"), [0.0], "nodes"),
    (("tree_info", 0), 10, "output"),
    (("iteration_indptr", 1), 10**6, "steps"),
    (("trees", 0, "split_type", 0), 1, "category"),
    (("trees", 0, "left_children", 0), 1.9, "whole number"),
    (("trees", 0, "left_children", 0), True, "whole number"),
    (("trees", 0, "right_children", 0), 1, "nodes"),  # both children in one place
    (("trees", 0, "split_conditions", 0), float("nan"), "finite number"),
    (("trees", 0, "base_weights"), [0.0], "nodes"),
    (("trees", 0, "default_left", 0), 7, "missing values"),
    (("trees", 0, "tree_param", "num_nodes"), "1_5", "whole number"),
    (("tree_info", 0), 0.0, "whole number"),
    (("gbtree_model_param", "num_parallel_tree"), "1000", "steps"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), XGB_BAD)
def test_file_of_xgboost_when_its_trees_lead_astray_then_is_refused(path, value, complaint, tmp_path):
    fitted, _ = exported(XGB(n_estimators=2), TEN)
    to_file(fitted, tmp_path / "model.skops")
    said = json.loads((tmp_path / "model.skops").read_bytes())
    xgb_edit(said, path, value)
    (tmp_path / "model.skops").write_text(json.dumps(said))
    with pytest.raises(CorruptError, match=complaint):
        from_file(tmp_path / "model.skops")


LGBM_BAD = [
    ("left_child", 10**6, "nodes"),
    ("right_child", 0, "nodes"),
    ("left_child", -(10**6), "leaves"),
    ("split_feature", 64, "features"),
    ("split_feature", -3, "features"),
    ("num_leaves", 1000, "leaves"),
    ("num_cat", 1, "category"),
    ("decision_type", 1, "category"),
    ("num_tree_per_iteration", 7, "do not fit"),
    ("max_feature_idx", 10, "announces"),
    ("objective", "multiclass num_class:99", "objective"),
    ("leaf_value", "", "leaves"),
    ("threshold", "0\nthreshold=0", "twice"),
    ("left_child", "1_0", "whole number"),
    ("left_child", "\u0661", "whole number"),
    ("left_child", "1.5", "whole number"),
    ("left_child", -1, "nodes"),  # a node that nothing leads to
    ("leaf_value", "1_0.5", "finite number"),
    ("leaf_value", "nan", "finite number"),
    ("leaf_value", "1e999", "finite number"),
    ("leaf_count", 2**31, "whole number"),
    ("decision_type", 64, "decides"),
    ("objective", "multiclass num_class:1_0", "whole number"),
    ("objective", "lambdarank", "objective"),
    ("objective", "multiclass num_class:10 evil:3", "objective"),
    ("version", "v4\rnum_class=1\rTree=0\rnum_leaves=2\rleft_child=9999999 -1", "control characters"),
    ("version", "v4\x85num_class=1", "control characters"),
]


@pytest.mark.parametrize(("name", "value", "complaint"), LGBM_BAD)
def test_file_of_lightgbm_when_its_trees_lead_astray_then_is_refused(name, value, complaint, tmp_path):
    fitted, _ = exported(LGBM(n_estimators=2), TEN)
    to_file(fitted, tmp_path / "model.skops")
    said = json.loads((tmp_path / "model.skops").read_bytes())
    lgbm_edit(said, name, value)
    (tmp_path / "model.skops").write_text(json.dumps(said))
    with pytest.raises(CorruptError, match=complaint):
        from_file(tmp_path / "model.skops")


def test_file_of_lightgbm_when_read_then_its_library_sees_no_character_of_it():
    fitted, x = exported(LGBM(n_estimators=2), TEN)
    said = json.loads(to_bytes(fitted))
    for name, value in (
        ("version", "v9"),
        ("feature_names", "evil"),
        ("feature_infos", "[0:evil]"),
        ("left_child", "01"),
    ):
        lgbm_edit(said, name, value)
    text, objective = checked_lightgbm(said["model"], 10)
    assert "evil" not in text
    assert "v9" not in text
    assert "left_child=1 " in text
    assert objective == "multiclass"
    assert np.array_equal(from_bytes(json.dumps(said).encode()).predict(x), fitted.predict(x))


def test_file_of_xgboost_when_its_parents_are_forged_then_the_library_sees_those_of_the_children():
    fitted, _ = exported(XGB(n_estimators=2), TEN)
    said = json.loads(to_bytes(fitted))
    honest = checked_xgboost(said["model"], 10)
    assert json.loads(honest)["learner"]["gradient_booster"] == json.loads(said["model"])["learner"]["gradient_booster"]
    nodes = len(json.loads(honest)["learner"]["gradient_booster"]["model"]["trees"][0]["parents"])
    xgb_edit(said, ("trees", 0, "parents"), [9999999] * nodes)
    assert checked_xgboost(said["model"], 10) == honest
    twice = said["model"].replace('"left_children": [', f'"left_children": {[9999999] * nodes}, "left_children": [', 1)
    assert twice != said["model"]
    assert checked_xgboost(twice, 10) == honest


@pytest.mark.parametrize("jobs", [10**9, -(10**9), "many"])
def test_file_when_it_asks_for_too_many_threads_then_is_refused(jobs):
    said = json.loads(to_bytes(exported(LGBM(n_estimators=2), TEN)[0]))
    said["params"]["n_jobs"] = jobs
    with pytest.raises(CorruptError, match="n_jobs"):
        from_bytes(json.dumps(said).encode())


@pytest.mark.parametrize("classes", [[[n] for n in range(10)], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
def test_file_when_its_labels_are_no_list_of_different_ones_then_is_refused(classes):
    said = json.loads(to_bytes(exported(LGBM(n_estimators=2), TEN)[0])) | {"classes": classes}
    with pytest.raises(CorruptError, match="labels"):
        from_bytes(json.dumps(said).encode())


@pytest.mark.parametrize(("best", "complaint"), [("3", None), ("100000", "best step"), ("1_0", "whole number")])
def test_file_of_xgboost_when_it_names_a_best_step_then_has_it(best, complaint):
    model = json.loads(json.loads(to_bytes(exported(XGB(), TEN)[0]))["model"])
    model["learner"]["attributes"] = {"best_iteration": best, "other": "x"}
    if complaint:
        with pytest.raises(CorruptError, match=complaint):
            checked_xgboost(json.dumps(model), 10)
    else:
        kept = json.loads(checked_xgboost(json.dumps(model), 10))["learner"]["attributes"]
        assert kept == {"best_iteration": best}


def test_file_when_damaged_or_of_odd_parameters_then_is_a_sentence(tmp_path):
    fitted, _ = exported(LGBM(n_estimators=2), TEN)
    to_file(fitted, tmp_path / "model.skops")
    data = (tmp_path / "model.skops").read_bytes()
    for bad in (
        data[: len(data) // 2],
        b"{}",
        data.replace(b"LGBMClassifier", b"os.system", 1),
        data.replace(b"polyfed.boosting", b"x"),
    ):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(CorruptError, match="cannot be read as an estimator"):
            from_file(tmp_path / "bad")
    odd, _ = exported(LGBM(n_estimators=2, class_weight={0: 2.0}), TEN)
    with pytest.raises(UsageError, match="class_weight is no number or text"):
        to_file(odd, tmp_path / "model.skops")


def test_library_when_it_is_not_installed_then_is_named(tmp_path, monkeypatch):
    fitted, _ = exported(XGB(n_estimators=2), TEN)
    to_file(fitted, tmp_path / "model.skops")
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(UsageError, match="polyfed\\[boosting\\]"):
        from_file(tmp_path / "model.skops")
