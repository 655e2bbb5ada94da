"""Detector images that turn what a detector reads into photons: dark, flat field, gain and the beam stop's shadow.

All are (y, x) of the whole detector, before it is cut, binned and turned. Pixels that a detector flags stay flagged.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steering.files import Bounds, isolated_array
from steering.sources.flags import flagged, saturated, without_count

_FLAT = 0.5, 2.0
"""The median of a flat field's good pixels is within these."""
_PLACES = ("data", "entry/data/data", "entry_1/data_1/data")
_NAMES = {
    "dark": ("dark", "entry_1/instrument_1/detector_1/data_dark"),
    "flat": ("flat", "flatfield"),
    "beam stop": ("beam_stop", "mask"),
}
"""Of each image in a file that has several; none of them is taken for another one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Correction:
    """What is done to each frame: (reading - dark) / (flat * gain), rounded to whole photons."""

    dark: NDArray | None = None
    """(y, x) what a frame reads without light."""
    flat: NDArray | None = None
    """(y, x) response of each pixel, about 1 (their median 0.5 to 2): of another, as of a flat field in counts, few
    photons of a frame or far too many were left. A pixel of 0 or less, or that is not finite, is bad."""
    gain: float = 1.0
    """What the detector reads for one photon."""
    beam_stop: NDArray[np.bool_] | None = None
    """(y, x) True where a beam stop hides the detector."""

    def __post_init__(self) -> None:
        shapes = {image.shape for image in (self.dark, self.flat, self.beam_stop) if image is not None}
        if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"found detector images of shapes {sorted(shapes)}, expected one shape (y, x) for all")
        self._refuse_other_flat()
        if not 0 < self.gain < np.inf:
            raise ValueError(f"found gain={self.gain}, expected what the detector reads for one photon, above 0")

    def _refuse_other_flat(self) -> None:
        if self.flat is None:
            return
        good = self.flat[np.isfinite(self.flat) & (self.flat > 0)]
        if 2 * good.size < self.flat.size:
            raise ValueError(
                f"found a flat field with {self.flat.size - good.size} of {self.flat.size} pixels not above 0, which "
                "are bad, expected less than half of them: is it another image (--flat FILE:/path)?"
            )
        typical, (low, high) = float(np.median(good)) if good.size else np.nan, _FLAT
        if not low <= typical <= high:
            raise ValueError(
                f"found a flat field whose good pixels have a median of {typical:.4g}, expected about 1 ({low:g} to "
                f"{high:g}): divide it by that; how much the detector reads for one photon is the gain (--gain)"
            )

    def photons(self, frames: NDArray) -> NDArray:
        """(..., y, x) float32 of what a detector reads (..., y, x): NaN where it has no counts, inf where it flags a
        pixel as saturated. Raises ValueError for frames of another shape than the images."""
        for name, image in (("dark", self.dark), ("flat", self.flat), ("beam stop", self.beam_stop)):
            if image is not None and image.shape != frames.shape[-2:]:
                raise ValueError(f"found a {name} {image.shape} and frames {frames.shape[-2:]}, expected one shape")
        read = frames.astype(np.float32)
        if self.dark is not None:
            read -= self.dark
        with np.errstate(divide="ignore", invalid="ignore"):
            read /= self.gain if self.flat is None else self.gain * self.flat
        out = np.rint(np.maximum(read, 0), dtype=np.float32)
        bad = ~np.isfinite(read) if self.flat is None else ~(np.isfinite(read) & (self.flat > 0))
        if self.beam_stop is not None:
            bad = bad | self.beam_stop
        full = saturated(frames)
        out[full] = np.inf
        # Whole readings are as the detector sends them; floats may be less than a dark that was subtracted.
        bad = bad | ((flagged(frames) if frames.dtype.kind == "f" else without_count(frames)) & ~full)
        out[bad] = np.nan
        return out


def add_correction(parser: argparse._ActionsContainer) -> None:
    """Add --dark, --flat, --gain and --beam-stop to a workflow's arguments; `given_correction` takes what they say."""
    image = "of the detector (y, x), .npy, .npz, .mat or HDF5"
    dark = f"what a frame reads without light, {image}; of several the mean"
    parser.add_argument("--dark", type=Path, metavar="FILE", help=dark)
    parser.add_argument("--flat", type=Path, metavar="FILE", help=f"response of each pixel, {image}")
    parser.add_argument("--gain", type=float, default=1.0, help="what the detector reads for one photon (1)")
    parser.add_argument("--beam-stop", type=Path, metavar="FILE", help=f"not 0 where it hides the detector, {image}")


def given_correction(options: argparse.Namespace, bounds: Bounds | None = None) -> Correction | None:
    """What the arguments say; None where they say nothing. Raises OSError and ValueError for files that do not do."""
    dark, flat, stop = (
        None if path is None else _image(path, name, bounds)
        for path, name in ((options.dark, "dark"), (options.flat, "flat"), (options.beam_stop, "beam stop"))
    )
    if dark is None and flat is None and stop is None and options.gain == 1:
        return None
    if stop is not None and (2 * np.count_nonzero(stop) > stop.size or (stop != np.rint(stop)).any()):
        raise ValueError(
            f"{options.beam_stop}: found a beam stop that hides {np.count_nonzero(stop)} of {stop.size} pixels, "
            f"with values from {stop.min():.4g} to {stop.max():.4g}, expected whole numbers, 0 in most pixels: is it "
            "another image, a dark say (--beam-stop FILE:/path)?"
        )
    return Correction(dark=dark, flat=flat, gain=options.gain, beam_stop=None if stop is None else stop != 0)


def _image(path: Path, name: str, bounds: Bounds | None) -> NDArray[np.float32]:
    """The image of a name in a file, or the only one; of darks, one after the other, their mean."""
    found = isolated_array(path, (*_NAMES[name], *_PLACES), bounds)
    image = found[0] if found.ndim == 3 and len(found) == 1 else found
    if name == "dark" and found.ndim == 3 and len(found) > 1 and found.dtype.kind in "uif":
        image = found.mean(0, dtype=np.float64)
    if image.ndim != 2 or image.dtype.kind not in "uifb":
        raise ValueError(f"{path}: found {found.dtype} {found.shape}, expected an image of real numbers (y, x)")
    return image.astype(np.float32)
