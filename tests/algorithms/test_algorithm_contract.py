"""Every algorithm keeps the public contract, over models of every kind that it takes."""

from pathlib import Path

import pytest
from numpy_model import VALUES, NumpyModel, sites_of

from polyfed.algorithms import (
    APFL,
    REGISTRY,
    Ditto,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedBABU,
    FedBN,
    FedMD,
    FedPer,
    FedProx,
    FedRep,
    FedYogi,
    PFedMe,
)
from polyfed.algorithms.local import Local
from polyfed.core.checks_algorithm import check_algorithm

AVERAGING = {
    "FedAvg": FedAvg(),
    "FedAvg uniform": FedAvg(weighting="uniform"),
    "FedAvg shared": FedAvg(shared="base"),
    "FedAvg shared head": FedAvg(shared=("head",)),
    "FedProx": FedProx(mu=0.3),
    "FedPer": FedPer(shared="base", every=2),
    "FedProx shared": FedProx(shared="base", mu=0.3),
    "FedAvgM": FedAvgM(beta=0.5),
    "FedAdagrad": FedAdagrad(lr=0.03),
    "FedAdam": FedAdam(lr=0.03),
    "FedYogi": FedYogi(lr=0.03),
    "FedYogi shared": FedYogi(shared="base", lr=0.03),
    "FedRep": FedRep(shared="base", head_epochs=2),
    "FedBABU": FedBABU(shared="!head", fine_tune=2),
    "FedBABU not tuned": FedBABU(shared="base", fine_tune=0),
    "Ditto": Ditto(lam=0.5),
    "Ditto shared": Ditto(shared="base", personal_epochs=1),
    "APFL": APFL(alpha=0.25),
    "APFL adaptive": APFL(adaptive=True),
    "APFL global": APFL(alpha=0.0),
    "APFL shared": APFL(shared="base", alpha=1.0),
    "PFedMe": PFedMe(lam=2.0, lr=0.2, steps=2, local_rounds=3, beta=1.5),
    "PFedMe shared": PFedMe(shared="base", lam=2.0, lr=0.2, steps=2, local_rounds=3),
}
DISTILLING = {
    "Local": Local(),
    "FedMD": FedMD(range(9)),
    "FedMD paper": FedMD(range(9), order="paper", weighting="num_examples"),
    "FedMD logits": FedMD(range(9), average="logits", temperature=3.0, digest=2, revisit=1),
}
MODELS = {
    "plain": lambda: NumpyModel(),
    "statistics, batches, float32": lambda: NumpyModel(statistics=True, batch_size=5, dtype="float32", lr=0.1),
}
DIFFERENT = {"north": NumpyModel(3), "south": NumpyModel(6, lr=0.1), "west": NumpyModel(0, dtype="float32")}
NORMALISED = MODELS["statistics, batches, float32"]
CASES = {
    "FedBN": (FedBN(), lambda: sites_of(NORMALISED())),
    **{
        f"{n}, {m}": (a, lambda make=make: sites_of(make())) for n, a in AVERAGING.items() for m, make in MODELS.items()
    },
    **{f"{n}, different models": (a, lambda: sites_of(DIFFERENT)) for n, a in DISTILLING.items()},
    **{f"{n}, regression": (a, lambda: sites_of(problem=VALUES)) for n, a in (AVERAGING | DISTILLING).items()},
}


@pytest.mark.parametrize("name", CASES)
def test_contract_when_checked_holds(name):
    algorithm, make = CASES[name]
    check_algorithm(algorithm, make)


#: They train at the server, and have the same checks in files of their own.
ELSEWHERE = {"Distill": "test_distill.py", "FedDF": "test_feddf.py"}


def test_registry_when_listed_holds_algorithms_under_their_names_and_each_is_checked():
    checked = {type(algorithm).__name__ for algorithm, _ in CASES.values()}
    assert set(REGISTRY) <= checked | set(ELSEWHERE)
    assert all("check_algorithm(" in (Path(__file__).parent / name).read_text() for name in ELSEWHERE.values())
    assert all(kind.__name__ == name for name, kind in REGISTRY.items())
