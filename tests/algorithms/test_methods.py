"""The table of methods: every yes trains and improves over its own start, every no is refused by name."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier
from sklearn.naive_bayes import GaussianNB
from torch import nn

import polyfed as pf
from polyfed.algorithms import REGISTRY, methods
from polyfed.algorithms.methods import KINDS, NORMALISING, PARTIAL, example, facts_of, lacks
from polyfed.core import metrics
from polyfed.core.algorithm import Predict
from polyfed.run.client import first_env

CLASSES, INPUTS = 3, 4
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
#: Settings for a few rows and rounds, where a method's own are for long runs.
SETTINGS = {
    "FedAdagrad": {"lr": 0.3},
    "FedAdam": {"lr": 0.1},
    "FedYogi": {"lr": 0.1},
    "PFedMe": {"lam": 2.0, "lr": 0.2, "steps": 2, "local_rounds": 3},
    "FedRep": {"head_epochs": 2},
    "FedBABU": {"fine_tune": 2},
}


def rows(number, n=24):
    r = np.random.default_rng([5, number])
    y = np.arange(n) % CLASSES
    centres = np.random.default_rng(6).normal(size=(CLASSES, INPUTS)) * 2
    return (centres[y] + r.normal(size=(n, INPUTS))).astype(np.float32), y


def base():
    return nn.Sequential(nn.Linear(INPUTS, 6), nn.BatchNorm1d(6), nn.ReLU())


def net():
    return pf.torch(shared=base, personal=lambda: nn.Linear(6, CLASSES), lr=0.1, batch_size=8, epochs=2)


@cache
def dense():
    """One model for all clients and methods: Keras traces a model once for each shape."""
    import keras

    keras.utils.set_random_seed(1)
    layers = [keras.Input((INPUTS,)), keras.layers.Dense(6, name="shared")]
    layers += [keras.layers.BatchNormalization(name="shared_norm"), keras.layers.ReLU()]
    return pf.keras(
        keras.Sequential([*layers, keras.layers.Dense(CLASSES, name="personal")]), lr=0.1, batch_size=8, epochs=2
    )


MODELS = {
    "torch": net,
    "keras": dense,
    "linear": lambda: pf.sklearn(SGDClassifier(loss="log_loss"), epochs=2),
    "bayes": lambda: pf.sklearn(GaussianNB()),
    "trees": lambda: pf.sklearn(RandomForestClassifier(5, max_depth=3)),
}
CASES = [(method, kind) for method in REGISTRY for kind in KINDS]
YES = [(m, k) for m, k in CASES if not lacks(example(REGISTRY[m]), KINDS[k])]
NO = [case for case in CASES if case not in YES]


def federation(method, kind, **settings):
    """The method with the settings of this file, and two clients of one kind of model."""
    student = MODELS[kind]()
    parts = KINDS[kind].parts or "anything"
    algorithm = example(
        REGISTRY[method], public=rows(9, 12)[0], student=student, parts=parts, **SETTINGS.get(method, {}) | settings
    )
    clients = [
        pf.Client(name, MODELS[kind](), data=rows(i), split=pf.Split(validation=0))
        for i, name in enumerate(("north", "south"))
    ]
    return algorithm, clients


def loss(result, name, start):
    """Mean training loss of a client's model, of the state that these trees make."""
    site = result.population.sites[name]
    outputs = site.model.predict(Predict(start=start), site.train, first_env(site, result.seed))
    return metrics.all_of(outputs, site.train.target, site.problem)["loss"]


def improved(result):
    """How much lower the mean training loss is at the end than at the start."""
    names = list(result.population.sites)
    return float(np.mean([loss(result, n, ()) - loss(result, n, result.starts(n)) for n in names]))


def run(algorithm, clients, rounds=2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's own of short fits
        return pf.simulate(algorithm, clients, rounds=rounds, seed=0, evaluate_every=0, test=False)


@pytest.mark.parametrize(("method", "kind"), YES)
def test_every_yes_trains_and_improves_over_its_own_start(method, kind):
    result = run(*federation(method, kind))
    assert result.errors == {}
    assert result.left_out == {}
    assert len(result.history) == 2
    assert improved(result) > 0.02


@pytest.mark.parametrize(("method", "kind"), NO)
def test_every_no_is_refused_before_round_1_and_the_client_or_what_is_lacking_is_named(method, kind):
    algorithm, clients = federation(method, kind)
    said = lacks(algorithm, KINDS[kind])
    with pytest.raises(pf.PolyfedError) as caught:
        run(algorithm, clients)
    words = {
        "params": "has no parameters to average",
        "terms": "cannot follow loss terms by gradient",
        "iterates": "does not train on from where a step of the server's own puts it",
        "part": "cannot train a part of itself",
        "normalisation layers": "no model here has one",
        "parts": "names no parameter",
    }
    for word in said.split(" and "):
        assert words[word] in str(caught.value)
    if isinstance(caught.value, pf.errors.NeedsError):
        assert "north (" in str(caught.value)
        assert "south (" in str(caught.value)


# ---------------------------------------------------------------- the table follows from the code


def test_every_kind_of_model_offers_what_the_table_says():
    assert {name: make().offers for name, make in MODELS.items()} == {name: k.offers for name, k in KINDS.items()}
    for estimator in (LogisticRegression(), SGDClassifier()):
        assert pf.sklearn(estimator).offers == KINDS["linear"].offers
    assert pf.sklearn(LinearRegression()).offers == KINDS["bayes"].offers


def test_every_method_is_in_the_table_once():
    assert [row["method"] for row in methods.rows()] == sorted(REGISTRY, key=str.lower)
    assert set(PARTIAL) | set(NORMALISING) <= set(REGISTRY)
    assert pf.algorithms.table() == methods.table()


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text() == methods.page(), "python -m polyfed.algorithms.methods > docs/methods.md"


@pytest.mark.parametrize("method", REGISTRY)
def test_what_the_table_says_of_memory_and_uploads_holds_for_a_real_model(method):
    facts = facts_of(REGISTRY[method])
    algorithm, clients = federation(method, "torch")
    plain = [pf.Client(c.name, pf.torch(shared=lambda: nn.Linear(INPUTS, 6), personal=lambda: nn.Linear(6, CLASSES)), c.data)
             for c in clients]  # fmt: skip
    if method in NORMALISING:
        plain = clients
    result = run(algorithm, plain, rounds=1)
    assert any(len(memory.trees) for memory in result.memories.values()) == facts.memory
    env = result.federation.env(1, 2, "north")
    sent = algorithm.broadcast(result.state, "north", env)
    up = {name.partition(":")[0] for name in algorithm.expects(sent, env)}
    assert up == set(facts.up) - (set() if method in NORMALISING else {"stats"})
    assert (result.population.public is not None) == facts.public


@pytest.mark.parametrize("method", REGISTRY)
def test_what_the_table_says_of_shapes_holds_for_real_models(method):
    shapes = facts_of(REGISTRY[method]).shapes

    def trains(*widths):
        algorithm, clients = federation(method, "torch")
        norm = [[nn.BatchNorm1d] if method in NORMALISING else [] for _ in widths]
        heads = [
            pf.torch(
                shared=lambda w=w, n=n: nn.Sequential(nn.Linear(INPUTS, w[0]), *(kind(w[0]) for kind in n)),
                personal=lambda w=w: nn.Sequential(nn.Linear(w[0], w[1]), nn.Linear(w[1], CLASSES)),
            )
            for w, n in zip(widths, norm, strict=True)
        ]
        clients = [pf.Client(c.name, head, c.data) for c, head in zip(clients, heads, strict=True)]
        try:
            return len(run(algorithm, clients, rounds=1).history) == 1
        except pf.errors.SpecError as error:
            assert "cannot average" in str(error)
            return False

    assert trains((6, 5), (6, 5))
    assert trains((6, 5), (7, 5)) == (shapes == "no")
    assert trains((6, 5), (6, 4)) == (shapes in ("no", "shared part"))


class Loud(pf.FedAvg):
    """An upload that depends on more than its own place in a sum."""

    def receive(self, sent, update, env):
        return update


class Forgetful(pf.FedMD):
    def client_update(self, message, memory, env):
        upload, _ = yield from super().client_update(message, memory, env)
        return upload, memory


def test_a_method_that_changes_changes_its_row():
    assert not facts_of(Loud).linear
    assert facts_of(pf.FedAvg).linear
    assert facts_of(pf.FedMD).memory
    assert not facts_of(Forgetful).memory
    stubborn = type("Stubborn", (pf.FedAvg,), {"needs": pf.FedProx.needs})
    assert lacks(stubborn(), KINDS["linear"]) == "terms"
