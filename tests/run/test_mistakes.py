"""Mistakes on purpose: each ends in a clear message that names client and entry, and the others go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from federations import Spoiled, clients, rows, run
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

import polyfed as pf
from polyfed.core.rows import Problem
from polyfed.core.tree import Tree
from polyfed.data import LeakWarning, Raw, to_message
from polyfed.run.client import PreprocessingWarning, naming
from polyfed.run.join import prepared_site


def params(update):
    return update.trees["params"]


def with_params(update, tree):
    return update.put(trees={"params": tree})


def each(update, change):
    return with_params(update, Tree({name: change(array) for name, array in params(update).items()}))


SPOILED = {
    "raises": (lambda u: 1 / 0, "ZeroDivisionError: division by zero"),
    "exits": (lambda u: sys.exit(4), "SystemExit: 4"),
    "nan": (lambda u: each(u, lambda a: a * np.nan), "params/coef: value at [0, 0] is nan"),
    "infinity": (lambda u: each(u, lambda a: a + np.inf), "params/coef: value at [0, 0] is inf"),
    "shape": (lambda u: each(u, lambda a: np.zeros((*a.shape, 2))), "params/coef: is float64[1, 3, 2], expected"),
    "dtype": (lambda u: each(u, lambda a: a.astype(np.float16)), "params/coef: is float16[1, 3], expected float64"),
    "tree missing": (lambda u: replace(u, trees={}), "params: the tree is missing"),
    "tree extra": (lambda u: u.put(trees={"more": params(u)}), "more: the tree is not expected"),
    "tree renamed": (lambda u: replace(u, trees={"weights": params(u)}), "the update holds weights"),
    "entry renamed": (
        lambda u: with_params(u, Tree({f"{name}x": a for name, a in params(u).items()})),
        "params/coef: is missing",
    ),
    "no examples": (lambda u: u.put(numbers={"num_examples": 0.0}), "numbers/num_examples: is 0.0"),
    "negative examples": (lambda u: u.put(numbers={"num_examples": -5.0}), "numbers/num_examples: is -5.0"),
    "absurd examples": (lambda u: u.put(numbers={"num_examples": 1e12}), "numbers/num_examples: is 1000000000000.0"),
    "examples as text": (lambda u: u.put(numbers={"num_examples": "many"}), "a str as number 'num_examples'"),
    "nothing": (lambda u: None, "client_update returned (NoneType, Message)"),
    "arrays instead of a tree": (lambda u: u.put(trees={"params": {}}), "a dict as tree 'params', wanted a Tree"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_update_is_left_out_by_name_and_the_others_go_on(name):
    spoil, said = SPOILED[name]
    result = run(Spoiled(spoil=spoil))
    assert [log.accepted for log in result.history] == [("north", "west")] * 2
    assert set(result.left_out) == {"south"}
    assert said in result.left_out["south"][1]
    assert not result.is_complete
    assert f"south left out of rounds 1 and 2: {result.left_out['south'][2]}" in result.table()
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["left_out"]["south"]["1"].startswith(
        result.left_out["south"][1]
    )


def test_those_who_are_left_out_move_nothing():
    spoiled = run(Spoiled(spoil=lambda u: each(u, lambda a: a * np.nan)))
    without = [c for c in clients() if c.name != "south"]
    # The same start: the first client of the group offers it.
    assert spoiled.state == run(members=without).state


def test_an_update_of_zeros_is_accepted():
    result = run(Spoiled(spoil=lambda u: with_params(u, params(u) * 0.0)))
    assert result.is_complete
    assert result.history[0].accepted == ("north", "south", "west")


def test_a_constant_model_takes_part_through_its_predictions():
    members = [
        pf.Client("north", pf.sklearn(RandomForestClassifier(5)), data=rows(0), split=pf.Split(public=0.2)),
        pf.Client("flat", pf.sklearn(DummyClassifier()), data=rows(1), split=pf.Split(public=0.2)),
    ]
    result = run(pf.FedMD(), members)
    assert result.is_complete
    assert result.test["flat"]["auc"] == 0.5


def test_all_refused_ends_in_one_error_that_says_why():
    with pytest.raises(pf.errors.RunError, match="no quorum") as caught:
        run(Spoiled(spoil=lambda u: each(u, lambda a: a * np.nan)), clients(("south",)))
    assert "south: params/coef: value at [0, 0] is nan" in str(caught.value)
    assert caught.value.result.history == ()


def test_all_raising_ends_in_one_error_with_the_last_lines():
    with pytest.raises(pf.errors.RunError) as caught:
        run(Spoiled(spoil=lambda u: 1 / 0), clients(("south",)))
    assert "south: ZeroDivisionError: division by zero" in str(caught.value)
    assert "test_mistakes.py" in str(caught.value)


def test_a_quorum_that_is_not_met_fails_with_the_client_named():
    with pytest.raises(pf.errors.RunError, match="south: ZeroDivisionError"):
        run(Spoiled(spoil=lambda u: 1 / 0), schedule=pf.Sync(minimum=3))


@pytest.mark.parametrize(
    ("said", "data"),
    [
        ("south: the data has no rows", lambda x, y: (x[:0], y[:0])),
        ("south: values are missing", lambda x, y: (np.where(x > 1, np.nan, x), y)),
        ("south: x is ragged", lambda x, y: ([[1, 2], [3]], [0, 1])),
        ("south.* differ in their number of rows", lambda x, y: (x, y[:5])),
        ("south: the target is missing", lambda x, y: (x, np.where(y > 0, np.nan, 0.0))),
        ("south: data= of type int", lambda x, y: 7),
    ],
)
def test_rows_that_cannot_be_used_are_refused_by_name(said, data):
    with pytest.raises(pf.errors.DataError, match=said):
        run(members=clients(south=data(*rows(1))))


def test_a_single_class_everywhere_is_refused_and_at_one_client_it_takes_part():
    x, y = rows(1)
    with pytest.raises(pf.errors.DataError, match="two classes"):
        run(members=clients(("south",), south=(x, y * 0)))
    result = run(members=clients(south=(x, y * 0)))
    assert result.is_complete
    assert "auc" not in result.test["south"]
    assert "accuracy" in result.test["south"]


def test_one_client_only_is_a_federation_of_one():
    result = run(members=clients(("north",)), baselines=None)
    assert result.is_complete
    assert result.rows()[0]["alone"] is not None


def test_a_cohort_larger_than_the_population_asks_all_and_says_so():
    result = run(cohort_size=10)
    assert result.history[0].cohort == ("north", "south", "west")
    assert "a cohort of 10 was asked for and there are 3 clients" in result.table()


def test_needs_that_nobody_meets_are_refused_in_sentences_before_round_1():
    members = clients(("east", "west"), model=lambda: pf.sklearn(RandomForestClassifier(3)))
    with pytest.raises(pf.errors.NeedsError) as caught:
        run(members=members)
    assert str(caught.value).splitlines() == [
        f"{name} (RandomForestClassifier) has no parameters to average; FedAvg needs that. "
        "FedMD, which exchanges predictions on public rows, can use it"
        for name in ("east", "west")
    ]
    with pytest.raises(pf.errors.NeedsError, match="no public rows"):
        run(pf.FedMD(), members)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("algorithm is the class FedAvg", {"algorithm": pf.FedAvg}),
        ("algorithm is a str", {"algorithm": "FedAvg"}),
        ("stop is a str", {"stop": "auc"}),
        ("seed='x'", {"seed": "x"}),
        ("seed=-1", {"seed": -1}),
        ("rounds=0", {"rounds": 0}),
        ("cohort_size=0", {"cohort_size": 0}),
        ("executor='ray' is unknown", {"executor": "ray"}),
        ('workers= needs executor="processes"', {"workers": 2}),
        ("both say who is asked", {"cohort_size": 1, "schedule": pf.Sync()}),
        (r"baselines=\['poolled'\] are unknown", {"baselines": ["poolled"]}),
        ("two clients are called 'a'", {"members": clients(("a", "a"))}),
        ("clients must be pf.Client", {"members": [3]}),
        ("metric 'aucc' is not known", {"stop": lambda: pf.Target("aucc", 0.9)}),
        ("over='nroth' is no client", {"stop": lambda: pf.Target("auc", 0.9, over="nroth")}),
        ("evaluate_every=0 measures none", {"stop": lambda: pf.NoImprovement("auc", 2), "evaluate_every": 0}),
        ("minimum=4 updates a round cannot be met by 3 clients", {"schedule": pf.Sync(minimum=4)}),
    ],
)
def test_an_argument_that_cannot_be_used_says_what_to_write(said, options):
    with pytest.raises(pf.errors.UsageError, match=said):
        run(**{name: value() if name == "stop" and callable(value) else value for name, value in options.items()})


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("port=80000 must be a whole number", {"port": 80000}),
        ("over='nroth' is no client", {"stop": pf.Target("auc", 0.9, over="nroth")}),
        ("evaluate_every=0 measures none", {"stop": pf.Target("auc", 0.9), "evaluate_every": 0}),
    ],
)
def test_a_server_that_cannot_run_is_refused_before_it_listens(said, options):
    with pytest.raises(pf.errors.UsageError, match=said):
        pf.serve(pf.FedAvg(), clients=["north", "south"], rounds=2, **options)


def test_a_model_that_is_not_wrapped_and_a_name_that_cannot_be_one_are_refused():
    with pytest.raises(pf.errors.UsageError, match="wrap it"):
        pf.Client("north", RandomForestClassifier(), data=rows())
    with pytest.raises(pf.errors.UsageError, match="client name 'a/b'"):
        pf.Client("a/b", pf.sklearn(RandomForestClassifier()), data=rows())


def test_a_client_of_another_width_is_left_out_with_the_entry_named():
    result = run(members=clients(south=rows(1, width=2)))
    assert "coef is float64[1, 3], expected float64[1, 2]" in result.left_out["south"][1]
    assert "south" not in result.test


def test_a_checkpoint_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(pf.errors.StorageError, match="cannot be made"):
        run(checkpoint=tmp_path / "file" / "run")


def test_a_worker_that_is_killed_costs_its_client_only():
    def die(update):
        os.kill(os.getpid(), signal.SIGKILL)

    result = run(Spoiled(spoil=die), rounds=1, executor="processes", workers=2)
    assert result.history[0].accepted == ("north", "west")
    assert set(result.left_out) == {"south"}
    assert "south left out of round 1" in result.table()


MISSING = """
import sys
sys.modules[{package!r}] = None
import polyfed as pf
try:
    {use}
except pf.errors.MissingExtraError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("package", "use", "extra"),
    [
        ("torch", "pf.torch", "torch"),
        ("keras", "pf.keras(lambda: None)", "keras"),
        ("sklearn", "pf.sklearn", "sklearn"),
    ],
)
def test_a_missing_extra_says_how_to_install_it(package, use, extra):
    code = MISSING.format(package=package, use=use)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert f'pip install "polyfed[{extra}]"' in said


# ---------------------------------------------------------------------------------------------- tables that differ


def frame(seed, columns=("age", "dose", "gene")):
    x, y = rows(seed)
    return pd.DataFrame(dict(zip(columns, x.astype(float).T, strict=True))).assign(sick=y)


def framed(north, south, **options):
    return [
        pf.Client(name, pf.sklearn(LogisticRegression()), data=data, target="sick", **options)
        for name, data in (("north", north), ("south", south))
    ]


def test_columns_in_another_order_mean_what_their_names_say():
    straight = run(members=framed(frame(0), frame(1)))
    turned = run(members=framed(frame(0), frame(1)[["gene", "sick", "dose", "age"]]))
    assert turned.state.digest == straight.state.digest
    assert turned.test == straight.test
    assert "columns of south were put into the order of north" in turned.table()
    assert straight.notes == ()


def test_other_columns_under_averaged_parameters_are_warned_of_by_name():
    with pytest.warns(PreprocessingWarning, match="south, beside north, has no 'gene' and has 'mass' besides"):
        run(members=framed(frame(0), frame(1, ("age", "dose", "mass"))))


def test_equal_preprocessings_that_made_other_features_are_warned_of_by_name():
    north, south = (frame(seed).assign(ward=list("ab") * 30) for seed in (0, 1))
    south["ward"] = south["ward"].replace("b", "c")
    with pytest.warns(PreprocessingWarning, match=r"made other features .*south, beside north, has no .*ward_b"):
        run(members=framed(north, south, preprocess=pf.tabular()))


def test_public_rows_that_hold_the_target_are_refused():
    with pytest.raises(pf.errors.DataError, match="public rows have the target column 'sick'; drop it"):
        run(pf.FedMD(public=frame(7)), framed(frame(0), frame(1)))


def test_public_rows_in_another_order_are_read_by_their_names():
    public = frame(7).drop(columns="sick")
    runs = [run(pf.FedMD(public=p), framed(frame(0), frame(1))) for p in (public, public[["gene", "age", "dose"]])]
    assert runs[0].state.digest == runs[1].state.digest


def test_public_rows_of_another_width_name_the_client():
    with pytest.raises(pf.errors.DataError, match=r"north: public= has rows of x \[2\], its own rows are of x \[3\]"):
        run(pf.FedMD(public=rows(7, width=2)[0]))


def test_public_rows_that_a_client_is_tested_on_are_refused_by_number_and_name():
    with pytest.raises(
        pf.errors.DataError,
        match="south: the public rows hold 9 of 9 validation rows and 12 of 12 test rows of this client",
    ):
        run(pf.FedMD(public=np.concatenate([rows(7)[0], rows(1)[0]])))
    x, y = rows(1)
    told = [pf.Client("south", pf.sklearn(LogisticRegression()), data=(x, y), consents="overlap")]
    assert run(pf.FedMD(public=x), told).is_complete


def test_the_same_case_at_two_clients_is_warned_of_when_one_makes_it_public():
    members = [
        pf.Client(name, pf.sklearn(LogisticRegression()), data=rows(1), split=pf.Split(public=0.4))
        for name in ("north", "south")
    ]
    with pytest.warns(LeakWarning, match=r"(north|south): rows that other clients set aside as public equal [35] of"):
        run(pf.FedMD(), members, rounds=1)


def test_public_rows_with_other_columns_name_the_client_and_the_columns():
    public = frame(7, ("age", "dose", "mass")).drop(columns="sick")
    for preprocess in (None, pf.tabular()):
        with pytest.raises(pf.errors.DataError, match=r"north: .*lack column 'gene'.* have column 'mass' besides"):
            run(pf.FedMD(public=public), framed(frame(0), frame(1), preprocess=preprocess))


# ---------------------------------------------------------------------------------------------- classes that differ


def three_classes(seed, names, keep=(0, 1, 2)):
    x, _ = rows(seed, n=120)
    y = np.digitize(x[:, 0], [-0.4, 0.4])
    kept = np.isin(y, keep)
    return x[kept], np.array(names)[y[kept]]


@pytest.mark.parametrize("algorithm", [lambda: pf.FedMD(public=rows(7)[0]), pf.FedAvg])
def test_a_client_that_lacks_a_class_or_meets_them_in_another_order_agrees_on_all_of_them(algorithm):
    names = ("low", "mid", "high")
    north, south = three_classes(0, names), three_classes(1, names, keep=(2, 0))
    assert south[1][0] != north[1][0]
    result = run(algorithm(), clients(("north", "south"), north=north, south=south), rounds=1)
    assert result.is_complete
    assert result.population.problem.classes == ("high", "low", "mid")
    assert result.test["north"]["accuracy"] > 0.7
    assert result.test["south"]["accuracy"] > 0.7


def test_classes_of_another_kind_name_both_clients():
    x, y = rows(1)
    with pytest.raises(pf.errors.DataError, match="north's target holds numbers, south's holds text"):
        run(members=clients(("north", "south"), south=(x, np.array(["no", "yes"])[y])))


class NoLink:
    """What `prepared_site` asks of a link."""

    def __init__(self, public):
        self.public = public

    def blob(self, digest):
        return to_message(Raw({"x": self.public}))


def site_of_a_run(public=None, classes=("0", "1"), **client):
    member = pf.Client("south", pf.sklearn(LogisticRegression()), data=rows(1), **client)
    manifest = SimpleNamespace(public="digest" if public is not None else "", problem=Problem(classes, 2), seed=0)
    return prepared_site(member, member.read(), manifest, pf.FedMD(), NoLink(public))


def test_a_site_of_a_network_run_holds_the_public_rows_against_its_own():
    x, _ = rows(1)
    with pytest.raises(pf.errors.DataError, match=r"south: the public rows hold .* 12 of 12 test rows of this client"):
        site_of_a_run(x)
    assert len(site_of_a_run(x, consents="overlap").public) == 60


def test_a_class_that_was_not_agreed_names_client_and_class():
    with pytest.raises(pf.errors.DataError, match="south: class '1' is not among the agreed classes '0', '2'"):
        site_of_a_run(rows(7)[0], classes=("0", "2"))


# ---------------------------------------------------------------------------------------------- whose mistake it is


def test_a_mistake_that_an_adapter_finds_names_the_client_once(monkeypatch):
    def first(model, rows, env):
        raise pf.errors.SpecError("3 outputs for 2 classes")

    members = clients()
    monkeypatch.setattr(type(members[0].model), "first", first)
    with pytest.raises(pf.errors.SpecError, match=r"^north: 3 outputs for 2 classes$"):
        run(members=members)
    for said in ("wrong", "south: wrong"):
        with pytest.raises(pf.errors.DataError) as caught, naming("south"):
            raise pf.errors.DataError(said)
        assert str(caught.value) == "south: wrong"


def test_a_function_for_data_that_raises_names_the_client():
    def load():
        raise FileNotFoundError("no such file: rows.csv")

    with pytest.raises(pf.errors.DataError, match="south: data= could not be read: FileNotFoundError: no such file"):
        run(members=clients(south=load))


def test_a_split_that_is_a_number_says_what_to_write():
    with pytest.raises(
        pf.errors.UsageError, match=r"north: split=0.2 is a float; give fractions, pf.Split\(test=0.2\)"
    ):
        pf.Client("north", pf.sklearn(LogisticRegression()), data=rows(), split=0.2)


def test_clients_may_come_from_a_generator_and_one_alone_goes_into_a_list():
    assert run(members=(client for client in clients()), baselines=None).baselines["alone"]
    with pytest.raises(pf.errors.UsageError, match="clients is a Client; give a list"):
        run(members=clients()[0])


# ---------------------------------------------------------------------------------------------- what a result says


def test_a_shared_model_that_is_not_there_is_said_and_not_looked_for():
    members = clients(model=lambda: pf.sklearn(RandomForestClassifier(3)))
    result = run(pf.FedMD(public=rows(7)[0]), members, rounds=1)
    with pytest.raises(pf.errors.UsageError, match="FedMD has no whole model that all share"):
        _ = result.model
    assert repr(result) == "<Result of FedMD: 1 round, 3 clients>"


def test_a_roll_back_is_said_in_the_table_and_to_machines():
    result = run()
    assert "the models are those" not in result.table()
    back = replace(result, version=1)
    assert "the models are those of round 1" in back.table()
    assert (result.to_dict()["rolled_back_to"], back.to_dict()["rolled_back_to"]) == (None, 1)


def test_a_metric_that_a_client_cannot_have_is_said_beside_the_mean():
    x, y = rows(1)
    table = run(members=clients(("north", "south"), south=(x, y * 0))).table()
    assert "south: auc is undefined, its test rows hold one class; the mean is over 1 of 2 sites" in table


def test_a_table_of_many_clients_shows_its_ends():
    names = [f"site{i:02d}" for i in range(33)]
    result = run(members=clients(names), rounds=1)
    table = result.table()
    assert sum(line.startswith("site") for line in table.splitlines()) == 20
    assert "of 33 clients; 13 are left out of this print" in table
    assert min(result.test, key=lambda name: result.test[name]["auc"]) in table
