"""Image files in the idx form of MNIST: a header of big-endian sizes, then the bytes; gzip around it."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from polyfed.core.errors import DataError
from polyfed.core.tree import Array

MOST_BYTES = 1 << 28
_UBYTE = 0x08


def read_idx(packed: bytes, *, what: str = "the idx file", most: int = MOST_BYTES) -> Array:
    """Unsigned bytes in the shape that the header says; never unpacks more than `most` bytes.

    Raises:
        DataError: not gzip, not idx of unsigned bytes, more than `most`, or another length than the header says.
    """
    with gzip.open(io.BytesIO(packed)) as file:
        try:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != bytes([0, 0, _UBYTE]) or not 1 <= magic[3] <= 4:
                raise DataError(f"{what} is no idx file of unsigned bytes")
            header = file.read(4 * magic[3])
            if len(header) < 4 * magic[3]:
                raise DataError(f"{what} ends within its header")
            shape = struct.unpack(f">{magic[3]}I", header)
            size = math.prod(shape)
            if size > most:
                raise DataError(f"{what} says that it holds {size} bytes, the limit is {most}")
            body = file.read(size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{what} cannot be unpacked: {error}") from None
    if len(body) != size:
        more = "more" if len(body) > size else f"{len(body)}"
        raise DataError(f"{what} says that it holds {size} bytes and holds {more}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def image_pair(folder: Path, prefix: str) -> tuple[Array, Array]:
    """(x, y) of one part of Fashion-MNIST: x (n, height, width) float32 in [0, 1], y (n,) int64.

    Raises:
        DataError: a file is not there, or does not fit the other.
    """
    images = _file(folder, f"{prefix}-images-idx3-ubyte.gz")
    labels = _file(folder, f"{prefix}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(f"{folder}: {prefix} has images {list(images.shape)} and labels {list(labels.shape)}")
    return images.astype(np.float32) / np.float32(255), labels.astype(np.int64)


def _file(folder: Path, name: str) -> Array:
    try:
        packed = (folder / name).read_bytes()
    except OSError:
        raise DataError(
            f"Fashion-MNIST is not there: {folder / name} cannot be read. Install it with: apt install "
            "dataset-fashion-mnist, or name the folder with its four files: fashion(path=...)"
        ) from None
    return read_idx(packed, what=str(folder / name))
