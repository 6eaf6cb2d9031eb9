import numpy as np
import pytest

from polyfed.core.errors import DataError, MalformedError
from polyfed.core.message import Message
from polyfed.core.rows import Problem
from polyfed.core.tree import Tree
from polyfed.data import (
    Raw,
    Split,
    datasets,
    divide,
    generate_public,
    merge_statistics,
    prepare,
    problem_of,
    public_statistics,
    read,
    schema,
    schema_difference,
    synthetic,
    tabular,
    to_message,
)

pd = pytest.importorskip("pandas")
TWO = Problem(("0", "1"), 2)
MARKER, WORD = 98_765.4321, "MARKER-7f3a"


def site(n=400, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    a = rng.normal(10 + 5 * y + shift, 2)
    table = pd.DataFrame(
        {
            "a": a,
            "b": 0.9 * a + rng.normal(0, 0.5, n),
            "count": rng.integers(0, 4, n).astype(float),
            "sex": np.where(rng.random(n) < 0.3 + 0.4 * y, "f", "m"),
            "flag": rng.random(n) < 0.5,
        }
    )
    table.loc[rng.random(n) < 0.25, "count"] = np.nan
    return Raw({"x": table}, y)


def holds(message, value):
    """Whether a number or word stands anywhere in a message."""
    if isinstance(value, str):
        return any(value in word for words in message.text.values() for word in words)
    return any(
        np.isclose(array, value, rtol=1e-6).any()
        for tree in message.trees.values()
        for array in tree.values()
        if array.size
    )


def with_markers():
    raw = site()
    table = raw.x.copy()
    table.loc[7, ["a", "count"]] = MARKER
    table.loc[8, "sex"] = WORD
    return Raw({"x": table}, raw.target)


def test_marker_values_in_private_rows_appear_in_no_message():
    message = public_statistics(with_markers(), TWO)
    merged = merge_statistics([message, public_statistics(site(seed=1), TWO)])
    for sent in (message, merged, to_message(generate_public(merged, 500))):
        assert not holds(sent, MARKER)
        assert not holds(sent, WORD)
    assert generate_public(merged, 500).x["a"].max() < 40


def test_the_marker_check_finds_a_marker_that_is_sent(monkeypatch):
    assert holds(to_message(with_markers()), MARKER)
    assert holds(to_message(with_markers()), WORD)
    monkeypatch.setattr(synthetic, "_rounded", lambda counts, min_count: np.asarray(counts, float))
    assert holds(public_statistics(with_markers(), TWO), WORD)


@pytest.mark.parametrize("rare", [1, 4])
def test_small_cells_are_suppressed_and_flagged(rare):
    raw = site(100)
    y = np.array([1] * rare + [0] * (100 - rare))
    message = public_statistics(Raw(raw.inputs, y), TWO)
    assert message.trees["total"]["rows"][1] == 0
    for name in ("present", "categories"):
        assert all(not array[1].any() for array in message.trees[name].values())
    assert all(not array[:, 1].any() for array in message.trees["sums"].values())
    assert not message.trees["products"]["sum"][1].any()
    assert message.trees["suppressed"]["0"].tolist() == [0.0, 1.0]


def test_counts_are_multiples_of_the_smallest_cell_so_that_differences_tell_nothing():
    message = public_statistics(site(203), TWO, min_count=5)
    counts = [message.trees["total"], message.trees["present"], message.trees["categories"]]
    for array in (a for tree in counts for a in tree.values()):
        assert np.array_equal(array % 5, np.zeros_like(array))
    assert not (message.trees["products"]["count"] % 5).any()


def test_sums_keep_mean_and_deviation_of_the_rows():
    raw = site(2000)
    message = public_statistics(raw, TWO)
    mine = raw.x["a"][raw.target == 1]
    count, (total, squares) = message.trees["present"]["0"][1], message.trees["sums"]["0"][:, 1]
    assert total / count == pytest.approx(mine.mean(), abs=0.1)
    assert np.sqrt(squares / count - (total / count) ** 2) == pytest.approx(mine.std(), rel=0.1)


def test_merging_adds_sites_whatever_their_order():
    sent = [public_statistics(site(seed=s, shift=s), TWO) for s in range(3)]
    there, back = merge_statistics(sent), merge_statistics(sent[::-1])
    assert there.text == back.text
    for name, tree in there.trees.items():
        for entry, array in tree.items():
            np.testing.assert_allclose(array, back.trees[name][entry])
    assert there.trees["total"]["rows"].sum() == sum(m.trees["total"]["rows"].sum() for m in sent)


def test_generated_rows_follow_the_sites_law():
    merged = merge_statistics([public_statistics(site(4000, seed=s), TWO) for s in range(2)])
    made, real = generate_public(merged, 4000, seed=1), site(4000)
    assert schema_difference(schema(real), schema(made)) == ""
    assert made.target is None
    for column in ("a", "b", "count"):
        assert made.x[column].mean() == pytest.approx(real.x[column].mean(), abs=0.3)
        assert made.x[column].std() == pytest.approx(real.x[column].std(), rel=0.15)
    assert made.x[["a", "b"]].corr().iloc[0, 1] > 0.9
    assert set(made.x["count"].dropna().unique()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    assert made.x["count"].isna().mean() == pytest.approx(0.25, abs=0.04)
    assert (made.x["sex"] == "f").mean() == pytest.approx(0.5, abs=0.05)


def test_generated_rows_are_a_function_of_statistics_and_seed():
    merged = public_statistics(site(), TWO)
    first = generate_public(merged, 50, seed=3).x
    pd.testing.assert_frame_equal(first, generate_public(merged, 50, seed=3).x)
    assert not first.equals(generate_public(merged, 50, seed=4).x)


def test_no_generated_row_is_a_real_row():
    real = site()
    made = generate_public(public_statistics(real, TWO), 1000)
    assert not set(real.x["a"]) & set(made.x["a"])


def test_hospitals_get_public_rows_that_pass_through_their_pipelines():
    raws = {n: read(n, f, target="disease") for n, f in datasets.heart().items()}
    problem = problem_of({n: raw.target for n, raw in raws.items()})
    parts = {n: divide(n, raw, Split()) for n, raw in raws.items()}
    merged = merge_statistics([public_statistics(raws[n].take(parts[n].train), problem) for n in raws])
    made = generate_public(merged, 120)
    assert schema_difference(schema(raws["va"]), schema(made)) == ""
    assert made.x["age"].between(20, 90).all()
    for name, raw in raws.items():
        rows = prepare(name, raw, parts[name], problem, preprocess=tabular(), public=made).public
        assert len(rows) == 120
        assert np.isfinite(rows.x).all()


def test_images_keep_their_shape():
    rng = np.random.default_rng(0)
    raw = Raw({"x": rng.integers(0, 256, (60, 1, 12, 10)).astype(np.uint8)}, rng.integers(0, 2, 60))
    made = generate_public(merge_statistics([public_statistics(raw, TWO)] * 2), 7)
    assert made.x.shape == (7, 1, 12, 10)
    assert made.x.mean() == pytest.approx(127, abs=15)


def test_arrays_and_regressions_work_too():
    rng = np.random.default_rng(0)
    raw = Raw({"x": rng.normal(5, 1, (300, 4)).astype(np.float32)}, rng.normal(size=300))
    made = generate_public(merge_statistics([public_statistics(raw, Problem(None, 1))]), 200)
    assert made.x.shape == (200, 4)
    assert made.x.dtype == np.float32
    assert made.x.mean() == pytest.approx(5, abs=0.2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: public_statistics(site(), TWO, min_count=1), "use at least 2"),
        (lambda: public_statistics(site().unlabelled(), TWO), "labelled rows"),
        (lambda: public_statistics(Raw({"x": np.zeros(9)}, np.zeros(9, int)), TWO), r"\(n, columns\)"),
        (
            lambda: public_statistics(
                Raw({"x": pd.DataFrame({"d": pd.date_range("2020", periods=2)})}, np.array([0, 1])), TWO
            ),
            "'d' holds dates",
        ),
        (lambda: merge_statistics([]), "nothing|no statistics"),
        (lambda: generate_public(public_statistics(site(6), TWO, min_count=7), 5), "every class has fewer rows"),
        (
            lambda: merge_statistics(
                [
                    public_statistics(Raw({"x": pd.DataFrame({"a": v})}, np.array([0, 1])), TWO)
                    for v in ([1, 2], ["u", "v"])
                ]
            ),
            "column 'a' holds number at one site, text at another",
        ),
    ],
)
def test_statistics_that_cannot_be_made_say_why(call, words):
    with pytest.raises(DataError, match=words):
        call()


SENT = public_statistics(site(60), TWO)


@pytest.mark.parametrize(
    "bad",
    [
        Message(),
        SENT.put(text={"columns": ("a",)}),
        SENT.put(text={"kinds": ("number",)}),
        SENT.put(text={"form": ()}),
        SENT.put(text={"form": ("array", "x")}),
        SENT.put(text={"form": ("array", "x", "5", "2")}),
        SENT.put(text={"form": ("array", "x", "-5", "-1")}),
        SENT.put(text={"form": ("array", "x", "1" * 5000)}),
        SENT.put(text={"form": ("frame", "x", "5")}),
        SENT.put(text={"3": ("f", "m", "x")}),
        SENT.put(trees={"total": Tree({"rows": np.ones(3)})}),
        SENT.put(trees={"total": Tree({"rows": np.float64(1)})}),
        SENT.put(trees={"sums": Tree({"99": np.ones((2, 2))}), "flags": Tree({"99": np.ones(2)})}),
        SENT.put(trees={"sums": Tree({**SENT.trees["sums"], "0": np.full((2, 2), np.nan)})}),
    ],
)
def test_statistics_that_a_peer_made_up_are_refused_as_malformed(bad):
    with pytest.raises(MalformedError, match="public statistics"):
        merge_statistics([SENT, bad])


def test_sites_that_count_other_classes_are_told_to_agree():
    with pytest.raises(DataError, match="number of classes"):
        merge_statistics([SENT, public_statistics(site(60), Problem(("0", "1", "2"), 3))])
