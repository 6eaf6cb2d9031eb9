"""What happened, round by round: what stopping rules read and what the result shows. Validation metrics only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class RoundLog:
    """One finished round.

    Attributes:
        round_num: from 1.
        seconds: since the start of the run, by the driver's clock.
        cohort: who was asked, in the plan's order.
        accepted: whose update counts, in the plan's order.
        left_out: client -> why its update does not count (refused, failed, late).
        loss: client -> mean training loss as it reported it.
        metrics: client -> name -> value on its own validation rows, after this round's update.
        num_examples: client -> validation rows behind its metrics.
        update_norm: L2 norm of the step that the server's "params" took (0.0 if it has none).
        state_norm: L2 norm of the server's "params" after the step.
        bytes_down, bytes_up: framed bytes of all messages of the round.
        cpu_seconds: processor time of the clients.
    """

    round_num: int
    seconds: float = 0.0
    cohort: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    loss: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    num_examples: Mapping[str, int] = field(default_factory=dict)
    update_norm: float = 0.0
    state_norm: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    cpu_seconds: float = 0.0

    @cached_property
    def memo(self) -> dict[tuple[str, ...], float | None]:
        """What was worked out of these metrics: rules ask every round about all rounds before it. No part of the value."""
        return {}
