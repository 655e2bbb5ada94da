"""Frames as HDF5 keeps them: in one dataset or in several, with one axis before y and x or with those of a raster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from steering.files.hdf5 import Hdf5, Node, by_matlab


def take_stack(found: dict[str, Any], nodes: Sequence[Node], file: Hdf5, *, look: bool, many: int = 1) -> str:
    """Put the frames of datasets, one after the other, into `found`: as `frames` (..., y, x), or as `shape` only where
    this is a `look`; and `raster`, rows and columns of one dataset that has them. Returns words on where they are.

    many: channels that each frame of one dataset (frame, channel, y, x) has, of which the first is taken. Raises
    ValueError for datasets that are no frames of one shape, and as `Hdf5.read`.
    """
    shapes = [file.shape(node) for node in nodes]
    listed = ", ".join(f"{node.name} {shape}" for node, shape in list(zip(nodes, shapes, strict=True))[:5])
    if any(len(shape) < 2 for shape in shapes) or not nodes:
        raise ValueError(f"found {listed or 'no dataset'} as frames, expected (frame, y, x): name only those")
    images = sorted({shape[-2:] for shape in shapes})
    if len(images) != 1:
        raise ValueError(
            f"found frames of shapes {images[:5]} in one scan ({listed}), expected one shape for all: name only those"
        )
    counted, alone = [math.prod(shape[:-2]) for shape in shapes], len(nodes) == 1
    if alone and len(shapes[0]) == 4 and many == 1:
        found["raster"] = shapes[0][:2]
    whole = shapes[0] if alone else (sum(counted), *images[0])
    dtype = np.result_type(*{node.dtype for node in nodes})
    if look:
        found["shape"] = [sum(counted) // many, *(images[0][::-1] if by_matlab(nodes[0]) else images[0])]
    else:
        out = file.memory.empty((sum(counted), *images[0]), dtype, "frames")
        at = 0
        for node, shape, count in zip(nodes, shapes, counted, strict=True):
            file.read(node, out[at : at + count].reshape(shape))
            at += count
        if by_matlab(nodes[0]):
            turned = out.reshape(len(out), *images[0][::-1])
            for k, image in enumerate(out):
                turned[k] = image.T.copy()
            out = turned
        found["frames"] = out.reshape(*shapes[0][:-2], *out.shape[-2:])[:, 0] if many > 1 else out
    return f"{nodes[0].name} {nodes[0].dtype} {whole}"
