"""The classic picture, SYNTHETIC: an image of 28 x 28 under a shared convolutional encoder, genes under a personal branch.

    image (1, 28, 28) ──> base (shared): 16 filters, 128 features ──┐
                                                                    ├──> head (each hospital's own)
    genes (64) ──> branch (personal): 32 features ──────────────────┘

The pictures are handwritten digits and the genes are invented (`pf.datasets.paired_synthetic`): no package ships paired
medical images and genes. Two hospitals have images, one has genes, two have both, and there one of the two may be missing
when a patient comes: a missing input is all zeros, the network leaves its features out, and in training each is left out
of a quarter of the rows at random (modality dropout), so that the head has seen it happen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from figures import Figures, accuracy, answers, steps_a_round, table, test_rows
from torch import Tensor, nn
from torch.nn import functional

import polyfed as pf
from polyfed.data import Raw

HAS = {
    "image-1": ("image",),
    "image-2": ("image",),
    "genes": ("genes",),
    "both-1": ("image", "genes"),
    "both-2": ("image", "genes"),
}
GENES, CASES, PUBLIC = 64, 2000, 300
SPLIT = pf.Split(validation=0.15, test=0.5)


class Encoder(nn.Module):
    """(n, 1, 28, 28) -> (n, 128): the shared base."""

    def __init__(self) -> None:
        super().__init__()
        self.filters, self.out = nn.Conv2d(1, 16, 5, stride=2), nn.Linear(16 * 6 * 6, 128)

    def forward(self, image: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.filters(image)), 2)
        return functional.relu(self.out(x.flatten(1)))


class Branch(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(GENES, 32), nn.ReLU())


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = Encoder(), nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.base(image))


class Genes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.head = Branch(), nn.Linear(32, 10)

    def forward(self, genes: Tensor) -> Tensor:
        return self.head(self.branch(genes))


class Both(nn.Module):
    """Features of what is there; `drop` is the part of the training rows in which each input is left out."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.base, self.branch, self.head = Encoder(), Branch(), nn.Linear(128 + 32, 10)
        self.drop = drop

    def forward(self, image: Tensor, genes: Tensor) -> Tensor:
        there = torch.stack([image.flatten(1).any(1), genes.any(1)], 1).float()
        kept = there * (functional.dropout(torch.ones_like(there), self.drop, self.training) > 0)
        kept = torch.where(kept.any(1, keepdim=True), kept, there)  # never both
        features = [self.base(image) * kept[:, :1], self.branch(genes) * kept[:, 1:]]
        return self.head(torch.cat(features, 1))


@dataclass(frozen=True)
class Settings:
    """Chosen on validation rows of seeds 100 and 101."""

    rounds: int = 12
    epochs: int = 3
    digest: int = 2
    lr: float = 0.002
    batch: int = 32
    drop: float = 0.25


DEFAULT, SMALL = Settings(), Settings(rounds=2, epochs=1, digest=1)


def clients(seed: int, settings: Settings) -> tuple[list[pf.Client], Raw]:
    """Five hospitals with 340 cases each, and 300 public cases with both inputs and without the class."""
    cases = pf.datasets.paired_synthetic(CASES, genes=GENES, seed=seed)
    order = np.random.default_rng(seed).permutation(CASES)
    joining = []
    for (name, inputs), rows in zip(HAS.items(), np.array_split(order[PUBLIC:], len(HAS)), strict=True):
        kinds = {"image": Image, "genes": Genes}
        net = partial(Both, settings.drop) if len(inputs) == 2 else kinds[inputs[0]]
        model = pf.torch(net, optimizer="adam", lr=settings.lr, epochs=settings.epochs, batch_size=settings.batch)
        joining.append(pf.Client(name, model, data=cases.only(*inputs).take(rows), split=SPLIT))
    return joining, cases.take(order[:PUBLIC]).unlabelled()


METHODS = (
    "alone",
    "federated",
    "image missing",
    "genes missing",
    "image missing, no dropout",
    "genes missing, no dropout",
)


def measure(seed: int, *, small: bool = False) -> Figures:
    """Accuracy by hospital of `METHODS`; "alone" makes as many optimizer steps, the last four are federated."""
    settings = SMALL if small else DEFAULT
    result = federated(seed, settings)
    train = max(len(parts.train) for parts in result.population.parts.values())
    steps = steps_a_round(
        train, PUBLIC, batch=settings.batch, epochs=settings.epochs, digest=settings.digest, rounds=settings.rounds
    )
    alone = run(pf.Local(steps=steps), clients(seed, settings)[0], settings.rounds, seed)
    found = {"alone": right(alone), "federated": right(result), **missing(result)}
    without = missing(federated(seed, replace(settings, drop=0.0)))
    return found | {f"{name}, no dropout": values for name, values in without.items()}


def federated(seed: int, settings: Settings) -> pf.Result:
    joining, public = clients(seed, settings)
    algorithm = pf.FedMD(public=public, shared="base", digest=settings.digest, weighting="entropy")
    return run(algorithm, joining, settings.rounds, seed)


def run(algorithm: pf.Algorithm, joining: list[pf.Client], rounds: int, seed: int) -> pf.Result:
    result = pf.simulate(algorithm, joining, rounds=rounds, seed=seed, baselines=(), evaluate_every=0)
    assert result.is_complete, result.table()
    return result


def right(result: pf.Result) -> dict[str, float]:
    return {name: values["accuracy"] for name, values in result.test.items()}


def missing(result: pf.Result) -> Figures:
    """What the hospitals with both reach when one input is zeros."""
    names = np.array([int(name) for name in result.population.problem.classes])
    found: Figures = {}
    for gone in ("image", "genes"):
        found[f"{gone} missing"] = {}
        for name in (name for name, inputs in HAS.items() if len(inputs) == 2):
            raw = test_rows(result, name)
            without = Raw({**raw.inputs, gone: np.zeros_like(raw.inputs[gone])})
            found[f"{gone} missing"][name] = accuracy(answers(result, name, without), names, raw.target)
    return found


def show(seed: int, *, small: bool = False) -> str:
    return table("accuracy", measure(seed, small=small), METHODS, mean=False)
