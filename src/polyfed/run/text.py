"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], *, left: int = 2) -> list[str]:
    """Columns of equal width, the first `left` of them to the left and the rest, numbers, to the right.

    An empty line becomes a rule of dashes.

    >>> aligned([["who", "rows"], [], ["north", "9"]], left=1)
    ['who    rows', '-----  ----', 'north     9']
    """
    widths = [max(map(len, column)) for column in zip(*filter(None, lines), strict=True)]
    rule = ["-" * width for width in widths]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line or rule, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
