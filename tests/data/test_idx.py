import gzip
import struct

import numpy as np
import pytest

from polyfed.core.errors import DataError
from polyfed.data.datasets import fashion
from polyfed.data.idx import read_idx


def packed(array, *, shape=None, kind=8, more=b""):
    array = np.asarray(array, np.uint8)
    shape = array.shape if shape is None else shape
    return gzip.compress(
        bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes() + more
    )


IMAGES = (np.arange(3 * 4 * 2).reshape(3, 4, 2) * 10).astype(np.uint8)


def test_bytes_come_back_in_their_shape():
    read = read_idx(packed(IMAGES))
    assert read.dtype == np.uint8
    assert np.array_equal(read, IMAGES)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"", "is no idx file"),
        (b"plain", "cannot be unpacked"),
        (packed(IMAGES)[:-12], "cannot be unpacked"),
        (packed(IMAGES, kind=9), "no idx file of unsigned bytes"),
        (packed(IMAGES, shape=()), "no idx file"),
        (gzip.compress(bytes([0, 0, 8, 3, 0, 0])), "ends within its header"),
        (packed(IMAGES, shape=(4, 4, 2)), "says that it holds 32 bytes and holds 24"),
        (packed(IMAGES, more=b"x"), "says that it holds 24 bytes and holds more"),
        (packed(IMAGES, shape=(2**31, 2**31, 2)), "the limit is 268435456"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",  # gzip puts the time of day into its bytes
)
def test_what_is_no_such_file_is_refused(file, words):
    with pytest.raises(DataError, match=f"digits.*{words}"):
        read_idx(file, what="digits")


def test_no_more_than_the_limit_is_unpacked():
    with pytest.raises(DataError, match="holds 24 bytes, the limit is 23"):
        read_idx(packed(IMAGES), most=23)


def put(folder, **files):
    for prefix, (images, labels) in files.items():
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(packed(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(packed(labels))
    return folder


def test_fashion_is_read_from_the_folder_that_is_named(tmp_path):
    clothes = fashion(put(tmp_path, train=(IMAGES, [3, 1, 2]), t10k=(IMAGES[:1], [9])))
    assert clothes.rows == {"train": 3, "test": 1}
    x, y = clothes["train"]
    assert (x.dtype, y.dtype, y.tolist()) == (np.float32, np.int64, [3, 1, 2])
    np.testing.assert_allclose(x, IMAGES / 255, rtol=1e-6)


def test_fashion_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"apt install dataset-fashion-mnist, or name the folder .*fashion\(path="):
        fashion(tmp_path)


def test_images_without_their_labels_are_refused(tmp_path):
    put(tmp_path, train=(IMAGES, [3, 1]), t10k=(IMAGES, [1, 2, 3]))
    with pytest.raises(DataError, match=r"train has images \[3, 4, 2\] and labels \[2\]"):
        fashion(tmp_path)
