"""The student: trained at the server on what everybody says of the public rows, and sent to nobody."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from numpy_model import CLASSES, VALUES, NumpyModel, rows_of, sites_of
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import polyfed as pf
from polyfed.algorithms import Distill, FedDF, FedMD
from polyfed.core.algorithm import Fit, Predict
from polyfed.core.checks_algorithm import addressed, check_algorithm, play, server_env
from polyfed.core.errors import StorageError, UsageError
from polyfed.core.rows import Rows
from polyfed.core.terms import Distill as Term
from polyfed.core.terms import Match
from polyfed.core.work import ask
from polyfed.data import read
from polyfed.models.keras import keras
from polyfed.models.sklearn import sklearn
from polyfed.models.torch import torch
from polyfed.run.serve import Server
from polyfed.run.trainers import trainers_at_server

PUBLIC = range(9)
SECONDS = 60


def different(problem=CLASSES):
    return sites_of({"north": NumpyModel(3), "south": NumpyModel(6, lr=0.1), "west": NumpyModel(0)}, problem)


def trees():
    forest = RandomForestClassifier(5, max_depth=3)
    return sites_of({"north": sklearn(LogisticRegression()), "south": sklearn(forest), "west": sklearn(GaussianNB())})


CONTRACTS = {
    "one-shot": (Distill(PUBLIC), different, NumpyModel(5)),
    "digest": (Distill(PUBLIC, digest=2, weighting="entropy", epochs=3), different, NumpyModel(5)),
    "feedback": (Distill(PUBLIC, digest=1, feedback=True, sharpen=0.5), different, NumpyModel(5)),
    "logits": (Distill(PUBLIC, average="logits", weighting="certainty"), different, NumpyModel(5)),
    "a shared base": (Distill(PUBLIC, shared="base", digest=1), lambda: sites_of(NumpyModel(3)), NumpyModel(0)),
    "regression": (Distill(PUBLIC, digest=1, feedback=True), lambda: different(VALUES), NumpyModel(5)),
    "scikit-learn": (Distill(PUBLIC, digest=1, feedback=True), trees, sklearn(RandomForestClassifier(5, max_depth=3))),
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_contract_when_checked_holds(name):
    algorithm, make, student = CONTRACTS[name]
    check_algorithm(algorithm, make, rounds=2, student=student)


# ---------------------------------------------------------------- what the student learns


def lesson(said, problem, temperature, start, epochs=None):
    """The request that the docstring promises, out of the uploads."""
    rows = rows_of(9, problem, stream="public", labelled=False)
    teacher = np.mean([soft["public"] for soft in said], axis=0)
    term = Term(temperature) if problem.is_classification else Match()
    return Fit((start,), (term,), targets={"teacher": teacher}, rows=rows, epochs=epochs)


@pytest.mark.parametrize("problem", [CLASSES, VALUES], ids=["classes", "values"])
def test_student_when_taught_in_rounds_goes_on_from_where_it_stood(problem):
    algorithm, sites, student = Distill(PUBLIC, temperature=3.0, epochs=4), different(problem), NumpyModel(5)
    played = play(algorithm, sites, rounds=0, student=student)
    for round_num in (1, 2, 3):
        before, env = played.state.trees["student"], server_env(sites, 0, round_num)
        played = play(algorithm, sites, rounds=1, student=student, after=played)
        said = [upload.trees["soft"] for upload in played.uploads.values()]
        request = lesson(said, problem, 3.0, before, 4)
        wanted = student.fit(request, request.rows, replace(env, train=None, public=request.rows)).state
        for name in wanted:
            np.testing.assert_allclose(played.state.trees["student"][name], wanted[name], rtol=1e-6, err_msg=name)


def test_uploads_when_clients_learn_nothing_are_those_of_fedmd_without_digest():
    one = play(Distill(PUBLIC), different(), rounds=3, student=NumpyModel(5))
    two = play(FedMD(PUBLIC, digest=0), different(), rounds=3)
    assert one.state.trees["soft"].digest == two.state.trees["soft"].digest
    assert {n: m.digest for n, m in one.memories.items()} == {n: m.digest for n, m in two.memories.items()}


def test_clients_when_they_digest_the_consensus_are_those_of_fedmd():
    one = play(Distill(PUBLIC, digest=2), different(), rounds=3, student=NumpyModel(5))
    two = play(FedMD(PUBLIC, digest=2), different(), rounds=3)
    assert {n: m.digest for n, m in one.memories.items()} == {n: m.digest for n, m in two.memories.items()}


def test_feedback_when_given_is_what_the_student_says():
    algorithm, sites, student = Distill(PUBLIC, digest=1, feedback=True, sharpen=0.5), different(), NumpyModel(5)
    played, rows = play(algorithm, sites, rounds=1, student=student), rows_of(9, stream="public", labelled=False)
    z = student.predict(Predict((played.state.trees["student"],)), rows, server_env(sites, 0, 1))
    sent = algorithm.broadcast(played.state, "north", addressed(server_env(sites, 0, 2), sites["north"]))
    np.testing.assert_allclose(sent.trees["soft"]["public"], softmax(z / 2, -1), rtol=1e-5)
    learned = algorithm.lesson(sent, rows, CLASSES).targets["teacher"]
    np.testing.assert_array_equal(learned, sent.trees["soft"]["public"])  # not sharpened a second time


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, set()),
        ({"digest": 1}, {"soft"}),
        ({"digest": 1, "feedback": True}, {"soft"}),
        ({"shared": "base"}, {"params"}),
    ],
)
def test_broadcast_when_made_never_holds_the_student(options, sent):
    algorithm, sites = Distill(PUBLIC, **options), sites_of(NumpyModel(3))
    played = play(algorithm, sites, rounds=1, student=NumpyModel(5))
    message = algorithm.broadcast(played.state, "north", addressed(server_env(sites, 0, 2), sites["north"]))
    assert set(message.trees) == sent
    assert "student" in played.state.trees


def test_needs_when_clients_learn_nothing_are_predictions_alone():
    assert not Distill().needs.missing(frozenset({"predict", "public"}))
    assert Distill(digest=1).needs.missing(frozenset({"predict", "public"})) == {"distill"}


# ---------------------------------------------------------------- students of any framework, on rows without labels


def rows_and_labels(number, seed):
    r = np.random.default_rng(seed)
    x = r.normal(size=(number, 5)).astype(np.float32)
    truth = np.random.default_rng(5).normal(size=(5, 3))
    return x, (x @ truth).argmax(1)


def teachers(*models):
    return [
        pf.Client(name, model, data=rows_and_labels(100, seed))
        for seed, (name, model) in enumerate(zip(("north", "south", "west"), models, strict=False))
    ]


def net(outputs=3):
    return lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, outputs))


def keras_net():
    from keras import Sequential, layers

    return Sequential([layers.Dense(8, activation="relu"), layers.Dense(3)])


STUDENTS = {
    "torch": lambda: torch(net(), epochs=30, lr=0.3),
    "keras": lambda: keras(keras_net, epochs=30, lr=0.3),
    "forest": lambda: sklearn(RandomForestClassifier(30)),
    "logistic": lambda: sklearn(LogisticRegression()),
    "boosting": lambda: sklearn(HistGradientBoostingClassifier(max_iter=30)),
    "statistics": lambda: sklearn(GaussianNB()),
    "without weights": lambda: sklearn(KNeighborsClassifier()),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_student_when_of_any_framework_learns_from_rows_without_labels(name):
    """161 public rows: the last batch of 32 has one row, which a net that normalises must not meet alone."""
    algorithm = Distill(rows_and_labels(161, 9)[0], student=STUDENTS[name](), digest=1, feedback=True)
    clients = teachers(sklearn(LogisticRegression()), sklearn(RandomForestClassifier(20)))
    result = pf.simulate(algorithm, clients, rounds=2, baselines=(), evaluate_every=0, test=False)
    assert not result.errors
    site, (x, y) = result.federation.trainers["student"], rows_and_labels(400, 10)
    env = replace(result.federation.env(2, 2), public=site.train, train=None)
    z = ask(site, Predict((result.state.trees["student"],), rows=Rows({"x": x})), env)
    assert (z.argmax(1) == y).mean() > 0.75


def test_regression_when_teachers_differ_gives_a_student_of_their_mean():
    def data(seed):
        x = rows_and_labels(80, seed)[0]
        return x, x @ np.float32([3, -1, 0, 2, 0]) + 100

    models = (sklearn(RandomForestRegressor(20)), torch(net(1), epochs=2))
    clients = [pf.Client(n, m, data=data(i)) for i, (n, m) in enumerate(zip(("north", "south"), models, strict=True))]
    student = sklearn(RandomForestRegressor(20))
    algorithm = Distill(rows_and_labels(150, 9)[0], student=student, preprocess=lambda x: x * 2)
    result = pf.simulate(algorithm, clients, rounds=1, baselines=(), evaluate_every=0, test=False)
    site = result.federation.trainers["student"]
    env = replace(result.federation.env(1, 2), public=site.train, train=None)
    values = ask(site, Predict((result.state.trees["student"],)), env)
    np.testing.assert_allclose(site.train.x, rows_and_labels(150, 9)[0] * 2)
    error = values - result.state.trees["soft"]["public"]
    assert np.abs(error).mean() < 0.3 * result.state.trees["soft"]["public"].std()


# ---------------------------------------------------------------- a CNN, a GRU, an MLP and a forest teach a net


class Gru(nn.Module):
    """Reads a digit as eight rows of eight."""

    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.gru(x.reshape(-1, 8, 8))[1][0])


def cnn():
    body = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(108, 10))


def mlp():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def digits_taught(seed):
    """Accuracy of the ensemble and of its student on 697 digits that nobody has seen."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    public, held = x[:500], np.array_split(np.arange(500, 1100), 4)
    fast = {"optimizer": "adam", "lr": 0.01, "epochs": 25}
    models = [torch(cnn, **fast), torch(Gru, **fast), torch(mlp, **fast), sklearn(RandomForestClassifier(60))]
    clients = [
        pf.Client(name, model, data=(x[rows], y[rows]), split=pf.Split(validation=0, test=0))
        for name, model, rows in zip(("north", "south", "east", "west"), models, held, strict=True)
    ]
    algorithm = Distill(public, student=torch(mlp, optimizer="adam", lr=0.01, epochs=40))
    result = pf.simulate(algorithm, clients, rounds=1, seed=seed, baselines=(), evaluate_every=0, test=False)
    rows = Rows({"x": x[1100:]})
    said = []
    for name, site in result.population.sites.items():
        env = result.federation.env(1, 4, name)
        z = site.model.predict(Predict(result.starts(name)), rows, replace(env, train=site.train, public=site.public))
        said.append(softmax(z, -1))
    site = result.federation.trainers["student"]
    env = replace(result.federation.env(1, 4), public=site.train)
    z = ask(site, Predict((result.state.trees["student"],), rows=rows), env)
    return (np.mean(said, axis=0).argmax(1) == y[1100:]).mean(), (z.argmax(1) == y[1100:]).mean()


def test_student_when_taught_by_four_kinds_is_nearly_as_good_as_all_of_them():
    ensemble, student = digits_taught(0)
    assert ensemble > 0.9
    assert student > ensemble - 0.03


# ---------------------------------------------------------------- the same bits


ALGORITHMS = {
    "Distill": lambda public: Distill(public, student=NumpyModel(5), digest=1, feedback=True),
    "FedDF": lambda public: FedDF(public, models=[NumpyModel(3), NumpyModel(0)], epochs=2),
    "FedMD": lambda public: FedMD(public, weighting="entropy", shared="base"),
}
MODELS = {"north": lambda: NumpyModel(3), "south": lambda: NumpyModel(3), "west": lambda: NumpyModel(0)}


def members():
    return [pf.Client(name, make(), data=rows_and_labels(60, i)) for i, (name, make) in enumerate(MODELS.items())]


def digests(state, memories):
    return state.digest, {name: memory.digest for name, memory in memories.items()}


def joined(algorithm):
    """The run over the network, its clients in threads."""
    found = {}

    def join(url, client):
        found[client.name] = pf.join(url, client, show=None)

    with Server(algorithm, clients=list(MODELS), rounds=3, seed=1) as server:
        threads = [threading.Thread(target=join, args=(server.url, client), daemon=True) for client in members()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        state = server.result(SECONDS).state
    return digests(state, {name: outcome.memory for name, outcome in found.items()})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_run_when_over_processes_or_the_network_has_the_bits_of_the_loop(name):
    def simulated(**options):
        algorithm = ALGORITHMS[name](rows_and_labels(20, 9)[0])
        result = pf.simulate(algorithm, members(), rounds=3, seed=1, baselines=(), **options)
        return digests(result.state, {member.name: result.memories[member.name] for member in members()})

    loop = simulated()
    assert simulated(executor="processes", workers=2) == loop
    assert joined(ALGORITHMS[name](rows_and_labels(20, 9)[0])) == loop


def test_server_when_it_lacks_what_it_trains_says_what_to_give():
    x = rows_and_labels(20, 9)[0]
    public, env = read("public", x, labelled=False), server_env(different(), 0)
    specs = {group: tree.spec for group, tree in env.first.items()}
    algorithm, learners = FedDF(x, models=NumpyModel(3)), {"group 0": "north", "group 1": "south"}
    with pytest.raises(UsageError, match=r"a model like south's \(group 1\) .*: give FedDF\(models=\[\.\.\.\]\)"):
        trainers_at_server(algorithm, specs, learners, public, CLASSES, seed=0)
    assert set(trainers_at_server(algorithm, specs, {"group 0": "north"}, public, CLASSES, seed=0)) == {"group 0"}
    with pytest.raises(UsageError, match="Distill needs a model to train: give student="):
        Server(Distill(x), clients=["north"])
    for algorithm in (Distill(student=NumpyModel()), FedDF()):
        with pytest.raises(UsageError, match="trains at the server, on public rows: give public=rows"):
            Server(algorithm, clients=["north"])


def test_models_when_one_fits_no_group_says_how_it_differs():
    algorithm = FedDF(rows_and_labels(20, 9)[0], models=[NumpyModel(7)])
    with pytest.raises(UsageError, match=r"models\[0\] \(NumpyModel\) fits no group of clients: NumpyModel: "):
        pf.simulate(algorithm, members(), rounds=1)


def test_models_when_given_train_in_place_of_the_clients_own():
    def run(**options):
        algorithm = FedDF(rows_and_labels(20, 9)[0], **options)
        return pf.simulate(algorithm, members(), rounds=1, baselines=(), evaluate_every=0, test=False).state

    own, still = run(), run(models=NumpyModel(3, lr=1e-9))
    assert own.trees["params:NumpyModel-2"].digest == still.trees["params:NumpyModel-2"].digest
    assert own.trees["params:NumpyModel"].digest != still.trees["params:NumpyModel"].digest


# ---------------------------------------------------------------- mistakes


def test_checkpoint_when_the_student_is_another_belongs_to_another_run(tmp_path):
    def run(epochs):
        algorithm = Distill(rows_and_labels(20, 9)[0], student=torch(net(), epochs=epochs))
        return pf.simulate(algorithm, members(), rounds=1, baselines=(), test=False, checkpoint=tmp_path)

    one = run(1)
    assert run(1).state.digest == one.state.digest
    with pytest.raises(StorageError, match="what the server trains, or the rows that it trains on differs"):
        run(2)


def test_student_when_missing_or_not_wrapped_says_what_to_write():
    public = rows_and_labels(20, 9)[0]
    with pytest.raises(
        UsageError, match=r"Distill needs a model to train: pf.Distill\(student=pf.torch\(net\), public=rows\)"
    ):
        pf.simulate(Distill(public), members(), rounds=1)
    with pytest.raises(UsageError, match="student= must be wrapped like a client's model"):
        pf.simulate(Distill(public, student=mlp()), members(), rounds=1)
    with pytest.raises(UsageError, match=r"north .* has no public rows: give public=rows"):
        pf.simulate(Distill(student=NumpyModel()), members(), rounds=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"feedback": True}, "say for how many epochs, digest=1"),
        ({"digest": -1}, "digest=-1"),
        ({"temperature": 0}, "temperature=0"),
    ],
)
def test_option_when_wrong_says_what_to_write(options, words):
    with pytest.raises(UsageError, match=words):
        Distill(**options)
