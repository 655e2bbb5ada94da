"""What comes in: chunks are sifted and put together, and what cannot be used of them is told once."""

from __future__ import annotations

import time

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.campaign import FrameSetAside
from steering.inference.adviser import Handover
from steering.inference.batch import Batch, make_batch
from steering.inference.live import LiveImage
from steering.inference.sift import Register
from steering.ptychography import Canvas


class Intake:
    """Makes batches of chunks. One thread owns it."""

    def __init__(self, canvas: Canvas, handover: Handover) -> None:
        """canvas: where the windows of frames have to lie. handover: what was told of frames already."""
        self.register = Register()
        self._canvas = canvas
        self._handover = handover

    def batch(
        self, taken: list[tuple[xr.Dataset, float]], live: LiveImage, mask: NDArray[np.bool_]
    ) -> tuple[Batch | None, NDArray[np.bool_], list[FrameSetAside]]:
        """What can be used of chunks of a scan (None: nothing), the mask (y, x) then, and what is to be told."""
        if live.retired:
            batch = None
            aside = {"a scan that is over": tuple(i for chunk, _ in taken for i in chunk["frame"].values.tolist())}
        else:
            batch, mask, aside = make_batch(taken, known=live.frames.row, mask=mask, canvas=self._canvas)
        self.register.note(live.scan, np.zeros(0, np.int64) if batch is None else batch.frame_id, aside)
        return (
            batch,
            mask,
            [
                FrameSetAside(time=time.time(), scan=live.scan, frame_ids=new, reason=reason)
                for reason, ids in aside.items()
                if (new := self._handover.news(live.scan, ids))
            ],
        )
