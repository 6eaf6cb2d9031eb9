"""Keras and the backend under it: which one, how arrays get in and out, whose generators they keep."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from polyfed.core.errors import MissingExtraError, UsageError
from polyfed.core.tree import DTYPES, Array

BACKENDS = ("torch", "tensorflow", "jax")


def library() -> Any:
    """Keras, on the backend that the user chose; torch where nothing is chosen and torch is there."""
    chosen = "KERAS_BACKEND" in os.environ or "keras" in sys.modules or "tensorflow" in sys.modules
    if not chosen and importlib.util.find_spec("torch") is not None:
        os.environ["KERAS_BACKEND"] = "torch"
    try:
        import keras as library
    except ImportError as error:
        raise MissingExtraError("keras", "keras") from error
    if int(library.__version__.split(".")[0]) < 3 or library.backend.backend() not in BACKENDS:
        raise UsageError(
            f"pf.keras takes Keras 3 on {', '.join(BACKENDS)}, this is Keras {library.__version__} on "
            f"{library.backend.backend()}; set KERAS_BACKEND before the first import of keras"
        )
    return library


def backend() -> str:
    """One of `BACKENDS`."""
    return str(library().backend.backend())


def is_torch() -> bool:
    return backend() == "torch"


def is_jax() -> bool:
    return backend() == "jax"


def one_thread() -> None:
    """More threads round otherwise, and cost more than they bring on small nets."""
    if is_torch():
        import torch

        torch.set_num_threads(1)
    elif backend() == "tensorflow":
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # tensorflow has started already: its threads stay as they are
            tf.config.threading.set_intra_op_parallelism_threads(1)


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Has tensorflow run graphs operation by operation, as they were written.

    Its graph optimizer fuses and reorders by what else stands in the graph: a term of weight 0 beside the own loss would
    change the last bits of what the own loss teaches. Small nets are not slower without it.
    """
    if backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    settings, name = tf.config.optimizer, "disable_meta_optimizer"
    kept = settings.get_experimental_options().get(name, False)
    settings.set_experimental_options({name: True})
    try:
        yield
    finally:
        settings.set_experimental_options({name: kept})


def tensor_of(array: Array) -> Any:
    """A copy in the backend's own aligned storage."""
    if is_jax():
        import jax

        return jax.numpy.array(array)
    if not is_torch():
        import tensorflow as tf

        return tf.constant(array)
    import torch

    if array.dtype.name == "bfloat16":
        return torch.tensor(array.astype(np.float32), dtype=torch.bfloat16)
    return torch.tensor(array)


def rows_at(tensor: Any, index: Any) -> Any:
    """The rows of a tensor at the positions that an index tensor holds."""
    if is_torch():
        return tensor.index_select(0, index)
    if is_jax():  # an operation outside of a compiled function costs jax more than numpy's copy
        return tensor_of(np.asarray(tensor)[np.asarray(index)])
    import tensorflow as tf

    return tf.gather(tensor, index)


def single(array: Array) -> Array:
    """Double precision is Keras's for nobody; every layer would cast each batch again."""
    return array.astype(np.float32) if array.dtype == np.float64 else array


def array_of(variable: Any) -> Array:
    """A variable's value with its own dtype, copied."""
    found = as_numpy(variable.value)
    return np.array(found, DTYPES.get(str(variable.dtype), found.dtype))


def as_numpy(tensor: Any) -> Array:
    """A tensor or variable as an array (bfloat16 as float32); it may share memory."""
    value = value_of(tensor)
    if not hasattr(value, "detach"):
        return np.asarray(value.numpy()) if hasattr(value, "numpy") else np.asarray(value)
    value = value.detach().cpu()
    return np.asarray((value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy())


def value_of(tensor: Any) -> Any:
    return tensor.value if isinstance(tensor, library().Variable) else tensor


_OWN: list[Any] = []


@contextlib.contextmanager
def generators(number: int) -> Iterator[None]:
    """Sets every generator that Keras and its backend keep globally, and puts them back after."""
    library()
    from keras.src.backend.common import global_state  # no public reader of these two

    names = ("global_random_seed", "global_seed_generator")
    kept = [global_state.get_global_attribute(name) for name in names]
    numbers, words = random.getstate(), np.random.get_state()  # noqa: NPY002  # a layer may draw from it
    back = _backend_generators(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  # a layer may draw from it
    global_state.set_global_attribute(names[0], number)
    global_state.set_global_attribute(names[1], _own_generator(number))
    try:
        with quiet():
            yield
    finally:
        back()
        random.setstate(numbers)
        np.random.set_state(words)  # noqa: NPY002  # a layer may draw from it
        for name, value in zip(names, kept, strict=True):
            global_state.set_global_attribute(name, value)


def _own_generator(number: int) -> Any:
    """The one that `keras.random` draws from without a seed: always the same object, as a traced function holds it."""
    if not _OWN:
        _OWN.append(library().random.SeedGenerator(0))
    _OWN[0].state.assign(np.array([number, 0], _OWN[0].state.dtype))
    return _OWN[0]


def _backend_generators(number: int) -> Callable[[], None]:
    """Seeds the backend's own global generator; returns what puts it back.

    On tensorflow and jax there is nothing to seed: Keras draws by `keras.random`, whose seeds the model holds. A raw
    ``tf.random`` operation inside a traced function takes its seed when it is traced; jax has no global generator.
    """
    if not is_torch():
        return lambda: None
    import torch

    state = torch.get_rng_state()
    torch.default_generator.manual_seed(number)
    return lambda: torch.set_rng_state(state)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keras reads its own variables in a way that numpy 2 has deprecated; the user can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        yield


def config_of(thing: Any) -> Any:
    with quiet():
        return thing.get_config()
