"""`polyfed.keras`: a Keras 3 model as a participant's, on the torch, the tensorflow or the jax backend.

The user's model gets a subclass of its own class whose `compute_loss` sums the request's terms and whose `train_step`
takes the row targets out of ``y``; everything else (forward, backward, optimizer, metrics, callbacks, a `train_step`
of the user's own) stays Keras's. Batches go straight to Keras's train function: `Model.fit` would build an input
pipeline for each request, which on tensorflow costs eight times the training of a small net.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from typing import Any

from polyfed.core import seed
from polyfed.core.algorithm import Env, Fit, Fitted, Predict
from polyfed.core.errors import DataError, UsageError
from polyfed.core.rows import Rows
from polyfed.core.tree import Array, Tree
from polyfed.models.keras_backend import array_of, as_written, generators, library
from polyfed.models.keras_file import Luggage, from_file, to_file
from polyfed.models.keras_names import architecture_of, kind_of, names_of, origin_of, token_of, walk
from polyfed.models.keras_resident import Options, Outputs, Resident
from polyfed.models.keras_source import (
    built_on,
    clone,
    compile_arguments,
    is_plain_sgd,
    last_dense,
    optimizer_of,
    rate_of,
)
from polyfed.models.keras_training import Training

__all__ = ["KerasModel", "Training", "from_file", "keras", "to_file"]

FIT_OPTIONS = frozenset({"class_weight", "sample_weight", "callbacks"})
SEEDS = 8  # first states kept by one adapter
_RESIDENTS: weakref.WeakValueDictionary[Hashable, Resident] = weakref.WeakValueDictionary()


def keras(
    model: Any,
    *,
    loss: Any = None,
    optimizer: Any = None,
    lr: float | None = None,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int = 32,
    shuffle: bool = True,
    features: str | None = None,
    outputs: Outputs = "auto",
    key: Hashable = None,
    train: Callable[[Training], None] | None = None,
    **fit_options: Any,
) -> KerasModel:
    """Wraps a Keras 3 model; it is never changed, and no training loop is needed for the usual cases.

    Args:
        model: a `keras.Model` (Sequential, functional or subclassed; built or not, compiled or not), or a function
            without arguments that makes one, whose weights are then drawn from the run's seed.
        loss: Keras loss, its name, or "cross_entropy" / "mse"; None keeps the compiled one, else cross entropy for
            classes and mse for values.
        optimizer: Keras optimizer or its name; None keeps the compiled one, else plain SGD. Its state is fresh in
            each fit.
        lr: learning rate; None keeps the optimizer's own, 0.05 for the plain SGD.
        epochs: passes over the rows in a fit.
        steps: optimizer steps instead, cycling over the rows.
        batch_size: rows a step.
        shuffle: a new order each epoch; False keeps the stored one.
        features: name of the layer whose input is the representation; by default the last Dense layer.
        outputs: whether the model ends in "logits" or "probabilities"; "auto" finds it from the last layer, the
            loss, or the values.
        key: says that models from different factories are of one architecture; models of Keras's own layers are
            compared by their configuration.
        train: your own loop, ``def train(training: Training)``; terms, part, budget, order and seeds still hold. On jax
            it calls ``training.step(batch)``.
        fit_options: ``class_weight`` (class number -> weight), ``sample_weight`` (one entry a training row) and
            ``callbacks``, as `keras.Model.fit` takes them.

    A random operation of a layer of one's own draws through `keras.random`: then a fit is a function of its seed. On jax
    it passes a `keras.random.SeedGenerator` that the layer holds.

    Bits: on torch and tensorflow every operation runs by itself, so that a term of weight 0 changes none of them. On jax,
    and where a model is compiled with ``jit_compile=True``, the whole step is compiled at once, which may round a sum in
    another order when a term is added; the same request gives the same bits on every backend. jax compiles a step for
    each shape of batch (one to two seconds), so sizes that `batch_size` divides spare a second one.

    Raises:
        MissingExtraError: Keras is not installed.
        UsageError: not a Keras 3 model, a subclassed one that cannot be rebuilt, an argument that cannot be used.
    """
    if unknown := sorted(set(fit_options) - FIT_OPTIONS):
        raise UsageError(
            f"pf.keras passes {', '.join(sorted(FIT_OPTIONS))} on to training, not {', '.join(unknown)}; "
            "validation, order and budget of the rows belong to the federation"
        )
    numbers: tuple[tuple[str, Any, int], ...] = (
        ("epochs", epochs, 0),
        ("steps", steps, 1),
        ("batch_size", batch_size, 1),
    )
    for name, value, least in numbers:
        if value is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"{name} is {value!r}, expected a whole number of at least {least}")
    if outputs not in ("auto", "logits", "probabilities"):
        raise UsageError(f'outputs is {outputs!r}, expected "auto", "logits" or "probabilities"')
    options = Options(
        loss=loss,
        optimizer=optimizer,
        lr=lr,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        shuffle=shuffle,
        features=features,
        outputs=outputs,
        train=train,
        fit=fit_options,
    )
    return KerasModel(model, options, key)


class KerasModel:
    """What `keras` returns: see there, and `polyfed.core.protocols.Model` for the methods.

    A state holds the trainable variables by their path ("dense/kernel", numbered by place, never by how many layers the
    process has made), "stats:" for the moments of BatchNormalization, "buffers:" for all else that does not train.
    Seeds of dropout and the like are no part of it: every task sets them from its own stream.
    """

    def __init__(self, source: Any, options: Options, key: Hashable = None) -> None:
        self.source, self.options, self._user_key = source, options, key
        loaded = sys.modules.get("keras")
        self.is_model = loaded is not None and isinstance(source, loaded.Model)
        legacy = hasattr(source, "get_weights") and not isinstance(source, type)
        if not self.is_model and (legacy or not callable(source)):
            raise UsageError(f"pf.keras takes a Keras 3 model or a function that makes one, got {kind_of(source)}")
        library()
        self._given = self._weights()
        self._firsts: dict[int, Tree] = {}
        self._resident: Resident | None = None

    def _weights(self) -> Mapping[str, Array]:
        """The weights of a model that has some, as they are now; refuses one that cannot be rebuilt."""
        if not self.is_model:
            return {}
        if not all(type(layer).__module__.startswith("keras.") for _, layer in walk(self.source, "")):
            self._make(0)
        return {name: array_of(variable) for name, variable in names_of(self.source).items()}

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: self.__dict__[name] for name in ("options", "_user_key", "is_model", "_given")}
        source = Luggage(self.source) if self.is_model else self.source
        return {**kept, "source": source, "_firsts": {}, "_resident": None}

    @cached_property
    def _prototype(self) -> Any:
        """A model to look at: it tells what is offered, and is never trained."""
        return self.source if self.is_model else self._make(0)

    @cached_property
    def _optimizer(self) -> Any:
        return optimizer_of(self._prototype, self.options.optimizer, self.options.lr)

    @cached_property
    def kind(self) -> str:
        """The model's type name."""
        return type(self._prototype).__name__

    @cached_property
    def key(self) -> Hashable:
        """Equal keys mean the same architecture."""
        if self._user_key is not None:
            return ("keras", self._user_key)
        return ("keras", architecture_of(self.source) if self.is_model else origin_of(self.source))

    @cached_property
    def offers(self) -> frozenset[str]:
        """Words of `polyfed.core.algorithm.Needs`."""
        words = {"params", "predict", "terms", "distill", "part"}
        if last_dense(self._prototype, self.options.features) is not None:
            words.add("features")
        if self.options.train is None and is_plain_sgd(self._optimizer):
            words.add("sgd")
        return frozenset(words)

    @cached_property
    def settings(self) -> Mapping[str, str | float | int | bool]:
        """Learning rate, budget and the like, for the report."""
        options = self.options
        loss = options.loss if options.loss is not None else self._prototype.loss
        said = "default" if loss is None else loss if isinstance(loss, str) else getattr(loss, "name", kind_of(loss))
        budget = {"epochs": options.epochs} if options.steps is None else {"steps": options.steps}
        own = {} if options.train is None else {"own loop": getattr(options.train, "__name__", "yes")}
        return {
            "optimizer": type(self._optimizer).__name__,
            "lr": float(f"{rate_of(self._optimizer):.6g}"),  # held as float32
            "loss": str(said),
            **budget,
            "batch_size": options.batch_size,
            "shuffle": options.shuffle,
            **own,
        }

    def first(self, rows: Rows, env: Env) -> Tree:
        """The given model's weights where it has them, else those that the run's seed makes."""
        if env.seed not in self._firsts:
            if len(self._firsts) >= SEEDS:
                self._firsts.clear()
            number = seed.integer(env.seed, "init", self.kind)
            model = self._make(number)
            with generators(number):
                built_on(model, rows)
            found = {name: self._given.get(name, array_of(v)) for name, v in names_of(model).items()}
            self._firsts[env.seed] = Tree(found)
        return self._firsts[env.seed]

    def _make(self, number: int) -> Any:
        """A model of our own, compiled as the user's is; built only if its maker built it."""
        with generators(number):
            made = clone(self.source) if self.is_model else self.source()
        if not isinstance(made, library().Model):
            raise UsageError(f"the function given to pf.keras must return a Keras 3 model, it returned {kind_of(made)}")
        return made

    def _kept(self, rows: Rows, env: Env) -> Resident:
        """The one built model that this process has for this architecture and these settings."""
        if self._resident is None:
            loss = self.options.loss if self.options.loss is not None else self._prototype.loss
            compiled = token_of([self._optimizer, loss, compile_arguments(self._prototype).get("metrics")])
            shapes = tuple((name, a.shape[1:]) for name, a in rows.inputs.items())
            name = (self.key, compiled, self.options.outputs, self.options.features, env.problem, shapes)
            found = _RESIDENTS.get(name)
            if found is None:
                found = _RESIDENTS[name] = Resident(self._make(0), self.options, rows, env.problem)
            self._resident = found
        return self._resident

    def _start(self, start: tuple[Tree, ...], rows: Rows, env: Env) -> Tree:
        state = self.first(rows, env)
        for tree in start:
            state = state.overlay(tree)
        return state

    def fit(self, request: Fit, rows: Rows, env: Env) -> Fitted:
        """Trains; a function of (request, rows, env) alone.

        Raises:
            DataError: no rows, or no targets where a term asks for the client's own loss.
            UsageError: inputs, outputs or terms that do not fit the model.
        """
        if not len(rows):
            raise DataError(f"{env.client}: no rows to train on")
        resident, number = self._kept(rows, env), env.integer("keras")
        start = self._start(request.start, rows, env)
        with generators(number), as_written(), warnings.catch_warnings():
            # a term that reads features alone leaves the last layer without a gradient, which is what it means
            warnings.filterwarnings("ignore", message="Gradients do not exist")
            resident.load(start, number)
            try:
                resident.begin(request, env.client)
                training = Training(resident, rows, request, env, self.options)
                (self.options.train or Training.run)(training)
                resident.sync()
                resident.model.optimizer.finalize_variable_values(resident.model.trainable_variables)
                state = resident.state(start, request.part)
            finally:
                resident.end()
        return Fitted(state, training.steps_done, training.lr, training.metrics())

    def predict(self, request: Predict, rows: Rows, env: Env) -> Array:
        """Logits, values or features of rows, float32, in batches of a fixed size."""
        if request.what == "features" and "features" not in self.offers:
            raise UsageError(f"{self.kind} has no Dense layer whose input could be its features; name one: features=")
        resident, number = self._kept(rows, env), env.integer("keras")
        with generators(number), as_written():
            resident.load(self._start(request.start, rows, env), number)
            return resident.predict(rows, request.what)

    def export(self, state: Tree, rows: Rows, env: Env) -> Any:
        """An ordinary Keras model of the user's own class with this state, compiled if the user's is."""
        del env
        model = self._make(0)
        with generators(0):
            built_on(model, rows)
        for name, variable in names_of(model).items():
            variable.assign(state[name].copy())
        return model
