"""`polyfed.torch`: a PyTorch module as a participant's model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from polyfed.core.errors import MissingExtraError, UsageError

try:
    from torch import nn
except ImportError as error:
    raise MissingExtraError("torch", "torch") from error

from polyfed.models.torch_losses import CLASS_LOSSES, VALUE_LOSSES, Loss
from polyfed.models.torch_model import Batch, Group, Hook, Options, TorchModel, Training, represented
from polyfed.models.torch_optimizers import BY_NAME, SGD, Adam, AdamW, Custom, Optimizer
from polyfed.models.torch_resident import MemoryFormat

__all__ = ["SGD", "Adam", "AdamW", "Batch", "TorchModel", "Training", "torch"]

Factory = Callable[[], nn.Module]
OptimizerLike = str | Optimizer | Callable[[Any], Any]


def torch(
    module: nn.Module | Factory | None = None,
    *,
    shared: nn.Module | Factory | None = None,
    personal: nn.Module | Factory | None = None,
    loss: str | Loss | None = None,
    optimizer: OptimizerLike | Mapping[str, OptimizerLike] = "sgd",
    lr: float | Mapping[str, float] | None = None,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int = 32,
    shuffle: bool = True,
    features: str | None = None,
    output: str | None = None,
    train: Hook | None = None,
    device: str = "cpu",
    memory_format: MemoryFormat = "auto",
    key: Hashable = None,
    keep_optimizer: bool = False,
    clip_norm: float | None = None,
) -> TorchModel:
    """Wraps a module; no training loop is needed for the usual cases.

    >>> from torch import nn
    >>> model = torch(nn.Linear(4, 3), optimizer="adam", lr=0.01, epochs=2)
    >>> model.kind, sorted(model.offers)
    ('Linear', ['distill', 'features', 'params', 'part', 'predict', 'terms'])

    Args:
        module: an nn.Module, which is copied and whose weights are the start; or a factory without arguments, whose
            weights are drawn from the run's seed: two clients with one factory start equal.
        shared: the first of two modules that make one model, personal(shared(x)); its names begin with "shared.".
        personal: the second one; its names begin with "personal.".
        loss: "cross_entropy", "bce" (one logit, or two), "mse", "mae", "huber"; or a function (outputs, target) ->
            scalar, given what the module returns and class numbers, or values, both (batch, outputs); by default
            cross entropy for classes and mse for values.
        optimizer: "sgd", "adam", "adamw"; `SGD`, `Adam`, `AdamW` with their settings; a callable from parameters to
            a torch.optim.Optimizer, which brings its own learning rate; or a mapping from name prefix to one of these.
        lr: learning rate, one or by name prefix; by default 0.05 for SGD and 0.001 for Adam.
        epochs: passes over the rows in a fit.
        steps: optimizer steps instead, cycling over the rows.
        batch_size: rows a step; the last batch of an epoch may be smaller, see `Training.batches`.
        shuffle: a new order each epoch; False keeps the stored one.
        features: the submodule whose output is the representation; by default the input of the last linear layer, or
            with two modules the output of the shared one.
        output: the named output that predicts, of a module that returns a dict; by default "shared", or the first.
        train: your own loop, ``def train(training: Training)``; terms, part, budget, order and seeds still hold.
        device: where the tensors live, such as "cuda:0".
        memory_format: "auto" is channels_last for a model with convolutions over images that can take it.
        key: says that modules from different factories are of one architecture.
        keep_optimizer: the optimizer goes on where it was: what it remembers is part of the state (as "buffers:",
            never averaged); by default each fit starts with a fresh one.
        clip_norm: bound of the joint L2 norm of each step's gradients.

    Torch runs one thread a call in a process that uses this adapter: more of them change bits and seldom gain.

    Raises:
        UsageError: an argument cannot be used; the message says what to write instead.
    """
    parts = _parts(module, shared, personal)
    _checked(loss, epochs, steps, batch_size, clip_norm, memory_format)
    options = Options(
        groups=_groups(optimizer, lr),
        loss=loss,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        shuffle=shuffle,
        features=features,
        output=output,
        train=train,
        device=device,
        memory_format=memory_format,
        keep_optimizer=keep_optimizer,
        clip_norm=clip_norm,
    )
    if keep_optimizer and any(isinstance(group.optimizer, Custom) for group in options.groups):
        raise UsageError("keep_optimizer=True needs one of polyfed's optimizers: what another remembers is not known")
    if keep_optimizer and train is not None:
        raise UsageError("keep_optimizer=True has no effect on a loop of your own; leave one of the two out")
    model = TorchModel(parts, options, key)
    for name, parameter in model.resident.params.items():
        if parameter.requires_grad:
            options.group(name)
    represented(model.resident.module, features)
    return model


def _parts(module: Any, shared: Any, personal: Any) -> dict[str, Any]:
    given = {"module": module} if shared is None and personal is None else {"shared": shared, "personal": personal}
    if len(given) == 2 and module is not None:
        raise UsageError("give one module, or shared= and personal=, not both")
    for name, part in given.items():
        if part is None:
            raise UsageError(f"{name} is missing: give one module, or both shared= and personal=")
        if not isinstance(part, nn.Module) and not callable(part):
            raise UsageError(
                f"{name} is a {type(part).__name__}, expected a torch.nn.Module or a function that makes one"
            )
    return given


def _checked(loss: Any, epochs: Any, steps: Any, batch_size: Any, clip_norm: float | None, memory_format: str) -> None:
    names = (*CLASS_LOSSES, *VALUE_LOSSES)
    if loss is not None and not callable(loss) and loss not in names:
        raise UsageError(f"loss is {loss!r}, expected one of {', '.join(names)}, or a function (outputs, target)")
    for name, value, least in (("epochs", epochs, 0), ("steps", steps, 1), ("batch_size", batch_size, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"{name} is {value!r}, expected a whole number of at least {least}")
    if clip_norm is not None and not 0 < clip_norm < float("inf"):
        raise UsageError(f"clip_norm is {clip_norm!r}, expected a number above 0")
    if memory_format not in ("auto", "contiguous", "channels_last"):
        raise UsageError(f'memory_format is {memory_format!r}, expected "auto", "contiguous" or "channels_last"')


def _groups(optimizer: Any, lr: Any) -> tuple[Group, ...]:
    """One group a prefix; the prefixes are those of the optimizers, of the rates, or of both."""
    optimizers = dict(optimizer) if isinstance(optimizer, Mapping) else {}
    rates = dict(lr) if isinstance(lr, Mapping) else {}
    prefixes = list(dict.fromkeys([*optimizers, *rates])) or [""]
    if missing := [p for p in prefixes if (optimizers and p not in optimizers) or (rates and p not in rates)]:
        raise UsageError(f"optimizer and lr must name the same prefixes; {missing[0]!r} is in one of them only")
    return tuple(_group(p, optimizers.get(p, optimizer), rates.get(p, lr)) for p in prefixes)


def _group(prefix: str, optimizer: Any, lr: Any) -> Group:
    found = BY_NAME.get(optimizer) if isinstance(optimizer, str) else optimizer
    if found is None:
        raise UsageError(f"optimizer is {optimizer!r}, expected one of {', '.join(BY_NAME)}, or an optimizer itself")
    if not isinstance(found, (SGD, Adam)):
        if not callable(found):
            raise UsageError(f"optimizer is a {type(found).__name__}, expected a name, SGD, Adam, AdamW, or a callable")
        found = Custom(found)
    rate = found.rate if lr is None else lr
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < float("inf"):
        raise UsageError(f"lr is {lr!r}, expected a number of at least 0")
    return Group(prefix, found, float(rate))
