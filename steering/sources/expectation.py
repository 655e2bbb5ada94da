"""What is expected of a beamline: frames, which are given up, for how long none came, and how many samples they have.

Pure: times are arguments."""

from __future__ import annotations

from collections.abc import Mapping

_NEARLY, _ENOUGH = 0.005, 50
"""Where nobody says how many frames a scan had: how far from a whole number its samples for each may be, and the fewest
frames by which that is judged."""
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


def too_silent(silent_s: float, number: int | None, refusal: str) -> str:
    """What ends a run in which no frame came for so long after one of this number (None: at all), in words."""
    last = "none came at all" if number is None else f"the last was number {number}"
    said = f"; the motion says: {refusal}" if refusal else ""
    return (
        f"found no frame for {silent_s:.0f} s ({last}), expected one: is the detector armed? end_s says how long to "
        f"wait{said}"
    )


class SampleCount:
    """How many samples the companions of the newest scan had for each of its frames: where there are others than
    expected every frame has the position of another one."""

    def __init__(self, expected: Mapping[str, int]) -> None:
        """expected: samples of a frame, by companion."""
        self._expected = dict(expected)
        self._rows = dict.fromkeys(expected, 0)
        self._numbers: tuple[int, int] | None = None
        """Lowest and highest of the frames."""

    def begin(self, stream: str) -> None:
        """A scan of this stream begins."""
        if stream in self._rows:
            self._rows[stream] = 0
        else:
            self._numbers = None

    def frame(self, number: int) -> None:
        """A frame has come."""
        low, high = self._numbers or (number, number)
        self._numbers = min(low, number), max(high, number)

    def samples(self, companion: str, rows: int) -> None:
        """So many samples have come."""
        self._rows[companion] += rows

    def refuse(self, companion: str, frames: int | None, *, over: bool) -> None:
        """Raises ValueError where a companion that has said all had another number of samples than expected.

        frames: that it says it had. over: the frames of the same scan have ended as well: where nobody says how many
        there were, those that came say it by their numbers, with which encoders that ran on alone are not refused.
        """
        rows, expected = self._rows[companion], self._expected[companion]
        if not frames and over and self._numbers is not None:
            low, high = self._numbers
            came = high + 1 - low
            whole = abs(rows / came - round(rows / came)) <= _NEARLY * rows / came
            frames = came if whole and came >= _ENOUGH else None
        # One sample more for each frame is another setting; some that came twice are not.
        too_many = rows > 1.5 * expected * (frames or rows)
        # Fewer may be lost; one for each frame, where several are expected, is another setting.
        one_each = expected > 1 and abs(rows - (frames or 0)) <= 0.02 * rows
        if frames and (too_many or one_each):
            raise ValueError(
                f"found {rows} samples for {frames} frames, {rows / frames:.3g} for each, expected {expected}: the "
                f"positions of this scan are wrong; give samples={max(1, round(rows / frames))}"
            )
