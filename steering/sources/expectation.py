"""What is expected of a beamline: frames, which are given up, for how long none came, and how many samples they have.

Pure: times are arguments."""

from __future__ import annotations

_END_S = 2.0
"""Seconds after a refusal within which a beamline says that its last scan is over, where that was the reason."""


class Expectation:
    """What was asked for and has not come. A beamline that is not steered is expected to send always."""

    def __init__(self, *, steered: bool, give_up_s: float, now: float) -> None:
        """give_up_s: seconds without a frame after which what was asked for counts as lost."""
        self._steered, self._give_up_s = steered, give_up_s
        self.asked = self.refused = self.given_up = 0
        """Positions."""
        self._last_refused = self._beyond = 0
        """Refused after the last position that was measured; and those of them that are beyond the end."""
        self._over, self._refused_at = False, now
        self._unasked = 0
        """Frames that came and were not asked for here."""
        self._active = now
        """When the last frame came, or was asked for."""
        self._since = None if steered else now
        """Since when a frame is expected and none came; None: none is."""
        self._abandoned = False
        """Positions were given up since the last frame."""

    def ask(self, count: int, now: float, known: int = 0) -> None:
        """Positions are asked for. known: frames that came or are lost by now; those that nobody has asked for here, as
        after a crash the late ones of what was asked for before it, answer nothing."""
        self._unasked = max(self._unasked, known - self._answerable)
        self.asked += count
        self._active = now
        self._since = now if self._since is None else self._since

    def answered(self, positions: int, refused: int, now: float) -> None:
        """An order of so many positions was carried out, but for so many at its end, which the beamline refused."""
        if refused < positions:
            self._last_refused = 0
        if refused:
            self._refused_at = now
        self._last_refused += refused
        self.refused += refused
        if self._over:
            self.over()

    def over(self) -> None:
        """No further frame will come: what was refused last was asked for beyond the end, and nothing of it is lost."""
        self._over = True
        self._beyond += self._last_refused
        self.refused -= self._last_refused
        self._last_refused = 0

    def lost(self, now: float) -> int:
        """Positions that were refused, and not because the last scan is over, as far as that can be told by now."""
        return self.refused - (self._last_refused if now - self._refused_at < _END_S else 0)

    def came(self, now: float) -> None:
        """A frame has come."""
        self._active = self._since = now
        self._abandoned = False

    def outstanding(self, known: int) -> int:
        """Positions of which neither a frame nor its loss is known. known: frames that came or are lost."""
        return max(0, self._answerable + self._unasked - known)

    @property
    def _answerable(self) -> int:
        """Positions that bring a frame, or have brought one."""
        return self.asked - self.refused - self._beyond - self.given_up

    def silence(self, now: float, known: int) -> float:
        """Seconds for which a frame has been expected; gives up positions that were asked for too long ago.

        A run that asks for nothing, as a paused one, may be silent for as long as it likes: 0.
        """
        outstanding = self.outstanding(known)
        if outstanding and now - self._active > self._give_up_s:
            self.given_up += outstanding
            self._abandoned = True
        elif not outstanding and self._steered and not self._abandoned:
            self._since = None
        return 0.0 if self._since is None else now - self._since


def too_silent(silent_s: float, number: int | None, refusal: str, unreadable: str = "") -> str:
    """What ends a run in which no frame came for so long after one of this number (None: at all), in words. unreadable:
    what kept others from being read."""
    if unreadable and number is None:
        return f"found no frame for {silent_s:.0f} s that can be read, expected one; the others were {unreadable}"
    last = "none came at all" if number is None else f"the last was number {number}"
    said = f"; the motion says: {refusal}" if refusal else ""
    return (
        f"found no frame for {silent_s:.0f} s ({last}), expected one: is the detector armed? end_s says how long to "
        f"wait{said}"
    )


def refuse_other_samples(expected: int, samples: int, frames: int | None) -> None:
    """Raises ValueError where a scan of so many frames (None: not known) had another number of samples for each than
    expected: every frame has the position of another one then. samples: the highest index of one, and 1, which samples
    that are lost or come twice do not change.

    The frames that came do not say how many there were: a detector may have had no room for half of them.
    """
    if not frames:
        return
    off = abs(samples - expected * frames)
    if off > max(frames / 2, expected):  # as many as one frame has may be on their way, or one more than stopped
        raise ValueError(
            f"found {samples} samples for {frames} frames, {samples / frames:.3g} for each, expected {expected}: the "
            f"positions of this scan are wrong; give samples={max(1, round(samples / frames))}"
        )
