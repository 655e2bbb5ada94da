"""Laws of trust: it means the same at every flux, under every mask, for any number of validation frames."""

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from steering.ptychography import (
    BAD,
    Canvas,
    Stitcher,
    above_floor,
    extract_patches,
    far_field_residual,
    judge,
    neighbour_offset,
    no_evidence,
    pair_offsets,
    patch_weight,
    poisson_floor,
    share_as_bad,
    share_of_noise,
    simulate,
    thinned,
    zone_plate,
)
from steering.ptychography.noise import LOSS_OF_FEW
from steering.records import Field, ModelVersion

N = 32
PROBE = zone_plate(N, 12.0, aperture=0.5, counts=3e4)
CANVAS = Canvas.around(Field(-20, 20, -20, 20), N)


def version(residuals=(), offsets=(), **more):
    return ModelVersion(
        number=1,
        network="ProbeFirst",
        hyperparameters={},
        validation_residuals=tuple(residuals),
        validation_offsets=tuple(offsets),
        **more,
    )


@pytest.fixture(scope="module")
def scene():
    """An object's expected frames (n, N, N) at whole pixels, the true patches, and worse ones, each to its degree."""
    rng = np.random.default_rng(0)
    thick = gaussian_filter(rng.normal(size=CANVAS.shape), 2)
    thing = np.exp(1.0j * thick / np.abs(thick).max()).astype(np.complex64)
    where = np.round(rng.uniform(-20, 20, (120, 2)))
    patches = extract_patches(thing, CANVAS, where, N)
    wrong = np.stack([gaussian_filter(rng.normal(size=(N, N)), 1.5) for _ in where])
    wrong *= rng.uniform(0.5, 1.5, (len(where), 1, 1)) / wrong.std()
    worse = (patches * np.exp(0.3j * wrong)).astype(np.complex64)
    return simulate(thing, PROBE, CANVAS, where), where, patches, worse


def measured(expected, flux, seed=1):
    return np.random.default_rng(seed).poisson(flux * expected).astype(np.uint16)


def above(patches, counts, mask=None):
    return above_floor(far_field_residual(patches, counts, PROBE, mask), poisson_floor(counts, mask))


def test_the_loss_to_noise_is_that_of_the_poisson_law():
    """Of L expected counts, sqrt(L) times the mean root of those that come is less by the mean of the table."""
    number = np.arange(200)
    series = 1 / 8 + 7 / (128 * np.maximum(number, 1))
    table = np.r_[LOSS_OF_FEW, series[len(LOSS_OF_FEW) :]]
    for light in (0.003, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 12.0, 50.0):
        law = np.exp(number * math.log(light) - light - np.array([math.lgamma(n + 1) for n in number]))
        lost = light - math.sqrt(light) * (law * np.sqrt(number)).sum()
        assert (law * table).sum() == pytest.approx(lost, abs=0.015, rel=0.16)
        assert abs((law * table).sum() - lost) <= max(0.16 * lost, 0.005)


@pytest.mark.parametrize("flux", [0.1, 1.0, 10.0])
def test_the_floor_is_what_a_perfect_patch_shows(scene, flux):
    expected, _, patches, _ = scene
    counts = measured(expected, flux)
    residual, floor = far_field_residual(patches, counts, PROBE), poisson_floor(counts)
    assert floor.mean() == pytest.approx(residual.mean(), rel=0.05)
    assert np.abs(above_floor(residual, floor)).mean() < 0.2 * floor.mean()


@pytest.mark.parametrize("flux", [0.1, 0.3, 3.0, 10.0])
def test_trust_is_invariant_to_flux(scene, flux):
    """The same patches held against brighter and fainter frames: the residual moves by half and more, trust hardly."""
    expected, _, _, worse = scene
    usual = version(above(worse, measured(expected, 1.0, seed=2)))

    def trust(counts):
        nothing = np.full(len(counts), np.nan)
        return judge(counts, far_field_residual(worse, counts, PROBE), nothing, version=usual).trust

    counts = measured(expected, flux)
    assert abs(trust(counts).mean() - trust(measured(expected, 1.0)).mean()) < 0.06
    if flux < 1:
        raw = far_field_residual(worse, counts, PROBE), far_field_residual(worse, measured(expected, 1.0), PROBE)
        assert np.median(raw[0]) > 1.3 * np.median(raw[1])


def test_a_mask_is_honoured_whatever_lies_under_it(scene):
    expected, _, _, worse = scene
    counts = measured(expected, 1.0)
    mask = np.zeros((N, N), bool)
    mask[14:17] = True
    spoilt = np.where(mask, 65535, counts).astype(np.uint16)
    usual = version(above(worse, counts, mask))
    offset = np.full(len(counts), np.nan)
    told = [
        judge(c, far_field_residual(worse, c, PROBE, mask), offset, mask=mask, version=usual) for c in (counts, spoilt)
    ]
    np.testing.assert_array_equal(told[0].trust, told[1].trust)
    assert told[1].why_not == ("",) * len(counts)
    np.testing.assert_array_equal(thinned(counts, mask), thinned(spoilt, mask))
    assert set(no_evidence(spoilt, poisson_floor(spoilt))) == {"saturated"}


def test_frames_that_tell_nothing_are_named_and_have_no_trust(scene):
    expected, _, _, worse = scene
    counts = measured(expected, 1.0)[:5]
    counts[1] = 0
    counts[2, 3, 3] = 65535
    counts[3] = 0
    counts[3, 10:14, 10:14] = 1
    told = judge(
        counts, far_field_residual(worse[:5], counts, PROBE), np.zeros(5), version=version([0.1] * 9, [1.0] * 9)
    )
    assert told.why_not == ("", "no counts", "saturated", "too few counts", "")
    for values in (told.by_residual, told.by_offset, told.trust):
        assert np.isnan(values).tolist() == [False, True, True, True, False]
    assert not told.bad[1:4].any()


@pytest.mark.parametrize("m", [1, 5, 40])
def test_of_frames_like_the_validation_frames_no_more_than_that_share_looks_as_bad(m):
    rng = np.random.default_rng(m)
    residual, offset = rng.lognormal(size=(2, 4000, m + 1))
    by_residual, by_offset = (
        np.array([share_as_bad(row[m:], row[:m])[0] for row in kind]) for kind in (residual, offset)
    )
    for share in (by_residual, by_offset, np.minimum(1, 2 * np.minimum(by_residual, by_offset))):
        for chance in (0.05, 0.2, 0.5, 0.9):
            assert (share <= chance).mean() <= chance + 0.02
    assert by_residual.min() == 1 / (m + 1)


def test_without_validation_frames_there_is_no_trust_and_without_a_neighbour_the_residual_alone():
    counts = np.full((3, N, N), 9, np.uint16)
    residual, offset = np.array([0.0, 0.2, 0.9]), np.array([np.nan, 0.0, 3.0])
    nothing = judge(counts, residual, offset, version=version())
    assert np.isnan(nothing.trust).all()
    assert not nothing.bad.any()
    told = judge(counts, residual, offset, version=version(np.linspace(0.1, 0.4, 99), np.linspace(0, 0.2, 99)))
    assert np.isnan(told.by_offset).tolist() == [True, False, False]
    np.testing.assert_allclose(told.trust[0], told.by_residual[0])
    assert told.bad.tolist() == [False, False, True]
    assert told.trust[2] == pytest.approx(0.02)
    few = judge(counts, residual, offset, version=version([0.1] * 5, [0.1] * 5))
    assert not few.bad.any()  # five frames cannot say that one in twenty is as bad


def test_the_neighbour_test_finds_a_planted_offset_that_the_residual_cannot_see(scene):
    expected, where, patches, _ = scene
    rng = np.random.default_rng(3)
    turned = patches * np.exp(1j * rng.normal(0, 0.05, len(patches)))[:, None, None].astype(np.complex64)
    weight = patch_weight(PROBE, N)
    counts = measured(expected, 1.0)
    usual = version(above(turned, counts), pair_offsets(turned, patches, weight))
    found = []
    for number in range(40):
        planted = turned.copy()
        planted[number] *= np.exp(0.5j)
        stitcher = Stitcher(CANVAS, weight)
        stitcher.add(planted, where)
        offset = neighbour_offset(planted, where, stitcher)[[number]]
        residual = far_field_residual(planted[[number]], counts[[number]], PROBE)
        told = judge(counts[[number]], residual, offset, version=usual)
        found.append((told.by_offset[0] <= BAD, told.by_residual[0]))
    caught, by_residual = np.mean(found, axis=0)
    assert caught >= 0.95
    assert by_residual > 0.4


def test_pairs_of_patches_are_as_far_apart_as_their_constants(scene):
    _, _, patches, _ = scene
    constants = np.array([0.3, -0.2, 3.0])
    turned = patches[:3] * np.exp(1j * constants)[:, None, None].astype(np.complex64)
    wanted = np.angle(np.exp(1j * (constants - np.roll(constants, 1))))
    np.testing.assert_allclose(pair_offsets(turned, patches[:3], patch_weight(PROBE, N)), wanted, atol=1e-5)
    assert pair_offsets(turned[:1], patches[:1], patch_weight(PROBE, N)).shape == (0,)


def test_thinned_frames_have_their_share_of_the_photons_and_tell_the_share_of_noise(scene):
    expected, _, patches, worse = scene
    counts = measured(expected, 1.0)
    fewer = thinned(counts)
    assert (fewer <= counts).all()
    assert fewer.sum() == pytest.approx(0.75 * counts.sum(), rel=0.01)

    def share(at_first, then):
        residuals = far_field_residual(at_first, counts, PROBE), far_field_residual(then, fewer, PROBE)
        return share_of_noise(residuals[0], poisson_floor(counts), residuals[1], poisson_floor(fewer))

    assert share(worse, worse) == pytest.approx(1, abs=0.1)  # patches that know nothing of the noise show all of it
    assert share(worse, patches) == 0  # and patches that are the better for it none
    assert share_of_noise(np.zeros(2), np.zeros(2), np.ones(2), np.ones(2)) == 1  # nothing left to compare
