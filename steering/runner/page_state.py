"""What a page shows of a run that goes on: more than a snapshot, and of its image what has changed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from steering.campaign import Action, Steer
from steering.inference import ImageChange
from steering.learning import PARTS
from steering.runner.forgetting import forgetting
from steering.runner.metrics import Metrics, composition

_MOST_POSITIONS = 500
"""Of those that are to be measured next."""

Position = tuple[float, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class PageUpdate:
    """What is sent to a page in one go."""

    state: dict[str, Any]
    """The snapshot, and what `PageState.state` adds to it."""
    image: ImageChange | None
    """None before the first frame, and while the predictor cannot be asked."""


class PageState:
    """Keeps what a page shows beside the figures of a run: where it is to measure, and the buffer as it was last
    counted."""

    def __init__(self) -> None:
        self._steered: deque[Position] = deque(maxlen=_MOST_POSITIONS)
        self._rounds = -1
        self._buffer: dict[str, Any] = {}
        self._cpu_s = 0.0
        """Spent here so far."""

    def asked(self, actions: Iterable[Action]) -> None:
        """Take in the campaign's actions."""
        for action in actions:
            if isinstance(action, Steer):
                self._steered.extend(action.decision.positions)

    def state(self, metrics: Metrics, trouble: OSError | None) -> dict[str, Any]:
        """What a page shows beside the snapshot, in JSON's types; positions are (y, x) in the geometry's unit.

        unit: the geometry's, which an image says too once there is one. next: to be measured, in this order. proposed:
        the decision that waits for an answer, or None. served: versions in the order in which they went into service.
        limits, approval_s: as set. seconds: spent by part. trouble: why the log cannot be written now, or None. buffer,
        forgetting: as `rehearsal_buffer` and `forgetting` in summary.json. look_cpu_s: CPU seconds that this has taken
        so far.
        """
        begun = time.thread_time()
        campaign = metrics.campaign
        gate = campaign.gate
        due = 0 if gate.closed else campaign.outstanding
        proposed = gate.proposed
        if self._rounds != (done := sum(r.steps for r in metrics.rounds[-1]) if metrics.rounds else 0):
            self._rounds, self._buffer = done, composition(metrics)
        found = {
            "begun": metrics.begun,
            "unit": metrics.experiment.source.geometry.length_unit,
            "scans": list(campaign.scans),
            "next": [*self._steered][-due:] if due else [],
            "proposed": None
            if proposed is None
            else {
                "positions": list(gate.waiting),
                "reason": proposed.reason,
                "stop": proposed.stop,
                "until": proposed.until,
                "default": proposed.default,
            },
            "stopped": campaign.stopped,
            "served": list(campaign.served),
            "limits": asdict(gate.guard.held),
            "approval_s": gate.approval_s,
            "seconds": {part: metrics.seconds[part] for part in ("label", *PARTS, "publish")},
            "buffer": self._buffer,
            "forgetting": forgetting(metrics),
            "trouble": None if trouble is None else str(trouble),
        }
        self._cpu_s += time.thread_time() - begun
        return {**found, "look_cpu_s": self._cpu_s}
