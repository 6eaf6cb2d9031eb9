"""Digits of three shapes: clients that cannot even share an input layer; see README.md beside this file.

python examples/digits/run.py [--small] [--seed N] [--seeds N]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor, nn

import polyfed as pf

WIDTH = 32  # of every network's representation, so that one head fits them all
SPLIT = pf.Split(validation=0.0, test=0.8)


@dataclass(frozen=True)
class Size:
    """How much of everything; `public` and `rows` are numbers of images, `rows` a site's with its test rows."""

    rounds: int = 10
    public: int = 400
    rows: int = 400
    student: int = 3  # its epochs a round


SMALL = Size(rounds=2, public=100, rows=150, student=1)


# ------------------------------------------------------------------------------------------ one shape into another


@dataclass(frozen=True)
class Resized:
    """What every site does to images of any shape: cut to the ink, then each new pixel is the mean of the area it covers."""

    height: int
    width: int

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return np.stack([self.one(image) for image in images])

    def one(self, image: np.ndarray) -> np.ndarray:
        inked = np.argwhere(image > INK)
        if len(inked):
            (top, left), (bottom, right) = inked.min(0), inked.max(0) + 1
            image = image[top:bottom, left:right]
        rows, columns = (overlap(old, new) for old, new in zip(image.shape, (self.height, self.width), strict=True))
        return (rows @ image @ columns.T).astype(np.float32)


INK = 0.2  # of white


def overlap(old: int, new: int) -> np.ndarray:
    """(new, old): the share that each old pixel of a line has in each new one; rows sum to 1."""
    edges = np.linspace(0, old, new + 1)
    low, high = edges[:-1, None], edges[1:, None]
    pixel = np.arange(old)
    shared = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None)
    return shared / shared.sum(1, keepdims=True)


# ------------------------------------------------------------------------------------------ networks


class Pixels(nn.Module):
    """8 x 8: a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x))


class Lines(nn.Module):
    """16 x 15: a GRU reads the picture line by line."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.ModuleDict({"read": nn.GRU(15, 64, batch_first=True), "say": nn.Linear(64, WIDTH)})
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.base["say"](self.base["read"](x)[1][0])))


class Image(nn.Module):
    """28 x 28: a CNN."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.base = nn.Sequential(
            nn.Unflatten(1, (1, 28)),
            nn.Conv2d(1, channels, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * 49, WIDTH),
            nn.ReLU(),
        )
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x))


def wide() -> nn.Module:
    return Image(16)


def perceptron():
    import keras  # here, after polyfed has chosen Keras's backend

    return keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)])


ADAM = {"optimizer": "adam", "lr": 0.002, "epochs": 3, "batch_size": 16}
SITES = {  # site -> its images, their shape, its model
    "optdigits-a": ("optdigits", (8, 8), lambda: pf.torch(Pixels, **ADAM)),
    "optdigits-b": ("optdigits", (8, 8), lambda: pf.sklearn(RandomForestClassifier(100))),
    "mfeat-a": ("mfeat", (16, 15), lambda: pf.torch(Lines, **ADAM)),
    "mfeat-b": ("mfeat", (16, 15), lambda: pf.keras(perceptron, **ADAM)),
    "mnist-a": ("mnist", (28, 28), lambda: pf.torch(Image, **ADAM)),
    "mnist-b": ("mnist", (28, 28), lambda: pf.torch(wide, **ADAM)),
}
SAME_HEAD = ("optdigits-a", "mfeat-a", "mnist-a", "mnist-b")  # one form of head


def everybody(size: Size, seed: int) -> tuple[list[pf.Client], np.ndarray, np.ndarray]:
    """The six clients, no image at two of them; public images, 28 x 28, that none of them has; and what those show."""
    digits = {name: apart(*rows) for name, rows in pf.datasets.digits().items()}
    order = {name: np.random.default_rng(seed).permutation(len(y)) for name, (_, y) in digits.items()}
    public, truth = (values[order["mnist"][: size.public]] for values in digits["mnist"])
    used, clients = {"mnist": size.public}, []
    for site, (name, shape, model) in SITES.items():
        begin = used.get(name, 0)
        used[name] = begin + size.rows
        x, y = (values[order[name][begin : used[name]]] for values in digits[name])
        clients.append(pf.Client(site, model(), data=(x, y), split=SPLIT, preprocess=Resized(*shape)))
    return clients, public, truth


def apart(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without the images that equal an earlier one: a few of mfeat's, whose pixels have seven values, do."""
    first = np.sort(np.unique(x.reshape(len(x), -1), axis=0, return_index=True)[1])
    return x[first], y[first]


# ------------------------------------------------------------------------------------------ the comparison


def compare(size: Size, seed: int) -> dict[str, dict[str, float]]:
    """Way -> client -> accuracy on the client's own test rows; "abroad": of who trained alone, on the public images."""
    clients, public, truth = everybody(size, seed)

    def run(algorithm: pf.Algorithm, members: list[pf.Client] = clients) -> pf.Result:
        return pf.simulate(algorithm, members, rounds=size.rounds, seed=seed, evaluate_every=0, baselines=())

    # clients of Distill without digest= learn nothing from one another: they are what each is alone
    student = pf.torch(Image, optimizer="adam", lr=0.002)
    taught = run(pf.Distill(student=student, preprocess=Resized(28, 28), public=public, epochs=size.student))
    runs = {
        "alone": taught,
        "LG-FedAvg": run(pf.FedAvg(shared="head"), [client for client in clients if client.name in SAME_HEAD]),
        "FedMD": run(pf.FedMD(public=public, digest=2)),
        "FedMD+head": run(pf.FedMD(public=public, digest=2, shared="head")),
    }
    found = {way: {name: scores["accuracy"] for name, scores in made.test.items()} for way, made in runs.items()}
    asked = {"ensemble": taught.ensemble().predict, "student": lambda x: by_student(taught, x)}
    for way, predict in asked.items():
        found[way] = {name: score(predict, taught, name) for name in SITES}
    votes = taught.ensemble().votes(public)
    found["abroad"] = {name: float(np.mean(votes[name].argmax(1) == truth)) for name in SITES}
    return found


def by_student(result: pf.Result, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return result.student(torch.from_numpy(Resized(28, 28)(x))).numpy().argmax(1)


def score(predict, result: pf.Result, name: str) -> float:
    raw, parts = result.population.raws[name], result.population.parts[name]
    rows = raw.take(parts.test)
    return float(np.mean(predict(rows.inputs["x"]) == rows.target))


def show(found: dict[str, dict[str, float]]) -> None:
    print(f"{'accuracy':<14}" + "".join(f"{way:>12}" for way in found))
    for name in SITES:
        print(f"{name:<14}" + "".join(f"{of[name]:12.3f}" if name in of else f"{'-':>12}" for of in found.values()))
    means = (f"{np.mean(list(of.values())):12.3f}" if len(of) == len(SITES) else f"{'-':>12}" for of in found.values())
    print(f"{'mean':<14}" + "".join(means))  # not of LG-FedAvg, which is over other sites than the rest
    alone = found["alone"]
    gains = (np.mean([of[name] - alone[name] for name in of]) for of in found.values())
    print(f"{'above alone':<14}" + "".join(f"{gain:+12.3f}" for gain in gains))


def main() -> None:
    parser = argparse.ArgumentParser(description="digits of three shapes")
    parser.add_argument("--small", action="store_true", help="that it runs, not how well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="so many, from --seed on; the last table is their mean")
    asked = parser.parse_args()
    begin, each = time.monotonic(), []
    for seed in range(asked.seed, asked.seed + asked.seeds):
        each.append(compare(SMALL if asked.small else Size(), seed))
        show(each[-1])
    if len(each) > 1:
        print(f"\nmean of {len(each)} seeds")
        show({w: {n: float(np.mean([one[w][n] for one in each])) for n in of} for w, of in each[0].items()})
    print(f"\n{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
