"""Rows: where they come from, who holds which, how they are split and prepared; without any framework imported."""

from polyfed.data.noise import mixup_public, noise_public
from polyfed.data.overlap import check_public_apart
from polyfed.data.partition import by_column, dirichlet, iid, pathological, per_client, quantity_skew, shards
from polyfed.data.prepare import Prepared, described, prepare, prepare_unlabelled, tabular
from polyfed.data.problem import encode_target, problem_of
from polyfed.data.public import concat, from_message, schema, schema_difference, to_message
from polyfed.data.sources import read, read_public
from polyfed.data.split import LeakWarning, Parts, Split, divide, duplicates, folds
from polyfed.data.synthetic import generate_public, merge_statistics, public_statistics
from polyfed.data.table import Raw

__all__ = [
    "LeakWarning",
    "Parts",
    "Prepared",
    "Raw",
    "Split",
    "by_column",
    "check_public_apart",
    "concat",
    "described",
    "dirichlet",
    "divide",
    "duplicates",
    "encode_target",
    "folds",
    "from_message",
    "generate_public",
    "iid",
    "merge_statistics",
    "mixup_public",
    "noise_public",
    "pathological",
    "per_client",
    "prepare",
    "prepare_unlabelled",
    "problem_of",
    "public_statistics",
    "quantity_skew",
    "read",
    "read_public",
    "schema",
    "schema_difference",
    "shards",
    "tabular",
    "to_message",
]
