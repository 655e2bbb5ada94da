"""Laws of stitching and of trust."""

import numpy as np
import pytest

from steering.ptychography import (
    Canvas,
    Stitcher,
    extract_patches,
    far_field_residual,
    neighbour_offset,
    patch_weight,
    simulate,
    zone_plate,
)
from steering.ptychography.stitch import spread
from steering.records import Field

N, PATCH = 64, 40


def _object(shape, seed=0):
    rng = np.random.default_rng(seed)
    y, x = (np.linspace(0, 1, n) for n in shape)
    phase = sum(np.sin(rng.uniform(8, 30) * y[:, None] + rng.uniform(8, 30) * x + rng.uniform(0, 6)) for _ in range(6))
    return ((1 - 0.1 * np.cos(20 * x)) * np.exp(0.3j * phase)).astype(np.complex64)


@pytest.fixture(scope="module")
def scene():
    canvas = Canvas.around(Field(-20, 20, -20, 20), N)
    probe = zone_plate(N, 88.0, counts=1e5)
    positions = np.random.default_rng(0).uniform(-20, 20, (60, 2))
    return canvas, _object(canvas.shape), probe, positions


def test_spread_is_the_adjoint_of_extract(scene):
    canvas, _, _, positions = scene
    rng = np.random.default_rng(1)
    image = rng.standard_normal(canvas.shape) + 1j * rng.standard_normal(canvas.shape)
    values = rng.standard_normal((len(positions), PATCH, PATCH)) + 1j
    there = np.vdot(extract_patches(image, canvas, positions, PATCH), values)
    corner, fraction = canvas.cells(positions, PATCH)
    back = np.zeros(canvas.shape, complex)
    for (y, x), cell in zip(corner, spread(values, fraction), strict=True):
        back[y : y + PATCH + 1, x : x + PATCH + 1] += cell
    np.testing.assert_allclose(np.vdot(image, back), there, rtol=1e-4)


def test_a_patch_at_a_whole_position_is_a_copy(scene):
    canvas, truth, _, _ = scene
    for size in (PATCH, N):
        y, x = (round(-3 - o) - size // 2 for o in canvas.origin)
        np.testing.assert_array_equal(
            extract_patches(truth, canvas, [[-3.0, -3.0]], size)[0], truth[y : y + size, x : x + size]
        )


def test_stitching_true_patches_returns_the_object(scene):
    canvas, truth, probe, positions = scene
    stitcher = Stitcher(canvas, patch_weight(probe, PATCH))
    stitcher.add(extract_patches(truth, canvas, positions, PATCH), positions)
    image = stitcher.image()
    lit = stitcher.weight > 0.5
    assert image.dtype == np.complex64
    assert stitcher.weight.dtype == np.float32
    assert lit.mean() > 0.1
    assert np.abs(image - truth)[lit].max() < 0.06  # what two bilinear interpolations smooth away
    assert np.abs(image - truth)[lit].mean() < 0.01
    assert (image[stitcher.weight == 0] == 0).all()


def test_remove_undoes_add(scene):
    canvas, truth, probe, positions = scene
    stitcher = Stitcher(canvas, patch_weight(probe, PATCH))
    patches = extract_patches(truth, canvas, positions, PATCH)
    stitcher.add(patches[:30], positions[:30])
    image, weight = stitcher.image(), stitcher.weight
    for _ in range(20):
        stitcher.add(2 * patches[30:], positions[30:])
        stitcher.remove(2 * patches[30:], positions[30:])
    np.testing.assert_allclose(stitcher.weight, weight, atol=1e-6)
    np.testing.assert_allclose(stitcher.image(), image, atol=1e-5)
    stitcher.remove(patches[:30], positions[:30])
    assert not stitcher.image().any()


def test_patches_that_do_not_fit_are_refused(scene):
    canvas, truth, probe, positions = scene
    stitcher = Stitcher(canvas, patch_weight(probe, PATCH))
    patches = extract_patches(truth, canvas, positions, PATCH)
    with pytest.raises(ValueError, match="expected one for each"):
        stitcher.add(patches[:3], positions)
    with pytest.raises(ValueError, match="not finite"):
        stitcher.add(patches * np.nan, positions)
    with pytest.raises(ValueError, match="leaves the canvas"):
        stitcher.add(patches[:1], [[900.0, 0.0]])
    assert not stitcher.image().any()


def test_residual_is_low_on_the_truth_high_on_a_wrong_patch_and_blind_to_flux(scene):
    canvas, truth, probe, positions = scene
    counts = np.random.default_rng(2).poisson(simulate(truth, probe, canvas, positions)).astype(np.uint16)
    right = extract_patches(truth, canvas, positions, N)
    wrong = extract_patches(_object(canvas.shape, seed=5), canvas, positions, N)
    low, high = far_field_residual(right, counts, probe), far_field_residual(wrong, counts, probe)
    assert low.dtype == np.float32
    assert np.median(low) < 0.02
    assert (high > 3 * low).all()
    assert high.max() <= 1
    np.testing.assert_allclose(far_field_residual(right, counts * 4.0, probe * 3, None), low, atol=1e-5)
    np.testing.assert_allclose(far_field_residual(right * 1.7j, counts, probe), low, atol=1e-5)
    np.testing.assert_array_equal(far_field_residual(right, counts * 0, probe), 1)


def test_residual_of_a_smaller_patch_fills_up_with_its_edges(scene):
    canvas, truth, probe, positions = scene
    counts = simulate(truth, probe, canvas, positions)
    inner = (slice(None), slice(12, 52), slice(12, 52))
    patches = extract_patches(truth, canvas, positions, N)
    np.testing.assert_array_equal(patches[inner], extract_patches(truth, canvas, positions, PATCH))
    assert np.median(far_field_residual(patches[inner], counts, probe)) < 0.05


def test_residual_leaves_masked_pixels_out(scene):
    canvas, truth, probe, positions = scene
    counts = simulate(truth, probe, canvas, positions)
    mask = np.zeros((N, N), bool)
    mask[30:33] = True
    spoilt = np.where(mask, np.nan, counts)
    clean = far_field_residual(extract_patches(truth, canvas, positions, N), counts, probe)
    np.testing.assert_allclose(
        far_field_residual(extract_patches(truth, canvas, positions, N), spoilt, probe, mask), clean, atol=0.01
    )
    with pytest.raises(ValueError, match="negative or not finite"):
        far_field_residual(extract_patches(truth, canvas, positions, N), spoilt, probe)


def test_neighbour_offset_finds_a_planted_offset_and_knows_who_is_alone(scene):
    canvas, truth, _, _ = scene
    # The first stands far from all others.
    positions = np.concatenate([[[20.0, 20.0]], np.random.default_rng(3).uniform(-20, -6, (12, 2))])
    small = 12
    patches = extract_patches(truth, canvas, positions, small)
    patches[4] *= np.exp(0.7j)
    stitcher = Stitcher(canvas, np.ones((small, small), np.float32))
    stitcher.add(patches, positions)
    offset = neighbour_offset(patches, positions, stitcher)
    assert offset.dtype == np.float32
    assert np.isnan(offset[0])
    assert abs(offset[4] - 0.7) < 0.05
    assert np.abs(np.delete(offset, [0, 4])).max() < 0.35
