"""Laws of the window: counts are kept, the beam comes to the middle, and flags stay flags in any dtype."""

from __future__ import annotations

import numpy as np
import pytest

from steering.sources.orientation import ORIENTATIONS
from steering.sources.window import Window

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("binning", [1, 2, 3])
@pytest.mark.parametrize("shape", [(64, 64), (61, 75)])
def test_the_beam_comes_to_the_middle_pixel_and_counts_are_kept(binning, shape):
    frame = np.zeros(shape, np.uint16)
    y, x = 29, 37
    frame[y, x] = 1000
    window = Window(size=16, centre=(y, x), binning=binning)
    cut = window.cut(frame)
    assert cut[8, 8] == 1000
    full = RNG.poisson(5, shape).astype(np.uint16)
    cut = window.cut(full)
    low = window.corner(shape)
    inside = full[low[0] : low[0] + 16 * binning, low[1] : low[1] + 16 * binning]
    if inside.shape == (16 * binning, 16 * binning) and min(low) >= 0:
        assert cut.sum() == inside.sum()


def test_what_the_detector_does_not_have_is_masked():
    cut = Window(size=16, centre=(0, 10)).cut(np.ones((20, 20), np.uint16))
    assert (cut[:8] == 2**32 - 1).all()
    assert (cut[8:] == 1).all()
    roi = Window(size=16, centre=(10, 10), roi=(4, 20, 0, 20))
    assert roi.mask((20, 20)).sum() == 2 * 16


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.float32])
@pytest.mark.parametrize("out", ["uint16", "uint32"])
def test_flags_of_every_dtype_become_all_ones(dtype, out):
    frame = np.full((8, 8), 3, dtype)
    info = np.iinfo(dtype) if np.dtype(dtype).kind != "f" else None
    flags = {"u": lambda: (info.max, info.max - 1), "i": lambda: (-1, -2), "f": lambda: (np.nan, -1)}
    frame[0, 0], frame[1, 1] = flags[np.dtype(dtype).kind]()
    bad = np.zeros((8, 8), bool)
    bad[2, 2] = True
    cut = Window(size=8, dtype=out).cut(frame, bad)
    assert cut.dtype == out
    assert np.argwhere(cut == np.iinfo(out).max).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert (cut[cut != np.iinfo(out).max] == 3).all()


def test_counts_too_large_for_the_dtype_are_no_flags():
    frame = np.full((8, 8), 10**6, np.uint32)
    assert (Window(size=8, dtype="uint16").cut(frame) == 65534).all()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_orientation_turns_about_the_middle(orientation):
    frame = np.zeros((16, 16), np.uint16)
    frame[8, 8], frame[10, 9] = 5, 7
    cut = Window(size=16, orientation=orientation).cut(frame)
    assert cut[8, 8] == 5
    dy, dx = (int(v[0]) - 8 for v in np.nonzero(cut == 7))
    exchange, flip_y, flip_x = ORIENTATIONS[orientation]
    y, x = (1, 2) if exchange else (2, 1)
    assert (dy, dx) == (-y if flip_y else y, -x if flip_x else x)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"size": 15}, "even size"),
        ({"size": 16, "orientation": "up"}, "expected one of none"),
        ({"size": 16, "roi": (4, 4, 0, 9)}, "roi"),
    ],
)
def test_windows_that_make_no_sense_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Window(**wrong)


def test_frames_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected them to hold the region"):
        Window(size=16, roi=(0, 64, 0, 64)).cut(np.zeros((32, 32), np.uint16))
    with pytest.raises(ValueError, match="real counts"):
        Window(size=16).cut(np.zeros((3, 32, 32), np.uint16))
