"""A probe to begin with, from the frames alone, for the scans (most of them) that come without one.

The mean frame is about the probe's far field; its phase is that of a defocus, which a short search finds: each of
several defoci is tried by refining some neighbouring frames, and the one that explains them best is kept. `refine` with
the object does the rest.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from steering.ptychography import Canvas, RefineSettings, add_modes, refine, rescale_probe
from steering.records import Field
from steering.sources.finding import neighbours
from steering.sources.recordings import Recording

_SETTINGS = RefineSettings(passes=8, probe_from_pass=1, batch=16)
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


def with_probe(recording: Recording, *, modes: int = 1, frames: int = 150, tried: int = 17) -> Recording:
    """The recording with a probe to begin with, where it has none.

    modes: of the probe; each beyond the first has a twentieth of the power. frames: how many are refined at each try.
    tried: how many defoci. A note says which was taken. The turn of the frames must be right: the search relies on
    frames that overlap.
    """
    if recording.probe is not None:
        return recording
    chosen = neighbours(recording.positions / recording.geometry.object_pixel, frames)
    part = replace(recording, counts=recording.counts[chosen], positions=recording.positions[chosen])
    where = part.positions / part.geometry.object_pixel
    (y0, x0), (y1, x1) = where.min(0), where.max(0)
    canvas = Canvas.around(Field(y0, y1, x0, x1), part.geometry.shape[0])
    widest = _WIDEST * part.geometry.shape[0]
    best: tuple[float, float, NDArray[np.complex64]] | None = None
    for diameter in np.linspace(-widest, widest, tried).tolist():
        probe = defocused(part, diameter)
        found = refine(part.counts, where, probe, canvas, mask=part.geometry.mask, settings=_SETTINGS)
        residual = float(np.median(found.residual))
        if best is None or residual < best[0]:
            best = residual, diameter, found.probe
    if best is None:
        raise ValueError(f"found tried={tried}, expected one defocus or more")
    note = (
        f"no probe in the file: begun with a beam of {abs(best[1]):.0f} object pixels from the frames, {_side(best[1])}"
    )
    return replace(recording, probe=add_modes(best[2], modes), notes=(*recording.notes, note))


def _side(diameter: float) -> str:
    return "in focus" if diameter == 0 else "behind the focus" if diameter > 0 else "before the focus"
