from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from federations import clients, rows, run
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import polyfed as pf
from polyfed.core.message import Message
from polyfed.run import files


def net():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def keras_net():
    import keras

    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.layers.Dense(6, activation="relu"), keras.layers.Dense(2, activation="softmax")])


def as_numpy(tensor):
    """Of a tensor of either backend; Keras's own way warns on torch."""
    return np.asarray(tensor.detach() if hasattr(tensor, "detach") else tensor)


MODELS = {
    "net": lambda: pf.torch(net, epochs=2),
    "dense": lambda: pf.keras(keras_net),
    "forest": lambda: pf.sklearn(RandomForestClassifier(7)),
    "logistic": lambda: pf.sklearn(LogisticRegression()),
    "bayes": lambda: pf.sklearn(GaussianNB()),
}
PREDICT = {
    "net": lambda m, x: m(torch.tensor(x)).detach().numpy(),
    "dense": lambda m, x: as_numpy(m(x, training=False)),
}


@pytest.fixture(scope="module")
def mixed():
    """Five clients, five kinds of model, by distillation; and where it was saved, with every unpickler barred."""
    members = [
        pf.Client(name, make(), data=rows(i), split=pf.Split(public=0.2))
        for i, (name, make) in enumerate(MODELS.items())
    ]
    return run(pf.FedMD(), members)


@pytest.fixture
def no_pickle(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("joblib.load", refuse)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def into(name):
    return net() if name == "net" else None


def test_every_model_comes_back_with_the_same_predictions_and_without_pickle(mixed, tmp_path, no_pickle):
    saved = pf.load(mixed.save(tmp_path / "out"))
    x, _ = rows(9)
    for name in MODELS:
        predict = PREDICT.get(name, lambda m, x: m.predict_proba(x))
        before, after = predict(mixed.models[name], x), predict(saved.model(name, into=into(name)), x)
        assert before.tobytes() == after.tobytes(), name
    assert saved.notes == ()
    assert set(saved.models) == {"dense", "forest", "logistic", "bayes"}
    assert len(saved.models) == 4
    assert saved.models["bayes"] is saved.models["bayes"]


def test_state_memories_and_numbers_come_back(mixed, tmp_path):
    saved = pf.load(mixed.save(tmp_path / "deep" / "out"))
    assert saved.state.digest == mixed.state.digest
    assert {name: m.digest for name, m in saved.memories.items()} == {n: m.digest for n, m in mixed.memories.items()}
    assert saved.metrics == {name: dict(metrics) for name, metrics in mixed.test.items()}
    assert saved.info == json.loads(json.dumps(mixed.to_dict()))
    assert saved.kinds["forest"] == {"framework": "sklearn", "kind": "RandomForestClassifier", "file": "forest.skops"}
    assert saved.state_of("net") == mixed.state_of("net")


def test_a_torch_model_without_into_or_with_another_architecture_is_refused_in_a_sentence(mixed, tmp_path):
    saved = pf.load(mixed.save(tmp_path / "out"))
    with pytest.raises(pf.errors.UsageError, match=r"saved.model\('net', into=MyNet\(\)\)"):
        saved.models["net"]
    with pytest.raises(pf.errors.UsageError, match="into= is a int"):
        saved.model("net", into=3)
    with pytest.raises(pf.errors.SpecError, match=r"does not fit this Sequential: .*0.weight"):
        saved.model("net", into=nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))
    with pytest.raises(pf.errors.SpecError, match="unexpected '3"):
        saved.model("net", into=nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)))
    with pytest.raises(pf.errors.UsageError, match="leave it out"):
        saved.model("bayes", into=net())
    with pytest.raises(pf.errors.UsageError, match="there is no client 'nobody'"):
        saved.model("nobody")


def test_a_kept_optimizer_is_no_part_of_the_module(tmp_path):
    members = clients(("north", "south"), model=lambda: pf.torch(net, optimizer="adam", keep_optimizer=True))
    result = run(members=members)
    saved = pf.load(result.save(tmp_path / "out"))
    x = torch.tensor(rows(9)[0])
    assert torch.equal(saved.model("north", into=net())(x), result.models["north"](x))


def test_a_model_that_no_safe_format_takes_is_named_and_its_state_saved(tmp_path):
    members = [
        pf.Client(
            "near", pf.sklearn(KNeighborsClassifier(3, algorithm="kd_tree")), data=rows(0), split=pf.Split(public=0.2)
        ),
        pf.Client("far", pf.sklearn(GaussianNB()), data=rows(1), split=pf.Split(public=0.2)),
    ]
    saved = pf.load(run(pf.FedMD(), members).save(tmp_path / "out"))
    assert len(saved.notes) == 1
    assert saved.notes[0].startswith("near: this KNeighborsClassifier cannot be saved")
    assert set(saved.models) == {"far"}
    assert "near" not in saved.models
    assert len(saved.state_of("near"))
    with pytest.raises(pf.errors.UsageError, match="near: this KNeighborsClassifier cannot be saved"):
        saved.model("near")


@pytest.mark.parametrize(
    "given", [lambda saved: saved, lambda saved: saved.state, lambda saved: saved.state.trees["params"]]
)
@pytest.mark.parametrize("algorithm", [pf.FedAvg, pf.FedAdam])
def test_a_run_goes_on_from_what_was_loaded(tmp_path, given, algorithm):
    members = clients(("north", "south"), model=lambda: pf.torch(lambda: nn.Linear(3, 2)))
    first = run(algorithm(), members)
    saved = pf.load(first.save(tmp_path / "out"))
    second = pf.rounds(pf.FedAvg(initial=given(saved)), members, rounds=1)
    start = next(iter(second)).state
    assert start.trees["params"] == first.state.trees["params"]


def test_a_start_that_cannot_be_one_is_refused():
    for wrong, said in ((3, "initial= is a int"), (Message(), "holds no shared parameters")):
        with pytest.raises(pf.errors.UsageError, match=said):
            run(pf.FedAvg(initial=wrong))


def test_saving_again_replaces_the_whole_folder(tmp_path):
    folder = run(members=clients(("old", "north"))).save(tmp_path / "out")
    assert (folder / "models" / "old.skops").exists()
    run(members=clients(("north", "south"))).save(folder)
    assert set(pf.load(folder).kinds) == {"north", "south"}
    assert not (folder / "models" / "old.skops").exists()
    assert names(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_written_is_a_storage_error_and_nothing_is_left(tmp_path):
    result = run()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    for folder, said in (("file", "is a file"), ("taken", "holds other files"), ("file/out", "cannot be saved")):
        with pytest.raises(pf.errors.StorageError, match=said):
            result.save(tmp_path / folder)
    assert names(tmp_path) == ["file", "taken"]
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def test_a_disk_that_fills_up_keeps_the_earlier_result(tmp_path, monkeypatch):
    result = run()
    folder = result.save(tmp_path / "out")
    before = (folder / "result.json").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_model", full)
    with pytest.raises(pf.errors.StorageError, match="No space left"):
        result.save(folder)
    assert (folder / "result.json").read_bytes() == before
    assert names(tmp_path) == ["out"]


def test_what_is_no_saved_result_is_refused(tmp_path):
    with pytest.raises(pf.errors.StorageError, match="there is no folder"):
        pf.load(tmp_path / "nowhere")
    with pytest.raises(pf.errors.StorageError, match=r"result\.json is missing"):
        pf.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "result.json").write_text("{"), "is no result"),
        (lambda d: (d / "result.json").write_text("[" * 100_000), "is no result"),
        (lambda d: (d / "result.json").write_text('{"format": 99}'), "format 1"),
        (lambda d: (d / "result.json").write_text('{"format": 1, "result": {}, "models": []}'), "has no 'models'"),
        (lambda d: (d / "state.polyfed").write_bytes(b"\0" * 50), "is damaged"),
        (lambda d: (d / "memories" / "north.polyfed").write_bytes(b""), "is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, change, said):
    folder = run().save(tmp_path / "out")
    change(folder)
    with pytest.raises(pf.errors.CorruptError, match=said):
        pf.load(folder)


@pytest.mark.parametrize(
    "hostile",
    [
        {"../evil": {"framework": "sklearn", "kind": "x", "file": "../evil.skops"}},
        {"north": {"framework": "sklearn", "kind": "x", "file": "../../other.skops"}},
        {"north": {"framework": "keras", "kind": "x", "file": "north.skops"}},
        {"north": {"framework": "sklearn", "kind": "x"}},
        {"north": 3},
    ],
)
def test_a_name_out_of_a_file_never_leads_out_of_the_folder(tmp_path, hostile):
    folder = run().save(tmp_path / "out")
    said = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(said | {"models": hostile}))
    with pytest.raises(pf.errors.CorruptError):
        pf.load(folder)


def test_the_file_of_a_state_is_numbers_only(mixed, tmp_path):
    folder = mixed.save(tmp_path / "out")
    told = json.loads((folder / "result.json").read_text())
    assert told["format"] == files.FORMAT
    assert np.isfinite(told["result"]["seconds"])
    assert {p.suffix for p in (folder / "models").iterdir()} == {".polyfed", ".keras", ".skops"}
