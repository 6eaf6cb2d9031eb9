"""The Keras adapter on the torch backend; `test_keras_tensorflow.py` runs the same file on the other one."""

import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
from keras import layers

from polyfed.core.algorithm import Env, Fit, Predict
from polyfed.core.checks_model import MODEL_CHECKS, Case, nudged
from polyfed.core.errors import CorruptError, DataError, SpecError, UsageError
from polyfed.core.rows import Problem, Rows
from polyfed.core.terms import Distill, Near, Own
from polyfed.core.tree import Tree
from polyfed.models.keras import KerasModel, from_file, to_file
from polyfed.models.keras import keras as pf_keras
from polyfed.models.keras_backend import as_numpy

THREE = Problem(("a", "b", "c"), 3)
TWO = Problem(("no", "yes"), 2)
VALUE = Problem(None, 1)


def rows_for(problem, n=40, seed=0, width=6):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)).astype(np.float32)
    if problem is VALUE:
        return Rows({"x": x}, (x[:, 0] * 2 + 1).astype(np.float32))
    return Rows({"x": x}, x[:, : problem.outputs].argmax(1).astype(np.int64))


def env_for(problem, **changes):
    return replace(Env(seed=3, problem=problem, client="north"), **changes)


def plain(classes=3, end=None):
    return keras.Sequential([layers.Dense(8, activation="tanh"), layers.Dense(classes, activation=end)])


def functional():
    """BatchNormalization, Dropout and a softmax."""
    inputs = keras.Input((6,))
    hidden = layers.BatchNormalization()(layers.Dense(8, activation="tanh")(inputs))
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Dropout(0.3)(hidden)))


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.base = keras.Sequential([layers.Dense(8, activation="relu"), layers.Dropout(0.2, seed=7)])
        self.head = layers.Dense(3)

    def call(self, x, training=False):
        return self.head(self.base(x, training=training))


class Wide(keras.Model):
    """Keras's automatic configuration of it says width 8, whatever it was made with."""

    def __init__(self, width=8):
        super().__init__()
        self.head = layers.Dense(width)

    def call(self, x):
        return self.head(x)


def compiled():
    model = functional()
    model.compile(keras.optimizers.Adam(0.01), "categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.fixture(autouse=True)
def drawn_from_a_seed():
    """A model that a test builds outside of a factory has its weights from Keras's global seed."""
    keras.utils.set_random_seed(11)


@pytest.fixture
def three():
    return rows_for(THREE), env_for(THREE)


def quietly(function):
    """What Keras does itself may warn: it reads its variables in a way that numpy 2 has deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return function()


def weights_of(model):
    return quietly(model.get_weights)


def log_predictions(model, rows):
    return np.log(quietly(lambda: model.predict(rows.x, verbose=0)))


def predictions(model, rows):
    return quietly(lambda: model.predict(rows.x, verbose=0))


MODELS = {
    "sequential without Input": (lambda: pf_keras(plain(), lr=0.1), THREE, predictions),
    "functional, BatchNormalization, Dropout": (lambda: pf_keras(functional(), lr=0.1), THREE, log_predictions),
    "subclassed by factory": (lambda: pf_keras(Net, lr=0.1), THREE, predictions),
    "compiled with Adam": (lambda: pf_keras(compiled()), THREE, log_predictions),
    "one sigmoid": (lambda: pf_keras(plain(1, "sigmoid"), lr=0.1), TWO, None),
    "regression": (lambda: pf_keras(plain(1), lr=0.05), VALUE, predictions),
}
CASES = {}


def case_of(name):
    keras.utils.set_random_seed(11)
    if name not in CASES:
        make, problem, call = MODELS[name]
        CASES[name] = Case(make(), rows_for(problem), env_for(problem), call)
    return CASES[name]


@pytest.mark.parametrize("check", MODEL_CHECKS)
@pytest.mark.parametrize("name", MODELS)
def test_contract(name, check):
    MODEL_CHECKS[check](case_of(name))


# ------------------------------------------------------------------------------------------------ Keras's own training


def twin(model, rows, env, **options):
    """The state after plain `Model.fit` from the adapter's first state, without shuffling."""
    adapter = pf_keras(model, shuffle=False, epochs=3, batch_size=16, **options)
    own = adapter.export(adapter.first(rows, env), rows, env)
    return adapter, own


@pytest.mark.parametrize(
    ("optimizer", "loss"),
    [
        (lambda: keras.optimizers.SGD(0.1), lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
        (lambda: keras.optimizers.Adam(0.02), lambda: keras.losses.CategoricalCrossentropy(from_logits=True)),
        (lambda: keras.optimizers.SGD(0.1, momentum=0.9), lambda: "mse"),
    ],
)
def test_fit_of_a_compiled_model_equals_keras_fit(three, optimizer, loss):
    rows, env = three
    model = plain()
    model.compile(optimizer(), loss(), metrics=["accuracy"])
    adapter, own = twin(model, rows, env)
    sparse = "sparse" in getattr(own.loss, "name", own.loss)
    y = rows.target if sparse else np.eye(3, dtype=np.float32)[rows.target]
    history = quietly(lambda: own.fit(rows.x, y, batch_size=16, epochs=3, shuffle=False, verbose=0))
    fitted = adapter.fit(Fit(), rows, env)
    for mine, theirs in zip(fitted.state.values(), weights_of(own), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)
    assert fitted.steps == 9
    for name in ("loss", "accuracy"):
        assert fitted.metrics[name] == pytest.approx(history.history[name][-1], abs=1e-5)


def test_fit_with_weights_equals_keras_fit(three):
    rows, env = three
    model = plain()
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    weights = np.linspace(0.2, 2.0, len(rows)).astype(np.float32)
    adapter, own = twin(model, rows, env, sample_weight=weights)
    quietly(
        lambda: own.fit(rows.x, rows.target, batch_size=16, epochs=3, shuffle=False, sample_weight=weights, verbose=0)
    )
    state = adapter.fit(Fit(), rows, env).state
    for mine, theirs in zip(state.values(), weights_of(own), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)
    other = pf_keras(model, shuffle=False, epochs=3, batch_size=16, class_weight={0: 5.0, 1: 1.0})
    again = other.export(other.first(rows, env), rows, env)
    again.set_weights(list(adapter.first(rows, env).values()))
    quietly(
        lambda: again.fit(
            rows.x,
            rows.target,
            batch_size=16,
            epochs=3,
            shuffle=False,
            class_weight={0: 5.0, 1: 1.0, 2: 1.0},
            verbose=0,
        )
    )
    state = other.fit(Fit(start=(adapter.first(rows, env),)), rows, env).state
    for mine, theirs in zip(state.values(), weights_of(again), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


def test_optimizer_state_is_fresh_in_each_fit(three):
    rows, env = three
    adapter = pf_keras(compiled(), shuffle=False)
    first = adapter.fit(Fit(), rows, env).state
    adapter.fit(Fit(steps=7), rows, env)
    assert adapter.fit(Fit(), rows, env).state == first


def test_a_compiled_model_keeps_optimizer_loss_and_metrics(three):
    rows, env = three
    adapter = pf_keras(compiled())
    assert adapter.settings["optimizer"] == "Adam"
    assert adapter.settings["loss"] == "categorical_crossentropy"
    assert adapter.settings["lr"] == 0.01
    assert "sgd" not in adapter.offers
    fitted = adapter.fit(Fit(), rows, env)
    assert set(fitted.metrics) == {"loss", "accuracy"}
    assert fitted.lr == pytest.approx(0.01)
    exported = adapter.export(fitted.state, rows, env)
    assert exported.compiled
    assert type(exported.optimizer).__name__ == "Adam"


def test_sgd_is_offered_only_when_plain():
    assert "sgd" in pf_keras(plain()).offers
    assert "sgd" not in pf_keras(plain(), optimizer=keras.optimizers.SGD(0.1, momentum=0.5)).offers
    assert "sgd" not in pf_keras(plain(), optimizer="adam").offers
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    assert "sgd" not in pf_keras(plain(), optimizer=keras.optimizers.SGD(decay)).offers


def test_the_users_own_train_step_and_callbacks_still_run(three):
    rows, env = three
    seen = []

    class Own(Net):
        def train_step(self, *given):
            *state, (x, y, weight) = given  # on jax, Keras hands the state over before the data
            seen.append(tuple(y.shape))
            return super().train_step(*state, (x, y, weight))

    class Counts(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((epoch, sorted(logs)))

    adapter = pf_keras(Own, lr=0.1, batch_size=40, epochs=2, callbacks=[Counts()])
    adapter.fit(Fit(terms=(Own_(), Near(0.1)), tensors={"anchor": adapter.first(rows, env)}), rows, env)
    assert (0, ["loss"]) in seen
    assert (1, ["loss"]) in seen
    assert (40,) in seen


Own_ = Own  # the class inside the test above has that name too


def test_a_train_step_without_compute_loss_is_refused(three):
    rows, env = three

    class Deaf(Net):
        def train_step(self, *given):
            *state, data = given
            logs = {"loss": keras.ops.mean(self(data[0]))}
            return (logs, *state) if state else logs

    with pytest.raises(UsageError, match=r"north: Deaf\.train_step does not call self\.compute_loss"):
        pf_keras(Deaf).fit(Fit(), rows, env)


def test_a_loop_of_ones_own_trains_with_the_terms(three):
    rows, env = three

    def train(training):
        for batch in training.batches():
            training.step(batch)

    adapter = pf_keras(plain(), lr=0.1, epochs=2)
    mine = KerasModel(adapter.source, replace(adapter.options, train=train))
    assert mine.fit(Fit(), rows, env).state == adapter.fit(Fit(), rows, env).state
    short = mine.fit(Fit(steps=3), rows, env)
    assert short.steps == 3
    assert mine.fit(Fit(steps=3), rows, env).metrics == short.metrics, "Keras's metrics must start anew in each fit"
    assert "sgd" not in mine.offers


def test_a_loop_of_ones_own_sees_the_model_that_each_step_made(three):
    rows, env = three
    seen = []

    def train(training):
        for batch in training.batches():
            training.step(batch)
            seen.append(float(np.abs(np.asarray(quietly(training.model.get_weights)[0])).sum()))

    state = pf_keras(plain(), lr=0.1, epochs=2, train=train).fit(Fit(), rows, env).state
    assert len(set(seen)) == len(seen) == 4
    assert seen[-1] == float(np.abs(state["dense/kernel"]).sum())


def test_the_loss_of_a_loop_of_ones_own_is_the_sum_of_the_terms(three):
    rows, env = three
    losses = []

    def train(training):
        for batch in training.batches():
            losses.append(float(as_numpy(training.loss(batch))))

    mine, plainly = pf_keras(plain(), lr=0.1, train=train, shuffle=False), pf_keras(plain(), lr=0.1, shuffle=False)
    asked = Fit(terms=(Own(), Near(2.0)), tensors={"anchor": nudged(mine.first(rows, env))}, steps=1)
    if keras.backend.backend() == "jax":
        with pytest.raises(UsageError, match=r"north: jax .* call training\.step\(batch\)"):
            mine.fit(asked, rows, env)
        return
    mine.fit(asked, rows, env)
    assert losses == [pytest.approx(plainly.fit(asked, rows, env).metrics["loss"], rel=1e-6)]


# ------------------------------------------------------------------------------------------------ terms


def gap(one, two):
    return sum(float(((one[name] - two[name]) ** 2).sum()) for name in one)


@pytest.mark.parametrize("name", ["sequential without Input", "subclassed by factory"])
def test_near_moves_towards_its_anchor_and_two_anchors_differ(name):
    case = case_of(name)
    first = case.model.first(case.rows, case.env).part("params")
    anchors = [Tree({n: a + shift for n, a in first.items()}) for shift in (np.float32(1), np.float32(-1))]
    states = [
        case.model.fit(Fit(terms=(Near(1.0),), tensors={"anchor": anchor}, epochs=4), case.rows, case.env).state
        for anchor in anchors
    ]
    for anchor, state in zip(anchors, states, strict=True):
        assert gap(state.part("params"), anchor) < 0.5 * gap(first, anchor)
    assert gap(states[0].part("params"), states[1].part("params")) > 1.0


@pytest.mark.parametrize("name", ["sequential without Input", "functional, BatchNormalization, Dropout"])
def test_distillation_follows_each_of_two_teachers(name):
    case = case_of(name)
    for wanted in (0, 2):
        teacher = np.full((len(case.rows), 3), 0.05, np.float32)
        teacher[:, wanted] = 0.9
        asked = Fit(terms=(Distill(2.0),), targets={"teacher": teacher}, rows=case.rows.unlabelled(), epochs=20)
        state = case.model.fit(asked, case.rows.unlabelled(), case.env).state
        found = case.model.predict(Predict(start=(state,)), case.rows, case.env).argmax(1)
        assert (found == wanted).mean() > 0.9


def test_near_by_plain_sgd_equals_its_formula(three):
    rows, env = three
    adapter = pf_keras(plain(), lr=0.1)
    first = adapter.first(rows, env)
    anchor = Tree({name: np.zeros_like(a) for name, a in first.items()})
    state = adapter.fit(Fit(terms=(Near(2.0),), tensors={"anchor": anchor}, steps=3), rows, env).state
    for name, array in state.items():
        np.testing.assert_allclose(array, first[name] * (1 - 0.1 * 2.0) ** 3, rtol=1e-5)


def test_a_term_over_features_trains_what_lies_below(three):
    rows, env = three

    @dataclass(frozen=True)
    class Small:
        def __call__(self, ops, step):
            return step.mean(ops.sum(ops.square(step.features), -1))

    adapter = pf_keras(plain(), lr=0.1)
    before = adapter.predict(Predict(what="features"), rows, env)
    state = adapter.fit(Fit(terms=(Small(),), epochs=5), rows, env).state
    after = adapter.predict(Predict(start=(state,), what="features"), rows, env)
    assert before.shape == (40, 8)
    assert np.square(after).mean() < 0.5 * np.square(before).mean()
    assert np.array_equal(state["dense_1/kernel"], adapter.first(rows, env)["dense_1/kernel"])


def test_own_loss_without_targets_is_refused(three):
    rows, env = three
    with pytest.raises(DataError, match="no target"):
        pf_keras(plain()).fit(Fit(), rows.unlabelled(), env)


# ------------------------------------------------------------------------------------------------ state and names


def test_two_builds_have_equal_names_in_this_and_in_a_fresh_process(three):
    rows, env = three
    for make in (plain, functional, Net):
        one, two = (pf_keras(make).first(rows, env) for _ in range(2))
        assert one == two
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_keras import *\n"
        "print(pf_keras(functional).first(rows_for(THREE), env_for(THREE)).digest)"
    )
    here = str(Path(__file__).parent)
    fresh = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True, check=True)
    assert fresh.stdout.split()[-1] == pf_keras(functional).first(rows, env).digest


def test_names_say_part_and_place(three):
    rows, env = three
    for _ in range(3):
        functional()
    assert list(pf_keras(functional()).first(rows, env)) == [
        "dense/kernel",
        "dense/bias",
        "batch_normalization/gamma",
        "batch_normalization/beta",
        "stats:batch_normalization/mean",
        "stats:batch_normalization/variance",
        "dense_1/kernel",
        "dense_1/bias",
    ]


def test_frozen_layers_are_buffers_and_given_names_stay(three):
    rows, env = three
    model = keras.Sequential([layers.Dense(4, name="base", trainable=False), layers.Dense(3, name="head")])
    adapter = pf_keras(model, lr=0.1)
    first, after = adapter.first(rows, env), adapter.fit(Fit(), rows, env).state
    assert list(first) == ["buffers:base/kernel", "buffers:base/bias", "head/kernel", "head/bias"]
    assert np.array_equal(first["buffers:base/kernel"], after["buffers:base/kernel"])


def test_batch_normalization_statistics_move_and_predict(three):
    rows, env = three
    adapter = pf_keras(functional(), lr=0.1)
    first, after = adapter.first(rows, env), adapter.fit(Fit(), rows, env).state
    assert not np.array_equal(first["stats:batch_normalization/mean"], after["stats:batch_normalization/mean"])
    moved = Tree({"stats:batch_normalization/variance": np.full(8, 9.0, np.float32)})
    plainly = adapter.predict(Predict(start=(after,)), rows, env)
    assert not np.allclose(adapter.predict(Predict(start=(after, moved)), rows, env), plainly)


def test_dropout_follows_the_task_and_nothing_else(three):
    rows, env = three
    one, two = (pf_keras(functional, lr=0.1, shuffle=False) for _ in range(2))
    layers.Dropout(0.5)(keras.ops.ones((3, 3)), training=True)
    assert one.fit(Fit(), rows, env).state == two.fit(Fit(), rows, env).state
    assert one.fit(Fit(), rows, replace(env, number=1)).state != one.fit(Fit(), rows, env).state


@pytest.mark.parametrize("seeded", [True, False])
def test_keras_random_follows_the_task(three, seeded):
    rows, env = three

    class Noisy(Net):
        def __init__(self):
            super().__init__()
            self.seed = keras.random.SeedGenerator(5) if seeded else None

        def call(self, x, training=False):
            noise = keras.random.normal(keras.ops.shape(x), seed=self.seed)
            return super().call(x + noise * float(training), training=training)

    adapter = pf_keras(Noisy, lr=0.1, shuffle=False)
    if keras.backend.backend() == "jax" and not seeded:
        with pytest.raises(UsageError, match="Noisy draws at random without a seed"):
            adapter.fit(Fit(), rows, env)
        return
    one = adapter.fit(Fit(), rows, env).state
    assert adapter.fit(Fit(), rows, replace(env, number=1)).state != one
    assert adapter.fit(Fit(), rows, env).state == one


def test_the_given_model_is_never_changed_and_its_weights_are_the_start(three):
    rows, env = three
    model = functional()
    before = [a.copy() for a in weights_of(model)]
    adapter = pf_keras(model, lr=0.5)
    adapter.fit(Fit(), rows, env)
    assert type(model) is type(functional())
    assert not model.compiled
    assert all(np.array_equal(was, now) for was, now in zip(before, weights_of(model), strict=True))
    assert {a.tobytes() for a in before} == {a.tobytes() for a in adapter.first(rows, env).values()}
    unbuilt = plain()
    pf_keras(unbuilt).fit(Fit(), rows, env)
    assert not unbuilt.built


def test_pretrained_layers_of_an_unbuilt_model_keep_their_weights(three):
    rows, env = three
    base = layers.Dense(5, name="base")
    base.build((None, 6))
    first = pf_keras(keras.Sequential([base, layers.Dense(3)])).first(rows, env)
    assert np.array_equal(first["base/kernel"], weights_of(base)[0])


def test_unbuilt_weights_follow_the_run_seed(three):
    rows, env = three
    model = plain()
    one, two = (pf_keras(model).first(rows, replace(env, seed=s)) for s in (1, 2))
    assert one != two
    assert pf_keras(plain()).first(rows, replace(env, seed=1)) == one


def test_a_subclassed_model_is_rebuilt_from_its_configuration_or_refused(three):
    rows, env = three
    assert pf_keras(Net()).fit(Fit(), rows, env).steps == 2
    with pytest.raises(UsageError, match="Wide does not say by get_config"):
        pf_keras(Wide(5))
    with pytest.raises(UsageError, match="Wide does not say by get_config"):
        pf_keras(keras.Sequential([Wide(5), layers.Dense(3)]))

    class Said(Wide):
        def get_config(self):
            return {"width": 5}

    assert pf_keras(Said(5)).first(rows, env)["dense/kernel"].shape == (6, 5)

    class Odd(keras.Model):
        def __init__(self, table):
            super().__init__()
            self.table, self.head = table, layers.Dense(3)

        def call(self, x):
            return self.head(x)

    with pytest.raises(UsageError, match=r"Odd .* pf\.keras\(lambda: Odd\(\.\.\.\)\)"):
        pf_keras(Odd(object()))
    assert list(pf_keras(lambda: Odd(object())).first(rows, env)) == ["dense/kernel", "dense/bias"]


def test_part_trains_only_itself(three):
    rows, env = three
    adapter = pf_keras(Net, lr=0.1)
    first = adapter.first(rows, env)
    for _ in range(2):
        head = adapter.fit(Fit(part=("dense",)), rows, env).state
        assert [n for n in first if not np.array_equal(first[n], head[n])] == ["dense/kernel", "dense/bias"]
        whole = adapter.fit(Fit(), rows, env).state
        assert not np.array_equal(first["sequential/dense/kernel"], whole["sequential/dense/kernel"])
    with pytest.raises(UsageError, match="north: no parameter lies under nowhere"):
        adapter.fit(Fit(part=("nowhere",)), rows, env)


# ------------------------------------------------------------------------------------------------ outputs and inputs


def test_logits_of_a_softmax_are_log_probabilities(three):
    rows, env = three
    adapter = pf_keras(functional())
    own = adapter.export(adapter.first(rows, env), rows, env)
    logits = adapter.predict(Predict(), rows, env)
    np.testing.assert_allclose(logits, log_predictions(own, rows), atol=1e-5)
    np.testing.assert_allclose(np.exp(logits).sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_one_sigmoid_gives_both_log_probabilities_stably(scale):
    rows, env = rows_for(TWO), env_for(TWO)
    adapter = pf_keras(plain(1, "sigmoid"))
    moved = Tree({name: array * np.float32(scale) for name, array in adapter.first(rows, env).items()})
    logits = adapter.predict(Predict(start=(moved,)), rows, env)
    p = predictions(adapter.export(moved, rows, env), rows)[:, 0].astype(np.float64)
    sure = np.minimum(p, 1 - p) > 1e-4
    np.testing.assert_allclose(logits[sure], np.log(np.stack([1 - p, p], 1)[sure]), atol=2e-3)
    assert np.isfinite(logits).all()
    assert logits.shape == (40, 2)
    if scale > 1:
        assert logits.min() < -17  # beyond what a clipped probability could say


def test_binary_model_learns_with_its_default_loss():
    rows, env = rows_for(TWO, 80), env_for(TWO)
    for model, options in ((plain(1, "sigmoid"), {}), (plain(1), {"outputs": "logits"}), (plain(2), {})):
        adapter = pf_keras(model, lr=0.5, epochs=30, **options)
        state = adapter.fit(Fit(), rows, env).state
        assert (adapter.predict(Predict(start=(state,)), rows, env).argmax(1) == rows.target).mean() > 0.9


def test_a_subclassed_models_outputs_are_found_or_asked_for():
    class Ends(keras.Model):
        def __init__(self, width, end):
            super().__init__()
            self.head, self.end = layers.Dense(width), end

        def call(self, x):
            return self.end(self.head(x))

    rows, env = rows_for(THREE), env_for(THREE)
    soft = pf_keras(lambda: Ends(3, keras.ops.softmax)).predict(Predict(), rows, env)
    np.testing.assert_allclose(np.exp(soft).sum(1), 1, atol=1e-5)
    raw = pf_keras(lambda: Ends(3, lambda z: z)).predict(Predict(), rows, env)
    assert abs(np.exp(raw).sum(1) - 1).max() > 0.1
    two, env_two = rows_for(TWO), env_for(TWO)
    with pytest.raises(UsageError, match='outputs="logits"'):
        pf_keras(lambda: Ends(1, keras.ops.sigmoid)).predict(Predict(), two, env_two)
    one = pf_keras(lambda: Ends(1, keras.ops.sigmoid), outputs="probabilities").predict(Predict(), two, env_two)
    np.testing.assert_allclose(np.exp(one).sum(1), 1, atol=1e-5)


def test_wrong_width_is_refused_with_what_to_write(three):
    rows, env = three
    with pytest.raises(UsageError, match="the model has 4 outputs, the problem has 3 classes"):
        pf_keras(plain(4)).fit(Fit(), rows, env)


@pytest.mark.parametrize("named", [True, False])
def test_several_outputs_are_refused_with_what_to_write(three, named):
    rows, env = three

    def two():
        inputs = keras.Input((6,))
        ends = [layers.Dense(3, name=name)(inputs) for name in ("ill", "old")]
        return keras.Model(inputs, dict(zip(("ill", "old"), ends, strict=True)) if named else ends)

    for ask in (lambda adapter: adapter.fit(Fit(), rows, env), lambda adapter: adapter.predict(Predict(), rows, env)):
        with pytest.raises(UsageError, match=r"Functional has 2 outputs; give it a model that ends in the one"):
            ask(pf_keras(two))


def test_batch_normalization_when_the_last_batch_is_one_row_takes_it_with_the_one_before():
    """Keras itself would normalise the row to its own mean, and pull the moving variance to 0; pf.torch does as here."""
    rows, env = rows_for(THREE, n=33), env_for(THREE)
    adapter = pf_keras(functional, lr=0.1, batch_size=32)
    fitted = adapter.fit(Fit(epochs=2), rows, env)
    assert fitted.steps == 2
    assert fitted.state.is_finite()
    plain = pf_keras(lambda: keras.Sequential([layers.Dense(3)]), lr=0.1, batch_size=32)
    assert plain.fit(Fit(epochs=2), rows, env).steps == 4
    for n, batch_size in ((1, 32), (5, 1)):
        with pytest.raises(DataError, match="one row has no spread"):
            pf_keras(functional, batch_size=batch_size).fit(Fit(), rows_for(THREE, n=n), env)


def test_several_inputs_go_by_name():
    def model():  # a factory: its weights are drawn from the named seed, not from Keras's global one
        a, b = keras.Input((4,), name="blood"), keras.Input((2,), name="age")
        return keras.Model([a, b], layers.Dense(3)(layers.Concatenate()([layers.Dense(5)(a), b])))

    rng = np.random.default_rng(0)
    x = {"age": rng.normal(size=(30, 2)), "blood": rng.normal(size=(30, 4)).astype(np.float32)}
    rows = Rows(x, (x["age"][:, 0] > 0).astype(np.int64))
    env = env_for(THREE)
    adapter = pf_keras(model, lr=0.3, epochs=40)
    state = adapter.fit(Fit(), rows, env).state
    assert (adapter.predict(Predict(start=(state,)), rows, env).argmax(1) == rows.target).mean() > 0.9


def test_rows_that_do_not_fit_are_refused_with_their_shape(three):
    _, env = three
    with pytest.raises(UsageError, match=r"does not take rows of x \[5\]"):
        pf_keras(functional()).first(rows_for(THREE, width=5), env)


def test_a_start_of_another_shape_is_refused(three):
    rows, env = three
    with pytest.raises(SpecError, match="dense/bias"):
        pf_keras(plain()).predict(Predict(start=(Tree({"dense/bias": np.zeros(9, np.float32)}),)), rows, env)


# ------------------------------------------------------------------------------------------------ identity, files


def test_models_of_one_configuration_are_one_architecture_and_share_a_resident(three):
    rows, env = three
    one, two, other = pf_keras(plain()), pf_keras(plain()), pf_keras(plain(end="softmax"))
    assert one.key == two.key != other.key
    assert pf_keras(Net, key="mine").key == pf_keras(lambda: Net(), key="mine").key
    one.fit(Fit(), rows, env)
    two.fit(Fit(), rows, env)
    assert one._resident is two._resident
    assert pf_keras(plain(), optimizer="adam")._kept(rows, env) is not one._resident


def test_clients_that_share_a_resident_keep_their_own_settings(three):
    rows, env = three
    slow, fast = pf_keras(plain(), lr=0.01), pf_keras(plain(), lr=1.0)
    first = slow.first(rows, env)
    for adapter, rate in ((slow, 0.01), (fast, 1.0), (slow, 0.01)):
        assert adapter.fit(Fit(), rows, env).lr == pytest.approx(rate)
    moved = [gap(a.fit(Fit(start=(first,)), rows, env).state, first) for a in (slow, fast)]
    assert moved[1] > 100 * moved[0]


@pytest.mark.parametrize("make", [lambda: plain(), lambda: functional(), lambda: compiled(), lambda: Net])
def test_an_adapter_travels_by_pickle(three, make):
    rows, env = three
    adapter = pf_keras(make(), lr=0.1)
    state = adapter.fit(Fit(), rows, env).state
    there = pickle.loads(pickle.dumps(adapter))
    assert there.key == adapter.key
    assert there.fit(Fit(), rows, env).state == state


def test_a_model_file_comes_back_and_holds_no_code(three, tmp_path):
    rows, env = three
    adapter = pf_keras(compiled())
    model = adapter.export(adapter.fit(Fit(), rows, env).state, rows, env)
    path = tmp_path / "north.keras"
    to_file(model, path)
    back = from_file(path)
    assert all(np.array_equal(a, b) for a, b in zip(weights_of(model), weights_of(back), strict=True))
    assert back.compiled
    odd = keras.Sequential([keras.Input((6,)), layers.Lambda(lambda x: x * 2), layers.Dense(3)])
    with pytest.raises(UsageError, match="Lambda"):
        to_file(odd, tmp_path / "odd.keras")
    quietly(lambda: odd.save(tmp_path / "odd.keras"))
    with pytest.raises(UsageError, match="is not loaded"):
        from_file(tmp_path / "odd.keras")
    (tmp_path / "no.keras").write_bytes(b"PK no")
    with pytest.raises(CorruptError, match="no Keras model file"):
        from_file(tmp_path / "no.keras")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pf_keras(3), "takes a Keras 3 model"),
        (lambda: pf_keras(plain(), validation_split=0.2), "not validation_split"),
        (lambda: pf_keras(plain(), epochs=-1), "epochs is -1"),
        (lambda: pf_keras(plain(), outputs="odds"), "outputs is 'odds'"),
        (lambda: pf_keras(lambda: 3).offers, "it returned builtins.int"),
        (lambda: pf_keras(plain(), features="nowhere").offers, "no layer named 'nowhere'"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_write(call, said):
    with pytest.raises(UsageError, match=said):
        call()


def test_missing_keras_says_what_to_install():
    code = (
        "import sys; sys.modules['keras'] = None\n"
        "from polyfed.core.errors import MissingExtraError\n"
        "from polyfed.models.keras import keras\n"
        "try: keras(lambda: None)\n"
        "except MissingExtraError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "polyfed[keras]"' in said


def test_torch_is_taken_where_nothing_is_chosen():
    code = "from polyfed.models.keras_backend import library; print(library().backend.backend())"
    bare = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bare).stdout
    assert said.split()[-1] == "torch"


# ------------------------------------------------------------------------------------------------ mutants


def test_seeds_that_are_not_set_are_found(monkeypatch):
    from polyfed.models.keras_resident import Resident

    def forgetful(self, state, number):
        del number
        for name, variable in self.variables.items():
            variable.assign(state[name].copy())

    case = Case(pf_keras(Net, lr=0.1), rows_for(THREE), env_for(THREE))
    monkeypatch.setattr(Resident, "load", forgetful)
    with pytest.raises(AssertionError, match="the same fit gives another state"):
        MODEL_CHECKS["fit_is_a_function"](case)


def test_an_optimizer_that_remembers_is_found(monkeypatch):
    from polyfed.models.keras_resident import Resident

    kept = Resident._choose_optimizer

    def remembering(self, names):
        if names not in self.optimizers:
            kept(self, names)

    case = Case(pf_keras(compiled()), rows_for(THREE), env_for(THREE))
    monkeypatch.setattr(Resident, "_choose_optimizer", remembering)
    with pytest.raises(AssertionError, match="the same fit gives another state"):
        MODEL_CHECKS["fit_is_a_function"](case)
