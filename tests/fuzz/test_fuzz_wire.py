"""Replays the saved inputs of `fuzz_wire.py`, without atheris."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

from polyfed.core import wire

HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("fuzz_wire", HERE / "fuzz_wire.py")
fuzz_wire = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz_wire)
INPUTS = sorted(path.name for path in fuzz_wire.CORPUS.iterdir())


@pytest.mark.parametrize("name", INPUTS)
def test_saved_input_when_replayed_is_refused_or_decodes_to_its_only_form(name):
    fuzz_wire.target((fuzz_wire.CORPUS / name).read_bytes())


def test_corpus_when_replayed_reaches_every_outcome():
    data = [(fuzz_wire.CORPUS / name).read_bytes() for name in INPUTS]
    outcomes = Counter(fuzz_wire.check(each) for each in data) + Counter(
        fuzz_wire.check(fuzz_wire.mended(each)) for each in data
    )
    assert set(outcomes) == {"Message", "MalformedError", "LimitError"}
    assert outcomes["Message"] >= 14


def test_corpus_is_small():
    sizes = [(fuzz_wire.CORPUS / name).stat().st_size for name in INPUTS]
    assert 20 < len(sizes) < 200
    assert sum(sizes) < 300_000


@pytest.mark.parametrize("name", sorted(name for name in fuzz_wire.seeds() if name.endswith("-parted")))
def test_mended_when_a_seed_is_parted_is_the_whole_message(name):
    """The negative control: without it the fuzzer might never get behind the checksums."""
    seeds = fuzz_wire.seeds()
    assert fuzz_wire.mended(seeds[name]) == seeds[name.removesuffix("-parted")]
    beyond = ("many" in name) or ("long" in name)
    assert fuzz_wire.check(fuzz_wire.mended(seeds[name])) == ("LimitError" if beyond else "Message")


def test_mutant_when_the_order_of_trees_is_not_checked_the_property_fails(monkeypatch):
    """Two arrays without elements in swapped order: all offsets fit, and a second form of one message would pass."""
    monkeypatch.setattr(wire, "_check_places", lambda specs, declared: None)
    text = b'{"__metadata__":{"polyfed":"1","trees":"a/b","crc32":""},"b/x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    text += b'"a/x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}\n'
    with pytest.raises(AssertionError, match="a second form"):
        fuzz_wire.target(bytes(8) + text)
