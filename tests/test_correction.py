"""Dark, flat, gain and a beam stop turn what a detector reads back into photons, live and recorded."""

from __future__ import annotations

import argparse

import h5py
import numpy as np
import pytest

from steering.sources import ReadSettings, Window, read_recording
from steering.sources.bad_pixels import BadPixels
from steering.sources.correction import Correction, add_correction, given_correction
from steering.sources.streams import Frame

RNG = np.random.default_rng(0)
SHAPE = (16, 16)
PHOTONS = RNG.poisson(40, (20, *SHAPE))
DARK, FLAT, GAIN = RNG.uniform(90, 110, SHAPE), RNG.uniform(0.8, 1.2, SHAPE), 13.0
STOP = np.zeros(SHAPE, bool)
STOP[6:9, 7:9] = True
READ = np.rint(PHOTONS * FLAT * GAIN + DARK).astype(np.uint16)
CORRECTION = Correction(dark=DARK, flat=FLAT, gain=GAIN, beam_stop=STOP)


def test_photons_come_back_and_flags_stay():
    read = READ.copy()
    read[0, 0, 0], read[0, 0, 1] = 65535, 65534
    found = CORRECTION.photons(read)
    good = ~STOP & (read < 65534)
    np.testing.assert_array_equal(found[good], PHOTONS[good])
    assert np.isnan(found[:, STOP]).all()
    assert np.isnan(found[0, 0, 0])
    assert np.isposinf(found[0, 0, 1])
    for dtype in (np.int32, np.float32):
        marks = Correction(dark=np.zeros((1, 3))).photons(np.array([[-1, -2, 3]], dtype))
        np.testing.assert_array_equal(np.isnan(marks), [[True, True, False]])
    dead = Correction(flat=np.array([[0.0, 1.0]]))
    np.testing.assert_array_equal(np.isnan(dead.photons(np.array([[5.0, 5.0]]))), [[True, False]])


def test_live_frames_are_corrected_before_they_are_cut():
    window = Window(size=12, centre=(8, 8), dtype="uint16", correction=CORRECTION)
    read = READ.copy()
    read[3, 4, 4] = 65534  # saturated in one frame
    pixels, out = BadPixels(window), []
    for number, one in enumerate(read):
        out += [counts for _, counts in pixels.take(Frame(number, one, 0.0), None, 0.0)]
    inner, stop = np.s_[2:14, 2:14], STOP[2:14, 2:14]
    out = np.array(out)
    wanted = np.where(stop, 65535, PHOTONS[:, *inner])
    brightest = np.delete(read[3].ravel(), 4 * 16 + 4).max()  # what is saturated reads as much at the least
    wanted[3, 2, 2] = np.rint((brightest - DARK[4, 4]) / (FLAT[4, 4] * GAIN))
    np.testing.assert_array_equal(out, wanted)


def test_a_recorded_scan_is_read_in_photons(tmp_path):
    files = {}
    for name, image in (("dark", DARK), ("flat", FLAT), ("beam_stop", STOP)):
        np.save(tmp_path / f"{name}.npy", image)
        files[name] = str(tmp_path / f"{name}.npy")
    parser = argparse.ArgumentParser()
    add_correction(parser)
    words = ["--dark", files["dark"], "--flat", files["flat"], "--beam-stop", files["beam_stop"], "--gain", str(GAIN)]
    correction = given_correction(parser.parse_args(words))
    where = RNG.uniform(0, 20, (len(READ), 2))
    np.savez(tmp_path / "scan.npz", data=READ, probe=np.ones((1, *SHAPE), np.complex64), scan=where)
    found = read_recording(tmp_path / "scan.npz", zero_frequency="centre", settings=ReadSettings(correction=correction))
    np.testing.assert_array_equal(found.geometry.mask, STOP)
    np.testing.assert_array_equal(found.counts[:, ~STOP], PHOTONS[:, ~STOP])
    counts = PHOTONS[:, ~STOP].sum(1)
    settings = ReadSettings(correction=correction, least_counts=float(np.median(counts)))
    lit = read_recording(tmp_path / "scan.npz", zero_frequency="centre", settings=settings)
    np.testing.assert_array_equal(lit.counts[:, ~STOP], PHOTONS[counts >= np.median(counts)][:, ~STOP])
    assert "10 frames with less than" in " ".join(lit.notes)
    assert given_correction(parser.parse_args([])) is None


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_one_file_of_several_images_gives_each_option_its_own(tmp_path, suffix):
    """Each had taken the dark, which hid every pixel as a beam stop."""
    path, images = tmp_path / f"calib{suffix}", {"dark": np.stack([DARK - 1, DARK + 1]), "flat": FLAT, "mask": STOP}
    if suffix == ".npz":
        np.savez(path, **images)
    else:
        with h5py.File(path, "w") as file:
            file.update(images)
    found = given("--dark", path, "--flat", path, "--beam-stop", path)
    np.testing.assert_allclose(found.dark, DARK, rtol=1e-6)
    np.testing.assert_allclose(found.flat, FLAT, rtol=1e-6)
    np.testing.assert_array_equal(found.beam_stop, STOP)


@pytest.mark.parametrize("image", [DARK, np.rint(DARK), STOP * 0.5])
def test_another_image_given_as_a_beam_stop_or_a_flat_hides_nothing_silently(tmp_path, image):
    np.save(tmp_path / "a.npy", image)
    with pytest.raises(ValueError, match=r"a beam stop that hides \d+ of 256 pixels"):
        given("--beam-stop", tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", STOP)
    with pytest.raises(ValueError, match="a flat field with 250 of 256 pixels not above 0"):
        given("--flat", tmp_path / "a.npy")
    np.savez(tmp_path / "two.npz", dark=DARK, flat=FLAT)
    with pytest.raises(ValueError, match=r"found arrays \['dark', 'flat'\], expected one of beam_stop, mask"):
        given("--beam-stop", tmp_path / "two.npz")


def given(*words):
    parser = argparse.ArgumentParser()
    add_correction(parser)
    return given_correction(parser.parse_args([str(word) for word in words]))


def test_images_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found a dark \(16, 16\) and frames \(8, 8\)"):
        CORRECTION.photons(np.zeros((3, 8, 8), np.uint16))
    with pytest.raises(ValueError, match="expected one shape"):
        Correction(dark=np.zeros((3, 3)), flat=np.ones((4, 4)))
    with pytest.raises(ValueError, match="gain=0"):
        Correction(gain=0)


@pytest.mark.parametrize("scale", [1000.0, 0.01])
def test_a_flat_field_that_is_not_about_1_is_refused(tmp_path, scale):
    """Photons are whole: divided by 1000, the weak part of every frame would be gone."""
    flat = scale * FLAT
    flat[3, 4], flat[5, 6] = 0, np.nan  # these are bad in any flat field
    np.save(tmp_path / "flat.npy", flat)
    parser = argparse.ArgumentParser()
    add_correction(parser)
    with pytest.raises(ValueError, match=r"a median of \S+, expected about 1 .*divide it by that"):
        given_correction(parser.parse_args(["--flat", str(tmp_path / "flat.npy")]))
    with pytest.raises(ValueError, match="16 of 16 pixels not above 0"):
        Correction(flat=np.zeros((4, 4)))
