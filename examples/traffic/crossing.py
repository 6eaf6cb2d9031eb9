"""A crossing of two roads whose green times are chosen each hour, and what its vehicles wait.

Each road's vehicles come at random (Poisson, the same for all ways to choose) at a mean of the hour's true flow, go at the
saturation flow while it is green, and queue otherwise; a queue stays into the next cycle and the next hour. Green is
divided by Webster's rule, in proportion to the flows that are believed (F. V. Webster, Traffic Signal Settings, Road
Research Technical Paper 39, 1958); below saturation and without chance the delay is the first term of his formula.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

CYCLE, LOST, LEAST_GREEN = 90.0, 8.0, 10.0  # seconds
SATURATION = 1.0  # vehicles a second that a road lets go while it is green: two lanes
CYCLES_AN_HOUR = 40


def greens(flows: np.ndarray) -> np.ndarray:
    """(..., 2) believed flows -> (..., 2) seconds of green, which with the lost time are a cycle."""
    total = flows.sum(-1)
    first = (CYCLE - LOST) * np.divide(flows[..., 0], total, out=np.full(total.shape, 0.5), where=total > 0)
    first = np.clip(first, LEAST_GREEN, CYCLE - LOST - LEAST_GREEN)
    return np.stack([first, CYCLE - LOST - first], axis=-1)


def cycle(queue: np.ndarray, rate: np.ndarray, green: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One cycle, red before green: (queue at its end, vehicle seconds waited); the queue is a fluid.

    Args:
        queue: vehicles at the start of red.
        rate: vehicles that come, a second.
        green: seconds.
    """
    red = CYCLE - green
    longest = queue + rate * red
    leaving = SATURATION - rate  # how fast the queue shrinks; it may grow
    lasts = np.where(leaving > 0, longest / np.maximum(leaving, 1e-9), np.inf)
    lasts = np.minimum(lasts, green)
    end = np.maximum(longest - leaving * lasts, 0.0)
    return end, (queue + longest) / 2 * red + (longest + end) / 2 * lasts


def delays(flows: np.ndarray, believed: Mapping[str, np.ndarray], seed: int) -> dict[str, float]:
    """Way to choose -> mean delay of a vehicle in seconds.

    Args:
        flows: (hours, 2) true flows, vehicles a second.
        believed: way -> (hours, 2) flows by which it divides the green.
        seed: of the arrivals.
    """
    green = np.stack([greens(flow) for flow in believed.values()])  # (ways, hours, 2)
    counts = np.random.default_rng(seed).poisson(flows[:, None] * CYCLE, (len(flows), CYCLES_AN_HOUR, 2))
    queue, waited = np.zeros((len(green), 2)), np.zeros(len(green))
    for hour, cycles in enumerate(counts):
        for arrivals in cycles:
            queue, spent = cycle(queue, arrivals / CYCLE, green[:, hour])
            waited += spent.sum(-1)
    return {way: float(w / counts.sum()) for way, w in zip(believed, waited, strict=True)}
