"""Mistakes on purpose of federations whose participants differ: each names the client, the tree or the student, and what to do."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from torch import nn

import polyfed as pf
from polyfed.core.algorithm import Env, Fit
from polyfed.core.errors import DataError, NeedsError, RunError, SpecError, UsageError
from polyfed.core.tree import Tree
from polyfed.network.limits import NetworkLimits
from polyfed.run.serve import Server

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))
from numpy_model import NumpyModel
from test_serve_join import SECONDS, Thread


def rows(seed=0, n=40):
    x = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
    return x, np.digitize(x[:, 0], [-0.4, 0.4])


PUBLIC = rows(77)[0]


def net(hidden=6, outputs=3, inputs=3, last=None):
    """A base and a head; `last` is what a head should not end in."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU())
            self.head = nn.Linear(hidden, outputs)

        def forward(self, x):
            z = self.head(self.base(x))
            return z if last is None else last(z)

    return Net


SMALL, WIDE = net(), net(12)


def softmax(z):
    return z.softmax(-1)


def labels(z):
    return nn.functional.one_hot(z.argmax(-1), z.shape[-1]).float()


def normalised():
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def torch(made=SMALL, **more):
    return pf.torch(made, **{"lr": 0.1, **more})


def client(name, model=None, data=None, **more):
    more = {"split": pf.Split(validation=0.2, test=0.2), **more}
    return pf.Client(name, model or torch(), data or rows(len(name)), **more)


def run(algorithm, *members, **options):
    members = members or (client("north"), client("southern"))
    return pf.simulate(algorithm, members, **{"rounds": 1, "baselines": (), **options})


def refused(words, algorithm, *members, kind=UsageError, **options):
    with pytest.raises(kind, match=words) as caught:
        run(algorithm, *members, **options)
    return str(caught.value)


# ---------------------------------------------------------------- classes


def test_class_when_one_client_alone_has_it_says_who_made_the_outputs_too_few():
    x, y = rows(8)
    data = x, np.where(y == 2, 7, y) * (np.arange(40) % 5 > 0) + 2 * (np.arange(40) % 5 == 0)
    refused(
        "north: Net gives 3 outputs, the problem has 4 classes; southern alone holds '7'",
        pf.FedAvg(),
        client("north"),
        client("southern", data=data),
    )


def test_class_when_spelled_in_two_ways_is_said():
    x, y = rows(1)
    data = {
        name: (x, np.array(words)[y])
        for name, words in {"north": ("No", "yes", "-1"), "south": ("no ", "yes", "1")}.items()
    }
    members = [client(name, pf.sklearn(LogisticRegression()), data=data[name]) for name in data]
    assert (
        "classes 'No', 'no ' differ in case or spaces alone and count as 2 classes"
        in run(pf.FedAvg(), *members).table()
    )
    same = [client(name, pf.sklearn(LogisticRegression()), data=data["north"]) for name in data]
    assert run(pf.FedAvg(), *same).notes == ()


def test_forest_when_it_lacks_a_class_finds_it_nearly_impossible_and_in_its_place():
    x, y = rows(1, 90)
    kept = y != 1
    members = [client("north"), client("south", pf.sklearn(RandomForestClassifier(5)), data=(x[kept], y[kept]))]
    votes = run(pf.FedMD(public=PUBLIC), *members).ensemble().votes(PUBLIC)
    assert votes["south"][:, 1].max() < 1e-5
    assert votes["north"][:, 1].min() > 1e-3


# ---------------------------------------------------------------- outputs that are no logits


@pytest.mark.parametrize("algorithm", [pf.FedAvg, lambda: pf.FedMD(public=PUBLIC), lambda: pf.FedDF(public=PUBLIC)])
@pytest.mark.parametrize(("last", "words"), [(softmax, "probabilities .*softmax"), (labels, "labels only .*argmax")])
def test_net_when_it_gives_no_logits_is_refused_before_round_1_by_name(algorithm, last, words):
    refused(
        rf"^south: Net gives {words} off the end", algorithm(), client("north"), client("south", torch(net(last=last)))
    )


def test_estimator_when_it_says_labels_only_is_warned_of_and_counts_as_certain():
    class Oracle(ClassifierMixin, BaseEstimator):
        def fit(self, x, y):
            self.classes_ = np.unique(y)
            return self

        def predict(self, x):
            return np.digitize(x[:, 0], [-0.4, 0.4])

    with pytest.warns(UserWarning, match="Oracle says labels only.* each label counts as certain"):
        model = pf.sklearn(Oracle())
    votes = run(pf.FedMD(public=PUBLIC), client("north"), client("south", model)).ensemble().votes(PUBLIC)
    assert votes["south"].max(1).min() > 0.99999
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pf.sklearn(LogisticRegression())


# ---------------------------------------------------------------- public rows, and who is taught


@pytest.mark.parametrize(
    ("student", "words", "kind"),
    [
        (torch(net(outputs=5)), "the student of Distill: Net gives 5 outputs, the problem has 3 classes", UsageError),
        (torch(net(inputs=5)), "the student of Distill: Net cannot take .*takes 5 inputs, got 3", DataError),
        (torch(net(last=softmax)), "the student of Distill: Net gives probabilities", UsageError),
        (SMALL, "Distill: student= must be wrapped", UsageError),
    ],
)
def test_student_when_it_cannot_be_taught_is_named_before_round_1(student, words, kind):
    refused(words, pf.Distill(student=student, public=PUBLIC), kind=kind)


def test_public_rows_when_there_are_none_says_how_to_give_some():
    for algorithm in (pf.FedDF(), pf.Distill(student=torch())):
        said = refused("north .* has no public rows: give public=rows, or let clients", algorithm, kind=NeedsError)
        assert len(said.splitlines()) == 2


def test_public_rows_when_set_aside_for_nobody_are_said():
    members = [client("north", split=pf.Split(test=0.2, public=0.25)), client("southern")]
    said = "10 rows that 'north' set aside as public train nobody: FedAvg asks for none"
    assert run(pf.FedAvg(), *members).notes == (said,)
    assert run(pf.FedMD(), *members).notes == ()


@pytest.mark.parametrize(
    ("public", "words"),
    [
        (lambda: np.load("nofile.npy"), r"^public= could not be read: FileNotFoundError: .*nofile.npy"),
        ("rows.npy", "^public='rows.npy' is a path, not rows; give the rows, or a function that reads them"),
        (PUBLIC[:0], "^public= has no rows; give some"),
        (3, "^public=: rows of type int cannot be read; give an array"),
        (PUBLIC[:, 0], r"^north: public= has rows of x \(one value\), its own rows are of x \[3\]; give"),
        (PUBLIC[:, :2], r"^north: public= has rows of x \[2\], its own rows are of x \[3\]; give"),
        (np.where(PUBLIC > 1, np.nan, PUBLIC), "^north: in public=: values are missing in .* rows; give preprocess="),
    ],
    ids=["raises", "path", "empty", "number", "1-D", "narrow", "gaps"],
)
def test_public_rows_when_they_cannot_be_used_are_named(public, words):
    refused(words, pf.FedMD(public=public), kind=DataError)


def test_public_rows_when_labelled_are_used_without_and_said():
    result, bare = run(pf.FedMD(public=rows(77))), run(pf.FedMD(public=PUBLIC))
    assert (result.notes, bare.notes) == (("public= holds labels, which nobody reads",), ())
    assert result.state.digest == bare.state.digest


@pytest.mark.parametrize("kind", ["statistics", "noise", "mixup"])
def test_public_rows_when_made_from_what_the_sites_have_teach(kind):
    sites = [rows(len(name)) for name in ("north", "southern")]
    merged = pf.data.merge_statistics([pf.data.public_statistics(site, [0, 1, 2]) for site in sites])
    made = {
        "statistics": lambda: pf.data.generate_public(merged, 20),
        "noise": lambda: pf.data.noise_public(merged, 20),
        "mixup": lambda: pf.data.mixup_public(rows(5)[0], 20),
    }[kind]()
    for algorithm in (pf.FedMD(public=made), pf.Distill(student=torch(), public=made)):
        result = run(algorithm)
        assert result.is_complete
        assert result.notes == ()


def test_temperature_when_zero_is_refused_wherever_it_is_given():
    for make in (pf.FedMD, pf.FedDF, pf.Distill, lambda **o: pf.FedPer(feedback="distill", **o)):
        with pytest.raises(UsageError, match="temperature=0 must be a number above 0"):
            make(temperature=0)


# ---------------------------------------------------------------- what is shared, frozen, personal


def test_groups_when_they_do_not_go_together_say_who_is_in_each():
    refused(
        r"FedAvg cannot average Net-2 with Net: base.0.weight is float32\[12, 3\], expected float32\[6, 3\].*"
        r"\(Net: 'north', 'west'; Net-2: 'southern'\)",
        pf.FedAvg(),
        client("north"),
        client("southern", torch(WIDE)),
        client("west"),
        kind=SpecError,
    )


def test_newcomer_when_its_base_does_not_fit_is_named_before_round_1():
    members = client("north"), client("late", torch(WIDE), joins_at=2)
    refused(
        r"Net-2 with Net: base.0.weight.*Net-2: 'late'", pf.FedAvg(shared="base"), *members, kind=SpecError, rounds=3
    )


def test_group_when_of_one_is_averaged_with_nobody_and_taught_by_all():
    members = client("north"), client("southern", torch(WIDE)), client("tree", pf.sklearn(RandomForestClassifier(5)))
    result = run(pf.FedDF(public=PUBLIC), *members)
    assert sorted(result.state.trees) == ["params:Net", "params:Net-2", "soft"]
    assert result.is_complete


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        (("base", "haed"), "'haed' in shared=.* names no entry of Net; Net has base, head"),
        ("!haed", "'!haed' in shared=.* names no entry"),
    ],
)
def test_shared_when_a_prefix_names_nothing_is_refused_and_not_passed_over(shared, words):
    """ "!haed" would share the head that it means to keep."""
    members = [client(name) for name in ("north", "south")]
    refused(words, pf.FedAvg(shared=shared), *members)
    refused(words, pf.FedMD(public=PUBLIC, shared=shared), *members)


@pytest.mark.parametrize(
    ("freeze", "words"),
    [
        (
            ("base", "head"),
            r"freeze=\('base', 'head'\) names every parameter of its model \(Net\), so that nothing would",
        ),
        (("base", "haed"), "names no parameter by 'haed' of its model .*; it has base, head"),
        ("haed", "names no parameter of its model .*; it has base, head"),
    ],
)
def test_freeze_when_it_names_all_or_nothing_is_refused_by_name(freeze, words):
    refused(f"north: .*{words}", pf.FedAvg(), client("north", freeze=freeze), client("south"))


def test_freeze_when_the_model_has_no_parts_is_refused_by_name():
    forest = client("north", pf.sklearn(RandomForestClassifier(3)), freeze="base")
    refused(
        r"north \(RandomForestClassifier\) cannot train a part of itself; leave freeze=",
        pf.FedMD(public=PUBLIC),
        forest,
    )


def test_freeze_when_a_method_has_nothing_left_to_train_leaves_that_client_out_by_name():
    result = run(pf.FedRep(shared="base"), client("north", freeze="head"), client("southern"))
    assert "north is asked to train !base, all of which it keeps frozen; freeze less" in result.left_out["north"][1]
    assert result.history[0].accepted == ("southern",)


def test_freeze_when_it_names_the_base_that_fedbabu_trains_alone_is_refused_before_round_1():
    words = r"^north: FedBABU trains what is shared, shared=\('base',\), and freeze=\('base',\) leaves none of it free"
    refused(words, pf.FedBABU(shared="base"), client("north", freeze="base"), client("south"))
    assert run(pf.FedBABU(shared="base"), client("north", freeze="head"), client("south")).is_complete


def test_shared_when_a_model_has_two_modules_says_which_prefix_they_have():
    two = pf.torch(shared=nn.Linear(3, 4), personal=nn.Linear(4, 3), lr=0.1)
    refused('it has personal, shared; write shared="shared"$', pf.FedPer(), client("north", two))
    assert run(pf.FedPer(shared="shared"), client("north", two)).is_complete


def test_personal_part_when_asked_for_without_consent_is_refused_for_that_client_alone():
    members = client("north"), client("south", consents="personal")
    said = refused(
        "north .* has not agreed that its personal part", pf.FedPer(feedback="mean"), *members, kind=NeedsError
    )
    assert "south" not in said


def test_forest_when_a_base_is_shared_is_refused_and_told_what_takes_it():
    members = client("north"), client("tree", pf.sklearn(RandomForestClassifier(3)))
    refused(r"tree \(RandomForestClassifier\) has no parameters.* FedMD", pf.FedPer(), *members, kind=NeedsError)


def test_fedbn_when_nothing_normalises_says_what_to_use():
    refused(r"no model here has one that keeps statistics \(Net\); use FedAvg", pf.FedBN())


def test_client_when_it_joins_after_the_end_is_said_once():
    assert (
        run(pf.FedAvg(), client("north"), client("late", joins_at=9)).table().count("late ") == 2
    )  # its row, a sentence


# ---------------------------------------------------------------- starts that are not used


def given(result):
    return Tree({name: array * 0 + 5 for name, array in result.state.trees["params"].items()})


def test_start_when_not_all_of_it_is_shared_says_what_is_left_out_and_alone_starts_equally():
    whole = given(run(pf.FedAvg()))
    result = run(pf.FedAvg(shared="base", initial=whole), baselines=("alone",))
    said = "'head.weight', 'head.bias' of initial= are not shared by FedAvg and were left out"
    assert [note[: len(said)] for note in result.notes] == [said]
    assert result.population.given["Net"].keys() == {"base.0.weight", "base.0.bias"}
    assert run(pf.FedAvg(shared="base", initial=whole.under(["base"]))).notes == ()
    assert run(pf.FedAvg(initial=whole)).notes == ()
    assert run(pf.FedBABU(shared="base", initial=whole)).notes == (), "the head is the server's"


def test_start_when_it_fits_a_later_group_alone_is_where_the_shared_part_begins():
    wide = given(run(pf.FedAvg(), client("north", torch(WIDE))))
    wide = wide.overlay(Tree({"head.bias": np.float32([1, 2, 3])}))
    bias = FixedHead(shared=("head.bias",), initial=wide)
    result = run(bias, client("north"), client("southern", torch(WIDE)))
    assert result.state.trees["params"]["head.bias"].tolist() == [1, 2, 3]
    assert any("initial= fits 'Net-2'; 'Net' starts as usual" in note for note in result.notes)


@dataclass(frozen=True)
class FixedHead(pf.FedAvg):
    """FedAvg whose server stays where it began."""

    def server_update(self, state, aggregate, env):
        return state


def test_entries_of_a_start_when_they_fit_nothing_are_said():
    tree = Tree({"base.0.bias": np.ones(6, np.float32), "haed.bias": np.ones(3, np.float32)})
    result = run(pf.FedAvg(), client("north", start=tree), client("south"))
    assert result.notes == (
        "north: 'haed.bias' of start= are not in its model with that shape and were left out",
        "north: the shared part of start= is replaced by the server's; to start everybody from it give FedAvg(initial=...)",
    )


@pytest.mark.parametrize("freeze", [(), "base"])
def test_start_when_the_server_replaces_it_is_said_and_that_alone_began_from_it(freeze):
    old = given(run(pf.FedAvg()))
    members = client("north"), client("late", start=old, freeze=freeze)
    result = run(pf.FedPer(), *members, baselines=("alone",))
    kept = ", and freeze= keeps that" if freeze else ""
    said = f"late: the shared part of start= is replaced by the server's{kept}; to start everybody from it give FedPer(initial=...)"
    alone = "'alone' of late began from the shared part of start=, and the federation did not"
    assert result.notes == (said, alone)
    assert alone in result.table()


@pytest.mark.parametrize(
    "algorithm",
    [pf.Ditto(0.5), pf.APFL(0.5), pf.FedMD(public=PUBLIC), pf.Local(), "initial"],
    ids=["Ditto", "APFL", "FedMD", "Local", "initial"],
)
def test_start_when_it_is_used_needs_no_note(algorithm):
    old = given(run(pf.FedAvg()))
    chosen = pf.FedAvg(initial=old) if algorithm == "initial" else algorithm
    assert run(chosen, client("north"), client("late", start=old), baselines=("alone",)).notes == ()
    assert run(pf.FedPer(), client("north"), client("late", start=old.under(["head"]))).notes == ()


def test_start_when_a_part_of_it_fits_says_how_to_give_that_and_else_both_shapes():
    old = run(pf.FedAvg())
    fewer = (rows(1)[0], (rows(1)[0][:, 0] > 0).astype(int))
    two = client("north", torch(net(outputs=2)), data=fewer, start=old)
    refused(
        r"head.weight is float32\[3, 6\], expected float32\[2, 6\].*'base' fit: give start= the Tree "
        r"pf.load\(DIR\).state.trees\['params'\].under\(\['base'\]\)$",
        pf.FedAvg(),
        two,
        kind=SpecError,
    )
    wide = client("north", torch(WIDE), start=old)
    said = refused(r"base.0.weight is float32\[6, 3\], expected float32\[12, 3\]", pf.FedAvg(), wide, kind=SpecError)
    assert "give" not in said


# ---------------------------------------------------------------- batch normalisation of one row


def keras_normalised():
    import keras

    return keras.Sequential([keras.layers.Dense(6), keras.layers.BatchNormalization(), keras.layers.Dense(3)])


def of_keras(**more):
    return pf.keras(keras_normalised, lr=0.1, **more)


@pytest.mark.parametrize("model", [lambda **o: torch(normalised, **o), of_keras], ids=["torch", "keras"])
def test_batch_normalisation_when_a_batch_is_one_row_is_refused_or_joins_the_one_before(model):
    x, y = rows(3)
    one = client("north", model(), data=(x, y), split=pf.Parts(train=[0], test=[1, 2]))
    single = client("west", model(batch_size=1), data=(x, y))
    last = client("south", model(batch_size=8), data=(x, y), split=pf.Parts(train=list(range(17)), test=[20, 21]))
    result = run(pf.Local(), one, single, last)
    assert set(result.left_out) == {"north", "west"}
    assert "one row has no spread; it has 1 training row and batch_size=" in result.left_out["north"][1]
    assert "24 training rows and batch_size=1: give it batches of two rows at least" in result.left_out["west"][1]
    site = result.site("south")
    env = Env(seed=0, problem=site.problem, client="south", train=site.train)
    assert site.model.fit(Fit(epochs=1), site.train, env).steps == 2, "8 rows and 9"


# ---------------------------------------------------------------- over the network

LIMITS = NetworkLimits(poll_seconds=0.05)


class Softmaxed(NumpyModel):
    """Ends in a softmax that its framework cannot see."""

    kind = "NumpyModel"

    def predict(self, request, rows, env):
        z = np.exp(super().predict(request, rows, env))
        return z / z.sum(1, keepdims=True)


def outcomes(server, *members):
    """Each client's error, or what it ended with."""
    threads = [Thread(server.url, member, limits=LIMITS) for member in members]
    found = {}
    for member, thread in zip(members, threads, strict=True):
        try:
            found[member.name] = thread.outcome()
        except pf.errors.PolyfedError as error:
            found[member.name] = error
    return found


@pytest.mark.parametrize(
    ("algorithm", "members", "kind", "words"),
    [
        (
            lambda: pf.FedAvg(shared=("base", "haed")),
            lambda: (client("north", NumpyModel()), client("south", NumpyModel())),
            UsageError,
            "'haed' in shared=",
        ),
        (
            lambda: pf.FedAvg(),
            lambda: (client("north", NumpyModel()), client("south", NumpyModel(hidden=7))),
            SpecError,
            r"NumpyModel-2 with NumpyModel.*\(NumpyModel: 'north'; NumpyModel-2: 'south'\)",
        ),
        (
            lambda: pf.Distill(student=torch(net(outputs=5)), public=PUBLIC),
            lambda: (client("north", NumpyModel()), client("south", NumpyModel())),
            UsageError,
            "the student of Distill: Net gives 5 outputs",
        ),
    ],
)
def test_run_when_it_cannot_begin_ends_at_the_server_with_the_reason_and_clients_are_told(
    algorithm, members, kind, words
):
    with Server(algorithm(), clients=["north", "south"], rounds=2, limits=LIMITS) as server:
        found = outcomes(server, *members())
        with pytest.raises(kind, match=words):
            server.result(SECONDS)
    assert {str(error)[:22] for error in found.values()} == {"the run was called off"}


def test_client_when_it_freezes_everything_refuses_by_itself_and_the_server_names_it():
    members = client("north", NumpyModel()), client("south", NumpyModel(), freeze=("base", "head"))
    with Server(pf.FedAvg(), clients=["north", "south"], rounds=2, limits=LIMITS) as server:
        found = outcomes(server, *members)
        with pytest.raises(
            RunError, match=r"south does not take part: south refuses: south: freeze=.* every parameter"
        ):
            server.result(SECONDS)
    assert "names every parameter" in str(found["south"])
    assert "the run was called off: south does not take part" in str(found["north"])


def test_client_when_it_gives_probabilities_is_left_out_by_name_and_the_others_go_on():
    members = client("north", NumpyModel()), client("south", Softmaxed())
    with Server(pf.FedMD(public=PUBLIC), clients=["north", "south"], rounds=1, limits=LIMITS) as server:
        outcomes(server, *members)
        result = server.result(SECONDS)
    assert "south gives probabilities" in result.failures["south"]
    assert result.history[0].accepted == ("north",)


def test_start_when_a_server_gives_more_than_is_shared_is_warned_of_and_an_optimizers_moments_are_no_start():
    members = lambda: (client("north", NumpyModel()),)  # noqa: E731  # made twice
    whole = pf.simulate(pf.FedAdam(lr=0.1), members(), rounds=1, baselines=(), test=False)
    algorithm = FixedHead(shared="base", initial=whole.state)
    with pytest.warns(UserWarning, match=r"'head.w', 'head.b' of initial= are not shared by FixedHead"):
        server = Server(algorithm, clients=["north"], rounds=1, limits=LIMITS)
        with server:
            Thread(server.url, *members(), limits=LIMITS, allow=[FixedHead]).outcome()
            result = server.result(SECONDS)
    base = whole.state.trees["params"].under(["base"])
    assert result.state.trees["params"] == base


def test_start_at_a_server_when_each_group_has_parameters_is_that_of_the_group_that_fits():
    north = pf.Client("north", torch(WIDE), rows(5), split=pf.Split(validation=0.2, test=0.2))
    left = run(pf.FedDF(public=PUBLIC), client("west"), client("southern", torch(WIDE)))
    wide = left.state.trees[f"params:{left.population.groups['southern']}"]
    with Server(FixedHead(initial=left), clients=["north"], rounds=1, limits=LIMITS) as server:
        Thread(server.url, north, limits=LIMITS, allow=[FixedHead]).outcome()
        assert server.result(SECONDS).state.trees["params"] == wide
