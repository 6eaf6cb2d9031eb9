"""Small federations of every kind, and the SHA-256 of what comes of one: what "the same bits" is said of.

Five clients of unequal size, blocks of two in the fold, so that order and blocks matter. Frameworks are imported by the
builders that use them.
"""

import hashlib
import json
import warnings
from dataclasses import asdict
from itertools import pairwise

import numpy as np

import polyfed as pf
from polyfed.core import wire

SIZES = {"north": 18, "south": 12, "east": 21, "west": 15, "centre": 24}
INPUTS, CLASSES = 6, 3
#: Of a round's entry in the history: what a clock, a restart or a busy machine changes.
FREE = ("seconds", "bytes_down", "cpu_seconds")


def rows_of(name, number):
    r = np.random.default_rng([3, *name.encode()])
    x = (r.normal(size=(number, INPUTS)) + r.normal(size=INPUTS)).astype(np.float32)
    truth = np.random.default_rng(5).normal(size=(INPUTS, CLASSES))
    return x, (x @ truth + r.normal(size=(number, CLASSES))).argmax(1)


def public():
    return rows_of("public", 14)[0]


def federated(model, *, public=0.0, sizes=None, consents=()):
    """Clients with a model each: `model` is one for all, or a list taken in turn."""
    models = model if isinstance(model, list) else [model]
    split = pf.Split(validation=0.2, test=0.2, public=public)
    return [
        pf.Client(name, models[i % len(models)], data=rows_of(name, n), split=split, consents=consents)
        for i, (name, n) in enumerate((sizes or SIZES).items())
    ]


# ---------------------------------------------------------------- models


def torch_model(style, head=()):
    """A base and a head; `head` is how wide the head's own layers before the last are."""
    from torch import nn

    def base():
        layers = [nn.Linear(INPUTS, 8)]
        layers += [nn.BatchNorm1d(8)] if style == "batch norm" else []
        layers += [nn.Dropout(0.3)] if style == "dropout" else []
        return nn.Sequential(*layers, nn.Tanh())

    def personal():
        widths = [8, *head]
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))

    batch = 64 if style == "full batch" else 5
    return pf.torch(
        shared=base,
        personal=personal,
        batch_size=batch,
        shuffle=style != "full batch",
        epochs=2,
        lr=0.1,
    )


def keras_model(style, base="shared"):
    import keras

    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, "tanh")]
    layers += [keras.layers.BatchNormalization()] if style == "batch norm" else []
    layers += [keras.layers.Dropout(0.3)] if style == "dropout" else []
    ends = keras.Input((INPUTS,)), keras.layers.Dense(CLASSES, name="personal")
    model = keras.Sequential([ends[0], keras.Sequential(layers, name=base), ends[1]])
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return pf.keras(model, epochs=2, batch_size=64 if style == "full batch" else 5, shuffle=style != "full batch")


def sklearn_model(style):
    from sklearn.linear_model import LogisticRegression, SGDClassifier
    from sklearn.neural_network import MLPClassifier

    if style == "full batch":
        return pf.sklearn(LogisticRegression(max_iter=20))
    if style == "layers":
        return pf.sklearn(MLPClassifier((4,), solver="sgd"), epochs=2, batch_size=5)
    return pf.sklearn(SGDClassifier(loss="log_loss"), epochs=2, batch_size=5)


def forest():
    from sklearn.ensemble import RandomForestClassifier

    return pf.sklearn(RandomForestClassifier(4, max_depth=3))


STYLES = {
    "torch": ("full batch", "mini-batches", "dropout", "batch norm"),
    "keras": ("full batch", "mini-batches", "dropout", "batch norm"),
    "sklearn": ("full batch", "mini-batches", "layers"),
}
MODELS = {"torch": torch_model, "keras": keras_model, "sklearn": sklearn_model}
BASE = "shared"
ALGORITHMS = {
    "FedAvg": lambda: pf.FedAvg(),
    "FedAvg(shared)": lambda: pf.FedAvg(shared=BASE),
    "FedProx": lambda: pf.FedProx(mu=0.1),
    "FedAvgM": lambda: pf.FedAvgM(beta=0.5),
    "FedAdagrad": lambda: pf.FedAdagrad(lr=0.05),
    "FedAdam": lambda: pf.FedAdam(lr=0.05),
    "FedYogi": lambda: pf.FedYogi(lr=0.05),
    "FedMD": lambda: pf.FedMD(public()),
}


#: Personal parts and models: see `personal_cells`.
PERSONAL = {
    "FedRep": lambda: pf.FedRep(shared=BASE, head_epochs=2),
    "FedBABU": lambda: pf.FedBABU(shared=BASE, fine_tune=1),
    "Ditto": lambda: pf.Ditto(0.5),
    "APFL": lambda: pf.APFL(0.5, adaptive=True),
    "PFedMe": lambda: pf.PFedMe(lam=2.0, lr=0.2, steps=2, local_rounds=3),
    "FedBN": lambda: pf.FedBN(),
}


def together(algorithm):
    """(algorithm, clients) where models of several kinds take part, and where the server trains models itself."""
    nets = [torch_model("batch norm"), keras_model("dropout")]
    heads = [torch_model("dropout"), torch_model("dropout", head=(4,))]
    if algorithm == "Distill":
        student = torch_model("dropout")
        made = pf.Distill(public(), student=student, digest=1, feedback=True, weighting="entropy")
        return made, federated([*nets, forest()])
    if algorithm == "FedDF":
        return pf.FedDF(public(), epochs=2, models=nets), federated([*nets, forest()])
    if algorithm == "FedMD(shared)":
        models = [torch_model("dropout"), keras_model("batch norm", base="body"), forest()]
        return pf.FedMD(public(), shared=BASE, weighting="certainty"), federated(models)
    if algorithm == "FedPer(mean)":
        return pf.FedPer(shared=BASE, every=2, feedback="mean"), federated(heads, consents="personal")
    made = pf.FedPer(shared=BASE, feedback="distill", digest=2, public=public(), models=heads)
    return made, federated(heads, consents="personal")


TOGETHER = ("Distill", "FedDF", "FedMD(shared)", "FedPer(mean)", "FedPer(distill)")


def together_cells():
    return [(algorithm, "together", "") for algorithm in TOGETHER]


def personal_cells():
    """(algorithm, framework, style) of `PERSONAL`, one style each and framework, with dropout or normalisation."""
    for i, algorithm in enumerate(PERSONAL):
        for framework in ("torch", "keras"):
            yield algorithm, framework, "batch norm" if algorithm == "FedBN" or i % 2 else "dropout"


def cells():
    """(algorithm, framework, style) for all that can be: scikit-learn follows no loss term and has no shared part."""
    for algorithm in ALGORITHMS:
        for framework, styles in STYLES.items():
            if framework == "sklearn" and algorithm in ("FedProx", "FedAvg(shared)"):
                continue
            for style in styles:
                yield algorithm, framework, style


# ---------------------------------------------------------------- runs


def settings_of(cell):
    """Arguments of `pf.simulate` for a cell, without the executor."""
    algorithm, framework, style = cell
    if framework == "together":
        return _settings(*together(algorithm))
    agreed = ("personal",) if algorithm == "FedBABU" else ()  # over a network its one head is some client's first one
    return _settings((ALGORITHMS | PERSONAL)[algorithm](), federated(MODELS[framework](style), consents=agreed))


def _settings(algorithm, clients, **more):
    known = {"rounds": 3, "seed": 11, "evaluate_every": 3, "baselines": ()}
    return {"algorithm": algorithm, "clients": clients, "schedule": pf.Sync(block=2)} | known | more


def personal():
    """A personal head in the memories, a random cohort, and a rule that may roll back."""
    select = pf.Uniform(3)
    return _settings(
        ALGORITHMS["FedAvg(shared)"](),
        federated(torch_model("dropout")),
        schedule=pf.Sync(select=select, block=2),
        stop=pf.NoImprovement("accuracy", patience=1, roll_back=True),
        rounds=5,
        evaluate_every=1,
    )


def server_state():
    """Moments of an optimizer at the server, and statistics of batch normalisation."""
    return _settings(ALGORITHMS["FedAdam"](), federated(torch_model("batch norm")), rounds=4, evaluate_every=2)


def different():
    """Private models of three frameworks, in the memories: torch, Keras and a forest."""
    models = [torch_model("mini-batches"), keras_model("dropout"), forest()]
    sizes = {"north": 18, "south": 12, "east": 21}
    return _settings(pf.FedMD(), federated(models, public=0.2, sizes=sizes), rounds=3, evaluate_every=1)


def trivial():
    """Naive Bayes, exact in one round: nothing but machinery."""
    from sklearn.naive_bayes import GaussianNB

    return _settings(pf.FedAvg(), federated(pf.sklearn(GaussianNB())), rounds=2, evaluate_every=1)


NAMED = {"personal": personal, "server state": server_state, "different": different, "trivial": trivial}


def run(settings, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return pf.simulate(**{**settings, **more})


def digest_of(result):
    """SHA-256 of the server's state and of every client's memory."""
    total = hashlib.sha256(wire.to_bytes(result.state))
    for name in sorted(result.memories):
        total.update(name.encode() + wire.to_bytes(result.memories[name]))
    return total.hexdigest()


def said_of(result):
    """Everything else that a run says and that must be the same again: history, test metrics, why it ended."""
    history = [{k: v for k, v in asdict(log).items() if k not in FREE} for log in result.history]
    said = {"history": history, "test": dict(result.test), "reason": result.reason, "version": result.version}
    return json.loads(json.dumps(said, sort_keys=True, default=dict))
