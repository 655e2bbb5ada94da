"""Finds how a detector's frames are turned relative to the scan's positions: by which turn explains the frames.

Each of the eight turns is tried by a short refinement of some dozens of neighbouring frames. Only the right one makes
frames that overlap agree on one object, so its residual falls below the others'. Where none stands out (a flat object,
no overlap, a symmetry), nothing is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from steering.ptychography import Canvas, Refined, RefineSettings, refine
from steering.ptychography.device import one_thread
from steering.records import Field
from steering.sources.orientation import ORIENTATIONS, turn
from steering.sources.recordings import Recording

_FRAMES = 48
_SETTINGS = RefineSettings(passes=10, probe_from_pass=3, batch=16)
"""Of each of the eight turns. bench_recorded says how often they tell the right one from the others."""
_STANDS_OUT = 0.9
"""The best turn's residual is at most this share of the second best's, or nothing is guessed."""


@dataclass(frozen=True, kw_only=True)
class FoundOrientation:
    """What was found."""

    orientation: str
    """The turn that explains the frames best, a name of ORIENTATIONS."""
    residuals: dict[str, float]
    """Median far-field residual after the refinement, by turn."""

    @property
    def share(self) -> float:
        """The best residual over the second best: small where there is no doubt."""
        best, second = sorted(self.residuals.values())[:2]
        return best / second if second > 0 else 1.0

    @property
    def sure(self) -> bool:
        """Whether the best stands out."""
        return self.share <= _STANDS_OUT

    def __str__(self) -> str:
        best = sorted(self.residuals.items(), key=lambda i: i[1])
        listed = ", ".join(f"{name} {value:.3g}" for name, value in best[:3])
        return f"orientation {self.orientation}: residual {self.share:.2f} of the second best ({listed}, ...)"


def find_orientation(recording: Recording, *, frames: int = _FRAMES, device: str = "auto") -> FoundOrientation:
    """Try the eight turns of a recording that was read with orientation "none".

    frames: how many are refined, those nearest to the one with the most neighbours. The recording's probe is taken as
    it is in the object's axes. device: see `find_device`. Raises ValueError for a recording without a probe.
    """
    where = recording.positions / recording.geometry.object_pixel
    chosen = neighbours(where, frames)
    residuals = {name: _residual(turned(recording, name, chosen), where[chosen], device) for name in ORIENTATIONS}
    return FoundOrientation(orientation=min(residuals, key=lambda name: residuals[name]), residuals=residuals)


def oriented(recording: Recording, *, device: str = "auto") -> Recording:
    """The recording, read with orientation "none", turned as its frames say; a note says how sure that is.

    device: see `find_device`. Raises ValueError where no turn stands out, and for a recording without a probe.
    """
    found = sure_orientation(recording, device=device)
    again = turned(recording, found.orientation)
    return replace(again, notes=(*recording.notes, str(found)))


def sure_orientation(recording: Recording, *, device: str = "auto") -> FoundOrientation:
    """As `find_orientation`; raises ValueError where no turn stands out."""
    found = find_orientation(recording, device=device)
    if not found.sure:
        raise ValueError(
            f"found no turn of the frames that explains them better than all others ({found}), expected one at "
            f"{_STANDS_OUT} of the second best: is the object flat, too little overlapped, or the zero frequency "
            "elsewhere (--zero-frequency)? Or give the orientation (--orientation NAME)"
        )
    return found


def turned(recording: Recording, orientation: str, frames: NDArray[np.int64] | slice = slice(None)) -> Recording:
    """A recording, or some frames of it, with frames and mask turned about their zero frequency."""
    mask = recording.geometry.mask
    if mask is not None:
        mask = turn(mask[None], "centre", orientation)[0]
    return replace(
        recording,
        counts=turn(recording.counts[frames], "centre", orientation),
        positions=recording.positions[frames],
        numbers=recording.numbers[frames],
        geometry=replace(recording.geometry, mask=mask),
    )


def neighbours(where: NDArray[np.float64], frames: int) -> NDArray[np.int64]:
    """Numbers of so many frames that are nearest to one another, ascending. where: (n, 2)."""
    some = where[np.linspace(0, len(where) - 1, min(200, len(where))).astype(int)]
    reach = [
        np.partition(np.hypot(*(where - one).T), min(frames, len(where)) - 1)[min(frames, len(where)) - 1]
        for one in some
    ]
    middle = some[int(np.argmin(reach))]
    return np.sort(np.argsort(np.hypot(*(where - middle).T), kind="stable")[:frames])


def lit_residual(found: Refined, part: Recording) -> float:
    """Median residual of the frames with light, of those that were refined: the others say nothing. 1 without any."""
    lit = part.counts[:, part.geometry.good()].any(1)
    return float(np.median(found.residual[lit])) if lit.any() else 1.0


def _residual(part: Recording, where: NDArray[np.float64], device: str) -> float:
    (y0, x0), (y1, x1) = where.min(0), where.max(0)
    canvas = Canvas.around(Field(y0, y1, x0, x1), part.geometry.shape[0])
    settings = replace(_SETTINGS, device=device)
    with one_thread():
        found = refine(part.counts, where, part.fitted_probe(), canvas, mask=part.geometry.mask, settings=settings)
    return lit_residual(found, part)
