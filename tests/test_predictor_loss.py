"""Laws of a predictor that is lost: another goes on, and no decision and no frame is lost or reported twice."""

import asyncio
import collections
import contextlib
import functools
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from distributed import Client, Scheduler, Worker
from skimage import data as pictures

from steering.campaign import CampaignSettings, FramesLost
from steering.clusters import local
from steering.clusters.roles import INFERENCE
from steering.inference import Predictor, PredictorSettings, ResumeState, SavedPolicy, SavedPredictor
from steering.inference.policy_host import PolicyHost
from steering.learning import Reconstruction, TrainerSettings
from steering.learning.strategies import ER
from steering.models import ProbeFirst
from steering.policies import Adaptive, GradientResidual, SpaceFilling
from steering.ptychography import patch_weight, zone_plate
from steering.records import Ids
from steering.runner import Experiment, RunFolder, start
from steering.runner.actors import place
from steering.runner.predictor_proxy import PredictorProxy
from steering.sources import SimulatedBeamline, Stage, sample
from tests.test_inference import FIELD, GEOMETRY, PROBE, chunks, predictor, publish

CANDIDATES = np.random.default_rng(3).uniform(-20, 20, (60, 2))


class Counting:
    """Counts the frames that a policy is given."""

    frames = 0

    def ingest(self, prediction, live):
        self.frames += len(prediction.frame_id)
        super().ingest(prediction, live)


class CountingSpaceFilling(Counting, SpaceFilling):
    pass


class CountingAdaptive(Counting, Adaptive):
    pass


KINDS = {
    "space-filling": lambda: CountingSpaceFilling(CANDIDATES),
    "adaptive": lambda: CountingAdaptive(CANDIDATES, beam=12.0),
}


def new(store, policy):
    """One that saves its policy with the first answer only: what came after that is asked again."""
    settings = PredictorSettings(policy_share=1e-12)
    return Predictor(field=FIELD, geometry=GEOMETRY, probe=PROBE, policy=policy, store=store, settings=settings)


def resume(reported, answer):
    """What a runner would hand over that has heard these events and this newest answer."""
    predicted = collections.defaultdict(dict)
    for event in reported:
        predicted[event.scan].update(dict.fromkeys(event.frame_ids, event.version))
    return ResumeState(version=0, answer=answer, predicted=predicted, aside={})


async def heard(me):
    """Everything that was said until now."""
    await me.live()
    events = asyncio.ensure_future(me.events())
    await asyncio.sleep(0)  # what is there is answered at once
    if events.done():
        return events.result()
    events.cancel()
    return []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lost", [0, 5, 9])
@pytest.mark.parametrize("deaf", [False, True], ids=["answered", "not answered"])
def test_another_predictor_goes_on_where_the_lost_one_was(tmp_path, kind, lost, deaf):
    """Lost after any chunk; its last answer, and what it said of its last frames, may never have been heard. The
    positions decided on are distinct, in the policy's own order, and all of them; every frame is reported once."""
    publish(tmp_path, 0)
    publish(tmp_path, 1, noise=0.01)  # not in service when the predictor was lost
    sent = list(chunks(n=60))

    async def main():
        newest, reported, decided = None, [], []
        me = new(tmp_path, KINDS[kind]())
        await me.start(ResumeState(version=0))
        for number, chunk in enumerate(sent):
            await me.receive(chunk)
            answer = await me.suggest(5)
            if number == lost:
                if not deaf:
                    newest = answer.following(newest)
                    decided += answer.decision.positions
                    reported += await heard(me)
                me = new(tmp_path, KINDS[kind]())
                await me.start(resume(reported, newest))
                for again in sent[: number + 1]:
                    await me.receive(again)
                if not deaf:
                    continue
                answer = await me.suggest(5)  # asked again, because nothing was heard
            newest = answer.following(newest)
            decided += answer.decision.positions
            reported += await heard(me)
        return decided, reported, await me.live(), me.fast.policy_host.awake(), await me.figures()

    decided, reported, live, policy, figures = asyncio.run(main())
    assert len(decided) == len(set(decided)) == len(CANDIDATES)
    if kind == "space-filling":
        order = SpaceFilling(CANDIDATES).suggest(len(CANDIDATES)).positions
        np.testing.assert_array_equal(decided, order)
    assert [i for event in reported for i in event.frame_ids] == list(range(60))
    assert live["frame"].values.tolist() == list(range(60))
    assert policy.frames == 60  # each once
    assert figures["version"] == 0


def test_a_policy_goes_on_with_the_image_that_is_there_now(tmp_path):
    """Its state travels without the live image, which the next predictor makes anew."""
    publish(tmp_path, 0)
    sent = list(chunks(n=40))

    async def main():
        me = new(tmp_path, GradientResidual(CANDIDATES, beam=12.0))
        await me.start()
        for chunk in sent:
            await me.receive(chunk)
        answer = await me.suggest(1)
        other = new(tmp_path, GradientResidual(CANDIDATES, beam=12.0))
        await other.start(resume(await heard(me), answer.following(None)))
        for chunk in sent:
            await other.receive(chunk)
        return answer, await me.suggest(20), await other.suggest(20), other

    answer, expected, said, other = asyncio.run(main())
    image = other.fast.scans.images["a"].view()
    assert len(answer.policy) < sum(part.nbytes for part in image.values()) / 4
    assert said.decision.positions == expected.decision.positions


def test_a_policy_that_cannot_travel_says_so_with_its_answer():
    class Bound(SpaceFilling):
        def __init__(self, candidates):
            super().__init__(candidates)
            self.lock = threading.Lock()

    answer = PolicyHost(Bound(CANDIDATES), {}).suggest(3)
    assert answer.policy is None
    assert len(answer.decision.positions) == 3


class Attentive(SpaceFilling):
    """Remembers what it hears of its decisions."""

    heard = ()

    def declined(self, decision, reason):
        super().declined(decision, reason)
        self.heard = (*self.heard, (len(decision.positions), reason))


def test_what_was_declined_after_the_policy_was_saved_is_heard_again():
    """Saved with its first answer alone; the declined positions are still not suggested again, and no other is lost."""
    host = PolicyHost(Attentive(CANDIDATES), {}, share=1e-12)
    first = host.suggest(8).following(None)
    vetoed = replace(first.decision, positions=first.decision.positions[:3], reasons=first.decision.reasons[:3])
    second = host.suggest(8, [(vetoed, "vetoed")]).following(first)
    assert second.since
    other = PolicyHost(Attentive(CANDIDATES), {}, second)
    rest = [other.suggest(100)]
    assert other.awake().heard == host.awake().heard == ((3, "vetoed"),)
    given = [where for each in (first, second, *rest) for where in each.decision.positions]
    assert len(given) == len(set(given)) == len(CANDIDATES)


class Forgetful:
    """A source's proxy, of a source that was lost with all that it had kept."""

    def __init__(self):
        self.lost = Ids()
        self.sends = []

    async def go_on_with(self, predictor, number):
        return self.sends


async def moved_again_and_again(store):
    """What is told as lost of ten frames, when a predictor is followed by another one three times: four of them the
    source told as lost itself, and the first of the others it can send once more."""
    events, source = [], Forgetful()
    quiet = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    roles = {"resources": {INFERENCE: 1}}
    async with (
        Scheduler(host="127.0.0.1", port=0, **quiet) as scheduler,
        Worker(scheduler.address, **roles) as worker,
        Client(scheduler.address, asynchronous=True) as client,
    ):
        description = predictor(store)
        handle = await place(client, description, worker=worker.address)
        proxy = PredictorProxy(client, description, handle, source, emit=events.append)
        await proxy.start()
        for chunk in chunks(n=10):
            await proxy.ask("receive", chunk)
        while proxy.told()["reported"] != {"a": [[0, 9]]}:
            await proxy.events()
        source.lost.add(range(6, 10))
        source.sends = [0]
        for _ in range(2):
            await proxy.move()
        source.sends = []
        await proxy.move()
        await proxy.close()
    return [event.frame_ids for event in events if isinstance(event, FramesLost)]


def test_each_frame_that_a_lost_predictor_took_with_it_is_told_once(tmp_path):
    told = asyncio.run(asyncio.wait_for(moved_again_and_again(tmp_path), 100))
    assert told == [(1, 2, 3, 4, 5), (0,)]


def test_what_a_checkpoint_has_of_a_long_scan_is_known_by_every_id():
    part = {"scans": [{"ids": [[0, 19_999]]}, {"ids": [[10**9, 10**9 + 5], [10**9 + 9, 10**9 + 9]]}]}
    found = SavedPredictor(folder=Path(), part=part, policy=SavedPolicy()).frame_ids
    assert all(i in found for i in (0, 19_999, 10**9 + 5, 10**9 + 9))
    assert not any(i in found for i in (20_000, 10**9 + 6))
    part["scans"][0]["ids"] = [[5, 1]]
    damaged = SavedPredictor(folder=Path(), part=part, policy=SavedPolicy())
    with pytest.raises(ValueError, match="found no ranges of ids"):
        _ = damaged.frame_ids


class Deadly(SpaceFilling):
    """Ends whatever process it is given frames in, or only complains."""

    def __init__(self, candidates, *, complains):
        super().__init__(candidates)
        self.complains = complains

    def ingest(self, prediction, live):
        if self.complains:
            raise ValueError("found a frame that it does not like")
        os._exit(1)


FRAMES = 100


def experiment(policy=SpaceFilling, **settings):
    """Two small samples, one after the other."""
    probe = zone_plate(64, 50.0, aperture=0.52, counts=1e5)
    stages = [
        Stage(name, sample(getattr(pictures, name)(), phase=-2.0, absorption=0.1, size=128), FRAMES)
        for name in ("brick", "coins")
    ]
    source = SimulatedBeamline(stages, probe=probe, step=5.0, frame_rate=25.0)
    return Experiment(
        source=source,
        policy=policy(source.candidates),
        network=ProbeFirst(window=64, patch=40, width=8),
        strategy=ER(Reconstruction(patch_weight(probe, 40))),
        trainer=TrainerSettings(batch=4, candidates=2, representatives=4, deadline=10.0),
        campaign=CampaignSettings(steps=10, lookahead=20, **settings),
        scans=("brick", "coins"),
        ranks=1,
    )


def home(client):
    """Address and process of the worker for the predictor; None while there is none."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    for address, worker in workers.items():
        if worker["name"] == "inference":
            with contextlib.suppress(OSError, KeyError):  # it was killed, and the scheduler does not know that yet
                return address, client.run(os.getpid, workers=[address])[address]
    return None


def logged(folder, name):
    return [event for event in folder.events() if event["event"] == name]


def until(true, run):
    """Wait for something, as long as the run goes on."""
    while not (found := true()):
        assert not run.done, run.result()
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_the_campaign_goes_on_when_the_predictor_is_killed(tmp_path):
    """kill -9 of its worker in each of two scans: no decision and no frame is lost or repeated, and both images are
    there at the end."""
    folder = RunFolder.create(tmp_path / "run")
    with local(ranks=1) as client:
        run = start(experiment(), client, folder)
        for losses, scan in enumerate(("brick", "coins"), 1):
            mine = [scan]
            until(lambda mine=mine: len(predicted(folder, *mine)) > 30, run)
            os.kill(until(lambda: home(client), run)[1], signal.SIGKILL)
            until(lambda losses=losses: len(logged(folder, "PredictorReplaced")) == losses, run)
        figures = run.result()
        assert run.snapshot()["status"] == "finished"  # who comes late is still answered
        assert run.live() is not None
    assert figures["prediction"]["predictors_lost"] == 2
    assert figures["frames_predicted"] == figures["frames_acquired"] == 2 * FRAMES
    assert figures["frames_unheard"] == 0
    decided = [tuple(p) for e in logged(folder, "DecisionSuggested") for p in e["positions"]]
    measured = {}
    for scan, image in folder.objects().items():
        assert len(predicted(folder, scan)) == len(set(predicted(folder, scan))) == FRAMES
        assert sorted(image["frame"].values) == sorted(predicted(folder, scan))
        by_id = image.sortby("frame")
        measured[scan] = np.stack([by_id["position_y"], by_id["position_x"]], 1)
        assert len(np.unique(measured[scan].round(12), axis=0)) == FRAMES  # no position was decided on twice
    np.testing.assert_allclose(measured["brick"], decided[:FRAMES], atol=1e-10)  # and none was left out
    assert any(event["version"] for event in logged(folder, "ModelPublished"))


def predicted(folder, scan):
    return [i for e in logged(folder, "PredictionReady") if e["scan"] == scan for i in e["frame_ids"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("complains", "error", "said"),
    [(False, RuntimeError, "times in a row at the same place"), (True, ValueError, "that it does not like")],
    ids=["dies again and again", "raises"],
)
def test_a_predictor_that_cannot_live_ends_the_run_and_says_why(tmp_path, complains, error, said):
    folder = RunFolder.create(tmp_path / "run")
    with local(ranks=1) as client:
        run = start(experiment(functools.partial(Deadly, complains=complains)), client, folder)
        with pytest.raises(error, match=said):
            run.result()
