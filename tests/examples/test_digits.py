"""The digits example's own parts: images from one shape into another, and no image at two places."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def digits():
    """The example's module; taken out again afterwards, as other examples have a `run` too."""
    sys.path.insert(0, str(FOLDER))
    sys.modules.pop("run", None)
    try:
        yield importlib.import_module("run")
    finally:
        sys.path.remove(str(FOLDER))
        del sys.modules["run"]


def test_overlap_when_made_shares_every_old_pixel_out_once(digits):
    for old, new in ((28, 8), (28, 15), (8, 28), (16, 16), (7, 3)):
        shared = digits.overlap(old, new)
        assert shared.shape == (new, old)
        np.testing.assert_allclose(shared.sum(1), 1)
        np.testing.assert_allclose(shared.sum(0), new / old)
    assert np.array_equal(digits.overlap(4, 4), np.eye(4))
    assert digits.overlap(4, 2).tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]


def test_image_when_resized_is_cut_to_its_ink_and_keeps_its_mean(digits):
    image = np.zeros((28, 28), np.float32)
    image[4:24, 6:16] = np.linspace(0.3, 1.0, 200).reshape(20, 10)
    for shape in ((8, 8), (16, 15), (28, 28)):
        small = digits.Resized(*shape)(image[None])
        assert small.shape == (1, *shape)
        assert small.dtype == np.float32
        np.testing.assert_allclose(small.mean(), image[4:24, 6:16].mean(), rtol=1e-5)
    assert digits.Resized(8, 8)(np.zeros((2, 28, 28))).tolist() == np.zeros((2, 8, 8)).tolist()


def test_clients_when_made_share_no_image_with_one_another_or_the_public(digits):
    clients, public, truth = digits.everybody(digits.Size(), seed=0)
    assert len(public) == len(truth) == digits.Size().public
    images = [(image.shape, image.tobytes()) for images in (public, *(c.data[0] for c in clients)) for image in images]
    assert len(images) == len(set(images))
    assert {c.name: c.data[0].shape[1:] for c in clients} == {n: shape for n, (_, shape, _) in digits.SITES.items()}
