"""How much is kept in memory of frames and of scans that are over: what is older goes to the run folder."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import mmap
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steering.inference.live import LiveImage
from steering.inference.whole_scan import FinalImage

logger = logging.getLogger(__name__)

_NEWEST_BLOCKS = 2
"""Of the scan that goes on: they stay, the last one is being filled."""
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14 and later."""
_SLACK = 1.25
"""Of the budget, above which whoever sends frames waits for the disk."""


class FrameMemory:
    """Counts what is held; one thread moves the oldest of it to the run folder.

    What is moved can be read as before, from files that are mapped into memory. Without `keep` a file has no name any
    more once it is mapped: the system frees it when the last reader ends, however that comes about.
    """

    def __init__(self, budget: int, folder: Path, *, keep: bool = False) -> None:
        """budget: bytes. folder: where files go; made when the first one is written."""
        self.budget = budget
        self.folder = folder
        self.keep = keep
        self.busy = False
        """Whether `relieve` was started and has not returned."""
        self._taken = 0
        """Bytes ever asked for: written by the thread that predicts alone."""
        self._freed = 0
        """Bytes ever given back: written by the thread that moves alone."""
        self._helpless = False
        self._warned = False
        self._written = 0

    @property
    def held(self) -> int:
        """Bytes of counts and patches, and of the images of scans that are over."""
        return self._taken - self._freed

    @property
    def due(self) -> bool:
        """Whether something has to go."""
        return self.held > self.budget and not self.busy

    @property
    def full(self) -> bool:
        """Whether frames have to wait until more was moved."""
        return self.busy and not self._helpless and self.held > _SLACK * self.budget

    def took(self, asked: int) -> None:
        """Note bytes that were asked for; for the thread that predicts."""
        self._taken += asked

    def relieve(self, scans: Iterable[LiveImage]) -> None:
        """Move the oldest to the run folder until the rest fits; for one thread at a time. scans: oldest first."""
        try:
            for number, live in enumerate(scans):
                self._relieve(number, live)
            self._helpless = self.held > self.budget
        finally:
            self.busy = False

    @staticmethod
    def prepare(live: LiveImage) -> None:
        """Have the system give the memory of a scan's image now, beside the thread that predicts: it would be stopped
        for each page that it touches for the first time, a quarter of its time on a canvas of 4096 x 4096."""
        for values in live.arrays():
            _populate(values)

    def retire(self, live: LiveImage) -> None:
        """A scan is over: of its patches nothing is needed any more, and its image may leave memory from now on."""
        live.let_go()
        for block in live.frames.blocks:
            patch = block.get("patch")
            if patch is not None:
                self._freed += patch.nbytes
                block["patch"] = None
        self._freed -= _image_bytes(live)

    def conclude(self, live: LiveImage, final: FinalImage | None) -> None:
        """Keep what a scan that is over leaves, see LiveImage.conclude."""
        before = _image_bytes(live)
        live.conclude(final)
        self._freed += before - _image_bytes(live)

    def _relieve(self, number: int, live: LiveImage) -> None:
        if live.retired and self.held > self.budget:
            before = _image_bytes(live)
            light, weight = live.stitcher.sums
            live.stitcher.sums = self._moved(light, number, "light"), self._moved(weight, number, "weight")
            for name in ("refined", "refined_labels"):
                refined = getattr(live, name)
                if refined is not None:
                    moved = dataclasses.replace(refined, object=self._moved(refined.object, number, name))
                    if getattr(live, name) is refined:  # else a newer one has come meanwhile
                        setattr(live, name, moved)
            self._freed += before - _image_bytes(live)
        blocks = len(live.frames.blocks) - (0 if live.retired else _NEWEST_BLOCKS)
        for block in range(max(0, blocks)):
            if self.held <= self.budget:
                return
            if live.frames.bulk(block):
                name = f"counts-{block * live.frames.block_rows:08d}"
                self._freed += live.frames.leave(block, partial(self._write, number=number, name=name))

    def _moved(self, values: NDArray, number: int, name: str) -> NDArray:
        """The same values in a file; where that fails, in memory as before."""
        if isinstance(values, np.memmap):
            return values
        moved = self._write(values, number, name)
        return values if moved is None else moved

    def _write(self, values: NDArray, number: int, name: str) -> NDArray | None:
        """The values as a file that is mapped into memory; None where it cannot be written."""
        path = self.folder / f"{number:03d}-{name}.npy"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                np.lib.format.write_array(file, values, allow_pickle=False)
            # Private to this process and writable there: torch refuses memory that cannot be written.
            mapped: NDArray = np.load(path, mmap_mode="c", allow_pickle=False)
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "%s: old frames could not be moved to disk (%s), late labels for them are refused", path, error
                )
            self._warned = True
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self._written += values.nbytes
        if not self.keep:
            path.unlink()
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        return mapped

    @property
    def written(self) -> int:
        """Bytes that were moved to the run folder so far."""
        return self._written


def _populate(values: NDArray) -> None:
    """Back an array by memory, without a change of what it holds. Where the system cannot, it does so page by page."""
    first = -(-values.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (values.ctypes.data + values.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0 and sys.platform == "linux":
        # By ctypes, which gives up the interpreter meanwhile.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _POPULATE_WRITE)


def _image_bytes(live: LiveImage) -> int:
    """Bytes of memory that the image of a scan that is over takes."""
    parts: list[NDArray] = [*live.stitcher.sums]
    parts += [refined.object for refined in (live.refined, live.refined_labels) if refined is not None]
    return sum(each.nbytes for each in parts if not isinstance(each, np.memmap))
