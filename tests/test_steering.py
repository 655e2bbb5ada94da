"""Policies that look at what was measured: what they follow, when they stop, and how long they stay."""

import functools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from steering.models import ProbeFirst
from steering.policies import Adaptive, DwellRule, GradientResidual, Random, Raster, SpaceFilling, StopRule
from steering.policies.adaptive import content_share
from steering.policies.dwell import enough_light
from steering.policies.path import short_path
from steering.policies.trial import Trial, view
from steering.ptychography import (
    Canvas,
    Stitcher,
    beam_diameter,
    expected_floor,
    extract_patches,
    far_field_residual,
    filled,
    patch_weight,
    poisson_floor,
    prior_residual,
    simulate,
    zone_plate,
)
from steering.records import Prediction, Travel
from steering.runner import RunFolder
from tests.command_line import ran

WINDOW, PATCH, SIZE = 32, 24, 160
PROBE = zone_plate(WINDOW, 20.0, aperture=0.52, counts=1e5)
BEAM = beam_diameter(PROBE)
CANVAS = Canvas((SIZE, SIZE), (-SIZE // 2, -SIZE // 2))
TRAVEL = Travel(velocity=1000.0, settling=0.01)


def textured(where=None):
    """An object with a texture everywhere, or only where a mask (Y, X) says."""
    texture = np.random.default_rng(0).normal(size=(SIZE, SIZE))
    texture = (texture + np.roll(texture, 1, 0) + np.roll(texture, 1, 1)) / 2
    return np.exp(1j * texture * (1 if where is None else where)).astype(np.complex64)


def spots(*centres, radius=12):
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    return np.any([(y - v) ** 2 + (x - u) ** 2 < radius**2 for v, u in centres], axis=0)


def trial(thing, step=5.0, seed=0):
    """A scan of which a perfect model, but for the light, knows every frame."""
    rng = np.random.default_rng(seed)
    reach = SIZE // 2 - WINDOW // 2 - 2
    line = np.arange(-reach, reach + 1, step)
    where = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    counts = rng.poisson(simulate(thing, PROBE, CANVAS, where)).astype(np.uint16)
    patches = extract_patches(thing, CANVAS, where, PATCH)
    residual = far_field_residual(patches, counts, PROBE)
    weight = patch_weight(PROBE, PATCH)
    told = {"counts": counts, "patches": patches, "residual": residual}
    return Trial(canvas=CANVAS, probe=PROBE, weight=weight, where=where, **told)


TWO_SPOTS = spots((-35, -30), (30, 35))


@pytest.fixture(scope="module")
def sparse():
    return trial(textured(TWO_SPOTS))


@pytest.fixture(scope="module")
def dense():
    return trial(textured())


@pytest.fixture(scope="module")
def order_of(sparse):
    """The way of a policy over separate pieces of content, found once."""
    return functools.cache(lambda kind, **settings: sparse.run(looking(kind, sparse, **settings)))


def near(tried, rows, mask):
    """(n,) True for rows whose beam touches the mask."""
    y, x = np.nonzero(mask)
    points = np.stack([y, x], 1) - SIZE // 2
    return (((tried.where[rows][:, None] - points[None]) ** 2).sum(-1) < (BEAM / 2) ** 2).any(1)


def looking(kind, tried, **settings):
    return kind(tried.where, beam=BEAM, **settings)


@pytest.mark.parametrize("kind", [GradientResidual, Adaptive])
def test_it_goes_where_the_content_is_and_finds_separate_pieces(kind, sparse, order_of):
    order = order_of(kind)
    early = order[: len(order) // 4]
    share = near(sparse, order, TWO_SPOTS).mean()
    assert near(sparse, early, TWO_SPOTS).mean() > 2 * share
    for centre in ((-35, -30), (30, 35)):
        spot = spots(centre)
        assert near(sparse, early, spot).sum() > 0.5 * near(sparse, order, spot).sum()


@pytest.mark.parametrize("kind", [GradientResidual, Adaptive])
def test_it_covers_the_field_before_it_is_half_done(kind, sparse, order_of):
    order = order_of(kind)
    half = sparse.where[order[: len(order) // 2]]
    hole = np.sqrt(((sparse.where[:, None] - half[None]) ** 2).sum(-1)).min(1).max()
    assert hole < BEAM


@pytest.mark.parametrize("kind", [GradientResidual, Adaptive])
def test_the_same_frames_give_the_same_way_and_it_travels_half_way(kind, sparse, order_of):
    order = order_of(kind, travel=TRAVEL)
    np.testing.assert_array_equal(order, sparse.run(looking(kind, sparse, travel=TRAVEL)))
    policy = looking(kind, sparse, travel=TRAVEL)
    stitcher = Stitcher(CANVAS, sparse.weight)
    rows = sparse.rows_at(policy.suggest(40).positions)
    policy.ingest(sparse.prediction(rows, stitcher), flat_view(sparse, rows))
    copy = pickle.loads(pickle.dumps(policy))
    np.testing.assert_array_equal(copy.suggest(30).positions, policy.suggest(30).positions)


def flat_view(tried, rows):
    stitcher = Stitcher(CANVAS, tried.weight)
    stitcher.add(tried.patches[rows], tried.where[rows])
    return view(stitcher)


@pytest.mark.parametrize("kind", [GradientResidual, Adaptive])
def test_a_way_that_costs_is_shorter(kind, sparse, order_of):
    def seconds(order):
        return TRAVEL.along(sparse.where[order]).sum()

    n = len(sparse.where) // 2
    free, paid = (order_of(kind, **settings)[:n] for settings in ({}, {"travel": TRAVEL}))
    assert seconds(paid) < 0.7 * seconds(free)


def test_adaptive_is_space_filling_until_sparse_is_proven(sparse, order_of):
    order, plain = order_of(Adaptive), sparse.run(SpaceFilling(sparse.where))
    same = int(np.argmin(order == plain))
    assert 30 <= same < len(order) // 4
    np.testing.assert_array_equal(order[:same], plain[:same])
    paid = order_of(Adaptive, travel=TRAVEL)
    assert set(paid[:30]) == set(plain[:30])
    assert TRAVEL.along(sparse.where[paid[:30]]).sum() < TRAVEL.along(sparse.where[plain[:30]]).sum()
    never = sparse.run(looking(Adaptive, sparse, sparse=0.0))
    np.testing.assert_array_equal(never, plain)


def test_adaptive_is_space_filling_to_the_end_on_dense_content(dense):
    np.testing.assert_array_equal(dense.run(looking(Adaptive, dense)), dense.run(SpaceFilling(dense.where)))


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_content_share_is_the_share_of_places_with_content(share):
    """And its standard error is what repeated samples scatter by."""
    rng = np.random.default_rng(0)
    drawn = [content_share((rng.random(200) < share).astype(float)) for _ in range(400)]
    shares, errors = np.transpose(drawn)
    assert shares.mean() == pytest.approx(share, rel=0.05)
    assert np.mean(errors) == pytest.approx(shares.std(), rel=0.1, abs=1e-9)
    assert content_share(np.zeros(9)) == (1.0, 0.0)


def test_reasons_say_what_was_followed(sparse):
    policy = looking(Adaptive, sparse)
    rows = sparse.rows_at(policy.suggest(60).positions)
    policy.ingest(sparse.prediction(rows, Stitcher(CANVAS, sparse.weight)), flat_view(sparse, rows))
    reasons = policy.suggest(20).reasons
    assert all(reason.startswith("sparse (") for reason in reasons)
    assert any("structure" in reason or "residual" in reason for reason in reasons)


@pytest.mark.parametrize("start", [None, np.array([5.0, 5.0])])
def test_a_short_path_goes_everywhere_once_and_is_not_longer_than_the_nearest_next(start):
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 40):
        where = rng.uniform(0, 10, (n, 2))
        order = short_path(start, where)
        assert sorted(order) == list(range(n))
        whole = where[order] if start is None else np.concatenate([start[None], where[order]])
        length = np.abs(np.diff(whole, axis=0)).max(1).sum()
        if n == 40:
            assert length < 10 * np.sqrt(n)  # a random tour takes about 5 n
    corner = np.array([[0.0, k] for k in (3, 0, 2, 1)])
    np.testing.assert_array_equal(short_path(np.array([0.0, -1.0]), corner), [1, 3, 2, 0])


def test_travel_takes_the_longer_axis_and_settles_only_after_a_move():
    seconds = TRAVEL.along(np.array([[0.0, 0.0], [3.0, -4.0], [3.0, -4.0]]))
    np.testing.assert_allclose(seconds, [0, 4 / 1000 + 0.01, 0])
    assert len(TRAVEL.along(np.zeros((0, 2)))) == 0
    with pytest.raises(ValueError, match="found velocity=0"):
        Travel(velocity=0.0)


def predicted(value, n=6, scan="a"):
    zeros = np.zeros(n, np.float32)
    explained = np.full(n, 0.1, np.float32)
    return Prediction(
        frame_id=np.arange(n),
        scan=scan,
        position=np.zeros((n, 2)),
        amplitude=np.ones((n, PATCH, PATCH), np.float32),
        phase=np.zeros((n, PATCH, PATCH), np.float32),
        residual=explained,
        offset=zeros,
        model_version=np.zeros(n, np.int64),
        prior_residual=np.full(n, value, np.float32),
        poisson_floor=np.zeros(n),
    )


@pytest.mark.parametrize("make", [Raster, Random, SpaceFilling, lambda c, **d: Adaptive(c, beam=BEAM, **d)])
def test_a_scan_stops_once_new_frames_are_explained_and_the_next_begins_anew(make, dense):
    policy = make(dense.where, stop=StopRule(ratio=1.1, half_life=2))
    live = flat_view(dense, np.arange(4))
    policy.suggest(30)
    policy.ingest(predicted(0.5, 12), live)
    policy.ingest(predicted(0.1, 2), live)
    assert not policy.suggest(5).stop  # what the image did not predict still weighs too much
    policy.ingest(predicted(0.1, 13), live)
    end = policy.suggest(5)
    assert end.stop
    assert not len(end.positions)
    assert "explains new frames" in end.reasons[0]
    begun = policy.suggest(5)
    np.testing.assert_array_equal(begun.positions, make(dense.where).suggest(5).positions)
    policy.ingest(predicted(0.1, 8), live)  # late frames of the scan before do not count for this one
    assert not policy.suggest(5).stop


def model_of(thing, light, patches=None):
    """A scan with so many times the light, of a model that knows every patch or says these."""
    probe = PROBE * np.float32(np.sqrt(light))
    known = trial(thing)
    counts = np.random.default_rng(0).poisson(simulate(thing, probe, CANVAS, known.where)).astype(np.uint16)
    patches = known.patches if patches is None else patches
    found = {"counts": counts, "patches": patches, "residual": far_field_residual(patches, counts, probe)}
    return replace(known, probe=probe, **found)


@pytest.mark.parametrize("light", [1.0, 0.1, 0.02])
def test_a_scan_of_a_weak_object_does_not_end_before_its_field_is_covered(light):
    """At few counts both residuals are nearly all noise, and their ratio is 1 whatever the image shows."""
    weak = model_of(textured() ** 0.15, light)
    order = weak.run(SpaceFilling(weak.where, stop=StopRule()), with_prior_residual=True)
    hole = np.sqrt(((weak.where[:, None] - weak.where[order][None]) ** 2).sum(-1)).min(1).max()
    assert hole < BEAM
    assert light < 1.0 or len(order) < len(weak.where) / 2


def test_no_scan_ends_by_a_model_that_explains_nothing():
    """Its image explains as little as it does itself, from the beginning."""
    torch.manual_seed(0)
    network = ProbeFirst(window=WINDOW, patch=PATCH, width=8).eval()
    network.optics.set(PROBE)
    thing = textured() ** 0.5
    with torch.inference_mode():
        amplitude, phase = network(torch.from_numpy(model_of(thing, 1.0).counts.astype(np.float32)))
    untrained = model_of(thing, 1.0, torch.polar(amplitude, phase).numpy())
    order = untrained.run(SpaceFilling(untrained.where, stop=StopRule()), with_prior_residual=True)
    assert len(order) == len(untrained.where)


def test_the_image_explains_what_it_has_seen_and_not_what_it_has_not(dense):
    stitcher = Stitcher(CANVAS, dense.weight)
    rows = dense.run(SpaceFilling(dense.where))
    prior = [s.mean() for _, s in dense.with_prior_residuals(rows, at_once=40, ahead=40)]
    assert prior[0] > 3 * prior[-1]
    stitcher.add(dense.patches, dense.where)
    seen = prior_residual(stitcher, dense.where, dense.counts, PROBE)
    assert np.median(seen) < 1.2 * np.median(dense.residual)


def test_filling_keeps_what_is_seen_and_goes_on_from_it():
    image = np.full((21, 34), 2 - 1j, np.complex64)
    weight = np.zeros(image.shape, np.float32)
    weight[5:9, 4:20] = 1
    np.testing.assert_allclose(filled(image * (weight > 0), weight), image, rtol=1e-5)
    np.testing.assert_array_equal(filled(0 * image, 0 * weight), np.ones_like(image))
    image[5:9, 4:20] = 7
    np.testing.assert_allclose(filled(image, weight)[6:8, 5:19], 7, rtol=0.02)


@pytest.mark.parametrize("counts", [300, 1e4, 1e6])
@pytest.mark.parametrize("masked", [False, True])
def test_the_floor_is_what_counting_noise_leaves_of_the_truth(counts, masked):
    rng = np.random.default_rng(0)
    probe = zone_plate(WINDOW, 20.0, aperture=0.52, counts=counts)
    mask = np.zeros((WINDOW, WINDOW), bool)
    mask[:, 14:17] = masked
    thing = textured()
    patch = extract_patches(thing, CANVAS, np.zeros((1, 2)), WINDOW)
    expected = simulate(thing, probe, CANVAS, np.zeros((1, 2)))
    frames = rng.poisson(np.repeat(expected, 600, 0))
    measured = far_field_residual(np.repeat(patch, 600, 0), frames, probe, mask)
    error = measured.std() / np.sqrt(len(measured))
    floor = expected_floor(patch, probe, mask)[0]
    assert abs(measured.mean() - floor) < 4 * error + 2e-3 * measured.mean()
    assert poisson_floor(frames, mask).mean() == pytest.approx(floor, rel=0.03)  # the other one, from the counts alone


def test_enough_light_does_not_depend_on_the_light_that_there_was():
    """A residual of noise / time + what the model misses: both dwells lead to the same one."""
    seconds, noise, missed = np.array([0.01, 0.1, 1.0]), 0.002, 0.05
    found = enough_light(noise / seconds + missed, noise / seconds, seconds, 0.001)
    np.testing.assert_allclose(found, noise / missed)
    perfect = enough_light(noise / seconds, noise / seconds, seconds, 0.001)
    np.testing.assert_allclose(perfect, noise / 0.001)


@pytest.mark.parametrize("flux", [2.0, 1.0, 0.5, 0.25])
def test_dwell_rises_where_the_flux_falls(dense, flux):
    """By what the frames have, not by what the probe says that they should have."""
    frames = np.random.default_rng(0).poisson(flux * simulate(textured(), PROBE, CANVAS, dense.where))
    patches = extract_patches(textured(), CANVAS, dense.where, WINDOW)
    residual = far_field_residual(patches, frames, PROBE)
    faded = replace(dense, counts=frames, patches=patches, residual=residual)
    rows = np.arange(200, 400)
    rule = DwellRule(PROBE, frame_s=0.02, shortest=0.001, longest=2.0, tolerance=0.005)
    rule.note(faded.prediction(rows, None), 1.0)
    without_noise = far_field_residual(patches, simulate(textured(), PROBE, CANVAS, dense.where), PROBE)
    right = 0.02 * (residual - without_noise)[rows].mean() / 0.005
    assert np.median(rule.seconds(dense.where[rows])) == pytest.approx(right, rel=0.1)


def test_dwell_asks_for_the_floor_and_learns_nothing_from_dark_frames(dense):
    rule = DwellRule(PROBE, frame_s=0.02, shortest=0.001, longest=2.0)
    told = dense.prediction(np.arange(20), None)
    with pytest.raises(ValueError, match="without the Poisson floor"):
        rule.note(replace(told, poisson_floor=None), 1.0)
    rule.note(replace(told, poisson_floor=np.where(np.arange(20) < 10, 1.0, np.nan)), 1.0)
    np.testing.assert_array_equal(rule.seconds(dense.where[:5]), 0.02)


def test_dwell_is_within_its_limits_and_longer_where_light_is_lacking(dense):
    rule = DwellRule(PROBE * 0.1, frame_s=0.02, shortest=0.005, longest=0.2, tolerance=0.01)
    policy = Random(dense.where, dwell=rule)
    first = policy.suggest(200)
    np.testing.assert_array_equal(first.dwell, 0.02)
    rows = dense.rows_at(first.positions)
    dim = replace(dense, counts=np.random.default_rng(0).poisson(dense.counts * 0.01), probe=PROBE * np.float32(0.1))
    noisy = far_field_residual(dim.patches, dim.counts, dim.probe)
    spoilt = replace(dim, residual=np.where(dense.where[:, 1] > 0, noisy + 0.3, noisy).astype(np.float32))
    policy.ingest(spoilt.prediction(rows, Stitcher(CANVAS, dense.weight)), flat_view(dense, rows))
    second = policy.suggest(50)
    assert (second.dwell >= rule.shortest).all()
    assert (second.dwell <= rule.longest).all()
    at_fault = second.positions[:, 1] > BEAM
    limited = second.positions[:, 1] < -BEAM
    assert second.dwell[limited].min() > 2 * second.dwell[at_fault].max()
    with pytest.raises(ValueError, match="expected 0 < shortest"):
        DwellRule(PROBE, frame_s=0.02, shortest=0.05, longest=0.2)


@pytest.mark.slow
def test_the_benchmark_runs_and_keeps_its_keys(tmp_path):
    """At a tiny size: whether its bars are reached is another matter."""
    tiny = ["--sets", "sparse,dense", "--seeds", "1", "--size", "160", "--step", "10", "--frames", "8", "--steps", "2"]
    ran("bench_steering.py", tmp_path / "run", *tiny)
    figures = RunFolder(tmp_path / "run").summary()
    for key in ("frames_saved_over_raster", "frames_saved_over_space_filling", "time_saved_over_raster"):
        assert key in figures["sparse"]
    assert figures["dense"]["error_over_raster"] > 0
    names = {"raster", "raster_planned", "random", "space_filling", "gradient_residual", "adaptive"}
    for sample in figures["samples"].values():
        for seed in sample["by_seed"].values():
            assert set(seed["policies"]) == names
            for curve in seed["policies"].values():
                assert (np.array(curve["error"]) > 0).all()
                assert (np.diff(curve["frames"]) >= 0).all()
    report = (tmp_path / "run" / "report.html").read_text()
    assert 'alt="errors"' in report
    assert 'alt="seen"' in report
