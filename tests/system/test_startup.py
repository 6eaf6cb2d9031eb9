"""What is imported when: the package alone pulls in no extra, and a federation none that its models do not use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import polyfed

EXTRAS = {
    "aiohttp", "jax", "jinja2", "keras", "matplotlib", "numba", "pandas", "scipy", "sklearn", "skops", "tensorflow", "torch"
}  # fmt: skip
#: Base dependencies of the command line and of worker processes, and what is slow of the standard library.
LATER = {"asyncio", "cloudpickle", "multiprocessing", "rich", "sqlite3", "ssl", "typer"}
STARTUP = Path(__file__).parents[2] / "benchmarks" / "startup.py"


def imported(code):
    """Top-level names of the modules that a new process has after this code."""
    said = f"{code}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(STARTUP.parent)}
    done = subprocess.run([sys.executable, "-c", said], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_import_when_alone_pulls_in_numpy_at_most():
    found = imported("import polyfed; polyfed.__version__; dir(polyfed)")
    assert not found & (EXTRAS | LATER)


def test_federation_when_its_model_is_numpy_pulls_in_no_extra():
    assert not imported("import startup; startup.federation()") & (
        EXTRAS | {"rich", "typer", "asyncio", "ssl", "sqlite3"}
    )


@pytest.mark.parametrize("name", polyfed.__all__)
def test_public_name_when_asked_for_is_there(name):
    assert getattr(polyfed, name) is not None


def test_imported_when_something_is_imported_sees_it():
    assert {"asyncio", "ssl"} <= imported("import asyncio, ssl")


def test_torch_federation_when_run_does_not_load_its_compiler():
    code = """
from torch import nn
import numpy as np, polyfed as pf, sys
x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
clients = [pf.Client(n, pf.torch(nn.Linear(3, 2)), data=(x, (x[:, 0] > 0).astype(int))) for n in "ab"]
pf.simulate(pf.FedAvg(), clients, rounds=1, baselines=())
assert "torch._dynamo" not in sys.modules
"""
    assert "torch" in imported(code)  # which itself would take 1.8 CPU seconds for `torch._dynamo`
