"""Keras models in files that hold data only."""

from __future__ import annotations

import contextlib
import json
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyfed.core.errors import CorruptError, UsageError
from polyfed.models.keras_backend import library, quiet
from polyfed.models.keras_names import foreign

MAX_CONFIG = 16 << 20  # bytes of a saved model's architecture


class Luggage:
    """A model on its way to another process of the same user; what arrives is the model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __reduce__(self) -> tuple[Any, ...]:
        with _calm():
            function, arguments = self.model.__reduce__()
        return _arrived, (function, arguments)


def _arrived(function: Any, arguments: tuple[Any, ...]) -> Any:
    library()  # chooses the backend
    with _calm():
        return function(*arguments)


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Keras warns of optimizers that have not stepped and of models not built: both are as they should be."""
    with quiet():
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer", UserWarning)
        warnings.filterwarnings("ignore", "You are saving a model that has not yet been built", UserWarning)
        yield


def to_file(model: Any, path: str | Path) -> None:
    """Writes a Keras model to a ``.keras`` file that `from_file` reads back without running anything of its own.

    Raises:
        UsageError: the model holds code (a Lambda layer, a class of the user's own): such a file cannot be read safely.
    """
    with quiet():
        said = foreign(library().saving.serialize_keras_object(model))
    if said:
        raise UsageError(
            f"{type(model).__name__} holds {said}, which is code and not data: it cannot be saved safely; use Keras's "
            "own layers, or keep its weights with model.save_weights"
        )
    with quiet():
        model.save(Path(path).with_suffix(".keras"))


def from_file(path: str | Path) -> Any:
    """A model from a ``.keras`` file; its configuration may name Keras's own classes only.

    Raises:
        CorruptError: not such a file.
        UsageError: the file names a Lambda layer or a class from outside Keras.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("config.json").file_size > MAX_CONFIG:
                raise CorruptError(f"{path}: its configuration is larger than {MAX_CONFIG} bytes")
            config = json.loads(archive.read("config.json"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{path} is no Keras model file: {error}") from error
    if said := foreign(config):
        raise UsageError(f"{path} names {said}: a model file with code in it is not loaded")
    with _calm():
        return library().models.load_model(path, safe_mode=True)
