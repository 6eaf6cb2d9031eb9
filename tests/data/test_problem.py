import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.core.errors import DataError
from polyfed.core.rows import Problem
from polyfed.data import encode_target, problem_of


@pytest.mark.parametrize(
    ("targets", "classes"),
    [
        ({"a": np.array([2, 0]), "b": np.array([10, 0])}, ("0", "2", "10")),
        ({"a": np.array([1.0, 0.0]), "b": np.array([2, 0])}, ("0", "1", "2")),
        ({"a": np.array([True]), "b": np.array([False])}, ("False", "True")),
        ({"a": np.array(["x", "b"]), "b": np.array(["y"], object)}, ("b", "x", "y")),
        ({"a": np.array([True, False], object)}, ("False", "True")),
    ],
)
def test_classes_are_the_sorted_union_of_all_clients(targets, classes):
    problem = problem_of(targets)
    assert problem == Problem(classes, len(classes))
    for target in targets.values():
        codes = encode_target(target, problem)
        assert codes.dtype == np.int64
        assert [classes[c] for c in codes] == [str(int(v)) if isinstance(v, float) else str(v) for v in target.tolist()]


def test_floats_with_fractions_and_many_whole_numbers_are_a_regression():
    assert problem_of({"a": np.array([0.5, 1.0]), "b": np.array([1, 2])}) == Problem(None, 1)
    assert problem_of({"a": np.arange(200)}) == Problem(None, 1)
    assert problem_of({"a": np.ones((5, 3))}) == Problem(None, 3)


def test_task_overrides_what_the_values_suggest():
    assert problem_of({"a": np.array([0, 1])}, task="regression") == Problem(None, 1)
    assert problem_of({"a": np.arange(200)}, task="classification").outputs == 200
    assert problem_of({"a": np.array([3])}, classes=[1, 3]) == Problem(("1", "3"), 2)


def test_a_regression_target_becomes_float32_of_the_same_shape():
    coded = encode_target(np.array([[1, 2], [3, 4]]), Problem(None, 2))
    assert coded.dtype == np.float32
    assert coded.shape == (2, 2)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.text("abc", min_size=1, max_size=2), min_size=2, max_size=30).filter(lambda y: len(set(y)) > 1))
def test_encoding_round_trips_through_the_class_names(y):
    problem = problem_of({"a": np.array(y)})
    assert [problem.classes[i] for i in encode_target(np.array(y, object), problem)] == y


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: problem_of({"a": np.array([1]), "b": np.array(["1"])}), "a's target holds numbers, b's holds text"),
        (lambda: problem_of({"a": np.array([1]), "b": np.array([True])}), "true/false"),
        (lambda: problem_of({"a": np.array([1, 1])}), "all targets are '1'"),
        (lambda: problem_of({"a": np.array([1, "x"], object)}), "a: the target mixes"),
        (lambda: problem_of({"a": np.array(["x", "y"])}, task="regression"), "needs numbers"),
        (lambda: problem_of({"a": np.ones((2, 2)), "b": np.ones(2)}), "number of targets"),
        (lambda: problem_of({}), "no client has a target"),
        (
            lambda: encode_target(np.array(["z"]), Problem(("x", "y"), 2), client="va"),
            "va: class 'z' is not among .*'x', 'y'",
        ),
        (lambda: encode_target(np.array([1.0, np.nan]), Problem(None, 1), client="va"), "va: the target is missing"),
        (lambda: encode_target(np.array([np.inf]), Problem(None, 1), client="va"), "va: .*not finite"),
        (lambda: encode_target(np.ones((2, 2)), Problem(("0", "1"), 2), client="va"), "va: .*one class a row"),
    ],
)
def test_targets_when_they_do_not_fit_say_whose_and_why(call, words):
    with pytest.raises(DataError, match=words):
        call()
