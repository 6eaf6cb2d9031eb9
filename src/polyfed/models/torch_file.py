"""PyTorch modules out of files that hold data only: the state travels, the user's code makes the module."""

from __future__ import annotations

import torch
from torch import nn

from polyfed.core.errors import SpecError
from polyfed.core.tree import Tree, part_of
from polyfed.models.torch_resident import copied, kind_of, spec_of, tensors_of


def into_module(state: Tree, module: nn.Module) -> nn.Module:
    """Puts a saved state into a module of the same architecture, in place; returns it in evaluation mode.

    A kept optimizer's memory in the state is passed over: it is no part of a module.

    Raises:
        SpecError: names, shapes or dtypes differ; names the first entries.
    """
    wanted = spec_of(module, {})
    held = state.without(name for name in state if name not in wanted and _is_optimizers(name, state))
    if difference := held.spec.difference(wanted):
        raise SpecError(f"the saved state does not fit this {kind_of(module)}: {difference}")
    with torch.no_grad():
        for name, tensor in tensors_of(module, {}).items():
            tensor.copy_(copied(held[name], tensor.device, tensor.dtype))
    return module.eval()


def _is_optimizers(name: str, state: Tree) -> bool:
    """Whether an entry is an optimizer's: it lies under a parameter, as "buffers:<parameter>/<slot>"."""
    return part_of(name) == "buffers" and name.partition(":")[2].rpartition("/")[0] in state
