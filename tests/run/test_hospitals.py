"""The recipe of the four hospitals: what leaves a hospital in each mode, and that the divisions are usable."""

from collections.abc import Iterator

import numpy as np
import pytest

from polyfed import data as tables
from polyfed.core import wire
from polyfed.core.errors import UsageError
from polyfed.core.message import Message
from polyfed.data import Split, datasets
from polyfed.executors.loop import Loop
from polyfed.run import hospitals
from polyfed.run.simulate import simulate

SMALL = hospitals.Settings(epochs=1, trees=5, rounds=2, digest=1, drawn=60)
NUMBER, WORD = 98765.4375, "only this patient has it"  # the number is exact in half of float32's digits


class Overheard(Loop):
    """Keeps every message that goes to or comes from a hospital."""

    def __init__(self):
        super().__init__()
        self.messages: list[Message] = []

    def submit(self, jobs):
        self.messages += [job.message for job in jobs]
        super().submit(jobs)

    def replies(self) -> Iterator:
        for reply in super().replies():
            assert reply.error is None, reply.error
            self.messages.append(reply.message)
            yield reply


def divisions(seed=0, public=hospitals.PUBLIC):
    return {
        name: tables.divide(name, hospitals.frame_rows(name), Split(0.0, 0.25, public), seed=seed)
        for name in hospitals.SITES
    }


def plant(monkeypatch, chosen):
    """Gives the rows `chosen` (hospital -> row numbers) a number and a word that nobody else has."""
    read = hospitals.frame_rows

    def planted(name):
        raw = read(name)
        raw.x.loc[chosen[name], "trestbps"] = NUMBER
        raw.x.loc[chosen[name], "restecg"] = WORD
        return raw

    monkeypatch.setattr(hospitals, "frame_rows", planted)


def everything_said(mode, parts) -> list[Message]:
    """All that leaves a hospital, and all that is sent to one: statistics, shared rows, every round's messages."""
    algorithm, clients = hospitals.clients(0, parts=parts, mode=mode, settings=SMALL)
    overheard = Overheard()
    result = simulate(algorithm, clients, rounds=2, seed=0, executor=overheard, baselines=())
    rows = {client.name: client.read() for client in clients}
    first = list(hospitals.site_statistics(rows, parts).values()) if mode == "statistics" else []
    assert overheard.messages
    return [*first, tables.to_message(result.population.public), *overheard.messages]


def is_found(messages) -> bool:
    """Whether the planted number or word stands in a message, as a value or anywhere in its bytes on the wire."""
    needles = [WORD.encode(), np.float64(NUMBER).tobytes(), np.float32(NUMBER).tobytes(), str(NUMBER).encode()]
    for message in messages:
        said = b"".join(bytes(piece) for piece in wire.encode(message))
        arrays = [array for tree in message.trees.values() for array in tree.values()]
        if any(needle in said for needle in needles) or any((array == NUMBER).any() for array in arrays):
            return True
        if NUMBER in message.numbers.values() or any(WORD in words for words in message.text.values()):
            return True
    return False


def test_statistics_when_values_are_planted_in_private_rows_then_no_message_holds_them(monkeypatch):
    parts = divisions(public=0.0)
    plant(monkeypatch, {name: part.train[:1] for name, part in parts.items()})
    assert not is_found(everything_said("statistics", parts))


def test_statistics_when_many_patients_share_a_word_then_it_is_spoken_of(monkeypatch):
    """The search can find: five patients are no secret."""
    parts = divisions(public=0.0)
    ill = {n: p.train[hospitals.frame_rows(n).target[p.train]][:6] for n, p in parts.items()}
    plant(monkeypatch, ill)
    assert is_found(everything_said("statistics", parts))


def test_statistics_when_an_extreme_value_grows_then_what_is_sent_stays_the_same(monkeypatch):
    parts = divisions(public=0.0)
    rows = {name: hospitals.frame_rows(name) for name in hospitals.SITES}
    said = []
    for value in (500.0, NUMBER):
        for name, raw in rows.items():
            raw.x.loc[parts[name].train[0], "trestbps"] = value
        said.append([b"".join(wire.encode(m)) for m in hospitals.site_statistics(rows, parts).values()])
    assert said[0] == said[1]


def test_statistics_when_rows_are_drawn_then_none_is_a_patient():
    rows = {name: hospitals.frame_rows(name) for name in hospitals.SITES}
    drawn = hospitals.drawn_rows(rows, divisions(public=0.0), 400, seed=0)
    assert list(drawn.columns) == list(rows["va"].x.columns)
    patients = tables.concat([raw.unlabelled() for raw in rows.values()])
    both = tables.concat([patients, tables.read("drawn", drawn, labelled=False)])
    first = np.arange(len(patients))
    assert tables.duplicates(both, first, np.arange(len(patients), len(both))) == 0


def test_rows_when_values_are_planted_in_private_rows_then_no_message_holds_them(monkeypatch):
    parts = divisions()
    plant(monkeypatch, {name: part.train[:1] for name, part in parts.items()})
    assert not is_found(everything_said("rows", parts))


def test_rows_when_values_are_planted_in_rows_set_aside_then_they_are_found(monkeypatch):
    parts = divisions()
    plant(monkeypatch, {name: part.public[:1] for name, part in parts.items()})
    assert is_found(everything_said("rows", parts))


def test_rows_when_the_federation_runs_then_only_rows_set_aside_are_shared_and_without_diagnosis():
    parts = divisions()
    algorithm, clients = hospitals.clients(0, parts=parts, settings=SMALL)
    overheard = Overheard()
    public = simulate(algorithm, clients, rounds=2, seed=0, executor=overheard, baselines=()).population.public
    aside = [hospitals.frame_rows(name).take(part.public).unlabelled() for name, part in parts.items()]
    assert public.target is None
    assert public.x.equals(tables.concat(aside).x)
    assert {name for message in overheard.messages for name in message.trees} == {"soft"}
    assert {tree["public"].shape for m in overheard.messages for tree in m.trees.values()} == {(len(public), 2)}


@pytest.mark.parametrize("rotation", range(4))
def test_clients_when_models_rotate_then_each_hospital_trains_another_kind(rotation):
    algorithm, clients = hospitals.clients(0, rotation=rotation, mode="statistics", settings=SMALL)
    result = simulate(algorithm, clients, rounds=2, seed=0, baselines=())
    assert [client.name for client in clients] == list(hospitals.SITES)
    assert not result.errors
    assert {name: 0.3 < found["auc"] <= 1.0 for name, found in result.test.items()} == dict.fromkeys(
        hospitals.SITES, True
    )


def test_models_when_all_rotations_are_taken_then_they_make_a_latin_square():
    def kinds(rotation):
        return [f"{type(m).__name__} {m.kind}" for m in hospitals.models(rotation).values()]

    square = [kinds(rotation) for rotation in range(4)]
    assert all(len(set(line)) == 4 for line in [*square, *zip(*square, strict=True)])


@pytest.mark.parametrize("seed", range(10))
def test_folds_when_a_hospital_has_eight_healthy_patients_then_every_part_has_both_classes(seed):
    for name, frame in datasets.heart().items():
        ill = frame["disease"].to_numpy()
        for test in tables.folds(ill, 4, seed=seed):
            train = np.setdiff1d(np.arange(len(ill)), test)
            rows = hospitals.frame_rows(name).take(train)
            part = tables.divide(name, rows, Split(0.0, 0.0, hospitals.PUBLIC * 4 / 3, "class"), seed=seed)
            for index in (test, train[part.train], train[part.public]):
                assert 0 < ill[index].sum() < len(index)
            if name == "switzerland":
                assert (~ill[test]).sum() == 2
                assert (~ill[train[part.train]]).sum() >= 4


def test_clients_when_the_mode_is_unknown_then_the_message_names_both():
    with pytest.raises(UsageError, match="'rows' or 'statistics'"):
        hospitals.clients(0, mode="columns")
