"""The Keras adapter on tensorflow: a process has one backend, so `test_keras.py` runs again in another one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

RETRACE = """
import numpy as np
from test_keras import *
rows, env = rows_for(THREE), env_for(THREE)
adapter = pf_keras(plain(), lr=0.1, batch_size=40)
first = adapter.first(rows, env)
traced = []
resident = adapter._kept(rows, env)
step = type(resident).step
type(resident).step = lambda self, *given: (traced.append(1), step(self, *given))[1]
for shift in (1.0, -1.0, 3.0):
    anchor = Tree({n: a + np.float32(shift) for n, a in first.items()})
    state = adapter.fit(Fit(terms=(Near(1.0),), tensors={"anchor": anchor}, epochs=40), rows, env).state
    print("near", gap(state, anchor) < 0.01 * gap(first, anchor))
print("traced", len(traced))
for wanted in (0, 2):
    teacher = np.eye(3, dtype=np.float32)[np.full(40, wanted)]
    asked = Fit(terms=(Distill(),), targets={"teacher": teacher}, epochs=40)
    state = adapter.fit(asked, rows, env).state
    print("taught", (adapter.predict(Predict(start=(state,)), rows, env).argmax(1) == wanted).mean() > 0.9)
print("traced", len(traced), keras.backend.backend())
"""


def on_tensorflow(*arguments):
    env = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(HERE)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=env)


@pytest.mark.heavy
def test_the_adapter_holds_on_tensorflow():
    done = on_tensorflow("-m", "pytest", "-p", "no:cacheprovider", str(HERE / "test_keras.py"))
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.heavy
def test_received_trees_and_teachers_are_not_frozen_into_a_trace():
    done = on_tensorflow("-c", RETRACE)
    assert done.returncode == 0, done.stderr[-4000:]
    said = done.stdout.splitlines()
    assert said == ["near True"] * 3 + ["traced 1"] + ["taught True"] * 2 + ["traced 2 tensorflow"]
