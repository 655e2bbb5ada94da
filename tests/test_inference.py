"""Laws of live inference."""

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from steering.inference import HoldOut, LiveImage, Predictor, Table
from steering.inference.evaluate import patch_phase_error, score_patches
from steering.inference.live import place
from steering.learning.samples import owner_of
from steering.models import ModelStore, ProbeFirst
from steering.policies import SpaceFilling
from steering.ptychography import Canvas, extract_patches, judge, patch_weight, simulate, zone_plate
from steering.records import Field, Geometry, ModelVersion, make_chunk

WINDOW, PATCH = 32, 16
PROBE = zone_plate(WINDOW, 12.0, aperture=0.6, counts=1e4)
FIELD = Field(-20, 20, -20, 20)
GEOMETRY = Geometry(shape=(WINDOW, WINDOW))
CANVAS = Canvas.around(FIELD, WINDOW)


def thing(seed=0):
    """A smooth object on the canvas."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: CANVAS.shape[0], : CANVAS.shape[1]] / 12
    return np.exp(1j * 0.5 * np.sin(y + rng.uniform(0, 6)) * np.cos(x + rng.uniform(0, 6))).astype(np.complex64)


def chunks(scan="a", n=40, first=0, seed=0):
    """Chunks of 5 frames of the object of that seed."""
    rng = np.random.default_rng(seed)
    where = rng.uniform(-20, 20, (n, 2))
    counts = rng.poisson(simulate(thing(seed), PROBE, CANVAS, where)).astype(np.uint16)
    for i in range(0, n, 5):
        rows = slice(i, i + 5)
        yield make_chunk(counts[rows], np.arange(first + i, first + i + 5), where[rows], GEOMETRY, scan=scan)


def publish(store, number, noise=0.0, **more):
    """Publish a network; with noise on its weights it is better for some frames and worse for others."""
    torch.manual_seed(0)
    network = ProbeFirst(window=WINDOW, patch=PATCH, width=4)
    network.optics.set(PROBE)
    torch.manual_seed(number)
    with torch.no_grad():
        for weight in network.parameters():
            weight += noise * torch.randn_like(weight)
    ModelStore(store).publish(
        network, ModelVersion(number=number, network="ProbeFirst", hyperparameters=network.hyperparameters, **more)
    )


def predictor(store, **parts):
    """A predictor with version 0 in its store."""
    publish(store, 0)
    return Predictor(
        field=FIELD,
        geometry=GEOMETRY,
        probe=PROBE,
        policy=SpaceFilling(np.random.default_rng(0).uniform(-20, 20, (50, 2))),
        store=store,
        **parts,
    )


async def predicted(me, n):
    """Wait until n frames are predicted; the events."""
    events = []
    while sum(len(e.frame_ids) for e in events) < n:
        events += await me.events()
    return events


async def having_predicted(store, given, **parts):
    """A predictor that has predicted all frames of these chunks."""
    me, given = predictor(store, **parts), list(given)
    await me.start()
    for chunk in given:
        await me.receive(chunk)
    await predicted(me, sum(chunk.sizes["frame"] for chunk in given))
    return me


async def revised_by(me, number):
    """Put a version into service, and wait until it has looked at the frames of the others."""
    await me.install(number, canary=False)
    while (await me.figures())["frames_to_revise"]:
        await asyncio.sleep(0.01)


def test_every_frame_is_predicted_once_with_its_version_across_swaps(tmp_path):
    """Versions are swapped while frames arrive: none is lost, none doubled, each is reported with its version."""

    async def main():
        me = predictor(tmp_path)
        await me.start()
        for number, chunk in enumerate(chunks(n=60)):
            await me.receive(chunk)
            if number % 3 == 2:
                publish(tmp_path, number // 3 + 1, noise=0.01)
                await me.install(number // 3 + 1, canary=False)
        return await predicted(me, 60), await me.live(), await me.figures()

    events, live, figures = asyncio.run(main())
    assert sorted(i for e in events for i in e.frame_ids) == list(range(60))
    assert figures["frames_predicted"] == 60
    versions = [e.version for e in events]
    assert versions == sorted(versions)
    assert len(set(versions)) > 2
    assert live.sizes["frame"] == 60
    assert (live["frame_model_version"] >= 0).all()
    assert np.isfinite(live["residual"]).all()


def test_a_newer_model_predicts_again_and_only_better_predictions_are_kept(tmp_path):
    async def main():
        me = await having_predicted(tmp_path, chunks(n=40))
        before = await me.live()
        for number in range(1, 9):
            publish(tmp_path, number, noise=0.02)
            await revised_by(me, number)
        return before, await me.live()

    before, after = asyncio.run(main())
    again = (after["frame_model_version"] > 0).values
    assert again.any()
    assert (after["residual_now"].values[again] < before["residual_now"].values[again]).all()
    np.testing.assert_array_equal(after["residual_now"].values[~again], before["residual_now"].values[~again])
    np.testing.assert_array_equal(after["residual"].values, before["residual"].values)  # what was known live


BETTER = 5
"""The number of a version with this noise on its weights that does better than version 0 on every frame."""
OFFSETS = tuple(np.linspace(0, 1, 40).tolist())


def columns_of(live, rows):
    """These rows of the table of a scan, all columns that are there."""
    names = [name for name, values in live.frames.blocks[0].items() if values is not None]
    return dict(zip(names, live.frames.read(*names, rows=rows), strict=True))


@pytest.mark.parametrize("restored", [False, True], ids=["a newer version", "another predictor"])
def test_trust_of_a_frame_that_is_predicted_again_is_by_what_is_known_of_it_now(tmp_path, restored):
    """Residual and offset are those of the prediction that stands in the image, and so is the version that they are
    judged by."""

    async def main():
        me = await having_predicted(tmp_path, chunks(n=40))
        publish(tmp_path, BETTER, 0.02, validation_residuals=(0.1,) * 40, validation_offsets=OFFSETS)
        await revised_by(me, BETTER)
        live = me.scans.images["a"]
        if restored:
            live = LiveImage("a", CANVAS, live.weight, GEOMETRY)
            for first in (0, 16, 32):
                block = columns_of(me.scans.images["a"], slice(first, min(first + 16, 40)))
                del block["patch"]  # it has left memory
                live.frames.restore(block, 16)
            me.fast.restore(live)
        return columns_of(live, slice(40)), me.fast.mask

    found, mask = asyncio.run(main())
    assert (found["version"] == BETTER).all()
    said = (found[name] for name in ("counts", "residual", "offset"))
    expected = judge(*said, mask=mask, version=ModelStore(tmp_path).describe(BETTER))
    assert np.isfinite(expected.by_offset).sum() > 10
    np.testing.assert_array_equal(found["trust"], expected.trust)


def test_a_new_scan_has_its_own_image_and_the_old_one_keeps_what_is_judged(tmp_path):
    async def main():
        truths = {"a": (thing(0), CANVAS), "b": (thing(1), CANVAS)}
        me = await having_predicted(tmp_path, [*chunks("a", 40), *chunks("b", 40, first=40, seed=1)], truths=truths)
        return (
            await me.live("a"),
            await me.live("b"),
            await me.evaluate("a", (0,)),
            await me.evaluate("b", (0,)),
            await me.label_frames("a", 100),
            await me.label_frames("b", 30),
            await me.versions_of("a"),
        )

    a, b, score_a, score_b, late, frames, versions = asyncio.run(main())
    assert a.attrs["scan"] == "a"
    assert b.attrs["scan"] == "b"
    assert list(a["frame"].values) == list(range(40))
    assert list(b["frame"].values) == list(range(40, 80))
    assert 0 < score_a[0].phase_error < np.pi
    assert 0 < score_b[0].phase_error < np.pi
    assert 0 < score_b[0].residual < 1
    assert late is None
    assert len(frames.frame_id) == 30
    assert frames.frame_id[-1] == 79
    assert versions == (0, 0)
    assert {"truth_phase", "truth_amplitude", "model_version", "trust"} <= set(a.data_vars)
    assert a["phase"].attrs["units"] == "rad"


def test_what_goes_wrong_with_a_frame_reaches_whoever_reads_the_events(tmp_path):
    class Broken(SpaceFilling):
        def ingest(self, prediction, live):
            raise ZeroDivisionError("this policy broke")

    async def main():
        me = predictor(tmp_path)
        me.policy = Broken(np.zeros((1, 2)))
        await me.start()
        await me.receive(next(chunks()))
        await me.events()

    with pytest.raises(ZeroDivisionError, match="this policy broke"):
        asyncio.run(main())


def test_a_predictor_without_a_model_says_what_it_expects(tmp_path):
    me = predictor(tmp_path / "models")
    me.store = tmp_path / "empty"
    with pytest.raises(FileNotFoundError, match="expected version 0"):
        asyncio.run(me.start())


def test_the_table_finds_frames_and_grows():
    table = Table()
    for first in range(0, 1000, 7):
        ids = np.arange(first, first + 7)
        table.append(ids, value=ids * 2.0, patch=np.ones((7, 2, 2)) * ids[:, None, None])
    assert len(table) == 1001
    assert table["value"][table.row.get(500)] == 1000
    np.testing.assert_array_equal(table["patch"][:, 1, 1], table["frame_id"])


class TestHoldOut:
    """Which frames are kept from training."""

    def test_one_of_every_ten(self):
        ids = np.arange(10**9, 10**9 + 3000)
        assert (HoldOut().held_out(ids).reshape(-1, 10).sum(1) == 1).all()
        assert (HoldOut(every=4).held_out(ids).reshape(-1, 4).sum(1) == 1).all()
        assert not HoldOut().withheld(np.zeros((30, 2))).any()

    @given(stride=st.integers(1, 12), first=st.integers(0, 10**12))
    def test_a_tenth_of_the_frames_whatever_the_stride_of_their_ids(self, stride, first):
        """And no long run of them without any."""
        held_out = HoldOut().held_out(first + stride * np.arange(3000))
        assert 0.07 < held_out.mean() < 0.13
        assert np.diff(np.flatnonzero(np.concatenate([[True], held_out, [True]]))).max() < 160

    @given(columns=st.integers(2, 64), first=st.integers(0, 10**12), snake=st.booleans())
    def test_a_raster_has_them_in_every_column(self, columns, first, snake):
        ids = first + np.arange(400 * columns).reshape(400, columns)
        ids[1::2] = ids[1::2, ::-1] if snake else ids[1::2]
        by_column = HoldOut().held_out(ids).mean(0)
        assert 0.02 < by_column.min() <= by_column.max() < 0.2

    @given(every=st.integers(2, 20), ranks=st.integers(2, 20))
    def test_they_are_dealt_apart_from_the_ranks(self, every, ranks):
        """Those that are left to train on fall to all ranks evenly, also where there are as many ranks as ids to a
        held-out one."""
        ids = np.arange(4000)
        left = ids[~HoldOut(every=every).held_out(ids)]
        assert (np.abs(np.bincount(owner_of(left, ranks), minlength=ranks) / len(left) * ranks - 1) < 0.3).all()

    @given(st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
    def test_it_follows_from_the_id_alone(self, ids):
        alone = [bool(HoldOut().held_out(np.array([one]))[0]) for one in ids]
        assert HoldOut().held_out(np.array(ids)).tolist() == alone

    def test_a_region_and_its_margin(self):
        hold_out = HoldOut(region=Field(10, 20, 10, 20), margin=5)
        where = np.array([[15.0, 15.0], [10.0, 6.0], [6.0, 6.0], [0.0, 0.0], [20.0, 25.0]])
        np.testing.assert_array_equal(hold_out.withheld(where), [True, True, False, False, True])
        np.testing.assert_array_equal(hold_out.judged(np.arange(5), where), [True, False, False, False, False])


class TestScore:
    """Errors that do not depend on what a frame cannot show."""

    def live(self, truth):
        """An empty live image with a known truth."""
        return LiveImage("a", CANVAS, patch_weight(PROBE, PATCH), GEOMETRY, (truth, CANVAS))

    def patches(self, image, n=60):
        """True patches at positions all over the field."""
        where = np.random.default_rng(3).uniform(-20, 20, (n, 2))
        return extract_patches(image, CANVAS, where, PATCH), where

    def test_the_truth_in_another_gauge_is_right(self):
        y, x = np.mgrid[: CANVAS.shape[0], : CANVAS.shape[1]]
        patches, where = self.patches(thing() * np.exp(1j * (0.8 + 0.01 * y - 0.02 * x)))
        error, correlation = score_patches(patches, where, self.live(thing()))
        assert error < 0.03
        assert correlation > 0.98

    def test_another_object_is_wrong(self):
        error, correlation = score_patches(*self.patches(thing(7)), self.live(thing()))
        assert error > 0.08
        assert correlation < 0.7

    def test_a_constant_phase_per_patch_is_free_in_the_error(self):
        patches, _ = self.patches(thing(), 5)
        turned = patches * np.exp(1j * np.arange(5))[:, None, None]
        assert patch_phase_error(turned, patches, patch_weight(PROBE, PATCH)).max() < 1e-3

    def test_place_moves_the_truth_to_another_canvas(self):
        small = Canvas((20, 24), (CANVAS.origin[0] + 10, CANVAS.origin[1] + 7))
        there = place((thing(), CANVAS), small)
        np.testing.assert_array_equal(there, thing()[10:30, 7:31])
        back = place((there, small), CANVAS)
        np.testing.assert_array_equal(back[10:30, 7:31], there)
        assert (back != 0).sum() == there.size


def test_what_it_predicts_comes_with_its_trust_and_with_why_there_is_none(tmp_path):
    """The untrained version promises nothing; a trained one is held against its validation frames."""

    async def course():
        me = predictor(tmp_path)
        await me.start()
        usual = {"validation_residuals": (0.1,) * 9 + (0.99,) * 10, "validation_offsets": (0.5,) * 19}
        publish(tmp_path, 1, noise=0.01, **usual)
        first, second, *_ = chunks()
        second["counts"][1] = 0
        second["counts"][2, 5, 5] = 65535
        await me.receive(first)
        await predicted(me, 5)
        events = []
        await me.install(1)
        before = await me.live()
        await me.receive(second)
        return [*events, *await predicted(me, 5), before, await me.live()]

    aside, event, before, live = asyncio.run(course())
    assert aside.reason == "no counts at all"
    assert event.version == 1
    assert event.validation_frames == 19
    assert event.why_not == ("", "saturated", "", "")
    assert np.isnan(event.trust_by_residual).tolist() == [False, True, False, False]
    assert all(0.5 <= trust <= 1 for trust in np.array(event.trust_by_residual)[[0, 2, 3]])
    assert np.isnan(event.trust_by_offset)[1]
    assert np.isnan(before["trust"]).all()
    shone_on = np.isfinite(live["phase"].values)
    assert np.isfinite(live["pixel_residual"].values[shone_on]).all()
    known = np.isfinite(live["trust"].values)
    assert known.any()
    assert not known[~shone_on].any()
    frames = live["frame_trust"].values
    assert np.nanmin(frames) - 1e-6 <= live["trust"].min()
    assert live["trust"].max() <= np.nanmax(frames) + 1e-6
