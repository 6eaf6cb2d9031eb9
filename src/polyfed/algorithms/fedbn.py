"""FedAvg that leaves every client its own normalisation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from polyfed.algorithms.fedavg import FedAvg
from polyfed.core.algorithm import Env
from polyfed.core.errors import UsageError
from polyfed.core.message import State
from polyfed.core.tree import part_of


@dataclass(frozen=True)
class FedBN(FedAvg):
    """FedAvg of everything but normalisation layers: scale, shift and statistics of those are each client's own.

    Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR 2021, algorithm 1.
    For clients whose inputs differ in scale or look (another scanner, another lens).

    A normalisation layer is one that has statistics, which the adapters tell by the type of the layer. Its name says
    nothing: ``downsample.1`` and the third layer of a Sequential are found, a linear layer called "bn" is not.

    Wire: as FedAvg, without those layers; no "stats" at all. Memory: the layers' parameters, statistics and buffers.
    Invariants: 40, 52.

    Trap: a layer that keeps no statistics (LayerNorm, GroupNorm, BatchNorm with track_running_stats=False) is shared.
    There is no model that all share: `Result.model` says so; take a client's.

    >>> sorted(FedBN().shared_names(["conv.weight", "layer.1.weight", "stats:layer.1/mean", "stats:layer.1/variance"]))
    ['conv.weight']
    """

    def shared_names(self, names: Collection[str]) -> set[str]:
        layers = {_layer(name) for name in names if part_of(name) == "stats"}
        return {name for name in super().shared_names(names) if _layer(name) not in layers}

    def init(self, env: Env) -> State:
        """FedAvg's.

        Raises:
            UsageError: no client's model has a normalisation layer.
        """
        if env.first and not any(part_of(name) == "stats" for group in env.first for name in env.whole(group)):
            raise UsageError(
                f"FedBN keeps normalisation layers private, and no model here has one that keeps statistics "
                f"({', '.join(group or 'the model' for group in env.first)}); use FedAvg"
            )
        return super().init(env)


def _layer(name: str) -> str:
    """The path of the layer that holds an entry.

    >>> _layer("stats:down.1/mean"), _layer("down.1.weight"), _layer("block/norm/gamma")
    ('down.1', 'down.1', 'block/norm')
    """
    local = name if part_of(name) == "params" else name.partition(":")[2]
    return local[: max(local.rfind("."), local.rfind("/"), 0)]
