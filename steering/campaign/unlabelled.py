"""Scans that end without ever having been labelled: nothing of them is learnt, and that has to be said."""

from __future__ import annotations

from dataclasses import dataclass, field

from steering.campaign.events import ScanNotLabelled


@dataclass
class Unlabelled:
    """Which scans have no labels so far, and which ended like that."""

    frames: dict[str, int] = field(default_factory=dict)
    """By scan that was not labelled so far."""
    over: dict[str, ScanNotLabelled] = field(default_factory=dict)
    """What was said of scans that ended like that."""

    @property
    def figures(self) -> dict[str, dict[str, int | str]]:
        """Of scans that ended like that, how many frames they had, and why."""
        return {scan: {"frames": one.frames, "reason": one.reason} for scan, one in self.over.items()}

    def begin(self, scan: str) -> None:
        """A scan has begun."""
        self.frames[scan] = 0

    def came(self, scan: str, frames: int) -> None:
        """So many frames of it have come."""
        if scan in self.frames:
            self.frames[scan] += frames

    def labelled(self, scan: str) -> None:
        """It has labels."""
        self.frames.pop(scan, None)

    def end(self, time: float, least: int) -> list[ScanNotLabelled]:
        """All these scans are over: what there is to say. least: frames before labels are made."""
        found = []
        for scan, frames in self.frames.items():
            reason = "labels of it came to nothing, or too late: see what was said of them"
            if frames < least:
                reason = (
                    f"found {frames} frames when it was over, expected {least} before labels are made: measure more, "
                    "or lower CampaignSettings.frames_to_label if so few overlap enough to be refined"
                )
            found.append(ScanNotLabelled(time=time, scan=scan, frames=frames, reason=reason))
        self.over |= {one.scan: one for one in found}
        self.frames.clear()
        return found
