"""The invariants hold."""

import pytest
from invariants import INVARIANTS


@pytest.mark.parametrize("name", INVARIANTS)
def test_invariant_when_checked_holds(name):
    INVARIANTS[name]()
