"""Four hospitals with four different models learn to recognise heart disease together: the recipe of demo and benchmark.

Cleveland, Hungary, Switzerland and VA Long Beach (`polyfed.datasets.heart`, 918 patients) each keep their own columns,
their own preprocessing and another kind of model; they learn from one another by distillation (`FedMD`). What they
look at together is one of two things:

- mode "rows": each hospital sets aside some of its training rows and shares them without the diagnosis;
- mode "statistics": no row leaves a hospital. Each sends statistics per class with small cells suppressed
  (`polyfed.data.public_statistics`); the rows that all look at are drawn from their sums.

How the settings were chosen, and what they reach: docs/decisions/009-hospitals.md, benchmarks/hospitals.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from polyfed import data as tables
from polyfed.algorithms import FedMD
from polyfed.core.errors import MissingExtraError, UsageError
from polyfed.core.message import Message
from polyfed.core.protocols import Model
from polyfed.core.tree import Array
from polyfed.data import Parts, Raw, Split
from polyfed.data.datasets import heart
from polyfed.run.client import Client

Mode = Literal["rows", "statistics"]

SITES = ("cleveland", "hungary", "switzerland", "va")
TARGET = "disease"
#: Share of a hospital's rows that it sets aside in mode "rows".
PUBLIC = 0.15
#: Columns that a model sees.
WIDTH = 40
#: Columns that a hospital hardly ever measures: more than 80 % missing.
UNMEASURED = {"cleveland": (), "hungary": ("ca", "thal"), "switzerland": ("chol", "ca"), "va": ("ca", "thal")}


@dataclass(frozen=True)
class Settings:
    """What was chosen by inner folds. A model trained alone has the same `hidden` to `leaf`.

    Attributes:
        hidden, lr, decay, epochs, batch_size: of both networks; `epochs` is a round's.
        c: inverse strength of the logistic regression's L2.
        trees, leaf: of the forest: how many, and rows in a leaf.
        rounds: of the federation; the consensus is known from the second on.
        temperature, digest: of the distillation: see `FedMD`.
        soft_weight: of a shared row against a hospital's own one, for the two models without gradient steps.
        drawn: rows that are drawn in mode "statistics".
    """

    hidden: int = 16
    lr: float = 0.003
    decay: float = 1.0
    epochs: int = 8
    batch_size: int = 32
    c: float = 0.2
    trees: int = 100
    leaf: int = 5
    rounds: int = 3
    temperature: float = 1.0
    digest: int = 8
    soft_weight: float = 1.0
    drawn: int = 400


DEFAULT = Settings()
ROUNDS = DEFAULT.rounds


def clients(
    seed: int = 0,
    *,
    rotation: int = 0,
    public: float = PUBLIC,
    parts: Mapping[str, Parts] | None = None,
    mode: Mode = "rows",
    settings: Settings = DEFAULT,
    split: Split | None = None,
) -> tuple[FedMD, list[Client]]:
    """The algorithm and its four clients, for ``pf.simulate(algorithm, clients, rounds=hospitals.ROUNDS, seed=seed)``.

    Args:
        seed: of the division of the rows; give the same one to `simulate`.
        rotation: 0 to 3: which hospital has which model; the four make a Latin square.
        public: share of a hospital's rows that it sets aside in mode "rows".
        parts: hospital -> its rows' division, which `split` and `public` would make otherwise.
        mode: "rows" or "statistics": see the head of this file.
        settings: hyper-parameters.
        split: fractions of validation and test rows; a tenth and a quarter by default.

    Raises:
        MissingExtraError: pandas, torch, keras or scikit-learn is not installed.
    """
    if mode not in ("rows", "statistics"):
        raise UsageError(f"mode={mode!r} is unknown; use 'rows' or 'statistics'")
    rows = {name: frame_rows(name) for name in SITES}
    aside = public if mode == "rows" else 0.0
    wish = Split(validation=0.1, test=0.25) if split is None else split
    wish = Split(wish.validation, wish.test, aside, wish.by, wish.gap)
    if parts is None:
        parts = {name: tables.divide(name, rows[name], wish, seed=seed) for name in SITES}
    made = models(rotation, settings)
    joining = [
        Client(name, made[name], data=rows[name], preprocess=preprocessing(name), split=parts[name]) for name in SITES
    ]
    shared = drawn_rows(rows, parts, settings.drawn, seed=seed) if mode == "statistics" else None
    return FedMD(shared, temperature=settings.temperature, digest=settings.digest), joining


def frame_rows(name: str) -> Raw:
    """A hospital's rows with their target."""
    return tables.read(name, heart()[name], target=TARGET)


def preprocessing(name: str) -> Any:
    """Each hospital's own: other columns, other ways to fill gaps and to scale."""
    options: Mapping[str, Mapping[str, Any]] = {
        "cleveland": {"numbers": "median", "indicators": False},
        "hungary": {"numbers": "mean", "text": "missing"},
        "switzerland": {"numbers": "median", "text": "most_frequent"},
        "va": {"numbers": "mean", "text": "missing", "indicators": False},
    }
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer

    return make_pipeline(tables.tabular(**options[name], drop=UNMEASURED[name]), FunctionTransformer(widened))


def widened(x: Array) -> Array:
    """(n, WIDTH): zero columns on the right, so that a rare category in or out of a part changes no network's shape."""
    return np.pad(x, ((0, 0), (0, WIDTH - x.shape[1])))


def models(rotation: int, settings: Settings = DEFAULT) -> dict[str, Model]:
    """Hospital -> its model: the four kinds, moved on by `rotation` places."""
    return {name: MODELS[(i + rotation) % len(MODELS)](settings) for i, name in enumerate(SITES)}


def torch_network(settings: Settings) -> Model:
    """A PyTorch network of one hidden layer."""
    from polyfed.models.torch import AdamW, torch

    try:
        from torch import nn
    except ImportError:
        raise MissingExtraError("torch", "torch") from None

    def network() -> Any:
        return nn.Sequential(nn.Linear(WIDTH, settings.hidden), nn.Tanh(), nn.Linear(settings.hidden, 2))

    return torch(
        network,
        optimizer=AdamW(weight_decay=settings.decay),
        lr=settings.lr,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
    )


def keras_network(settings: Settings) -> Model:
    """A Keras network of one hidden layer."""
    from polyfed.models.keras import keras as wrap
    from polyfed.models.keras_backend import library

    keras = library()

    def network() -> Any:
        layers = keras.layers
        return keras.Sequential([layers.Dense(settings.hidden, activation="tanh"), layers.Dense(2)])

    return wrap(
        network,
        optimizer=keras.optimizers.AdamW(learning_rate=settings.lr, weight_decay=settings.decay),
        loss="cross_entropy",
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        outputs="logits",
    )


def logistic(settings: Settings) -> Model:
    from sklearn.linear_model import LogisticRegression

    from polyfed.models.sklearn import sklearn

    return sklearn(LogisticRegression(C=settings.c, max_iter=500), soft_weight=settings.soft_weight)


def forest(settings: Settings) -> Model:
    from sklearn.ensemble import RandomForestClassifier

    from polyfed.models.sklearn import sklearn

    made = RandomForestClassifier(settings.trees, min_samples_leaf=settings.leaf)
    return sklearn(made, soft_weight=settings.soft_weight)


MODELS: tuple[Callable[[Settings], Model], ...] = (torch_network, keras_network, logistic, forest)


def site_statistics(rows: Mapping[str, Raw], parts: Mapping[str, Parts]) -> dict[str, Message]:
    """Hospital -> what it sends in mode "statistics" before round 1: of its training rows, cells of 5 patients or more."""
    problem = tables.problem_of({name: raw.target for name, raw in rows.items() if raw.target is not None})
    return {name: tables.public_statistics(rows[name].take(parts[name].train), problem) for name in rows}


def drawn_rows(rows: Mapping[str, Raw], parts: Mapping[str, Parts], count: int, *, seed: int) -> Any:
    """The rows that all hospitals look at in mode "statistics", a DataFrame: no patient's."""
    messages = list(site_statistics(rows, parts).values())
    return tables.generate_public(tables.merge_statistics(messages), count, seed=seed).x
