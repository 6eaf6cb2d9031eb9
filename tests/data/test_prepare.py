import numpy as np
import pytest

from polyfed.core.errors import DataError
from polyfed.core.rows import Problem
from polyfed.data import LeakWarning, Parts, Raw, Split, datasets, described, divide, prepare, problem_of, read, tabular

pd = pytest.importorskip("pandas")
pytest.importorskip("sklearn")
from sklearn.decomposition import PCA  # noqa: E402
from sklearn.feature_selection import SelectKBest  # noqa: E402
from sklearn.impute import SimpleImputer  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer, StandardScaler  # noqa: E402

TWO = Problem(("0", "1"), 2)
PARTS = Parts([0, 1, 2, 3], [4, 5], [6, 7])


def some(n=8, seed=0):
    rng = np.random.default_rng(seed)
    return Raw({"x": rng.normal(size=(n, 3))}, np.arange(n) % 2)


def all_bytes(prepared):
    parts = (prepared.train, prepared.validation, prepared.test, prepared.public)
    return [a.tobytes() for rows in parts if rows is not None for a in rows.inputs.values()]


def test_rows_without_preprocessing_are_contiguous_float32_and_whole_numbers_stay_whole():
    raw = Raw(
        {
            "x": np.asfortranarray(np.ones((8, 3))),
            "tokens": np.ones((8, 2), np.int32),
            "image": np.ones((8, 4), np.uint8),
        },
        np.arange(8) % 2,
    )
    made = prepare("va", Raw(raw.inputs, raw.target), Parts([0, 1]), TWO)
    assert {k: a.dtype for k, a in made.train.inputs.items()} == {
        "x": np.float32,
        "tokens": np.int64,
        "image": np.float32,
    }
    assert all(a.flags.c_contiguous for a in made.train.inputs.values())
    assert made.validation is made.test is made.public is None
    assert made.preprocess == "none"


def test_preprocessing_is_fit_on_the_training_part_alone():
    raw = some()
    base = prepare("va", raw, PARTS, TWO, preprocess=StandardScaler(), public=raw.unlabelled())
    changed = Raw({"x": np.where(np.arange(8)[:, None] < 4, raw.x, 1e6 + raw.x)}, raw.target)
    other = prepare("va", changed, PARTS, TWO, preprocess=StandardScaler(), public=changed.unlabelled())
    assert base.train.x.tobytes() == other.train.x.tobytes()
    assert np.allclose(base.train.x.mean(axis=0), 0, atol=1e-6)
    assert base.test.x.tobytes() != other.test.x.tobytes()
    assert np.array_equal(base.public.x[:4], base.train.x)


def test_a_preprocessing_that_is_fit_on_all_rows_would_be_found(monkeypatch):
    class Leaky(StandardScaler):
        def fit(self, x, y=None):
            return super().fit(some().x if len(x) == 4 else x, y)

    raw = some()
    assert not np.allclose(prepare("va", raw, PARTS, TWO, preprocess=Leaky()).train.x.mean(axis=0), 0, atol=1e-6)


def test_the_given_transformer_is_left_unfitted_and_gets_the_labels():
    chooser = make_pipeline(SelectKBest(k=1), StandardScaler())
    prepare("va", some(), PARTS, TWO, preprocess=chooser)
    assert not hasattr(chooser[0], "scores_")


def test_random_states_come_from_the_named_seed_at_every_depth():
    raw = some(40)
    parts = Parts(np.arange(30), [], np.arange(30, 40))
    pipe = make_pipeline(FunctionTransformer(), PCA(2, svd_solver="randomized", random_state=None))

    def run(name, seed):
        return prepare(name, raw, parts, TWO, preprocess=pipe, seed=seed)

    assert all_bytes(run("a", 0)) == all_bytes(run("a", 0))
    states = {run(n, s).fitted["x"][1].random_state for n in ("a", "b") for s in (0, 1)}
    assert len(states) == 4


def test_a_function_and_a_dict_of_steps_serve_several_inputs():
    raw = Raw({"image": np.ones((8, 2)), "age": np.arange(8.0)}, np.arange(8) % 2)
    made = prepare("va", raw, PARTS, TWO, preprocess={"age": lambda a: a[:, None] / 10})
    assert made.train.inputs["age"].shape == (4, 1)
    joined = prepare("va", raw, PARTS, TWO, preprocess=lambda inputs: {"x": inputs["image"] * inputs["age"][:, None]})
    assert joined.train.x.tolist() == [[i, i] for i in range(4)]


def test_hospitals_with_gaps_pass_through_their_own_pipelines_and_each_others_public_rows():
    hospitals = datasets.heart()
    raws = {name: read(name, frame, target="disease") for name, frame in hospitals.items()}
    problem = problem_of({name: raw.target for name, raw in raws.items()})
    splits = {name: divide(name, raw, Split(public=0.13)) for name, raw in raws.items()}
    options = [
        tabular(),
        tabular(numbers="mean", scale="robust"),
        tabular(text="missing"),
        tabular(min_frequency=5, drop=("ca",)),
    ]
    public = raws["va"].take(splits["va"].public).unlabelled()
    for (name, raw), pre in zip(raws.items(), options, strict=True):
        made = prepare(name, raw, splits[name], problem, preprocess=pre, public=public)
        widths = {rows.x.shape[1] for rows in (made.train, made.validation, made.test, made.public)}
        assert len(widths) == 1
        assert np.isfinite(made.train.x).all()
        assert np.isfinite(made.public.x).all()
        assert len(made.public) == len(public)
        one = made.apply(name, public.take(np.array([3])))
        assert np.array_equal(one.x[0], made.public.x[3])


def test_rows_that_stand_on_both_sides_are_warned_of_with_their_number():
    x = np.array([[0.0], [1], [2], [3], [0], [1], [6], [0]])
    with pytest.warns(LeakWarning, match="va: 3 of 4 validation and test rows equal a training row"):
        prepare("va", Raw({"x": x}, np.arange(8) % 2), PARTS, TWO)


def two_columns(names=("a", "b"), **more):
    return pd.DataFrame({name: np.arange(8.0) + 10 * i for i, name in enumerate(names)} | more)


def public_as(own, public, preprocess=None):
    raw = Raw({"x": own}, np.arange(8) % 2)
    return prepare("va", raw, PARTS, TWO, preprocess=preprocess, public=Raw({"x": public})).public.x


def test_public_columns_are_found_by_name_whatever_their_order():
    straight = public_as(two_columns(), two_columns())
    assert np.array_equal(public_as(two_columns(), two_columns()[["b", "a"]]), straight)
    assert np.array_equal(public_as(two_columns(), two_columns()[["b", "a"]], tabular()), straight_of(tabular()))


def straight_of(preprocess):
    return public_as(two_columns(), two_columns(), preprocess)


def test_a_preprocessing_that_picks_its_columns_may_meet_more_of_them():
    pick = lambda rows: rows[["a"]].to_numpy()  # noqa: E731  # used twice
    assert public_as(two_columns(), two_columns(("a", "c")), pick).shape == (8, 1)
    assert public_as(two_columns(), two_columns(c=1.0), tabular()).shape == (8, 2)


@pytest.mark.parametrize("preprocess", [None, tabular(), StandardScaler()])
def test_public_rows_with_other_columns_name_client_and_columns(preprocess):
    with pytest.raises(
        DataError, match=r"^va: .*the public rows lack column 'b'; the public rows have column 'c' besides"
    ):
        public_as(two_columns(), two_columns(("a", "c")), preprocess)


def test_public_rows_in_another_form_say_so():
    with pytest.raises(DataError, match=r"va: .*the public rows are an array, its own are a DataFrame"):
        public_as(two_columns(), np.zeros((4, 2)), tabular())
    inputs = Raw({"image": np.zeros((8, 2)), "genes": np.zeros((8, 3))}, np.arange(8) % 2)
    with pytest.warns(LeakWarning), pytest.raises(DataError, match=r"va: .*no input 'genes'.*lack input 'genes'"):
        prepare("va", inputs, PARTS, TWO, public=inputs.only("image").unlabelled())


def test_nan_from_a_preprocessing_stays_for_models_that_take_it():
    x = np.array([[np.nan], [1], [2], [3], [4], [5], [6], [7]])
    made = prepare("va", Raw({"x": x}, np.arange(8) % 2), PARTS, TWO, preprocess=lambda rows: rows)
    assert np.isnan(made.train.x[0, 0])


def test_a_description_is_the_same_in_every_process():
    assert " at 0x" not in described(make_pipeline(FunctionTransformer(np.log1p), FunctionTransformer(described)))
    assert described(tabular()) == described(tabular())
    assert described(tabular()) != described(tabular(scale="robust"))
    assert described({"a": None, "b": described}) == "a: none; b: described"


def frame_of(**columns):
    return Raw({"x": pd.DataFrame(columns)}, np.arange(8) % 2)


@pytest.mark.parametrize(
    ("raw", "preprocess", "words"),
    [
        (
            frame_of(a=range(8), thal=list("abababab")),
            None,
            r"hungary: column 'thal' holds text; give preprocess=, e.g. pf.tabular\(\)",
        ),
        (frame_of(a=[1.0, np.nan] * 4), None, r"hungary: column 'a' holds missing values \(2 of 4 missing\)"),
        (frame_of(a=pd.date_range("2020", periods=8)), None, "column 'a' holds dates"),
        (Raw({"x": np.array([["a"]] * 8)}, np.arange(8) % 2), None, "hungary: the input holds text"),
        (Raw({"x": np.full((8, 1), np.nan)}, np.arange(8) % 2), None, "hungary: values are missing in 4 of 4 rows"),
        (Raw({"x": np.full((8, 1), np.inf)}, np.arange(8) % 2), None, "hungary: .*infinite"),
        (Raw({"x": np.full((8, 1), 1e300)}, np.arange(8) % 2), None, "too large for float32"),
        (
            frame_of(a=list("abababab")),
            StandardScaler(),
            "hungary: preprocess=StandardScaler cannot be fit: could not convert",
        ),
        (some(), lambda x: x[:2], r"hungary: preprocess= returned shape \(2, 3\) for 4 rows"),
        (some(), 3, "hungary: preprocess= of type int is neither"),
        (some(), {"y": None}, "hungary: preprocess= names 'y'; the inputs are x"),
        (
            Raw({"a": np.ones((8, 1)), "b": np.ones((8, 1))}, np.arange(8) % 2),
            SimpleImputer(),
            "one transformer cannot take 2 inputs",
        ),
    ],
)
def test_rows_that_no_model_takes_are_refused_naming_client_and_column(raw, preprocess, words):
    with pytest.raises(DataError, match=words):
        prepare("hungary", raw, Parts([0, 1, 2, 3]), TWO, preprocess=preprocess)


def test_described_long_pipelines_that_differ_only_in_the_middle_differ():
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import KBinsDiscretizer, StandardScaler

    def long(bins):
        steps = [StandardScaler() for _ in range(10)]
        return make_pipeline(*steps, KBinsDiscretizer(n_bins=bins, encode="onehot-dense", strategy="uniform"), *steps)

    assert described(long(3)) != described(long(4))
    assert "..." not in described(long(3))
