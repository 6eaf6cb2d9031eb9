"""The invariants hold, and each of the numbers by which docstrings name them is proved somewhere or is of what is not built."""

import re
from pathlib import Path

import pytest
from invariants import ABSENT, ELSEWHERE, INVARIANTS

import polyfed

TESTS = Path(__file__).parents[1]
HERE = {int(name[1:3]) for name in INVARIANTS}


@pytest.mark.parametrize("name", INVARIANTS)
def test_invariant_when_checked_holds(name):
    INVARIANTS[name]()


def test_numbers_when_counted_are_each_proved_once_here_or_elsewhere_or_not_to_be_proved_yet():
    assert HERE | ELSEWHERE.keys() | ABSENT.keys() == set(range(1, 63))
    assert not ABSENT.keys() & (HERE | ELSEWHERE.keys())


@pytest.mark.parametrize("number", ELSEWHERE)
def test_tests_when_named_are_there(number):
    for place in ELSEWHERE[number]:
        file, _, name = place.partition("::")
        assert re.search(rf"^(async )?def {name}\(", (TESTS / file).read_text(), re.MULTILINE), place


def test_invariants_when_a_docstring_names_them_are_proved():
    named = set()
    for path in (Path(polyfed.__file__).parent / "algorithms").glob("*.py"):
        for said in re.findall(r"Invariants\b[^:]*:((?:.|\n)*?)(?:\.|\n *)\n", path.read_text()):
            plain = re.sub(r"\([^)]*\)?", "", said)
            for first, last in re.findall(r"\b(\d{1,2})(?:-(\d{1,2}))?\b", plain):
                named |= set(range(int(first), int(last or first) + 1))
    assert named >= {1, 2, 9, 10, 19, 40, 52, 59}
    assert named <= HERE | ELSEWHERE.keys(), f"{named - HERE - ELSEWHERE.keys()} are named and not proved"
