"""The Keras adapter on jax, in a process of its own: see `test_keras_tensorflow.py`."""

import pytest
from test_keras_tensorflow import DRIVERS, HERE, RETRACE, THREADS, lines_of, on


@pytest.mark.heavy
def test_the_adapter_holds_on_jax():
    done = on("jax", "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "test_keras.py"))
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.heavy
def test_received_trees_and_teachers_are_not_frozen_into_a_trace():
    said = lines_of("jax", RETRACE)
    assert said == ["near True"] * 3 + ["traced 1"] + ["taught True"] * 2 + ["traced 2 jax"]


@pytest.mark.heavy
def test_bits_do_not_depend_on_the_number_of_processors():
    assert lines_of("jax", THREADS, "one") == lines_of("jax", THREADS, "all")


@pytest.mark.heavy
def test_worker_processes_give_the_bits_of_the_loop():
    assert lines_of("jax", DRIVERS)[-1] == "True jax"
