"""One file an algorithm, client and server side together. `REGISTRY` is what a manifest's name selects from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from polyfed.algorithms.apfl import APFL
from polyfed.algorithms.distill import Distill
from polyfed.algorithms.ditto import Ditto
from polyfed.algorithms.fedavg import FedAvg
from polyfed.algorithms.fedbabu import FedBABU
from polyfed.algorithms.fedbn import FedBN
from polyfed.algorithms.feddf import FedDF
from polyfed.algorithms.fedmd import FedMD
from polyfed.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from polyfed.algorithms.fedper import FedPer
from polyfed.algorithms.fedprox import FedProx
from polyfed.algorithms.fedrep import FedRep
from polyfed.algorithms.local import Local
from polyfed.algorithms.pfedme import PFedMe
from polyfed.core.algorithm import Algorithm

__all__ = [
    "APFL",
    "REGISTRY",
    "Distill",
    "Ditto",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBABU",
    "FedBN",
    "FedDF",
    "FedMD",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedYogi",
    "Local",
    "PFedMe",
    "table",
]

#: Every built-in algorithm by name: the classes of `__all__`. A site adds its own to a copy: ``{**REGISTRY, "Mine": Mine}``.
REGISTRY: Mapping[str, type[Algorithm]] = MappingProxyType(
    {name: kind for name in __all__ if isinstance(kind := globals().get(name), type)}
)


def table() -> str:
    """Each method by each kind of model, and what it asks of a federation: a Markdown table, made from the code."""
    from polyfed.algorithms import methods  # only where it is asked for

    return methods.table()
