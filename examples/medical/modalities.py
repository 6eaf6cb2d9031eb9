"""One case seen by several devices: hospitals with an image only, a laboratory panel only, or both. A STAND-IN, see below.

No package ships paired medical images and laboratory values, so these are real, paired, and no patients: 2,000 handwritten
digits measured in six ways (UCI Multiple Features). "pix" (16 x 15 pixels) stands for the image, "mor" (6 measurements of
shape) for a weak panel, "zer" (47 moments) for a better one; the digit stands for the diagnosis.

    image ──> base (shared CNN) ──┐
                                  ├──> head (each hospital's own)
    panel ──> branch (personal) ──┘

300 public cases were examined with every device, and nobody says what they are: each hospital reads the view that it knows
and tells the others what it thinks (`pf.FedMD`); those that have images also average the encoder (``shared="base"``).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from figures import Figures, steps_a_round, table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

import polyfed as pf
from polyfed.data import LeakWarning
from polyfed.run.client import PreprocessingWarning

VIEWS: Mapping[str, tuple[str, ...]] = {
    "image-1": ("pix",),
    "image-2": ("pix",),
    "both": ("pix", "mor"),
    "panel-mor": ("mor",),
    "panel-zer": ("zer",),
}
WIDTH = {"mor": 6, "zer": 47}
PUBLIC = 300
SPLIT = pf.Split(validation=0.15, test=0.5)


class Encoder(nn.Module):
    """(n, 16, 15) pixels -> (n, 64); the part that hospitals with images share."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.out = nn.Linear(16 * 4 * 3, 64)

    def forward(self, image: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.fine(image[:, None])), 2)
        x = functional.max_pool2d(functional.relu(self.coarse(x)), 2)
        return functional.relu(self.out(x.flatten(1)))


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = Encoder(), nn.Linear(64, 10)

    def forward(self, pix: Tensor) -> Tensor:
        return self.head(self.base(pix))


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.branch = Encoder(), nn.Sequential(nn.Linear(WIDTH["mor"], 32), nn.ReLU())
        self.head = nn.Linear(64 + 32, 10)

    def forward(self, pix: Tensor, mor: Tensor) -> Tensor:
        return self.head(torch.cat([self.base(pix), self.branch(mor)], 1))


class Panel(nn.Module):
    def __init__(self, view: str) -> None:
        super().__init__()
        self.branch, self.head = nn.Sequential(nn.Linear(WIDTH[view], 64), nn.ReLU()), nn.Linear(64, 10)

    def forward(self, values: Tensor) -> Tensor:
        return self.head(self.branch(values))


NETS = {
    "image-1": Image,
    "image-2": Image,
    "both": Both,
    "panel-mor": partial(Panel, "mor"),
    "panel-zer": partial(Panel, "zer"),
}


@dataclass(frozen=True)
class Settings:
    """Chosen on validation rows of seeds 100 and 101."""

    rounds: int = 12
    epochs: int = 3
    digest: int = 3
    lr: float = 0.003
    batch: int = 32
    temperature: float = 2.0


DEFAULT, SMALL = Settings(), Settings(rounds=2, epochs=1, digest=1)


@cache
def cases() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """View -> (n, width), and (n,) digits: 1,994, as six of the 2,000 repeat another in every view."""
    data = pf.datasets.mfeat()
    first = np.sort(np.unique(data["pix"][0], axis=0, return_index=True)[1])
    inputs = {view: x[first] for view, (x, _) in data.items()}
    inputs["pix"] = (inputs["pix"] / 6).reshape(-1, 16, 15)
    return inputs, data["pix"][1][first]


def divided(seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Numbers of the public cases, and of each hospital's: 338 or 339, each case at one hospital."""
    order = np.random.default_rng(seed).permutation(len(cases()[1]))
    return order[:PUBLIC], dict(zip(VIEWS, np.array_split(order[PUBLIC:], len(VIEWS)), strict=True))


def clients(seed: int, settings: Settings, *, names: tuple[str, ...] = tuple(VIEWS)) -> list[pf.Client]:
    inputs, digit = cases()
    rows = divided(seed)[1]
    return [
        client_of(name, {view: inputs[view][rows[name]] for view in VIEWS[name]}, digit[rows[name]], SPLIT, settings)
        for name in names
    ]


def client_of(
    name: str, x: Mapping[str, np.ndarray], y: np.ndarray, split: pf.Split | pf.Parts, settings: Settings
) -> pf.Client:
    model = pf.torch(NETS[name], optimizer="adam", lr=settings.lr, epochs=settings.epochs, batch_size=settings.batch)
    scaled = {view: StandardScaler() for view in x if view != "pix"}
    # two digits may agree in six measurements of shape, and are two cases all the same
    alike = () if "pix" in x else ("overlap",)
    return pf.Client(name, model, data=(x, y), preprocess=scaled or None, split=split, consents=alike)


def public(seed: int) -> dict[str, np.ndarray]:
    """The public cases in every view; each hospital takes the inputs that it has."""
    rows = divided(seed)[0]
    return {view: cases()[0][view][rows] for view in ("pix", "mor", "zer")}


def federation(seed: int, settings: Settings) -> pf.FedMD:
    """What wavers counts less (``weighting="entropy"``): a weak panel knows when it does not know."""
    return pf.FedMD(
        public=public(seed),
        shared="base",
        digest=settings.digest,
        temperature=settings.temperature,
        weighting="entropy",
    )


def run(algorithm: pf.Algorithm, joining: list[pf.Client], rounds: int, seed: int) -> pf.Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeakWarning)  # as above: panels that agree
        # the hospital with both scales its panel too: only its own branch reads that, the shared base reads equal images
        warnings.simplefilter("ignore", PreprocessingWarning)
        result = pf.simulate(algorithm, joining, rounds=rounds, seed=seed, baselines=(), evaluate_every=0)
    assert result.is_complete, result.table()
    return result


def right(result: pf.Result) -> dict[str, float]:
    return {name: values["accuracy"] for name, values in result.test.items()}


METHODS = ("alone", "federated", "every label", "six views")


def measure(seed: int, *, small: bool = False) -> Figures:
    """Accuracy by hospital of `METHODS`.

    "alone" makes as many optimizer steps. "every label" is a panel's network with the true digit of every public and
    training case of all hospitals, in its own view: more than anybody could teach it. "six views" is the mean of six
    logistic regressions on all these cases, for a hospital that had every device.
    """
    settings = SMALL if small else DEFAULT
    joining = clients(seed, settings)
    federated = run(federation(seed, settings), joining, settings.rounds, seed)
    own = max(len(federated.population.parts[name].train) for name in VIEWS)
    steps = steps_a_round(
        own, PUBLIC, batch=settings.batch, epochs=settings.epochs, digest=settings.digest, rounds=settings.rounds
    )
    alone = run(pf.Local(steps=steps), joining, settings.rounds, seed)
    rows = divided(seed)[1]
    test = {name: rows[name][federated.population.parts[name].test] for name in VIEWS}
    known = np.concatenate([divided(seed)[0], *(rows[name][federated.population.parts[name].train] for name in VIEWS)])
    return {
        "alone": right(alone),
        "federated": right(federated),
        "every label": {n: every_label(n, known, test[n], seed, settings) for n in VIEWS if n.startswith("panel")},
        "six views": six_views(known, test),
    }


def every_label(name: str, known: np.ndarray, test: np.ndarray, seed: int, settings: Settings) -> float:
    (view,) = VIEWS[name]
    inputs, digit = cases()
    together = np.concatenate([known, test])
    split = pf.Parts(np.arange(len(known)), test=np.arange(len(known), len(together)))
    client = client_of(name, {view: inputs[view][together]}, digit[together], split, settings)
    return right(run(pf.Local(), [client], settings.rounds, seed))[name]


def six_views(known: np.ndarray, test: Mapping[str, np.ndarray]) -> dict[str, float]:
    inputs, digit = cases()
    flat = {view: x.reshape(len(x), -1) for view, x in inputs.items()}
    models = {
        view: make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3)).fit(x[known], digit[known])
        for view, x in flat.items()
    }
    found = {}
    for name, rows in test.items():
        said = np.mean([model.predict_proba(flat[view][rows]) for view, model in models.items()], axis=0)
        found[name] = float(np.mean(said.argmax(1) == digit[rows]))
    return found


def headroom(found: Figures, name: str) -> tuple[float, float]:
    """Parts of the way from alone to six views: what the federation gave, and the most that its own view allows."""
    begin, end = found["alone"][name], found["six views"][name]
    return (found["federated"][name] - begin) / (end - begin), (found["every label"][name] - begin) / (end - begin)


def show(seed: int, *, small: bool = False) -> str:
    found = measure(seed, small=small)
    lines = [table("accuracy", found, METHODS, mean=False), ""]
    for name in found["every label"]:
        given, most = headroom(found, name)
        lines.append(
            f"{name}: joining covers {given:.0%} of the way from alone to six views; every label, in its own view, {most:.0%}"
        )
    return "\n".join(lines)
