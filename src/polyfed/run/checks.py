"""The contracts as checks that anybody can run over their own part: ``pf.checks.check_algorithm(MyAlgorithm())``."""

from polyfed.core.checks_algorithm import check_aggregator, check_algorithm
from polyfed.core.checks_executor import check_executor
from polyfed.core.checks_model import check_model
from polyfed.core.checks_store import check_blobs, check_journal

__all__ = ["check_aggregator", "check_algorithm", "check_blobs", "check_executor", "check_journal", "check_model"]
