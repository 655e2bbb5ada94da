"""Laws of the last work on a scan: what it leaves depends on its frames and one version alone."""

import numpy as np
import pytest
import torch

from steering.inference import PredictorSettings, Table
from steering.labels.final import ALONE, FinalSettings, begin, go_on, hand_over
from steering.labels.make import make_labels
from steering.labels.refinement import LiveSettings, refine_live
from steering.models import ModelStore, ProbeFirst
from steering.ptychography import Refinement, RefineSettings, Stitcher, far_field_residual, patch_weight, refine
from tests.test_inference import CANVAS, PATCH, PROBE, WINDOW, chunks, columns_of, publish
from tests.test_labels import SETTINGS, Desk, actors, folder, predictor, wait_until_predicted  # noqa: F401

FRAMES = 60


def measured(actors, folder, **parts):  # noqa: F811
    """A predictor that has seen most frames of scan a by version 0, the last ones by version 1."""
    me = predictor(actors, folder, (("a", FRAMES - 20),), **parts)
    publish(folder.models, 1, noise=0.02, validation_residuals=(0.1,) * 40, validation_offsets=(0.5,) * 40)
    me.install(1).result()
    for chunk in chunks("a", 20, FRAMES - 20):
        me.receive(chunk).result()
    wait_until_predicted(me, FRAMES)
    return me


def finished(me, folder, **settings):  # noqa: F811
    """The report, and the scan as it is saved then: by version 1."""
    network = ProbeFirst(window=WINDOW, patch=PATCH, width=4)
    parts = {"network": network, "store": folder.models, "version": 1, "probe": PROBE}
    work = begin(me, "a", **parts, settings=FinalSettings(**settings))
    while not work.over:
        work = go_on(work, ALONE)
    return hand_over(work, me, "a"), me.live("a").result()


def test_what_a_scan_leaves_does_not_depend_on_what_was_done_while_it_was_measured(actors, folder, tmp_path):  # noqa: F811
    """One was refined and labelled while it was measured and is finished in the smallest parts; the other was not."""
    busy = measured(actors, folder)
    report, plain = finished(busy, folder, part_s=1e-9)
    again = measured(actors, type(folder).create(tmp_path / "other"))
    refine_live(again, "a", LiveSettings())
    make_labels(again, [actors(Desk())], "a", stratum=0, patch=PATCH, settings=SETTINGS)
    same, worked = finished(again, folder)
    assert report.passes == same.passes
    for name in set(plain.data_vars) - {"acquired", "residual"}:  # these tell of the measurement
        np.testing.assert_array_equal(plain[name].values, worked[name].values, err_msg=name)
    assert plain.attrs == worked.attrs


def test_every_column_and_the_image_are_by_the_version_at_the_end(actors, folder):  # noqa: F811
    me = measured(actors, folder)
    before = me.live("a").result()
    assert before.attrs["refinement"] == "as time allowed while the scan was measured"
    report, after = finished(me, folder)
    assert report.frames == FRAMES
    assert report.converged == after.attrs["refinement"].startswith("converged after")
    assert (after["frame_model_version"] == 1).all()
    frames = me.scan_frames("a", 0, FRAMES).result()
    with torch.inference_mode():
        outputs = ModelStore(folder.models).load(1)(torch.from_numpy(frames.counts.astype(np.float32)))
    patches = torch.polar(*outputs).numpy()
    residual = far_field_residual(patches, frames.counts, PROBE, frames.mask)
    np.testing.assert_allclose(after["residual_now"], residual, atol=1e-5)
    np.testing.assert_array_equal(after["residual"], before["residual"])  # what was known live
    stitcher = Stitcher(CANVAS, patch_weight(PROBE, PATCH))
    stitcher.add(patches, frames.position)
    said = np.isfinite(after["phase"].values)
    turn = np.exp(1j * after["phase"].values[said]) * stitcher.image()[said].conj()
    assert np.abs(np.angle(turn)).max() < 1e-3
    assert np.isfinite(after["frame_trust"]).all()
    assert report.residual < 0.5 * float(np.median(residual))


def test_what_the_refined_object_was_made_with_is_kept_beside_it(actors, folder):  # noqa: F811
    me = measured(actors, folder)
    assert "probe_refined" not in me.dataset("a").result()
    settings = RefineSettings(passes=6, probe_from_pass=1, positions_from_pass=2)
    finished(me, folder, refine=settings)
    after = me.dataset("a").result()
    assert after["probe_refined"].dims == ("mode", "probe_y", "probe_x")
    assert after["probe_refined"].shape == PROBE.shape
    assert not np.allclose(after["probe_refined"], PROBE)
    moved = np.hypot(*(after[f"position_{axis}_refined"] - after[f"position_{axis}"] for axis in "yx"))
    assert 0 < float(moved.max()) < 3  # recorded positions are right: only noise moves them
    folder.write_object("a", after)
    assert folder.objects()["a"].identical(after)


def test_frames_of_a_scan_that_is_over_are_there_whatever_the_memory(actors, folder):  # noqa: F811
    """And a scan of which nothing is made stays as it was."""
    me = predictor(actors, folder, (("a", 40), ("b", 20)), settings=PredictorSettings(memory_bytes=1))
    assert len(me.scan_frames("a", 0, 100).result().counts) == 40
    assert me.scan_frames("a", 40, 100).result() is None
    before = me.live("a").result()
    me.conclude("a", None).result()
    assert len(me.scan_frames("a", 0, 100).result().counts) == 40
    assert before.identical(me.live("a").result())


def test_a_scan_whose_counts_are_partly_gone_is_refused_and_not_taken_for_a_shorter_one(actors, folder):  # noqa: F811
    me = measured(actors, folder)
    live = me.thing.scans.images["a"]
    lacking = Table()
    for first in range(0, FRAMES, 16):
        block = columns_of(live, slice(first, min(first + 16, FRAMES)))
        if first == 32:
            del block["counts"]  # as where they could not be moved to a full disk
        lacking.restore(block, 16)
    live.frames = lacking
    with pytest.raises(ValueError, match="found the counts of 16 frames of scan 'a' no longer kept"):
        finished(me, folder)


def test_refinement_in_parts_is_refinement_at_once_and_ends_where_it_gains_nothing():
    rng = np.random.default_rng(0)
    measured = list(chunks("a", 40))
    counts = np.concatenate([chunk["counts"].values for chunk in measured])
    where = np.concatenate([np.stack([c["position_y"], c["position_x"]], 1) for c in measured])
    settings = RefineSettings(passes=30, batch=8, least_gain=0.02, gain_passes=5, probe_from_pass=1)
    whole = refine(counts, where, PROBE, CANVAS, settings=settings)
    parts = Refinement(counts, where, PROBE, CANVAS, settings=settings)
    medians = []
    while not parts.over:
        parts.go_on(lambda: rng.random() < 0.2)
        if parts.passes % 5 == 0 and len(medians) < parts.passes // 5:
            medians.append(parts.residual)
    np.testing.assert_array_equal(parts.result().object, whole.object)
    assert parts.converged
    assert 10 <= parts.passes < 30
    unending = Refinement(counts, where, PROBE, CANVAS, settings=RefineSettings(passes=3, batch=8))
    unending.go_on()
    assert (unending.passes, unending.converged) == (3, False)
