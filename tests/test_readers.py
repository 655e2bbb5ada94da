"""Laws of reading while others write: what is read is whole, and what was kept up to date is what all of it gives."""

import asyncio
import collections
import threading

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from steering.campaign import DecisionSuggested, PredictionReady
from steering.inference import LiveImage, PredictorSettings, ScanReader, Table
from steering.inference.intake import FrameOrder
from steering.inference.latency import Latency
from steering.inference.policy_host import PolicyAnswer
from steering.inference.policy_replay import PolicyReplay
from steering.policies import SpaceFilling
from steering.ptychography import Canvas, Stitcher, extract_patches, neighbour_offset, patch_weight
from steering.records import Decision, Field, Prediction
from tests.test_inference import CANVAS, FIELD, GEOMETRY, PATCH, PROBE, chunks, predictor, publish, thing

WEIGHT = patch_weight(PROBE, PATCH)


def filled(live, n, seed, version=0, trust=0.5):
    """Add n frames at random places."""
    rng = np.random.default_rng(seed)
    where = rng.uniform(-20, 20, (n, 2))
    patches = extract_patches(thing(seed), CANVAS, where, PATCH)
    first = len(live.frames)
    prediction = Prediction(
        frame_id=np.arange(first, first + n),
        scan="a",
        position=where,
        amplitude=np.abs(patches),
        phase=np.angle(patches),
        residual=rng.uniform(0, 1, n).astype(np.float32),
        offset=live.stitch(patches, where),
        model_version=np.full(n, version),
    )
    flags = dict.fromkeys(("held_out", "withheld", "judged"), np.zeros(n, bool))
    trusts = np.where(rng.uniform(size=n) < 0.3, np.nan, trust)
    live.add(prediction, trust=trusts, patch=patches, counts=np.zeros((n, 2, 2), np.uint16),
             error=np.zeros(n, np.float32), acquired=np.zeros(n), **flags)  # fmt: skip


def improved(live, rows, seed, version):
    rng = np.random.default_rng(seed)
    (where,) = live.frames.read("position", rows=rows)
    patches = extract_patches(thing(seed), CANVAS, where, PATCH)
    trust = np.where(rng.uniform(size=len(rows)) < 0.3, np.nan, rng.uniform(size=len(rows)))
    offset, residual = live.stitch_anew(rows, patches), rng.uniform(0, 1, len(rows)).astype(np.float32)
    said = {"offset": offset, "residual": residual, "trust": trust, "version": np.full(len(rows), version)}
    live.frames.set(rows, patch=patches, **said)


@pytest.mark.parametrize("canvas", [CANVAS, Canvas.around(Field(-600, 600, -40, 40), 32)], ids=["whole", "halved"])
def test_a_picture_kept_up_to_date_is_the_one_that_is_made_anew(canvas):
    """After additions, improvements, and a version that goes back to an older one; whole and made smaller."""
    live = LiveImage("a", canvas, WEIGHT, GEOMETRY, (thing(), CANVAS))
    reader = ScanReader(live)
    filled(live, 30, 1)
    reader.picture()
    for step, version in enumerate((3, 2, 5, 1)):
        filled(live, 20, 10 + step, version=version)
        improved(live, np.arange(step, 30, 3), 20 + step, version)
        kept, anew = reader.picture(), ScanReader(live).picture()
        assert max(kept.sizes["y"], kept.sizes["x"]) <= 1024
        assert set(kept) == set(anew)
        for name in kept.data_vars:
            np.testing.assert_allclose(kept[name], anew[name], atol=2e-4, err_msg=name)
    whole = reader.dataset()
    assert whole.sizes["y"], whole.sizes["x"] == canvas.shape
    light = whole["amplitude"].values[np.isfinite(whole["amplitude"].values)]
    np.testing.assert_allclose(light, np.abs(live.stitcher.image()[live.stitcher.weight > 0.05]), atol=1e-6)
    part = reader.picture((slice(0, 40), slice(10, 30)))
    np.testing.assert_allclose(part["amplitude"], whole["amplitude"][:40, 10:30], atol=1e-6)


def test_what_is_read_is_whole_while_another_thread_writes():
    """Each row of a table, and each pixel of an image: light and weight belong together, whenever they are read."""
    table, stop = Table(), threading.Event()
    table.append(np.arange(500), a=np.zeros(500), b=np.zeros(500))
    canvas = Canvas((200, 200), (0.0, 0.0))
    stitcher = Stitcher(canvas, np.ones((30, 30), np.float32))
    where = np.random.default_rng(0).uniform(20, 180, (40, 2))

    def write():
        step = 0
        while not stop.is_set():
            step += 1
            rows = np.arange(step % 400, step % 400 + 50)
            table.set(rows, a=np.full(50, step), b=np.full(50, -step))
            stitcher.add(np.full((1, 30, 30), 2 + 0j), where[step % 40][None])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        copy = stitcher.copy()
        for _ in range(150):
            a, b = table.read("a", "b")
            np.testing.assert_array_equal(a, -b)
            copy.update()
            seen = copy.weight > 1e-3
            np.testing.assert_allclose(copy.image[seen], 2, atol=1e-4)
    finally:
        stop.set()
        writer.join()
    copy.update()
    np.testing.assert_allclose(copy.image, stitcher.image(), atol=1e-5)


def test_what_was_forgotten_is_as_if_it_had_never_been():
    """Offsets are measured against what came after, as with an image that holds nothing else."""
    rng = np.random.default_rng(0)
    where = rng.uniform(-20, 20, (60, 2))
    patches = extract_patches(thing(), CANVAS, where, PATCH)
    forgetful, fresh = Stitcher(CANVAS, WEIGHT, single=True), Stitcher(CANVAS, WEIGHT)
    forgetful.add(patches[:30] * 1j, where[:30])
    forgetful.forget()
    for n in range(30, 60):
        for stitcher in (forgetful, fresh):
            stitcher.add(patches[n : n + 1], where[n : n + 1])
        offsets = [neighbour_offset(patches[n : n + 1], where[n : n + 1], s) for s in (forgetful, fresh)]
        np.testing.assert_allclose(*offsets, atol=1e-4)


def test_trust_by_offset_comes_back_while_frames_never_pause(tmp_path):
    """A version is swapped in and there is never time to predict old frames again: new frames that overlap are
    evidence all the same."""

    async def main():
        me = predictor(tmp_path)
        await me.start()
        me.fast.later = lambda seconds: None  # as if no moment were ever free
        publish(tmp_path, 1, noise=0.01, validation_residuals=(0.5,) * 19, validation_offsets=(0.5,) * 19)
        for chunk in chunks(n=30):
            await me.receive(chunk)
        await me.live()
        await me.events()
        await me.install(1, canary=False)
        for chunk in chunks(n=60, first=100, seed=1):
            await me.receive(chunk)
        await me.live()
        return await me.events(), (await me.figures())["frames_to_revise"]

    events, behind = asyncio.run(main())
    trust = [share for e in events if isinstance(e, PredictionReady) for share in e.trust_by_offset]
    assert behind == 30  # none of the older version's frames was looked at
    assert np.isfinite(trust[30:]).mean() > 0.8


def test_the_image_of_an_old_scan_leaves_memory_and_comes_back(tmp_path):
    async def main():
        me = predictor(tmp_path / "models", settings=PredictorSettings(memory_bytes=1), truths={"a": (thing(), CANVAS)})
        await me.start()
        for chunk in chunks("a", 40):
            await me.receive(chunk)
        before, score = await me.dataset("a"), await me.evaluate("a", (0,))
        for chunk in [*chunks("b", 20, first=40), *chunks("c", 20, first=60)]:
            await me.receive(chunk)
        while (await me.figures())["memory"]["moved_bytes"] < before["phase"].size * 24:
            await asyncio.sleep(0.01)
        frames, gone = await me.late_frames("a", np.arange(10))
        return before, await me.dataset("a"), score, await me.evaluate("a", (0,)), frames, gone

    before, after, score, again, frames, gone = asyncio.run(main())
    assert before.equals(after)
    assert score == again
    assert gone == 0
    first = next(chunks("a", 40))
    np.testing.assert_array_equal(frames.counts[:5], first["counts"].values)


def as_suggested(decision):
    positions = tuple((float(y), float(x)) for y, x in decision.positions)
    return DecisionSuggested(time=0.0, positions=positions, reasons=decision.reasons, dwell=None, stop=decision.stop)


class Moody:
    """A policy that gives each candidate once, in an order that follows its mood, and then ends the scan."""

    def __init__(self, n, mood):
        self.left, self.rng = list(range(n)), np.random.default_rng(mood)

    def suggest(self, n):
        self.rng.shuffle(self.left)
        given, self.left = self.left[:n], self.left[n:]
        return Decision(
            positions=np.array([(i, 0.0) for i in given]).reshape(-1, 2),
            reasons=("mood",) * max(1, len(given)),
            stop=not self.left,
        )


@given(st.integers(0, 50), st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_a_policy_that_changes_its_mind_decides_nothing_twice_and_loses_nothing(mood, asks, later):
    """Lost after some answers, it goes on from the start with another mood: of all candidates each is decided once."""
    n = sum(asks) + 8
    first = Moody(n, mood)
    answers = [PolicyAnswer(decision=as_suggested(first.suggest(k)), asked=k, ingested={}) for k in asks]
    decided = collections.Counter(where for answer in answers for where in answer.decision.positions)
    policy, replay = Moody(n, mood + 1000), PolicyReplay(answers)
    replay.catch_up(policy, None)
    for _ in range(2 * n):
        decision = replay.suggest(policy, later)
        decided.update((float(y), float(x)) for y, x in decision.positions)
        if decision.stop:
            break
        replay = PolicyReplay((), replay.open)  # saved, and taken up by another
    assert decided == collections.Counter((float(i), 0.0) for i in range(n))
    assert decision.stop


def test_a_scan_that_was_ended_is_over_also_to_a_policy_that_goes_on_elsewhere():
    first, second = (SpaceFilling(np.random.default_rng(3).uniform(-20, 20, (10, 2))) for _ in range(2))
    answers = []
    for ended in ("", "the scan has its 3 frames"):
        if ended:
            first.ended(ended)
        answers.append(PolicyAnswer(decision=as_suggested(first.suggest(3)), asked=3, ingested={}, ended=ended))
    assert answers[0].decision.positions == answers[1].decision.positions  # of the next scan
    replay = PolicyReplay(answers)
    replay.catch_up(second, None)
    np.testing.assert_array_equal(replay.suggest(second, 7).positions, first.suggest(7).positions)


@given(st.lists(st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=5), max_size=12))
@settings(deadline=None)
def test_ids_that_never_came_are_counted_without_a_list_of_all(batches):
    order, used, seen, late = FrameOrder(), set(), [], 0
    for batch in batches:
        good = [i for i, fine in dict(batch).items() if fine and i not in used]
        aside = {"bad": tuple(i for i, _ in batch if i not in good)}
        highest = max(seen, default=-1)
        for i in good:
            late += i < highest
            highest = max(highest, i)
        order.note("a", np.array(good, np.int64), aside, known=set(used))
        used.update(good)
        seen += [*good, *aside["bad"]]
    assert order.missing == (max(seen) - min(seen) + 1 - len(set(seen)) if seen else 0)
    assert order.out_of_order == late


def test_percentiles_of_any_number_of_times_in_fixed_memory():
    latency, times = Latency(), np.random.default_rng(0).lognormal(-5, 1, 20_000)
    assert np.isnan(latency.percentile(50))
    for part in np.array_split(times, 50):
        latency.add(part)
    for q in (1, 50, 99):
        assert latency.percentile(q) == pytest.approx(np.percentile(times, q), rel=0.02)


def test_a_policy_is_saved_at_a_share_of_the_time_and_goes_on_with_what_it_was_asked_since(tmp_path):
    """With next to no time for it, only the first answer carries the policy; another goes on from there."""
    candidates = np.random.default_rng(3).uniform(-20, 20, (40, 2))

    async def main():
        settings = PredictorSettings(policy_share=1e-12)
        me = predictor(tmp_path, settings=settings)
        me.policy = SpaceFilling(candidates)
        await me.start()
        newest, answers = None, []
        for chunk in chunks(n=40):
            await me.receive(chunk)
            answers.append(await me.suggest(3))
            newest = answers[-1].following(newest)
        return answers, newest

    answers, newest = asyncio.run(main())
    assert [answer.policy is not None for answer in answers] == [True, *(False,) * 7]
    assert newest.policy == answers[0].policy
    assert newest.since == tuple(answers[1:])
    assert FIELD.contains(candidates).all()
