"""Reconstruct an object from frames, from nothing or from what is already known; also the maker of labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from steering.ptychography.gauge import Gauge
from steering.ptychography.rpie import Rpie
from steering.ptychography.settings import RefineSettings
from steering.ptychography.trust import good_pixels, measured_amplitude
from steering.records import Canvas

_LEAST_COVER = 0.05
"""Light a pixel must have seen, as a share of the probe's highest intensity, to count as reconstructed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Refined:
    """What refinement leaves."""

    object: NDArray[np.complex64]
    """(Y, X) on the canvas; outside `covered` it is the start, untouched."""
    probe: NDArray[np.complex64]
    """(mode, N, N), as given or improved."""
    residual: NDArray[np.float32]
    """(n,) far-field residual of each frame when it was last used, before its own update; 1 where it never was."""
    covered: NDArray[np.bool_]
    """(Y, X), True where these frames brought enough light to tell the object."""


def refine(
    counts: NDArray,
    positions_px: ArrayLike,
    probe: NDArray[np.complex64],
    canvas: Canvas,
    *,
    start: NDArray | None = None,
    mask: NDArray[np.bool_] | None = None,
    settings: RefineSettings | None = None,
    stop: Callable[[], bool] | None = None,
) -> Refined:
    """Bring the object on the canvas to agreement with the frames.

    counts: (n, N, N) of any real dtype, zero frequency at N // 2. positions_px: (n, 2) of (y, x), object pixels.
    probe: complex (mode, N, N), scaled to the counts (`rescale_probe`). start: complex (Y, X), the object so far;
    None: fully transparent. mask: bool (N, N), True = do not use. stop: asked before each batch; True ends at once with
    what there is (Pty-Chi does not ask). Where the probe is improved too, its centre, tilt, power and global phase are
    held, so that object and probe do not drift together.
    Raises ValueError for shapes that do not match, values that are not finite, a window that leaves the canvas, and
    ImportError for the engine `ptychi` where it is not installed.
    """
    settings = settings or RefineSettings()
    before = _start(start, canvas)
    _refuse_bad_probe(probe, counts)
    corner, fraction = canvas.corners(positions_px, probe.shape[-1])
    if len(corner) != len(counts):
        raise ValueError(f"found {len(counts)} frames and {len(corner)} positions, expected one for each")
    good = None if mask is None else good_pixels(mask, probe.shape[-1])
    amplitude = measured_amplitude(counts, mask)
    gauge = Gauge.of(torch.from_numpy(np.ascontiguousarray(probe, np.complex64)))
    found = before.copy()
    if settings.engine == "ptychi" and settings.passes:
        from steering.ptychography.ptychi import reconstruct  # noqa: PLC0415 - optional, imported late

        found, probe = reconstruct(counts, positions_px, probe, canvas, before, mask, settings)
    engine = Rpie(amplitude, good, corner, fraction, found, probe)
    if settings.engine == "rpie" and settings.passes:
        _run(engine, settings, stop)
    else:
        engine.look()
    if settings.probe_from_pass is not None:
        gauge.hold(torch.from_numpy(engine.object), engine.probe)
    covered = engine.seen() >= _LEAST_COVER
    return Refined(
        object=np.where(covered, engine.object, before),
        probe=engine.probe.numpy(),
        residual=engine.residual.numpy(),
        covered=covered,
    )


def _run(engine: Rpie, settings: RefineSettings, stop: Callable[[], bool] | None) -> None:
    order = np.random.default_rng(settings.seed)
    for number in range(settings.passes):
        improve = settings.probe_from_pass is not None and number >= settings.probe_from_pass
        frames = order.permutation(engine.with_light())
        for first in range(0, len(frames), settings.batch):
            if stop is not None and stop():
                return
            batch = frames[first : first + settings.batch]
            engine.step(batch, settings.alpha, settings.probe_alpha if improve else None)


def _start(start: NDArray | None, canvas: Canvas) -> NDArray[np.complex64]:
    if start is None:
        return np.ones(canvas.shape, np.complex64)
    if start.shape != canvas.shape or not np.isfinite(start).all():
        raise ValueError(f"found a start of shape {start.shape}, expected finite values on the canvas {canvas.shape}")
    return start.astype(np.complex64)


def _refuse_bad_probe(probe: NDArray, counts: NDArray) -> None:
    if probe.ndim != 3 or counts.ndim != 3 or probe.shape[1:] != counts.shape[1:]:
        raise ValueError(
            f"found a probe of shape {probe.shape} and frames of shape {counts.shape}, "
            "expected (mode, N, N) and (n, N, N)"
        )
    if not np.isfinite(probe).all() or not probe.any():
        raise ValueError("found a probe that is not finite or has no light, expected finite values: see zone_plate")
