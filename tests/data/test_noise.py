import numpy as np
import pytest

from polyfed.core.errors import DataError
from polyfed.core.rows import Problem
from polyfed.data import (
    Raw,
    generate_public,
    merge_statistics,
    mixup_public,
    noise_public,
    public_statistics,
    schema,
    schema_difference,
)

pd = pytest.importorskip("pandas")
TWO = Problem(("0", "1"), 2)


def site(n=600, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    a = rng.normal(10 + 5 * y, 2)
    table = pd.DataFrame(
        {"a": a, "b": a + rng.normal(0, 0.1, n), "n": rng.integers(0, 4, n), "sex": list("fm" * (n // 2)), "f": y > 0}
    )
    table.loc[:99, "a"] = np.nan
    return Raw({"x": table}, y)


def merged(**options):
    return merge_statistics([public_statistics(site(seed=s), TWO, **options) for s in range(2)])


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
def test_noise_has_the_columns_means_and_deviations_and_nothing_of_how_they_go_together(law):
    made, real = noise_public(merged(), 4000, law=law).x, site().x
    assert schema_difference(schema(site()), schema(Raw({"x": made}))) == ""
    for column in ("a", "b"):
        assert made[column].mean() == pytest.approx(real[column].mean(), abs=0.3)
        assert made[column].std() == pytest.approx(real[column].std(), rel=0.1)
    assert abs(made[["a", "b"]].corr().iloc[0, 1]) < 0.1 < real[["a", "b"]].corr().iloc[0, 1]
    assert abs(np.corrcoef(made["a"], made["f"].astype(float))[0, 1]) < 0.1
    assert set(made["n"]) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    assert (made["sex"] == "f").mean() == pytest.approx(0.5, abs=0.05)
    assert not made.isna().any().any()


def test_uniform_noise_stays_in_its_range_and_gaussian_noise_is_cut():
    a, s = site().x["a"].mean(), site().x["a"].std()
    uniform, gaussian = (noise_public(merged(), 4000, law=law).x["a"] for law in ("uniform", "gaussian"))
    assert abs(uniform - a).max() < 1.8 * s < abs(gaussian - a).max() < 2.7 * s


def test_noise_and_mixtures_are_functions_of_source_and_seed():
    source = merged()
    for make in (
        lambda seed: noise_public(source, 30, seed=seed).x,
        lambda seed: mixup_public(site(), 30, seed=seed).x,
    ):
        pd.testing.assert_frame_equal(make(3), make(3))
        assert not make(3).equals(make(4))


def test_noise_for_images_has_their_shape():
    rng = np.random.default_rng(0)
    raw = Raw({"image": rng.random((50, 1, 4, 4)).astype(np.float32)}, rng.integers(0, 2, 50))
    made = noise_public(public_statistics(raw, TWO), 9)
    assert made.inputs["image"].shape == (9, 1, 4, 4)
    assert made.inputs["image"].dtype == np.float32
    assert made.inputs["image"].min() >= 0


def test_a_column_that_was_suppressed_everywhere_is_all_gaps():
    raw = site(8)
    raw.x["sex"] = list("abcdefgh")
    raw.x["a"] = [1.0, *[np.nan] * 7]
    made = noise_public(public_statistics(raw, Problem(None, 1)), 5).x
    assert made["sex"].isna().all()
    assert made["a"].isna().all()
    assert made["b"].notna().all()


def test_mixtures_lie_between_two_different_rows():
    raw = Raw({"x": np.array([[0.0, 0.0], [1.0, 2.0]], np.float32)})
    made = mixup_public(raw, 500).x
    assert made.dtype == np.float32
    np.testing.assert_allclose(made[:, 1], 2 * made[:, 0], atol=1e-6)
    assert ((made > 0) & (made < 2)).all()
    assert made[:, 0].mean() == pytest.approx(0.5, abs=0.05)


def test_a_larger_alpha_mixes_more_evenly():
    raw = Raw({"x": np.array([[0.0], [1.0]])})
    spread = [mixup_public(raw, 500, alpha=alpha).x.std() for alpha in (0.2, 1.0, 20.0)]
    assert spread[0] > spread[1] > spread[2]


def test_what_cannot_be_mixed_is_the_heavier_rows():
    table = pd.DataFrame({"v": [0.0, 1.0], "w": ["zero", "one"], "b": [False, True], "n": [0, 10]})
    made = mixup_public(Raw({"x": table}), 100).x
    heavier = made["v"] > 0.5
    assert (made["w"] == np.where(heavier, "one", "zero")).all()
    assert (made["b"] == heavier).all()
    np.testing.assert_allclose(made["n"], 10 * made["v"])
    tokens = mixup_public(Raw({"x": np.array([[3, 4], [5, 6]])}), 50).x
    assert set(map(tuple, tokens.tolist())) == {(3, 4), (5, 6)}
    pixels = mixup_public(Raw({"x": np.array([[0], [200]], np.uint8)}), 50).x
    assert pixels.dtype == np.uint8
    assert len(np.unique(pixels)) > 10


def test_a_gap_of_the_lighter_row_is_filled_and_one_of_the_heavier_stays():
    made = mixup_public(Raw({"x": np.array([[0.0, np.nan], [1.0, 8.0]])}), 200).x
    heavy_has_gap = made[:, 0] < 0.5
    assert np.isnan(made[heavy_has_gap, 1]).all()
    assert (made[~heavy_has_gap, 1] == 8.0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: noise_public(merged(), 5, law="normal"), "law='normal'.*'gaussian' or 'uniform'"),
        (lambda: noise_public(public_statistics(site(6), TWO, min_count=7), 5), "every class has fewer rows"),
        (lambda: mixup_public(site().take(np.array([0])), 5), "at least 2 rows to mix, got 1"),
        (lambda: mixup_public(site(), 5, alpha=0.0), "α is above 0"),
    ],
)
def test_rows_that_cannot_be_made_say_why(call, words):
    with pytest.raises(DataError, match=words):
        call()


@pytest.mark.parametrize("form", ["array", "pair", "dict", "frame"])
def test_rows_when_given_in_any_form_of_data_make_the_same(form):
    table = np.random.default_rng(2).normal(size=(40, 2))
    labels = np.arange(40) % 2
    frame = pd.DataFrame(table, columns=["a", "b"])
    given, target, expected = {
        "array": (table, None, {"x": table}),
        "pair": ((table, labels), None, {"x": table}),
        "dict": ({"t": table, "y": labels}, "y", {"t": table}),
        "frame": (frame.assign(y=labels), "y", {"x": frame}),
    }[form]
    made = mixup_public(given, 9, target=target)
    for name, value in mixup_public(Raw(expected), 9).inputs.items():
        np.testing.assert_array_equal(made.inputs[name], value)
    if form != "array":
        sent = public_statistics(given, [0, 1], target=target)
        assert sent.digest == public_statistics(Raw(expected, labels), TWO).digest


def test_rows_when_given_in_place_of_statistics_are_refused():
    for make in (noise_public, generate_public):
        with pytest.raises(DataError, match=f"^{make.__name__} draws from statistics, not from a ndarray: give merge_"):
            make(np.zeros((5, 2)), 3)
    with pytest.raises(DataError, match=r"^statistics per class need labelled rows: give"):
        public_statistics(np.zeros((5, 2)), [0, 1])
