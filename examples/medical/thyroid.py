"""Five clinics, one list of diagnoses: boosted trees teach one small network, and a shared base gets heads of the clinics' own.

9,172 thyroid records by the clinic that referred them (`pf.datasets.thyroid`): 28 inputs, every record with gaps, 22 classes
(20 diagnoses, "rare", and "-" for none). The clinics differ: between 12 and 52 % of their patients are ill. The sixth clinic,
WEST, has three patients: it neither trains nor is scored, it asks the others for an opinion.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from figures import Figures, accuracy, aligned, answers, table, test_rows
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import polyfed as pf
from polyfed.core.metrics import auc
from polyfed.data import LeakWarning
from polyfed.models.torch import AdamW

CLINICS = ("other", "svi", "svhc", "stmw", "svhd")
ASKS = "west"
HORMONES = ["TSH", "T3", "TT4", "T4U", "FTI", "TBG"]
TARGET, NONE = "diagnosis", "-"
NEVER = -10.0  # the least logarithm of TBG is -2.3
INPUTS, CLASSES = 28, 22
SPLIT = pf.Split(validation=0.15, test=0.25)
#: The student learns from a quarter of the rows, which the clinics show to all without the diagnosis.
WITH_PUBLIC = pf.Split(validation=0.15, test=0.25, public=0.25)
ROUNDS = 40
METHODS = ("linear alone", "linear pooled", "alone", "one model", "own heads")


@cache
def tables() -> dict[str, pd.DataFrame]:
    """Clinic -> its records as numbers with gaps: logarithms of hormones, 0 and 1 for false and true."""
    records = pf.datasets.thyroid(target=TARGET, min_rows=1, min_cases=10)
    return {name: numbers(table) for name, table in records.items()}


def numbers(records: pd.DataFrame) -> pd.DataFrame:
    made = records.drop(columns=[TARGET, "sex"]).astype("float64")
    made[HORMONES] = np.log(made[HORMONES])
    made["male"] = records["sex"].map({"M": 1.0, "F": 0.0}).astype("float64")
    made[TARGET] = records[TARGET]
    return made


class Net(nn.Module):
    """A base that may be shared, and a head."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(INPUTS, hidden), nn.ReLU(), nn.Linear(hidden, hidden // 2), nn.ReLU())
        self.head = nn.Linear(hidden // 2, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(x))


def network() -> Any:
    return pf.torch(Net, optimizer="adam", lr=0.002, epochs=2)


def boosted_trees() -> Any:
    trees = HistGradientBoostingClassifier(max_iter=30, max_leaf_nodes=8, l2_regularization=1.0, early_stopping=False)
    return pf.sklearn(trees)


def big_net() -> nn.Module:
    return Net(128)


def with_gaps(records: pd.DataFrame) -> np.ndarray:
    """As they are: boosted trees know what to do with a gap. Three clinics never measured TBG: a column of gaps alone is
    more than scikit-learn's can take, so there a gap is a number that nobody has.
    """
    return records.fillna({"TBG": NEVER}).to_numpy()


def clients(model: Any, preprocess: Any, split: pf.Split) -> list[pf.Client]:
    return [pf.Client(name, model(), tables()[name], TARGET, preprocess, split) for name in CLINICS]


def agreed(split: pf.Split, seed: int) -> Any:
    """One imputer and scaler, fitted by all clinics together: an input means the same at each of them."""
    together = make_pipeline(SimpleImputer(), StandardScaler())
    return pf.federated_transform(together, clients(network, None, split), seed=seed)


def scored(probabilities: np.ndarray, names: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """(AUC of "any diagnosis" against none, accuracy of the diagnosis)."""
    ill = 1.0 - probabilities[:, list(names).index(NONE)]
    return auc(ill, target != NONE), accuracy(probabilities, names, target)


# ------------------------------------------------------------------------------------------ a shared base, own heads


def personal(seed: int, *, small: bool = False) -> tuple[Figures, Figures]:
    """AUC and accuracy by clinic of `METHODS`; the three networks make equally many optimizer steps.

    "own heads" is one model for all in the first half of the rounds; in the second the base stays shared, and each
    clinic's head goes on from there by itself. A head of its own from the start is worse at clinics of 40 training rows.
    """
    scaler = agreed(SPLIT, seed)
    joining = clients(network, scaler, SPLIT)
    rounds = 4 if small else ROUNDS
    first = run(pf.FedAvg(), joining, rounds // 2, seed)
    continued = [replace(client, start=first) for client in joining]
    results = {
        "alone": run(pf.Local(), joining, rounds, seed),
        "one model": run(pf.FedAvg(), joining, rounds, seed),
        "own heads": run(pf.FedPer(shared="base"), continued, rounds - rounds // 2, seed),
    }
    areas: Figures = {method: {} for method in METHODS}
    right: Figures = {method: {} for method in METHODS}
    for method, result in results.items():
        names = np.array(result.population.problem.classes)
        for name in CLINICS:
            target = test_rows(result, name).target
            areas[method][name], right[method][name] = scored(answers(result, name), names, target)
    for method, models in linear(result, scaler).items():
        for name, model in models.items():
            raw = test_rows(result, name)
            probabilities = model.predict_proba(scaler.transform(raw.inputs["x"]))
            areas[method][name], right[method][name] = scored(probabilities, model.classes_, raw.target)
    return areas, right


def run(algorithm: pf.Algorithm, joining: list[pf.Client], rounds: int, seed: int, *, alone: bool = False) -> pf.Result:
    """With `alone`, also each clinic by itself on all of its rows, those that it shows to all included: `result.alone`."""
    kept = ("alone",) if alone else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeakWarning)  # some records have nothing but age and sex, and are alike
        result = pf.simulate(algorithm, joining, rounds=rounds, seed=seed, baselines=kept, evaluate_every=0, test=alone)
    assert result.is_complete, result.table()
    return result


def linear(result: pf.Result, scaler: Any) -> dict[str, dict[str, LogisticRegression]]:
    """Logistic regression over the same inputs: each clinic's own, and one on everybody's rows, which nobody could see."""
    population = result.population
    rows = [population.raws[name].take(population.parts[name].train) for name in CLINICS]
    x, y = [scaler.transform(raw.inputs["x"]) for raw in rows], [raw.target for raw in rows]
    everybody = LogisticRegression(max_iter=2000).fit(np.concatenate(x), np.concatenate(y))
    own = {name: LogisticRegression(max_iter=2000).fit(x[i], y[i]) for i, name in enumerate(CLINICS)}
    return {"linear alone": own, "linear pooled": dict.fromkeys(CLINICS, everybody)}


# ------------------------------------------------------------------------------------------ trees teach a network


def teach(seed: int, *, small: bool = False) -> tuple[pf.Result, Any]:
    """Each clinic's boosted trees judge the public rows once; the student learns what they say, by their rows."""
    scaler = agreed(WITH_PUBLIC, seed)
    student = pf.torch(big_net, optimizer=AdamW(weight_decay=0.1), lr=0.003, epochs=5 if small else 100)
    algorithm = pf.Distill(student=student, preprocess=scaler, temperature=1.0, weighting="num_examples")
    teachers = clients(boosted_trees, with_gaps, WITH_PUBLIC)
    if small:
        few = HistGradientBoostingClassifier(max_iter=3, max_leaf_nodes=8, l2_regularization=1.0, early_stopping=False)
        teachers = [replace(client, model=pf.sklearn(few)) for client in teachers]
    return run(algorithm, teachers, 1, seed, alone=True), scaler


def student_figures(result: pf.Result, scaler: Any) -> Figures:
    """ "auc" and "accuracy" of each teacher, of each clinic's trees alone on all of its rows, of the teachers together,
    and of the student, on the test rows of all clinics.
    """
    names = np.array(result.population.problem.classes)
    raws = [test_rows(result, name) for name in CLINICS]
    target = np.concatenate([raw.target for raw in raws])
    together = result.ensemble(weights="num_examples")
    votes = [together.votes(raw.unlabelled()) for raw in raws]
    said = {name: np.concatenate([vote[name] for vote in votes]) for name in CLINICS}
    solo = result.alone.ensemble()
    alone_votes = [solo.votes(raw.unlabelled()) for raw in raws]
    said |= {f"{name} alone": np.concatenate([vote[name] for vote in alone_votes]) for name in CLINICS}
    said["ensemble"] = np.concatenate([together.mean(vote) for vote in votes])
    said["student"] = np.concatenate([opinion(result.student, scaler, raw.inputs["x"]) for raw in raws])
    found = {who: scored(probabilities, names, target) for who, probabilities in said.items()}
    return {"auc": {who: a for who, (a, _) in found.items()}, "accuracy": {who: b for who, (_, b) in found.items()}}


def opinion(student: nn.Module, scaler: Any, records: pd.DataFrame) -> np.ndarray:
    with torch.no_grad():
        return student(torch.tensor(scaler.transform(records), dtype=torch.float32)).softmax(1).numpy()


def west(result: pf.Result, scaler: Any) -> str:
    """The three patients of WEST: what the student says, and every clinic's vote on the ill one."""
    records = tables()[ASKS]
    inputs, recorded = records.drop(columns=TARGET), records[TARGET].tolist()
    names = np.array(result.population.problem.classes)
    said = opinion(result.student, scaler, inputs)
    lines = [["patient of WEST", "recorded", "student", "sure"]]
    lines += [
        [f"{i + 1}", spoken(recorded[i]), spoken(names[p.argmax()]), f"{p.max():.2f}"] for i, p in enumerate(said)
    ]
    ill = next(i for i, name in enumerate(recorded) if name != NONE)
    together = result.ensemble(weights="num_examples")
    named = replace(together.problem, classes=tuple(map(spoken, together.problem.classes)))
    told = replace(together, problem=named).explain(inputs.iloc[ill])
    return f"{aligned(lines)}\n\nPatient {ill + 1}, by each clinic's trees:\n{told}"


def spoken(diagnosis: str) -> str:
    return "none" if diagnosis == NONE else diagnosis


def show(seed: int, *, small: bool = False) -> str:
    areas, right = personal(seed, small=small)
    result, scaler = teach(seed, small=small)
    found = student_figures(result, scaler)
    lines = [["on all clinics' test rows", "AUC", "accuracy", "AUC alone", "accuracy alone"]]
    for who in (*CLINICS, "ensemble", "student"):
        columns = [found[metric].get(name) for name in (who, f"{who} alone") for metric in ("auc", "accuracy")]
        lines.append([who, *("" if x is None else f"{x:.3f}" for x in columns)])
    parts = [
        table("AUC, ill or not", areas, METHODS),
        table("accuracy, 22 classes", right, METHODS),
        "Boosted trees as teachers, a small network as student:\n" + aligned(lines),
        west(result, scaler),
    ]
    return "\n\n".join(parts)
