"""Federated learning for participants who differ: models, frameworks, data and machines in one federation.

A first run needs five names: `Client`, an algorithm such as `FedMD`, `simulate`, the `Result` it returns, and one of
`torch`, `keras` and `sklearn`, which wrap a model of that framework.

    import polyfed as pf

    clients = [
        pf.Client("north", pf.torch(net), data=(x_north, y_north)),
        pf.Client("south", pf.sklearn(RandomForestClassifier()), data=(x_south, y_south)),
    ]
    result = pf.simulate(pf.FedMD(public=x_public), clients, rounds=10)
    print(result.table())

Importing the package imports numpy and nothing of a framework; each name is looked up when it is first used. Keras takes
its backend when it is first imported, and by default it is TensorFlow: where only torch is installed and nobody has chosen
(``KERAS_BACKEND``, or a keras.json), this import chooses torch, so that ``import keras`` may stand after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: public name -> module that defines it
_HOME = {
    "Algorithm": "polyfed.core.algorithm",
    "APFL": "polyfed.algorithms",
    "Available": "polyfed.core.select",
    "All": "polyfed.core.select",
    "Buffered": "polyfed.core.schedule",
    "Client": "polyfed.run.client",
    "Converged": "polyfed.core.stop",
    "Distill": "polyfed.algorithms",
    "Ditto": "polyfed.algorithms",
    "Diverged": "polyfed.core.stop",
    "FedAdagrad": "polyfed.algorithms",
    "FedAdam": "polyfed.algorithms",
    "FedAvg": "polyfed.algorithms",
    "FedAvgM": "polyfed.algorithms",
    "FedBABU": "polyfed.algorithms",
    "FedBN": "polyfed.algorithms",
    "FedDF": "polyfed.algorithms",
    "FedMD": "polyfed.algorithms",
    "FedPer": "polyfed.algorithms",
    "FedProx": "polyfed.algorithms",
    "FedRep": "polyfed.algorithms",
    "FedYogi": "polyfed.algorithms",
    "Local": "polyfed.algorithms",
    "Message": "polyfed.core.message",
    "NoImprovement": "polyfed.core.stop",
    "Parts": "polyfed.data",
    "PFedMe": "polyfed.algorithms",
    "PolyfedError": "polyfed.core.errors",
    "Result": "polyfed.run.result",
    "Rounds": "polyfed.core.stop",
    "Split": "polyfed.data",
    "Sync": "polyfed.core.schedule",
    "Target": "polyfed.core.stop",
    "TimeBudget": "polyfed.core.stop",
    "Tree": "polyfed.core.tree",
    "Uniform": "polyfed.core.select",
    "UpdatePolicy": "polyfed.core.aggregate",
    "federated_transform": "polyfed.run.transform",
    "join": "polyfed.run.join",
    "keras": "polyfed.models.keras",
    "load": "polyfed.run.files",
    "rounds": "polyfed.run.simulate",
    "serve": "polyfed.run.serve",
    "simulate": "polyfed.run.simulate",
    "sklearn": "polyfed.models.sklearn",
    "tabular": "polyfed.data",
    "torch": "polyfed.models.torch",
}
_RENAMED = {"rounds": "open_rounds"}
_MODULES = {
    "algorithms": "polyfed.algorithms",
    "checks": "polyfed.run.checks",
    "data": "polyfed.data",
    "datasets": "polyfed.data.datasets",
    "errors": "polyfed.core.errors",
    "losses": "polyfed.models.losses",
}

__all__ = sorted([*_HOME, *_MODULES])  # noqa: PLE0605  # a list, made from the table above


def __getattr__(name: str) -> Any:
    from importlib import import_module  # import time counts here

    if name in _MODULES:
        value: Any = import_module(_MODULES[name])
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), _RENAMED.get(name, name))
    else:
        raise AttributeError(f"module 'polyfed' has no attribute {name!r}")
    globals()[name] = value
    return value


def _choose_keras_backend() -> None:
    """Sets KERAS_BACKEND=torch where Keras would look for a TensorFlow that is not there; looks up, imports nothing."""
    import os
    import sys
    from importlib.util import find_spec

    if "keras" in sys.modules or "KERAS_BACKEND" in os.environ:
        return
    home = os.environ.get("KERAS_HOME") or os.path.join(os.path.expanduser("~"), ".keras")  # noqa: PTH111, PTH118  # pathlib costs import time
    if os.path.exists(os.path.join(home, "keras.json")):  # noqa: PTH110, PTH118  # as above
        return
    if not _is_there("tensorflow", find_spec) and _is_there("torch", find_spec):
        os.environ["KERAS_BACKEND"] = "torch"


def _is_there(name: str, find_spec: Any) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a stand-in in sys.modules that has no spec
        return False


def _one_thread() -> None:
    """TensorFlow and jax read these when they first compute: more threads round otherwise, so bits would follow the machine."""
    import os

    for name in ("TF_NUM_INTRAOP_THREADS", "PJRT_NPROC"):
        os.environ.setdefault(name, "1")


_choose_keras_backend()
_one_thread()


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if TYPE_CHECKING:
    from polyfed import algorithms as algorithms
    from polyfed import data as data
    from polyfed.algorithms import APFL as APFL
    from polyfed.algorithms import Distill as Distill
    from polyfed.algorithms import Ditto as Ditto
    from polyfed.algorithms import FedAdagrad as FedAdagrad
    from polyfed.algorithms import FedAdam as FedAdam
    from polyfed.algorithms import FedAvg as FedAvg
    from polyfed.algorithms import FedAvgM as FedAvgM
    from polyfed.algorithms import FedBABU as FedBABU
    from polyfed.algorithms import FedBN as FedBN
    from polyfed.algorithms import FedDF as FedDF
    from polyfed.algorithms import FedMD as FedMD
    from polyfed.algorithms import FedPer as FedPer
    from polyfed.algorithms import FedProx as FedProx
    from polyfed.algorithms import FedRep as FedRep
    from polyfed.algorithms import FedYogi as FedYogi
    from polyfed.algorithms import Local as Local
    from polyfed.algorithms import PFedMe as PFedMe
    from polyfed.core import errors as errors
    from polyfed.core.aggregate import UpdatePolicy as UpdatePolicy
    from polyfed.core.algorithm import Algorithm as Algorithm
    from polyfed.core.errors import PolyfedError as PolyfedError
    from polyfed.core.message import Message as Message
    from polyfed.core.schedule import Buffered as Buffered
    from polyfed.core.schedule import Sync as Sync
    from polyfed.core.select import All as All
    from polyfed.core.select import Available as Available
    from polyfed.core.select import Uniform as Uniform
    from polyfed.core.stop import Converged as Converged
    from polyfed.core.stop import Diverged as Diverged
    from polyfed.core.stop import NoImprovement as NoImprovement
    from polyfed.core.stop import Rounds as Rounds
    from polyfed.core.stop import Target as Target
    from polyfed.core.stop import TimeBudget as TimeBudget
    from polyfed.core.tree import Tree as Tree
    from polyfed.data import Parts as Parts
    from polyfed.data import Split as Split
    from polyfed.data import datasets as datasets
    from polyfed.data import tabular as tabular
    from polyfed.models import losses as losses
    from polyfed.models.keras import keras as keras
    from polyfed.models.sklearn import sklearn as sklearn
    from polyfed.models.torch import torch as torch
    from polyfed.run import checks as checks
    from polyfed.run.client import Client as Client
    from polyfed.run.files import load as load
    from polyfed.run.join import join as join
    from polyfed.run.result import Result as Result
    from polyfed.run.serve import serve as serve
    from polyfed.run.simulate import open_rounds
    from polyfed.run.simulate import simulate as simulate
    from polyfed.run.transform import federated_transform as federated_transform

    rounds = open_rounds
