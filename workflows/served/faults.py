"""Faults on request: frames that are dropped, repeated, sent out of order, or late; positions that stop for a while."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Sent(NamedTuple):
    """A frame on its way to the publisher."""

    number: int
    counts: NDArray
    position: NDArray[np.float64]


@dataclass
class Faults:
    """Which frames go wrong; the same seed makes the same ones go wrong."""

    drop: float = 0.0
    """Share of the frames that are not sent, though their positions are."""
    repeat: float = 0.0
    """Share that is sent twice."""
    reorder: float = 0.0
    """Share that comes after its next one."""
    stall_at: int = -1
    """Number of the frame before which all is silent for stall_s."""
    stall_s: float = 0.0
    silent_from: int = -1
    """Frame number from which on the positions of silent_frames frames are held back; then they come all together."""
    silent_frames: int = 0
    dark_from: int = -1
    """Frame number from which on dark_frames frames are measured without the beam."""
    dark_frames: int = 0
    seed: int = 0
    dropped: int = 0
    """So far."""
    _held: Sent | None = None
    _rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def exposed(self, number: int, counts: NDArray) -> NDArray:
        """What a frame of this number counts."""
        dark = 0 <= self.dark_from <= number < self.dark_from + self.dark_frames
        return np.zeros_like(counts) if dark else counts

    def frames(self, frame: Sent) -> list[Sent]:
        """What is sent of frames when this one was measured."""
        drop, repeat, reorder = self._rng.random(3) < (self.drop, self.repeat, self.reorder)
        before, self._held = self._held, None
        if drop:
            self.dropped += 1
            return [before] if before else []
        if reorder and before is None:
            self._held = frame
            return []
        return [frame] * (1 + int(repeat)) + ([before] if before else [])

    def rest(self) -> list[Sent]:
        """What was held back when the scan ends."""
        held, self._held = self._held, None
        return [held] if held else []

    def silent(self, number: int) -> bool:
        """The position of this frame is held back."""
        return 0 <= self.silent_from <= number < self.silent_from + self.silent_frames
