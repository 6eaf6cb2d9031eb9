"""One built Keras model of this process: its subclass, its state by name, its optimizers and traced train functions."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from polyfed.core import seed
from polyfed.core.algorithm import Fit
from polyfed.core.errors import UsageError
from polyfed.core.rows import Problem, Rows
from polyfed.core.terms import Term
from polyfed.core.tree import Array, Tree, is_under, part_of
from polyfed.models.keras_backend import (
    array_of,
    as_numpy,
    config_of,
    generators,
    is_jax,
    is_torch,
    library,
    one_thread,
    rows_at,
    single,
    tensor_of,
)
from polyfed.models.keras_names import names_of
from polyfed.models.keras_source import (
    activation_of,
    built_on,
    camel,
    compile_arguments,
    from_logits,
    last_dense,
    last_layer,
    optimizer_of,
)
from polyfed.models.keras_step import Plan, Step, become, capturing, federated, flat, operations, tap

Outputs = Literal["auto", "logits", "probabilities"]
PREDICT_BATCH = 256  # fixed: another batch size may round otherwise
TINY = 1e-7  # probabilities are clipped here before a logarithm, as Keras does
TRACES = 8  # train functions kept for one model
JAX_STATE = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")


@dataclass(frozen=True)
class Options:
    """How a client trains its model: see `polyfed.models.keras.keras`."""

    loss: Any = None
    optimizer: Any = None
    lr: float | None = None
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    shuffle: bool = True
    features: str | None = None
    outputs: Outputs = "auto"
    train: Callable[[Any], None] | None = None
    fit: Mapping[str, Any] = field(default_factory=dict)


class Resident:
    """A model in this process with its names, optimizers and train functions."""

    def __init__(self, model: Any, options: Options, rows: Rows, problem: Problem) -> None:
        one_thread()
        self.keras, self.problem, self.plan = library(), problem, Plan()
        self.ops = operations()
        with generators(0):
            outputs = built_on(model, rows)
        self.model, self.variables = model, names_of(model)
        self.seeds = [v for v in model.variables if v.path.endswith("seed_generator_state")]
        self.width = self._width(outputs)
        self.loss = options.loss if options.loss is not None else model.loss
        self.form = self._form(options.outputs, outputs)
        self.template = optimizer_of(model, options.optimizer, options.lr)
        own = type(model).compute_loss is not self.keras.Model.compute_loss
        if options.loss is not None or not model.compiled or (model.loss is None and not own):
            if self.loss is None or isinstance(self.loss, str):
                self.loss = self._named_loss(self.loss)
            model.compile(optimizer=self.template, loss=self.loss, metrics=compile_arguments(model).get("metrics"))
        self.optimizers: dict[tuple[str, ...], tuple[Any, list[Array]]] = {}
        self.programs: OrderedDict[Hashable, Any] = OrderedDict()  # train functions, by what they were traced for
        if is_jax() and self.form in ("softmax", "sigmoid"):
            tap(last_layer(model), self.plan)
        self.values: Any = None  # on jax: of all variables, after the last step
        self.dense = last_dense(model, options.features)
        if self.dense is not None:
            become(self.dense, capturing(type(self.dense), self.plan))
        become(model, federated(type(model), self))
        self._settle(rows)

    def _width(self, outputs: Any) -> int:
        if not hasattr(outputs, "shape") or len(outputs.shape) not in (1, 2):
            several = isinstance(outputs, (list, tuple, Mapping))
            said = f"{len(outputs)} outputs" if several else f"one of shape {list(outputs.shape)}"
            raise UsageError(
                f"pf.keras takes models with one output of shape (rows, outputs), {type(self.model).__name__} has {said}; "
                "give it a model that ends in the one that is to be learnt"
            )
        width = int(outputs.shape[1]) if len(outputs.shape) == 2 else 1
        wanted = self.problem.outputs
        if width != wanted and not (width == 1 and wanted == 2 and self.problem.is_classification):
            said = f"{wanted} classes" if self.problem.is_classification else f"{wanted} targets"
            raise UsageError(
                f"the model has {width} outputs, the problem has {said}; make the last layer {wanted} wide"
            )
        return width

    def _form(self, said: Outputs, outputs: Any) -> str:
        """values, logits, softmax, sigmoid or probabilities."""
        if not self.problem.is_classification:
            return "values"
        found = activation_of(self.model)
        if said == "logits":
            return "logits"
        if found is not None and not (said == "probabilities" and found == "logits"):
            return found
        loss_takes = from_logits(self.loss)
        if said == "probabilities" or loss_takes is False:
            return "probabilities"
        if loss_takes:
            return "logits"
        values = as_numpy(outputs).astype(np.float64)
        if self.width == 1:
            raise UsageError(
                f"one output for two classes: say whether {type(self.model).__name__} gives a logit or a probability, "
                'by outputs="logits" or outputs="probabilities"'
            )
        sums = bool((values >= 0).all()) and bool(np.allclose(values.sum(-1), 1, atol=1e-3))
        return "probabilities" if sums else "logits"

    def _named_loss(self, name: str | None) -> Any:
        losses, logits = self.keras.losses, self.form == "logits"
        if name in (None, "cross_entropy", "mse"):
            if not self.problem.is_classification or name == "mse":
                return losses.MeanSquaredError()
            kind = losses.BinaryCrossentropy if self.width == 1 else losses.SparseCategoricalCrossentropy
            return kind(from_logits=logits)
        with contextlib.suppress(TypeError, ValueError):
            found = losses.get({"class_name": camel(str(name)), "config": {}})
            if "from_logits" in config_of(found):
                return type(found)(from_logits=logits)
        return losses.get(name)

    @cached_property
    def wants_numbers(self) -> bool:
        """Whether the loss takes class numbers; those of Keras that do not say "sparse" take one column a class."""
        name = self.loss if isinstance(self.loss, str) else getattr(self.loss, "name", None)
        name = str(name or getattr(self.loss, "__name__", ""))
        known = isinstance(self.loss, str) or type(self.loss).__module__.startswith("keras.")
        known = known or getattr(self.loss, "__module__", "").startswith("keras.")
        return "sparse" in name or not known

    def encoded(self, target: Any) -> Any:
        """Targets as the client's own loss takes them."""
        ops = self.keras.ops
        if not self.problem.is_classification:
            return ops.reshape(target, (-1, self.width)) if len(target.shape) == 1 else target
        if self.width == 1:
            return ops.reshape(ops.cast(target, "float32"), (-1, 1))
        return target if self.wants_numbers else ops.one_hot(target, self.width)

    def logits(self, out: Any) -> Any:
        """(batch, classes) log-odds or log-probabilities, whichever the model has, stable in both; values as they are."""
        ops = self.keras.ops
        inner = getattr(out, "_keras_logits", self.plan.logits)
        out = ops.cast(out, "float32")
        if self.form == "values":
            return ops.reshape(out, (-1, self.width))
        z = out if self.form == "logits" else None
        if inner is not None and (self.form in ("softmax", "sigmoid") or self.width == 1):
            z = ops.cast(inner, "float32")
        if self.width == 1 or (self.form == "sigmoid" and z is not None):
            if z is None:
                p = ops.clip(out, TINY, 1 - TINY)
                z = ops.log(p) - ops.log(1 - p)
            if self.width > 1:
                return -ops.softplus(-z)
            z = ops.reshape(z, (-1,))
            return ops.stack([-ops.softplus(z), -ops.softplus(-z)], -1)
        if z is None:
            return ops.log(ops.clip(out, TINY, 1.0))
        return z if self.form == "logits" else ops.log_softmax(z, axis=-1)

    def _settle(self, rows: Rows) -> None:
        """Has Keras make the variables of loss and metrics now, outside any trace."""
        with generators(0):
            x = self.inputs(rows, np.arange(min(2, len(rows))))
            out = self.model(x, training=False)
            zero = np.zeros(min(2, len(rows)), np.int64 if self.problem.is_classification else np.float32)
            if not self.problem.is_classification:
                zero = np.zeros((len(zero), self.width), np.float32)
            y = self.encoded(self.keras.ops.convert_to_tensor(zero))
            self.model.compute_loss(x, y, out)
            self.model.compute_metrics(x, y, out)
            self.model.reset_metrics()

    # -- state

    def load(self, state: Tree, number: int) -> None:
        for name, variable in self.variables.items():
            variable.assign(np.array(state[name]))
        for place, variable in enumerate(self.seeds):
            variable.assign(np.array([seed.integer(number, place), 0], variable.dtype))

    def state(self, start: Tree, part: tuple[str, ...]) -> Tree:
        """What the model holds; entries outside the part are those of the start."""
        kept = {n: start[n] if part and not is_under(n, part) else array_of(v) for n, v in self.variables.items()}
        return Tree(kept)

    @property
    def normalises_batches(self) -> bool:
        """Whether a layer takes moments of the batch: a batch of one row has none."""
        return any(part_of(name) == "stats" for name in self.variables)

    # -- rows

    def _tensors(self, rows: Rows) -> dict[str, Any]:
        """The rows in the backend's own storage, once."""
        found = rows.cache.get("keras")
        if found is None:
            found = {f"x:{name}": tensor_of(single(a)) for name, a in rows.inputs.items()}
            if rows.target is not None:
                found["y"] = tensor_of(rows.target)
            rows.cache["keras"] = found
        return found

    def inputs(self, rows: Rows, index: Array) -> Any:
        tensors, at = self._tensors(rows), tensor_of(index)
        cut = {name: rows_at(tensors[f"x:{name}"], at) for name in rows.inputs}
        return next(iter(cut.values())) if len(cut) == 1 else cut

    # -- work

    def columns(self, rows: Rows, targets: Mapping[str, Array]) -> dict[str, Any]:
        """What is cut to a batch beside the inputs: the rows' targets as "y", the request's as "t:name"."""
        own = self._tensors(rows)
        found = {f"t:{name}": tensor_of(single(np.asarray(a))) for name, a in targets.items()}
        return {**found, "y": own["y"]} if "y" in own else found

    def begin(self, request: Fit, client: str) -> None:
        """Readies the model for one fit: what trains, a fresh optimizer, the terms and their trees."""
        trained = {n: v for n, v in self.variables.items() if part_of(n) == "params" and is_under(n, request.part)}
        if not trained:
            raise UsageError(f"{client}: no parameter lies under {', '.join(request.part)}")
        for name, variable in self.variables.items():
            if part_of(name) == "params" and variable.trainable != (name in trained):
                variable.trainable = name in trained
        self._choose_optimizer(tuple(trained))
        self.plan.terms, self.plan.params = request.terms, trained
        self.plan.tensors = {n: {k: tensor_of(a) for k, a in t.items()} for n, t in request.tensors.items()}
        self._choose_program(request.terms, tuple(trained))
        self.model.reset_metrics()
        if is_torch():
            self.model.train()  # for torch modules wrapped inside

    def _choose_optimizer(self, names: tuple[str, ...]) -> None:
        if names not in self.optimizers:
            optimizer = type(self.template).from_config(config_of(self.template))
            optimizer.build(self.model.trainable_variables)
            self.optimizers[names] = optimizer, [array_of(v).copy() for v in optimizer.variables]
        optimizer, fresh = self.optimizers[names]
        for variable, value in zip(optimizer.variables, fresh, strict=True):
            variable.assign(value)
        self.model.optimizer = optimizer

    def _choose_program(self, terms: tuple[Term, ...], names: tuple[str, ...]) -> None:
        """A train function for these terms over these parameters; each is traced by itself, for each shape of batch."""
        model, name = self.model, (terms, names)
        model.train_function = self.programs.pop(name, None)
        if is_jax() and model.train_function is None:
            # jax knows a traced function by equality, and a model's bound methods are equal: each gets an own one
            object.__setattr__(model, "train_step", partial(type(model).train_step, model))
        model.make_train_function()
        self.programs[name] = model.train_function
        if len(self.programs) > TRACES:
            self.programs.popitem(last=False)
        if is_jax():
            model._jax_state, model._jax_state_synced = None, True  # noqa: SLF001  # what a failed fit may have left

    def train(self, x: Any, columns: Mapping[str, Any], weight: Any) -> Mapping[str, Any]:
        """One step of the model's own `train_step`; returns Keras's logs."""
        plan, tensors = self.plan, self.plan.tensors
        plan.columns = columns
        data = (x, (columns, tensors), weight)
        try:
            return self._train_on_jax(data) if is_jax() else self.model.train_function([data])
        finally:
            plan.columns, plan.tensors = columns, tensors  # a trace has put its symbols there

    def _train_on_jax(self, data: Any) -> Mapping[str, Any]:
        """As `keras.Model.fit` does it: values go from step to step; variables get them when somebody asks (`sync`)."""
        model = self.model
        if model._jax_state_synced:  # noqa: SLF001  # Keras's own protocol, which its callbacks follow
            self.values = model._get_jax_state(**dict.fromkeys(JAX_STATE, True))  # noqa: SLF001  # as above
        try:
            logs, self.values = model.train_function(self.values, iter([data]))
        except ValueError as error:
            if "[JAX RNG]" not in str(error):
                raise
            raise UsageError(
                f"{type(model).__name__} draws at random without a seed, which jax would freeze into its compiled step; "
                "keep a keras.random.SeedGenerator in the layer and pass it as seed="
            ) from error
        model._jax_state = dict(zip(JAX_STATE, self.values, strict=True))  # noqa: SLF001  # as above
        model._jax_state_synced = False  # noqa: SLF001  # as above
        return dict(logs)

    def sync(self) -> None:
        """Brings the values of the steps so far into the model's variables; only jax keeps them elsewhere."""
        if is_jax():
            self.model.jax_state_sync()

    def end(self) -> None:
        for name, variable in self.variables.items():
            if part_of(name) == "params" and not variable.trainable:
                variable.trainable = True
        self.plan.terms, self.plan.tensors, self.plan.params, self.plan.columns = None, {}, {}, {}
        self.plan.captured = self.plan.logits = None
        if is_torch():
            self.model.eval()

    def predict(self, rows: Rows, what: str) -> Array:
        parts = []
        for begin in range(0, len(rows), PREDICT_BATCH):
            index = np.arange(begin, min(begin + PREDICT_BATCH, len(rows)))
            parts.append(self.model.predict_on_batch(self.inputs(rows, index))[what])
        self.plan.captured = self.plan.logits = None
        if not parts:
            return np.zeros((0, self.problem.outputs), np.float32)
        return np.ascontiguousarray(np.concatenate(parts), np.float32)

    def step(self, loss: Callable[[], Any], out: Any) -> Step:
        plan = self.plan
        targets = {name[2:]: self._beside(value) for name, value in plan.columns.items() if name.startswith("t:")}
        params = {name: v.value for name, v in plan.params.items()}
        captured = None if plan.captured is None else flat(plan.captured, self.keras.ops)
        y = plan.columns.get("y")
        return Step(self.logits(out), captured, y, params, plan.tensors, targets, loss, self.keras.ops)

    def _beside(self, target: Any) -> Any:
        """One value a row stands as a column beside a regression's one output."""
        if self.form == "values" and len(target.shape) == 1:
            return self.keras.ops.reshape(target, (-1, 1))
        return target
