"""Laws of the forward model, of the canvas, and of probes."""

import numpy as np
import pytest
import torch

from steering.ptychography import (
    Canvas,
    add_modes,
    aim_probe,
    backpropagate,
    diffract,
    rescale_probe,
    shift_probe,
    simulate,
    zone_plate,
)
from steering.records import Field

N = 32


def _random(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(shape) + 1j * rng.standard_normal(shape))


def test_backpropagate_is_the_adjoint_of_diffract():
    for probe in (_random(2, N, N, seed=1), _random(3, 2, N, N, seed=1)):
        patches, wave = _random(3, N, N), _random(3, 2, N, N, seed=2)
        there = torch.vdot(diffract(patches, probe).flatten(), wave.flatten())
        back = torch.vdot(patches.flatten(), backpropagate(wave, probe).flatten())
        torch.testing.assert_close(there, back)


def test_diffraction_keeps_the_energy():
    patches, probe = _random(3, N, N), _random(2, N, N, seed=1)
    exit_wave = patches[:, None] * probe
    energy = diffract(patches, probe).abs().square().sum((1, 2, 3))
    torch.testing.assert_close(energy, exit_wave.abs().square().sum((1, 2, 3)))


def test_zero_frequency_stands_at_the_centre():
    wave = diffract(torch.ones(1, N, N, dtype=torch.complex128), torch.ones(1, N, N, dtype=torch.complex128))
    assert int(wave.abs().argmax()) == (N // 2) * N + N // 2


def test_shift_probe_moves_by_whole_pixels_and_back_by_fractions():
    probe = torch.from_numpy(zone_plate(N, 40.0, aperture=0.4))
    whole = shift_probe(probe, torch.tensor([[2.0, -3.0]]))[0]
    torch.testing.assert_close(whole, probe.roll((2, -3), (1, 2)), atol=1e-3, rtol=0)
    there = shift_probe(probe, torch.tensor([[0.3, -0.45]]))[0]
    torch.testing.assert_close(shift_probe(there, torch.tensor([[-0.3, 0.45]]))[0], probe, atol=1e-2, rtol=0)


def test_a_position_and_a_moved_object_give_the_same_frame():
    """A sub-pixel step of the probe is the opposite step of the object, for a smooth object."""
    canvas = Canvas.around(Field(0, 0, 0, 0), N)
    y, x = (np.arange(n) + o for n, o in zip(canvas.shape, canvas.origin, strict=True))
    probe = zone_plate(N, 40.0, aperture=0.4)

    def smooth(dy, dx):
        return np.exp(1j * np.exp(-((y[:, None] - dy) ** 2 + (x - dx) ** 2) / 30)).astype(np.complex64)

    moved_probe = simulate(smooth(0, 0), probe, canvas, [[0.4, -0.3]])
    moved_object = simulate(smooth(-0.4, 0.3), probe, canvas, [[0.0, 0.0]])
    assert np.abs(moved_probe - moved_object).sum() < 2e-3 * moved_object.sum()


def test_a_transparent_object_gives_the_probes_counts():
    canvas = Canvas.around(Field(-9, 9, -9, 9), N)
    probe = add_modes(zone_plate(N, 40.0, aperture=0.4, counts=5e4), 2)
    counts = simulate(np.ones(canvas.shape, np.complex64), probe, canvas, [[0.0, 0.0], [-8.7, 3.2]])
    assert counts.dtype == np.float32
    np.testing.assert_allclose(counts.sum((1, 2)), 5e4, rtol=1e-4)


def test_corners_and_fractions_add_up_to_the_position():
    canvas = Canvas.around(Field(-20, 31.5, -7, 7), N)
    positions = np.random.default_rng(0).uniform((-20, -7), (31.5, 7), (50, 2))
    corner, fraction = canvas.corners(positions, N)
    assert corner.dtype == np.int64
    assert fraction.dtype == np.float32
    assert np.abs(fraction).max() <= 0.5
    np.testing.assert_allclose(corner + N // 2 + fraction + np.array(canvas.origin), positions, atol=1e-5)
    assert (corner >= 8).all()
    assert (corner + N + 8 <= np.array(canvas.shape)).all()


def test_a_position_outside_the_canvas_is_refused():
    canvas = Canvas.around(Field(-5, 5, -5, 5), N, margin=0)
    with pytest.raises(ValueError, match=r"position \(40\.0, 0\.0\).*leaves the canvas"):
        canvas.corners([[0.0, 0.0], [40.0, 0.0]], N)
    with pytest.raises(ValueError, match="expected finite"):
        canvas.corners([[np.nan, 0.0]], N)
    with pytest.raises(ValueError, match=r"expected \(n, 2\)"):
        canvas.corners([1.0, 2.0], N)


def test_rescaled_probe_has_the_power_of_the_frames_seen_past_the_mask():
    canvas = Canvas.around(Field(-9, 9, -9, 9), N)
    probe = zone_plate(N, 40.0, aperture=0.4, counts=3e4)
    counts = simulate(np.ones(canvas.shape, np.complex64), probe, canvas, np.zeros((4, 2)))
    mask = np.zeros((N, N), bool)
    mask[14:18] = True
    hidden = np.where(mask, np.float32(np.nan), counts)
    scaled = rescale_probe(probe * np.float32(1e-3), hidden, mask)
    np.testing.assert_allclose(scaled, probe, rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="expected both above 0"):
        rescale_probe(probe, counts * 0)


def test_an_aimed_probe_lights_the_detector_where_the_frames_are_bright():
    canvas = Canvas.around(Field(-9, 9, -9, 9), N)
    probe = zone_plate(N, 40.0, aperture=0.4, counts=3e4)
    counts = simulate(np.ones(canvas.shape, np.complex64), probe, canvas, np.zeros((4, 2)))
    tilt = np.exp(2j * np.pi * (2.3 * np.arange(N)[:, None] - 1.6 * np.arange(N)) / N)
    aimed = aim_probe((probe * tilt).astype(np.complex64), counts)
    agreement = np.abs(np.vdot(aimed, probe)) / np.vdot(probe, probe).real
    assert agreement > 0.999


def test_added_modes_are_orthogonal_and_keep_the_power():
    probe = zone_plate(N, 40.0, aperture=0.4, counts=1e4)
    modes = add_modes(probe, 4, share=0.1)
    gram = np.abs(modes.reshape(4, -1).conj() @ modes.reshape(4, -1).T)
    np.testing.assert_allclose(gram, np.diag([7e3, 1e3, 1e3, 1e3]), atol=5)


def test_zone_plate_states_its_counts_and_refuses_a_beam_wider_than_its_window():
    probe = zone_plate(64, 80.0, counts=2e5)
    assert probe.dtype == np.complex64
    assert probe.shape == (1, 64, 64)
    np.testing.assert_allclose((np.abs(probe) ** 2).sum(), 2e5, rtol=1e-4)
    metres = zone_plate(64, 80.0 * (2e-8) ** 2 / 1e-10, wavelength=1e-10, object_pixel=2e-8, counts=2e5)
    np.testing.assert_allclose(metres, probe, atol=1e-2)
    with pytest.raises(ValueError, match="lower the defocus"):
        zone_plate(64, 800.0)
