"""Try a policy on a scan of which a frame at every candidate is predicted already: no beam, no clock, no Dask."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.policies.candidates import Policy
from steering.ptychography import Canvas, Stitcher, prior_residual
from steering.records import Prediction


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """What a frame at each candidate gives, and what a model says of it; a policy learns only of those it chooses.

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

    def walk(self, policy: Policy, *, at_once: int = 10, with_prior_residual: bool = False) -> NDArray[np.int64]:
        """Rows of the candidates in the order in which the policy has them measured, up to its stop.

        The policy is asked for `at_once` positions while as many are under way: it decides without their frames.
        with_prior_residual: give it their prior residual too, which a stop rule needs and nobody else.
        """
        stitcher, order = Stitcher(self.canvas, self.weight), []
        under_way: deque[NDArray[np.int64]] = deque()
        stopped = False
        while not stopped:
            decision = policy.suggest(at_once)
            stopped = decision.stop
            rows = self.rows_at(decision.positions)
            order.append(rows)
            under_way.append(rows)
            if len(under_way) > 1 and len(under_way[0]):
                rows = under_way.popleft()
                told = self.prediction(rows, stitcher if with_prior_residual else None)
                stitcher.add(self.patches[rows], self.where[rows])
                policy.ingest(told, view(stitcher))
        return np.concatenate(order)

    def rows_at(self, positions: NDArray[np.float64]) -> NDArray[np.int64]:
        """Rows of the candidates nearest to positions (n, 2)."""
        return np.array([int(((self.where - one) ** 2).sum(1).argmin()) for one in positions], np.int64)

    def with_prior_residuals(
        self, order: NDArray[np.int64], *, at_once: int, ahead: int
    ) -> Iterator[tuple[Prediction, NDArray[np.float32]]]:
        """Go a way again, `at_once` frames a step: what is said of each step, and the prior residual of the `ahead`
        frames
        from there on for the image before it, which nobody knows while measuring."""
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
        """What a policy is told of frames; stitcher: the image before them (None: it is not compared with them)."""
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
        )


def view(stitcher: Stitcher) -> xr.Dataset:
    """The live image as a policy sees it, lengths in object pixels."""
    image, canvas = stitcher.image(), stitcher.canvas
    fields = {"amplitude": np.abs(image), "phase": np.angle(image), "weight": stitcher.weight}
    axes = zip(("y", "x"), canvas.shape, canvas.origin, strict=True)
    coords = {axis: np.arange(size) + start for axis, size, start in axes}
    return xr.Dataset({name: (("y", "x"), value) for name, value in fields.items()}, coords=coords)
