"""The traffic example's own parts: what a window holds, that nothing of the future reaches training, and the crossing."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from polyfed.data.series import Series

FOLDER = Path(__file__).parents[2] / "examples" / "traffic"
MODULES = ("places", "networks", "crossing", "forecasts")


@pytest.fixture(scope="module")
def parts():
    """The example's modules by name, which other examples may use as well: taken out again afterwards."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            del sys.modules[name]


def series(n: int, week: int, value=None) -> Series:
    """A record without gaps; by default each value is its own step."""
    step = np.arange(n) + 10_000
    values = step.astype(np.float64) if value is None else value
    return Series(step.astype("datetime64[h]").astype("datetime64[s]"), values, step, week, "steps")


@pytest.mark.parametrize(("week", "hour"), [(168, 1), (126, 2)])
def test_a_window_holds_the_same_hours_at_any_sampling(parts, week, hour):
    made = parts["places"].place("somewhere", series(1000, week))
    mean, sd = made.scale
    back = made.step[:, None, None] - (made.inputs["window"] * sd + mean)  # each value is its step
    before = hour * np.arange(8, 0, -1)
    around = hour * np.arange(4, -4, -1)
    wanted = np.stack([before, week // 7 + around, week + around])
    assert np.allclose(back, wanted, atol=0.01)
    assert np.allclose(made.step - (made.last * sd + mean), hour, atol=0.01)
    assert np.allclose(made.step - (made.week * sd + mean), week, atol=0.01)


def test_no_later_value_reaches_the_training_rows(parts):
    values = np.random.default_rng(0).normal(size=900)
    made = parts["places"].place("somewhere", series(900, 168, values))
    end = made.step[made.parts.train].max() - 10_000
    changed = np.concatenate([values[: end + 1], 100 + values[end + 1 :]])
    other = parts["places"].place("somewhere", series(900, 168, changed))
    assert made.scale == other.scale
    for key, rows in made.inputs.items():
        assert np.array_equal(rows[made.parts.train], other.inputs[key][other.parts.train])
    assert np.array_equal(made.target[made.parts.train], other.target[other.parts.train])
    ends = [made.step[part].max() for part in (made.parts.train, made.parts.validation)]
    begins = [made.step[part].min() for part in (made.parts.validation, made.parts.test)]
    assert all(end < begin for end, begin in zip(ends, begins, strict=True))


def test_a_newcomer_is_scaled_by_the_quarter_that_it_keeps(parts):
    values = np.random.default_rng(1).normal(size=900) + np.arange(900) / 100
    whole = parts["places"].place("somewhere", series(900, 126, values))
    quarter = parts["places"].place("somewhere", series(900, 126, values), share=0.25)
    assert len(quarter.parts.train) == round(0.25 * len(whole.parts.train))
    assert quarter.parts.train[-1] == whole.parts.train[-1]
    assert np.array_equal(quarter.parts.test, whole.parts.test)
    own = values[quarter.step[quarter.parts.train] - 10_000]
    assert np.allclose(quarter.scale, (own.mean(), own.std()))
    test = whole.parts.test
    assert np.allclose(whole.in_units(whole.target[test, 0]), quarter.in_units(quarter.target[test, 0]), atol=1e-4)


def test_a_frame_holds_as_many_cars_as_the_value_says(parts):
    made = parts["places"]
    shares = np.array([[0.0, 0.1], [0.25, 0.1], [0.9, 0.5]])
    pictures = made.frames(shares)
    cars = (pictures >= 150).sum(axis=(2, 3))
    cells = made.LANES * made.CELLS
    assert cars.tolist() == np.minimum(np.rint(2 * shares * cells), cells).astype(int).tolist()
    assert np.array_equal(pictures[0, 1], pictures[1, 1])


def test_below_saturation_the_delay_is_webster_first_term(parts):
    crossing = parts["crossing"]
    green, rate = np.array([30.0, 52.0]), np.array([0.2, 0.4])
    queue, waited = crossing.cycle(np.zeros(2), rate, green)
    share = green / crossing.CYCLE
    webster = crossing.CYCLE * (1 - share) ** 2 / (2 * (1 - rate / crossing.SATURATION))
    assert np.array_equal(queue, np.zeros(2))
    assert np.allclose(waited / (rate * crossing.CYCLE), webster)


def test_above_saturation_a_queue_stays(parts):
    crossing = parts["crossing"]
    queue, waited = crossing.cycle(np.array([5.0]), np.array([0.5]), np.array([40.0]))
    assert np.allclose(queue, 5 + 0.5 * crossing.CYCLE - 40.0 * crossing.SATURATION)
    assert np.allclose(waited, (5 + 30) / 2 * 50 + (30 + 10) / 2 * 40)


def test_green_follows_the_flows_within_its_limits(parts):
    crossing = parts["crossing"]
    green = crossing.greens(np.array([[0.3, 0.1], [0.0, 0.0], [1.0, 0.0]]))
    assert np.allclose(green.sum(-1), crossing.CYCLE - crossing.LOST)
    assert np.allclose(green[:, 0], [61.5, 41.0, 72.0])


def test_true_flows_wait_less_than_wrong_ones(parts):
    true = np.tile([[0.5, 0.2]], (20, 1))
    waits = parts["crossing"].delays(true, {"true": true, "wrong": true[:, ::-1], "again": true}, 0)
    assert waits["true"] < waits["wrong"]
    assert waits["true"] == waits["again"]
