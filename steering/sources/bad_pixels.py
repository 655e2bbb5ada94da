"""Tells pixels that have no counts in nearly every frame from those that one frame flags. Pure: times are arguments.

Photon counters flag dead and saturated pixels in the counts themselves. A pixel that is saturated once, or that a
difference of two thresholds leaves empty now and then, is not bad: masked for good, it would be lost to the whole scan.
Once the bad pixels are known a frame is decompressed and cut where it is looked at, and one that is thinned never is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from steering.sources.frames import NEARLY_EVERY
from steering.sources.streams import Frame, Packed
from steering.sources.window import Window, marked, unflagged

FIRST_FRAMES = 16
"""Frames by which a scan's bad pixels are known."""
FEW_FRAMES, FEW_S = 5, 0.3
"""Frames that must do after so many seconds: what all of them flag is hardly flagged by chance."""
SLOW_S = 20.0
"""Seconds after which as many as there are must do."""


class BadPixels:
    """Cuts the frames of a scan; it holds the first ones back until it knows the bad pixels."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self.begin()

    def begin(self) -> None:
        """A scan begins."""
        self.known: NDArray[np.bool_] | None = None
        """(size, size), True where a pixel has no counts; None: not known yet."""
        self._held: list[tuple[Frame, Callable[[NDArray[np.bool_]], NDArray], NDArray]] = []
        """Frames, what makes their counts once the bad pixels are known, and their windows with all that is flagged."""
        self._fits: tuple[tuple[int, ...], np.dtype] | None = None
        """Shape and dtype of the frames that the window has fitted."""
        self._since = 0.0

    @property
    def held(self) -> int:
        """Frames that are held back."""
        return len(self._held)

    def take(
        self, frame: Frame, bad: NDArray[np.bool_] | None, now: float, *, saturation: float | None = None
    ) -> list[tuple[Frame, NDArray | Packed]]:
        """Frames that are ready, each with its counts (size, size). bad: (y, x) of the detector, by its own mask.
        saturation: the highest count that it vouches for; None: it does not say.

        Raises ValueError for a frame that the window does not fit, and for one of the first whose payload is damaged;
        a later one raises that where its counts are looked at.
        """
        known, kind = self.known, (frame.counts.shape, frame.counts.dtype)

        def looked_at() -> tuple[NDArray, NDArray]:
            image = marked(np.asarray(frame.counts), saturation)
            return image, self._cut(image, bad)

        def settled(image: NDArray, cut: NDArray, known: NDArray[np.bool_]) -> NDArray:
            top = np.iinfo(cut.dtype).max
            if ((cut == top) == known).all():
                return cut
            out = self._cut(unflagged(image, bad, saturation), bad)
            out[known] = top
            return out

        if known is not None and kind == self._fits:
            return [(frame, Packed(known.shape, np.dtype(self._window.dtype), lambda: settled(*looked_at(), known)))]
        image, cut = looked_at()
        self._fits = kind
        if known is not None:
            return [(frame, settled(image, cut, known))]
        if not self._held:
            self._since = now
        self._held.append((frame, partial(settled, image, cut), cut))
        return self.ready(now)

    def _cut(self, image: NDArray, bad: NDArray[np.bool_] | None) -> NDArray:
        """The window of an image, in photons where that is asked for."""
        if self._window.correction is not None:
            image = self._window.correction.photons(image)
        return self._window.cut(image, bad)

    def ready(self, now: float, *, all_there: bool = False) -> list[tuple[Frame, NDArray | Packed]]:
        """Frames that are held back no longer; all_there: no further one will come."""
        held, waited = self.held, now - self._since
        enough = held >= FIRST_FRAMES or (held >= FEW_FRAMES and waited >= FEW_S) or waited >= SLOW_S
        if not held or not (enough or all_there):
            return []
        flags = np.mean([cut == np.iinfo(cut.dtype).max for _, _, cut in self._held], axis=0)
        known = self.known = flags >= NEARLY_EVERY
        frames, self._held = self._held, []
        return [(frame, settled(known)) for frame, settled, _ in frames]
