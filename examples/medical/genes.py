"""Breast cancer at two hospitals with unlike gene panels: a shared encoder over what both measure, a personal branch for the rest.

Real patients and real genes: 139 in Amsterdam (70 genes, "nki") and 189 of the TRANSBIG series (76 probes, "transbig");
has the cancer spread within five years? In common are five inputs: age, oestrogen receptor, grade, size above 2 cm, and one
gene, CCNE2. Each cohort standardises them by its own patients: one counts log ratios, the other log2 intensities.

    common (5) ──> base (shared) ──────┐
                                       ├──> head (personal)
    own genes ──> branch (personal) ───┘

The files are GPL and no part of polyfed: ``pip install --no-deps oncodatasets scikit-survival``, of which nothing is imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from figures import Figures, answers, table, test_rows
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import polyfed as pf
from polyfed.core.metrics import auc
from polyfed.data import folds
from polyfed.models.torch import AdamW
from polyfed.run.client import PreprocessingWarning

COHORTS = ("nki", "transbig")
FOLDS = 4
GRADE = {"well": 0.0, "intermediate": 1.0, "poor": 2.0}


@dataclass(frozen=True)
class Settings:
    """Chosen on folds within training rows, seeds 100 to 102; training alone has the same."""

    hidden: int = 16
    dropout: float = 0.5
    lr: float = 0.003
    decay: float = 3.0
    rounds: int = 25
    epochs: int = 2


DEFAULT, SMALL = Settings(), Settings(rounds=1)
METHODS = ("linear, common", "linear, all", "alone", "federated")

Cut = Mapping[str, pf.Parts]


@cache
def cohort(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs "common" (n, 5) and "own" (n, its other columns) float32 with gaps, and whether the cancer spread."""
    table = pf.datasets.breast()[name]
    target = table.pop("metastasis").to_numpy()
    table["grade"] = table["grade"].map(GRADE)
    common = table[list(pf.datasets.BREAST_COMMON)].astype("float32").to_numpy()
    own = table.drop(columns=list(pf.datasets.BREAST_COMMON)).astype("float32").to_numpy()
    return {"common": common, "own": own}, target


class Net(nn.Module):
    """Both cohorts' network: the width of `branch` differs, `base` does not."""

    def __init__(self, own: int, settings: Settings) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(5, settings.hidden), nn.Tanh())
        self.branch = nn.Sequential(nn.Dropout(settings.dropout), nn.Linear(own, settings.hidden), nn.Tanh())
        self.head = nn.Linear(2 * settings.hidden, 2)

    def forward(self, common: Tensor, own: Tensor) -> Tensor:
        return self.head(torch.cat([self.base(common), self.branch(own)], 1))


def cuts(seed: int) -> list[Cut]:
    """Each cohort's patients in four folds, by outcome: every patient is scored by models that never saw him or her."""
    tested = {name: folds(cohort(name)[1].astype(int), FOLDS, seed=seed) for name in COHORTS}
    everybody = {name: np.arange(len(cohort(name)[1])) for name in COHORTS}
    return [
        {name: pf.Parts(np.setdiff1d(everybody[name], tested[name][k]), test=tested[name][k]) for name in COHORTS}
        for k in range(FOLDS)
    ]


def filled() -> Pipeline:
    return make_pipeline(SimpleImputer(), StandardScaler())


def clients(cut: Cut, settings: Settings) -> list[pf.Client]:
    joining = []
    for name in COHORTS:
        data = cohort(name)
        net = partial(Net, data[0]["own"].shape[1], settings)
        optimizer = AdamW(weight_decay=settings.decay)
        model = pf.torch(net, optimizer=optimizer, lr=settings.lr, epochs=settings.epochs)
        preprocess = {"common": filled(), "own": filled()}
        joining.append(pf.Client(name, model, data=data, preprocess=preprocess, split=cut[name]))
    return joining


Scores = dict[str, tuple[np.ndarray, np.ndarray]]  # cohort -> scores and outcomes of one fold's test patients


def network(algorithm: pf.Algorithm, cut: Cut, settings: Settings, seed: int) -> Scores:
    with warnings.catch_warnings():
        # polyfed says that "own" means other genes at each cohort: so it is, and only the personal branch reads it
        warnings.simplefilter("ignore", PreprocessingWarning)
        result = pf.simulate(
            algorithm,
            clients(cut, settings),
            rounds=settings.rounds,
            seed=seed,
            baselines=(),
            evaluate_every=0,
            test=False,
        )
    assert result.is_complete, result.table()
    return {name: (answers(result, name)[:, 1], test_rows(result, name).target) for name in COHORTS}


def linear(inputs: Sequence[str], cut: Cut) -> Scores:
    """Each cohort's own logistic regression; it cannot be pooled, as the panels are unlike."""
    found = {}
    for name, parts in cut.items():
        x, y = cohort(name)
        both = np.concatenate([x[key] for key in inputs], axis=1)
        model = make_pipeline(filled(), LogisticRegression(C=0.05, max_iter=500)).fit(both[parts.train], y[parts.train])
        found[name] = (model.predict_proba(both[parts.test])[:, 1], y[parts.test])
    return found


def measure(seed: int, *, small: bool = False) -> Figures:
    """AUC by cohort of `METHODS`: the scores of all four folds together; both networks make equally many steps."""
    settings = SMALL if small else DEFAULT
    shared = pf.FedPer(shared="base", weighting="uniform")
    by_fold: dict[str, list[Scores]] = {method: [] for method in METHODS}
    for cut in cuts(seed):
        by_fold["linear, common"].append(linear(("common",), cut))
        by_fold["linear, all"].append(linear(("common", "own"), cut))
        by_fold["alone"].append(network(pf.Local(), cut, settings, seed))
        by_fold["federated"].append(network(shared, cut, settings, seed))
    return {method: {name: together(scores, name) for name in COHORTS} for method, scores in by_fold.items()}


def together(scores: Sequence[Scores], name: str) -> float:
    return auc(np.concatenate([fold[name][0] for fold in scores]), np.concatenate([fold[name][1] for fold in scores]))


def show(seed: int, *, small: bool = False) -> str:
    return table("AUC, spread within 5 years", measure(seed, small=small), METHODS)
