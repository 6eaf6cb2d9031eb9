"""FedDF: groups that average, and a server that distils each towards everybody."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from numpy_model import VALUES, NumpyModel, rows_of, sites_of
from scipy.special import log_softmax, softmax
from sklearn.ensemble import RandomForestClassifier
from torch import nn

from polyfed.algorithms import FedAvg, FedDF
from polyfed.core.aggregate import Fold
from polyfed.core.algorithm import Fit
from polyfed.core.checks_algorithm import addressed, check_algorithm, play, server_env, work
from polyfed.core.errors import UsageError
from polyfed.core.message import Message
from polyfed.core.terms import Distill
from polyfed.core.tree import Tree
from polyfed.models.sklearn import sklearn
from polyfed.models.torch import torch

PUBLIC = range(9)


def mixed(problem=None):
    """Two groups of nets, one of them of one client."""
    models = {"north": NumpyModel(3), "south": NumpyModel(3, lr=0.1), "west": NumpyModel(0)}
    return sites_of(models) if problem is None else sites_of(models, problem)


def frameworks():
    """Two torch nets with normalisation, and a forest that only teaches."""
    base = lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3))  # noqa: E731  # a factory
    net = torch(base, batch_size=4, key="net")
    return sites_of({"north": net, "south": net, "west": sklearn(RandomForestClassifier(5, max_depth=3))})


def teachers():
    forest = sklearn(RandomForestClassifier(5, max_depth=3))
    return sites_of({"north": forest, "south": forest}, sizes={"north": 12, "south": 20})


CONTRACTS = {
    "two groups": (FedDF(PUBLIC, steps=None, epochs=3), mixed),
    "one group with statistics": (FedDF(PUBLIC), lambda: sites_of(NumpyModel(statistics=True, batch_size=5))),
    "probabilities": (FedDF(PUBLIC, average="probabilities", weighting="entropy", temperature=3.0), mixed),
    "regression": (FedDF(PUBLIC, weighting="num_examples"), lambda: mixed(VALUES)),
    "torch and a forest": (FedDF(PUBLIC, steps=3), frameworks),
    "forests alone": (FedDF(PUBLIC), teachers),
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_contract_when_checked_holds(name):
    algorithm, make = CONTRACTS[name]
    check_algorithm(algorithm, make, rounds=2)


def averages(sites, uploads, start):
    """Group -> its parameters after FedAvg's mean of the uploads, by hand."""
    found = {}
    for group, first in start.items():
        those = [(upload, len(sites[name].train)) for name, upload in uploads.items() if sites[name].group == group]
        steps = [upload.trees[f"params:{group}"] for upload, _ in those]
        mean = {name: np.average([s[name] for s in steps], axis=0, weights=[n for _, n in those]) for name in first}
        found[group] = Tree({name: first[name] + mean[name] for name in first})
    return found


def pseudocode(sites, uploads, start, epochs):
    """Algorithm 3 of the paper over uploads: average each group, then distil it towards the mean logits at T = 1."""
    logits = np.mean([upload.trees["soft"]["public"] for upload in uploads.values()], axis=0)
    teacher, env = softmax(np.float64(logits), -1), server_env(sites, 0, 1)
    out = {}
    for group, tree in averages(sites, uploads, start).items():
        model = next(site.model for site in sites.values() if site.group == group)
        rows = rows_of(9, stream="public", labelled=False)
        lesson = Fit((tree,), (Distill(1.0),), targets={"teacher": teacher}, rows=rows, epochs=epochs)
        out[group] = model.fit(lesson, rows, env).state
    return out


def test_round_when_run_equals_the_pseudocode():
    algorithm, sites = FedDF(PUBLIC, epochs=4), mixed()
    begun = play(algorithm, sites, rounds=0)
    start = {group: begun.state.trees[f"params:{group}"] for group in ("group 0", "group 1")}
    played = play(algorithm, sites, rounds=1)
    for group, wanted in pseudocode(sites, played.uploads, start, 4).items():
        for name, array in wanted.items():
            got = played.state.trees[f"params:{group}"][name]
            np.testing.assert_allclose(got, array, rtol=1e-5, atol=1e-7, err_msg=f"{group} {name}")


def loss(tree, site, consensus):
    """Cross-entropy of a group's model on the public rows against the ensemble."""
    rows = rows_of(9, stream="public", labelled=False)
    _, _, z = site.model.forward(dict(tree), rows.x.astype(np.float64))
    return -(softmax(np.float64(consensus), -1) * log_softmax(z, -1)).sum(-1).mean()


def test_group_when_distilled_is_nearer_to_the_ensemble_than_its_average():
    algorithm, sites = FedDF(PUBLIC, epochs=20), mixed()
    start = {group: play(algorithm, sites, rounds=0).state.trees[f"params:{group}"] for group in ("group 0", "group 1")}
    played = play(algorithm, sites, rounds=1)
    for group, averaged in averages(sites, played.uploads, start).items():
        site = next(site for site in sites.values() if site.group == group)
        consensus = played.state.trees["soft"]["public"]
        assert loss(played.state.trees[f"params:{group}"], site, consensus) < loss(averaged, site, consensus) - 1e-3


def equal_clients(count):
    one = sites_of({"north": NumpyModel(4)}, sizes={"north": 12})["north"]
    return {name: replace(one, name=name) for name in ("north", "south", "west")[:count]}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 3.0}, {"average": "probabilities", "weighting": "entropy"}])
def test_ensemble_when_of_one_or_of_equal_clients_is_the_teacher_and_changes_nothing(count, options):
    """Invariant 43: what is distilled is what the average says already, so the server's training is without gradient."""
    sites = equal_clients(count)
    distilled = play(FedDF(PUBLIC, epochs=5, **options), sites, rounds=3).state.trees["params:group 0"]
    averaged = play(FedAvg(), sites, rounds=3).state.trees["params"]
    for name in averaged:
        np.testing.assert_allclose(distilled[name], averaged[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_regression_when_ensemble_is_of_equal_clients_changes_nothing():
    one = sites_of({"north": NumpyModel(4)}, VALUES, sizes={"north": 12})["north"]
    sites = {name: replace(one, name=name) for name in ("north", "south")}
    distilled = play(FedDF(PUBLIC, epochs=5), sites, rounds=3).state.trees["params:group 0"]
    averaged = play(FedAvg(), sites, rounds=3).state.trees["params"]
    for name in averaged:
        np.testing.assert_allclose(distilled[name], averaged[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_group_when_nobody_of_it_came_learns_from_those_who_did():
    algorithm = FedDF(PUBLIC, epochs=3)
    before = play(algorithm, mixed(), rounds=1)
    after = play(algorithm, mixed(), rounds=1, cohort=lambda _: ["north", "south"], after=before)
    assert after.state.trees["params:group 1"].digest != before.state.trees["params:group 1"].digest
    assert after.memories["west"] == before.memories["west"]


def test_messages_when_made_hold_the_clients_own_group_alone():
    algorithm, sites = FedDF(PUBLIC), frameworks()
    played, env = play(algorithm, sites, rounds=1), server_env(sites, 0, 2)
    sent = {name: algorithm.broadcast(played.state, name, addressed(env, site)) for name, site in sites.items()}
    assert {name: list(message.trees) for name, message in sent.items()} == {
        "north": ["params", "stats"],
        "south": ["params", "stats"],
        "west": [],
    }
    assert set(played.uploads["north"].trees) == {"soft", "params:group 0", "stats:group 0"}
    assert set(played.uploads["west"].trees) == {"soft"}


def test_forest_when_it_teaches_keeps_the_model_that_its_own_rows_made():
    with_nets, alone = play(FedDF(PUBLIC, steps=3), frameworks(), rounds=3), play(FedDF(PUBLIC), teachers(), rounds=3)
    assert float(with_nets.memories["west"].trees["own"]["buffers:soft_weight"]) == 0.0
    assert list(alone.state.trees) == ["soft"]


def test_teacher_when_it_is_a_forest_moves_the_nets():
    sites = frameworks()
    nets = {name: sites[name] for name in ("north", "south")}
    found = [play(FedDF(PUBLIC, steps=3), those, rounds=1).state.trees["params:group 0"] for those in (sites, nets)]
    assert found[0].digest != found[1].digest


def test_client_when_it_freezes_the_base_does_not_hold_its_group_back():
    sites = mixed()
    sites["south"] = replace(sites["south"], trains=("head.w", "head.b"), frozen=("base",))
    played = play(FedDF(PUBLIC, strength=1e-12), sites, rounds=1)
    those = {name: sites[name] for name in ("north", "south")}
    wanted = play(FedAvg(), those, rounds=1).state.trees["params"]
    for name in wanted:
        np.testing.assert_allclose(played.state.trees["params:group 0"][name], wanted[name], rtol=1e-9)
    assert set(played.uploads["south"].trees) == {"soft", "params:group 0", "params:group 0#"}


@dataclass(frozen=True)
class WrongSteps(FedDF):
    """FedDF whose client north sends a step a million million times too long."""

    times: float = field(default=1e12, kw_only=True)

    def client_update(self, message, memory, env):
        upload, memory = yield from super().client_update(message, memory, env)
        name = f"params:{env.group}"
        return (upload.put({name: upload.trees[name] * self.times}) if env.client == "north" else upload), memory


def test_update_when_it_exploded_is_refused_by_the_limit_of_its_group():
    import polyfed as pf  # the whole package, for this one run

    clients = [
        pf.Client(name, NumpyModel(3), data=(rows_of(n).x, rows_of(n).target))
        for name, n in (("north", 20), ("south", 20))
    ]
    result = pf.simulate(WrongSteps(rows_of(9).x), clients, rounds=1, evaluate_every=0, test=False, baselines=())
    assert "params:NumpyModel" in result.history[0].left_out["north"]
    assert result.history[0].accepted == ("south",)
    assert result.history[0].update_norm > 0


def test_round_when_its_trainers_are_missing_averages_alone():
    algorithm, sites = FedDF(PUBLIC), mixed()
    env, begun, fold = server_env(sites, 0, 1), play(algorithm, sites, rounds=0), Fold()
    upload = work(algorithm, sites["north"], begun, env)[1]
    fold.add(0, upload, lambda _: 1.0)
    after = algorithm.server_update(begun.state, fold.finish(), replace(env, trainers={}))
    wanted = begun.state.trees["params:group 0"] + upload.trees["params:group 0"]
    assert after.trees["params:group 0"].digest == wanted.digest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": 1, "epochs": 1}, "epochs= and steps= both say how long the server trains"),
        ({"average": "votes"}, 'write "probabilities" or "logits"'),
    ],
)
def test_option_when_wrong_says_what_to_write(options, words):
    with pytest.raises(UsageError, match=words):
        FedDF(**options)


def test_start_when_evaluated_lays_the_group_over_what_the_client_kept():
    own, params = Tree({"buffers:n": np.int64(1)}), Tree({"w": np.ones(2)})
    assert FedDF().start(Message({"params": params}), Message({"own": own})) == (own, params)
