"""One fit: batches, budget, callbacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from polyfed.core.algorithm import Env, Fit
from polyfed.core.errors import DataError, UsageError
from polyfed.core.rows import Rows
from polyfed.core.tree import Array
from polyfed.models.keras_backend import as_numpy, is_jax, library, rows_at, tensor_of
from polyfed.models.keras_resident import Options, Resident
from polyfed.models.keras_source import rate_of

Batch = tuple[Any, Mapping[str, Any], Any]


class Training:
    """One fit: its batches, budget and seeds, for Keras's own way of training or for a loop of the user's own.

        def train(training):
            for batch in training.batches():
                training.step(batch)

    Attributes:
        model: the Keras model; its `compute_loss` is the sum of the request's terms on the batch at hand.
        lr: learning rate at the start.
        steps: the budget.
        steps_done: batches taken so far.
    """

    def __init__(self, resident: Resident, rows: Rows, request: Fit, env: Env, options: Options) -> None:
        self.model, self.options = resident.model, options
        self._resident, self._rows, self._env = resident, rows, env
        self._columns = resident.columns(rows, request.targets)
        self._weights = weights_of(options.fit, request, rows)
        steps = request.steps if request.steps is not None else (options.steps if request.epochs is None else None)
        self._sizes = sizes_of(len(rows), options.batch_size, resident)
        each = len(self._sizes)
        epochs = options.epochs if request.epochs is None else request.epochs
        self.steps = steps if steps is not None else epochs * each
        self._epochs = -(-self.steps // each)
        self.lr = rate_of(self.model.optimizer)
        self.steps_done = 0
        self._logs: Mapping[str, Any] = {}

    def batches(self) -> Iterator[Batch]:
        """(x, columns, sample weight) of each step: ``columns["y"]`` are the targets, ``columns["t:..."]`` the request's.

        The last batch of an epoch may be smaller. With batch normalisation a last batch of one row joins the one before
        it; where there is none before it, `DataError` is raised.
        """
        for order in self._orders():
            yield from self._cut(order)

    def loss(self, batch: Batch) -> Any:
        """The sum of the terms on a batch, from a forward pass in training mode; for loops that step by themselves.

        Raises:
            UsageError: on jax, which cannot differentiate it.
        """
        x, columns, weight = batch
        if is_jax():
            raise UsageError(
                f"{self._env.client}: jax differentiates functions of values, and training.loss reads the model's own "
                "variables; call training.step(batch), or take the torch or tensorflow backend"
            )
        self._resident.plan.columns = columns
        own = self._resident.encoded(columns["y"]) if "y" in columns else None
        return self.model.compute_loss(x, own, self.model(x, training=True), weight)

    def step(self, batch: Batch) -> Mapping[str, Any]:
        """One optimizer step on a batch by the model's own `train_step`; returns Keras's logs."""
        self._logs = self._resident.train(*batch)
        if self.options.train is not None:
            self._resident.sync()  # the user's loop may look at the model
        if not self._resident.plan.losses:
            raise UsageError(
                f"{self._env.client}: {type(self.model).__name__}.train_step does not call self.compute_loss(...), so "
                "no term can be added to its loss; call it there"
            )
        return self._logs

    def run(self) -> None:
        """Epochs and steps as `keras.Model.fit` does them, with its callbacks."""
        callbacks = self._callbacks()
        self.model.stop_training = False
        callbacks.on_train_begin()
        for epoch, order in enumerate(self._orders()):
            self.model.reset_metrics()
            callbacks.on_epoch_begin(epoch)
            for place, batch in enumerate(self._cut(order)):
                callbacks.on_train_batch_begin(place)
                callbacks.on_train_batch_end(place, self.step(batch))
                if self.model.stop_training:
                    break
            self._resident.sync()
            callbacks.on_epoch_end(epoch, self.metrics() if callbacks.callbacks else {})
            if self.model.stop_training:
                break
        callbacks.on_train_end(self.metrics() if callbacks.callbacks else {})

    def metrics(self) -> dict[str, float]:
        """Keras's metrics of the last epoch; "loss" is the mean of the sum of the terms."""
        return {name: float(as_numpy(value)) for name, value in self._logs.items()}

    def _orders(self) -> Iterator[Array]:
        rng, n = self._env.rng("order"), len(self._rows)
        for _ in range(self._epochs):
            yield rng.permutation(n) if self.options.shuffle else np.arange(n)

    def _cut(self, order: Array) -> Iterator[Batch]:
        """The batches of one epoch, until the budget is spent."""
        for begin, size in zip(accumulate(self._sizes, initial=0), self._sizes, strict=False):
            if self.steps_done >= self.steps:
                return
            index = order[begin : begin + size]
            at = tensor_of(index)
            columns = {name: rows_at(value, at) for name, value in self._columns.items()}
            weight = None if self._weights is None else rows_at(self._weights, at)
            self.steps_done += 1
            yield self._resident.inputs(self._rows, index), columns, weight

    def _callbacks(self) -> Any:
        given = self.options.fit.get("callbacks") or []
        return library().callbacks.CallbackList(
            list(given) if isinstance(given, Sequence) else [given],
            add_history=False,
            add_progbar=False,
            model=self.model,
            verbose=0,
            epochs=self._epochs,
            steps=len(self._sizes),
        )


def sizes_of(rows: int, batch_size: int, resident: Resident) -> list[int]:
    """Rows of each batch of an epoch; raises `DataError` where batch normalisation would see one row at a time."""
    sizes = [min(batch_size, rows - begin) for begin in range(0, rows, batch_size)]
    if not sizes or min(sizes) > 1 or not resident.normalises_batches:
        return sizes
    if batch_size == 1 or len(sizes) == 1:
        raise DataError(
            f"{type(resident.model).__name__} normalises over the batch, and one row has no spread; it has {rows} training "
            f"row{'s' * (rows != 1)} and batch_size={batch_size}: give it batches of two rows at least, or a net without "
            "batch normalisation"
        )
    return [*sizes[:-2], sizes[-2] + 1]


def weights_of(given: Mapping[str, Any], request: Fit, rows: Rows) -> Any:
    """One weight a row from class_weight and sample_weight, or None."""
    weights: Array | None = None
    if (own := given.get("sample_weight")) is not None and request.rows is None:
        weights = np.asarray(own, np.float32)
        if weights.shape != (len(rows),):
            raise UsageError(f"sample_weight has shape {list(weights.shape)}, the client has {len(rows)} training rows")
    if (classes := given.get("class_weight")) and rows.target is not None:
        table = np.array([float(classes.get(int(c), 1.0)) for c in rows.target], np.float32)
        weights = table if weights is None else weights * table
    return None if weights is None else tensor_of(weights)
