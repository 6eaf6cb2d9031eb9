"""Checks of options: what passes, and the sentence about what does not."""

import math

import pytest

from polyfed.algorithms.options import at_least, fraction, one_of, positive
from polyfed.core.errors import UsageError


def test_option_when_it_is_allowed_passes():
    positive(a=1e-9, b=1e9)
    fraction(a=0.0, b=0.999)
    at_least(2, a=2, b=None)
    one_of("x", "y", None, a="x", b=None)


@pytest.mark.parametrize(
    ("check", "value", "words"),
    [
        (positive, 0.0, "a=0.0 must be a number above 0"),
        (positive, math.inf, "a=inf must be a number above 0"),
        (positive, math.nan, "a=nan must be a number above 0"),
        (fraction, 1.0, "a=1.0 must be at least 0 and below 1"),
        (fraction, -0.1, "a=-0.1 must be at least 0 and below 1"),
        (fraction, math.nan, "a=nan must be at least 0 and below 1"),
        (lambda **options: at_least(2, **options), 1, "a=1 must be at least 2"),
        (lambda **options: one_of("x", "y", **options), "z", """a='z' is unknown; write "x" or "y\""""),
        (lambda **options: one_of("x", "y", **options), None, """a=None is unknown; write "x" or "y\""""),
        (lambda **options: one_of("x", None, **options), "z", """a='z' is unknown; write "x" or leave it out"""),
    ],
)
def test_option_when_it_is_not_allowed_is_named_with_what_is(check, value, words):
    with pytest.raises(UsageError) as caught:
        check(a=value)
    assert str(caught.value) == words
