"""Files that real users have: what each is read as, or the sentence that says what is wrong with it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest

from steering.cli import main
from steering.files import units
from steering.ptychography import zone_plate
from steering.records import Decision, chunk_geometry
from steering.runner.spool import spooled, write_spooled
from steering.sources import Replay
from steering.sources.correction import Correction
from steering.sources.recordings import ReadSettings
from steering.sources.window import Window
from tests.test_recordings import FRAMES, J_PER_EV, N, counts, read, translation, write_cxi, write_npz

T = "entry_1/sample_1/geometry_1/translation"
DATA = "entry_1/data_1/data"


def positions():
    where = translation()[:, [1, 0]]
    return where - where.mean(0)


SHAPES = {
    "(3, N)": translation().T,
    "(1, N, 3)": translation()[None],
    "(N, 3, 1)": translation()[:, :, None],
    "(2, N)": translation()[:, :2].T,
    "(rows, columns, 3)": translation().reshape(2, 3, 3),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_positions_of_any_shape(tmp_path, shape):
    taken = read(write_cxi(tmp_path / "a.cxi", translation=SHAPES[shape]))
    np.testing.assert_allclose(taken.positions, positions(), atol=1e-18)


def test_three_positions_of_three_coordinates_are_told_apart_by_the_frames(tmp_path):
    """Both axes are 3: rows are frames, as the format says."""
    taken = read(write_cxi(tmp_path / "a.cxi", data=counts()[:3], translation=translation()[:3]))
    np.testing.assert_allclose(taken.positions, (positions()[:3] - positions()[:3].mean(0)), atol=1e-18)
    two = read(write_cxi(tmp_path / "b.cxi", data=counts()[:2], translation=translation()[:2].T))
    np.testing.assert_allclose(two.positions, positions()[:2] - positions()[:2].mean(0), atol=1e-18)


def test_positions_as_two_arrays_and_as_the_axes_of_a_raster(tmp_path):
    for name, y, x in (("frames", translation()[:, 1], translation()[:, 0]), ("axes", np.arange(2.0), np.arange(3.0))):
        path = write_cxi(tmp_path / f"{name}.nxs", without=("data", "translation"))
        with h5py.File(path, "a") as file:
            file["entry_1/data/data"] = counts().reshape(2, 3, N, N) if name == "axes" else counts()
            for axis, values in (("y", y), ("x", x)):
                file[f"entry_1/data/{axis}"] = values.reshape(-1, 1, 1) if name == "frames" else values
                file[f"entry_1/data/{axis}"].attrs["units"] = "m" if name == "frames" else "um"
    taken = read(tmp_path / "frames.nxs", settings=ReadSettings(energy=8800))
    np.testing.assert_allclose(taken.positions, positions(), atol=1e-18)
    raster = read(tmp_path / "axes.nxs", settings=ReadSettings(energy=8800)).positions * 1e6
    np.testing.assert_allclose(raster[:, 0], [-0.5, -0.5, -0.5, 0.5, 0.5, 0.5], atol=1e-9)
    np.testing.assert_allclose(raster[:, 1], [-1, 0, 1, -1, 0, 1], atol=1e-9)


@pytest.mark.parametrize("bits", [0x1000, 0x2000, 0x0800, 0x0020])
def test_bits_of_a_mask_that_only_inform_are_good(tmp_path, bits):
    mask = np.where(counts().mean(0) > 20, bits, 0).astype(np.uint32)
    mask[3, 5] = bits | 0x0008
    taken = read(write_cxi(tmp_path / "a.cxi", mask=mask))
    assert np.argwhere(taken.geometry.mask).tolist() == [[3, 5]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint32, np.float32, bool])
def test_an_inverted_mask_is_asked_about_and_can_be_turned(tmp_path, dtype):
    good = np.ones((N, N), dtype)
    good[:, 7] = 0
    path = write_cxi(tmp_path / "a.cxi", mask=good)
    with pytest.raises(ValueError, match=r"hides 94 %.*inverted"):
        read(path)
    taken = read(path, settings=ReadSettings(mask="inverted"))
    np.testing.assert_array_equal(taken.geometry.mask, good == 0)
    assert any("6.25 % of the detector" in note for note in taken.notes)
    assert read(path, settings=ReadSettings(mask="none")).geometry.mask is None


@pytest.mark.parametrize("mode", ["inverted", "file"])
def test_a_mask_without_a_number_is_bad_either_way(tmp_path, mode):
    wanted = np.zeros((N, N), bool)
    wanted[:, 7], wanted[2, 3] = True, True
    good = np.where(wanted, np.nan, 1.0 if mode == "inverted" else 0.0)
    taken = read(write_cxi(tmp_path / "a.cxi", mask=good), settings=ReadSettings(mask=mode))
    np.testing.assert_array_equal(taken.geometry.mask, wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, ">u4", ">u2"])
def test_both_marks_of_unsigned_counters(tmp_path, dtype):
    most = np.iinfo(dtype).max
    data = counts().astype(dtype)
    data[:, 2] = most
    data[:, 9, 9] = most - 1
    data[4, 1, 1] = most - 1  # saturated in one frame
    taken = read(write_cxi(tmp_path / "a.cxi", data=data, mask=np.zeros((N, N), np.uint8)))
    expected = np.zeros((N, N), bool)
    expected[2], expected[9, 9] = True, True
    np.testing.assert_array_equal(taken.geometry.mask, expected)
    clean = ~expected
    assert taken.counts[4, 1, 1] == counts()[4, clean].max(), "at least what the frame's other pixels have"
    clean[1, 1] = False
    np.testing.assert_array_equal(taken.counts[:, clean], counts()[:, clean])
    assert any("1 values saturated in single frames" in note for note in taken.notes)


@pytest.mark.parametrize("gain", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_saturated_value_is_at_least_the_highest_that_its_pixel_has(tmp_path, dtype, gain):
    """A bright pixel has all ones where it is saturated; in one that counts little they mean that it was dead."""
    top = np.iinfo(dtype).max
    data = counts().astype(dtype)
    data[:, 8, 8], data[:, 8, 7] = [top - 10, top - 30, top, top - 50, top - 1, top - 20], top // 3
    data[2, 1, 1] = top
    path = write_cxi(tmp_path / "a.cxi", data=data, mask=np.zeros((N, N), np.uint8))
    taken = read(path, settings=ReadSettings(correction=None if gain == 1 else Correction(gain=gain)))
    assert taken.geometry.mask is None
    assert (taken.counts[[2, 4], 8, 8] == np.rint((top - 10) / gain)).all()
    others = np.rint(np.delete(data[:, 1, 1], 2) / gain)
    assert taken.counts[2, 1, 1] == np.rint(others.mean())
    assert "2 values saturated" in " ".join(taken.notes)


def test_a_mask_that_says_saturated_leaves_at_least_the_highest_count(tmp_path):
    data, bits = counts().astype(np.uint32), np.zeros((FRAMES, N, N), np.uint32)
    data[:, 8, 8] = [500, 400, 600, 600, 300, 200]
    bits[2:4, 8, 8] = 2
    taken = read(write_cxi(tmp_path / "a.cxi", data=data, mask=bits))
    assert taken.counts[:, 8, 8].tolist() == [500, 400, 500, 500, 300, 200]


@pytest.mark.parametrize("mark", [-1, -2, np.nan])
def test_marks_of_signed_and_float_frames(tmp_path, mark):
    data = counts().astype(np.float32 if not np.isfinite(mark) else np.int32)
    data[:, 2], data[4, 1, 1] = mark, mark
    taken = read(write_cxi(tmp_path / "a.cxi", data=data, mask=np.zeros((N, N), np.uint8)))
    assert taken.geometry.mask[2].all()
    assert taken.geometry.mask.sum() == N
    assert taken.counts.dtype == np.uint8
    assert taken.counts[4, 1, 1] == round(np.delete(counts()[:, 1, 1], 4).mean())


def test_a_frame_with_many_marks_is_set_aside(tmp_path):
    data = counts().astype(np.uint32)
    data[3, :9] = 2**32 - 1
    taken = read(write_cxi(tmp_path / "a.cxi", data=data))
    assert not taken.counts[3].any()
    assert taken.geometry.mask.sum() == 1
    assert any("1 frames with more than a tenth" in note for note in taken.notes)


def test_marks_of_a_detector_with_fewer_bits_and_hot_pixels(tmp_path):
    data = counts().astype(np.uint32)
    data[:, 5, 5] = 65535
    data[:, 7, 7] = 20000 + counts()[:, 7, 7]
    taken = read(write_cxi(tmp_path / "a.cxi", data=data, mask=np.zeros((N, N), np.uint8)))
    assert np.argwhere(taken.geometry.mask).tolist() == [[5, 5], [7, 7]]


@pytest.mark.parametrize("gain", [1.0, 2.0])
@pytest.mark.parametrize(("dtype", "mark"), [(np.uint32, 65535), (np.int64, 2**32 - 1), (np.float32, 2**32 - 1)])
def test_marks_of_fewer_bits_are_known_in_any_dtype_and_before_a_correction(tmp_path, dtype, mark, gain):
    """A float32 holds 2^32 - 1 as 2^32, and half of 65535 is no mark. The frame in the middle was never written. Of a
    gap no pixel is brighter than those beside it, which makes it hot."""
    data = (2 * counts()[[0, 1, 2, 3, 4, 5] * 2]).astype(dtype)
    gap = np.zeros((N, N), bool)
    gap[4:6] = True
    data[:, gap] = mark
    data[6] = 0
    path = write_cxi(tmp_path / "a.cxi", data=data, translation=WHERE, mask=np.zeros((N, N), np.uint8))
    taken = read(path, settings=ReadSettings(correction=None if gain == 1 else Correction(gain=gain)))
    np.testing.assert_array_equal(taken.geometry.mask, gap)
    np.testing.assert_array_equal(taken.counts[:, ~gap], (data / gain)[:, ~gap])


def test_readings_below_a_dark_that_was_subtracted_are_no_marks(tmp_path):
    data = (2 * counts()).astype(np.float32)
    data[:, :2] = -0.3
    taken = read(
        write_cxi(tmp_path / "a.cxi", data=data, mask=np.zeros((N, N), np.uint8)),
        settings=ReadSettings(correction=Correction(gain=2.0)),
    )
    assert taken.geometry.mask is None
    assert not taken.counts[:, :2].any()


def test_impossible_counts_are_refused(tmp_path):
    data = counts().astype(np.uint32)
    data[2, 7, 7] = 10**9
    with pytest.raises(ValueError, match=r"1e\+09 counts at pixel \(7, 7\) of frame 2"):
        read(write_cxi(tmp_path / "a.cxi", data=data))


@pytest.mark.parametrize("shape", [(18, 16), (17, 17), (16, 21)])
@pytest.mark.parametrize("zero_frequency", ["centre", "corner"])
def test_frames_of_any_size_are_cut_about_the_beam(tmp_path, shape, zero_frequency):
    big = np.zeros((FRAMES, *shape), np.uint16)
    low = [n // 2 - N // 2 for n in shape]
    big[:, low[0] : low[0] + N, low[1] : low[1] + N] = counts()
    if zero_frequency == "corner":
        big = np.fft.ifftshift(big, axes=(1, 2))
    taken = read(write_cxi(tmp_path / "a.cxi", data=big, without=("mask",)), zero_frequency=zero_frequency)
    np.testing.assert_array_equal(taken.counts, counts())
    assert any("are cut to 16 x 16" in note for note in taken.notes)


def test_a_large_detector_is_cut_around_its_beam_and_bins_keep_counts(tmp_path):
    beam = 40 * np.exp(-((np.indices((N, N)) - N // 2) ** 2).sum(0) / 8)
    spots = np.random.default_rng(0).poisson(beam, (FRAMES, N, N))
    big = np.zeros((FRAMES, 64, 80), np.uint16)
    big[:, 20:36, 44:60] = spots
    path = write_cxi(tmp_path / "a.cxi", data=big, without=("mask", "probe"))
    taken = read(path, settings=ReadSettings(window=N))
    np.testing.assert_array_equal(taken.counts, spots)
    halved = read(path, settings=ReadSettings(binning=2, window=8))
    assert halved.counts.sum() == spots.sum()
    assert halved.geometry.detector_pixel == 2 * taken.geometry.detector_pixel
    assert halved.geometry.object_pixel == pytest.approx(taken.geometry.object_pixel)
    with pytest.raises(ValueError, match="at most 56 pixels"):
        read(path, settings=ReadSettings(window=64))


def beam_at(path, y, x, *, side=256, corner=False):
    """A scan of a large detector with a beam of 16 pixels around a pixel, and its frames around that."""
    spots = np.random.default_rng(0).poisson(
        40 * np.exp(-((np.indices((N, N)) - N // 2) ** 2).sum(0) / 8), (FRAMES, N, N)
    )
    big = np.zeros((FRAMES, side, side), np.uint16)
    big[:, y - N // 2 : y + N // 2, x - N // 2 : x + N // 2] = spots
    big = np.fft.ifftshift(big, axes=(1, 2)) if corner else big
    return write_cxi(path, data=big, without=("mask", "probe")), spots


def test_a_window_that_is_small_beside_its_detector_holds_the_beam(tmp_path):
    """How far the beam may be off is measured by the window, not by the detector."""
    path, spots = beam_at(tmp_path / "a.cxi", 156, 128)  # 28 of 256 pixels
    taken = read(path, settings=ReadSettings(window=32))
    np.testing.assert_array_equal(taken.counts[:, 8:24, 8:24], spots)
    assert any("around pixel (156, 128) (y, x), which leaves out 0.0 % of the light" in note for note in taken.notes)
    small = read(path, settings=ReadSettings(window=8))
    left = 100 * (1 - spots[:, 4:12, 4:12].sum() / spots.sum())
    assert any(f"leaves out {left:.1f} % of the light" in note for note in small.notes)
    tilted = read(beam_at(tmp_path / "b.cxi", 131, 128)[0], settings=ReadSettings(window=32))
    np.testing.assert_array_equal(tilted.counts[:, 11:27, 8:24], spots)
    with pytest.raises(ValueError, match=r"no light within 16 x 16 pixels around pixel \(40, 40\)"):
        read(path, settings=ReadSettings(window=16, centre=(40, 40)))


@pytest.mark.parametrize("tilted", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        {"window": 32},
        {"window": 16, "binning": 2},
        {"window": 16, "centre": (40.0, 20.0)},
        {"window": 96, "centre": (42.0, 18.0)},
    ],
)
def test_the_probe_of_whole_frames_is_cut_where_their_light_is(tmp_path, tilted, given):
    """Beside the middle of 64 pixels the beam is at (42, 18). Some programs leave that tilt in the probe."""
    whole, steps = zone_plate(64, 30.0, aperture=0.25, counts=1e5), np.arange(64) - 32
    tilt = np.exp(2j * np.pi * (10 * steps[:, None] - 14 * steps) / 64)
    frames = np.random.default_rng(0).poisson(far_field(whole * tilt)[0], (FRAMES, 64, 64)).astype(np.uint32)
    probe = (whole * tilt if tilted else whole).astype(np.complex64)
    taken = read(
        write_cxi(tmp_path / "a.cxi", data=frames, probe=probe, without=("mask",)), settings=ReadSettings(**given)
    )
    kept = taken.counts.sum() / frames.sum()
    assert (kept < 0.95) == (given.get("centre") == (40.0, 20.0))
    assert (np.abs(taken.probe) ** 2).sum() == pytest.approx(kept * 1e5, rel=0.03)
    seen, light = taken.geometry.good(), taken.counts.mean(0)
    expected = np.where(seen, far_field(taken.fitted_probe())[0], 0)
    assert (expected * light).sum() ** 2 / ((expected**2).sum() * (light**2).sum()) > 0.985


def far_field(probe):
    return np.abs(np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(probe, axes=(1, 2)), norm="ortho"), axes=(1, 2))) ** 2


def test_binning_a_side_that_it_does_not_divide_keeps_positions_in_object_pixels(tmp_path):
    """A pixel of 16 x 16 binned ones, of 33 measured, is 33 / 32 of one of the whole frame."""
    spots = np.random.default_rng(0).poisson(20, (FRAMES, 33, 33)).astype(np.uint16)
    taken = read(write_npz(tmp_path / "a.npz", data=spots, probe=None), settings=ReadSettings(binning=2))
    where = translation()[:, :2] * 1e7
    np.testing.assert_allclose(taken.positions, (where - where.mean(0)) * 32 / 33, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("said", ["corner", "centre"])
def test_a_zero_frequency_that_the_light_contradicts_is_refused(tmp_path, said):
    path, spots = beam_at(tmp_path / "a.cxi", 34, 31, side=64, corner=said == "centre")
    other = "corner" if said == "centre" else "centre"
    with pytest.raises(ValueError, match=rf"% of the light .*zero_frequency='{said}'.*--zero-frequency {other}"):
        read(path, zero_frequency=said)
    assert read(path, zero_frequency=other).counts.sum() == spots.sum()


def test_a_beam_in_a_corner_of_the_detector_is_read_where_it_is_said_or_looked_for(tmp_path):
    path, spots = beam_at(tmp_path / "a.cxi", 12, 14, side=64)
    with pytest.raises(ValueError, match="--centre Y X"):
        read(path)
    for settings in (ReadSettings(window=16), ReadSettings(centre=(12, 14), window=16)):
        np.testing.assert_array_equal(read(path, settings=settings).counts, spots)


ROI, CENTRE = (10, 62, 20, 76), (30.0, 48.0)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A scan of a detector of 64 x 80 pixels with light everywhere, and its frames; one pixel counts nonsense."""
    big = np.random.default_rng(3).poisson(20, (FRAMES, 64, 80)).astype(np.uint32)
    big[2, 2, 2] = 10**8
    return write_cxi(tmp_path_factory.mktemp("detector") / "a.cxi", data=big, without=("mask", "probe")), big


@pytest.mark.parametrize("binning", [1, 2, 3])
@pytest.mark.parametrize("orientation", ["none", "flip_y", "rot90"])
def test_a_region_and_a_centre_leave_the_pixels_that_a_live_source_leaves(detector, binning, orientation):
    path, big = detector
    given, size = {"roi": ROI, "centre": CENTRE, "binning": binning}, 16 if binning < 3 else 10
    taken = read(path, orientation=orientation, settings=ReadSettings(window=size, **given))
    window = Window(size=size, orientation=orientation, **given)
    np.testing.assert_array_equal(taken.counts, [window.cut(frame) for frame in big])
    assert taken.geometry.mask is None
    if orientation == "none" and binning < 3:
        low = {1: (22, 40), 2: (14, 32)}[binning]
        part = big[:, low[0] : low[0] + 16 * binning, low[1] : low[1] + 16 * binning]
        np.testing.assert_array_equal(taken.counts, part.reshape(FRAMES, 16, binning, 16, binning).sum((2, 4)))
    assert taken.geometry.detector_pixel == pytest.approx(binning * 75e-6)


def test_what_is_outside_of_a_region_is_masked_and_never_judged(detector):
    path, big = detector
    with pytest.raises(ValueError, match=r"1e\+08 counts at pixel \(2, 2\) of frame 2"):
        read(path)
    given = {"roi": (24, 62, 20, 76), "centre": CENTRE}
    taken = read(path, settings=ReadSettings(window=32, **given))
    assert taken.geometry.mask.sum() == 10 * 32
    np.testing.assert_array_equal(taken.geometry.mask, Window(size=32, **given).mask((64, 80)))
    np.testing.assert_array_equal(taken.counts[:, 10:], big[:, 24:46, 32:64])
    assert not taken.counts[:, :10].any()
    whole = read(path, settings=ReadSettings(roi=(24, 44, 40, 60)))  # an even square: all of it
    np.testing.assert_array_equal(whole.counts, big[:, 24:44, 40:60])
    largest = read(path, settings=ReadSettings(roi=(24, 62, 20, 76), centre=CENTRE))
    np.testing.assert_array_equal(largest.counts, big[:, 24:36, 42:54])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"roi": (0, 65, 0, 80)}, r"frames of \(64, 80\), expected them to hold the region y 0..65"),
        ({"centre": (2.0, 40.0)}, r"the beam at \(2.0, 40.0\) .*window of 8 or more"),
        ({"centre": (90.0, 40.0), "window": 16}, "expected the beam's centre inside it"),
    ],
)
def test_regions_and_centres_that_leave_nothing_are_refused(detector, given, words):
    with pytest.raises(ValueError, match=words):
        read(detector[0], settings=ReadSettings(**{"roi": (10, 64, 0, 80), **given}))
    with pytest.raises(ValueError, match="expected 'centre'"):
        read(detector[0], zero_frequency="corner", settings=ReadSettings(**given))


UNITS = {b"\xb5m": 1e6, "meter": 1, "metres": 1, "micrometer": 1e6, "micron": 1e6, "microns": 1e6, "MM": 1e3,
         "\u03bcm": 1e6, "pm": 1e12, "\u00b5m": 1e6, "Angstrom": 1e10, "nanometers": 1e9, "\u212b": 1e10}  # fmt: skip


@pytest.mark.parametrize("unit", UNITS, ids=repr)
@pytest.mark.parametrize("kept", ["bytes", "text", "array"])
def test_units_as_people_spell_them(tmp_path, unit, kept):
    path = write_cxi(tmp_path / "a.cxi", translation=translation() * UNITS[unit])
    with h5py.File(path, "a") as file:
        text = unit.encode() if isinstance(unit, str) else unit
        values = {"bytes": np.bytes_(text), "array": np.array([text], "S20"), "text": unit}
        file[T].attrs["units"] = values[kept]
    np.testing.assert_allclose(read(path).positions, positions(), atol=1e-15)


def test_unknown_units_are_refused_with_the_list(tmp_path):
    path = write_cxi(tmp_path / "a.cxi")
    with h5py.File(path, "a") as file:
        file[T].attrs["units"] = "furlong"
    with pytest.raises(ValueError, match=r"'furlong', expected one of m, mm, um, nm, Angstrom, pm"):
        read(path)
    assert units.factor("keV", "energy", "x") == units.factor(np.bytes_(b"kev"), "energy", "x")


def test_a_wavelength_goes_before_an_energy_and_arrays_of_one_are_numbers(tmp_path):
    path = write_cxi(tmp_path / "a.cxi", energy=np.array([[3e9 * J_PER_EV]]), distance=np.array([-2.0]))
    with h5py.File(path, "a") as file:
        beam = file.create_group("entry_1/instrument_1/beam_1")
        beam["incident_wavelength"] = np.array([1.4089])
        beam["incident_wavelength"].attrs["units"] = "Angstrom"
    taken = read(path)
    assert taken.geometry.wavelength == pytest.approx(1.4089e-10)
    assert taken.geometry.distance == 2.0


WHERE = np.random.default_rng(1).uniform(-1e-6, 1e-6, (12, 3))


def long(path, where):
    return write_cxi(path, data=np.tile(counts(), (2, 1, 1)), translation=where)


@pytest.mark.parametrize("away", [2e-3, 1.0])
def test_a_glitch_of_an_encoder_is_named_and_can_be_left_out(tmp_path, away):
    bad = WHERE.copy()
    bad[7, :2] = away
    path = long(tmp_path / "a.cxi", bad)
    with pytest.raises(ValueError, match="far from all others at frames 7,"):
        read(path)
    taken = read(path, settings=ReadSettings(drop_outliers=True))
    assert len(taken.counts) == 11
    np.testing.assert_array_equal(taken.counts, np.delete(np.tile(counts(), (2, 1, 1)), 7, 0))


def test_frames_keep_their_numbers_and_positions_their_origin(tmp_path):
    """Of a scan whose stage stands somewhere, of which a dark frame and a glitch are left out."""
    frames, where = np.tile(counts(), (2, 1, 1)), WHERE + np.array([-5e-3, 3e-3, 0.0])
    frames[2], where[7, :2] = 0, 0.0
    path = write_cxi(tmp_path / "a.cxi", data=frames, translation=where)
    taken = read(path, settings=ReadSettings(drop_outliers=True, least_counts=10))
    kept = np.delete(np.arange(12), [2, 7])
    assert any(note.startswith("frames 7 are left out") for note in taken.notes)
    np.testing.assert_array_equal(taken.numbers, kept)
    np.testing.assert_allclose(taken.positions + taken.geometry.origin, where[kept, 1::-1], atol=1e-12)
    source = Replay(taken, tolerance=1.0)
    [chunk] = source.again([1, 2, 7, 11])
    assert chunk["frame"].values.tolist() == [1, 11]
    np.testing.assert_array_equal(chunk["counts"], frames[[1, 11]])
    write_spooled(tmp_path / "spool", chunk)
    for one in (chunk, *spooled(tmp_path / "spool")):
        assert chunk_geometry(one).origin == pytest.approx(where[kept].mean(0)[1::-1])
    source.resume({**source.position(), "given": []}, handed=[11])
    source.apply(Decision(positions=taken.positions[[-1, 0]], reasons=("test",) * 2, stop=True))
    [last] = source.chunks()
    assert last["frame"].values.tolist() == [0], "11 was handed out before"


def test_positions_that_are_not_finite_can_be_left_out(tmp_path):
    bad = WHERE.copy()
    bad[4, 1], bad[7, :2] = np.nan, 1.0
    path = long(tmp_path / "a.cxi", bad)
    with pytest.raises(ValueError, match=r"1 positions that are not finite.*--drop-outliers"):
        read(path)
    taken = read(path, settings=ReadSettings(drop_outliers=True))
    np.testing.assert_array_equal(taken.counts, np.delete(np.tile(counts(), (2, 1, 1)), [4, 7], 0))
    kept = np.delete(WHERE[:, [1, 0]], [4, 7], 0)
    np.testing.assert_allclose(taken.positions, kept - kept.mean(0), atol=1e-18)
    assert "frames 4 are left out: their positions are not finite" in taken.notes


@pytest.mark.parametrize(("factor", "unit"), [(1e6, "um"), (1e3, "mm")])
def test_positions_in_another_unit_than_said(tmp_path, factor, unit):
    with pytest.raises(ValueError, match=f"would overlap if they were in {unit}"):
        read(long(tmp_path / "a.cxi", WHERE * factor))
    given = ReadSettings(positions=f":/{T}[{unit}]")
    taken = read(tmp_path / "a.cxi", settings=given)
    np.testing.assert_allclose(taken.positions, WHERE[:, [1, 0]] - WHERE[:, [1, 0]].mean(0), atol=1e-15)


@pytest.mark.parametrize(("factor", "said", "unit"), [(1e6, "nm", "um"), (1e3, "um", "mm"), (1.0, "mm", "m")])
def test_positions_in_a_larger_unit_than_said(tmp_path, factor, said, unit):
    """All within one object pixel: no scan, whatever the file says."""
    path = long(tmp_path / "a.cxi", WHERE * factor)
    with h5py.File(path, "a") as file:
        file[T].attrs["units"] = said
    with pytest.raises(
        ValueError, match=rf"within .*less than one object pixel .*would overlap if they were in {unit}\."
    ):
        read(path)
    taken = read(path, settings=ReadSettings(positions=f":/{T}[{unit}]"))  # what is given goes before the file
    np.testing.assert_allclose(taken.positions, WHERE[:, [1, 0]] - WHERE[:, [1, 0]].mean(0), atol=1e-15)


def test_scans_of_one_axis_of_few_frames_and_of_few_places_are_scans(tmp_path):
    line = WHERE * [1, 0, 0]
    assert np.ptp(read(long(tmp_path / "a.cxi", line)).positions[:, 0]) == 0
    two = read(write_cxi(tmp_path / "b.cxi", data=counts()[:2], translation=translation()[:2]))
    assert len(two.counts) == 2
    places = np.repeat(WHERE[:2], 6, axis=0)
    assert not any("for each pixel" in note for note in read(long(tmp_path / "c.cxi", places)).notes)
    close = read(long(tmp_path / "d.cxi", WHERE * [0.15, 0.15, 0]))
    assert any("more than one for each pixel" in note for note in close.notes)
    jitter = WHERE * 1e-3
    with pytest.raises(ValueError, match=r"expected a scan\. Say their unit"):
        read(long(tmp_path / "e.cxi", jitter), settings=ReadSettings(positions=f":/{T}[pm]"))


OFF = {
    "energy": [(8.8, "J", "keV"), (8800, "keV", "eV"), (15, "eV", "keV")],
    "distance": [(2000.0, "m", "mm"), (2.0, "mm", "m"), (0.0, "m", None)],
    "x_pixel_size": [(75.0, "m", "um"), (0.075, "m", "mm"), (75e-6, "mm", "m"), (75e-6, "um", "m")],
}


@pytest.mark.parametrize(("name", "value", "said", "unit"), [(name, *one) for name in OFF for one in OFF[name]])
def test_optics_in_another_unit_than_said(tmp_path, capsys, name, value, said, unit):
    path = write_cxi(tmp_path / "a.cxi", **{name: value}, without=("y_pixel_size",))
    place = "source_1/energy" if name == "energy" else f"detector_1/{name}"
    with h5py.File(path, "a") as file:
        file[f"entry_1/instrument_1/{place}"].attrs["units"] = said
    likely = rf"; it would be in {unit}: give" if unit else r"\d m: give"
    with pytest.raises(ValueError, match=rf"of {value:g} {said} \(entry_1/instrument_1/{place}\), expected .*{likely}"):
        read(path)
    assert main(["inspect", str(path)]) == 0
    assert f"doubtful: found a {'photon energy' if name == 'energy' else ''}" in capsys.readouterr().out
    given = {"energy": 8800.0, "distance": 2.0, "x_pixel_size": 75e-6}[name]
    taken = read(path, settings=ReadSettings(**{"detector_pixel" if name == "x_pixel_size" else name: given}))
    assert taken.geometry.object_pixel == pytest.approx(read(write_cxi(tmp_path / "b.cxi")).geometry.object_pixel)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"energy": 8.8}, "photon energy of 8.8 eV, expected .* in keV"),
        ({"energy": 0.0}, "photon energy of 0 eV"),
        ({"distance": 2000.0}, "distance of 2000 m, expected .* in mm"),
        ({"detector_pixel": 75.0}, "detector pixel of 75 m, expected .* in um"),
        ({"distance": 0.006, "detector_pixel": 9e-3}, "object pixel of .* half a wavelength"),
    ],
)
def test_optics_that_are_given_in_another_unit(tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        read(write_cxi(tmp_path / "a.cxi"), settings=ReadSettings(**given))


def test_light_of_13_5_nm_is_x_rays(tmp_path):
    taken = read(write_cxi(tmp_path / "a.cxi", energy=91.84 * J_PER_EV, distance=0.05, translation=translation() * 2))
    assert taken.geometry.wavelength == pytest.approx(13.5e-9, rel=1e-4)


def test_positions_in_object_pixels_are_metres_where_the_optics_are_given(tmp_path):
    optics = ReadSettings(energy=8800.0, distance=2.0, detector_pixel=75e-6)
    path = write_npz(tmp_path / "a.npz")
    in_pixels, in_metres = read(path), read(path, settings=optics)
    assert (in_pixels.geometry.length_unit, in_metres.geometry.length_unit) == ("object pixel", "m")
    np.testing.assert_allclose(in_metres.positions, in_pixels.positions * in_metres.geometry.object_pixel)
    binned = read(path, settings=replace(optics, binning=2))
    np.testing.assert_allclose(binned.positions, in_metres.positions)
    with pytest.raises(ValueError, match=r"within .* object pixel of each other.*convert them"):
        read(write_npz(tmp_path / "b.npz", scan=translation()[:, :2]))
    with pytest.raises(ValueError, match=r"found positions given for a \.npz"):
        read(path, settings=ReadSettings(positions=":/scan[um]"))


def test_positions_that_never_move_and_a_common_offset(tmp_path):
    with pytest.raises(ValueError, match="all 12 positions equal"):
        read(long(tmp_path / "a.cxi", WHERE * 0))
    far = read(long(tmp_path / "b.cxi", WHERE + 0.02))
    np.testing.assert_allclose(far.positions, WHERE[:, [1, 0]] - WHERE[:, [1, 0]].mean(0), atol=1e-15)


def virtual(path, sources):
    layout = h5py.VirtualLayout((FRAMES, N, N), np.uint16)
    for k, (file, name) in enumerate(sources):
        layout[3 * k : 3 * k + 3] = h5py.VirtualSource(file, name, (3, N, N))
    write_cxi(path, without=("data",))
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset(DATA, layout)
    return path


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for k in range(2):
        with h5py.File(folder / f"raw_{k}.h5", "w") as file:
            file["data"] = counts()[3 * k : 3 * k + 3]
    with h5py.File(folder / "other.h5", "w") as file:
        file["entry/data"] = counts()[3:]
    with h5py.File(folder / "short.h5", "w") as file:
        file["data"] = counts()[:2]
    (folder / "cut.h5").write_bytes((folder / "raw_1.h5").read_bytes()[:3000])
    (folder / "empty.h5").touch()
    return folder


@pytest.mark.parametrize(("name", "words"), [("other", "has none"), ("cut", "damaged"), ("empty", "damaged"),
                                             ("short", "only"), ("gone", "not there")])  # fmt: skip
def test_every_virtual_source_is_opened_and_named(raw, name, words):
    path = virtual(raw / "a.cxi", [("raw_0.h5", "data"), (f"{name}.h5", "data")])
    with pytest.raises(ValueError, match=rf"{name}\.h5.*{words}"):
        read(path)


def test_virtual_sources_are_found_as_hdf5_finds_them(raw, tmp_path):
    good = virtual(raw / "a.cxi", [("raw_0.h5", "data"), ("./raw_1.h5", "data")])
    (tmp_path / "link.cxi").symlink_to(good)
    for path in (good, tmp_path / "link.cxi"):
        np.testing.assert_array_equal(read(path).counts, counts())


def test_printf_names_of_virtual_sources(raw):
    path = write_cxi(raw / "a.cxi", without=("data",))
    with h5py.File(path, "a") as file:
        space = h5py.h5s.create_simple((FRAMES, N, N), (h5py.h5s.UNLIMITED, N, N))
        space.select_hyperslab((0, 0, 0), (h5py.h5s.UNLIMITED, 1, 1), stride=(3, 1, 1), block=(3, N, N))
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_virtual(space, b"raw_%b.h5", b"data", h5py.h5s.create_simple((3, N, N)))
        group = file.require_group("entry_1/data_1")
        h5py.h5d.create(group.id, b"data", h5py.h5t.NATIVE_UINT16, space, made)
    np.testing.assert_array_equal(read(path).counts, counts())


def test_a_filter_that_is_not_installed_is_named(tmp_path):
    path = write_cxi(tmp_path / "a.cxi", without=("data",))
    with h5py.File(path, "a") as file:
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk((1, N, N))
        made.set_filter(32666, h5py.h5z.FLAG_OPTIONAL, ())
        group = file.require_group("entry_1/data_1")
        frames = h5py.h5d.create(
            group.id, b"data", h5py.h5t.NATIVE_UINT16, h5py.h5s.create_simple(counts().shape), made
        )
        for k in range(FRAMES):
            frames.write_direct_chunk((k, 0, 0), counts()[k].tobytes(), 0)
    with pytest.raises(ValueError, match=r"HDF5 filter 32666.*not installed"):
        read(path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "swmr", "killed"])
def test_a_file_that_is_being_written_is_said_to_be(tmp_path, mode):
    program = """
import h5py, os, sys
file = h5py.File(sys.argv[1], "r+" if sys.argv[2] == "plain" else "a", libver="latest")
if sys.argv[2] != "plain":
    file.swmr_mode = True
print("held", flush=True)
if sys.argv[2] == "killed":
    file.flush()
    os.kill(os.getpid(), 9)
sys.stdin.read()
"""
    path = tmp_path / "a.cxi"
    with h5py.File(write_cxi(tmp_path / "b.cxi")) as old, h5py.File(path, "w", libver="latest") as new:
        old.copy("entry_1", new)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {k: v for k, v in os.environ.items()}}
    with subprocess.Popen([sys.executable, "-c", program, str(path), mode], **pipes) as writer:
        assert writer.stdout.readline().strip() == b"held"
        if mode == "killed":
            writer.wait()
        with pytest.raises(ValueError, match=r"being written.*swmr:FILE"):
            read(path)
        writer.communicate(b"")


def test_empty_frames_and_no_light_at_all(tmp_path):
    data = counts()
    data[2] = 0
    taken = read(write_cxi(tmp_path / "a.cxi", data=data))
    assert not taken.counts[2].any()
    assert np.isfinite(taken.fitted_probe()).all()
    with pytest.raises(ValueError, match="no counts in any of the 6 frames"):
        read(write_cxi(tmp_path / "b.cxi", data=data * 0))


def test_a_reference_is_an_array_and_is_judged_before_the_scan_is_read(tmp_path):
    from workflows import live_scan, replay_scan

    thing = np.exp(1j * np.arange(160 * 150).reshape(160, 150))
    np.save(tmp_path / "a.npy", thing)
    np.savez(tmp_path / "a.npz", object=thing, other=np.zeros(3))
    for name in ("a.npy", "a.npz"):
        interior, canvas = replay_scan.read_reference(str(tmp_path / name))
        np.testing.assert_allclose(interior, thing[70:-70, 70:-70], rtol=1e-6)
        assert (canvas.shape, canvas.origin) == ((20, 10), (-10, -5))
    np.save(tmp_path / "small.npy", thing[:140])
    with pytest.raises(ValueError, match=r"small\.npy: found complex128 \(140, 150\), expected a reconstructed object"):
        replay_scan.main(None, [str(tmp_path / "no scan.cxi"), "--reference", str(tmp_path / "small.npy")])
    with pytest.raises(ValueError, match=r"a\.npy: found no npz file \(one array without a name"):
        live_scan.known_objects(tmp_path / "a.npy")


def test_a_scan_of_one_frame(tmp_path):
    assert read(write_cxi(tmp_path / "a.cxi", data=counts()[:1], translation=translation()[:1])).counts.shape == (
        1,
        N,
        N,
    )


@pytest.mark.parametrize(("side", "enough"), [(1, False), (3, False), (6, True)])
def test_a_tiny_scan_is_refused_before_it_begins_or_keeps_enough_to_learn_from(side, enough):
    """With the defaults, which scale with the scan: none of them ends as `finished` with nothing learnt."""
    from workflows.replay_scan import LEAST_FRAMES, held_out

    where = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2) * 20.0
    if enough:
        region, margin = held_out(where, None)
        assert (~region.contains(where, margin)).sum() >= LEAST_FRAMES
    else:
        with pytest.raises(
            ValueError, match=f"found {side**2} frames, .* expected {LEAST_FRAMES} or more to learn from"
        ):
            held_out(where, None)
