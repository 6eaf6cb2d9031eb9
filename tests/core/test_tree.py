"""Trees: names, order, dtypes and shapes survive everything; nothing broadcasts; nothing can be written to."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.core.errors import SpecError
from polyfed.core.tree import DTYPES, FLOATS, Entry, Spec, Tree, aligned, dtype_name, is_under, part_of

SHAPES = [(), (0,), (3,), (2, 3), (2, 0, 4), (1, 1, 1)]


def values(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 100, shape)
    return np.asarray(draws).astype(DTYPES[dtype])


def mixed() -> Tree:
    """Every dtype in every shape, dtypes taking turns."""
    return Tree({f"{d}.{i}": values(d, shape, i) for i, shape in enumerate(SHAPES) for d in DTYPES})


def floats() -> Tree:
    return Tree({f"{d}.{i}": values(d, shape, i) for i, shape in enumerate(SHAPES) for d in sorted(FLOATS)})


def tree(**arrays: object) -> Tree:
    return Tree({name: np.asarray(value, np.float32) for name, value in arrays.items()})


def spec(**shapes: tuple[int, ...]) -> Spec:
    return Spec({name: Entry("float32", shape) for name, shape in shapes.items()})


# Construction


def test_tree_when_built_gives_back_dtypes_shapes_values_and_order():
    arrays = {f"{d}.{i}": values(d, shape, i) for i, shape in enumerate(SHAPES) for d in DTYPES}
    built = Tree(arrays)
    assert list(built) == list(arrays)
    assert len(built) == len(arrays)
    for name, array in arrays.items():
        assert built[name].dtype == array.dtype
        assert built[name].shape == array.shape
        assert built[name].tobytes() == array.tobytes()


def test_tree_when_built_copies_and_never_changes():
    array = np.ones(3, np.float32)
    built = Tree({"w": array})
    array[:] = 7
    assert built["w"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        built["w"][0] = 2
    with pytest.raises(ValueError, match="read-only"):
        built.buffers["float32"][0] = 2


def test_tree_when_big_endian_or_strided_arrays_are_given_holds_the_same_values():
    built = Tree({"b": np.arange(3, dtype=">f4"), "s": np.arange(12.0).reshape(3, 4).T[::2]})
    assert built["b"].dtype == np.dtype("<f4")
    assert built["b"].tolist() == [0, 1, 2]
    assert built["s"].tolist() == [[0, 4, 8], [2, 6, 10]]


@pytest.mark.parametrize("bad", ["text", b"bytes", 1j, None, [1, None], np.datetime64(1, "s")])
def test_tree_when_an_array_cannot_be_held_names_it(bad):
    with pytest.raises(SpecError, match=r"w: arrays of dtype .* cannot be held in a tree; use one of float64"):
        Tree({"ok": np.ones(1), "w": np.asarray(bad)})


def test_dtype_name_when_known_is_the_name_and_otherwise_refuses():
    assert [dtype_name(dtype) for dtype in DTYPES.values()] == list(DTYPES)
    assert dtype_name(np.dtype(">i8")) == "int64"
    with pytest.raises(SpecError, match="complex128"):
        dtype_name(np.dtype(complex))


@pytest.mark.parametrize("dtype", DTYPES)
def test_buffers_start_on_64_bytes(dtype):
    for size in (1, 5, 1000):  # an empty one has no address of its own
        vector = aligned(size, dtype)
        assert vector.ctypes.data % 64 == 0
        assert vector.dtype == DTYPES[dtype]
        assert vector.shape == (size,)


def test_buffers_of_every_result_start_on_64_bytes():
    for number in range(1, 20):
        t = Tree({f"{d}": values(d, (number,)) for d in sorted(FLOATS)})
        other = Tree({"float32": t["float32"]})
        for result in (t, t + t, t - t, t * 0.5, Tree.zeros(t.spec), t.overlay(other), t.only(["float32", "float64"])):
            assert all(buffer.ctypes.data % 64 == 0 for buffer in result.buffers.values())


def test_wrap_when_buffers_fit_shares_them_and_makes_them_read_only():
    buffer = np.arange(4, dtype=np.float32)
    wrapped = Tree.wrap(spec(a=(3,), b=()), {"float32": buffer})
    assert np.shares_memory(wrapped["a"], buffer)
    assert wrapped["b"] == 3
    assert not wrapped["a"].flags.writeable
    assert buffer.flags.writeable


@pytest.mark.parametrize(
    ("buffers", "sentence"),
    [
        ({}, "the float32 buffer holds nothing, expected 3 elements"),
        ({"float32": np.zeros(2, np.float32)}, r"holds float32\[2\], expected 3"),
        ({"float32": np.zeros((1, 3), np.float32)}, r"holds float32\[1, 3\]"),
        ({"float32": np.zeros(3)}, r"holds float64\[3\]"),
        ({"float32": np.zeros(6, np.float32)[::2]}, "not contiguous"),
    ],
)
def test_wrap_when_buffers_do_not_fit_says_what_is_there(buffers, sentence):
    with pytest.raises(SpecError, match=sentence):
        Tree.wrap(spec(a=(3,)), buffers)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t, protocol=5))])
def test_tree_when_copied_between_processes_is_equal_and_still_read_only(clone):
    cloned = clone(mixed())
    assert cloned == mixed()
    assert not any(array.flags.writeable for array in cloned.values())


# Spec


def test_spec_when_asked_knows_sizes_and_places():
    s = mixed().spec
    assert s.num_bytes == sum(array.nbytes for array in mixed().values())
    assert s["int16.3"] == Entry("int16", (2, 3))
    assert (s["int16.3"].size, s["int16.3"].num_bytes) == (6, 12)
    assert s.places["int16.3"] == ("int16", 4, 10, (2, 3))
    assert s.sizes["bool"] == 1 + 0 + 3 + 6 + 0 + 1


def test_entry_when_sizes_are_hostile_multiplies_in_python_integers():
    assert Entry("float64", (2**40, 2**40)).num_bytes == 2**83


def test_spec_when_the_dtype_is_unknown_refuses():
    with pytest.raises(SpecError, match="w: unknown dtype 'float8'"):
        Spec({"w": Entry("float8", ())})


def test_spec_equality_and_digest_see_names_order_dtypes_and_shapes():
    s = spec(a=(2,), b=(3,))
    different = [
        spec(a=(2,)),
        spec(b=(3,), a=(2,)),
        spec(a=(2,), c=(3,)),
        spec(a=(2,), b=(3, 1)),
        Spec({"a": Entry("float32", (2,)), "b": Entry("float64", (3,))}),
    ]
    assert s == spec(a=(2,), b=(3,))
    assert s != {"a": 1}
    assert all(s != other for other in different)
    assert len({s.digest, *(other.digest for other in different)}) == 6
    with pytest.raises(TypeError, match="unhashable"):
        hash(s)


def test_spec_when_two_dtypes_swap_their_order_is_another():
    one = Spec({"a": Entry("float32", (2,)), "b": Entry("int64", (2,))})
    other = Spec({"b": Entry("int64", (2,)), "a": Entry("float32", (2,))})
    assert one.places == other.places
    assert one != other


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (spec(a=(2,), b=(3,)), ""),
        (spec(a=(2,)), "unexpected 'b'"),
        (spec(a=(2,), b=(3,), c=()), "missing 'c'"),
        (spec(a=(2, 1), b=(3,)), "a is float32[2], expected float32[2, 1]"),
        (spec(b=(3,), a=(2,)), "the entries stand in another order"),
        (spec(c=(), d=(), e=(), f=(), g=()), "missing 'c', 'd', 'e' and 2 more; unexpected 'a', 'b'"),
    ],
)
def test_difference_says_what_differs(other, sentence):
    assert spec(a=(2,), b=(3,)).difference(other) == sentence


def test_select_keeps_order():
    assert list(mixed().spec.select(lambda name: name.startswith("int8"))) == [f"int8.{i}" for i in range(len(SHAPES))]


def test_repr_of_tree_and_spec_is_short():
    assert repr(tree(a=[1, 2])) == "Tree(1 entries, 8 bytes)"
    assert repr(spec(a=(2,))) == "Spec(1 entries, 8 bytes)"


# Equality and digest


def test_equality_is_bitwise():
    nan = tree(a=[np.nan, 1])
    assert nan == tree(a=[np.nan, 1])
    assert tree(a=0.0) != tree(a=-0.0)
    assert tree(a=1) != Tree({"a": np.float64(1)})
    assert tree(a=1) != {"a": 1}
    with pytest.raises(TypeError, match="unhashable"):
        hash(nan)


def test_digest_when_any_bit_differs_differs():
    base = mixed()
    digests = {base.digest}
    for dtype, buffer in base.buffers.items():
        raw = buffer.view(np.uint8).copy()
        raw[-1] ^= 1
        digests.add(Tree.wrap(base.spec, {**base.buffers, dtype: raw.view(DTYPES[dtype])}).digest)
    assert len(digests) == 1 + len(DTYPES)
    assert base.digest == mixed().digest


def test_digest_when_only_names_or_shapes_differ_differs():
    assert len({tree(a=[1, 2]).digest, tree(b=[1, 2]).digest, tree(a=[[1, 2]]).digest, Tree().digest}) == 4


# Arithmetic


@pytest.mark.parametrize("dtype", sorted(FLOATS))
def test_arithmetic_when_floating_is_elementwise_and_keeps_the_dtype(dtype):
    a, b = values(dtype, (50,), 1), values(dtype, (50,), 2)
    one, other = Tree({"w": a, "s": a[0]}), Tree({"w": b, "s": b[0]})
    for result, wanted in [(one + other, a + b), (one - other, a - b), (one * 0.25, a * DTYPES[dtype].type(0.25))]:
        assert result["w"].dtype == DTYPES[dtype]
        assert result["w"].tobytes() == wanted.tobytes()
        assert result["s"] == wanted[0]
        assert result["s"].shape == ()
        assert not result["w"].flags.writeable
    assert 0.25 * one == one * 0.25


def test_bfloat16_arithmetic_rounds_to_bfloat16():
    ones = Tree({"w": np.ones(3, ml_dtypes.bfloat16)})
    assert (ones + ones * 2**-9)["w"].astype(float).tolist() == [1, 1, 1]
    assert (ones + ones * 2**-7)["w"].astype(float).tolist() == [1.0078125] * 3


def test_arithmetic_when_specs_differ_never_broadcasts():
    for other in (tree(a=1), tree(a=[1]), tree(a=[[1, 1]]), tree(b=[1, 1]), tree(a=[1, 1], b=1), Tree()):
        for operation in (Tree.__add__, Tree.__sub__, Tree.dot):
            with pytest.raises(SpecError, match="trees of different specs never combine: "):
                operation(tree(a=[1, 1]), other)


def test_arithmetic_when_the_order_differs_refuses():
    with pytest.raises(SpecError, match="another order"):
        tree(a=1, b=2) + tree(b=2, a=1)


@pytest.mark.parametrize("dtype", sorted(set(DTYPES) - FLOATS))
def test_arithmetic_when_integers_are_in_it_refuses(dtype):
    t = Tree({"w": np.ones(2, np.float32), "n": values(dtype, (2,))})
    for operation in (
        lambda: t + t,
        lambda: t - t,
        lambda: t * 2,
        lambda: t.dot(t),
        t.norm,
        lambda: t.map(np.negative),
    ):
        with pytest.raises(SpecError, match=f"arithmetic on {dtype} entries has no meaning"):
            operation()


def test_map_when_the_length_changes_refuses():
    assert tree(a=[1, 4]).map(np.sqrt) == tree(a=[1, 2])
    with pytest.raises(SpecError, match=r"float32\[1\], expected 2"):
        tree(a=[1, 4]).map(lambda a: a[:1])
    with pytest.raises(SpecError, match="float64"):
        tree(a=[1, 4]).map(lambda a: a.astype(np.float64))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 40_000), st.sampled_from(sorted(FLOATS)))
def test_dot_and_norm_are_summed_in_float64(size, dtype):
    t = Tree({"a": values(dtype, (size,), 1), "b": values("float64", (3,), 2)})
    wanted = sum(float((x.astype(np.float64) ** 2).sum()) for x in t.values())
    assert t.dot(t) == pytest.approx(wanted, rel=1e-12)
    assert t.norm() == pytest.approx(np.sqrt(wanted), rel=1e-12)


def test_dot_when_float32_would_lose_the_small_term_keeps_it():
    t = tree(a=[2**13, 1])
    assert t.dot(t) == 2**26 + 1


def test_dot_when_inputs_lie_askew_has_the_same_bits():
    numbers = np.random.default_rng(0).standard_normal(20_000)
    straight = Tree({"a": numbers})
    results = set()
    for shift in range(0, 64, 8):
        raw = np.zeros(numbers.nbytes + 64, np.uint8)
        raw[shift : shift + numbers.nbytes] = numbers.view(np.uint8)
        view = raw[shift : shift + numbers.nbytes].view("<f8")
        results.add(Tree.wrap(straight.spec, {"float64": view}).dot(straight))
    assert results == {straight.dot(straight)}


def test_empty_tree_is_neutral():
    empty = Tree()
    assert empty + empty == empty * 3 == empty == Tree.zeros(Spec({}))
    assert (empty.norm(), empty.is_finite(), empty.flat.shape, empty.spec.num_bytes) == (0.0, True, (0,), 0)
    assert empty.with_flat(empty.flat) == empty


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_is_finite_when_one_element_is_not_says_so(dtype, bad):
    array = values(dtype, (5,))
    assert Tree({"n": np.array(1), "w": array}).is_finite()
    array[4] = bad
    assert not Tree({"n": np.array(1), "w": array}).is_finite()


def test_zeros_has_the_spec_and_no_value():
    zeros = Tree.zeros(mixed().spec)
    assert zeros.spec == mixed().spec
    assert not any(array.any() for array in zeros.values())


# Flat


def test_flat_is_the_buffer_and_with_flat_its_inverse():
    t = tree(a=[[1, 2], [3, 4]], b=5)
    assert t.flat.tolist() == [1, 2, 3, 4, 5]
    assert np.shares_memory(t.flat, t["a"])
    assert t.with_flat(t.flat * 2) == tree(a=[[2, 4], [6, 8]], b=10)
    with pytest.raises(SpecError, match=r"float32\[4\], expected 5"):
        t.with_flat(t.flat[:4])


def test_flat_when_there_are_two_dtypes_refuses():
    with pytest.raises(SpecError, match="a tree of float32, int64 is not one flat vector"):
        Tree({"a": np.float32(1), "b": np.int64(1)}).flat  # noqa: B018  # the access itself raises


# Choosing entries


NAMED = {
    "base.0.weight": 1,
    "head.weight": 2,
    "basement": 3,
    "stats:base.1/mean": 4,
    "stats:head/mean": 5,
    "buffers:base.1/count": 6,
}


def test_only_and_without_keep_this_trees_order():
    t = tree(**NAMED)
    assert list(t.only(["head.weight", "base.0.weight", "absent"])) == ["base.0.weight", "head.weight"]
    assert list(t.without(["head.weight", "absent"])) == [name for name in NAMED if name != "head.weight"]
    assert t.only(NAMED) is t
    assert t.without([]) is t
    assert t.only([]) == Tree()
    assert list(t.only(iter(["basement"]))) == ["basement"]


def test_part_tells_parameters_statistics_and_buffers():
    t = tree(**NAMED)
    assert list(t.part("params")) == ["base.0.weight", "head.weight", "basement"]
    assert list(t.part("stats")) == ["stats:base.1/mean", "stats:head/mean"]
    assert list(t.part("buffers")) == ["buffers:base.1/count"]
    assert part_of("statistics") == "params"


def test_under_takes_every_part_below_a_prefix():
    t = tree(**NAMED)
    assert list(t.under(["base"])) == ["base.0.weight", "stats:base.1/mean", "buffers:base.1/count"]
    assert t.under([]) is t


@pytest.mark.parametrize(
    ("name", "prefixes", "wanted"),
    [
        ("base.0.weight", ("base",), True),
        ("base.0.weight", ("base.",), True),
        ("base.0.weight", ("base.0",), True),
        ("base.0.weight", ("base.0.weight",), True),
        ("base.0.weight", ("base.0.w",), False),
        ("base.00", ("base.0",), False),
        ("basement", ("base",), False),
        ("dense/kernel", ("dense",), True),
        ("dense/kernel", ("dense/",), True),
        ("dense_1/kernel", ("dense",), False),
        ("stats:base.1/mean", ("base",), True),
        ("stats:base.1/mean", ("stats",), False),
        ("buffers:base/count", ("head", "base"), True),
        ("a:base.0", ("base",), False),
        ("anything", (), True),
        ("anything", ("",), False),
        ("base", ("base.0",), False),
        ("head.weight", ("!head",), False),
        ("stats:head.0/mean", ("!head",), False),
        ("header.weight", ("!head",), True),
        ("base.bn.weight", ("base", "!base.bn"), False),
        ("base.0.weight", ("base", "!base.bn"), True),
        ("neck.weight", ("base", "!base.bn"), False),
        ("anything", ("!",), True),
    ],
)
def test_is_under_compares_whole_path_elements(name, prefixes, wanted):
    assert is_under(name, prefixes) is wanted


def test_overlay_replaces_entries_and_leaves_the_rest():
    t = mixed()
    new = Tree({"bool.3": ~t["bool.3"], "float32.2": t["float32.2"] + 1, "bfloat16.0": t["bfloat16.0"]})
    result = t.overlay(new)
    assert result.spec == t.spec
    for name in t:
        assert result[name].tobytes() == (new if name in new else t)[name].tobytes()
    assert t == mixed()
    assert t.overlay(Tree()) == t
    assert t.overlay(mixed()) == t


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (tree(c=1), "unexpected 'c'"),
        (tree(a=[1, 2, 3]), r"a is float32\[3\], expected float32\[2\]"),
        (tree(a=1), r"a is float32\[\], expected float32\[2\]"),
        (Tree({"a": np.zeros(2)}), r"a is float64\[2\], expected float32\[2\]"),
    ],
)
def test_overlay_when_an_entry_does_not_fit_names_it(other, sentence):
    with pytest.raises(SpecError, match=sentence):
        tree(a=[1, 2], b=3).overlay(other)


def test_like_takes_the_entries_of_a_spec_in_its_order_and_refuses_what_is_absent():
    t = tree(a=1, b=[2, 2], c=3)
    assert list(t.like(spec(c=(), a=()))) == ["c", "a"]
    with pytest.raises(SpecError, match="missing 'd'"):
        t.like(spec(a=(), d=()))


def test_in_order_of_reorders_and_refuses_other_names():
    t = tree(a=1, b=[2, 2])
    assert t.in_order_of(spec(b=(2,), a=())) == tree(b=[2, 2], a=1)
    assert t.in_order_of(t.spec) is t
    for other, sentence in [
        (spec(b=(2,)), "unexpected 'a'"),
        (spec(b=(2,), a=(), c=()), "missing 'c'"),
        (spec(b=(2,), a=(1,)), r"a is float32\[\], expected float32\[1\]"),
    ]:
        with pytest.raises(SpecError, match=sentence):
            t.in_order_of(other)


# Mutants: each rule above, taken away, must be noticed by the check that guards it


def test_mutant_when_wrap_skips_its_checks_a_short_buffer_is_noticed(monkeypatch):
    def careless(cls, spec, buffers):
        made = cls.__new__(cls)
        made.spec, made.buffers = spec, dict(buffers)
        return made

    monkeypatch.setattr(Tree, "wrap", classmethod(careless))
    with pytest.raises(pytest.fail.Exception):
        test_map_when_the_length_changes_refuses()


def test_mutant_when_prefixes_match_as_plain_strings_is_noticed(monkeypatch):
    monkeypatch.setitem(globals(), "is_under", lambda name, prefixes: name.startswith(prefixes) or not prefixes)
    with pytest.raises(AssertionError):
        test_is_under_compares_whole_path_elements("basement", ("base",), False)
