"""Tells pixels that have no counts in nearly every frame from those that one frame flags. Pure: times are arguments.

Photon counters flag dead and saturated pixels in the counts themselves. A pixel that is saturated once, or that a
difference of two thresholds leaves empty now and then, is not bad: masked for good, it would be lost to the whole scan.
Once the bad pixels are known a frame is decompressed and cut where it is looked at, and one that is thinned never is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steering.sources.frames import NEARLY_EVERY
from steering.sources.streams import Frame, Packed
from steering.sources.window import Window

FIRST_FRAMES, FIRST_S = 16, 0.3
"""Frames by which a scan's bad pixels are known, or the seconds after which as many as there are must do."""


class BadPixels:
    """Cuts the frames of a scan; it holds the first ones back until it knows the bad pixels."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self.begin()

    def begin(self) -> None:
        """A scan begins."""
        self.known: NDArray[np.bool_] | None = None
        """(size, size), True where a pixel has no counts; None: not known yet."""
        self._held: list[tuple[Frame, NDArray, NDArray]] = []
        """Frames, their whole images, and these as they are cut."""
        self._fits: tuple[tuple[int, ...], np.dtype] | None = None
        """Shape and dtype of the frames that the window has fitted."""
        self._since = 0.0

    def take(self, frame: Frame, bad: NDArray[np.bool_] | None, now: float) -> list[tuple[Frame, NDArray | Packed]]:
        """Frames that are ready, each with its counts (size, size). bad: (y, x) of the detector, by its own mask.

        Raises ValueError for a frame that the window does not fit, and for one of the first whose payload is damaged;
        a later one raises that where its counts are looked at.
        """
        known, kind = self.known, (frame.counts.shape, frame.counts.dtype)
        if known is None or kind != self._fits:
            image, cut = self._cut(frame, bad)
            self._fits = kind
            if known is not None:
                return [(frame, self._window.settled(cut, image, known))]
            if not self._held:
                self._since = now
            self._held.append((frame, image, cut))
            return self.ready(now)

        def settled() -> NDArray:
            image, cut = self._cut(frame, bad)
            return self._window.settled(cut, image, known)

        return [(frame, Packed(known.shape, np.dtype(self._window.dtype), settled))]

    def _cut(self, frame: Frame, bad: NDArray[np.bool_] | None) -> tuple[NDArray, NDArray]:
        """The whole image, in photons where that is asked for, and its window."""
        image = np.asarray(frame.counts)
        if self._window.correction is not None:
            image = self._window.correction.photons(image)
        return image, self._window.cut(image, bad)

    def ready(self, now: float, *, all_there: bool = False) -> list[tuple[Frame, NDArray | Packed]]:
        """Frames that are held back no longer; all_there: no further one will come."""
        waited = all_there or now - self._since >= FIRST_S
        if not self._held or not (len(self._held) >= FIRST_FRAMES or waited):
            return []
        flags = np.mean([cut == np.iinfo(cut.dtype).max for _, _, cut in self._held], axis=0)
        known = self.known = flags >= NEARLY_EVERY
        held, self._held = self._held, []
        return [(frame, self._window.settled(cut, image, known)) for frame, image, cut in held]
