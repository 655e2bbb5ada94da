"""Masks as files keep them: which of their values say that a pixel is bad, in every frame or in one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.files.hdf5 import Hdf5, Node, by_matlab

_CXI_BAD = 0x07DF
"""Invalid, saturated, hot, dead, shadowed, to be ignored, bad, out of the limits, missing, noisy: the others inform."""
_CXI_SATURATED = 0x0002
_NEARLY_EVERY = 0.9
_AT_ONCE = 2**22


def take_mask(found: dict[str, Any], nodes: Sequence[Node], file: Hdf5, rule: str, *, inverted: bool) -> None:
    """Put `mask` (y, x) into `found`, True where a pixel is bad in nearly every image of a mask's datasets.

    Where these have an image for each of the frames in `found`, in the same order, a value that is bad gets the flag
    that a detector writes into such a pixel: what is bad in a few frames is then known in these alone. rule: see
    `Layout.mask_rule`. inverted: what the mask calls bad is good. Raises ValueError for datasets that are no masks of
    one shape, and as `Hdf5.read`.
    """
    shapes = [file.shape(node) for node in nodes]
    images = {shape[-2:] for shape in shapes}
    if len(images) != 1 or any(len(shape) < 2 for shape in shapes):
        raise ValueError(f"found a mask of shape {', '.join(map(str, shapes[:5]))}, expected (y, x) or (frame, y, x)")
    image = images.pop()[:: -1 if by_matlab(nodes[0]) else 1]
    count = sum(math.prod(shape[:-2]) for shape in shapes)
    frames = found["frames"].reshape(-1, *found["frames"].shape[-2:])
    of_each = count > 1 and frames.shape == (count, *image) and frames.dtype.kind in "uif"
    if count > 1 and not of_each:
        found["notes"].append(
            f"the mask has {count} images, and there are {len(frames)} frames: a pixel is masked that is bad in nearly "
            "every image"
        )
    times, at = np.zeros(image, np.int64), 0
    for values in _images(nodes, shapes, file, few=of_each):
        bad = bad_pixels(values, rule, inverted=inverted)
        times += bad.sum(0)
        if of_each:
            full = bad & _only_saturated(values, rule, inverted=inverted)
            _flag(frames[at : at + len(bad)], bad, full)
        at += len(bad)
    found["mask"] = times > _NEARLY_EVERY * count


def bad_pixels(mask: NDArray, rule: str, *, inverted: bool = False) -> NDArray[np.bool_]:
    """Which values of a mask say that a pixel is bad.

    rule: see `Layout.mask_rule`. inverted: what it calls bad is good, but for values that are no numbers, which are bad
    either way.
    """
    if rule == "cxi" and mask.dtype.kind in "ui":
        said = (mask.astype(np.int64) & _CXI_BAD) != 0
    else:
        said = (mask == 0) if rule == "good" else (mask != 0)
    bad = said != inverted
    if mask.dtype.kind in "fc":
        bad |= np.isnan(mask)
    return bad


def _only_saturated(mask: NDArray, rule: str, *, inverted: bool) -> NDArray[np.bool_]:
    """Where all that a mask says against a pixel is that it is saturated: it has counted what it can at the least."""
    if rule != "cxi" or inverted or mask.dtype.kind not in "ui":
        return np.zeros(mask.shape, bool)
    return (mask.astype(np.int64) & _CXI_BAD) == _CXI_SATURATED


def _images(nodes: Sequence[Node], shapes: Sequence[tuple[int, ...]], file: Hdf5, *, few: bool) -> Iterator[NDArray]:
    """The images (n, y, x) of a mask's datasets, few at a time where it has as many as there are frames, which it may
    be larger than: others are bounded as all that is read."""
    for node, shape in zip(nodes, shapes, strict=True):
        if len(shape) == 2 or not few:
            blocks = iter([file.read(node)])
        else:
            rows = max(_AT_ONCE // max(math.prod(shape[1:]), 1), (node.chunks or (1,))[0])
            blocks = file.blocks(node, rows)
        for block in blocks:
            images = block.reshape(-1, *shape[-2:])
            yield images.swapaxes(1, 2) if by_matlab(node) else images


def _flag(frames: NDArray, bad: NDArray[np.bool_], full: NDArray[np.bool_]) -> None:
    """Write into frames (n, y, x) what detectors write where a pixel has no count, and where it is saturated; signed
    integers have no flag of saturation, and keep the value they have."""
    if frames.dtype.kind == "u":
        top = np.iinfo(frames.dtype).max
        frames[bad], frames[full] = top, top - 1
    elif frames.dtype.kind == "f":
        frames[bad], frames[full] = np.nan, np.inf
    else:
        frames[bad & ~full] = -1
