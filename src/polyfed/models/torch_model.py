"""The torch adapter: a module with a loss, an optimizer and a budget as a `polyfed.core.protocols.Model`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyfed.core import seed
from polyfed.core.algorithm import Env, Fit, Fitted, Predict
from polyfed.core.errors import DataError, UsageError
from polyfed.core.rows import Problem, Rows
from polyfed.core.terms import Distill, Match, Near, Own, Term
from polyfed.core.tree import Array, Tree, is_under
from polyfed.models.torch_losses import OPS, Head, Loss, TorchStep
from polyfed.models.torch_optimizers import Custom, Memory, Optimizer, Update, blank, clip, gradients
from polyfed.models.torch_resident import (
    Joined,
    MemoryFormat,
    Resident,
    Slots,
    Source,
    copied,
    joined,
    kind_of,
    seeded,
    spec_of,
    state_of,
    views,
)

#: Rows a prediction takes at a time, for everybody: the size decides bits (7 or 128 rows change logits).
PREDICTED_AT_ONCE = 256
_READ_NO_FEATURES = (Own, Near, Distill, Match)
Hook = Callable[["Training"], None]


@dataclass(frozen=True)
class Group:
    """Parameters under one prefix and how they are trained; the prefix "" is all that no other prefix has."""

    prefix: str
    optimizer: Optimizer
    lr: float


@dataclass(frozen=True)
class Options:
    """How a module is trained: see `polyfed.models.torch.torch`."""

    groups: tuple[Group, ...]
    loss: str | Loss | None = None
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    shuffle: bool = True
    features: str | None = None
    output: str | None = None
    train: Hook | None = None
    device: str = "cpu"
    memory_format: MemoryFormat = "auto"
    keep_optimizer: bool = False
    clip_norm: float | None = None

    @property
    def is_plain_sgd(self) -> bool:
        return (
            len(self.groups) == 1
            and self.groups[0].optimizer.is_plain
            and self.train is None
            and self.clip_norm is None
        )

    def group(self, name: str) -> Group:
        """The group of a parameter: the longest prefix that it lies under."""
        found = [g for g in self.groups if not g.prefix or is_under(name, (g.prefix,))]
        if not found:
            said = ", ".join(repr(g.prefix) for g in self.groups)
            raise UsageError(f"no optimizer for the parameter {name!r}: it lies under none of {said}")
        return max(found, key=lambda g: len(g.prefix))

    def slots(self, module: nn.Module) -> Slots:
        """What is kept of the optimizers in a state: nothing by default."""
        if not self.keep_optimizer:
            return {}
        return {name: self.group(name).optimizer.slots for name, p in module.named_parameters() if p.requires_grad}


@dataclass(slots=True)
class Batch:
    """Some rows as tensors; not frozen, because one is made a step and a frozen one costs three times as much.

    Attributes:
        inputs: input name -> (batch, ...) tensor.
        target: (batch,) class numbers or (batch, outputs) values; None on unlabelled rows.
        targets: the request's targets of the same rows.
        size: how many rows.
    """

    inputs: Mapping[str, Tensor]
    target: Tensor | None
    targets: Mapping[str, Tensor]
    size: int

    def __len__(self) -> int:
        return self.size


class Training:
    """One fit, as a user's own loop sees it: ``def train(training): for batch in training.batches(): ...``

    Attributes:
        module: in training mode, its parameters at the start of the fit.
        parameters: what is to be trained, by name: the request's part of the module.
        lr: the learning rate of `polyfed.torch`.
        rng: this task's own numpy generator; torch's global generator is this task's own, too.
    """

    def __init__(self, model: TorchModel, request: Fit, rows: Rows, env: Env) -> None:
        self._resident, self._options = model.resident, model.options
        self._head = model.head(env.problem)
        self._request, self._env = request, env
        self._inputs, self._target = model.inputs(rows, env.problem), model.target(rows, env.problem)
        self._rows = len(rows)
        self._terms: tuple[Term, ...] = request.terms
        device = self._resident.device
        self._tensors = {name: views(tree, device) for name, tree in request.tensors.items()}
        self._targets = {
            name: _row_target(name, array, self._rows, self._resident) for name, array in request.targets.items()
        }
        self._resident.mode(training=True, part=request.part)
        self.module = self._resident.module
        self.parameters = {name: self._resident.params[name] for name in self._resident.trained(request.part)}
        self.lr = self._options.groups[0].lr
        self._caught: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._sizes: list[int] = []
        self.steps = 0

    @functools.cached_property
    def rng(self) -> np.random.Generator:
        return self._env.rng("train")

    def loss(self, batch: Batch) -> Tensor:
        """The sum of the request's terms on a batch, with gradients."""
        raw = self._resident.run(batch.inputs)
        step = TorchStep(
            self._head,
            raw,
            batch.target,
            params=self.parameters,
            tensors=self._tensors,
            targets=batch.targets,
            features=flattened(self._caught) if self._caught else None,
        )
        total: Tensor = self._terms[0](OPS, step)
        for term in self._terms[1:]:
            total = total + term(OPS, step)
        if total.ndim:
            raise UsageError(
                f"the loss of a batch has shape {tuple(total.shape)}, expected one number: return its mean"
            )
        self._losses.append(total.detach())
        self._sizes.append(batch.size)
        return total

    def batches(self) -> Iterator[Batch]:
        """The batches of this fit, within its budget of epochs or steps, in its order; each counts as a step.

        The last batch of an epoch may be smaller. With batch normalisation in training, a last batch of one row joins
        the one before it; where there is none before it, `DataError` is raised.
        """
        epochs, steps = self._budget()
        sizes = self._batch_sizes()
        order = self._env.rng("order") if self._options.shuffle else None
        while (epochs is None or epochs > 0) and (steps is None or steps > 0):
            for batch in self._epoch(sizes, order):
                if steps is not None and steps == 0:
                    return
                yield batch
                self.steps += 1
                steps = None if steps is None else steps - 1
            epochs = None if epochs is None else epochs - 1

    def _budget(self) -> tuple[int | None, int | None]:
        """(epochs, steps): the request's steps, its epochs, the client's steps, the client's epochs: the first given."""
        asked, own = self._request, self._options
        if asked.steps is not None:
            return None, asked.steps
        if asked.epochs is not None:
            return asked.epochs, None
        return (None, own.steps) if own.steps is not None else (own.epochs, None)

    def _batch_sizes(self) -> list[int]:
        size = self._options.batch_size
        whole, rest = divmod(self._rows, size)
        sizes = [size] * whole + [rest] * bool(rest)
        if min(sizes) == 1 and self._resident.normalises_batches:
            if size == 1 or len(sizes) == 1:
                raise DataError(
                    f"{self._resident.kind} normalises over the batch, and one row has no spread; it has {self._rows} "
                    f"training row{'s' * (self._rows != 1)} and batch_size={size}: give it batches of two rows at least, or "
                    "a net without batch normalisation"
                )
            sizes[-2:] = [sizes[-2] + 1]
        return sizes

    def _epoch(self, sizes: list[int], rng: np.random.Generator | None) -> Iterator[Batch]:
        """One pass: rows are gathered in its order into new storage, so that no batch is a view of what is kept."""
        held = [*self._inputs.values(), *([] if self._target is None else [self._target]), *self._targets.values()]
        if rng is None:
            gathered = [t.clone() for t in held]
        else:
            order = torch.from_numpy(rng.permutation(self._rows)).to(self._resident.device)
            gathered = [t.index_select(0, order) for t in held]
        names, labelled, extra = tuple(self._inputs), self._target is not None, tuple(self._targets)
        wide = len(names)
        for size, *cut in zip(sizes, *(torch.split(t, sizes) for t in gathered), strict=True):
            targets = dict(zip(extra, cut[wide + labelled :], strict=True)) if extra else {}
            yield Batch(dict(zip(names, cut, strict=False)), cut[wide] if labelled else None, targets, size)

    # -------------------------------------------------------------- run
    def run(self) -> Fitted:
        """The whole fit."""
        start = self._resident.save() if self._request.part else None
        # A model may be personalised where the caller has switched gradients off, to predict with it.
        with torch.enable_grad(), seeded(self._env.integer("torch"), self._resident.device), self._features():
            if self._options.train is None:
                self._loop()
            else:
                self._hook(self._options.train)
        state = self._resident.save()
        if start is not None:
            state = start.overlay(state.under(self._request.part))
        plain = self._options.groups[0].lr if self._options.is_plain_sgd else 0.0
        return Fitted(state, self.steps, plain, {"loss": self._mean_loss()} if self._losses else {})

    def _loop(self) -> None:
        params = tuple(self.parameters.values())
        update, bound = self._update(), self._options.clip_norm
        for batch in self.batches():
            grads = gradients(self.loss(batch), params)
            if bound is not None:
                clip(grads, bound)
            update(grads)

    def _hook(self, train: Hook) -> None:
        """A user's own loop; what is not to be trained takes no gradient meanwhile."""
        still = [p for name, p in self._resident.params.items() if p.requires_grad and name not in self.parameters]
        for p in still:
            p.requires_grad_(False)
        try:
            train(self)
        finally:
            for p in still:
                p.requires_grad_(True)
            for p in self._resident.params.values():
                p.grad = None
            self._resident.forget_mode()

    def _update(self) -> Callable[[Sequence[Tensor | None]], None]:
        """The optimizers' step over all trained parameters; a group each, most often one."""
        groups: dict[Group, list[int]] = {}
        for i, name in enumerate(self.parameters):
            groups.setdefault(self._options.group(name), []).append(i)
        names, params = list(self.parameters), [p.data for p in self.parameters.values()]
        if len(groups) == 1:
            group = next(iter(groups))
            return self._start(group, names, params)
        parts = [(self._start(g, [names[i] for i in at], [params[i] for i in at]), at) for g, at in groups.items()]

        def update(grads: Sequence[Tensor | None]) -> None:
            for each, at in parts:
                each([grads[i] for i in at])

        return update

    def _start(self, group: Group, names: list[str], params: list[Tensor]) -> Update:
        if isinstance(group.optimizer, Custom):
            return group.optimizer.start([self.parameters[name] for name in names], group.lr, {})
        memory: Memory = blank(group.optimizer, params)
        if self._options.keep_optimizer:
            kept = self._resident.views
            memory = {slot: [kept[f"buffers:{name}/{slot}"] for name in names] for slot in group.optimizer.slots}
        return group.optimizer.start(params, group.lr, memory)

    @contextmanager
    def _features(self) -> Iterator[None]:
        """Catches the representation of each batch where some term may read it."""
        if all(type(term) in _READ_NO_FEATURES for term in self._terms):
            yield
            return
        with caught(self._resident.module, self._options.features, self._caught):
            yield

    def _mean_loss(self) -> float:
        """Mean over the rows seen, read once at the end: a value read at every step would wait for it."""
        losses = torch.stack(self._losses).double().cpu().numpy()
        return float(np.dot(losses, self._sizes) / sum(self._sizes))


class TorchModel:
    """A torch module as a model of a federation; made by `polyfed.torch`.

    `fit` and `predict` are functions of (request, rows, env): one resident module serves every client of its
    architecture, and a state is copied in before and out after each call.
    """

    def __init__(self, parts: Mapping[str, Any], options: Options, key: Hashable = None) -> None:
        """`parts`: one module or factory, or two by the names "shared" and "personal"."""
        self._source, self.options, self._user_key = Source.of(parts), options, key
        self._start: Tree | None = None
        if not self._source.is_factory:
            module = joined(parts)
            self._start = self._once(state_of(module, options.slots(module)))
        self._settle()

    def _settle(self) -> None:
        self.resident = _resident(self._source, self.options, self._user_key)
        self.kind = self.resident.kind
        self.key: Hashable = (
            self._source.token if self._user_key is None else self._user_key,
            self.resident.spec.digest,
        )
        self.offers = self._offers()

    def _once(self, tree: Tree) -> Tree:
        """The tree that another model of the same source holds already, if it is equal: a thousand clients hold one."""
        return self._source.starts.setdefault(("module", tree.digest), tree)

    def __getstate__(self) -> dict[str, Any]:
        return {"_source": self._source, "options": self.options, "_user_key": self._user_key, "_start": self._start}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._start is not None:
            self._start = self._once(self._start)
        self._settle()

    def __repr__(self) -> str:
        return f"pf.torch({self.kind})"

    def _offers(self) -> frozenset[str]:
        words = {"params", "predict", "terms", "distill", "part"}
        if self.options.is_plain_sgd:
            words.add("sgd")
        if represented(self.resident.module, self.options.features) is not None:
            words.add("features")
        return frozenset(words)

    @property
    def settings(self) -> Mapping[str, str | float | int | bool]:
        """What the report says of the training."""
        own = self.options
        loss = own.loss if isinstance(own.loss, str) else getattr(own.loss, "__name__", type(own.loss).__name__)
        said: dict[str, str | float | int | bool] = {"loss": "by problem" if own.loss is None else loss}
        for group in own.groups:
            ending = f" ({group.prefix})" if group.prefix else ""
            said[f"optimizer{ending}"] = repr(group.optimizer)
            said[f"lr{ending}"] = group.lr
        said |= {"steps": own.steps} if own.steps is not None else {"epochs": own.epochs}
        said |= {"batch_size": own.batch_size, "shuffle": own.shuffle, "device": own.device}
        said |= {"own loop": getattr(own.train, "__name__", "yes")} if own.train is not None else {}
        return said | ({"clip_norm": own.clip_norm} if own.clip_norm is not None else {})

    def head(self, problem: Problem) -> Head:
        return Head(problem, self.options.loss, self.options.output, self.kind)

    # -------------------------------------------------------------- the contract
    def first(self, rows: Rows, env: Env) -> Tree:
        """The module's own weights, or those that its factory draws from the run's seed, whichever the client.

        Raises:
            DataError: the module cannot take these rows; layer and sizes are named.
            UsageError: its outputs are not those of the problem.
        """
        self.inputs(rows, env.problem)
        self.target(rows, env.problem)
        return self._first(env)

    def _first(self, env: Env) -> Tree:
        if self._start is not None:
            return self._start
        starts, key = self._source.starts, (env.seed, self.resident.spec.digest)
        if key not in starts:
            module = self._source.build(seed.integer(env.seed, "init", self.kind))
            starts.clear()  # one seed at a time is of use
            starts[key] = state_of(module, self.options.slots(module))
        return starts[key]

    def _load(self, start: tuple[Tree, ...], env: Env) -> None:
        state = self._first(env)
        for tree in start:
            state = state.overlay(tree)
        self.resident.load(state)

    def fit(self, request: Fit, rows: Rows, env: Env) -> Fitted:
        """Trains; the state returned has the spec of `first`.

        With a part, entries outside of it come back bit for bit, and modules whose whole state lies outside of it are in
        evaluation mode (their dropout is off, their statistics stand still).
        """
        rows = rows if request.rows is None else request.rows
        if not len(rows):
            raise DataError("there are no rows to train on")
        self.inputs(rows, env.problem)
        self._load(request.start, env)
        return Training(self, request, rows, env).run()

    def predict(self, request: Predict, rows: Rows, env: Env) -> Array:
        """(n, outputs) float32 logits or values, or (n, width) float32 features; always in batches of 256."""
        rows = rows if request.rows is None else request.rows
        inputs = self.inputs(rows, env.problem)
        self._load(request.start, env)
        self.resident.mode(training=False)
        answer = self._features if request.what == "features" else self._outputs
        with torch.no_grad(), seeded(env.integer("torch"), self.resident.device):
            found = [
                answer({name: x[at : at + PREDICTED_AT_ONCE].clone() for name, x in inputs.items()}, env.problem)
                for at in range(0, len(rows), PREDICTED_AT_ONCE)
            ]
        if not found:
            return np.zeros((0, env.problem.outputs), np.float32)
        return torch.cat(found).float().cpu().numpy()

    def _outputs(self, inputs: Mapping[str, Tensor], problem: Problem) -> Tensor:
        head = self.head(problem)
        return head.shaped(head.primary(self.resident.run(inputs)))

    def _features(self, inputs: Mapping[str, Tensor], problem: Problem) -> Tensor:
        del problem
        found: list[Tensor] = []
        with caught(self.resident.module, self.options.features, found):
            self.resident.run(inputs)
        return flattened(found)

    def export(self, state: Tree, rows: Rows, env: Env) -> nn.Module:
        """An ordinary module with this state, in evaluation mode; it shares no memory with anything here."""
        del rows
        return self.resident.export(self._first(env).overlay(state))

    # -------------------------------------------------------------- rows
    def inputs(self, rows: Rows, problem: Problem) -> Mapping[str, Tensor]:
        """Inputs in torch's own storage, made once and kept with the rows; every new shape of them is tried first."""
        resident = self.resident
        key = f"torch/inputs/{resident.float_dtype}/{resident.device}/{resident.channels_last}"
        found: Mapping[str, Tensor] | None = rows.cache.get(key)
        if found is None:
            found = rows.cache[key] = {name: _input(name, array, resident) for name, array in rows.inputs.items()}
        if len(rows) and resident.settle(found, self.head(problem).check, (problem, self.options.output)):
            return self.inputs(rows, problem)
        return found

    def target(self, rows: Rows, problem: Problem) -> Tensor | None:
        """The target in torch's own storage: (n,) class numbers, or (n, outputs) values."""
        key = f"torch/target/{self.resident.float_dtype}/{self.resident.device}/{problem.is_classification}"
        if key not in rows.cache:
            rows.cache[key] = _target(rows, problem, self.resident)
        found: Tensor | None = rows.cache[key]
        return found


_RESIDENTS: weakref.WeakValueDictionary[Hashable, Resident] = weakref.WeakValueDictionary()


def _resident(source: Source, options: Options, key: Hashable) -> Resident:
    """The resident module of this source (or of the user's key) and spec; made when it is first asked for."""
    slots = options.slots(source.template)
    digest = spec_of(source.template, slots).digest
    full = (source.token if key is None else ("key", key), digest, options.device, options.memory_format)
    held = _RESIDENTS.get(full)
    if held is None:
        held = Resident(source.template, slots, torch.device(options.device), options.memory_format)
        _RESIDENTS[full] = held
    return held


def _input(name: str, array: Array, resident: Resident) -> Tensor:
    if array.dtype.kind in "iu":
        return copied(array, resident.device, torch.int64)
    if array.dtype.kind not in "fb" and array.dtype.name != "bfloat16":
        raise DataError(f"the input {name!r} is {array.dtype}: {resident.kind} takes numbers; encode it before")
    found = copied(array, resident.device, resident.float_dtype)
    return found.contiguous(memory_format=torch.channels_last) if resident.channels_last and found.ndim == 4 else found


def _target(rows: Rows, problem: Problem, resident: Resident) -> Tensor | None:
    if rows.target is None:
        return None
    if not problem.is_classification:
        if rows.target.size != len(rows) * problem.outputs:
            raise DataError(f"the target has shape {rows.target.shape}, expected ({len(rows)}, {problem.outputs})")
        return copied(rows.target.reshape(len(rows), problem.outputs), resident.device, resident.float_dtype)
    if rows.target.dtype.kind not in "iu" or rows.target.ndim != 1:
        raise DataError(f"the target is {rows.target.dtype} of shape {rows.target.shape}, expected (n,) class numbers")
    if len(rows) and not 0 <= int(rows.target.min()) <= int(rows.target.max()) < problem.outputs:
        low, high = int(rows.target.min()), int(rows.target.max())
        raise DataError(f"the target has classes {low} to {high}, expected 0 to {problem.outputs - 1}")
    return copied(rows.target, resident.device, torch.int64)


def _row_target(name: str, array: Array, rows: int, resident: Resident) -> Tensor:
    if len(array) != rows:
        raise DataError(f"the request's target {name!r} has {len(array)} entries for {rows} rows")
    dtype = torch.int64 if array.dtype.kind in "iu" else resident.float_dtype
    return copied(array, resident.device, dtype)


def represented(module: nn.Module, features: str | None) -> tuple[nn.Module, bool] | None:
    """The submodule at which the representation is read, and whether it is its input; None if there is none.

    A named one's output; by default the output of the shared module of two, else the input of the last linear layer.
    """
    if features is not None:
        named = dict(module.named_modules())
        if features not in named:
            raise UsageError(f"{kind_of(module)} has no submodule {features!r} for features; it has {', '.join(named)}")
        return named[features], False
    if isinstance(module, Joined):
        return module.shared, False
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return (linear[-1], True) if linear else None


@contextmanager
def caught(module: nn.Module, features: str | None, into: list[Tensor]) -> Iterator[None]:
    """Appends the representation to `into` at every pass through the module."""
    place = represented(module, features)
    if place is None:
        raise UsageError(f'{kind_of(module)} has no linear layer to read features before; name one: features="..."')
    at, before = place

    def take(_: nn.Module, args: Any, output: Any = None) -> None:
        into.append(args[0] if before else output)

    handle = at.register_forward_pre_hook(take) if before else at.register_forward_hook(take)
    try:
        yield
    finally:
        handle.remove()


def flattened(found: list[Tensor]) -> Tensor:
    """The last representation that was caught, (batch, width); empties the list."""
    last = found[-1]
    found.clear()
    return last.flatten(1)
