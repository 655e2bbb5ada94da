"""Frames as detectors write them, made fit for a scan: marks and masks, amplitudes, crops and bins.

Whatever is changed is said in a note, in words for whoever reads the scan.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from steering.sources.flags import flagged, flags_of_fewer_bits, saturated, without_count
from steering.sources.window import Window, placed

NEARLY_EVERY = 0.9
"""A pixel that is marked in so many of the frames is bad for the scan; in fewer, in these frames."""
_BROKEN = 0.1
"""A frame with a larger share of marked pixels is not used."""
_HOT = 20.0
"""A pixel is hot whose mean is so many times that of its brightest neighbour, and so in nearly every frame."""
_IMPOSSIBLE = 10.0
"""A count above so many times what a whole bright frame holds is no count."""
_LOOKED_AT = 5
"""Frames, evenly spaced, in one of which a flag of fewer bits must stand to be looked for in all."""
_AT_ONCE = 2**22


def clean(frames: NDArray, mask: NDArray[np.bool_] | None) -> tuple[NDArray, NDArray[np.bool_], list[str]]:
    """Frames with marks taken out, the mask (y, x) of bad pixels, and notes.

    frames: (n, y, x), changed in place. mask: (y, x), True = bad. What a mark is: see `steering.sources.flags`. A pixel
    marked in nearly every frame is masked for the scan; elsewhere the value becomes that pixel's mean over the other
    frames or, where the mark says saturated, the highest count that the pixel or the frame has besides. A frame with
    more than a tenth of its pixels marked becomes empty. Whole numbers get the smallest unsigned dtype. Raises
    ValueError for shapes that do not fit, a mask of more than half of the detector, impossible counts and frames
    without light.
    """
    if frames.ndim != 3:
        raise ValueError(f"found frames of shape {frames.shape}, expected (frame, y, x)")
    bad = _given_mask(mask, frames.shape[1:])
    if not len(frames) or not frames[0].size or frames.dtype.kind not in "uif":
        return frames, bad, []
    notes = []
    if bad.any():
        notes.append(f"the file's mask hides {100 * bad.mean():.3g} % of the detector")
    marked, total, highest = _marked(frames)
    new = ((marked >= NEARLY_EVERY * len(frames)) | _of_fewer_bits(frames)) & ~bad
    if new.any():
        notes.append(f"{int(new.sum())} more pixels are marked in nearly every frame and masked")
    bad |= new
    if bad.all():
        raise ValueError(
            "found no pixel that counts: every one is masked or marked as bad, expected frames with counts"
        )
    mean = total / np.maximum(len(frames) - marked, 1)
    hot = _hot(frames, mean, bad)
    if hot.any():
        notes.append(
            f"{int(hot.sum())} hot pixels are masked, the first at {tuple(np.argwhere(hot)[0].tolist())} (y, x)"
        )
    bad |= hot
    if marked.any():
        notes += _without_marks(frames, bad, mean, highest)
    _refuse_impossible(frames, bad)
    return _smallest(frames, bad), bad, notes


def never_counting(frames: NDArray) -> NDArray[np.bool_]:
    """Pixels (y, x) that have a mark in nearly every one of the frames (n, y, x), one or more. Readings below 0 are no
    marks: a dark that is subtracted leaves such."""
    times: NDArray[np.int64] = np.zeros(frames.shape[1:], np.int64)
    for some in _blocks(frames):
        times += flagged(frames[some]).sum(0)
    return np.asarray(times >= NEARLY_EVERY * len(frames)) | _of_fewer_bits(frames)


def say_saturated(frames: NDArray) -> None:
    """Give the flag of saturation, in place, to all ones in unsigned frames (n, y, x) where they are no dead pixel: in
    one that counts, in another frame, more than half of what the dtype holds. Many detectors have but one flag."""
    if frames.dtype.kind != "u" or not frames.size:
        return
    top, highest = np.iinfo(frames.dtype).max, np.zeros(frames.shape[1:], frames.dtype)
    for some in _blocks(frames):
        np.maximum(highest, np.where(flagged(frames[some]), 0, frames[some]).max(0), out=highest)
    bright = highest > top // 2
    if bright.any():
        for some in _blocks(frames):
            np.copyto(frames[some], top - 1, where=(frames[some] == top) & bright)


def squared(amplitudes: NDArray) -> NDArray:
    """Counts of frames that were stored as amplitudes: whole where they are to a thousandth, NaN where those are flags
    or below 0, which is no mark any more once it is squared, and infinite where they are saturated."""
    marked = without_count(amplitudes)
    counts = np.square(amplitudes, dtype=np.float32)
    counts[marked] = np.where(saturated(amplitudes[marked]), np.inf, np.nan)
    good = np.where(marked, 0, counts)
    whole = np.abs(good - np.rint(good)).max(initial=0) < 1e-3 * max(1.0, float(good.max(initial=0)) ** 0.5)
    return np.rint(counts) if whole else counts


def brightest(frames: NDArray, mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Pixel (y, x) of the beam's centre."""
    y, x = centre_of_light(frames, mask).round().astype(int).tolist()
    return y, x


def centre_of_light(frames: NDArray, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(y, x) of the squared mean of frames (n, y, x), which leaves the faint background out; the middle without light.
    mask: (y, x), True = do not use."""
    weight = np.where(mask, 0, frames.mean(0, dtype=np.float64)) ** 2
    if not weight.any():
        return np.array(frames.shape[1:]) // 2 * 1.0
    return np.asarray((np.indices(weight.shape) * weight).sum((1, 2)) / weight.sum())


def light(frames: NDArray, mask: NDArray[np.bool_]) -> float:
    """All that frames (n, y, x) have counted outside of their mask (y, x)."""
    return float(frames.sum(where=~mask, dtype=np.float64))


def light_in_corners(frames: NDArray, mask: NDArray[np.bool_]) -> float:
    """Share of the squared mean of frames (n, y, x) that is in their corners, which are a quarter of them: what is at
    least a quarter of a side from the middle both in y and in x. 0 without light."""
    mean = np.where(mask, 0, frames.mean(0, dtype=np.float64)) if len(frames) else np.zeros(mask.shape)
    most = float(np.abs(mean).max(initial=0))
    if not 0 < most < np.inf:
        return 0.0
    weight = (mean / most) ** 2
    y, x = (np.abs(np.arange(n) - n // 2) >= n / 4 for n in weight.shape)
    return float(weight[np.ix_(y, x)].sum() / weight.sum())


def cut(frames: NDArray, mask: NDArray[np.bool_], window: Window) -> tuple[NDArray, NDArray[np.bool_]]:
    """Frames (n, y, x) and their mask as a window's square, binned; what is outside of its region is bad.

    They are not turned, and keep their kind of dtype. Raises ValueError as `Window.parts`.
    """
    inside, place = window.parts(frames.shape[1:])
    square, bad = placed(frames[:, *inside], mask[inside], place, window.size * window.binning)
    return binned(square, bad, window.binning) if window.binning > 1 else (square, bad)


def binned(frames: NDArray, mask: NDArray[np.bool_], factor: int) -> tuple[NDArray, NDArray[np.bool_]]:
    """Frames whose pixels are sums of factor x factor, and the mask: bad where one of them is. Counts are kept."""
    n, y, x = frames.shape
    shape = (y // factor, factor, x // factor, factor)
    dtype = frames.dtype if frames.dtype.kind == "f" else np.dtype(np.uint64)
    sums = frames.reshape(n, *shape).sum((2, 4), dtype=dtype)
    joined: NDArray[np.bool_] = np.logical_or.reduce(mask.reshape(shape), axis=(1, 3))
    return _smallest(sums, joined), joined


def _blocks(frames: NDArray) -> Iterator[slice]:
    step = max(1, _AT_ONCE // frames[0].size)
    for start in range(0, len(frames), step):
        yield slice(start, start + step)


def _given_mask(mask: NDArray[np.bool_] | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if mask is None:
        return np.zeros(shape, bool)
    if mask.shape != shape:
        raise ValueError(f"found a mask of {mask.shape}, expected the frames' {shape}")
    bad = mask.copy()
    if bad.mean() > 0.5:
        raise ValueError(
            f"found a mask that hides {100 * bad.mean():.0f} % of the detector, expected less than half. Is it "
            "inverted, with 1 for good? Then say so (mask='inverted', --mask inverted); or leave it out (mask='none')"
        )
    return bad


def _marked(frames: NDArray) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray]:
    """In how many frames a pixel is marked, and the sum and the highest of its values in the others."""
    marked, total = np.zeros(frames.shape[1:], np.int64), np.zeros(frames.shape[1:])
    highest = np.zeros(frames.shape[1:], frames.dtype)
    negative = np.zeros(frames.shape[1:], np.int64)
    for some in _blocks(frames):
        flags, values = flagged(frames[some]), frames[some]
        if flags.any():
            marked += flags.sum(0)
            values = np.where(flags, 0, values)
        total += values.sum(0, dtype=np.float64)
        np.maximum(highest, values.max(0), out=highest)
        if frames.dtype.kind != "u":
            negative += (frames[some] < 0).sum(0)
    stuck = negative >= NEARLY_EVERY * len(frames)
    return np.where(stuck, len(frames), marked), np.where(stuck, 0, total), highest


def _of_fewer_bits(frames: NDArray) -> NDArray[np.bool_]:
    """Pixels that have a mark of a detector with fewer bits in nearly every frame."""
    marks = flags_of_fewer_bits(frames.dtype)
    some = frames[np.linspace(0, len(frames) - 1, min(_LOOKED_AT, len(frames))).astype(int)]
    found: NDArray[np.bool_] = np.logical_or.reduce(np.isin(some, marks), axis=0)
    if found.any():
        times = sum(np.isin(frames[block][:, found], marks).sum(0) for block in _blocks(frames))
        found[found] = times >= NEARLY_EVERY * len(frames)
    return found


def _without_marks(frames: NDArray, bad: NDArray[np.bool_], mean: NDArray[np.float64], highest: NDArray) -> list[str]:
    """Fill marked values in place, and say how. mean, highest: (y, x) of each pixel's values without a mark."""
    first = frames[:1][~flagged(frames[:1])]
    whole = frames.dtype.kind != "f" or bool((first == np.floor(first)).all())
    mean = np.where(bad, 0, np.rint(mean) if whole else mean).astype(frames.dtype)
    filled = full = broken = 0
    for some in _blocks(frames):
        block = frames[some]
        flags, over = flagged(block), saturated(block)
        if frames.dtype.kind != "u":
            flags |= (block < 0) & bad
        here = flags & ~bad
        lost = here.mean((1, 2)) > _BROKEN * (~bad).mean()
        over &= ~bad & ~lost[:, None, None]
        full += int(over.sum())
        filled += int(here[~lost].sum() - over.sum())
        broken += int(lost.sum())
        np.copyto(block, mean, where=flags)
        if over.any():
            frame, y, x = np.nonzero(over)
            besides = np.where(flags, 0, block).max((1, 2), where=~bad, initial=0)
            block[frame, y, x] = np.maximum(highest[y, x], besides[frame])
        block[lost] = 0
    said = {
        f"{filled} values marked in single frames became the mean of that pixel": filled,
        f"{full} values saturated in single frames became the highest count that pixel or frame has besides": full,
        f"{broken} frames with more than a tenth of their pixels marked are set aside": broken,
    }
    return [note for note, many in said.items() if many]


def _hot(frames: NDArray, mean: NDArray[np.float64], bad: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(np.where(bad, 0, mean), 1)
    y, x = mean.shape
    around = [padded[i : i + y, j : j + x] for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    brightest_beside = np.max(around, axis=0)
    usual = _HOT * np.maximum(brightest_beside, np.median(mean[~bad]))
    found = ~bad & (mean > usual) & (mean > _HOT)
    for y, x in np.argwhere(found):
        found[y, x] = (frames[:, y, x] > usual[y, x]).mean() >= NEARLY_EVERY
    return found


def _refuse_impossible(frames: NDArray, bad: NDArray[np.bool_]) -> None:
    good = ~bad
    totals, highest = np.empty(len(frames)), np.empty(len(frames))
    for some in _blocks(frames):
        totals[some] = frames[some].sum((1, 2), dtype=np.float64, where=good)
        highest[some] = frames[some].max((1, 2), where=good, initial=0)
    if not (totals != 0).any():
        raise ValueError(f"found no counts in any of the {len(frames)} frames, expected light: was the shutter closed?")
    most = _IMPOSSIBLE * np.median(totals[totals > 0]) if (totals > 0).any() else np.inf
    if highest.max() > most:
        frame = int(highest.argmax())
        y, x = np.unravel_index(int(np.where(good, frames[frame], 0).argmax()), good.shape)
        raise ValueError(
            f"found {highest[frame]:.4g} counts at pixel ({y}, {x}) of frame {frame}, more than "
            f"{_IMPOSSIBLE:.0f} times what a whole frame has, expected counts: mask such pixels or repair the file"
        )


def _smallest(frames: NDArray, bad: NDArray[np.bool_]) -> NDArray:
    """Whole numbers in the smallest unsigned dtype that holds them without its marks; anything else as it is."""
    if frames.dtype.kind == "u" and frames.dtype.itemsize <= 4:
        return frames
    for some in _blocks(frames):
        block = frames[some]
        if frames.dtype.kind != "u" and ((block < 0) & ~bad).any():
            return frames
        if frames.dtype.kind == "f" and not (
            np.isfinite(block[:, ~bad]).all() and (block == np.floor(block))[:, ~bad].all()
        ):
            return frames
    largest = max(float(frames[some].max(where=~bad, initial=0)) for some in _blocks(frames))
    fits = next((t for t in (np.uint8, np.uint16, np.uint32) if largest < np.iinfo(t).max - 1), np.uint64)
    out = np.empty(frames.shape, fits)
    for some in _blocks(frames):
        out[some] = np.where(bad, 0, frames[some])
    return out
