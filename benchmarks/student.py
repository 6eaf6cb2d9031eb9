"""The unified student: against its teachers' ensemble, a teacher alone, the KL-mean loss, and other public rows.

    python benchmarks/student.py [--json] [--quick] [--choose]

20 clients, labels dealt by Dirichlet(0.5); CNN, GRU, MLP and forest in turn, each trained by itself; one round of
pf.Distill; one student, a CNN. Everybody is scored on the same test rows, which no one trains on. A teacher that
learns nothing from others is that client's solo model. The ensemble is the mean of the teachers' probabilities.

| data | rows of all clients | public, unlabelled | of these to the plain student | test |
|---|---|---|---|---|
| Fashion-MNIST | 6,000 | 4,000 | 2,000 | 2,000 |
| mfeat, view "pix" (images of 16 x 15) | 1,000: about 50 a client | 500 | 500 | 500 |

"student" learns on all public rows and as many mixtures of pairs of them, at T = 1 from the sharpened consensus, its rate
falling along a cosine; "plain student" at T = 2 on its part, unmixed, at one rate. All that is compared with the plain
student is equal to it in everything else.

KL-mean: the same loss as a mean over rows and classes without T² (nn.KLDivLoss as it comes), so T² C = 40 times smaller.
Compared in two ways, both losses with equal networks, starts, orders, batches, epochs and teachers:
    student: SGD with momentum 0.9, at the learning rate that `--choose` found for this network's cross entropy on labelled
        rows, neither loss being looked at; the plain student. At 40 times that rate KL-mean takes the same steps, which a row shows.
    added: four newcomers of 200 rows (Fashion-MNIST) train a CNN on their own loss plus the distillation loss of the
        teachers' answers on those rows. Here the rate cannot mend the ratio. Each loss takes, of the same four rates, the
        one that is best for it over all seeds: both by the rows that they are scored on.

Other public rows, same teachers, plain student: public rows drawn from statistics, mixed from pairs of real rows, noise. In rounds: 3 rounds in
which clients digest the consensus too, with a third of the epochs each, so as many steps of own rows and of the plain student.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import bench
import numpy as np
import seeds
from sklearn.ensemble import RandomForestClassifier

import polyfed as pf
from polyfed.core.aggregate import Fold
from polyfed.core.algorithm import Env, Fit, Predict
from polyfed.core.message import Message
from polyfed.core.rows import Problem, Rows
from polyfed.core.terms import Distill, Own, Term
from polyfed.core.tree import Array, Tree
from polyfed.run.client import first_env, public_sites
from polyfed.run.student import student_member

if TYPE_CHECKING:
    from polyfed.models.torch import Training

SEEDS, CHOOSING = range(4), range(100, 102)
CLIENTS, ALPHA, TEMPERATURE, CLASSES, ROUNDS = 20, 0.5, 2.0, 10, 3
SCALE = TEMPERATURE**2 * CLASSES  # by which KL-mean is too small
RATES = (0.003, 0.01, 0.03, 0.1)
STUDENT_RATE = 0.03  # with mixtures; chosen on the seeds of `CHOOSING`
# Of the student; chosen on seeds 100-103 by how often it names the class that the ensemble names.
STUDENT_TEMPERATURE, SHARPEN = 1.0, 0.5
NEWCOMERS, NEWCOMER_ROWS, ADDED_EPOCHS = 4, 200, 15
BATCH = 32


@dataclass(frozen=True)
class Data:
    """Rows in all, and how long everybody trains."""

    private: int
    public: int
    plain: int  # public rows of the plain student
    test: int
    side: tuple[int, int]
    epochs: int
    student_epochs: int
    rate: float  # of the plain student; chosen by `choose`
    newcomers: bool = False


DATA = {
    "fashion": Data(6000, 4000, 2000, 2000, (28, 28), epochs=15, student_epochs=21, rate=0.01, newcomers=True),
    "mfeat": Data(1000, 500, 500, 500, (16, 15), epochs=60, student_epochs=60, rate=0.03),
}


# ------------------------------------------------------------------------------------------ models


def cnn(side: tuple[int, int]) -> Any:
    from torch import nn

    small = [(length + 3) // 4 for length in side]
    return nn.Sequential(
        nn.Unflatten(1, (1, side[0])),
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * small[0] * small[1], 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


def mlp(side: tuple[int, int]) -> Any:
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(side[0] * side[1], 64), nn.ReLU(), nn.Linear(64, CLASSES))


def gru(side: tuple[int, int]) -> Any:
    """Reads an image from its first line to its last."""
    from torch import nn

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(side[1], 32, batch_first=True), nn.Linear(32, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(self.gru(x)[1][-1])

    return Reader()


@cache
def teachers(name: str, epochs: int) -> list[Any]:
    side = DATA[name].side
    networks = [pf.torch(partial(net, side), optimizer="adam", lr=0.003, epochs=epochs) for net in (cnn, gru, mlp)]
    return [*networks, pf.sklearn(RandomForestClassifier(30, min_samples_leaf=2))]


@cache
def taught(name: str, rate: float, epochs: int) -> Any:
    """The student: a CNN by plain means, whose steps are as large as its loss says."""
    return pf.torch(partial(cnn, DATA[name].side), optimizer=pf_sgd(), lr=rate, epochs=epochs)


@cache
def decaying(name: str, rows: int) -> Any:
    """The student's network with the same budget, its learning rate falling to 0 along half a cosine."""
    data = DATA[name]
    whole = data.student_epochs * math.ceil(rows / BATCH)
    loop = partial(_decaying, whole=whole)
    net = partial(cnn, data.side)
    return pf.torch(net, train=loop, lr=STUDENT_RATE, epochs=data.student_epochs, batch_size=BATCH)


def _decaying(training: Training, whole: int) -> None:
    import torch

    optimizer = torch.optim.SGD(training.parameters.values(), lr=training.lr, momentum=0.9)
    for step, batch in enumerate(training.batches()):
        optimizer.param_groups[0]["lr"] = training.lr * (1 + math.cos(math.pi * step / whole)) / 2
        optimizer.zero_grad()
        training.loss(batch).backward()
        optimizer.step()


def pf_sgd() -> Any:
    from polyfed.models.torch import SGD

    return SGD(momentum=0.9)


@dataclass(frozen=True)
class KLMean(pf.Distill):
    """The mistake: a mean over rows and classes, without T²."""

    def term(self, problem: Problem) -> Term:
        return Distill(self.temperature, self.strength / (self.temperature**2 * problem.outputs))


# ------------------------------------------------------------------------------------------ one seed's rows


@dataclass(frozen=True)
class Deal:
    """Who has what; no row is in two places."""

    x: Array
    y: Array
    clients: Mapping[str, Array]
    newcomers: Mapping[str, Array]
    public: Array
    test: Array

    @classmethod
    def of(cls, name: str, seed: int) -> Deal:
        data, (x, y) = DATA[name], everything(name)
        order = np.random.default_rng([seed, len(y)]).permutation(len(y))
        cuts = np.cumsum([data.private, data.public, data.test, NEWCOMERS * NEWCOMER_ROWS * data.newcomers])
        private, public, test, late, _ = np.split(order, cuts)
        held = pf.data.dirichlet(y[private], clients=CLIENTS, alpha=ALPHA, min_rows=10, seed=seed)
        extra = pf.data.dirichlet(y[late], clients=NEWCOMERS, alpha=ALPHA, min_rows=50, seed=seed) if len(late) else {}
        clients, newcomers = (
            {who: rows[mine] for who, mine in dealt.items()} for rows, dealt in ((private, held), (late, extra))
        )
        return cls(x, y, clients, newcomers, x[public], test)

    def score(self, answers: Array) -> float:
        return float((answers.argmax(1) == self.y[self.test]).mean())


@cache
def everything(name: str) -> tuple[Array, Array]:
    if name == "fashion":
        x, y = pf.datasets.fashion()["train"]
        return x, y
    pixels, digit = pf.datasets.mfeat("pix")["pix"]
    return pixels.reshape(-1, 16, 15) / np.float32(6), digit


# ------------------------------------------------------------------------------------------ what is compared


def federation(name: str, deal: Deal, seed: int, algorithm: pf.Distill, rounds: int = 1) -> pf.Result:
    models = teachers(name, DATA[name].epochs // rounds)
    clients = [
        pf.Client(who, models[i % len(models)], (deal.x[held], deal.y[held]), split=pf.Parts(np.arange(len(held))))
        for i, (who, held) in enumerate(deal.clients.items())
    ]
    options = {"evaluate_every": 0, "test": False, "baselines": ()}
    return pf.simulate(algorithm, clients, rounds=rounds, seed=seed, **options)


def answers_of(result: pf.Result, rows: Rows) -> dict[str, Array]:
    """Each teacher's logits."""
    request = partial(Predict, rows=rows)
    return {
        who: site.model.predict(request(start=(result.state_of(who),)), rows, first_env(site, result.seed))
        for who, site in result.population.sites.items()
    }


def again(result: pf.Result, algorithm: pf.Distill) -> Any:
    """The student that this algorithm's server makes of the same teachers; a function of raw rows."""
    problem, first = result.population.problem, result.federation
    public = pf.data.read("public", algorithm.public, labelled=False)
    trainers = public_sites({"student": algorithm.student}, algorithm, public, problem, seed=result.seed)
    site = trainers["student"]
    env = replace(first, algorithm=algorithm, public=site.train, trainers=trainers).env(1, CLIENTS)
    fold = Fold()
    for position, logits in enumerate(answers_of(result, site.train).values()):
        fold.add(position, Message({"soft": algorithm.soft(logits, env)[0]}), lambda _: 1.0)
    state = algorithm.server_update(algorithm.init(env), fold.finish(), env)
    tree: Tree = state.trees["student"]
    return lambda x: site.model.predict(Predict(start=(tree,), rows=Rows({"x": x})), site.train, env)


def public_rows(deal: Deal, problem: Problem, count: int, seed: int) -> dict[str, Array]:
    """Public rows that are not real ones."""
    sites = [pf.data.Raw({"x": deal.x[held]}, deal.y[held]) for held in deal.clients.values()]
    merged = pf.data.merge_statistics([pf.data.public_statistics(raw, problem) for raw in sites])
    mixed = [pf.data.mixup_public(raw.unlabelled(), count // CLIENTS, seed=seed + i) for i, raw in enumerate(sites)]
    made = {
        "statistics": pf.data.generate_public(merged, count, seed=seed),
        "mixup": pf.data.concat(mixed),
        "noise": pf.data.noise_public(merged, count, seed=seed),
    }
    return {kind: np.asarray(raw.inputs["x"], np.float32) for kind, raw in made.items()}


def added(deal: Deal, result: pf.Result) -> seeds.Figures:
    """Newcomers: own loss plus a distillation loss on their own rows, at each rate; mean accuracy."""
    problem, losses = result.population.problem, {"own": None, "T2": pf.Distill, "KL-mean": KLMean}
    found: seeds.Figures = {}
    test = Rows({"x": deal.x[deal.test]})
    for who, held in deal.newcomers.items():
        rows = Rows({"x": deal.x[held]}, deal.y[held])
        method = pf.Distill(temperature=TEMPERATURE)
        said = [method.said(logits, problem) for logits in answers_of(result, rows.unlabelled()).values()]
        env = Env(seed=result.seed, problem=problem, client=who, round_num=1, number=1, train=rows)
        for rate in RATES:
            model = taught("fashion", rate, ADDED_EPOCHS)
            for name, kind in losses.items():
                term = () if kind is None else (kind(temperature=TEMPERATURE).term(problem),)
                targets = {"teacher": np.mean(said, 0)} if term else {}
                fitted = model.fit(Fit(terms=(Own(), *term), targets=targets), rows, env)
                score = deal.score(model.predict(Predict(start=(fitted.state,), rows=test), rows, env))
                key = f"fashion added, {name} at {rate:g}"
                found[key] = found.get(key, 0.0) + score / len(deal.newcomers)
    return found


def student_and_teachers(name: str, deal: Deal, seed: int) -> tuple[pf.Result, seeds.Figures]:
    """The run, and what its teachers, their ensemble and the student score."""
    data, test = DATA[name], deal.x[deal.test]
    mixed = pf.data.mixup_public(pf.data.Raw({"x": deal.public}), data.public, seed=seed).inputs["x"]
    public = np.concatenate([deal.public, mixed])
    model = decaying(name, len(public))
    whole = pf.Distill(student=model, public=public, temperature=STUDENT_TEMPERATURE, sharpen=SHARPEN)
    result = federation(name, deal, seed, whole)
    votes = result.ensemble().votes(test)
    solo = {who: deal.score(vote) for who, vote in votes.items()}
    found = {"teacher": float(np.mean(list(solo.values()))), "best teacher": max(solo.values())}
    found["ensemble"] = deal.score(np.mean(list(votes.values()), 0))
    found["student"] = deal.score(student_member(result).answer(pf.data.read("test", test, labelled=False)))
    if name == "mfeat":  # the smaller one
        assert found["student"] == deal.score(again(result, whole)(test)), "a retold round is not the round"
    return result, found


def of_data(name: str, seed: int) -> seeds.Figures:
    deal = Deal.of(name, seed)
    result, found = student_and_teachers(name, deal, seed)
    found |= plain_students(name, deal, result)
    return {f"{name} {figure}": value for figure, value in found.items()} | (
        added(deal, result) if DATA[name].newcomers else {}
    )


def plain_students(name: str, deal: Deal, result: pf.Result) -> seeds.Figures:
    """One change at a time from the plain student, over the same teachers; and in rounds."""
    data, test, problem = DATA[name], deal.x[deal.test], result.population.problem
    options = {"temperature": TEMPERATURE, "public": deal.public[: data.plain]}
    model = taught(name, data.rate, data.student_epochs)
    plain, slow = pf.Distill(student=model, **options), KLMean(student=model, **options)
    compared = {
        "plain student": plain,
        "KL-mean": slow,
        f"KL-mean at {SCALE:g} times the rate": replace(
            slow, student=taught(name, data.rate * SCALE, data.student_epochs)
        ),
    }
    made = public_rows(deal, problem, data.plain, result.seed)
    compared |= {f"public: {kind}": replace(plain, public=rows) for kind, rows in made.items()}
    found = {figure: deal.score(again(result, algorithm)(test)) for figure, algorithm in compared.items()}
    part = replace(plain, student=taught(name, data.rate, data.student_epochs // ROUNDS), digest=1)
    rounds = federation(name, deal, result.seed, part, ROUNDS)
    votes = rounds.ensemble().votes(test)
    found["in rounds: teacher"] = float(np.mean([deal.score(vote) for vote in votes.values()]))
    found["in rounds: ensemble"] = deal.score(np.mean(list(votes.values()), 0))
    raw = pf.data.read("test", test, labelled=False)
    return found | {"in rounds: student": deal.score(student_member(rounds).answer(raw))}


def of_seed(seed: int) -> seeds.Figures:
    """Everything of one seed: what a worker does."""
    return {figure: value for name in DATA for figure, value in of_data(name, seed).items()}


# ------------------------------------------------------------------------------------------ what it says


def best(found: seeds.Found, loss: str) -> np.ndarray:
    """A loss's accuracies at the rate that is best for it over all seeds."""
    at = [sample for figure, sample in found.items() if figure.startswith(f"fashion added, {loss} at ")]
    return max(at, key=lambda sample: float(sample.mean()))


WITH_STUDENT = ("teacher", "best teacher", "ensemble", "plain student", "student")


def table(found: seeds.Found) -> str:
    lines = [f"{'accuracy, mean over seeds':<44}{'':>7}   student's, or plain student's, gain [90 %]"]
    for figure, sample in found.items():
        name, _, what = figure.partition(" ")
        student = found[f"{name} student" if what in WITH_STUDENT else f"{name} plain student"]
        gain = "" if " added" in figure or sample is student else seeds.told(student - sample)
        lines.append(f"{figure:<44}{sample.mean():>7.3f}   {gain}")
    return "\n".join(lines)


def judged(found: seeds.Found, prefix: str) -> list[bench.Result]:
    results = []
    for name in DATA:
        student, plain = found[f"{name} student"], found[f"{name} plain student"]
        results += [
            seeds.lower_end(f"{prefix}.{name}.over_klmean", plain - found[f"{name} KL-mean"], "accuracy gained"),
            seeds.mean(f"{prefix}.{name}.over_teacher", student - found[f"{name} teacher"], "accuracy gained"),
            seeds.mean(f"{prefix}.{name}.behind_ensemble", found[f"{name} ensemble"] - student, "accuracy lost"),
        ]
    gain = best(found, "T2") - best(found, "KL-mean")
    return [seeds.lower_end(f"{prefix}.added.over_klmean", gain, "accuracy gained"), *results]


def choose() -> None:
    """Prints the accuracy of the student's network trained by cross entropy on labelled rows, at each rate."""
    for name, data in DATA.items():
        for rate in RATES:
            model, scores = taught(name, rate, data.student_epochs), []
            for seed in CHOOSING:
                deal = Deal.of(name, seed)
                held = np.concatenate(list(deal.clients.values()))[: data.public]
                rows, problem = (
                    Rows({"x": deal.x[held]}, deal.y[held]),
                    Problem(tuple(map(str, range(CLASSES))), CLASSES),
                )
                env = Env(seed=seed, problem=problem, client="all", round_num=1, number=1, train=rows)
                state = model.fit(Fit(), rows, env).state
                request = Predict(start=(state,), rows=Rows({"x": deal.x[deal.test]}))
                scores.append(deal.score(model.predict(request, rows, env)))
            print(f"{name} rate {rate:g}: {np.mean(scores):.4f}", flush=True)


if __name__ == "__main__":
    if "--choose" in sys.argv:
        choose()
    else:
        seeds.main(__doc__, "student", of_seed, judged, table, SEEDS)
