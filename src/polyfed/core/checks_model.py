"""The contract of a model adapter as checks that anybody can run over their own.

`check_model` runs every check that applies to what the model offers; each states one promise, takes a model with some
labelled rows and an env, returns nothing, and raises `AssertionError` with a sentence when the promise is broken.

    def test_my_adapter():
        check_model(MyModel(net), rows, env)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from polyfed.core.algorithm import Env, Fit, Fitted, Predict
from polyfed.core.protocols import Model
from polyfed.core.rows import Rows
from polyfed.core.terms import Distill, Match, Near, Own, Term
from polyfed.core.tree import FLOATS, Array, Tree, is_under, part_of

Call = Callable[[object, Rows], Array]
WORDS = frozenset({"params", "predict", "features", "terms", "distill", "part", "sgd", "iterates"})


@dataclass(frozen=True, eq=False)
class Case:
    """What every check is given.

    Attributes:
        model: the adapter under test.
        rows: labelled rows; a check works on copies of them.
        env: whose problem the rows answer.
        call: how an exported object predicts: (object, rows) -> (n, outputs); None leaves that check out.
    """

    model: Model
    rows: Rows
    env: Env
    call: Call | None = None

    def fit(self, request: Fit | None = None, env: Env | None = None) -> Fitted:
        return self.model.fit(request or Fit(), fresh(self.rows), env or self.env)

    def predict(self, *start: Tree, rows: Rows | None = None) -> Array:
        return self.model.predict(Predict(start=start), fresh(self.rows) if rows is None else rows, self.env)

    def offers(self, *words: str) -> bool:
        return self.model.offers.issuperset(words)


Check = Callable[[Case], None]


def check_model(model: Model, rows: Rows, env: Env, *, call: Call | None = None) -> None:
    """Runs every check of `MODEL_CHECKS` over a model; those of words it does not offer find nothing to do.

    Args:
        model: the adapter to check.
        rows: at least 8 labelled rows that it can learn from.
        env: holds the problem that the rows answer.
        call: how an object that `export` returned predicts, (object, rows) -> (n, outputs); None leaves that out.

    Raises:
        AssertionError: a promise does not hold; the sentence says which.
    """
    case = Case(model, rows, env, call)
    for check in MODEL_CHECKS.values():
        check(case)


def fresh(rows: Rows) -> Rows:
    """The same rows in new, read-only arrays with an empty cache."""
    target = None if rows.target is None else _locked(rows.target.copy())
    return Rows({name: _locked(array.copy()) for name, array in rows.inputs.items()}, target)


def shifted(rows: Rows) -> Rows:
    """The same rows in arrays that start off every boundary wider than one element."""
    return Rows({name: _locked(_misaligned(array)) for name, array in rows.inputs.items()}, rows.target)


def nudged(tree: Tree, scale: float = 0.05) -> Tree:
    """The tree with every floating parameter moved by a fixed pattern."""
    moved = {}
    for name, array in tree.items():
        if part_of(name) == "params" and tree.spec[name].dtype in FLOATS:
            pattern = np.cos(np.arange(array.size, dtype=np.float64)).reshape(array.shape) * scale
            moved[name] = (array.astype(np.float64) + pattern).astype(array.dtype)
        else:
            moved[name] = array
    return Tree(moved)


def has_known_words(case: Case) -> None:
    """A model says what it is, and offers only words that algorithms can ask for."""
    assert case.model.kind, "kind is empty: messages to people name the model by it"
    unknown = case.model.offers - WORDS
    assert not unknown, f"offers {sorted(unknown)}, words that no algorithm knows"
    assert hash(case.model.key) == hash(case.model.key), "key must be hashable"
    settings: dict[str, object] = dict(case.model.settings)
    wrong = {name: value for name, value in settings.items() if not isinstance(value, (str, int, float))}
    assert not wrong, f"settings hold {wrong}: the report takes short texts and numbers"


def first_is_a_function(case: Case) -> None:
    """The first state depends on rows and env alone, not on what the model did before nor on the client's name."""
    before = case.model.first(fresh(case.rows), case.env)
    case.fit()
    _same(before, case.model.first(fresh(case.rows), case.env), "first gives another state after a fit")


def fit_is_a_function(case: Case) -> None:
    """The same request, rows and env give the same bits, whatever ran in between."""
    one = case.fit()
    kept = one.state.digest
    case.fit(env=replace(case.env, number=case.env.number + 7))
    assert one.state.digest == kept, "a state that fit returned changed when the model was used again"
    if case.offers("predict"):
        case.predict(one.state)
    two = case.fit()
    _same(one.state, two.state, "the same fit gives another state the second time")
    assert (one.steps, one.lr, dict(one.metrics)) == (two.steps, two.lr, dict(two.metrics)), (
        f"the same fit reports {one.steps, one.lr, one.metrics} first and {two.steps, two.lr, two.metrics} then"
    )


def states_keep_their_spec(case: Case) -> None:
    """A model that offers params returns every state in the names, order, shapes and dtypes of its first state."""
    first, after = case.model.first(fresh(case.rows), case.env), case.fit().state
    if case.offers("params"):
        assert first.spec == after.spec, f"fit returned another spec: {after.spec.difference(first.spec)}"
        assert after.is_finite(), "one fit of the given rows left parameters that are not finite"
        assert after.part("params") != first.part("params"), "a fit left every parameter where it was"


def start_is_laid_over(case: Case) -> None:
    """Trees of start lie over the first state in their order; entries they do not hold stay the first state's."""
    if not case.offers("params", "predict"):
        return
    first = case.model.first(fresh(case.rows), case.env)
    moved = nudged(first)
    half = moved.only(list(moved)[: max(1, len(moved) // 2)])
    _equal(case.predict(), case.predict(first), "no start must mean the first state")
    _differ(case.predict(moved), case.predict(first), "a start that holds other parameters changes no prediction")
    _equal(case.predict(half), case.predict(first.overlay(half)), "a start of some entries must leave the others alone")
    _equal(case.predict(moved, first), case.predict(first), "the last tree of start must win")
    _same(
        case.fit(Fit(start=(half,))).state,
        case.fit(Fit(start=(first.overlay(half),))).state,
        "fit lays start over in another way than predict",
    )


def no_work_changes_nothing(case: Case) -> None:
    """A fit of no epochs returns the state that it started from, bit for bit, and no steps."""
    if not case.offers("params", "terms"):
        return
    start = nudged(case.model.first(fresh(case.rows), case.env))
    fitted = case.fit(Fit(start=(start,), epochs=0))
    _same(start, fitted.state, "a fit of no epochs changed the state")
    assert fitted.steps == 0, f"a fit of no epochs reports {fitted.steps} steps"


def budget_counts_steps(case: Case) -> None:
    """A budget of steps is kept exactly, also over the end of the rows, and two epochs are twice one."""
    if not case.offers("terms"):
        return
    one, two = (case.fit(Fit(epochs=epochs)).steps for epochs in (1, 2))
    assert two == 2 * one, f"one epoch is {one} steps, two are {two}"
    for steps in (1, one + 1):
        done = case.fit(Fit(steps=steps)).steps
        assert done == steps, f"a budget of {steps} steps did {done}"


def part_moves_only_itself(case: Case) -> None:
    """Training a part leaves every other entry of the state, statistics included, bit for bit."""
    if not case.offers("params", "part"):
        return
    first = case.model.first(fresh(case.rows), case.env)
    for prefix in _prefixes(first):
        after = case.fit(Fit(part=(prefix,))).state
        moved = [name for name in first if not np.array_equal(_bits(first[name]), _bits(after[name]))]
        outside = [name for name in moved if not is_under(name, (prefix,))]
        assert not outside, f"training the part {prefix!r} moved {outside[:3]}"
        assert moved, f"training the part {prefix!r} moved nothing"


def global_generators_stay(case: Case) -> None:
    """Generators that the process keeps globally are as they were before, after every call; and they decide nothing."""
    before = _generators()
    state = case.fit().state
    changed = [name for name, value in _generators().items() if value != before.get(name, value)]
    assert not changed, f"fit left the global generator of {changed} changed"
    if case.offers("predict"):
        case.predict(state)
    case.model.first(fresh(case.rows), case.env)
    changed = [name for name, value in _generators().items() if value != before.get(name, value)]
    assert not changed, f"predict or first left the global generator of {changed} changed"
    _stir()
    _same(state, case.fit().state, "a fit depends on a global generator")


def inputs_are_untouched(case: Case) -> None:
    """Rows and trees that come in are read, never written or kept as views."""
    rows = fresh(case.rows)
    first = case.model.first(rows, case.env)
    kept = {name: array.copy() for name, array in rows.inputs.items()}, first.digest
    fitted = case.model.fit(Fit(start=(first,)), rows, case.env)
    if case.offers("predict"):
        case.model.predict(Predict(start=(fitted.state,)), rows, case.env)
    assert first.digest == kept[1], "fit wrote into a tree of its request"
    for name, array in rows.inputs.items():
        assert np.array_equal(_bits(array), _bits(kept[0][name])), f"the input {name!r} was written to"
        assert not array.flags.writeable, f"the input {name!r} was made writable"


def alignment_decides_no_bits(case: Case) -> None:
    """Where in memory the rows lie does not change a bit of what is learnt or predicted from them."""
    even, odd = (case.model.fit(Fit(), rows, case.env).state for rows in (fresh(case.rows), shifted(case.rows)))
    _same(even, odd, "rows at an odd address train another state")
    if case.offers("predict"):
        odd_rows = case.predict(even, rows=shifted(case.rows))
        _equal(case.predict(even), odd_rows, "rows at an odd address predict otherwise")


def predict_is_a_function(case: Case) -> None:
    """Predictions are (n, outputs) float32, finite, and depend on start and a row alone: no labels, no history."""
    if not case.offers("predict"):
        return
    state = case.fit().state
    one = case.predict(state)
    wanted = (len(case.rows), case.env.problem.outputs)
    assert one.shape == wanted, f"predict gives shape {one.shape}, expected {wanted}"
    assert one.dtype == np.float32, f"predict gives {one.dtype}, expected float32"
    assert np.isfinite(one).all(), "predict gives values that are not finite"
    case.fit(env=replace(case.env, number=case.env.number + 3))
    _equal(one, case.predict(state), "the same predict gives other bits after a fit")
    _equal(one, case.predict(state, rows=fresh(case.rows).unlabelled()), "predict reads the labels")
    half = len(case.rows) // 2
    alone = case.predict(state, rows=fresh(case.rows.take(np.arange(half))))
    gap = float(np.abs(alone - one[:half]).max())
    assert gap <= 1e-4 * max(1.0, float(np.abs(one).max())), (
        f"a row's prediction moves by {gap:.3g} with its neighbours"
    )
    reused = fresh(case.rows)
    _equal(case.predict(state, rows=reused), case.predict(state, rows=reused), "rows used again predict otherwise")


def features_are_rows(case: Case) -> None:
    """Features are (n, width) float32, the same each time."""
    if not case.offers("features"):
        return
    asked = Predict(what="features")
    one, two = (case.model.predict(asked, fresh(case.rows), case.env) for _ in range(2))
    assert one.ndim == 2, f"features have shape {one.shape}, expected (n, width)"
    assert len(one) == len(case.rows), f"{len(one)} features for {len(case.rows)} rows"
    assert one.dtype == np.float32, f"features are {one.dtype}, expected float32"
    _equal(one, two, "the same features have other bits the second time")


def weightless_terms_change_nothing(case: Case) -> None:
    """A term of weight 0 beside the own loss leaves the same state as the own loss alone."""
    if not case.offers("params", "terms"):
        return
    anchor = nudged(case.model.first(fresh(case.rows), case.env)).part("params")
    plain = case.fit().state
    near = case.fit(Fit(terms=(Own(), Near(0.0)), tensors={"anchor": anchor})).state
    _same(plain, near, "Near(0) changes what is learnt")
    teacher = {"teacher": _teacher(case)}
    still = case.fit(Fit(terms=(Own(), _follow(case, 0.0)), targets=teacher)).state
    _same(plain, still, "a teacher of weight 0 changes what is learnt")


def near_pulls(case: Case) -> None:
    """The proximal term of FedProx holds the parameters nearer to its anchor than training without it."""
    if not case.offers("params", "terms"):
        return
    first = case.model.first(fresh(case.rows), case.env)
    anchor = first.part("params")
    strength = 0.5 / rate if (rate := case.fit().lr) else 10.0  # of plain SGD: half of the way back in one step
    plain, held = (
        case.fit(Fit(terms=terms, tensors={"anchor": anchor}, epochs=5)).state.part("params")
        for terms in ((Own(),), (Own(), Near(strength)))
    )
    gaps = [_gap(tree, anchor) for tree in (plain, held)]
    assert gaps[1] < gaps[0], (
        f"Near leaves the parameters {gaps[1]:.3g} from the anchor, training without it {gaps[0]:.3g}"
    )


def teachers_are_followed(case: Case) -> None:
    """A fit on unlabelled rows with a teacher is repeatable, and a model of terms comes nearer to that teacher."""
    if not case.offers("distill", "predict"):
        return
    teacher = _teacher(case)
    start = case.fit().state
    asked = Fit(
        start=(start,),
        terms=(_follow(case, 1.0),),
        targets={"teacher": teacher},
        rows=fresh(case.rows).unlabelled(),
        epochs=20,
    )
    one, two = (case.model.fit(asked, _own(asked, case), case.env).state for _ in range(2))
    _same(one, two, "the same distillation gives another state the second time")
    if case.offers("terms"):
        before, after = (_distance(case, case.predict(state), teacher) for state in (start, one))
        assert after < before, f"twenty epochs towards a teacher ended {after:.4g} away from it, after {before:.4g}"


def exports_predict_alike(case: Case) -> None:
    """The exported object holds the state, belongs to the caller, and predicts as the model does."""
    state = case.fit().state
    exported = case.model.export(state, fresh(case.rows), case.env)
    assert exported is not case.model, "export returned the adapter itself"
    assert exported is not case.model.export(state, fresh(case.rows), case.env), "two exports are one object"
    case.fit(env=replace(case.env, number=case.env.number + 5))
    if case.call is not None and case.offers("predict"):
        expected, got = case.predict(state), np.asarray(case.call(exported, fresh(case.rows)))
        gap = float(np.abs(expected - got).max())
        assert gap <= 1e-4 * max(1.0, float(np.abs(expected).max())), f"the exported object predicts {gap:.3g} away"


#: Every check, by the name of its promise: a test that is parametrised over it reports each on a line of its own.
MODEL_CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        has_known_words,
        first_is_a_function,
        fit_is_a_function,
        states_keep_their_spec,
        start_is_laid_over,
        no_work_changes_nothing,
        budget_counts_steps,
        part_moves_only_itself,
        global_generators_stay,
        inputs_are_untouched,
        alignment_decides_no_bits,
        predict_is_a_function,
        features_are_rows,
        weightless_terms_change_nothing,
        near_pulls,
        teachers_are_followed,
        exports_predict_alike,
    )
}


def _locked(array: Array) -> Array:
    array.flags.writeable = False
    return array


def _misaligned(array: Array) -> Array:
    raw = np.empty(array.nbytes + 64 + array.itemsize, np.uint8)
    start = -raw.ctypes.data % 64 + array.itemsize
    out = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _same(one: Tree, two: Tree, complaint: str) -> None:
    if one != two:
        differing = [n for n in one if n not in two or not np.array_equal(_bits(one[n]), _bits(two[n]))]
        raise AssertionError(f"{complaint}: {', '.join(differing[:3]) or one.spec.difference(two.spec)}")


def _equal(one: Array, two: Array, complaint: str) -> None:
    if one.shape != two.shape or not np.array_equal(_bits(one), _bits(two)):
        gap = float(np.abs(one - two).max()) if one.shape == two.shape else float("nan")
        raise AssertionError(f"{complaint}: shapes {one.shape} and {two.shape}, largest difference {gap:.3g}")


def _differ(one: Array, two: Array, complaint: str) -> None:
    assert one.shape != two.shape or not np.array_equal(_bits(one), _bits(two)), complaint


def _gap(one: Tree, two: Tree) -> float:
    return float(sum(np.sum((one[name].astype(np.float64) - two[name].astype(np.float64)) ** 2) for name in one))


def _prefixes(first: Tree) -> list[str]:
    """The first and the last of the prefixes that parameters of a model fall under, if there are several."""
    names = list(dict.fromkeys(name.replace("/", ".").partition(".")[0] for name in first.part("params")))
    return [names[0], names[-1]] if len(names) > 1 else []


def _own(request: Fit, case: Case) -> Rows:
    return fresh(case.rows) if request.rows is None else request.rows


def _follow(case: Case, weight: float) -> Term:
    return Distill(temperature=2.0, weight=weight) if case.env.problem.is_classification else Match(weight)


def _teacher(case: Case) -> Array:
    """A fixed teacher for the rows: sure of the next class, or values beside the targets."""
    rows, problem = case.rows, case.env.problem
    assert rows.target is not None, "checks need labelled rows"
    if not problem.is_classification:
        return np.asarray(rows.target, np.float32).reshape(len(rows), problem.outputs) + np.float32(0.5)
    soft = np.full((len(rows), problem.outputs), 0.1 / problem.outputs, np.float32)
    soft[np.arange(len(rows)), (rows.target + 1) % problem.outputs] += np.float32(0.9)
    return soft


def _distance(case: Case, outputs: Array, teacher: Array) -> float:
    """How far predictions are from a teacher, in the measure of the term that follows it."""
    if not case.env.problem.is_classification:
        return float(np.mean((outputs - teacher) ** 2))
    z = outputs.astype(np.float64) / 2.0
    z -= z.max(1, keepdims=True)
    return float(-np.mean(np.sum(teacher * (z - np.log(np.exp(z).sum(1, keepdims=True))), 1)))


def _generators() -> dict[str, object]:
    """The state of each global generator of a library that this process has loaded."""
    state = np.random.get_state(legacy=False)  # noqa: NPY002  # the global generator is what is being watched
    found: dict[str, object] = {"numpy": repr(state)}
    if (standard := sys.modules.get("random")) is not None:
        found["random"] = standard.getstate()
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "get_rng_state"):
        found["torch"] = torch.get_rng_state().numpy().tobytes()
    return found


def _stir() -> None:
    """Moves every global generator on, as a user's own program would."""
    np.random.random(3)  # noqa: NPY002  # see above
    if (standard := sys.modules.get("random")) is not None:
        standard.random()
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "get_rng_state"):
        torch.rand(3)
