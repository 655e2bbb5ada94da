"""Laws of the swap: it loses no frame and no decision, and a version that does worse never serves."""

import asyncio
import dataclasses
import time

import numpy as np
import pytest
import torch

from steering.campaign import PredictionReady
from steering.inference import HoldOut, PredictorSettings
from steering.inference.intake import Inbox
from steering.inference.serving import Canary, Serving
from steering.models import ModelStore, ProbeFirst
from steering.policies import SpaceFilling
from steering.ptychography import extract_patches, simulate
from steering.records import ModelVersion
from tests.test_inference import CANVAS, PATCH, PROBE, WINDOW, chunks, predictor, publish, thing

CANDIDATES = np.random.default_rng(1).uniform(-20, 20, (400, 2))


@pytest.fixture(scope="module")
def trained():
    """Weights that know the object of the frames, by a few seconds of training."""
    torch.manual_seed(0)
    network = ProbeFirst(window=WINDOW, patch=PATCH, width=4)
    network.optics.set(PROBE)
    where = np.random.default_rng(5).uniform(-20, 20, (96, 2))
    counts = torch.from_numpy(simulate(thing(), PROBE, CANVAS, where))
    truth = torch.from_numpy(extract_patches(thing(), CANVAS, where, PATCH))
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(120):
        optimiser.zero_grad()
        (torch.polar(*network(counts)) - truth).abs().square().mean().backward()
        optimiser.step()
    return network.eval()


def put(store, number, network):
    ModelStore(store).publish(
        network, ModelVersion(number=number, network="ProbeFirst", hyperparameters=network.hyperparameters)
    )


def spoilt(network, noise):
    """The same network with noise on its weights."""
    other = ProbeFirst(**network.hyperparameters)
    other.load_state_dict(network.state_dict())
    torch.manual_seed(9)
    with torch.no_grad():
        for weight in other.parameters():
            weight += noise * torch.randn_like(weight)
    return other


def singles(n):
    """Frames one by one."""
    for chunk in chunks(n=n):
        for i in range(chunk.sizes["frame"]):
            yield chunk.isel(frame=slice(i, i + 1))


def test_a_swap_under_load_loses_no_frame_and_no_decision(tmp_path):
    """Frames come without a pause and the policy is asked all the time, while versions are swapped: every frame is
    predicted once, every position is suggested once, and in the policy's own order."""

    async def main():
        me = dataclasses.replace(predictor(tmp_path), policy=SpaceFilling(CANDIDATES))
        await me.start()
        asked, numbers = [], []

        async def measure():
            for chunk in singles(120):
                await me.receive(chunk)
                asked.append(await me.suggest(1))

        async def swap():
            while len(asked) < 120:
                publish(tmp_path, len(numbers) + 1, noise=0.01)
                numbers.append((await me.install(len(numbers) + 1, canary=False)).version)

        await asyncio.gather(measure(), swap())
        return await me.events(), asked, numbers, await me.figures()

    events, asked, numbers, figures = asyncio.run(main())
    predicted = [e for e in events if isinstance(e, PredictionReady)]
    assert [i for e in predicted for i in e.frame_ids] == list(range(120))
    assert figures["frames_predicted"] == 120
    versions = [e.version for e in predicted]
    assert versions == sorted(versions)
    assert len(set(versions)) > 2
    assert numbers == list(range(1, len(numbers) + 1))
    order = [tuple(position) for position in SpaceFilling(CANDIDATES).suggest(120).positions]
    assert [position for answer in asked for position in answer.decision.positions] == order


def test_a_version_that_does_worse_is_refused_and_the_old_one_serves(tmp_path, trained):
    async def main():
        me = predictor(tmp_path)
        put(tmp_path, 1, trained)
        put(tmp_path, 2, spoilt(trained, 0.1))
        put(tmp_path, 3, spoilt(trained, 0.002))
        await me.start()  # 3 is the newest
        for chunk in chunks(n=60):
            await me.receive(chunk)
        await me.live()
        before = [await me.install(1, canary=False), await said(me)]
        refused = [await me.install(2), await said(me)]
        return before, refused, await me.install(3), await me.install(2, canary=False), await me.figures()

    before, refused, better, forced, figures = asyncio.run(main())
    assert before[0].accepted
    assert not refused[0].accepted
    assert refused[0].version == 1
    assert refused[0].frames == 6  # every tenth of sixty
    assert refused[0].after > 1.1 * refused[0].before
    assert "version 1 has" in refused[0].reason
    np.testing.assert_array_equal(refused[1], before[1])
    assert better.accepted
    assert better.version == 3
    assert forced.accepted  # a person, or a campaign that goes back, knows why
    assert figures["version"] == 2


def test_a_version_that_must_do_better_does_not_serve_untried(tmp_path, trained):
    async def main():
        me = predictor(tmp_path, hold_out=HoldOut(every=10**6))
        await me.start()
        put(tmp_path, 1, trained)
        for chunk in chunks(n=20):
            await me.receive(chunk)
        return await me.install(1, margin=-0.1), await me.install(1)

    better, usual = asyncio.run(main())
    assert (better.accepted, better.version) == (False, 0)
    assert better.reason == "no held-out frame to try version 1 on, which must do better"
    assert usual.accepted


@pytest.mark.parametrize("idle", [0.0, float("inf")], ids=["no time", "time"])
def test_the_version_in_service_is_judged_by_what_it_said_when_the_frames_came(tmp_path, trained, idle):
    """It is not tried on them again; that would give the same, one by one or several together."""

    async def main():
        me = predictor(tmp_path)
        put(tmp_path, 1, trained)
        await me.start()
        put(tmp_path, 2, spoilt(trained, 0.1))
        for chunk in chunks(n=60):
            await me.receive(chunk)
        return await me.install(2)

    known = asyncio.run(main())
    held_out = np.concatenate([chunk["counts"].values for chunk in chunks(n=60)])[HoldOut().held_out(np.arange(60))]
    mask = np.zeros((WINDOW, WINDOW), bool)
    frames = Canary(counts=held_out, mask=mask, known=np.full(6, np.nan, np.float32))
    tried = Serving.begin(ModelStore(tmp_path), PredictorSettings(), 1).make_ready(2, frames, idle=lambda: idle)
    assert not known.accepted
    assert not tried.accepted
    assert (known.before, known.after) == pytest.approx((tried.before, tried.after), rel=0.02)


async def said(me):
    """What it says of five frames, while its own thread has nothing to say."""
    me.fast.later = lambda seconds: None  # nothing is predicted again
    await me.live()
    return me.fast.predict(next(chunks(n=5))["counts"].values)[0].copy()


def test_after_going_back_the_older_version_looks_at_the_frames_again(tmp_path, trained):
    async def main():
        me = predictor(tmp_path)
        put(tmp_path, 1, trained)
        put(tmp_path, 2, spoilt(trained, 0.1))
        await me.start()
        for chunk in chunks(n=30):
            await me.receive(chunk)
        await me.live()
        await me.install(1, canary=False)
        while (await me.figures())["frames_to_revise"]:
            await asyncio.sleep(0.01)
        return await me.live()

    live = asyncio.run(main())
    assert (live["frame_model_version"] == 1).mean() > 0.9


def test_another_architecture_and_weights_that_are_no_numbers_are_refused(tmp_path, trained):
    async def main():
        me = predictor(tmp_path)
        await me.start()
        wide = ProbeFirst(window=WINDOW, patch=PATCH, width=6)
        wide.optics.set(PROBE)
        put(tmp_path, 1, wide)
        put(tmp_path, 2, spoilt(trained, float("nan")))
        return await me.install(1), await me.install(2), await me.figures()

    other, broken, figures = asyncio.run(main())
    assert "'width': 6" in other.reason
    assert "not finite" in broken.reason
    assert not other.accepted
    assert not broken.accepted
    assert figures["version"] == 0


def test_a_backend_that_costs_a_version_its_quality_is_left(tmp_path, trained, monkeypatch):
    """What bfloat16 is worth depends on the weights: it is held against float32 on held-out frames at every swap."""

    async def main():
        me = predictor(tmp_path, settings=PredictorSettings(canary_margin=1e9))
        put(tmp_path, 1, trained)
        await me.start()
        engine = me.fast.serving.engine
        for slot in (engine.serving, engine.spare):
            monkeypatch.setattr(slot, "decode", Coarse(slot.decode))
        for chunk in chunks(n=60):
            await me.receive(chunk)
        await me.live()
        first, again = await me.install(1), await me.install(1)
        return engine, first, again

    class Coarse:
        def __init__(self, true):
            self.true, self.renew = true, true.renew

        def __call__(self, *views):
            amplitude, phase = self.true(*views)
            return amplitude, phase + torch.linspace(0, 2, PATCH)

    engine, first, again = asyncio.run(main())
    assert first.accepted
    assert again.accepted
    assert engine.backend.name == "eager_float32"
    assert engine.serving.backend == engine.spare.backend == engine.backend


def test_what_was_withdrawn_leaves_its_number_free(tmp_path, trained):
    store = ModelStore(tmp_path)
    for number in range(3):
        put(tmp_path, number, trained)
    store.withdraw(2, 1)
    assert store.newest() == 1
    assert [version.number for version in store.versions()] == [0, 1]
    put(tmp_path, 2, trained)
    assert store.newest() == 2
    store.point_to(0)
    assert store.newest() == 0
    with pytest.raises(FileNotFoundError, match="model version 7"):
        store.point_to(7)


def test_frames_that_come_together_are_predicted_together(tmp_path):
    """Within the stated time, up to the stated number; a batch is of one scan."""

    async def main():
        me = predictor(tmp_path, settings=PredictorSettings(batch=10, gather_ms=500))
        await me.start()
        for chunk in [*chunks("a", 20), *chunks("b", 5, first=20)]:
            await me.receive(chunk)
        await me.live()
        return await me.events()

    events = asyncio.run(main())
    assert [(e.scan, len(e.frame_ids)) for e in events] == [("a", 10), ("a", 10), ("b", 5)]


def test_a_frame_does_not_wait_for_others_that_are_not_expected():
    first, second, third = chunks("a", 15)
    inbox, now = Inbox(frames=10, gather_s=60.0), time.perf_counter()
    inbox.put(first, now - 200)
    assert [chunk is first for chunk, _ in inbox.take()] == [True]
    inbox.put(second, now)
    assert inbox.time_left(now) == pytest.approx(200)
    assert [chunk is second for chunk, _ in inbox.take()] == [True]  # at once, not after a minute
    inbox.put(third, now + 100)
    assert inbox.time_left(now + 100) == pytest.approx(150)
    assert inbox.time_left(now + 10_000) == float("inf")


def test_the_view_is_the_image(tmp_path):
    """What a policy is shown is kept up to date piece by piece: it is what the whole image gives."""

    async def main():
        me = predictor(tmp_path)
        await me.start()
        for chunk in chunks(n=30):
            await me.receive(chunk)
        await me.live()
        return me.scans.images["a"]

    live = asyncio.run(main())
    image, view = live.stitcher.image(), live.view()
    np.testing.assert_allclose(view["amplitude"], np.abs(image), atol=1e-6)
    np.testing.assert_allclose(view["phase"], np.angle(image), atol=1e-6)
    np.testing.assert_allclose(view["weight"], live.stitcher.weight, atol=1e-6)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="expected 1 or more chunks"):
        PredictorSettings(batch=0)
