"""A probe to begin with, from the frames alone, for the scans (most of them) that come without one.

The mean frame is about the probe's far field; its phase is that of a defocus, which a short search finds: each of
several defoci is tried by refining some neighbouring frames, and the one that explains them best is kept. `refine` with
the object does the rest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from steering.ptychography import Canvas, RefineSettings, add_modes, refine, rescale_probe
from steering.ptychography.device import one_thread
from steering.records import Field
from steering.sources.finding import FoundOrientation, lit_residual, neighbours, turned
from steering.sources.orientation import ORIENTATIONS
from steering.sources.recordings import Recording

_SETTINGS = RefineSettings(passes=8, probe_from_pass=1, batch=16)
"""Of the defoci that are compared at the end. The probe changes from the second pass on: it is what is sought."""
_FEW, _ROUGHLY = 48, RefineSettings(passes=5, probe_from_pass=1, batch=16)
"""Frames and passes by which the defoci are compared before: that makes it a third as much work."""
_WIDEST = 0.8
"""Share of the window that the widest beam takes which is tried."""


def defocused(recording: Recording, diameter: float) -> NDArray[np.complex64]:
    """A probe (1, N, N) whose far field has the mean amplitude of the frames, defocused to a beam of so many pixels.

    diameter: object pixels, negative before the focus; 0 is the focus itself. It is scaled to the counts.
    """
    window, good = recording.geometry.shape[0], recording.geometry.good()
    amplitude = np.sqrt(np.where(good, recording.counts.mean(0, dtype=np.float64), 0))
    frequency = (np.arange(window) - window // 2) / window
    radius = np.hypot(frequency[:, None], frequency)
    light = amplitude**2
    # The mean of r^2 over an even disc is half the square of its edge.
    edge = np.sqrt(2 * (light * radius**2).sum() / light.sum())
    phase = -np.pi * (diameter / (2 * edge)) * radius**2
    wave = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * phase)), norm="ortho"))
    return rescale_probe(wave[None].astype(np.complex64), recording.counts, recording.geometry.mask)


class BegunProbe(NamedTuple):
    """What a search has found."""

    residual: float
    diameter: float
    """Of the beam, object pixels; see `defocused`."""
    probe: NDArray[np.complex64]
    object: NDArray[np.complex64]


def with_probe(
    recording: Recording, *, modes: int = 1, frames: int = 150, tried: int = 9, device: str = "auto"
) -> Recording:
    """The recording with a probe to begin with, where it has none.

    modes: of the probe; each beyond the first has a twentieth of the power. frames: how many are refined at each try.
    tried: how many defoci, before those beside the best; a note says which was taken. device: see `find_device`. The
    turn of the frames must be right: the search relies on frames that overlap; where it is not known, see
    `begun_and_oriented`.
    """
    if recording.probe is not None:
        return recording
    chosen = neighbours(recording.positions / recording.geometry.object_pixel, frames)
    best = _searched(turned(recording, "none", chosen), tried, device)
    note = (
        f"no probe in the file: begun with a beam of {abs(best.diameter):.0f} object pixels from the frames, "
        f"{_side(best.diameter)}"
    )
    return replace(recording, probe=add_modes(best.probe, modes), notes=(*recording.notes, note))


def begun_and_oriented(
    recording: Recording,
    *,
    modes: int = 1,
    focus: str | None = None,
    phase: str | None = None,
    frames: int = 64,
    tried: int = 9,
    device: str = "auto",
) -> Recording:
    """A recording without a probe, read with orientation "none", turned as its frames say, and with a probe begun.

    See `turn_without_probe`, which raises what this does.
    """
    name, note = turn_without_probe(recording, focus=focus, phase=phase, frames=frames, tried=tried, device=device)
    again = turned(recording, name)
    return with_probe(replace(again, notes=(*recording.notes, note)), modes=modes, device=device)


def turn_without_probe(
    recording: Recording,
    *,
    focus: str | None = None,
    phase: str | None = None,
    frames: int = 64,
    tried: int = 9,
    device: str = "auto",
) -> tuple[str, str]:
    """The turn, a name of ORIENTATIONS, that explains the frames of a recording without a probe, and a note on it.

    Without a known probe a turn and that turn by 180 degrees more explain the frames equally well, with object and
    probe conjugated: of these twins the one is taken whose sample is `before` or `behind` the focus, where `focus` says
    so, or whose phase is `negative` or `positive` where it absorbs more, where `phase` does; else the first, and a note
    says that there is another. Raises ValueError where no turn stands out, or the phase does not follow the absorption.
    """
    found, begun = find_without_probe(recording, frames=frames, tried=tried, device=device)
    if not found.sure:
        raise ValueError(
            f"found no turn of the frames that explains them better than all others ({found}), each with a probe begun "
            f"from them: is the zero frequency elsewhere (--zero-frequency)? Or give --probe, or --orientation "
            f"({', '.join(ORIENTATIONS)})"
        )
    first, twin = found.orientation, TWINS[found.orientation]
    exchanged, why = is_twin(begun, focus, phase)
    name, other = (twin, first) if exchanged else (first, twin)
    return name, f"{found}; {name} is taken, its twin {other} explains the frames as well: {why}"


def find_without_probe(
    recording: Recording, *, frames: int = 64, tried: int = 9, device: str = "auto"
) -> tuple[FoundOrientation, BegunProbe]:
    """Try four turns of a recording without a probe, each for itself and its twin (TWINS), and what was begun for the
    best. Of the frames those nearest to one another are refined, once for each defocus tried."""
    chosen = neighbours(recording.positions / recording.geometry.object_pixel, frames)
    begun = {name: _searched(turned(recording, name, chosen), tried, device) for name in TWINS}
    residuals = {name: one.residual for name, one in begun.items()}
    found = FoundOrientation(orientation=min(residuals, key=lambda name: residuals[name]), residuals=residuals)
    return found, begun[found.orientation]


TWINS = {"none": "rot180", "flip_y": "flip_x", "transpose": "antitranspose", "rot90": "rot270"}
"""Turns of which each explains what its twin explains, where no probe is known."""
_FOLLOWS = 0.1
"""Least correlation of phase and absorption from which a sign is taken."""


def is_twin(one: BegunProbe, focus: str | None, phase: str | None) -> tuple[bool, str]:
    """Whether the twin of what was found is meant, and by what."""
    if focus not in (None, "before", "behind") or phase not in (None, "negative", "positive"):
        raise ValueError(
            f"found focus={focus!r}, phase={phase!r}, expected before or behind; negative or positive; or None"
        )
    if focus is not None and one.diameter:
        return (one.diameter > 0) != (focus == "behind"), f"the sample is {focus} the focus"
    if phase is not None:
        turned_back = one.object * np.conj(one.object.sum())
        absorbed, delay = -np.log(np.abs(one.object) + 1e-6).ravel(), np.angle(turned_back).ravel()
        follows = float(np.corrcoef(absorbed, delay)[0, 1])
        if abs(follows) < _FOLLOWS:
            raise ValueError(
                f"found a phase that does not follow the absorption (correlation {follows:.2f}), expected "
                f"{_FOLLOWS} or more to choose a twin by its sign: say whether the sample is before or behind the focus"
            )
        return (follows > 0) != (phase == "positive"), f"the phase is {phase} where the sample absorbs more"
    return False, "--focus or --phase says which"


def _searched(part: Recording, tried: int, device: str) -> BegunProbe:
    """The best of so many defoci, and of those half a step beside it. All are tried on few frames and in few passes,
    the last three in full: that costs a third."""
    if tried < 2:
        raise ValueError(f"found tried={tried}, expected two defoci or more")
    widest = _WIDEST * part.geometry.shape[0]
    diameters, step = np.linspace(-widest, widest, tried, retstep=True)
    few = turned(part, "none", neighbours(part.positions / part.geometry.object_pixel, _FEW))
    roughly = {each: _begun(few, each, replace(_ROUGHLY, device=device)).residual for each in diameters.tolist()}
    best = min(roughly, key=lambda diameter: roughly[diameter])
    settings = replace(_SETTINGS, device=device)
    tries = (_begun(part, best + shift * float(step), settings) for shift in (-0.5, 0.0, 0.5))
    return min(tries, key=lambda one: one.residual)


def _begun(part: Recording, diameter: float, settings: RefineSettings) -> BegunProbe:
    """What a recording refines to that begins with a beam of so many pixels."""
    where = part.positions / part.geometry.object_pixel
    (y0, x0), (y1, x1) = where.min(0), where.max(0)
    canvas = Canvas.around(Field(y0, y1, x0, x1), part.geometry.shape[0])
    probe, mask = defocused(part, diameter), part.geometry.mask
    with one_thread():
        found = refine(part.counts, where, probe, canvas, mask=mask, settings=settings)
    window = part.geometry.shape[0] // 2
    inner = found.object[window:-window, window:-window]
    return BegunProbe(lit_residual(found, part), diameter, found.probe, inner if inner.size else found.object)


def _side(diameter: float) -> str:
    return "in focus" if diameter == 0 else "behind the focus" if diameter > 0 else "before the focus"
