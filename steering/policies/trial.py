"""Try a policy on a scan with predicted frames at every candidate: without beam, clock and Dask."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.policies.candidates import Policy
from steering.ptychography import Canvas, Stitcher, poisson_floor, prior_residual
from steering.records import Prediction


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """A frame at each candidate and its prediction; a policy is given only those that it chooses.

    Lengths are in object pixels.
    """

    canvas: Canvas
    probe: NDArray[np.complex64]
    weight: NDArray[np.float32]
    """Of a patch's pixels."""
    where: NDArray[np.float64]
    """(n, 2), the candidates."""
    counts: NDArray
    """(n, N, N)"""
    patches: NDArray[np.complex64]
    """(n, size, size)"""
    residual: NDArray[np.float32]
    """(n,)"""

    def run(self, policy: Policy, *, at_once: int = 10, with_prior_residual: bool = False) -> NDArray[np.int64]:
        """Rows of the candidates in the order in which the policy suggests them, up to its stop.

        The policy is asked for `at_once` positions while as many are being measured: it decides without their frames.
        with_prior_residual: compute the prior residual too, which only a stop rule needs.
        """
        stitcher, order = Stitcher(self.canvas, self.weight), []
        pending: deque[NDArray[np.int64]] = deque()
        stopped = False
        while not stopped:
            decision = policy.suggest(at_once)
            stopped = decision.stop
            rows = self.rows_at(decision.positions)
            order.append(rows)
            pending.append(rows)
            if len(pending) > 1 and len(pending[0]):
                rows = pending.popleft()
                prediction = self.prediction(rows, stitcher if with_prior_residual else None)
                stitcher.add(self.patches[rows], self.where[rows])
                policy.ingest(prediction, view(stitcher))
        return np.concatenate(order)

    def rows_at(self, positions: NDArray[np.float64]) -> NDArray[np.int64]:
        """Rows of the candidates nearest to positions (n, 2)."""
        return np.array([int(((self.where - one) ** 2).sum(1).argmin()) for one in positions], np.int64)

    def with_prior_residuals(
        self, order: NDArray[np.int64], *, at_once: int, ahead: int
    ) -> Iterator[tuple[Prediction, NDArray[np.float32]]]:
        """Measure in a given order, `at_once` frames a step. Yields the prediction of each step, and the prior residual
        of the `ahead` frames from there on for the image before them, which is not known in a real scan."""
        stitcher = Stitcher(self.canvas, self.weight)
        for done in range(0, len(order) - max(ahead, at_once) + 1, at_once):
            rows = order[done : done + at_once]
            coming = order[done : done + ahead]
            yield (
                self.prediction(rows, stitcher),
                prior_residual(stitcher, self.where[coming], self.counts[coming], self.probe),
            )
            stitcher.add(self.patches[rows], self.where[rows])

    def prediction(self, rows: NDArray[np.int64], stitcher: Stitcher | None) -> Prediction:
        """The prediction of frames; stitcher: the image before them, for their prior residual (None: it has none)."""
        patches = self.patches[rows]
        prior = None if stitcher is None else prior_residual(stitcher, self.where[rows], self.counts[rows], self.probe)
        return Prediction(
            frame_id=rows,
            scan="trial",
            position=self.where[rows],
            amplitude=np.abs(patches),
            phase=np.angle(patches),
            residual=self.residual[rows],
            offset=np.full(len(rows), np.nan, np.float32),
            model_version=np.zeros(len(rows), np.int64),
            prior_residual=prior,
            poisson_floor=poisson_floor(self.counts[rows]),
        )


def view(stitcher: Stitcher) -> xr.Dataset:
    """The live image as a policy sees it, lengths in object pixels."""
    image, canvas = stitcher.image(), stitcher.canvas
    fields = {"amplitude": np.abs(image), "phase": np.angle(image), "weight": stitcher.weight}
    axes = zip(("y", "x"), canvas.shape, canvas.origin, strict=True)
    coords = {axis: np.arange(size) + start for axis, size, start in axes}
    return xr.Dataset({name: (("y", "x"), value) for name, value in fields.items()}, coords=coords)
