"""Columns over a network, where nobody sees another's table: each client says digests of its names, the server compares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b

from polyfed.core.algorithm import Algorithm
from polyfed.core.errors import DataError
from polyfed.core.tree import Tree
from polyfed.data import Raw
from polyfed.data.table import is_frame
from polyfed.run.client import averaged_together


def digests_of(raw: Raw) -> tuple[str, str]:
    """Hex digests of the names of a table's columns, sorted and in their own order; "" twice where columns have no names.

    A digest of common names can be guessed; a run's manifest and its public rows say as much.
    """
    names = [[key, str(column)] for key, value in raw.inputs.items() if is_frame(value) for column in value.columns]
    return (_digest(sorted(names)), _digest(names)) if names else ("", "")


def _digest(names: list[list[str]]) -> str:
    return blake2b(json.dumps(names).encode(), digest_size=16).hexdigest()


def check_order(
    algorithm: Algorithm, columns: Mapping[str, tuple[str, str]], groups: Mapping[str, str], first: Mapping[str, Tree]
) -> None:
    """Raises `DataError` where parameters would be averaged of clients with the same columns in different orders."""
    for names in averaged_together(algorithm, groups, first):
        orders: dict[str, tuple[str, str]] = {}
        for name in names:
            same, order = columns[name]
            other, known = orders.setdefault(same, (name, order)) if same else (name, order)
            if known != order:
                raise DataError(
                    f"{other} and {name} have the same columns in different orders, and {algorithm.name} averages their "
                    "parameters; give every table in one order, such as table[sorted(table.columns)]"
                )
