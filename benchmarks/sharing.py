"""A shared base under personal heads against one model for all: two classes a client, and five clinics.

    python benchmarks/sharing.py [--json] [--quick]

Fashion-MNIST, pathological: 20 clients with 160 rows of two classes each, a quarter of them test rows of the same two
classes; a small CNN, its last layer the head; 20 rounds of one epoch (SGD 0.05, batches of 20), every client in every
round. The figure is the mean over clients of the accuracy on each one's own test rows, after the last round. Two classes
are an easy task for who trains alone, so "alone" stands beside; so do FedAvg with three times the rounds, and FedAvg whose
result each client tunes for five epochs. FedBN is compared with FedAvg of the same network with batch normalisation.

Thyroid records of five clinics, "any diagnosis": every row is scored by models that never saw it (four folds a clinic,
stratified), the scores of a clinic's four folds make one AUC; the figure is the mean over clinics. Inputs are 28 numbers
with gaps filled and standardised by `pf.federated_transform` on training rows, the same for every method. "linear" is
scikit-learn's logistic regression, alone in each clinic, or pooled: fit on all clinics' rows at one place. The network has
32 hidden units; the linear base has 16 and no activation, so that base and head together are linear. 15 rounds of an epoch.

Test rows decide nothing: rates and rounds were set once, before any method was compared.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import warnings
from collections import OrderedDict
from dataclasses import replace
from functools import cache
from typing import Any

import bench
import numpy as np
import seeds
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import polyfed as pf
from polyfed.core.algorithm import Predict
from polyfed.core.metrics import auc
from polyfed.core.tree import Array
from polyfed.data import LeakWarning
from polyfed.run.client import first_env

SEEDS = range(4)
CLIENTS, ROWS, ROUNDS, LONGER = 20, 160, 20, 3
TUNED = 5  # epochs, in FedBABU's fine-tuning and after FedAvg
FOLDS, CLINIC_ROUNDS = 4, 15
OPTIONS: dict[str, Any] = {"evaluate_every": 0, "baselines": ()}

# ------------------------------------------------------------------------------------------ two classes a client


def cnn(*, normalised: bool = False) -> Any:
    from torch import nn

    def norm(width: int) -> list[Any]:
        return [nn.BatchNorm2d(width)] if normalised else []

    first = [nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 8, 5, stride=2, padding=2), *norm(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, stride=2, padding=1), *norm(16), nn.ReLU()]
    base = nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(784, 64), nn.ReLU())
    return nn.Sequential(OrderedDict(base=base, head=nn.Linear(64, 10)))


def normalised_cnn() -> Any:
    return cnn(normalised=True)


def methods() -> dict[str, pf.Algorithm]:
    return {
        "alone": pf.Local(),
        "FedAvg": pf.FedAvg(),
        "FedPer": pf.FedPer(shared="base"),
        "FedRep": pf.FedRep(shared="base", head_epochs=2),
        "FedBABU": pf.FedBABU(shared="base", fine_tune=TUNED),
        "LG-FedAvg": pf.FedAvg(shared="head"),
        "Ditto": pf.Ditto(lam=0.1),
        "APFL": pf.APFL(alpha=0.5),
        "pFedMe": pf.PFedMe(lam=15.0, lr=0.05, steps=2, local_rounds=4),
    }


def pathological(seed: int) -> seeds.Figures:
    x, y = pf.datasets.fashion()["train"]
    chosen = np.random.default_rng([seed, 1]).permutation(len(y))[: CLIENTS * ROWS]
    x, y = x[chosen], y[chosen]
    held = pf.data.pathological(y, clients=CLIENTS, classes=2, seed=seed)
    plain, normal = (pf.torch(net, lr=0.05, batch_size=20) for net in (cnn, normalised_cnn))
    split = pf.Split(validation=0.0, test=0.25)
    clients = [pf.Client(name, plain, (x[rows], y[rows]), split=split) for name, rows in held.items()]

    def score(algorithm: pf.Algorithm, joining: list[pf.Client], rounds: int = ROUNDS) -> tuple[float, pf.Result]:
        result = pf.simulate(algorithm, joining, rounds=rounds, seed=seed, **OPTIONS)
        return float(np.mean([metrics["accuracy"] for metrics in result.test.values()])), result

    found = {}
    for name, algorithm in methods().items():
        found[name], result = score(algorithm, clients)
        if name == "FedAvg":
            tuned = [replace(client, start=result) for client in clients]
            found["FedAvg, then tuned"] = score(pf.Local(epochs=TUNED), tuned, 1)[0]
    found[f"FedAvg, {LONGER} times the rounds"] = score(pf.FedAvg(), clients, LONGER * ROUNDS)[0]
    normalised = [replace(client, model=normal) for client in clients]
    found["FedAvg, normalised"] = score(pf.FedAvg(), normalised)[0]
    found["FedBN"] = score(pf.FedBN(), normalised)[0]
    return {f"fashion {name}": value for name, value in found.items()}


# ------------------------------------------------------------------------------------------ five clinics


@cache
def clinics() -> dict[str, tuple[Any, Array]]:
    """Numbers with gaps, and whether there is a diagnosis."""
    found = {}
    for name, frame in pf.datasets.thyroid().clients.items():
        inputs = frame.drop(columns="ill").assign(sex=frame["sex"].map({"F": 0.0, "M": 1.0})).astype("float64")
        found[name] = (inputs, frame["ill"].to_numpy().astype(np.int64))
    return found


def network() -> Any:
    from torch import nn

    return nn.Sequential(OrderedDict(base=nn.Sequential(nn.Linear(28, 32), nn.ReLU()), head=nn.Linear(32, 2)))


def linear() -> Any:
    from torch import nn

    return nn.Sequential(OrderedDict(base=nn.Linear(28, 16), head=nn.Linear(16, 2)))


def thyroid(seed: int) -> seeds.Figures:
    warnings.simplefilter("ignore", LeakWarning)  # some records equal another in every input
    folds = {name: pf.data.folds(y, FOLDS, seed=seed) for name, (_, y) in clinics().items()}
    of_method: dict[str, dict[str, Array]] = {}
    for number in range(FOLDS):
        tests = {name: parts[number] for name, parts in folds.items()}
        for method, scores in of_fold(tests, seed).items():
            for name, values in scores.items():
                whole = of_method.setdefault(method, {n: np.zeros(len(y)) for n, (_, y) in clinics().items()})
                whole[name][tests[name]] = values
    found: seeds.Figures = {}
    for method, scores in of_method.items():
        by_clinic = {name: auc(scores[name], y) for name, (_, y) in clinics().items()}
        found[f"thyroid {method}"] = float(np.mean(list(by_clinic.values())))
        found |= {f"thyroid {method}, {name}": float(value) for name, value in by_clinic.items()}
    return found


def of_fold(tests: dict[str, Array], seed: int) -> dict[str, dict[str, Array]]:
    """method -> clinic -> a score for each of its test rows of this fold."""
    models = [pf.torch(net, optimizer="adam", lr=0.003, batch_size=64) for net in (network, linear)]
    bare = {
        name: pf.Client(
            name, models[0], (x, y), split=pf.Parts(np.setdiff1d(np.arange(len(y)), tests[name]), test=tests[name])
        )
        for name, (x, y) in clinics().items()
    }
    prepared = pf.federated_transform(make_pipeline(SimpleImputer(), StandardScaler()), bare.values(), seed=seed)
    clients = [replace(client, preprocess=prepared) for client in bare.values()]
    lines = [replace(client, model=models[1]) for client in clients]
    found = logistic(tests, prepared)
    for method, algorithm, joining in (
        ("network alone", pf.Local(), clients),
        ("network, FedAvg", pf.FedAvg(), clients),
        ("network, personal heads", pf.FedPer(shared="base"), clients),
        ("linear base, personal heads", pf.FedPer(shared="base"), lines),
    ):
        result = pf.simulate(algorithm, joining, rounds=CLINIC_ROUNDS, seed=seed, test=False, **OPTIONS)
        found[method] = {name: log_odds(result, name) for name in tests}
    return found


def logistic(tests: dict[str, Array], prepared: Any) -> dict[str, dict[str, Array]]:
    rows = {name: (prepared.transform(x), y) for name, (x, y) in clinics().items()}
    train = {name: np.setdiff1d(np.arange(len(y)), tests[name]) for name, (_, y) in rows.items()}
    inputs, labels = ([rows[name][part][train[name]] for name in rows] for part in (0, 1))
    pooled = LogisticRegression(max_iter=2000).fit(np.concatenate(inputs), np.concatenate(labels))
    alone = {name: LogisticRegression(max_iter=2000).fit(x, y) for name, x, y in zip(rows, inputs, labels, strict=True)}
    return {
        "linear, pooled": {name: pooled.decision_function(x[tests[name]]) for name, (x, _) in rows.items()},
        "linear alone": {name: alone[name].decision_function(x[tests[name]]) for name, (x, _) in rows.items()},
    }


def log_odds(result: pf.Result, name: str) -> Array:
    site = result.site(name)
    assert site.test is not None
    request = Predict(start=result.starts(name), rows=site.test.unlabelled())
    logits = site.model.predict(request, site.test, first_env(site, result.seed))
    return np.asarray(logits[:, 1] - logits[:, 0])


# ------------------------------------------------------------------------------------------ what it says


def of_seed(seed: int) -> seeds.Figures:
    """Everything of one seed: what a worker does."""
    return pathological(seed) | thyroid(seed)


BASELINES = {"fashion": "fashion FedAvg", "thyroid": "thyroid linear, pooled"}


def table(found: seeds.Found) -> str:
    lines = [f"{'mean over seeds':<44}{'':>7}   more than {', '.join(BASELINES.values())} [90 %]"]
    for figure, sample in found.items():
        name, _, clinic = figure.rpartition(", ")
        baseline = BASELINES[figure.partition(" ")[0]] + (f", {clinic}" if clinic in clinics() and name else "")
        gain = "" if figure == baseline else seeds.told(sample - found[baseline])
        lines.append(f"{figure:<44}{sample.mean():>7.3f}   {gain}")
    return "\n".join(lines)


def judged(found: seeds.Found, prefix: str) -> list[bench.Result]:
    heads, pooled = found["thyroid network, personal heads"], found["thyroid linear, pooled"]
    linear_heads = found["thyroid linear base, personal heads"]
    return [
        seeds.mean(f"{prefix}.fashion.fedbn", found["fashion FedBN"] - found["fashion FedAvg, normalised"], "accuracy"),
        seeds.mean(f"{prefix}.fashion.alone", found["fashion FedPer"] - found["fashion alone"], "accuracy gained"),
        seeds.mean(f"{prefix}.thyroid.fedavg", heads - found["thyroid network, FedAvg"], "AUC gained"),
        seeds.lower_end(f"{prefix}.thyroid.linear_heads", linear_heads - pooled, "AUC gained"),
        seeds.lower_end(f"{prefix}.thyroid.heads", heads - pooled, "AUC gained"),
        *(
            seeds.mean(
                f"{prefix}.fashion.{name.lower()}",
                found[f"fashion {name}"] - found["fashion FedAvg"],
                "accuracy gained",
            )
            for name in ("FedBABU", "FedRep", "FedPer")
        ),
    ]


if __name__ == "__main__":
    seeds.main(__doc__, "sharing", of_seed, judged, table, SEEDS)
