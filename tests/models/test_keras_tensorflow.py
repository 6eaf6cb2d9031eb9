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


GRAPHS = """
from test_keras import *
import tensorflow as tf
rows, env = rows_for(THREE), env_for(THREE)
said = []
now = lambda: said.append(bool(tf.config.optimizer.get_experimental_options().get("disable_meta_optimizer")))
class Asks(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        now()
now()
pf_keras(plain(), callbacks=[Asks()]).fit(Fit(), rows, env)
now()
print(*said)
for seed in (1, 5, 8, 39, 76):  # with tensorflow's graph optimizer, some of these lose a bit on some machines
    keras.utils.set_random_seed(seed)
    MODEL_CHECKS["weightless_terms_change_nothing"](Case(pf_keras(functional(), lr=0.1), rows, env))
"""

THREADS = """
import os, sys
if sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import polyfed
from test_keras import *
functional()  # starts the backend before the adapter is there
def net():
    return keras.Sequential([layers.Reshape((28, 28, 1)), layers.Conv2D(16, 3), layers.Flatten(), layers.Dense(3)])
rows, env = rows_for(THREE, n=32, width=784), env_for(THREE)
print(pf_keras(net, lr=0.1).fit(Fit(), rows, env).state.digest)
"""

DRIVERS = """
from test_keras import *
import polyfed as pf
from polyfed.executors.processes import Processes
def trees(executor):
    keras.utils.set_random_seed(1)  # models that are given have weights of their own
    x, y = rows_for(THREE, n=60).x, rows_for(THREE, n=60).target
    clients = [pf.Client(n, pf_keras(functional(), lr=0.1), data=(x[i::2], y[i::2])) for i, n in enumerate(("a", "b"))]
    result = pf.simulate(pf.FedProx(mu=0.1), clients, rounds=2, seed=0, executor=executor)
    return [[array.tolist() for array in weights_of(result.models[name])] for name in ("a", "b")]
print(trees("loop") == trees(Processes(2)), keras.backend.backend())
"""


def on(backend, *arguments):
    env = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(HERE)}
    for name in ("TF_NUM_INTRAOP_THREADS", "PJRT_NPROC"):
        env.pop(name, None)  # polyfed, imported by these tests, has set them: a fresh process does so by itself
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=env)


def lines_of(backend, code, *arguments):
    done = on(backend, "-c", code, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.heavy
def test_the_adapter_holds_on_tensorflow():
    done = on("tensorflow", "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "test_keras.py"))
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.heavy
def test_received_trees_and_teachers_are_not_frozen_into_a_trace():
    said = lines_of("tensorflow", RETRACE)
    assert said == ["near True"] * 3 + ["traced 1"] + ["taught True"] * 2 + ["traced 2 tensorflow"]


@pytest.mark.heavy
def test_graphs_run_as_they_were_written_and_only_ours():
    assert lines_of("tensorflow", GRAPHS) == ["False True False"]


@pytest.mark.heavy
def test_bits_do_not_depend_on_the_number_of_processors():
    assert lines_of("tensorflow", THREADS, "one") == lines_of("tensorflow", THREADS, "all")


@pytest.mark.heavy
def test_worker_processes_give_the_bits_of_the_loop():
    assert lines_of("tensorflow", DRIVERS)[-1] == "True tensorflow"
