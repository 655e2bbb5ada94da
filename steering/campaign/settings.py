"""The settings by which a campaign decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steering.campaign.gate import Word, checked
from steering.campaign.limits import Limits
from steering.records import Field


@dataclass(frozen=True, kw_only=True)
class CampaignSettings:
    """The campaign's settings."""

    lookahead: int = 50
    """Positions the source should always have in hand: a second's worth keeps it from waiting."""
    frames_to_label: int = 40
    """Frames of a scan before the first labels are made: fewer do not overlap enough to be refined. Of a scan that ends
    with fewer nothing is learnt, and that is said."""
    label_every: int = 120
    """New frames after which labels are made again."""
    steps: int = 40
    """Optimiser steps of a training round: a published model is at most that old."""
    rounds_after_end: int = 2
    """Rounds of training after the last frame; where rounds were lost with all processes, as many more as were lost at
    once. 0: none at all."""
    labels_after_end: int = 1
    """Times that labels are made after the last frame, while the rounds of training go on."""
    gain: float = 0.01
    """A candidate is published when its error is lower by this share than that of the model in service.

    Where no labelled frame is held out there is no error to go by, and the training loss stands in: the first round of
    a scan sets the mark and is refused, a later one is published when its loss is lower by this share than the mark,
    and then sets it anew.
    """
    limits: Limits = field(default_factory=Limits)
    """What no decision may exceed, whatever the policy suggests."""
    approval_s: float = 0.0
    """Seconds that each decision waits for a person's `steering approve` or `steering veto`; 0: nobody is asked."""
    unanswered: Word = "approve"
    """What holds after that time without an answer: `approve` or `veto`."""
    drift_window: int = 16
    """Newest frames over which trust is judged."""
    drift_false_alarm: float = 1e-4
    """Chance, for each frame, of an alarm though nothing has changed, at most: one in 100 scans of 100 frames."""
    rollback_frames: int = 64
    """Where trust falls within so many frames of a swap, the version before is tried on the newest held-out frames, and
    put back if it does better; 0: never."""

    def __post_init__(self) -> None:
        counts = (self.lookahead, self.frames_to_label, self.label_every, self.steps, self.drift_window)
        if min(counts) < 1 or min(self.rounds_after_end, self.labels_after_end) < 0:
            raise ValueError(f"found {self}, expected counts of 1 or more, and what comes after the end 0 or more")
        checked(self.approval_s, self.unanswered)
        if not (0 <= self.gain < 1 and 0 < self.drift_false_alarm < 0.05 and self.rollback_frames >= 0):
            raise ValueError(
                f"found {self}, expected gain in 0..1, drift_false_alarm above 0 and below 0.05, rollback_frames of 0 "
                "or more"
            )

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> CampaignSettings:
        """The settings from their fields as nested mappings: `dataclasses.asdict`, also when it has been JSON since."""
        limits = dict(settings["limits"])
        area = limits.pop("area")
        return cls(**{**settings, "limits": Limits(**limits, area=None if area is None else Field(**area))})
