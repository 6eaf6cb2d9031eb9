from __future__ import annotations

import json
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.core import records as rec
from polyfed.core.errors import CorruptError
from polyfed.core.records import NEXT, Phase, State, apply, decode, encode, replay

EXAMPLES: list[rec.Record] = [
    rec.Enrolled("a"),
    rec.Gone("a"),
    rec.Initial("d0"),
    rec.TrainingOpened(0.1, 1, 0, ("a", "b"), 16, 30.0),
    rec.TrainingOpened(1, 2, 0, (), 16),
    rec.EvaluationOpened(2.5, 1, "validation", ("a",), None),
    rec.HandedOut("a", 0, 0, 1, 31.0),
    rec.Accepted("1.0.0", 0, "u0", 2),
    rec.Dropped("1.1.0", 'said "no"\n\U0001f600 \u2028'),
    rec.Held("1.2.0", "u2"),
    rec.Closed(("1.3.0", "1.4.0")),
    rec.Abandoned("too few", counts=False),
    rec.Committed(1, "m1"),
    rec.WentOn(1, "log1"),
    rec.Ended("enough", 1, "log1"),
    rec.Finished("enough", 1, failed=True),
]


def test_every_kind_of_record_has_an_example_and_an_effect() -> None:
    assert {type(record) for record in EXAMPLES} == set(rec._APPLY) == {kind for _, kind in NEXT}


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_a_record_when_encoded_and_decoded_is_the_same(record: rec.Record) -> None:
    line = encode(record)
    assert decode(line) == record
    assert json.dumps(json.loads(line), separators=(",", ":")).encode() == line
    assert b"\n" not in line
    assert encode(decode(line)) == line


_VALUES = {
    "str": st.text(),
    "EvaluatedRows": st.sampled_from(["train", "validation", "test"]),
    "int": st.integers(),
    "bool": st.booleans(),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "float | None": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "tuple[str, ...]": st.lists(st.text()).map(tuple),
}
RECORDS = st.one_of([st.builds(kind, **{f.name: _VALUES[str(f.type)] for f in fields(kind)}) for kind in rec._APPLY])


@given(RECORDS)
@settings(derandomize=True, max_examples=300, deadline=None)
def test_any_record_when_encoded_and_decoded_is_the_same(record: rec.Record) -> None:
    again = decode(encode(record))
    assert again == record
    assert repr(again) == repr(record), "0.0 and -0.0, 1 and 1.0 are different"


@given(
    st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())
)
@settings(derandomize=True, max_examples=300, deadline=None)
def test_anything_else_when_decoded_is_corrupt(line: bytes) -> None:
    with pytest.raises(CorruptError):
        decode(line)


@pytest.mark.parametrize(
    "line",
    [
        b'["Committed",1]',
        b'["Committed",1,"m","more"]',
        b'["Committed","1","m"]',
        b'["Committed",true,"m"]',
        b'["Committed",1.0,"m"]',
        b'["Enrolled",null]',
        b'["Closed",["a",1]]',
        b'["Closed","ab"]',
        b'["State"]',
        b'["Committed",1,"m"]["Committed",1,"m"]',
        b"[]",
        b"[[]]",
        b'{"Committed":1}',
        b"[" * 100_000,
    ],
)
def test_a_record_with_wrong_fields_when_decoded_is_corrupt(line: bytes) -> None:
    with pytest.raises(CorruptError):
        decode(line)


def test_a_record_that_is_not_finite_is_not_written() -> None:
    with pytest.raises(ValueError, match="cannot hold inf"):
        encode(rec.TrainingOpened(float("inf"), 1, 0, (), 16))


# ---------------------------------------------------------------------------------------- states


def opened(*clients: str, lease: float | None = None) -> State:
    enrolled = [rec.Enrolled(client) for client in clients]
    return replay([*enrolled, rec.Initial("m0"), rec.TrainingOpened(0.0, 1, 0, clients, 16, lease)])


def test_apply_when_given_a_record_leaves_the_state_before_as_it_was() -> None:
    before = opened("a", "b")
    kept = before.to_bytes()
    after = apply(apply(before, rec.Accepted("1.0.0", 0, "u")), rec.Dropped("1.1.0", "no"))
    assert before.to_bytes() == kept
    assert after.to_bytes() != kept


@pytest.mark.parametrize("phase", Phase)
def test_a_record_that_a_phase_does_not_know_is_corrupt(phase: Phase) -> None:
    for record in EXAMPLES:
        if (phase, type(record)) not in NEXT:
            with pytest.raises(CorruptError, match=f"cannot follow in phase {phase.value}"):
                apply(State(phase=phase), record)


@pytest.mark.parametrize(
    "record",
    [
        rec.Accepted("1.7.0", 7, "u"),
        rec.Dropped("1.7.0", "no"),
        rec.Closed(("1.7.0",)),
        rec.HandedOut("a", 0, 0, 2),
    ],
)
def test_a_record_that_names_a_task_that_is_not_out_is_corrupt(record: rec.Record) -> None:
    with pytest.raises(CorruptError):
        apply(opened("a", "b"), record)


def test_records_that_contradict_what_was_are_corrupt() -> None:
    state = apply(opened("a", "b"), rec.Accepted("1.0.0", 0, "u"))
    with pytest.raises(CorruptError, match="is taken"):
        apply(state, rec.Accepted("1.1.0", 0, "u"))
    computing = apply(state, rec.Closed(("1.1.0",)))
    for version in (0, 2):
        with pytest.raises(CorruptError, match="follows version 0"):
            apply(computing, rec.Committed(version, "m"))
    with pytest.raises(CorruptError):
        apply(computing, rec.Held("1.7.0", "u"))


def test_equal_states_have_equal_bytes_and_every_field_shows_in_them() -> None:
    state = opened("a", "b", lease=5.0)
    assert state.to_bytes() == opened("a", "b", lease=5.0).to_bytes()
    seen = json.loads(state.to_bytes())
    assert set(seen) == {f.name for f in fields(State)}
    others = [opened("b", "a", lease=5.0), opened("a", "b", lease=6.0), apply(state, rec.Dropped("1.0.0", "no"))]
    assert len({x.to_bytes() for x in (state, *others)}) == 4


def test_a_verdict_when_asked_for_is_told_to_its_own_client_only() -> None:
    state = apply(apply(opened("a", "b"), rec.Accepted("1.0.0", 0, "u")), rec.Dropped("1.1.0", "no"))
    assert state.verdict("a", "1.0.0") == "accepted"
    assert state.verdict("b", "1.0.0") == ""
    assert state.verdict("b", "1.1.0") == "no"
    assert state.verdict("b", "1.2.0") == ""


def test_verdicts_when_collections_pass_are_forgotten_but_for_each_clients_newest_accepted() -> None:
    state = apply(apply(opened("a", "b"), rec.Accepted("1.0.0", 0, "u")), rec.Dropped("1.1.0", "no"))
    for round_num in range(1, 9):
        told = state.verdict("b", "1.1.0")
        assert told == ("no" if round_num <= rec.REMEMBERED + 1 else "")
        closed = apply(state, rec.Closed(tuple(state.leases)))
        state = apply(apply(closed, rec.Committed(round_num, "m")), rec.WentOn(round_num))
        state = apply(state, rec.TrainingOpened(0.0, round_num + 1, 0, ("a", "b"), 16))
    assert state.verdict("a", "1.0.0") == "accepted"
    assert len(state.older) == rec.REMEMBERED
