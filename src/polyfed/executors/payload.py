"""Algorithm and sites on their way into a worker: pickled once by cloudpickle, their arrays beside the pickle.

The file has no name and is read by workers of this driver alone. They map it privately, so that the rows of all clients
are in memory once for all workers, whatever their number, and each array still starts on a 64-byte boundary.

Classes and functions that a worker could not import (defined in ``__main__``, a notebook, a module made on the fly)
travel by value, so the user's script is never imported a second time and needs no ``if __name__ == "__main__"``.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle  # between a driver and its own workers only, see above
import struct
import sys
from collections.abc import Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle

from polyfed.core.algorithm import Algorithm
from polyfed.core.errors import UsageError
from polyfed.core.protocols import Site
from polyfed.executors.channel import unnamed_file, write_all

HEADER = struct.Struct("<QQ")  # bytes of the pickle, number of buffers
BOUNDARY = 64


def pack(algorithm: Algorithm, sites: Mapping[str, Site], seed: int) -> int:
    """Descriptor of a file that `load` reads.

    Raises:
        UsageError: something cannot be pickled; names the client and which part of it.
    """
    try:
        body, buffers = _dump((algorithm, dict(sites), seed))
    except Exception as error:  # pickling runs code of the user's own classes
        raise UsageError(_culprit(algorithm, sites, error)) from error
    raws = [buffer.raw() for buffer in buffers]
    sizes = [len(raw) for raw in raws]
    descriptor = unnamed_file()
    write_all(descriptor, HEADER.pack(len(body), len(raws)) + struct.pack(f"<{len(raws)}Q", *sizes) + body, 0)
    places, end = _places(HEADER.size + 8 * len(raws) + len(body), sizes)
    os.ftruncate(descriptor, end)
    for raw, place in zip(raws, places, strict=True):
        write_all(descriptor, raw, place)
    return descriptor


def load(descriptor: int) -> tuple[Algorithm, dict[str, Site], int]:
    """What was packed; arrays that were writeable are so again, and writing to them reaches nobody else."""
    mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    length, count = HEADER.unpack_from(mapped)
    sizes = struct.unpack_from(f"<{count}Q", mapped, HEADER.size)
    start = HEADER.size + 8 * count
    places, _ = _places(start + length, sizes)
    view = memoryview(mapped)
    buffers = [view[place : place + size] for place, size in zip(places, sizes, strict=True)]
    loaded: tuple[Algorithm, dict[str, Site], int] = pickle.loads(view[start : start + length], buffers=buffers)  # noqa: S301  # ours
    return loaded


def _places(start: int, sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where each buffer begins, and the length of the whole."""
    places = []
    for size in sizes:
        start += -start % BOUNDARY
        places.append(start)
        start += size
    return places, start


def _dump(value: Any) -> tuple[bytes, list[pickle.PickleBuffer]]:
    body, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    pickler = _Pickler(body, protocol=5, buffer_callback=buffers.append)
    try:
        pickler.dump(value)
    finally:
        pickler.forget_modules()
    return body.getvalue(), buffers


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle ships no types
    """cloudpickle, with modules that a worker cannot import sent by value."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._importable: dict[str, bool] = {}
        self._registered: list[ModuleType] = []

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, (type, FunctionType)):
            self._consider(value.__module__)
        return super().reducer_override(value)

    def _consider(self, name: str | None) -> None:
        module = sys.modules.get(name or "__main__")
        if name is None or module is None or name == "__main__" or name in self._importable:
            return
        self._importable[name] = can_be_imported(name, module)
        if not self._importable[name] and name not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(module)
            self._registered.append(module)

    def forget_modules(self) -> None:
        for module in self._registered:
            cloudpickle.unregister_pickle_by_value(module)


def can_be_imported(name: str, module: ModuleType) -> bool:
    """A new interpreter with the same search path would find this very module under this name."""
    if name in sys.builtin_module_names or name in sys.stdlib_module_names:
        return True
    top = name.partition(".")[0]
    origin = getattr(sys.modules.get(top, module), "__file__", None)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(top, None) if find is not None else None
        if spec is not None:
            return origin is None or spec.origin is None or os.path.abspath(spec.origin) == os.path.abspath(origin)  # noqa: PTH100  # text in, text out
    return False


def _culprit(algorithm: Algorithm, sites: Mapping[str, Site], error: Exception) -> str:
    """Which of the things cannot be sent, and what to do about it."""
    advice = (
        "worker processes need a copy: give what holds open files, locks, threads or connections a __getstate__ that "
        "leaves them out, make them inside the functions that use them, or run with Loop(), which sends nothing"
    )
    things: list[tuple[str, Any]] = [(f"the algorithm {algorithm.name}", algorithm)]
    for name, site in sites.items():
        things.append(
            (f"client {name!r}: its model ({getattr(site.model, 'kind', type(site.model).__name__)})", site.model)
        )
        rows = {"training": site.train, "validation": site.validation, "test": site.test, "public": site.public}
        things += [(f"client {name!r}: its {part} rows", value) for part, value in rows.items() if value is not None]
    for what, thing in things:
        try:
            _dump(thing)
        except Exception as own:  # noqa: BLE001  # pickling runs code of the user's own classes
            return f"{what} cannot be sent to a worker process: {type(own).__name__}: {own}; {advice}"
    return f"the clients cannot be sent to a worker process: {type(error).__name__}: {error}; {advice}"
