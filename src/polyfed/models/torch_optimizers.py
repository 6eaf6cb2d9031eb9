"""SGD, Adam and AdamW in place over lists of tensors, equal to torch's own.

torch.optim is not used unless a user asks for it: making its first optimizer imports torch._dynamo and sympy, 1.9 CPU
seconds in every process, as much as torch itself; and an object a client costs more than the update of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import _foreach_add as foreach_add  # the underscored names are what torch.optim itself is written with
from torch import _foreach_sqrt as foreach_sqrt

# What torch.autograd.grad calls after its checks.
run_backward = torch.autograd.Variable._execution_engine.run_backward  # noqa: SLF001  # no public name reaches it
Update = Callable[[Sequence[Tensor | None]], None]
Memory = Mapping[str, Sequence[Tensor]]  # slot -> one tensor a parameter


class Optimizer(Protocol):
    """How gradients become steps. Optimizers hold numbers only; what they remember lives in `Memory`."""

    @property
    def rate(self) -> float:
        """The learning rate where none is given."""
        ...

    @property
    def is_plain(self) -> bool:
        """A step is the learning rate times the gradient, nothing else."""
        ...

    @property
    def slots(self) -> Mapping[str, bool]:
        """What is remembered of each parameter: name -> True for a tensor like it, False for one whole number."""
        ...

    def start(self, params: Sequence[Tensor], lr: float, memory: Memory) -> Update:
        """The update of these parameters in place; it takes one gradient a parameter, None where one has none."""
        ...


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with (Nesterov) momentum and L2 weight decay, as torch.optim.SGD without dampening."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    @property
    def rate(self) -> float:
        return 0.05

    @property
    def is_plain(self) -> bool:
        return not self.momentum

    @property
    def slots(self) -> Mapping[str, bool]:
        return {"momentum": True} if self.momentum else {}

    def start(self, params: Sequence[Tensor], lr: float, memory: Memory) -> Update:
        velocity = memory.get("momentum", ())

        def update(grads: Sequence[Tensor | None]) -> None:
            p, g, v = _used(grads, params, velocity)
            if self.weight_decay:
                g = foreach_add(g, p, alpha=self.weight_decay)
            if self.momentum:
                torch._foreach_mul_(v, self.momentum)
                torch._foreach_add_(v, g)
                g = foreach_add(g, v, alpha=self.momentum) if self.nesterov else v
            torch._foreach_add_(p, g, alpha=-lr)

        return update


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1); weight decay is added to the gradient, as in torch.optim.Adam."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @property
    def rate(self) -> float:
        return 0.001

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def slots(self) -> Mapping[str, bool]:
        return {"first": True, "second": True, "steps": False}

    def start(self, params: Sequence[Tensor], lr: float, memory: Memory) -> Update:
        def update(grads: Sequence[Tensor | None]) -> None:
            p, g, first, second, steps = _used(grads, params, memory["first"], memory["second"], memory["steps"])
            self._move(p, g, first, second, steps, lr)

        return update

    def _move(self, p: Any, g: Any, first: Any, second: Any, steps: Any, lr: float) -> None:
        if self.weight_decay:
            g = self._decay(p, g, lr)
        one, two = self.betas
        torch._foreach_add_(steps, 1)
        done = [int(step) for step in steps]
        torch._foreach_lerp_(first, g, 1 - one)
        torch._foreach_mul_(second, two)
        torch._foreach_addcmul_(second, g, g, 1 - two)
        size = foreach_sqrt(second)
        torch._foreach_div_(size, [(1 - two**k) ** 0.5 for k in done])
        torch._foreach_add_(size, self.eps)
        torch._foreach_addcdiv_(p, first, size, [-lr / (1 - one**k) for k in done])

    def _decay(self, p: Any, g: Any, lr: float) -> Any:
        del lr
        return foreach_add(g, p, alpha=self.weight_decay)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), as torch.optim.AdamW."""

    weight_decay: float = 0.01

    def _decay(self, p: Any, g: Any, lr: float) -> Any:
        torch._foreach_mul_(p, 1 - lr * self.weight_decay)
        return g


@dataclass(frozen=True)
class Custom:
    """A user's own: a callable from parameters to a torch.optim.Optimizer, which brings its own learning rate."""

    build: Callable[[Sequence[Tensor]], Any]

    @property
    def rate(self) -> float:
        return 0.0

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def slots(self) -> Mapping[str, bool]:
        return {}

    def start(self, params: Sequence[Tensor], lr: float, memory: Memory) -> Update:
        del lr, memory
        optimizer = self.build(params)

        def update(grads: Sequence[Tensor | None]) -> None:
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()
            for p in params:
                p.grad = None

        return update


BY_NAME: Mapping[str, Optimizer] = {"sgd": SGD(), "adam": Adam(), "adamw": AdamW()}


def blank(optimizer: Optimizer, params: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The memory of an optimizer that has made no step yet."""
    return {
        slot: [torch.zeros_like(p) if alike else torch.zeros((), dtype=torch.int64) for p in params]
        for slot, alike in optimizer.slots.items()
    }


def gradients(loss: Tensor, params: tuple[Tensor, ...]) -> Sequence[Tensor | None]:
    """Gradients of a scalar, None for a parameter that it does not depend on: torch.autograd.grad without its checks.

    The checks take 25 of the 105 microseconds of a small model's backward pass. A test holds the two equal.
    """
    if not loss.requires_grad:
        return [None] * len(params)
    found: Sequence[Tensor | None] = run_backward(
        (loss,), (torch.ones_like(loss),), False, False, params, allow_unreachable=True, accumulate_grad=False
    )
    return found


def clip(grads: Sequence[Tensor | None], bound: float) -> None:
    """Scales gradients in place to a joint L2 norm of at most `bound`."""
    found = [g for g in grads if g is not None]
    if not found:
        return
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in found]))
    torch._foreach_mul_(found, torch.clamp(bound / (norm + 1e-6), max=1.0))


def _used(grads: Sequence[Tensor | None], params: Sequence[Tensor], *memory: Sequence[Tensor]) -> Any:
    """Parameters, gradients and memories of those that have a gradient."""
    for g in grads:
        if g is None:
            break
    else:
        return params, grads, *memory
    at = [i for i, g in enumerate(grads) if g is not None]
    return [params[i] for i in at], [grads[i] for i in at], *([m[i] for i in at] if m else () for m in memory)
