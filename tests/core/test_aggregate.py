"""The fold: hand-computed numbers, the algebra of sums (invariants 16-20, 25-28, 53, 59), and what is refused."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.core import aggregate, kernels, wire
from polyfed.core.aggregate import (
    Aggregate,
    Fold,
    Sums,
    UpdatePolicy,
    capped,
    moments_of,
    stats_of,
    validate,
    weights_of,
)
from polyfed.core.errors import MalformedError, RefusedError, SpecError, UsageError
from polyfed.core.message import Message
from polyfed.core.tree import Spec, Tree

F4 = np.float32


def update(n: float = 1.0, **arrays: np.ndarray) -> Message:
    return Message({"params": Tree(arrays)}, {"num_examples": float(n)})


def random_updates(count: int, seed: int = 0, dtype: str = "float32") -> list[Message]:
    rng = np.random.default_rng(seed)
    return [
        update(
            rng.integers(1, 100),
            **{"a.w": rng.standard_normal((7, 5)).astype(dtype), "a.b": rng.standard_normal(3).astype(dtype)},
        )
        for _ in range(count)
    ]


def by_examples(message: Message):
    return lambda tree: message.numbers["num_examples"]


def folded(updates: dict[int, Message], block=16) -> Aggregate:
    fold = Fold(block)
    for position in sorted(updates):
        fold.add(position, updates[position], by_examples(updates[position]))
    return fold.finish()


def by_definition(updates: dict[int, Message], block: int = 16) -> dict[str, np.ndarray]:
    """The fold's definition, an entry at a time: blocks left to right, then block sums left to right."""
    total: dict[str, np.ndarray] = {}
    for _, positions in itertools.groupby(sorted(updates), key=lambda position: position // block):
        part: dict[str, np.ndarray] = {}
        for position in positions:
            weight = F4(updates[position].numbers["num_examples"])
            for name, x in updates[position].trees["params"].items():
                value = (weight * x).astype(np.result_type(x.dtype, F4))
                part[name] = part[name] + value if name in part else value
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def bits(tree: Tree) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in tree.items()}


# ---- hand-computed


def test_mean_of_two_clients_when_weighted_is_the_weighted_mean():
    got = folded({0: update(1, w=F4([2.0])), 1: update(3, w=F4([6.0]))})
    assert got.sum("params")["w"].tolist() == [20.0]
    assert got.weight("params")["w"].tolist() == [4.0]
    assert got.mean("params")["w"].tolist() == [5.0]
    assert (got.clients, got.trees) == (2, ("params",))


def test_numbers_when_sent_by_some_are_weighted_by_their_examples():
    a = Message(numbers={"num_examples": 1.0, "loss": 4.0})
    b = Message(numbers={"num_examples": 3.0, "loss": 8.0, "auc": 0.5})
    got = folded({0: a, 1: b})
    assert got.numbers == {"loss": 7.0, "auc": 0.5, "num_examples": 4.0}
    assert folded({0: a, 1: a, 16: b, 17: b}).numbers == {"loss": 7.0, "auc": 0.5, "num_examples": 8.0}


def test_weight_when_per_tree_is_used_per_tree():
    message = Message({"params": Tree({"w": F4([1.0])}), "control": Tree({"w": F4([1.0])})}, {"num_examples": 5.0})
    fold = Fold()
    fold.add(0, message, lambda tree: 5.0 if tree == "params" else 1.0)
    got = fold.finish()
    assert (got.sum("params")["w"][0], got.sum("control")["w"][0]) == (5.0, 1.0)


def test_empty_fold_when_finished_has_no_clients_and_empty_trees():
    got = Fold().finish()
    assert (got.clients, got.trees, dict(got.numbers)) == (0, (), {})
    assert len(got.mean("params")) == len(got.sum("params")) == len(got.weight("params")) == 0


def test_aggregate_when_asked_for_an_absent_tree_gives_an_empty_one():
    assert len(folded({0: update(1, w=F4([1.0]))}).mean("control")) == 0


# ---- the plan decides the bits


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_fold_when_compared_with_its_definition_has_the_same_bits(dtype):
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    updates = {position: u for position, u in enumerate(random_updates(50, dtype=dtype)) if position % 7 != 3}
    got, wanted = folded(updates).sum("params"), by_definition(updates)
    assert {name: array.dtype for name, array in got.items()} == {name: array.dtype for name, array in wanted.items()}
    assert bits(got) == {name: array.tobytes() for name, array in wanted.items()}


def test_fold_when_blocks_differ_has_other_bits():
    """The control of all tests of bits here: they could not fail if the order did not matter."""
    updates = dict(enumerate(random_updates(50)))
    assert bits(folded(updates, 16).sum("params")) != bits(folded(updates, 5).sum("params"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.sets(st.integers(0, 39)), st.integers(1, 20), st.sets(st.integers(0, 40)))
def test_block_sums_by_workers_when_added_change_no_bit(count, missing, block, elsewhere):
    updates = {p: u for p, u in enumerate(random_updates(count)) if p not in missing}
    flat, mixed = Fold(block), Fold(block)
    for position, message in updates.items():
        flat.add(position, message, by_examples(message))
    for index, group in itertools.groupby(updates, key=lambda position: position // block):
        worker = Fold(block)
        target = worker if index in elsewhere else mixed
        for position in group:
            target.add(position, updates[position], by_examples(updates[position]))
        if index in elsewhere:
            mixed.add_block(index, Sums.from_message(worker.block_sums().to_message()))
    a, b = flat.finish(), mixed.finish()
    assert a.mean("params") == b.mean("params")
    assert a.sum("params") == b.sum("params")
    assert a.weight("params") == b.weight("params")
    assert (a.clients, a.numbers) == (b.clients, b.numbers)


def test_fold_when_one_spec_differs_keeps_the_bits_of_the_others():
    """Falling back to sums per name is another way of bookkeeping, not another sum."""
    updates = dict(enumerate(random_updates(40)))
    extra = Message({"params": Tree({"other": F4([1.0])})}, {"num_examples": 2.0})
    plain, mixed = folded(updates).mean("params"), folded({**updates, 100: extra}).mean("params")
    assert {name: a.tobytes() for name, a in mixed.items() if name != "other"} == bits(plain)


def test_fold_when_an_entry_first_appears_in_a_later_block_keeps_its_sum():
    """The accumulators of a block are used again by the next one; what was taken over from them must be a copy."""
    both = update(1, a=F4([1.0]), b=F4([2.0]))
    got = folded({0: update(1, a=F4([4.0])), 16: both, 32: both, 48: both})
    assert {name: a.tolist() for name, a in got.sum("params").items()} == {"a": [7.0], "b": [6.0]}


def test_fold_when_a_plan_names_its_blocks_follows_it():
    updates = dict(enumerate(random_updates(12)))
    assert bits(folded(updates, lambda position: position // 4).sum("params")) == bits(folded(updates, 4).sum("params"))


def test_kernel_when_it_fuses_or_is_one_ulp_off_is_caught(monkeypatch):
    updates = dict(enumerate(random_updates(40)))
    wanted = {name: array.tobytes() for name, array in by_definition(updates).items()}

    def fused(total, x, weight, scratch):
        total[:] = (total.astype(np.float64) + np.float64(weight) * x.astype(np.float64)).astype(total.dtype)

    def one_ulp(total, x, weight, scratch):
        kernels.add_scaled_numpy(total, x, weight, scratch)
        total[:1] = np.nextafter(total[:1], F4(np.inf))

    for mutant in (fused, one_ulp):
        monkeypatch.setattr(aggregate, "add_scaled", mutant)
        assert bits(folded(updates).sum("params")) != wanted
        monkeypatch.undo()
    assert bits(folded(updates).sum("params")) == wanted


def test_position_when_it_does_not_rise_is_refused_and_changes_nothing():
    fold, (a, b, c) = Fold(), random_updates(3)
    fold.add(3, a, by_examples(a))
    for position in (3, 2):
        with pytest.raises(UsageError, match="plan's order"):
            fold.add(position, b, by_examples(b))
    fold.add(4, c, by_examples(c))
    assert bits(fold.finish().sum("params")) == bits(folded({3: a, 4: c}).sum("params"))


def test_block_when_added_twice_or_beside_its_uploads_is_refused():
    a, b = random_updates(2)
    worker = Fold()
    worker.add(0, a, by_examples(a))
    sums = worker.block_sums()
    fold = Fold()
    fold.add_block(0, sums)
    with pytest.raises(UsageError, match="rising order"):
        fold.add_block(0, sums)
    with pytest.raises(UsageError, match="is complete"):
        fold.add(5, b, by_examples(b))
    other = Fold()
    other.add(2, b, by_examples(b))
    with pytest.raises(UsageError, match="rising order"):
        other.add_block(0, sums)


def test_block_sum_when_two_blocks_were_folded_is_not_sent():
    fold = Fold()
    for position, message in enumerate(random_updates(17)):
        fold.add(position, message, by_examples(message))
    with pytest.raises(UsageError, match="only the sum of one block"):
        fold.block_sums()


def test_block_sum_when_added_is_only_read():
    a, b = random_updates(2)
    worker = Fold()
    worker.add(0, a, by_examples(a))
    sums = worker.block_sums()
    before = bits(Aggregate(sums).sum("params"))
    fold = Fold()
    fold.add_block(0, sums)
    fold.add(16, b, by_examples(b))
    fold.finish()
    assert bits(Aggregate(sums).sum("params")) == before


def test_fold_when_finished_takes_nothing_more():
    fold = Fold()
    fold.finish()
    for call in (fold.finish, fold.block_sums, lambda: fold.add(0, Message(), lambda _: 1.0)):
        with pytest.raises(UsageError, match="ended"):
            call()


def test_block_size_when_below_one_is_refused():
    with pytest.raises(UsageError, match="at least one"):
        Fold(0)


# ---- kernels


def test_kernels_when_compared_on_a_million_values_have_equal_bits():
    rng = np.random.default_rng(3)
    for dtype, tiny in ((np.float32, 1e-42), (np.float64, 1e-320)):
        x = (rng.standard_normal(1_000_000) * 10.0 ** rng.integers(-30, 30, 1_000_000)).astype(dtype)
        x[::7] = rng.standard_normal(len(x[::7])).astype(dtype) * dtype(tiny)
        x[::11], x[::13] = -0.0, 0.0
        x.flags.writeable = False
        start = (rng.standard_normal(len(x)) * 10.0 ** rng.integers(-30, 30, len(x))).astype(dtype)
        start[::5], start[::9] = -0.0, dtype(tiny)
        for weight in (F4(0.3), F4(17.0), F4(1e-20)):
            one, two = start.copy(), start.copy()
            kernels.add_scaled_numpy(one, x, weight, kernels.Scratch())
            kernels.compiled()(two, x, dtype(weight))
            assert one.tobytes() == two.tobytes()


def test_compiled_kernel_when_inspected_holds_no_fused_multiply_add():
    kernel = kernels.compiled()
    kernel(np.zeros(4, F4), np.ones(4, F4), F4(2))
    assert not any("fmadd" in text or "fmla" in text for text in kernel.inspect_asm().values())


def test_large_vectors_when_folded_use_the_compiled_kernel_with_equal_bits(monkeypatch):
    monkeypatch.setattr(kernels, "LARGE", 30)
    assert (kernels.kernel_name(29), kernels.kernel_name(30)) == ("numpy", "numba")
    updates = dict(enumerate(random_updates(40)))
    fast = folded(updates).sum("params")
    monkeypatch.setattr(kernels, "compiled", lambda: None)
    assert kernels.kernel_name(30) == "numpy"
    assert bits(folded(updates).sum("params")) == bits(fast)


def test_numpy_kernel_when_a_vector_has_many_pieces_folds_all_of_it():
    size = 2 * kernels.PIECE + 17
    x, total = np.arange(size, dtype=F4), np.ones(size, F4)
    kernels.add_scaled_numpy(total, x, F4(3), kernels.Scratch())
    assert np.array_equal(total, 1 + 3 * x)
    kernels.add_scaled_numpy(total, x, np.full(size, -3, F4), kernels.Scratch())
    assert np.array_equal(total, np.ones(size, F4))


def test_compiled_when_numba_cannot_be_imported_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert kernels.compiled.__wrapped__() is None


def test_import_when_nothing_large_is_folded_leaves_numba_out():
    code = (
        "import sys, numpy as np\nfrom polyfed.core.aggregate import Fold\nfrom polyfed.core.message import Message\n"
        "from polyfed.core.tree import Tree\nf = Fold()\n"
        "m = Message({'params': Tree({'w': np.ones(1000, np.float32)})})\n"
        "f.add(0, m, lambda t: 1.0); f.add(1, m, lambda t: 1.0); f.finish()\nsys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- algebra (invariants 17 to 20, 25 to 28)


def near(a: Tree, b: Tree, tolerance: float = 3e-6) -> bool:
    return set(a) == set(b) and all(np.allclose(a[name], b[name], rtol=tolerance, atol=tolerance) for name in a)


def test_merge_when_sums_of_two_sets_are_added_is_the_sum_of_their_union():
    updates = dict(enumerate(random_updates(20)))
    parts = [folded({p: u for p, u in updates.items() if p % 2 == k}).sums for k in (0, 1)]
    parts[0].merge(parts[1])
    assert near(Aggregate(parts[0]).mean("params"), folded(updates).mean("params"))


@pytest.mark.parametrize("factor", [7.0, 2.0])
def test_weights_when_all_are_scaled_leave_the_mean(factor):
    updates = random_updates(20)
    scaled = Fold()
    for position, message in enumerate(updates):
        scaled.add(position, message, lambda _, m=message: factor * m.numbers["num_examples"])
    wanted, got = folded(dict(enumerate(updates))).mean("params"), scaled.finish().mean("params")
    assert near(got, wanted)
    assert factor != 2.0 or got == wanted  # a power of two moves exponents only


def test_client_when_split_in_two_halves_counts_the_same():
    (a, b) = random_updates(2)
    n = b.numbers["num_examples"]
    halves = [b.put(numbers={"num_examples": n / 2})] * 2
    assert near(folded({0: a, 1: halves[0], 2: halves[1]}).mean("params"), folded({0: a, 1: b}).mean("params"))


def test_identical_updates_when_averaged_come_back():
    (a,) = random_updates(1)
    same = {p: a.put(numbers={"num_examples": float(p + 1)}) for p in range(40)}
    assert near(folded(same).mean("params"), a.trees["params"], 1e-6)


def test_one_client_when_weighted_by_a_power_of_two_comes_back_bit_for_bit():
    (a,) = random_updates(1)
    assert folded({5: a.put(numbers={"num_examples": 64.0})}).mean("params") == a.trees["params"]


def test_entry_when_some_clients_lack_it_is_the_mean_of_those_who_sent_it():
    got = folded(
        {0: update(1, a=F4([1.0]), b=F4([10.0])), 1: update(1, a=F4([3.0])), 20: update(2, b=F4([1.0]), c=F4([5.0]))}
    ).mean("params")
    assert {name: a.tolist() for name, a in got.items()} == {"a": [2.0], "b": [4.0], "c": [5.0]}


def test_half_precision_when_ten_thousand_upload_is_within_one_ulp_of_the_exact_mean():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((10_000, 8)).astype(np.float16)
    got = folded({p: update(1, w=v) for p, v in enumerate(values)}).mean("params")["w"]
    exact = values.astype(np.float64).mean(axis=0)
    assert got.dtype == np.float16
    assert np.all(np.abs(got - exact) <= np.spacing(np.abs(exact).astype(np.float16)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_mean_when_uploads_have_a_dtype_has_it_too(dtype):
    got = folded({0: update(1, w=np.ones((2, 3), dtype)), 1: update(2, w=np.ones((2, 3), dtype))})
    assert got.mean("params")["w"].dtype == dtype
    assert got.mean("params")["w"].shape == (2, 3)
    assert got.sum("params")["w"].dtype == (np.float64 if dtype is np.float64 else np.float32)
    assert got.sum("params").spec == got.weight("params").spec


def test_mixed_dtypes_when_folded_keep_each_its_own():
    message = update(2, h=np.ones(2, np.float16), d=np.ones(2), s=np.ones(2, F4))
    got = folded({0: message, 1: message})
    assert [a.dtype.name for a in got.mean("params").values()] == ["float16", "float64", "float32"]
    assert got.sum("params")["h"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("array", [np.ones(2, np.int64), np.ones(2, bool), np.ones(2, np.uint8)])
def test_integers_when_uploaded_are_refused_by_name(array):
    with pytest.raises(SpecError, match="params/steps"):
        folded({0: update(1, w=F4([1.0]), steps=array)})


def test_buffers_when_uploaded_are_refused_by_name():
    with pytest.raises(SpecError, match="buffers:bn/scale"):
        folded({0: update(1, **{"buffers:bn/scale": F4([1.0])})})


@pytest.mark.parametrize("other", [np.ones(3, F4), np.ones(2, np.float64), np.ones((2, 1), F4)])
def test_entries_when_shapes_or_dtypes_differ_are_never_broadcast(other):
    fold, first = Fold(), update(1, w=F4([1.0, 2.0]))
    fold.add(0, first, by_examples(first))
    bad = Message({"early": Tree({"x": F4([1.0])}), "params": Tree({"w": other})}, {"num_examples": 1.0})
    with pytest.raises(SpecError, match=r"params/w is .* in one upload"):
        fold.add(1, bad, by_examples(bad))
    fold.add(16, first, by_examples(first))  # nothing of the refused one was left behind, its other tree included
    late = Message({"early": Tree({"x": np.ones(1)})}, {"num_examples": 1.0})
    fold.add(17, late, by_examples(late))
    got = fold.finish()
    assert (got.clients, got.sum("params")["w"].tolist(), got.sum("early")["x"].tolist()) == (3, [2.0, 4.0], [1.0])


def test_block_sum_when_its_spec_differs_is_refused_and_changes_nothing():
    worker, other = Fold(), update(1, w=np.ones(3, F4))
    worker.add(16, other, by_examples(other))
    sums = worker.block_sums()
    fold, first = Fold(), update(1, w=F4([1.0, 2.0]))
    fold.add(0, first, by_examples(first))
    with pytest.raises(SpecError, match="params/w"):
        fold.add_block(1, sums)
    fold.add(1, first, by_examples(first))
    result = fold.finish()
    assert result.sum("params")["w"].tolist() == [2.0, 4.0]
    with pytest.raises(SpecError, match="params/w"):
        result.sums.merge(sums)
    assert (result.clients, result.sums.clients) == (2, 2)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, 1e39, 1e-60])
def test_weight_when_it_cannot_be_used_is_refused(weight):
    fold, (a,) = Fold(), random_updates(1)
    with pytest.raises(UsageError, match="weight of tree 'params' at position 0"):
        fold.add(0, a, lambda _: weight)
    assert fold.finish().clients == 0


# ---- counts


def counted(n: float, x: np.ndarray, count: np.ndarray) -> Message:
    return Message({"p": Tree({"w": x}), "p#": Tree({"w": count})}, {"num_examples": n})


def test_counts_when_per_element_weigh_each_element():
    got = folded(
        {0: counted(2, F4([1, 5, 9]), F4([1, 1, 0])), 1: counted(1, F4([4, 5, 9]), np.array([4, 0, 0], np.uint8))}
    )
    assert got.weight("p")["w"].tolist() == [6.0, 2.0, 0.0]
    assert got.sum("p")["w"].tolist() == [18.0, 10.0, 0.0]
    assert got.mean("p")["w"].tolist() == [3.0, 5.0, 0.0]


def test_counts_when_per_tensor_weigh_the_tensor_and_zero_leaves_it_out():
    got = folded({0: counted(1, F4([1, 2]), F4(3)), 1: counted(1, F4([5, 6]), F4(1)), 2: counted(1, F4([9, 9]), F4(0))})
    assert got.mean("p")["w"].tolist() == [2.0, 3.0]
    assert (got.clients, got.trees) == (3, ("p",))
    assert len(folded({0: counted(1, F4([1, 2]), F4(0))}).mean("p")) == 0


def test_element_when_one_client_covers_it_takes_its_update_in_full():
    got = folded({0: counted(3, F4([8, 1]), F4([1, 0])), 1: counted(5, F4([0, 7]), F4([0, 1]))})
    assert got.mean("p")["w"].tolist() == [8.0, 7.0]


def test_counts_when_fractions_weigh_too():
    got = folded({0: counted(1, F4([4, 0]), F4([0.25, 0.5])), 1: counted(1, F4([8, 0]), F4([0.25, 0]))})
    assert got.mean("p")["w"].tolist() == [6.0, 0.0]


def test_counts_when_mixed_with_plain_uploads_add_up():
    plain = Message({"p": Tree({"w": F4([2, 2])})}, {"num_examples": 2.0})
    got = folded({0: plain, 1: counted(1, F4([5, 5]), F4([2, 0])), 17: counted(1, F4([8, 8]), F4(2)), 40: plain})
    assert got.weight("p")["w"].tolist() == [8.0, 6.0]
    assert got.mean("p")["w"].tolist() == [4.25, 4.0]


def test_counts_when_sums_travel_change_no_bit():
    rng = np.random.default_rng(1)
    messages = [
        counted(n + 1.0, rng.standard_normal(5).astype(d), c)
        for n, (d, c) in enumerate(
            itertools.product([np.float16], [F4(2), rng.integers(0, 3, 5).astype(F4), np.ones(5, bool)])
        )
    ]
    got = folded(dict(enumerate(messages)))
    back = Aggregate(Sums.from_message(got.sums.to_message()))
    assert (back.mean("p"), back.weight("p"), back.numbers) == (got.mean("p"), got.weight("p"), got.numbers)
    assert back.mean("p")["w"].dtype == np.float16


@pytest.mark.parametrize("count", [F4([1, 2]), F4([[1], [2], [3]]), F4([1, -1, 0]), F4([1, np.nan, 0])])
def test_counts_when_they_do_not_fit_are_refused(count):
    with pytest.raises(SpecError, match="p#/w"):
        folded({0: counted(1, F4([1, 2, 3]), count)})


def test_counts_when_they_belong_to_nothing_are_refused():
    with pytest.raises(SpecError, match="p#"):
        folded({0: Message({"p#": Tree({"w": F4(1)})}, {"num_examples": 1.0})})
    with pytest.raises(SpecError, match="p#/v"):
        folded({0: Message({"p": Tree({"w": F4([1])}), "p#": Tree({"v": F4(1)})}, {"num_examples": 1.0})})


# ---- block sums as messages


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"])
def test_block_sum_when_it_travels_changes_no_bit_and_no_dtype(dtype):
    got = folded(dict(enumerate(random_updates(5, dtype=dtype))))
    back = Aggregate(Sums.from_message(wire.decode(wire.to_bytes(got.sums.to_message()))))
    assert (back.sum("params"), back.mean("params")) == (got.sum("params"), got.mean("params"))
    assert (back.clients, back.numbers) == (got.clients, got.numbers)


def block_message() -> Message:
    return folded(dict(enumerate(random_updates(3)))).sums.to_message()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.put(trees={"params#": Tree()}),
        lambda m: m.put(trees={"orphan#": Tree()}),
        lambda m: m.put(trees={"params#": Tree({n: np.float64(-1) for n in m.trees["params"]})}),
        lambda m: m.put(trees={"params#": Tree({n: np.float64(np.nan) for n in m.trees["params"]})}),
        lambda m: m.put(trees={"params#": Tree({n: np.ones(2) for n in m.trees["params"]})}),
        lambda m: m.put(trees={"params#": Tree({n: F4(1) for n in m.trees["params"]})}),
        lambda m: m.put(trees={"params": Tree({n: a.astype(np.int64) for n, a in m.trees["params"].items()})}),
        lambda m: m.put(text={"params": ("float64",)}),
        lambda m: m.put(text={"params": ("int8", "int8")}),
        lambda m: m.put(numbers={"clients": -1.0}),
        lambda m: m.put(numbers={"num_examples": math.inf}),
        lambda m: m.put(numbers={"loss/sum": 1.0}),
    ],
)
def test_block_sum_when_malformed_is_refused(change):
    assert Sums.from_message(block_message()).clients == 3
    with pytest.raises(MalformedError, match="block sum"):
        Sums.from_message(change(block_message()))


# ---- what is accepted


def expected(message: Message) -> dict[str, Spec]:
    return {name: tree.spec for name, tree in message.trees.items()}


def test_update_when_it_fits_is_returned_itself():
    (a,) = random_updates(1)
    assert validate(a, expected(a), "north") is a
    zero = update(3, w=np.zeros(4, F4))
    assert validate(zero, expected(zero), "north") is zero


def test_update_when_only_the_order_differs_is_put_in_order():
    wanted = update(1, a=F4([1]), b=F4([2]))
    got = validate(update(1, b=F4([2]), a=F4([1])), expected(wanted), "north")
    assert got.trees["params"] == wanted.trees["params"]


def changed(**arrays) -> Message:
    return update(1, **{"w": np.zeros((2, 2), F4), "b": np.zeros(3, F4), **arrays})


def without(message: Message, name: str) -> Message:
    return Message({"params": message.trees["params"].without([name])}, message.numbers)


@pytest.mark.parametrize(
    ("bad", "where", "said"),
    [
        (Message(), "params", "missing"),
        (changed().put(trees={"more": Tree()}), "more", "not expected"),
        (without(changed(), "b"), "params/b", "missing"),
        (changed(c=F4([1])), "params/c", "not expected"),
        (changed(b=np.zeros(4, F4)), "params/b", r"float32\[4\], expected float32\[3\]"),
        (changed(b=np.zeros(3)), "params/b", r"float64\[3\], expected float32\[3\]"),
        (changed(w=np.zeros(4, F4)), "params/w", r"float32\[4\], expected float32\[2, 2\]"),
        (changed(w=F4([[0, 0], [np.nan, 0]])), "params/w", r"at \[1, 0\] is nan"),
        (changed(b=F4([0, 0, -np.inf])), "params/b", r"at \[2\] is -inf"),
        (changed(b=F4([0, 2e20, 0])), "params/b", r"at \[1\] is 2\.0.*e\+20; every value"),
    ],
)
def test_update_when_it_does_not_fit_is_refused_with_client_entry_and_reason(bad, where, said):
    with pytest.raises(RefusedError, match=said) as caught:
        validate(bad, expected(changed()), "north")
    assert (caught.value.client, caught.value.where) == ("north", where)


@pytest.mark.parametrize("n", [0.0, -3.0, math.nan, math.inf, 1e12, 2.5])
def test_claim_of_examples_when_absurd_is_refused(n):
    (a,) = random_updates(1)
    with pytest.raises(RefusedError, match=r"north: numbers/num_examples: is"):
        validate(a.put(numbers={"num_examples": n}), expected(a), "north")


def test_claim_of_examples_when_above_the_servers_limit_is_refused():
    (a,) = random_updates(1)
    with pytest.raises(RefusedError, match="whole number from 1 to 50"):
        validate(a.put(numbers={"num_examples": 51.0}), expected(a), "north", UpdatePolicy(max_num_examples=50))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30])
def test_numbers_when_not_finite_or_absurd_are_refused(value):
    (a,) = random_updates(1)
    with pytest.raises(RefusedError, match="numbers/loss"):
        validate(a.put(numbers={"loss": value}), expected(a), "north")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 100, 20_000, 300_000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 101.0, -101.0])
def test_bad_value_when_anywhere_in_any_size_is_found(dtype, size, bad):
    policy = UpdatePolicy(max_abs=100.0)
    w = np.ones(size, dtype)
    w[-1] = 100.0
    good = update(1, w=w)
    assert validate(good, expected(good), "north", policy) is good
    w[size // 2] = bad
    with pytest.raises(RefusedError, match=rf"at \[{size // 2}\] is"):
        validate(update(1, w=w), expected(good), "north", policy)


def test_bad_value_when_the_entry_is_a_scalar_is_named():
    good = update(1, w=F4(1.0))
    with pytest.raises(RefusedError, match=r"params/w: value is nan"):
        validate(update(1, w=F4(np.nan)), expected(good), "north")


@pytest.mark.parametrize(
    ("dtype", "bits", "pattern"), [("f2", "u2", 0x7C01), ("f4", "u4", 0x7F800001), ("f8", "u8", 0x7FF0000000000001)]
)
def test_signalling_nan_when_uploaded_is_refused_without_a_warning(dtype, bits, pattern):
    w = np.ones(3, dtype)
    good = update(1, w=w)
    w.view(bits)[1] = pattern
    with pytest.raises(RefusedError, match=r"at \[1\] is nan"):
        validate(update(1, w=w), expected(good), "north")


def test_limits_when_beyond_the_range_of_the_dtype_are_no_limit():
    policy = UpdatePolicy(max_abs=1e300, max_num_examples=1e300)
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        good = Message({"p": Tree({"w": np.ones(2, dtype)}), "p#": Tree({"w": np.ones(2, np.float16)})})
        assert validate(good, expected(good), "north", policy) is good
        with pytest.raises(RefusedError, match="is inf"):
            validate(good.put(trees={"p": Tree({"w": np.array([1, np.inf], dtype)})}), expected(good), "north", policy)


@pytest.mark.parametrize("count", [F4([1, -1]), F4([1, np.nan]), F4([1, 2e9])])
def test_counts_when_absurd_are_refused(count):
    good = counted(1, F4([1, 2]), F4([0, 3]))
    assert validate(good, expected(good), "north") is good
    with pytest.raises(RefusedError, match=r"p#/w: count at \[1\] is"):
        validate(counted(1, F4([1, 2]), count), expected(good), "north")


def test_default_limits_when_a_million_clients_use_them_cannot_overflow():
    policy = UpdatePolicy()
    assert policy.max_abs * policy.max_num_examples * 1e6 < np.finfo(F4).max


@pytest.mark.parametrize(
    "fields", [{"max_share": 0.0}, {"max_share": 1.5}, {"max_abs": math.inf}, {"max_number": -1.0}]
)
def test_policy_when_a_limit_makes_no_sense_is_refused(fields):
    with pytest.raises(UsageError, match=next(iter(fields))):
        UpdatePolicy(**fields)


def test_weights_when_a_number_is_missing_or_gives_nonsense_are_refused():
    a = counted(4, F4([1]), F4([1]))
    assert weights_of(a, by_examples(a), "north") == {"p": 4.0}
    with pytest.raises(RefusedError, match="north: numbers/num_examples: is missing"):
        weights_of(a, lambda _: {}["num_examples"], "north")
    for value in (0.0, math.nan, math.inf, -1.0):
        with pytest.raises(RefusedError, match="north: p: would weigh"):
            weights_of(a, lambda _, v=value: v, "north")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=12), st.floats(0.05, 1.0))
def test_capped_when_applied_leaves_no_share_above_the_cap(weights, share):
    got = capped(weights, share)
    limit = max(share, 1 / len(weights))
    assert max(got) <= limit * sum(got) * (1 + 1e-9)
    assert all(0 < new <= old for new, old in zip(got, weights, strict=True))
    if max(weights) <= share * sum(weights):
        assert got == weights
    elif share * len(weights) > 1 + 1e-9:  # cut no further than needed: the largest has its full share
        assert max(got) >= limit * sum(got) * (1 - 1e-6)


def test_client_that_claims_a_billion_rows_when_capped_moves_no_more_than_its_share():
    claims = [100.0] * 9 + [1e9]
    fold = Fold()
    for position, weight in enumerate(capped(claims, 0.2)):
        fold.add(position, update(1, w=F4([1.0 if position == 9 else 0.0])), lambda _, w=weight: w)
    assert fold.finish().mean("params")["w"][0] == pytest.approx(0.2)
    assert capped(claims, None) == claims
    assert capped([], 0.5) == []


# ---- statistics (invariant 59)


def layer(mean: np.ndarray, variance: np.ndarray) -> Tree:
    return Tree({"stats:bn/mean": mean.astype(F4), "stats:bn/variance": variance.astype(F4)})


def test_statistics_when_merged_equal_those_of_all_rows_pooled():
    rng = np.random.default_rng(5)
    sites = [rng.normal(loc, scale, (n, 4)) for loc, scale, n in ((0, 1, 50), (30, 2, 200), (-5, 0.1, 30))]
    start = layer(rng.standard_normal(4), np.ones(4))
    fold = Fold()
    for position, rows in enumerate(sites):
        stats = layer(rows.mean(axis=0), rows.var(axis=0))
        fold.add(position, Message({"stats": moments_of(stats, start)}), lambda _, rows=rows: float(len(rows)))
    got, rows = stats_of(fold.finish().mean("stats"), start), np.concatenate(sites)
    assert got.spec == start.spec
    assert np.allclose(got["stats:bn/mean"], rows.mean(axis=0), rtol=1e-5)
    assert np.allclose(got["stats:bn/variance"], rows.var(axis=0), rtol=1e-5)


def test_variances_when_merely_averaged_miss_the_spread_between_sites():
    """The control of the test above."""
    start = layer(np.zeros(1), np.ones(1))
    moments = [moments_of(layer(np.array([m]), np.array([1.0])), start) for m in (-3.0, 3.0)]
    got = stats_of((moments[0] + moments[1]) * 0.5, start)
    assert (got["stats:bn/mean"][0], got["stats:bn/variance"][0]) == (0.0, 10.0)


def test_variance_when_rounding_would_make_it_negative_is_zero():
    start = layer(np.zeros(1), np.ones(1))
    assert stats_of(layer(np.array([1.0]), np.array([0.5])), start)["stats:bn/variance"][0] == 0.0


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"w": F4([1])}, "w"),
        ({"stats:bn/mean": F4([1])}, "stats:bn/mean"),
        ({"stats:bn/variance": F4([1])}, "stats:bn/variance"),
        ({"stats:bn/count": F4([1])}, "stats:bn/count"),
        ({"stats:bn/mean": np.ones(1, np.int64), "stats:bn/variance": np.ones(1, np.int64)}, "stats:bn/mean"),
        ({"stats:bn/mean": F4([1, 2]), "stats:bn/variance": F4([1])}, "stats:bn/mean"),
    ],
)
def test_statistics_when_of_another_kind_are_refused_by_name(arrays, named):
    tree = Tree(arrays)
    with pytest.raises(SpecError, match=named):
        moments_of(tree, tree)


def test_statistics_when_the_start_has_another_spec_are_refused():
    with pytest.raises(SpecError, match="statistics"):
        moments_of(layer(np.zeros(2), np.ones(2)), layer(np.zeros(1), np.ones(1)))


def test_statistics_of_one_client_far_from_its_start_come_back_whole_in_float32():
    """The moments are float64: at a mean of 1e6 float32 has nothing left of a variance of 700."""
    start = Tree({"stats:bn/mean": np.zeros(1, np.float32), "stats:bn/variance": np.ones(1, np.float32)})
    own = Tree({"stats:bn/mean": np.full(1, 1e6, np.float32), "stats:bn/variance": np.full(1, 700, np.float32)})
    merged = stats_of(moments_of(own, start), start)
    assert merged["stats:bn/variance"][0] == pytest.approx(700, rel=1e-5)
    assert merged.spec == start.spec
