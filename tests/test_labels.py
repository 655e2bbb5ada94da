"""Laws of labels: those made by refinement, those from outside, and the refinement of the live image in between."""

import asyncio
import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

from steering.campaign import replay
from steering.clusters import local
from steering.inference import HoldOut, Predictor, PredictorSettings
from steering.labels.external import external_figures, put_away, take_in, waiting
from steering.labels.make import label, make_labels
from steering.labels.refinement import refine_live
from steering.learning.samples import Labels, Samples
from steering.policies import SpaceFilling
from steering.ptychography import RefineSettings, extract_patches
from steering.records import Field
from steering.runner import LabelSettings, LiveSettings, RunFolder, hand_in, start
from tests.test_inference import CANVAS, FIELD, GEOMETRY, PATCH, PROBE, WINDOW, chunks, publish, thing
from tests.test_runner import experiment, told, wait_for

SETTINGS = LabelSettings(first=RefineSettings(passes=8, alpha=0.1), again=RefineSettings(passes=2, alpha=0.1))


class Actor:
    """A thing whose async methods are called from other threads, as Dask calls those of its actors."""

    def __init__(self, thing):
        self.thing = thing
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def __getattr__(self, name):
        return lambda *given: asyncio.run_coroutine_threadsafe(getattr(self.thing, name)(*given), self.loop)

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Desk:
    """What a rank does with labels that come, before it trains on them."""

    def __init__(self):
        self.samples = Samples(seed=0, keep_all=True)
        self.came = []

    async def receive(self, labels):
        self.came.append(labels)
        self.samples.add(labels)
        return self.samples.count(labels.scan)


@pytest.fixture
def actors():
    made = []
    yield lambda thing: made.append(Actor(thing)) or made[-1]
    for actor in made:
        actor.close()


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run")


def predictor(actors, folder, frames=(("a", 40),), **parts):
    """A predictor that has seen these scans, of the object of their number."""
    publish(folder.models, 0)
    me = actors(Predictor(
        field=FIELD,
        geometry=GEOMETRY,
        probe=PROBE,
        policy=parts.pop("policy", SpaceFilling(np.random.default_rng(0).uniform(-20, 20, (50, 2)))),
        store=folder.models,
        **parts,
    ))  # fmt: skip
    me.start().result()
    first = 0
    for seed, (scan, n) in enumerate(frames):
        for chunk in chunks(scan, n, first, seed):
            me.receive(chunk).result()
        first += n
    wait_until_predicted(me, first)
    return me


def wait_until_predicted(me, n):
    while me.figures().result()["frames_predicted"] < n:
        time.sleep(0.005)


def frames_by_id(n=40, first=0, seed=0):
    """Counts, positions and true patches of a scan."""
    measured = list(chunks("x", n, first, seed))
    counts = np.concatenate([chunk["counts"].values for chunk in measured])
    where = np.concatenate([np.stack([c["position_y"], c["position_x"]], 1) for c in measured])
    where = where / measured[0].attrs["object_pixel"]
    ids = np.concatenate([chunk["frame"].values for chunk in measured])
    return ids, counts, extract_patches(thing(seed), CANVAS, where, PATCH)


def opened(me, folder, ranks, *, scans=("a", "b"), settings=SETTINGS):
    """Take in everything that is in the door, the newest first; the reports."""
    strata = {scan: number for number, scan in enumerate(scans)}
    reports = []
    for path in sorted((folder.path / "labels").glob("*.npz"), reverse=True):
        report = take_in(me, ranks, path, strata=strata, patch=PATCH, settings=settings)
        put_away(path, report)
        reports.append(report)
    return reports


def refusals(reports):
    found = {}
    for report in reports:
        for reason, count in report.refused.items():
            found[reason] = found.get(reason, 0) + count
    return found


class TestFromOutside:
    """Labels that another process puts into the door of a run."""

    def test_late_labels_find_their_frames_in_any_order_and_after_the_scan(self, actors, folder):
        """Two scans, shuffled, in several files, the newest first; two models were published since."""
        me = predictor(actors, folder, (("a", 40), ("b", 40)))
        for version in (1, 2):
            publish(folder.models, version)
            me.install(version).result()
        desks = [actors(Desk()), actors(Desk())]
        truth = {}
        for seed, scan in enumerate("ab"):
            ids, counts, patches = frames_by_id(40, 40 * seed, seed)
            truth |= {frame: (counts[i], patches[i]) for i, frame in enumerate(ids.tolist())}
            for part in np.array_split(np.random.default_rng(seed).permutation(40), 3):
                hand_in(folder.path, scan, ids[part], patches=patches[part])
        reports = opened(me, folder, desks)
        assert sum(r.count + r.held_out for r in reports) + refusals(reports).get("does not explain its frame", 0) == 80
        assert sum(r.count + r.held_out for r in reports) > 70
        assert {v for r in reports for v in r.versions_late} == {2}
        assert all(0 < s < 600 for r in reports for s in r.late_s)
        for desk in desks:
            for labels in desk.thing.came:
                for i, frame in enumerate(labels.frame_id.tolist()):
                    np.testing.assert_array_equal(labels.counts[i], truth[frame][0])
                    np.testing.assert_allclose(labels.amplitude[i], np.abs(truth[frame][1]), atol=1e-5)
                    assert labels.stratum == (frame >= 40)
                np.testing.assert_array_equal(labels.held_out, HoldOut().held_out(labels.frame_id))
        told = external_figures(reports, 0)
        assert told["versions_late"] == {"p50": 2, "max": 2}
        assert told["files"] == 6
        assert not list((folder.path / "labels").glob("*.npz"))

    def test_unknown_repeated_and_withheld_frames_are_counted_and_refused(self, actors, folder):
        hold_out = HoldOut(region=Field(-20, 0, -20, 20))
        me = predictor(actors, folder, hold_out=hold_out)
        ids, _, patches = frames_by_id()
        hand_in(folder.path, "a", [*ids, 3, 1000, 1001], patches=np.concatenate([patches, patches[:3]]))
        hand_in(folder.path, "z", ids, patches=patches)
        desk = actors(Desk())
        reports = opened(me, folder, [desk])
        found = refusals(reports)
        assert found["frame not known"] == 2
        assert found["frame given a second time"] == 1
        assert found["scan not known"] == 40
        withheld = me.label_frames("a", 100).result().withheld
        assert found["frame kept from training"] == withheld.sum() > 5
        came = {frame for labels in desk.thing.came for frame in labels.frame_id.tolist()}
        assert came
        assert not came & set(ids[withheld].tolist())
        taught = {frame for scan in desk.thing.samples.scans.values() for frame in scan.train}
        assert not hold_out.held_out(np.array(list(taught))).any()
        assert (folder.path / "labels" / "refused").is_dir()

    def test_wrong_labels_are_left_out_by_their_own_residual(self, actors, folder):
        """Patches of another object among the right ones, and a constant phase that all of them share."""
        me = predictor(actors, folder)
        ids, _, patches = frames_by_id()
        wrong = np.arange(40) % 5 == 0
        _, _, other = frames_by_id(40, 0, 7)
        mixed = np.where(wrong[:, None, None], strong(other), patches) * np.exp(2j)
        hand_in(folder.path, "a", ids, patches=mixed)
        desk = actors(Desk())
        [report] = opened(me, folder, [desk])
        came = {frame for labels in desk.thing.came for frame in labels.frame_id.tolist()}
        assert report.refused["does not explain its frame"] >= wrong.sum()
        assert not came & set(ids[wrong].tolist())
        assert len(came) > 25
        own = me.label_frames("a", 40).result()
        shown = extract_patches(own.predicted, own.canvas, own.position, PATCH)
        labels = desk.thing.came[0]
        rows = [own.frame_id.tolist().index(frame) for frame in labels.frame_id.tolist()]
        turn = np.vdot(labels.amplitude * np.exp(1j * labels.phase), shown[rows])
        assert abs(np.angle(turn)) < 0.3  # in step with the network's image

    def test_labels_of_another_scale_are_refused(self, actors, folder):
        """The residual does not see the scale, and a network that learns it would be wrong by as much."""
        me = predictor(actors, folder)
        ids, _, patches = frames_by_id()
        hand_in(folder.path, "a", ids, patches=100 * patches)
        [report] = opened(me, folder, [actors(Desk())])
        assert report.refused == {"amplitude not of a transmission's scale": 40}

    def test_an_object_is_cut_where_frames_were_measured(self, actors, folder):
        me = predictor(actors, folder)
        ids, _, patches = frames_by_id()
        part = (slice(None), slice(0, CANVAS.shape[1] - 20))
        hand_in(folder.path, "a", ids, object=thing()[part], origin=CANVAS.origin)
        desk = actors(Desk())
        [report] = opened(me, folder, [desk])
        assert report.count > 15
        assert report.refused["frame outside the object"] > 3
        for labels in desk.thing.came:
            np.testing.assert_allclose(labels.amplitude, np.abs(patches[labels.frame_id]), atol=1e-3)

    @pytest.mark.parametrize("disk", [True, False], ids=["a disk", "no disk"])
    def test_old_frames_come_back_from_the_run_folder(self, actors, folder, disk, caplog):
        """Without room in memory, counts of a scan that is over are read from files; where these cannot be written,
        what is lost is counted, and the current scan goes on."""
        if not disk:
            (folder.path / "frames").write_text("in the way")
        me = predictor(actors, folder, (("a", 40), ("b", 20)), settings=PredictorSettings(memory_bytes=1))
        while me.figures().result()["memory"]["held_bytes"] > 5e6:  # until those of scan a are gone
            time.sleep(0.01)
        hand_in(folder.path, "a", np.arange(40), object=thing(0), origin=CANVAS.origin)
        hand_in(folder.path, "b", np.arange(40, 60), object=thing(1), origin=CANVAS.origin)
        late, present = opened(me, folder, [actors(Desk())])[::-1]
        assert late.refused == ({} if disk else {"frame no longer kept": 40})
        assert (late.count > 25) == disk
        assert present.count > 10
        assert disk == (not caplog.records)
        assert not (
            folder.path / "frames"
        ).is_dir()  # files without a name: nothing is left behind, whatever ends the run

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"no archive", "damaged"),
            ({"scan": "a"}, "expected scan and frame_id"),
            ({"scan": "a", "frame_id": np.arange(2), "patches": np.array([{}, {}])}, "pickle"),
            ({"scan": "a", "frame_id": np.arange(2), "patches": np.ones((2, 8, 8))}, r"expected (16, 16)"),
            ({"scan": "a", "frame_id": np.arange(3), "patches": np.ones((2, 16, 16))}, "for 3 frame ids"),
            ({"scan": "a", "frame_id": np.arange(2), "patches": np.full((2, 16, 16), np.nan)}, "finite"),
            ({"scan": "a", "frame_id": np.arange(2.0), "patches": np.ones((2, 16, 16))}, "integers"),
            ({"scan": "a", "frame_id": np.arange(2)}, "neither"),
            ({"scan": "a", "frame_id": [1], "object": np.ones((9, 9)), "origin": [np.nan, 0]}, "origin"),
        ],
    )
    def test_a_file_that_is_not_right_is_refused_in_words(self, actors, folder, content, expected):
        me = predictor(actors, folder)
        (folder.path / "labels").mkdir()
        file = folder.path / "labels" / "strange.npz"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            np.savez(file, **content)
        desk = actors(Desk())
        [report] = opened(me, folder, [desk])
        [reason] = report.refused
        assert expected in reason
        assert not desk.thing.came

    def test_what_the_run_would_refuse_is_not_handed_in(self, folder):
        with pytest.raises(ValueError, match="both patches and object"):
            hand_in(folder.path, "a", [1], patches=np.ones((1, 4, 4)), object=np.ones((4, 4)))
        with pytest.raises(ValueError, match="expected integers"):
            hand_in(folder.path, "a", [1.5], patches=np.ones((1, 4, 4)))
        assert not (folder.path / "labels").exists()

    def test_a_file_is_opened_once_it_is_no_longer_written_to(self, folder):
        path = hand_in(folder.path, "a", [1], object=np.ones((4, 4)))
        assert waiting(folder.path) == []
        while not (found := waiting(folder.path)):
            time.sleep(0.05)
        assert found == [path]
        assert time.time() - path.stat().st_mtime > 0.9


def strong(patches):
    """Patches of far more contrast."""
    return np.exp(6j * np.angle(patches)) * (0.6 + 0.4 * np.cos(np.arange(PATCH)))


class TestMade:
    """Labels made by refinement."""

    def test_labels_know_their_residual_and_frames_of_something_else_teach_nothing(self, actors, folder):
        """A tenth of the frames show what is not in the beam: their labels are left out, and counted."""
        me = predictor(actors, folder, (("a", 120),))
        frames = me.label_frames("a", 400).result()
        foreign = np.arange(120) % 12 == 3
        frames.counts[foreign] = np.random.default_rng(0).poisson(20, (foreign.sum(), WINDOW, WINDOW))
        labels, _, left_out = label(frames, stratum=0, patch=PATCH, settings=SETTINGS)
        assert left_out >= foreign.sum() - 1
        assert not set(labels.frame_id.tolist()) & set(frames.frame_id[foreign & ~frames.held_out].tolist())
        assert len(labels.frame_id) > 70
        assert labels.residual.max() <= SETTINGS.worst * np.median(labels.residual) * 1.5
        np.testing.assert_array_equal(labels.held_out, HoldOut().held_out(labels.frame_id))

    def test_held_out_frames_change_no_label(self, actors, folder):
        """Whatever the detector shows in frames that are held out or withheld, what is taught is the same."""
        me = predictor(actors, folder, hold_out=HoldOut(region=Field(-20, -10, -20, 20)))
        frames = me.label_frames("a", 400).result()
        before, _, _ = label(frames, stratum=0, patch=PATCH, settings=SETTINGS)
        frames.counts[frames.held_out | frames.withheld] = 7
        after, _, _ = label(frames, stratum=0, patch=PATCH, settings=SETTINGS)
        assert not set(after.frame_id.tolist()) & set(frames.frame_id[frames.withheld].tolist())
        np.testing.assert_array_equal(before.phase[~before.held_out], after.phase[~after.held_out])

    def test_every_rank_gets_its_share_and_newer_labels_take_the_place_of_older(self, actors, folder):
        me = predictor(actors, folder, (("a", 80),))
        desks = [actors(Desk()), actors(Desk())]
        for _ in range(2):
            report = make_labels(me, desks, "a", stratum=0, patch=PATCH, settings=SETTINGS)
        assert report.count == sum(len(desk.thing.samples) for desk in desks) > 50
        for desk in desks:
            first, again = desk.thing.came
            both, i, j = np.intersect1d(first.frame_id, again.frame_id, return_indices=True)
            assert len(both) > 20
            kept = desk.thing.samples.scans["a"].train
            for frame, old, new in zip(both.tolist(), i, j, strict=True):
                if frame in kept:
                    np.testing.assert_array_equal(kept[frame]["phase"].numpy(), again.phase[new])
                    assert (first.phase[old] != again.phase[new]).any()

    def test_labels_count_once_every_rank_has_frames_and_otherwise_say_why_not(self, actors, folder):
        """Of 40 frames not every one of 48 ranks gets some. Frames of earlier labels count as well."""
        me, desks = predictor(actors, folder), [actors(Desk()) for _ in range(48)]
        report = make_labels(me, desks, "a", stratum=0, patch=PATCH, settings=SETTINGS)
        assert report.count == 0
        lacking = [str(k) for k, desk in enumerate(desks) if not desk.thing.samples.count("a")]
        assert report.reason.startswith(f"rank {', '.join(lacking)} of 48 has none of the ")
        some = next(desk.thing.came[0] for desk in desks if len(desk.thing.came[0].frame_id))
        for desk in desks:
            desk.thing.samples.add(dataclasses.replace(some, **more(some)))
        again = make_labels(me, desks, "a", stratum=0, patch=PATCH, settings=SETTINGS)
        assert again.count > 20
        assert again.reason == ""


def more(labels):
    """The first frame of labels, as one to train on with another id."""
    part = {name: getattr(labels, name)[:1] for name in ("counts", "amplitude", "phase", "residual")}
    return {**part, "frame_id": np.array([1000]), "held_out": np.array([False])}


class TestLive:
    """The live image's refinement: as time allows means that frames come first."""

    def test_it_gets_no_frames_while_any_waits(self, actors, folder):
        """It asks while the predictor is at work; frames that come after it has asked still go first."""
        at_work, go_on = threading.Event(), threading.Event()

        class Slow(SpaceFilling):
            def ingest(self, prediction, live):
                at_work.set()
                go_on.wait(20)

        go_on.set()
        me = predictor(actors, folder, policy=Slow(np.zeros((1, 2))))
        more = list(chunks("a", 15, 40, 5))
        go_on.clear()
        at_work.clear()
        me.receive(more[0]).result()
        at_work.wait(20)
        asked = me.spare_frames("a", 64)
        for chunk in more[1:]:
            me.receive(chunk).result()
        go_on.set()
        assert asked.result() is None
        wait_until_predicted(me, 55)
        assert len(me.spare_frames("a", 50).result().frame_id) == 50

    def test_it_goes_on_from_what_is_shown_and_explains_frames_better_than_the_network(self, actors, folder):
        me = predictor(actors, folder, (("a", 120),))
        assert "phase_refined" not in me.live().result()
        residuals = []
        for _ in range(3):
            refine_live(me, "a", LiveSettings(window=120))
            residuals.append(np.median(me.label_frames("a", 1).result().refined.residual))
        live = me.live().result()
        assert np.isfinite(live["phase_refined"].values).any()
        assert residuals[-1] < residuals[0] < np.median(live["residual"].values)

    def test_each_pixel_knows_its_trust_and_its_version(self, actors, folder):
        """Where a version with validation frames has said something there is a trust; frames that
        came later brought their version."""
        me = predictor(actors, folder)
        publish(folder.models, 1, validation_residuals=(0.1,) * 40, validation_offsets=(0.5,) * 40)
        me.install(1).result()
        for chunk in chunks("a", 20, 40, 9):
            me.receive(chunk).result()
        wait_until_predicted(me, 60)
        live = me.live().result()
        said = np.isfinite(live["phase"].values)
        np.testing.assert_array_equal(np.isfinite(live["pixel_residual"].values), said)
        versions = live["model_version"].values
        assert np.isfinite(live["trust"].values[versions == 1]).all()
        assert not np.isfinite(live["trust"].values[~said]).any()
        assert set(np.unique(versions[np.isfinite(versions)])) <= {0, 1}
        newest = live.isel(frame=slice(40, None))
        pixel = GEOMETRY.object_pixel
        for y, x in zip(newest["position_y"].values, newest["position_x"].values, strict=True):
            at = live["model_version"].sel(y=y, x=x, method="nearest", tolerance=pixel)
            assert at == 1

    def test_an_older_refinement_never_takes_the_place_of_a_newer_one(self, actors, folder):
        me = predictor(actors, folder)
        desk = actors(Desk())
        begun = me.label_frames("a", 100).result()
        refine_live(me, "a", LiveSettings())
        newer = me.label_frames("a", 100).result()
        assert not me.take_live("a", newer.refined, newer.canvas, begun.refinements).result()
        make_labels(me, [desk], "a", stratum=0, patch=PATCH, settings=SETTINGS)
        assert not me.take_live("a", newer.refined, newer.canvas, newer.refinements).result()
        assert me.take_live("a", newer.refined, newer.canvas, newer.refinements + 1).result()

    def test_bad_dials_are_refused(self):
        with pytest.raises(ValueError, match="part of a core"):
            LiveSettings(share=0)


def labels_of(scan, ids, value, residual=0.1):
    """Labels whose counts are the value; every tenth is held out."""
    n = len(ids)
    return Labels(
        scan=scan,
        stratum=ord(scan),
        frame_id=np.array(ids),
        counts=np.full((n, 4, 4), value, np.uint16),
        amplitude=np.ones((n, 2, 2), np.float32),
        phase=np.zeros((n, 2, 2), np.float32),
        residual=np.full(n, residual, np.float32),
        held_out=np.array(ids) % 10 == 9,
        probe=None,
        mask=np.zeros((4, 4), bool),
    )


def test_labels_of_a_scan_that_is_over_are_drawn_once_and_a_newer_one_goes_first():
    """They join the scan that is learnt, so that the rehearsal buffer is offered them; nothing else comes back."""

    samples = Samples(seed=0, keep_all=False)
    samples.add(labels_of("a", range(10), 1))
    samples.begin("a")
    samples.add(labels_of("b", range(10, 20), 2))
    samples.begin("b")
    samples.add(labels_of("a", [3, 4, 9], 3))
    samples.add(labels_of("a", [4, 5], 4))
    samples.begin("b")
    out = {name: torch.zeros((60, *value.shape), dtype=value.dtype) for name, value in samples.example().items()}
    samples.take(60, out)
    drawn = out["counts"][:, 0, 0].tolist()
    assert sorted(value for value in drawn if value != 2) == [3, 4, 4]
    assert set(out["stratum"][[value != 2 for value in drawn]].tolist()) == {ord("a")}
    assert samples.seen == {"a": 9, "b": 9}


def test_of_two_labels_of_a_frame_the_newer_stays_unless_it_is_clearly_worse():
    """Whatever the order in which refinement and the outside send them; what is held out is never taught."""
    samples = Samples(seed=0, keep_all=False)
    for value, residual in ((1, 0.1), (2, 0.105), (3, 0.2), (4, 0.05), (5, 0.1)):
        samples.add(labels_of("a", [3, 9], value, residual))
    samples.begin("a")
    out = {name: torch.zeros((5, *value.shape), dtype=value.dtype) for name, value in samples.example().items()}
    samples.take(5, out)
    assert (out["counts"] == 4).all()
    assert samples.seen == {"a": 1}
    assert len(samples.held_out("a")["counts"]) == 1


@pytest.mark.slow
def test_a_running_campaign_takes_labels_in_and_tells_how_late_they_were(tmp_path):
    """The truth of frames by id, put into the run's folder while it goes on, and rubbish beside it."""
    folder = RunFolder.create(tmp_path / "run")
    parts = experiment(frames=5000)  # more than it will measure: it is stopped once the labels are in
    truth, canvas = parts.source.truth("brick")
    with local(ranks=1) as client:
        run = start(dataclasses.replace(parts, ranks=1), client, folder)
        wait_for(folder, "LabelsReady", run)
        (folder.path / "labels").mkdir()
        (folder.path / "labels" / "rubbish.npz").write_bytes(b"not an archive")
        hand_in(folder.path, "brick", np.arange(35), object=truth, origin=canvas.origin)
        while len(told(folder, "ExternalLabelsRead")) < 2:
            assert not run.done, run.result()
            time.sleep(0.05)
        run.command("stop")
        figures = run.result()
    came = figures["labels"]["from_outside"]
    assert came["files"] == 2
    assert came["labels"] + came["held_out"] + came["refused"].get("does not explain its frame", 0) == 35
    assert came["labels"] > 15
    assert came["late_s"]["max"] >= came["late_s"]["p50"] > 0
    assert came["versions_late"]["p50"] is not None
    assert any("damaged" in reason for reason in came["refused"])
    assert figures["live_image"]["refinements"] > 0
    assert figures["frames_predicted"] == figures["frames_acquired"]
    assert (folder.path / "labels" / "refused" / "rubbish.npz").is_file()
    assert replay(folder.events())[0].finished
    assert [event["reason"] for event in told(folder, "ScanRefined")] == ["the run was stopped by a person"]


@pytest.mark.parametrize("name", ["first", "again", "live"])
def test_positions_are_corrected_in_the_last_refinement_alone(name):
    refine = RefineSettings(passes=3, positions_from_pass=1)
    with pytest.raises(ValueError, match=f"found positions_from_pass=1 in {name}, expected it in final"):
        LabelSettings(**{name: LiveSettings(refine=refine) if name == "live" else refine})
