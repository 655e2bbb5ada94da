"""Laws of what a scan leaves: it is saved as it was finished, whatever becomes of the predictor."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
from distributed import Client, Scheduler, Worker

from steering.campaign import Campaign
from steering.clusters.roles import INFERENCE, LABEL
from steering.inference import Predictor, SavedPolicy, SavedPredictor
from steering.labels.final import FinalSettings
from steering.models import ProbeFirst
from steering.policies import SpaceFilling
from steering.ptychography import RefineSettings
from steering.records import Ids
from steering.runner import LabelSettings, RunFolder
from steering.runner.actors import place
from steering.runner.finishing import Finishing
from steering.runner.metrics import Metrics
from steering.runner.optional import Optional
from steering.runner.predictor_proxy import PredictorProxy
from tests.test_inference import FIELD, GEOMETRY, PATCH, PROBE, WINDOW, chunks, publish
from tests.test_predictor_loss import CANDIDATES

QUIET = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
LIVE = "as time allowed while the scan was measured"


class Forgetful:
    """A source's proxy, of a source that keeps nothing."""

    def __init__(self):
        self.lost = Ids()

    async def go_on_with(self, predictor, number):
        return []

    async def let_go(self, scan):
        pass


@contextlib.asynccontextmanager
async def measured(path, kind=Predictor):
    """What finishes two scans, both in a checkpoint from which the next predictor goes on; the run's folder, the
    predictor's proxy, and what was logged."""
    folder, events = RunFolder.create(path / "run"), []
    publish(folder.models, 0)
    description = kind(
        field=FIELD, geometry=GEOMETRY, probe=PROBE, policy=SpaceFilling(CANDIDATES), store=folder.models
    )
    experiment = SimpleNamespace(
        network=ProbeFirst(window=WINDOW, patch=PATCH, width=4),
        labels=LabelSettings(final=FinalSettings(refine=RefineSettings(passes=2))),
        source=SimpleNamespace(probe=PROBE),
    )
    metrics = Metrics(experiment, Campaign(scan="b", scans=["a", "b"]))
    async with (
        Scheduler(host="127.0.0.1", port=0, **QUIET) as scheduler,
        Worker(scheduler.address, resources={INFERENCE: 1}) as worker,
        Worker(scheduler.address, resources={LABEL: 1}),
        Client(scheduler.address, asynchronous=True) as client,
    ):
        handle = await place(client, description, worker=worker.address)
        proxy = PredictorProxy(client, description, handle, Forgetful(), emit=events.append)
        await proxy.start()
        for number, scan in enumerate("ab"):
            for chunk in chunks(scan, n=20, first=20 * number, seed=number):
                await proxy.ask("receive", chunk)
        folder.checkpoints.mkdir()
        part = await proxy.ask("checkpoint", folder.checkpoints, "000001-0")
        saved = SavedPredictor(folder=folder.checkpoints, part=part, policy=SavedPolicy.read(part["policy"]))
        proxy.rebase(saved, proxy.told())
        told = []

        def log(event):
            metrics.note(event)
            told.append(event)

        yield Finishing(client, metrics, folder, proxy, Optional(events.append), log), folder, proxy, told
        await proxy.close()


def within(seconds, work):
    return asyncio.run(asyncio.wait_for(work, seconds))


def test_what_is_saved_of_a_scan_is_not_written_over_by_a_predictor_that_came_later(tmp_path):
    async def main():
        async with measured(tmp_path) as (finishing, folder, proxy, told):
            await finishing.leave("a", 0)
            left = folder.objects()["a"]
            await proxy.move()  # it goes on from before that
            older = await proxy.ask("dataset", "a")
            await finishing.finish_all()
            return left, older, folder.objects(), told

    left, older, objects, told = within(60, main())
    assert older.attrs["refinement"] == LIVE != left.attrs["refinement"]
    assert left.identical(objects["a"])
    assert "passes over all frames" in objects["b"].attrs["refinement"]
    assert [(event.scan, event.reason) for event in told] == [("a", ""), ("b", "")]


def test_a_scan_that_was_saved_as_it_was_finished_stays_so_where_that_is_known_from_its_folder_alone(tmp_path):
    """As after a recovery, of which the checkpoint is older than that."""

    async def main():
        async with measured(tmp_path) as (finishing, folder, proxy, told):
            await finishing.finish_all()
            left, logged = folder.objects(), len(told)
            await proxy.move()
            assert await proxy.ask("is_concluded", "a") is False
            await finishing.leave("a", 0)
            await finishing.finish_all()
            return left, folder.objects(), told[logged:], proxy.over

    left, objects, told, over = within(60, main())
    assert all(image.identical(objects[scan]) for scan, image in left.items())
    assert told == []
    assert over == ("a", "b")


@pytest.mark.parametrize("last", [False, True], ids=["while others are measured", "at the end"])
def test_the_last_work_is_done_again_where_its_predictor_is_lost_before_it_is_saved(tmp_path, last):
    async def main():
        async with measured(tmp_path) as (finishing, folder, proxy, told):
            really, moves = finishing.log, []

            def lost(event):
                really(event)
                if not moves:
                    moves.append(asyncio.ensure_future(proxy.move()))

            finishing.log = lost
            await (finishing.finish_all() if last else finishing.leave("a", 0))
            return folder.objects(), told, proxy.over

    objects, told, over = within(60, main())
    assert [event.scan for event in told].count("a") == 2
    assert not any(event.reason for event in told)
    assert all(image.attrs["refinement"] != LIVE for image in objects.values())
    assert over == (() if last else ("a",))


class Stuck(Predictor):
    """The first of them never hands out a frame."""

    asked = 0

    async def scan_frames(self, scan, first, last):
        Stuck.asked += 1
        if Stuck.asked == 1:
            await asyncio.sleep(1000)
        return await super().scan_frames(scan, first, last)


@pytest.mark.slow
def test_the_role_label_is_free_again_where_a_lost_predictor_never_answers(tmp_path):
    """Dask's own answer would never come, and no label would be made any more."""

    async def main():
        async with measured(tmp_path, Stuck) as (finishing, _, proxy, told):
            work = asyncio.ensure_future(finishing.leave("a", 0))
            while not Stuck.asked:
                await asyncio.sleep(0.01)
            await proxy.move()
            await work
            return told

    assert [(event.scan, event.reason) for event in within(60, main())] == [("a", "")]
