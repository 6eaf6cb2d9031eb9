import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.core.errors import DataError, MalformedError
from polyfed.core.message import Message
from polyfed.core.tree import Tree
from polyfed.data import Raw, concat, datasets, from_message, read, schema, schema_difference, to_message

pd = pytest.importorskip("pandas")
fast = settings(derandomize=True, deadline=None, max_examples=60)


def assert_same(a, b):
    assert list(a.inputs) == list(b.inputs)
    for name, value in a.inputs.items():
        if hasattr(value, "columns"):
            pd.testing.assert_frame_equal(value, b.inputs[name])
        else:
            assert value.dtype == b.inputs[name].dtype
            np.testing.assert_array_equal(value, b.inputs[name])


def frame(n):
    word = st.one_of(st.none(), st.text(max_size=3))
    real = st.floats(width=32, allow_nan=True)
    return st.fixed_dictionaries(
        {
            "a": st.lists(real, min_size=n, max_size=n).map(lambda v: np.array(v, np.float32)),
            "b c": st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n, max_size=n).map(
                lambda v: np.array(v, np.int64)
            ),
            "stats:x#": st.lists(word, min_size=n, max_size=n).map(lambda v: pd.Series(v, dtype="str")),
            "o": st.lists(word, min_size=n, max_size=n).map(
                lambda v: pd.Series([np.nan if x is None else x for x in v], dtype=object)
            ),
            "flag": st.lists(st.booleans(), min_size=n, max_size=n).map(np.array),
            "gap": st.lists(st.sampled_from([True, False, np.nan]), min_size=n, max_size=n).map(
                lambda v: pd.Series(v, dtype=object)
            ),
            "kind": st.lists(st.sampled_from(["u", "v", None]), min_size=n, max_size=n).map(
                lambda v: pd.Series(pd.Categorical(v, categories=["v", "u", "w"]))
            ),
            "when": st.lists(st.integers(0, 10**6), min_size=n, max_size=n).map(
                lambda v: np.array(v).astype("datetime64[s]")
            ),
        }
    ).map(pd.DataFrame)


@fast
@given(st.integers(1, 6).flatmap(frame))
def test_a_frame_comes_back_equal_with_order_and_dtypes(table):
    if all(value is np.nan for value in table["o"]) or all(value is np.nan for value in table["gap"]):
        table = table.drop(columns=["o", "gap"])  # objects that are gaps alone have no kind: see the test below
    raw = Raw({"x": table})
    assert_same(raw, from_message(to_message(raw)))


def test_columns_of_gaps_alone_come_back_as_gaps():
    back = from_message(
        to_message(Raw({"x": pd.DataFrame({"o": pd.Series([np.nan, None], dtype=object), "n": [1, 2]})}))
    )
    assert back.x["o"].isna().all()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "uint8", "bool", "<U3", "object"])
def test_arrays_come_back_equal(dtype):
    values = np.array([["a", "bcd"], ["", "a"]]) if dtype in ("<U3", "object") else np.array([[0, 1], [1, 0]])
    raw = Raw({"x": values.astype(dtype), "y": np.arange(4.0).reshape(2, 2)})
    assert_same(raw, from_message(to_message(raw)))


def test_nullable_columns_come_back_equal():
    table = pd.DataFrame(
        {
            "i": pd.array([1, None], "Int64"),
            "b": pd.array([True, None], "boolean"),
            "s": pd.array(["x", None], "string"),
        }
    )
    assert_same(Raw({"x": table}), from_message(to_message(Raw({"x": table}))))


def test_target_groups_and_time_never_travel():
    raw = Raw({"x": np.zeros((2, 1), np.float32)}, np.array([7.25, 7.5]), np.array([11, 12]), np.array([13, 14]))
    message = to_message(raw)
    assert list(message.trees["rows"]) == ["0"]
    back = from_message(message)
    assert back.target is back.groups is back.time is None


def test_sites_with_other_gaps_join_and_keep_every_value():
    hospitals = {n: read(n, f, target="disease").unlabelled() for n, f in datasets.heart().items()}
    joined = concat([from_message(to_message(raw)) for raw in hospitals.values()])
    whole = pd.concat([f.drop(columns="disease").astype(object) for f in datasets.heart().values()], ignore_index=True)
    assert list(joined.columns) == list(whole.columns)
    for column in whole:
        assert joined.x[column].isna().tolist() == whole[column].isna().tolist()
        assert joined.x[column].dropna().tolist() == whole[column].dropna().tolist()
    assert_same(joined, from_message(to_message(joined)))


def test_joining_keeps_dtypes_where_a_site_has_a_column_of_gaps_alone():
    a = Raw({"x": pd.DataFrame({"n": [1, 2], "t": ["u", "v"], "b": [True, False]})})
    b = Raw({"x": pd.DataFrame({"n": [np.nan], "t": [np.nan], "b": [np.nan]})})
    for joined in (concat([a, b]), concat([b, a])):
        assert schema(joined) == {"n": "number", "t": "text", "b": "true/false"}
        assert joined.x.isna().sum().tolist() == [1, 1, 1]


def test_a_schema_difference_names_the_columns():
    mine = {"age": "number", "sex": "text", "thal": "empty"}
    assert schema_difference(mine, {"age": "number", "sex": "empty", "thal": "text"}) == ""
    said = schema_difference(mine, {"age": "text", "bmi": "number", "thal": "text"})
    for words in ("lack column 'sex'", "have column 'bmi'", "column 'age' holds number here and text there"):
        assert words in said
    assert "another order" in schema_difference({"a": "text", "b": "text"}, {"b": "text", "a": "text"})
    with pytest.raises(DataError, match="lack column 'b'"):
        concat([Raw({"x": pd.DataFrame({"a": [1], "b": [2]})}), Raw({"x": pd.DataFrame({"a": [1]})})])


def test_a_column_that_mixes_kinds_is_refused_by_name():
    with pytest.raises(DataError, match="'a' mixes int, str"):
        to_message(Raw({"x": pd.DataFrame({"a": pd.Series([1, "x"], dtype=object)})}))


GOOD = to_message(
    Raw({"x": pd.DataFrame({"n": [1.0, 2.0], "t": ["u", "v"], "b": pd.Series([True, np.nan], dtype=object)})})
)


@pytest.mark.parametrize(
    "bad",
    [
        Message(),
        GOOD.put(trees={"rows": Tree({})}),
        GOOD.put(text={"inputs": ()}),
        GOOD.put(text={"inputs": ("x", "x")}),
        GOOD.put(text={"0.columns": ("n", "n", "b")}),
        GOOD.put(text={"0.dtypes": ("float64", "str")}),
        GOOD.put(text={"0.dtypes": ("float64", "str", "os.system")}),
        GOOD.put(text={"0.dtypes": ("Int64", "str", "object")}),
        GOOD.put(text={"0.1": ("u",)}),
        GOOD.put(
            trees={"rows": Tree({"0.0": np.ones(2), "0.1": np.array([0, -2], np.int32), "0.2": np.zeros(2, np.int8)})}
        ),
        GOOD.put(trees={"rows": Tree({"0.0": np.ones(2), "0.1": np.zeros(2), "0.2": np.zeros(2, np.int8)})}),
        GOOD.put(
            trees={"rows": Tree({"0.0": np.ones(2), "0.1": np.zeros(2, np.int32), "0.2": np.full(2, 9, np.int8)})}
        ),
        GOOD.put(trees={"rows": Tree({"0.0": np.ones(3), "0.1": np.zeros(2, np.int32), "0.2": np.zeros(2, np.int8)})}),
        GOOD.put(
            trees={"rows": Tree({"0.0": np.ones((2, 1)), "0.1": np.zeros(2, np.int32), "0.2": np.zeros(2, np.int8)})}
        ),
        GOOD.put(trees={"rows": Tree({**GOOD.trees["rows"], "0.3": np.ones(2)})}),
        Message(trees={"rows": Tree({"0": np.float64(1)})}, text={"inputs": ("x",)}),
        Message(
            trees={"rows": Tree({"0": np.zeros(2, np.int32)})}, text={"inputs": ("x",), "0.dtype": ("O",), "0": ("u",)}
        ),
        Message(trees={"rows": Tree({"0": np.zeros(2)})}, text={"inputs": ("x",), "0.dtype": ("object",), "0": ("u",)}),
    ],
)
def test_rows_that_a_peer_made_up_are_refused_as_malformed(bad):
    if bad.text.get("0.dtypes", ("",))[0] == "Int64":
        bad = bad.put(trees={"rows": Tree({**bad.trees["rows"], "0.0": np.array([0.5, 1])})})
    with pytest.raises(MalformedError, match="public rows"):
        from_message(bad)


@fast
@given(st.data())
def test_any_damage_to_a_message_ends_in_rows_or_a_malformed_error(data):
    entries = st.sampled_from(["0", "0.0", "0.1", "0.2", "1"])
    arrays = st.sampled_from(
        [np.ones(2), np.zeros(2, np.int32), np.ones(2, np.int8), np.zeros(0), np.ones((2, 2), np.int64)]
    )
    words = st.lists(
        st.sampled_from(["u", "x", "str", "object", "category", "boolean", "float64", "datetime64[s]", "Int8"]),
        max_size=3,
    )
    keys = st.sampled_from(["inputs", "0.columns", "0.dtypes", "0", "0.1", "0.2", "0.dtype"])
    tree = Tree({**GOOD.trees["rows"], **data.draw(st.dictionaries(entries, arrays, max_size=2))})
    text = {key: tuple(value) for key, value in data.draw(st.dictionaries(keys, words, max_size=3)).items()}
    try:
        raw = from_message(Message(trees={"rows": tree}, text={**GOOD.text, **text}))
    except MalformedError:
        return
    assert len(raw) >= 0
