"""Laws of bad pixels: what is flagged in nearly every frame is masked, what one frame flags is not."""

from __future__ import annotations

import numpy as np
import pytest

from steering.sources.bad_pixels import FEW_FRAMES, FIRST_FRAMES, SLOW_S, BadPixels
from steering.sources.correction import Correction
from steering.sources.orientation import ORIENTATIONS
from steering.sources.streams import Frame, Packed
from steering.sources.window import Window

RNG = np.random.default_rng(0)
TOP = 65535


def frames(n, *, dtype=np.uint16, flagged=()):
    """Frames with a dead row 3, and (frame, y, x, value) beside."""
    found = RNG.poisson(5, (n, 16, 16)).astype(dtype)
    found[:, 3] = np.iinfo(dtype).max
    for k, y, x, value in flagged:
        found[k, y, x] = value
    return [Frame(k, counts, 0.0) for k, counts in enumerate(found)]


def through(given, window=None, bad=None):
    pixels = BadPixels(window or Window(size=16, dtype="uint16"))
    out = [pair for frame in given for pair in pixels.take(frame, bad, 0.0)]
    out += pixels.ready(0.0, all_there=True)
    assert [frame.number for frame, _ in out] == list(range(len(given)))
    return np.stack([cut for _, cut in out]), pixels.known


@pytest.mark.parametrize("when", [2, 15])
def test_what_one_frame_flags_is_dealt_with_in_that_frame(when):
    flagged = [(when, 8, 8, 65534), (when, 9, 9, 65535)]
    given = frames(20, flagged=flagged)
    out, known = through(given)
    assert (out[:, 3] == TOP).all()
    assert (out == TOP).sum() == 20 * 16
    assert known.sum() == 16
    others = np.arange(20) != when
    brightest = np.delete(given[when].counts, 3, axis=0)
    assert out[when, 8, 8] == brightest[brightest < TOP - 1].max()  # saturated: as many as the brightest at least
    assert out[when, 9, 9] == 0
    np.testing.assert_array_equal(out[others, 8, 8], np.stack([f.counts for f in given])[others, 8, 8])


def test_a_difference_of_thresholds_masks_nothing_but_the_dead():
    given = frames(30)
    for frame in given:
        frame.counts[RNG.random((16, 16)) < 0.45] = 65535
        frame.counts[3] = 65535
    out, known = through(given)
    assert known[3].all()
    assert (out == TOP).all(0).sum() == known.sum() <= 20


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_detectors_own_mask_holds_in_every_orientation(orientation):
    bad = np.zeros((16, 16), bool)
    bad[10, 12] = True
    window = Window(size=16, dtype="uint16", orientation=orientation)
    out, known = through(frames(10, flagged=[(4, 8, 9, 65534)]), window, bad)
    assert known.sum() == 17
    assert ((out == TOP) == known).all()


def test_a_later_frame_is_not_decompressed_before_it_is_looked_at():
    pixels, made = BadPixels(Window(size=16, dtype="uint16")), []

    def packed(frame):
        def make():
            made.append(frame.number)
            return frame.counts

        return Frame(frame.number, Packed(frame.counts.shape, frame.counts.dtype, make), frame.time)

    given = frames(FIRST_FRAMES + 4, flagged=[(FIRST_FRAMES + 1, 8, 8, 65534)])
    out = [pair for frame in given for pair in pixels.take(packed(frame), None, 0.0)]
    assert made == list(range(FIRST_FRAMES))
    first, second = np.asarray(out[-3][1]), np.asarray(out[-3][1])
    assert made == [*range(FIRST_FRAMES), FIRST_FRAMES + 1]
    assert first is second
    assert 0 < first[8, 8] < 50
    smaller = Frame(99, np.zeros((12, 16), np.uint16), 0.0)
    pixels = BadPixels(Window(size=16, roi=(0, 16, 0, 16)))
    for frame in given:
        pixels.take(frame, None, 0.0)
    with pytest.raises(ValueError, match="expected them to hold the region"):
        pixels.take(smaller, None, 0.0)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("binning", [1, 2])
@pytest.mark.parametrize("saturation", [None, 21517.0])
def test_what_is_saturated_has_what_it_can_be_told_to_have(dtype, binning, saturation):
    """Not a count near the highest of the dtype, which would outshine the scan; not none where bins hold several."""
    given = frames(20, flagged=[(4, y, x, 65534) for y, x in ((8, 8), (8, 9), (9, 8), (12, 12))])
    given[4].counts[0, 0] = 700
    given[5].counts[6, 6] = 30000  # above what the detector vouches for
    pixels = BadPixels(Window(size=16 // binning, binning=binning, dtype=dtype))
    out = [pair for frame in given for pair in pixels.take(frame, None, 0.0, saturation=saturation)]
    cut = np.stack([np.asarray(counts) for _, counts in out]).astype(np.int64)
    value = 700 if saturation is None else 21517
    wanted = given[4].counts.astype(np.int64)
    wanted[wanted == TOP - 1] = value
    wanted[3] = 0
    good = ~pixels.known
    binned = wanted.reshape(16 // binning, binning, 16 // binning, binning).sum((1, 3))
    np.testing.assert_array_equal(cut[4][good], binned[good])
    place = 6 // binning
    assert cut[5, place, place] - (30000 if saturation is None else 21517) in range(60)


def test_photons_of_what_is_saturated_follow_from_what_the_others_read():
    """Gain and dark count for it as for the others."""
    given = frames(20, flagged=[(4, 8, 8, 65534), (4, 9, 9, 800)])
    correction = Correction(gain=2.0, dark=np.full((16, 16), 100.0, np.float32))
    out, _ = through(given, Window(size=16, correction=correction))
    assert out[4, 8, 8] == out[4, 9, 9] == 350


def test_a_slow_scan_is_not_judged_by_its_first_frame():
    pixels = BadPixels(Window(size=16, dtype="uint16"))
    given = frames(6, flagged=[(0, 8, 8, 65534), (0, 9, 9, 65535)])
    out = [pair for k, frame in enumerate(given) for pair in pixels.take(frame, None, 2.0 * k)]
    assert [frame.number for frame, _ in out] == [0, 1, 2, 3, 4, 5]
    assert pixels.known.sum() == 16
    pixels.begin()  # slower still: after a time those that are there must do
    assert pixels.take(given[0], None, 100.0) == pixels.ready(100.0 + 0.9 * SLOW_S) == []
    assert len(pixels.ready(100.0 + SLOW_S)) == 1


def test_few_frames_are_not_held_back_for_long():
    pixels = BadPixels(Window(size=16))
    first, second, *_ = frames(3)
    for k in range(FEW_FRAMES):
        assert pixels.take(Frame(k, first.counts, 0.0), None, 10.0 + 0.01 * k) == []
    assert pixels.ready(10.2) == []
    assert [frame.number for frame, _ in pixels.ready(10.4)] == [*range(FEW_FRAMES)]
    assert len(pixels.take(second, None, 10.5)) == 1
    pixels.begin()
    assert pixels.take(first, None, 11.0) == []
    assert [frame.number for frame, _ in pixels.ready(11.0, all_there=True)] == [0]
