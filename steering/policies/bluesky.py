"""Any policy as an optimizer of bluesky-adaptive 1.0, for a bluesky plan that asks it where to measure.

The package's interface is structural: `suggest(num_points)` returns dictionaries that each have a unique `_id` and a
value for every actuator, `ingest(points)` takes dictionaries with the outcomes. bluesky is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from steering.policies.candidates import Policy
from steering.records import Decision, Prediction
from steering.records.optional_parts import offers


class BlueskyAgent:
    """Lets a bluesky plan ask a policy where to measure.

    Outcomes that `ingest` understands, by key: `residual` (needed: the far-field residual, 0..1), `offset` (radians),
    `model_version`, `poisson_floor` (of the frame's counts, for a dwell rule), and `amplitude`, `phase` (y, x) for
    policies that use patches; others are ignored.

    Args:
        policy: any.
        live: the live image as it is now, an xarray.Dataset as `Policy.ingest` wants it.
        object_pixel: in the policy's length unit, as in Geometry.
        actuators: names of the actuators that move along y and x, in the policy's length unit.
        exposure: name of the actuator that takes the dwell time in seconds; None: the plan decides on it.
        scan: name of the scan.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        live: Callable[[], Any],
        object_pixel: float,
        actuators: tuple[str, str] = ("stage_y", "stage_x"),
        exposure: str | None = None,
        scan: str = "scan",
    ) -> None:
        self.policy, self.live, self.object_pixel = policy, live, object_pixel
        self.actuators, self.exposure, self.scan = actuators, exposure, scan
        self._next = 0
        self._open: dict[int, tuple[float, float]] = {}
        """Suggestions without an outcome yet."""
        self._stop: str | None = None

    def suggest(self, num_points: int | None = None) -> list[dict[str, Any]]:
        """Up to num_points (1) points to measure next, each with its `_id` and the policy's `reason`.

        Fewer where the policy ends the scan with them, and none after the end: `should_stop` returns True then.
        """
        if self._stop is not None:
            return []
        decision = self.policy.suggest(num_points or 1)
        if decision.stop:
            self._stop = decision.reasons[-1]
        points = []
        for index, (y, x) in enumerate(decision.positions.tolist()):
            point = {"_id": self._next, self.actuators[0]: y, self.actuators[1]: x, "reason": decision.reasons[index]}
            if self.exposure is not None and decision.dwell is not None:
                point[self.exposure] = float(decision.dwell[index])
            self._open[self._next] = (y, x)
            self._next += 1
            points.append(point)
        return points

    def ingest(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Take in outcomes: of suggested points by their `_id`, of others with the actuators' values.

        Raises ValueError for a point without residual, and for one that has neither the `_id` of a suggestion nor a
        position.
        """
        if not points:
            return
        ids, where = zip(*(self._placed(point) for point in points), strict=True)
        nothing = np.zeros((0, 0), np.float32)
        self.policy.ingest(
            Prediction(
                frame_id=np.array(ids, np.int64),
                scan=self.scan,
                position=np.array(where, np.float64) / self.object_pixel,
                amplitude=np.stack([np.asarray(point.get("amplitude", nothing), np.float32) for point in points]),
                phase=np.stack([np.asarray(point.get("phase", nothing), np.float32) for point in points]),
                residual=np.array([point["residual"] for point in points], np.float32),
                offset=np.array([point.get("offset", np.nan) for point in points], np.float32),
                model_version=np.array([point.get("model_version", 0) for point in points], np.int64),
                poisson_floor=None
                if not any("poisson_floor" in point for point in points)
                else np.array([point.get("poisson_floor", np.nan) for point in points], np.float64),
            ),
            self.live(),
        )

    def register_failures(self, suggestions: Sequence[Mapping[str, Any]]) -> None:
        """Take in that the measurement of suggestions failed: they will have no outcome, and count as declined."""
        found = [self._open.pop(suggestion["_id"]) for suggestion in suggestions if suggestion["_id"] in self._open]
        if found and offers(self.policy, "declined"):
            reason = "its measurement failed"
            self.policy.declined(Decision(positions=np.array(found), reasons=(reason,) * len(found)), reason)

    def should_stop(self) -> tuple[bool, str | None]:
        """(True, reason) once the policy has ended the scan and everything it suggested is measured."""
        return (True, self._stop) if self._stop is not None and not self._open else (False, None)

    def get_best_points(self) -> list[tuple[Any, Mapping[str, Any], Mapping[str, Any]]]:
        """None: a scan has no best point."""
        return []

    def _placed(self, point: Mapping[str, Any]) -> tuple[int, tuple[float, float]]:
        if "residual" not in point:
            raise ValueError(f"found outcomes {sorted(point)}, expected `residual` among them")
        known = self._open.pop(point["_id"], None) if "_id" in point else None
        if known is not None:
            return int(point["_id"]), known
        if not all(name in point for name in self.actuators):
            raise ValueError(
                f"found a point {point.get('_id')!r} that was not suggested, expected {self.actuators} in it"
            )
        self._next += 1  # a point that was not suggested gets a number of its own
        return self._next - 1, (float(point[self.actuators[0]]), float(point[self.actuators[1]]))
