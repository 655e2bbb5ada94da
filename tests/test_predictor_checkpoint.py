"""Laws of what a checkpoint holds of the predictor: another one goes on from it, by data alone."""

import asyncio
import json

import numpy as np
import pytest

from steering.inference import Predictor, PredictorSettings, ResumeState, SavedPolicy, SavedPredictor
from steering.inference.policy_host import PolicyHost
from steering.policies import Adaptive, GradientResidual, SpaceFilling, StopRule
from steering.records import Decision, Ids
from tests.test_inference import FIELD, GEOMETRY, PROBE, chunks, publish
from tests.test_predictor_loss import CANDIDATES, heard

COLUMNS = ("frame_id", "counts", "position", "residual", "live_residual", "trust", "version", "first_version", "error")


class Foreign:
    """The same order, by a class that shares nothing with ours and has no state to give."""

    def __init__(self, candidates):
        self.left = [tuple(where) for where in candidates.tolist()]
        self.ingested = 0

    def ingest(self, prediction, live):
        self.ingested += len(prediction.frame_id)

    def suggest(self, n):
        chosen, self.left = self.left[:n], self.left[n:]
        return Decision(positions=np.array(chosen), reasons=("mine",) * len(chosen), stop=not self.left)


KINDS = {
    "space-filling": lambda: SpaceFilling(CANDIDATES),
    "adaptive": lambda: Adaptive(CANDIDATES, beam=12.0),
    "gradient": lambda: GradientResidual(CANDIDATES, beam=12.0, stop=StopRule(ratio=0.01)),
    "foreign": lambda: Foreign(CANDIDATES),
}


def new(store, policy, **settings):
    settings = PredictorSettings(policy_share=1e-12, **settings)
    return Predictor(field=FIELD, geometry=GEOMETRY, probe=PROBE, policy=policy, store=store, settings=settings)


def saved(folder, part, later=()):
    """Through a file."""
    part = json.loads(json.dumps(part, allow_nan=False))
    return SavedPredictor(folder=folder, part=part, policy=SavedPolicy.read(part["policy"], later))


def ids(some):
    found = Ids()
    found.add(some)
    return found


def columns(me, scan="a"):
    return dict(zip(COLUMNS, me.scans.images[scan].frames.read(*COLUMNS), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0, 3, 7])
def test_another_predictor_goes_on_from_a_checkpoint_and_the_log(tmp_path, kind, cut):
    """Cut after some chunks, lost four later. Of what happened in between the log has all, half, or nothing: no frame
    is twice in the image or reported twice, and no position is decided twice."""
    store, folder = tmp_path / "models", tmp_path / "saved"
    folder.mkdir()
    publish(store, 0)
    sent = list(chunks(n=60))

    async def main():
        reported, decided, answers, part, first = [], [], [], None, set()
        me = new(store, KINDS[kind]())
        await me.start(ResumeState(version=0))
        for number, chunk in enumerate(sent[: cut + 4]):
            if number != cut + 1:
                await me.receive(chunk)
            if number % 2 == 0:
                answer = await me.suggest(6, action=number + 1)
                decided += answer.decision.positions
                answers.append(answer)
            if number == cut:
                await me.receive(sent[number + 1])  # acknowledged, and not told of
                first = {i for event in reported for i in event.frame_ids}
                part = await me.checkpoint(folder, "000001-0")
                image = me.scans.images["a"].stitcher.image()
            elif number != cut + 1:
                reported += await heard(me)
        reported += await heard(me)
        before = columns(me)
        other = new(store, KINDS[kind]())
        tail = [event for event in reported if event.scan == "a"]
        known = {i: event.version for event in tail for i in event.frame_ids}
        later = {i: version for i, version in known.items() if i not in first}
        await other.start(
            ResumeState(
                version=0,
                saved=(goes_on := saved(folder, part, answers)),
                answered=goes_on.policy.answered,
                predicted={"a": later},
                reported={"a": ids(first)},
            )
        )
        restored, image_after = len(other.scans.images["a"].frames), other.scans.images["a"].stitcher.image()
        for chunk in sent[: cut + 4]:  # the source gives more again than it need
            await other.receive(chunk)
        again = await heard(other)
        after = columns(other)
        rest = []
        while len(decided) + len(rest) < len(CANDIDATES):
            rest += (await other.suggest(7, action=100 + len(rest))).decision.positions
        await me.close()
        await other.close()
        return reported, again, decided + rest, before, after, image, image_after, restored

    reported, again, decided, before, after, image, image_after, restored = asyncio.run(main())
    assert restored == 5 * (cut + 2)
    n = 5 * (cut + 4)
    assert [i for event in (*reported, *again) for i in event.frame_ids] == list(range(n))
    assert not again
    for name in COLUMNS:
        np.testing.assert_array_equal(before[name][:restored], after[name][:restored])
    assert after["frame_id"].tolist() == list(range(n))
    np.testing.assert_allclose(image, image_after, atol=2e-5)
    assert len(decided) == len(set(decided)) == len(CANDIDATES)


def test_scans_that_are_over_and_frames_that_left_memory_are_there_again(tmp_path):
    """A predictor with little memory, two scans; a second checkpoint writes what is new alone, and that of a predictor
    which goes on from one nothing: it names the same files, and has little memory too."""
    store, folder = tmp_path / "models", tmp_path / "saved"
    folder.mkdir()
    publish(store, 0)

    async def main():
        me = new(store, SpaceFilling(CANDIDATES), memory_bytes=2**17)
        await me.start()
        for scan, first in (("a", 0), ("b", 100)):
            for chunk in chunks(scan, n=40, first=first):
                await me.receive(chunk)
        one = await me.checkpoint(folder, "000001-0")
        files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        for chunk in chunks("b", n=10, first=140, seed=3):
            await me.receive(chunk)
        two = await me.checkpoint(folder, "000002-0")
        assert all((folder / name).stat().st_mtime_ns == written for name, written in files.items())
        assert len(list(folder.iterdir())) > len(files)
        images = {scan: await me.dataset(scan) for scan in "ab"}
        others = []
        for part in (one, two):
            other = new(store, SpaceFilling(CANDIDATES), memory_bytes=2**17)
            told = {"a": ids(range(38)), "b": ids(range(100, 150))}
            await other.start(ResumeState(version=0, saved=saved(folder, part), reported=told))
            assert [event.frame_ids for event in await heard(other)] == [(38, 39)], "also of a scan that is over"
            there = set(folder.iterdir())
            again = await other.checkpoint(folder, f"{len(there):06d}-1")
            assert json.loads(json.dumps(again["scans"])) == json.loads(json.dumps(part["scans"]))
            assert set(folder.iterdir()) == there
            assert (await other.figures())["memory"]["moved_bytes"] > 0
            others.append({scan: await other.dataset(scan) for scan in "ab"})
            assert await other.is_over("a")
            assert not await other.is_over("b")
            await other.close()
        await me.close()
        return images, others

    images, (first, second) = asyncio.run(main())
    assert first["b"].sizes["frame"] == 40
    for scan, image in images.items():
        assert set(second[scan]) == set(image)
        for name in image:
            np.testing.assert_allclose(second[scan][name], image[name], atol=2e-5, err_msg=f"{scan} {name}")


def test_a_file_that_was_changed_is_refused(tmp_path):
    store, folder = tmp_path / "models", tmp_path / "saved"
    folder.mkdir()
    publish(store, 0)

    async def main():
        me = new(store, SpaceFilling(CANDIDATES))
        await me.start()
        for chunk in chunks(n=10):
            await me.receive(chunk)
        part = await me.checkpoint(folder, "000001-0")
        await me.close()
        [name] = part["scans"][0]["blocks"]
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        part["scans"][0]["blocks"] = ["../models/newest.json"]
        for wrong in ({}, {"blocks": [name]}):
            damaged = {**part, "scans": [{**part["scans"][0], **wrong}]}
            with pytest.raises(ValueError, match="expected"):
                await new(store, SpaceFilling(CANDIDATES)).start(ResumeState(version=0, saved=saved(folder, damaged)))

    asyncio.run(main())


def test_a_stop_that_the_log_knows_is_not_decided_again():
    """Saved before the last positions of a scan: what comes next are those of the next scan."""
    host = PolicyHost(SpaceFilling(CANDIDATES), {})
    state = json.loads(json.dumps(host.state()))
    answers = [host.suggest(40, action=1), host.suggest(40, action=2)]
    assert answers[1].decision.stop
    policy = SavedPolicy.read(state, answers)
    other = PolicyHost(SpaceFilling(CANDIDATES), {}, saved=policy, answered=policy.answered)
    assert other.suggest(40, action=2).decision == answers[1].decision
    again, expected = other.suggest(40, action=3).decision, host.suggest(40, action=3).decision
    assert (again.positions, again.stop) == (expected.positions, False)
