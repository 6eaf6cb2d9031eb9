"""One file an algorithm, client and server side together. `REGISTRY` is what a manifest's name selects from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyfed.algorithms.distill import Distill
from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.feddf import FedDF
from polyfed.algorithms.fedmd import FedMD
from polyfed.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from polyfed.algorithms.fedprox import FedProx
from polyfed.algorithms.local import Local
from polyfed.core.algorithm import Algorithm

#: Every built-in algorithm by name. A site adds its own to a copy: ``{**REGISTRY, "Mine": Mine}``.
REGISTRY: Mapping[str, type[Algorithm]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (Distill, FedAdagrad, FedAdam, FedAvg, FedAvgM, FedDF, FedMD, FedProx, FedYogi, Local)
    }
)

__all__ = [
    "REGISTRY",
    "Distill",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedDF",
    "FedMD",
    "FedProx",
    "FedYogi",
    "Local",
]
