"""Mixed frameworks: what changes for the others when one client trains the Keras twin of its network in place of the torch one.

    python benchmarks/frameworks.py [--json] [--quick]

Digits (scikit-learn, 8x8): six clients, Dirichlet(0.5), a network of 64-32-10, the same in torch and Keras: equal start
weights, plain SGD 0.1, two epochs a round in batches of 16 in the same orders; 10 rounds. The first client is swapped,
the others' data, split and settings stay. Two ways to work together, in each of which all six depend on one another:

    FedMD: 300 public rows; only predictions travel, so a twin needs nothing in common with the others' parameters.
    FedAvg: parameters have to have the names and shapes that the others' have. torch.nn.Linear and keras.layers.Dense have
        neither ("0.weight" of (out, in), "dense/kernel" of (in, out)) and are refused, which is measured too; the torch
        network is therefore written here with Keras's names and layout.

Change: mean over the other clients of |accuracy after the swap - before|, on each one's own test rows. Seed noise: the
standard deviation of a client's accuracy over seeds, mean over the other clients, all in torch; who has which rows does
not change between seeds, only starts and orders. The figure is change / noise. Losses on test rows, which are finer than
accuracies, are compared in the same way. To see that the figure can be large: FedMD with a first client, in torch, that has
other start weights ("other").
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "torch")

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import bench
import numpy as np
import seeds
from sklearn.datasets import load_digits

import polyfed as pf
from polyfed.core.errors import SpecError
from polyfed.core.tree import Array

SEEDS = range(6)
CLIENTS, PUBLIC, ROUNDS, WIDTHS = 6, 300, 10, (64, 32, 10)
SETTINGS: dict[str, Any] = {"lr": 0.1, "epochs": 2, "batch_size": 16}
METRICS = ("accuracy", "loss")

# ------------------------------------------------------------------------------------------ one network, three times


def weights(seed: int, who: int) -> list[Array]:
    """Kernels (in, out) and biases, Glorot uniform."""
    rng, found = np.random.default_rng([seed, who, 7]), []
    for into, out in pairwise(WIDTHS):
        bound = np.sqrt(6 / (into + out))
        found += [rng.uniform(-bound, bound, (into, out)).astype(np.float32), np.zeros(out, np.float32)]
    return found


def torch_plain(arrays: list[Array]) -> Any:
    """As one writes it in torch."""
    import torch
    from torch import nn

    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    with torch.no_grad():
        for parameter, array in zip(net.parameters(), arrays, strict=True):
            parameter.copy_(torch.from_numpy(array.T.copy()))
    return pf.torch(net, **SETTINGS)


def torch_by_keras_names(arrays: list[Array]) -> Any:
    """The same network with the names and layout of Keras."""
    import torch
    from torch import nn

    names = ("dense/kernel", "dense/bias", "dense_1/kernel", "dense_1/bias")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, array in zip(names, arrays, strict=True):
                self.register_parameter(name, nn.Parameter(torch.from_numpy(array.copy())))

        def forward(self, x: Any) -> Any:
            first, shift, second, last = (getattr(self, name) for name in names)
            return torch.relu(x @ first + shift) @ second + last

    return pf.torch(Net(), **SETTINGS)


def keras_twin(arrays: list[Array]) -> Any:
    import keras

    net = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(10)])
    net.set_weights(arrays)
    return pf.keras(net, **SETTINGS)


# ------------------------------------------------------------------------------------------ one seed


def rows() -> tuple[Array, list[tuple[Array, Array]]]:
    """Public rows and each client's; the same in every seed."""
    x, y = load_digits(return_X_y=True)
    x, order = (x / 16).astype(np.float32), np.random.default_rng(0).permutation(len(y))
    public, rest = x[order[:PUBLIC]], order[PUBLIC:]
    held = pf.data.dirichlet(y[rest], clients=CLIENTS, alpha=0.5, min_rows=60, seed=0)
    return public, [(x[rest[mine]], y[rest[mine]]) for mine in held.values()]


def parts(count: int, who: int) -> pf.Parts:
    """A third are test rows; the same in every seed."""
    order = np.random.default_rng([who, 3]).permutation(count)
    return pf.Parts(order[count // 3 :], test=order[: count // 3])


def run(algorithm: pf.Algorithm, models: list[Any], seed: int) -> Mapping[str, Mapping[str, float]]:
    """Client -> metrics on its own test rows."""
    clients = [
        pf.Client(f"c{i}", model, data, split=parts(len(data[1]), i))
        for i, (model, data) in enumerate(zip(models, rows()[1], strict=True))
    ]
    return pf.simulate(algorithm, clients, rounds=ROUNDS, seed=seed, evaluate_every=0, baselines=()).test


def of_seed(seed: int) -> seeds.Figures:
    """Both ways to work together, before and after the swap: what a worker does."""
    found: seeds.Figures = {}
    for name, algorithm, network in (
        ("FedMD", pf.FedMD(public=rows()[0], digest=2), torch_plain),
        ("FedAvg", pf.FedAvg(), torch_by_keras_names),
    ):
        start = [weights(seed, i if name == "FedMD" else 0) for i in range(CLIENTS)]
        before = [network(arrays) for arrays in start]
        firsts = {"torch": before[0], "keras": keras_twin(start[0]), "other": network(weights(seed, CLIENTS))}
        for which, first in firsts.items():
            if which == "other" and name == "FedAvg":
                continue  # all start from what the server has, the first client's weights
            test = run(algorithm, [first, *before[1:]], seed)
            found |= {f"{name}, {which}: {who} {m}": test[who][m] for who in test for m in METRICS}
    return found | {"FedAvg of Linear and Dense is refused": float(is_refused(seed))}


def is_refused(seed: int) -> bool:
    arrays = weights(seed, 0)
    try:
        run(pf.FedAvg(), [keras_twin(arrays), *(torch_plain(arrays) for _ in range(CLIENTS - 1))], seed)
    except SpecError:
        return True
    return False


# ------------------------------------------------------------------------------------------ what it says


def change(found: seeds.Found, way: str, metric: str, which: str = "keras") -> np.ndarray:
    """(seeds,) mean over the other clients of how much the swap changed."""
    gaps = [np.abs(found[f"{way}, {which}: c{i} {metric}"] - found[f"{way}, torch: c{i} {metric}"]) for i in OTHERS]
    return np.asarray(np.mean(gaps, 0))


def noise(found: seeds.Found, way: str, metric: str) -> float:
    return float(np.mean([found[f"{way}, torch: c{i} {metric}"].std(ddof=1) for i in OTHERS]))


OTHERS = range(1, CLIENTS)
WAYS = ("FedAvg", "FedMD")


def table(found: seeds.Found) -> str:
    lines = [f"{'the other clients':<26}{'before':>9}{'change':>11}{'largest':>11}{'seed noise':>12}"]
    for way, which in (("FedAvg", "keras"), ("FedMD", "keras"), ("FedMD", "other")):
        for metric in METRICS:
            before = np.mean([found[f"{way}, torch: c{i} {metric}"] for i in OTHERS])
            moved = change(found, way, metric, which)
            text = f"{before:>9.4f}{moved.mean():>11.2e}{moved.max():>11.2e}{noise(found, way, metric):>12.4f}"
            lines.append(f"{f'{way}, {which}, {metric}':<26}{text}")
    return "\n".join(lines)


def judged(found: seeds.Found, prefix: str) -> list[bench.Result]:
    results = [
        bench.Result(f"{prefix}.refused", found["FedAvg of Linear and Dense is refused"].mean(), "of the seeds"),
    ]
    other = change(found, "FedMD", "accuracy", "other") / noise(found, "FedMD", "accuracy")
    results.append(seeds.mean(f"{prefix}.fedmd.other", other, "of the seed noise"))
    for metric in reversed(METRICS):
        for way in WAYS:
            ratio = change(found, way, metric) / noise(found, way, metric)
            results.append(seeds.mean(f"{prefix}.{way.lower()}.{metric}", ratio, "of the seed noise"))
    return results


if __name__ == "__main__":
    seeds.main(__doc__, "frameworks", of_seed, judged, table, SEEDS)
