"""From counts to patches, both in the host's memory, by the device that a slot runs on."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from steering.inference.backends import Slot

_LEAST = 64
"""Frames of a piece at least: copies of fewer take less time than it takes to start them."""
_PIECES = 4
"""That a batch is cut into at most."""


class CopyStreams(Protocol):
    """Two streams beside that on which a GPU computes: towards it and back. Only `finish` waits."""

    def send(self, frames: torch.Tensor) -> torch.Tensor:
        """A copy on the GPU of what is in pinned memory; what is computed from now on waits for it."""

    def bring(self, found: torch.Tensor, out: torch.Tensor) -> None:
        """Copy what is computed last into pinned memory, once it is there."""

    def finish(self) -> None:
        """Wait until all has come back."""


class Transfer:
    """Memory of the host for so many frames, and how they go through a slot.

    A GPU is sent a batch in pieces from pinned memory: while it computes one, the next is written and sent and the one
    before comes back. Counts of uint16 are sent as such, half as many bytes, and converted there.
    """

    def __init__(
        self, device: torch.device, *, frames: int, window: int, patch: int, streams: CopyStreams | None = None
    ) -> None:
        """streams: of the device; None: those of a GPU, and on a CPU none, where nothing is copied."""
        pinned = device.type == "cuda"
        self._streams = streams or (_Streams(device) if pinned else None)
        self._counts = torch.zeros(frames, window, window, pin_memory=pinned)
        self._raw = (
            None if self._streams is None else torch.zeros(frames, window, window, dtype=torch.int16, pin_memory=pinned)
        )
        self._patches = torch.zeros(frames, patch, patch, dtype=torch.complex64, pin_memory=pinned)

    def __len__(self) -> int:
        """Frames that there is room for."""
        return len(self._counts)

    def __call__(self, slot: Slot, counts: NDArray, size: int | None = None) -> NDArray[np.complex64]:
        """Patches (n, patch, patch) of counts (n, window, window), in memory that the next call overwrites.

        size: frames to predict, of which those beyond n are left; None: n.
        """
        n, size = len(counts), size or len(counts)
        raw = self._raw if counts.dtype == np.uint16 else None
        frames = self._counts if raw is None else raw
        piece = size if self._streams is None else max(_LEAST, -(-size // _PIECES))
        with torch.inference_mode():
            for first in range(0, size, piece):
                part = slice(first, min(first + piece, size))
                given = counts[part]
                written = frames[first : first + len(given)].numpy()
                if raw is None:
                    np.copyto(written, given, casting="unsafe")
                else:
                    written[...] = given.view(np.int16)
                self._predict(slot, frames[part], self._patches[part])
            if self._streams is not None:
                self._streams.finish()
        return self._patches[:n].numpy()

    def _predict(self, slot: Slot, frames: torch.Tensor, patches: torch.Tensor) -> None:
        if self._streams is None:
            torch.polar(*slot(frames), out=patches)
            return
        there = self._streams.send(frames)
        if there.dtype == torch.int16:
            there = (there.to(torch.int32) & 0xFFFF).to(torch.float32)  # most operators do not know uint16
        self._streams.bring(torch.polar(*slot(there)), patches)


class _Streams:
    """A stream for each direction; the current one computes.

    A tensor's memory goes back to the stream on which it was made as soon as nobody holds it: `record_stream` says that
    another one still uses it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def send(self, frames: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._inward):
            there = frames.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._inward)
        there.record_stream(computing)
        return there

    def bring(self, found: torch.Tensor, out: torch.Tensor) -> None:
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            out.copy_(found, non_blocking=True)
        found.record_stream(self._outward)

    def finish(self) -> None:
        self._outward.synchronize()
