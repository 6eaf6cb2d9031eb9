"""Checks of options, made when an algorithm is: each raises `UsageError` with the option, its value and what may stand there."""

from __future__ import annotations

import math

from polyfed.core.errors import UsageError


def positive(**options: float) -> None:
    """Each is a finite number above 0."""
    for name, value in options.items():
        if not 0.0 < value < math.inf:
            raise UsageError(f"{name}={value!r} must be a number above 0")


def fraction(**options: float) -> None:
    """Each is at least 0 and below 1."""
    for name, value in options.items():
        if not 0.0 <= value < 1.0:
            raise UsageError(f"{name}={value!r} must be at least 0 and below 1")


def at_least(least: int, **options: int | None) -> None:
    """Each is a count of at least so many; None is a setting that was left out."""
    for name, value in options.items():
        if value is not None and value < least:
            raise UsageError(f"{name}={value!r} must be at least {least}")


def one_of(*words: str | None, **options: str | None) -> None:
    """Each is one of these words; None among them is an option that may be left out."""
    for name, value in options.items():
        if value not in words:
            written = [f'"{word}"' for word in words if word is not None] + ["leave it out"] * (None in words)
            raise UsageError(f"{name}={value!r} is unknown; write {', '.join(written[:-1])} or {written[-1]}")
