"""Laws of reconstruction: a known object comes back; the real Siemens scan does."""

import bz2
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from skimage.transform import resize

from steering.ptychography import (
    Canvas,
    RefineSettings,
    add_modes,
    phase_correlation,
    phase_error,
    refine,
    rescale_probe,
    simulate,
    zone_plate,
)
from steering.ptychography.windows import DeviceWindows, HostWindows
from steering.records import Field

N, SPAN = 64, 26
INNER = (slice(36, -36), slice(36, -36))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scene():
    """A picture as a phase object, a zone-plate probe, 70 sub-pixel positions, Poisson frames."""
    canvas = Canvas.around(Field(-SPAN, SPAN, -SPAN, SPAN), N)
    grey = resize(skimage.data.camera().astype(float), canvas.shape, anti_aliasing=True)
    truth = ((1 - 0.2 * grey / grey.max()) * np.exp(1j * grey / grey.max())).astype(np.complex64)
    probe = zone_plate(N, 88.0, counts=2e5)
    positions = np.random.default_rng(1).uniform(-SPAN, SPAN, (70, 2))
    return canvas, truth, probe, positions


def _frames(scene, probe=None, seed=0):
    canvas, truth, given, positions = scene
    expected = simulate(truth, given if probe is None else probe, canvas, positions)
    return np.random.default_rng(seed).poisson(expected).astype(np.uint16)


def _error(refined, truth, **gauge):
    return phase_error(refined.object[INNER], truth[INNER], weight=refined.covered[INNER], **gauge)


def test_positions_are_corrected_on_request(scene):
    """Positions that are wrong by a pixel or so come back, up to a shift of all of them, and the object with them."""
    canvas, truth, probe, positions = scene
    frames = _frames(scene)
    wrong = positions + np.random.default_rng(5).normal(0, 1.0, positions.shape)
    start = RefineSettings(passes=25, batch=16)
    as_given = refine(frames, wrong, probe, canvas, settings=start)
    found = refine(frames, wrong, probe, canvas, settings=replace(start, positions_from_pass=5))
    assert not as_given.moved.any()
    off, left = wrong - positions, wrong + found.moved - positions
    spread = [np.std(each - np.median(each, 0), axis=0).mean() for each in (off, left)]
    assert spread[1] < 0.35 * spread[0]
    assert _error(found, truth) < 0.7 * _error(as_given, truth)
    assert np.median(found.residual) < 0.9 * np.median(as_given.residual)
    exact = refine(frames, positions, probe, canvas, settings=replace(start, positions_from_pass=5))
    assert np.abs(exact.moved - np.median(exact.moved, 0)).mean() < 0.1
    with pytest.raises(ValueError, match="expected 'rpie', which corrects them"):
        RefineSettings(engine="ptychi", positions_from_pass=0)


def test_a_part_of_the_canvas_gives_what_the_whole_one_gives(scene):
    """Only the pixels under the windows of the frames count, and a result of a part takes its place in the whole. Where
    the probe is improved, the middle of the canvas sets the phase."""
    canvas, _, probe, positions = scene
    frames, settings = _frames(scene), RefineSettings(passes=2)
    mine = (positions < -4).all(1)
    smaller = canvas.around_windows(positions[mine], N)
    part = canvas.part(smaller)
    assert np.prod(smaller.shape) < 0.7 * np.prod(canvas.shape)
    before = refine(frames, positions, probe, canvas, settings=settings)
    whole, small = (
        refine(frames[mine], positions[mine], probe, each, start=start, settings=settings)
        for each, start in ((canvas, before.object), (smaller, before.of_part(part).object))
    )
    np.testing.assert_array_equal(small.object, whole.object[part])
    np.testing.assert_array_equal(small.covered, whole.covered[part])
    np.testing.assert_array_equal(small.probe, whole.probe)
    kept = small.put_into(before, canvas.shape, part)
    np.testing.assert_array_equal(kept.object, whole.object)
    fresh = small.put_into(None, canvas.shape, part)
    assert fresh.covered.sum() == small.covered.sum()
    assert canvas.around_windows(np.zeros((0, 2)), N) == canvas
    with pytest.raises(ValueError, match="expected a part of"):
        smaller.part(canvas)


def test_a_known_object_comes_back_where_it_was(scene):
    canvas, truth, probe, positions = scene
    counts = _frames(scene)
    refined = refine(counts, positions, probe, canvas, settings=RefineSettings(passes=30))
    flat = phase_error(np.ones_like(truth)[INNER], truth[INNER])
    assert _error(refined, truth) < 0.35 * flat
    assert _error(refined, truth, max_shift=0) < 0.35 * flat  # no alignment by a shift is needed: positions are exact
    assert abs(np.abs(refined.object[INNER]).mean() - np.abs(truth[INNER]).mean()) < 0.02
    assert refined.object.dtype == np.complex64
    assert refined.object.shape == refined.covered.shape == canvas.shape
    assert refined.residual.shape == (len(counts),)
    assert refined.residual.max() < 0.02
    np.testing.assert_array_equal(refined.probe, probe)


def test_sub_pixel_positions_matter(scene):
    canvas, truth, probe, positions = scene
    counts = simulate(truth, probe, canvas, positions)
    settings = RefineSettings(passes=30)
    exact = refine(counts, positions, probe, canvas, settings=settings)
    rounded = refine(counts, np.round(positions), probe, canvas, settings=settings)
    assert exact.residual.mean() < 0.5 * rounded.residual.mean()
    assert _error(exact, truth) < 0.7 * _error(rounded, truth)


def test_masked_pixels_are_never_read(scene):
    canvas, truth, probe, positions = scene
    mask = np.zeros((N, N), bool)
    mask[27:29] = True
    mask[:, 40] = True
    counts = _frames(scene)
    settings = RefineSettings(passes=30)
    one = refine(np.where(mask, 65535, counts), positions, probe, canvas, mask=mask, settings=settings)
    other = refine(np.where(mask, np.nan, counts), positions, probe, canvas, mask=mask, settings=settings)
    np.testing.assert_array_equal(one.object, other.object)
    assert _error(one, truth) < 0.4 * phase_error(np.ones_like(truth)[INNER], truth[INNER])


def test_two_modes_explain_what_one_cannot(scene):
    canvas, truth, probe, positions = scene
    two = add_modes(probe, 2, share=0.2)
    counts = _frames(scene, two)
    settings = RefineSettings(passes=15)
    good = refine(counts, positions, two, canvas, settings=settings)
    poor = refine(counts, positions, probe, canvas, settings=settings)
    assert good.residual.mean() < 0.5 * poor.residual.mean()
    assert _error(good, truth) < _error(poor, truth)


def test_a_wrong_probe_is_improved_and_the_origin_held(scene):
    canvas, truth, probe, positions = scene
    counts = simulate(truth, probe, canvas, positions)
    guess = zone_plate(N, 70.0, counts=2e5)
    fixed = refine(counts, positions, guess, canvas, settings=RefineSettings(passes=30))
    free = refine(counts, positions, guess, canvas, settings=RefineSettings(passes=30, probe_from_pass=0))
    assert free.residual.mean() < 0.5 * fixed.residual.mean()
    assert _error(free, truth) < 0.7 * _error(fixed, truth)
    assert _error(free, truth, max_shift=0) < 1.2 * _error(free, truth)  # nothing has moved
    np.testing.assert_allclose((np.abs(free.probe) ** 2).sum(), 2e5, rtol=1e-3)


@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_a_batch_of_frames_that_all_overlap_does_not_overshoot(scene, alpha):
    canvas, truth, probe, positions = scene
    close = positions / 6
    counts = simulate(truth, probe, canvas, close)
    few, many = (
        refine(counts, close, probe, canvas, settings=RefineSettings(passes=n, batch=70, alpha=alpha)) for n in (5, 20)
    )
    assert many.residual.mean() < few.residual.mean() < 0.02


def test_probe_update_holds_centre_tilt_power_and_phase_of_two_modes(scene):
    canvas, _, _, positions = scene
    guess = add_modes(zone_plate(N, 80.0, counts=2e5), 2)
    refined = refine(_frames(scene), positions, guess, canvas, settings=RefineSettings(passes=8, probe_from_pass=0))

    def centre(waves):
        light = (np.abs(waves) ** 2).sum(0) ** 2
        return [(light.sum(axis) * np.arange(N)).sum() / light.sum() for axis in (1, 0)]

    def far(waves):
        return np.fft.fftshift(np.fft.fft2(waves), axes=(-2, -1))

    np.testing.assert_allclose(centre(refined.probe), centre(guess), atol=0.05)
    np.testing.assert_allclose(centre(far(refined.probe)), centre(far(guess)), atol=0.05)
    assert abs(np.angle(np.vdot(refined.probe[0], guess[0]))) < 1e-3
    np.testing.assert_allclose((np.abs(refined.probe) ** 2).sum(), (np.abs(guess) ** 2).sum(), rtol=1e-3)
    first, second = refined.probe.reshape(2, -1)
    assert abs(np.vdot(first, second)) < 1e-3 * np.vdot(first, first).real


def test_a_warm_start_needs_fewer_passes(scene):
    canvas, truth, probe, positions = scene
    counts = _frames(scene)
    phase = np.angle(truth)
    near = np.exp(1j * (phase + np.roll(phase, 3, 0) + np.roll(phase, 3, 1)) / 3).astype(np.complex64)
    warm = refine(counts, positions, probe, canvas, start=near, settings=RefineSettings(passes=3))
    cold = refine(counts, positions, probe, canvas, settings=RefineSettings(passes=12))
    assert _error(warm, truth) < _error(cold, truth)
    assert _error(warm, truth) < phase_error(near[INNER], truth[INNER])


def test_what_no_frame_covers_keeps_the_start(scene):
    canvas, _, probe, positions = scene
    start = np.full(canvas.shape, 0.5j, np.complex64)
    few = positions[:6]
    counts = simulate(scene[1], probe, canvas, few)
    for settings in (RefineSettings(passes=4), RefineSettings(passes=4, probe_from_pass=0)):
        refined = refine(counts, few, probe, canvas, start=start, settings=settings)
        assert 0.05 < refined.covered.mean() < 0.7
        np.testing.assert_array_equal(refined.object[~refined.covered], np.complex64(0.5j))
        assert np.abs(refined.object).max() < 3


def test_same_seed_same_result_and_any_dtype_of_counts(scene):
    canvas, _, probe, positions = scene
    counts = _frames(scene)
    settings = RefineSettings(passes=2, seed=5)
    one = refine(counts, positions, probe, canvas, settings=settings)
    two = refine(counts.astype(np.float64), positions, probe, canvas, settings=settings)
    np.testing.assert_array_equal(one.object, two.object)


def test_stop_ends_at_once_with_what_there_is(scene):
    canvas, _, probe, positions = scene
    asked = iter(range(100))
    refined = refine(_frames(scene), positions, probe, canvas, stop=lambda: next(asked) >= 1)
    assert next(asked) == 2
    assert (refined.residual == 1).sum() == 70 - 32
    assert np.ptp(np.angle(refined.object)) > 0


def test_no_pass_only_looks(scene):
    canvas, truth, probe, positions = scene
    refined = refine(_frames(scene), positions, probe, canvas, start=truth, settings=RefineSettings(passes=0))
    np.testing.assert_array_equal(refined.object, truth)
    assert 0 < refined.residual.max() < 0.02


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_numbers_stay_finite_with_a_probe_of_the_wrong_power_and_dark_frames(scene, scale):
    canvas, _, probe, positions = scene
    counts = _frames(scene)
    counts[:5] = 0
    settings = RefineSettings(passes=4, probe_from_pass=1)
    refined = refine(counts, positions, probe * np.float32(scale), canvas, settings=settings)
    assert np.isfinite(refined.object).all()
    assert np.isfinite(refined.probe).all()
    assert np.isfinite(refined.residual).all()
    np.testing.assert_array_equal(refined.residual[:5], 1)


def test_bad_input_is_refused(scene):
    canvas, truth, probe, positions = scene
    counts = _frames(scene)
    with pytest.raises(ValueError, match="leaves the canvas"):
        refine(counts, positions + 100, probe, canvas)
    with pytest.raises(ValueError, match="expected one for each"):
        refine(counts, positions[1:], probe, canvas)
    with pytest.raises(ValueError, match="negative or not finite"):
        refine(np.where(counts > 3, np.nan, 1.0), positions, probe, canvas)
    with pytest.raises(ValueError, match="negative or not finite"):
        refine(counts - 1.0, positions, probe, canvas)
    with pytest.raises(ValueError, match="expected finite values on the canvas"):
        refine(counts, positions, probe, canvas, start=truth[1:])
    with pytest.raises(ValueError, match="has no light"):
        refine(counts, positions, probe * 0, canvas)
    with pytest.raises(ValueError, match=r"expected bool \(64, 64\)"):
        refine(counts, positions, probe, canvas, mask=np.zeros((N, N)))
    with pytest.raises(ValueError, match="expected 'rpie' or 'ptychi'"):
        RefineSettings(engine="magic")


@pytest.mark.skipif(importlib.util.find_spec("ptychi") is not None, reason="Pty-Chi is installed")
def test_a_missing_engine_says_what_to_install(scene):
    canvas, _, probe, positions = scene
    with pytest.raises(ImportError, match="install ptychi"):
        refine(_frames(scene), positions, probe, canvas, settings=RefineSettings(engine="ptychi"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ptychi") is None, reason="Pty-Chi is not installed")
@pytest.mark.filterwarnings("ignore")
def test_pty_chi_recovers_the_same_object_at_the_same_place(scene):
    canvas, truth, probe, positions = scene
    settings = RefineSettings(passes=20, engine="ptychi")
    refined = refine(_frames(scene), positions, probe, canvas, settings=settings)
    assert _error(refined, truth, max_shift=0) < 0.4 * phase_error(np.ones_like(truth)[INNER], truth[INNER])
    assert abs(np.abs(refined.object[INNER]).mean() - np.abs(truth[INNER]).mean()) < 0.02


@pytest.fixture(scope="module")
def siemens():
    if "STEERING_DATA" not in os.environ:
        pytest.skip("STEERING_DATA is not set: no recorded data to read")
    folder = Path(os.environ["STEERING_DATA"]) / "ptycho-aps-velociprobe-siemens"
    with bz2.open(folder / "siemens-star-small.npz.bz2") as file:
        scan = np.load(file)
        counts = np.fft.fftshift(scan["data"][0], axes=(-2, -1))
        probe = rescale_probe(scan["probe"].reshape(1, 128, 128), counts)
        positions = scan["scan"][0].astype(np.float64)
    trusted = np.load(folder / "recon_ptychi_lsqml_2modes_20+25ep.npz")["object"]
    return counts, positions - positions.mean(0), probe, trusted


@pytest.mark.slow
@pytest.mark.parametrize(("modes", "passes"), [(1, 12), (2, 8)])
def test_the_siemens_star_comes_back_from_a_flat_object(siemens, modes, passes):
    counts, positions, probe, trusted = siemens
    canvas = Canvas(trusted.shape, (-255.0, -253.5))
    settings = RefineSettings(passes=passes, probe_from_pass=1)
    refined = refine(counts, positions, add_modes(probe, modes), canvas, settings=settings)
    inner = (slice(70, -70), slice(70, -70))
    assert phase_correlation(refined.object[inner], trusted[inner]) >= 0.97


def test_an_object_in_the_memory_of_a_device_is_the_one_in_that_of_the_host():
    rng = np.random.default_rng(0)
    thing = (rng.normal(size=(40, 50)) + 1j * rng.normal(size=(40, 50))).astype(np.complex64)
    host, device = HostWindows(thing.copy()), DeviceWindows(thing, torch.device("cpu"))
    for _ in range(3):
        corner = np.stack([rng.integers(0, 33, 20), rng.integers(0, 43, 20)], 1)
        tile = torch.from_numpy(rng.uniform(0, 1, (8, 8)).astype(np.float32))
        part = torch.from_numpy((rng.normal(size=(20, 8, 8)) + 1j).astype(np.complex64))
        for windows in (host, device):
            windows.begin()
            windows.add(corner, part, tile)
            windows.apply(0.3, tile.max())
        assert torch.equal(
            host.take(corner, 8),
            torch.from_numpy(
                host.object()[corner[:, 0, None, None] + np.arange(8)[:, None], corner[:, 1, None, None] + np.arange(8)]
            ),
        )
        np.testing.assert_allclose(device.take(corner, 8), host.take(corner, 8), atol=1e-5)
        np.testing.assert_allclose(device.object(), host.object(), atol=1e-5)
