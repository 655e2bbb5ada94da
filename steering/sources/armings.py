"""Which scan what a stream says belongs to: detector and encoders say each for itself when one begins. Pure.

Streams are armed together, so that the first arming of each belongs to the first scan, and so on. One that has missed
an arming catches up with the frames; one that was armed once more than they were begins the same scan again. Both can
be told only from streams that are read up to the same moment: `behind` says which are read first.
"""

from __future__ import annotations

from collections.abc import Iterable

from steering.sources.streams import FRAMES

_AHEAD = 2
"""Scans that a companion may be ahead of the frames when it begins another: the joiner keeps four open."""


class Armings:
    """Counts the scans of each stream; the first is 0."""

    def __init__(self, companions: Iterable[str]) -> None:
        self._companions = tuple(companions)
        self.scan = dict.fromkeys((FRAMES, *self._companions), -1)
        """The newest of each stream; -1: none yet."""
        self.begun: set[str] = set()
        """Streams that say when a scan begins."""
        self._ended: dict[str, int] = {}
        self._empty: set[str] = set()
        """Companions whose newest arming is known to have had no frame: it was not ended, or they said so."""
        self._sampled: set[tuple[str, int]] = set()
        self._over_before: set[str] = set()
        """Companions that had ended the scan of the frames before it began."""
        self._came = False
        """A frame of the newest scan."""

    def frame(self) -> int:
        """The scan of a frame that comes now."""
        self._came = True
        self.scan[FRAMES] = max(self.scan[FRAMES], 0)
        return self.scan[FRAMES]

    def samples(self, name: str) -> int:
        """The scan of samples that come now; a stream that never says that one begins goes with the frames."""
        scan = self.scan[name] = max(self.scan[name if name in self.begun else FRAMES], 0)
        self._sampled.add((name, scan))
        return scan

    def frames_begin(self) -> int:
        """The scan that the frames begin."""
        self.begun.add(FRAMES)
        self.scan[FRAMES] += 1
        self._came = False
        self._over_before = {name for name in self._companions if self.ended(name, self.scan[FRAMES])}
        return self.scan[FRAMES]

    def behind(self, name: str, *, again: bool) -> list[str]:
        """Streams that this one waits for before it begins a scan, until they have caught up or have nothing unread:
        what they have not said yet may belong to the scan before. again: as of `begins`."""
        frames = self.scan[FRAMES]
        if name == FRAMES:
            # Of a stream that has said nothing it is not known whether it says when scans begin.
            waited_for = self._companions if frames == 0 else self.begun & set(self._companions)
            return [other for other in waited_for if self.scan[other] < frames]
        in_doubt = again and self._unanswered(name) and name not in self._empty
        return [FRAMES] if in_doubt or self.scan[name] - frames >= _AHEAD else []

    def begins(self, name: str, *, again: bool) -> tuple[int, bool]:
        """The scan that a companion begins, and whether all that it said of this scan before is of an arming that was
        given up. again: it may be armed more than once for a scan."""
        self.begun.add(name)
        mine, frames = self.scan[name], self.scan[FRAMES]
        given_up = again and self._unanswered(name)
        if frames > mine and (name, frames) not in self._sampled:
            self.scan[name], given_up = frames, False
        elif not given_up:
            self.scan[name] = mine + 1
        else:
            self._ended.pop(name, None)
            self._over_before.discard(name)
        self._empty.add(name)
        return self.scan[name], given_up

    def _unanswered(self, name: str) -> bool:
        """No frame of a companion's newest arming has come."""
        mine, frames = self.scan[name], self.scan[FRAMES]
        return mine > frames or (mine == frames and name in self._over_before and not self._came)

    def end(self, name: str, frames: int | None = None) -> int:
        """The scan that a stream ends. frames: that it had, where it says so."""
        self._ended[name] = self.scan[name]
        if frames != 0:
            self._empty.discard(name)
        return self.scan[name]

    def ended(self, name: str, scan: int) -> bool:
        """Whether a stream has ended this scan, or a later one."""
        return self._ended.get(name, -1) >= scan
