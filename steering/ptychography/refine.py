"""Reconstruct an object from frames, from nothing or from what is already known: whole, or part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from steering.ptychography.device import find_device
from steering.ptychography.gauge import Gauge
from steering.ptychography.rpie import Rpie
from steering.ptychography.settings import RefineSettings
from steering.records import Canvas

_LEAST_COVER = 0.05
"""Least illumination of a pixel, relative to the probe's highest intensity, to count as reconstructed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Refined:
    """The result of a refinement."""

    object: NDArray[np.complex64]
    """(Y, X) on the canvas; outside `covered` it is the start, untouched."""
    probe: NDArray[np.complex64]
    """(mode, N, N), as given or improved."""
    residual: NDArray[np.float32]
    """(n,) far-field residual of each frame when it was last used, before its own update; 1 where it never was."""
    moved: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 2), np.float32))
    """(n, 2) of (y, x), object pixels, by which the positions were corrected."""
    covered: NDArray[np.bool_]
    """(Y, X), True where these frames illuminate the object enough to determine it."""

    def of_part(self, part: tuple[slice, slice]) -> Refined:
        """Copies of these rows and columns."""
        return replace(self, object=self.object[part].copy(), covered=self.covered[part].copy())

    def put_into(self, whole: Refined | None, shape: tuple[int, int], part: tuple[slice, slice]) -> Refined:
        """This result, of a part of a canvas, in the place of what `whole`, which is changed, says of that part.

        None: nothing is known of the canvas of that shape yet.
        """
        if whole is None:
            whole = replace(self, object=np.ones(shape, np.complex64), covered=np.zeros(shape, bool))
        whole.object[part], whole.covered[part] = self.object, self.covered
        return replace(self, object=whole.object, covered=whole.covered)


class Refinement:
    """An object on its way to agreement with frames. It goes on part by part, and its outcome does not depend on where
    the parts end.
    """

    def __init__(
        self,
        counts: NDArray,
        positions_px: ArrayLike,
        probe: NDArray[np.complex64],
        canvas: Canvas,
        *,
        start: NDArray | None = None,
        mask: NDArray[np.bool_] | None = None,
        settings: RefineSettings | None = None,
    ) -> None:
        """As `refine`."""
        self.settings = settings or RefineSettings()
        self.passes = 0
        """Done so far, whole."""
        self.converged = False
        """The median residual falls no further, see `RefineSettings.least_gain`."""
        self._before = _start(start, canvas)
        _refuse_bad_probe(probe, counts)
        corner, fraction = canvas.corners(positions_px, probe.shape[-1])
        if len(corner) != len(counts):
            raise ValueError(f"found {len(counts)} frames and {len(corner)} positions, expected one for each")
        self._gauge = Gauge.of(torch.from_numpy(np.ascontiguousarray(probe, np.complex64)))
        found = self._before.copy()
        if self.settings.engine == "ptychi" and self.settings.passes:
            from steering.ptychography.ptychi import reconstruct  # noqa: PLC0415 - optional, imported late

            found, probe = reconstruct(counts, positions_px, probe, canvas, self._before, mask, self.settings)
            self.passes = self.settings.passes
        self._engine = Rpie(counts, mask, corner, fraction, found, probe, find_device(self.settings.device))
        if self.over:
            self._engine.measure_residuals()
        self._order = np.random.default_rng(self.settings.seed)
        self._left = np.zeros(0, np.int64)
        """Frames of the pass under way that are still to be used."""
        self._medians: list[float] = []
        """Median residual after each `gain_passes` passes."""

    @property
    def over(self) -> bool:
        """Nothing more is to be done."""
        return self.converged or self.passes >= self.settings.passes

    @property
    def residual(self) -> float:
        """Median over all frames of the far-field residual of each when it was last used; 1 before the first pass."""
        return float(self._engine.residual.median())

    def go_on(self, stop: Callable[[], bool] | None = None) -> None:
        """Refine until it is over or `stop`, asked before each batch, says True."""
        settings = self.settings
        while not self.over:
            if not len(self._left):
                self._left = self._order.permutation(self._engine.with_light())
            improve = settings.probe_from_pass is not None and self.passes >= settings.probe_from_pass
            move = settings.positions_from_pass is not None and self.passes >= settings.positions_from_pass
            while len(self._left):
                if stop is not None and stop():
                    return
                batch, self._left = self._left[: settings.batch], self._left[settings.batch :]
                self._engine.step(batch, settings.alpha, settings.probe_alpha if improve else None, move=move)
            self.passes += 1
            self._check_convergence()

    def result(self) -> Refined:
        """What there is by now."""
        engine = self._engine
        found, probe = engine.object.copy(), engine.probe.cpu().clone()
        if self.settings.probe_from_pass is not None:
            self._gauge.hold(torch.from_numpy(found), probe)
        covered = engine.illumination() >= _LEAST_COVER
        return Refined(
            object=np.where(covered, found, self._before),
            probe=probe.numpy(),
            residual=engine.residual.cpu().numpy().copy(),
            moved=engine.moved.cpu().numpy().copy(),
            covered=covered,
        )

    def _check_convergence(self) -> None:
        if not self.settings.least_gain or self.passes % self.settings.gain_passes:
            return
        self._medians.append(self.residual)
        if len(self._medians) > 1:
            before, now = self._medians[-2:]
            self.converged = now > (1 - self.settings.least_gain) * before


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
    held, so that object and probe do not drift together; where positions are corrected, so is their mean.
    Raises ValueError for shapes that do not match, values that are not finite, a window that leaves the canvas, and
    ImportError for the engine `ptychi` where it is not installed.
    """
    work = Refinement(counts, positions_px, probe, canvas, start=start, mask=mask, settings=settings)
    work.go_on(stop)
    return work.result()


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
