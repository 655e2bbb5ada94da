"""The runner: one actor on the cluster that feeds events to the campaign and has its actions carried out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import Any

import xarray as xr
from distributed import Client, get_client, get_worker

from steering.campaign import Campaign, Command, Event, GroupChanged, RunRecovered, SourceEnded, encode
from steering.labels.external import waiting
from steering.runner.actors import LostForGood
from steering.runner.again import note_going_on
from steering.runner.assembly import Actors, assemble, in_time
from steering.runner.background import Background
from steering.runner.checkpoint import Checkpoints
from steering.runner.describe import answer
from steering.runner.devices import say_devices
from steering.runner.earlier_runs import Start, begin, leave
from steering.runner.ending import ending_with, refuse_nothing
from steering.runner.event_log import EventLog
from steering.runner.executor import Executor
from steering.runner.experiment import Experiment
from steering.runner.exported import export
from steering.runner.finishing import Finishing
from steering.runner.folder import RunFolder, this_process
from steering.runner.handover import HandedOver, HandOver
from steering.runner.judging import judge
from steering.runner.labelling import Labelling
from steering.runner.lock import RUNNER, held, wait_until_free
from steering.runner.metrics import Metrics, advance, snapshot, summary
from steering.runner.noted import note_stop, take_noted
from steering.runner.optional import Optional
from steering.runner.page_state import PageState, PageUpdate
from steering.runner.predictor_proxy import PredictorProxy
from steering.runner.recovery import Recovery, recover
from steering.runner.source_events import Undelivered
from steering.runner.source_proxy import SourceProxy
from steering.runner.upkeep import Upkeep
from steering.runner.watcher import GoOn, Watcher

_BEGIN_S = 20.0
"""How long a command waits for a run that is starting."""
_LOGGED_S = 1.0
"""How long the answer to a command waits for its line in the log, which a slow disk may take later."""
_LAST_FRAMES_S = 30.0
"""How long a stopped run waits for the frames that are under way."""


class Runner:
    """Runs one campaign. Its methods are async: it answers while the campaign runs, and after its end."""

    def __init__(self, experiment: Experiment, folder: RunFolder) -> None:
        self.experiment = experiment
        self.folder = folder
        self.campaign = Campaign(settings=experiment.safe_campaign, frame_time=1 / experiment.source.frame_rate)
        self.metrics = Metrics(experiment, self.campaign, begun=folder.started)
        self._page = PageState()
        self.optional = Optional(self.take)
        self._actors: Actors | None = None
        self._executor: Executor | None = None
        self._finishing: Finishing
        """Of the scans that are over; from when the actors are there."""
        self._last: dict[str, Any] = {"status": "starting"}  # the newest snapshot
        self._background = Background()
        self._measures = asyncio.Event()
        self._source_ended = self._over = False
        self._next: asyncio.Future | None = None  # done with the next event
        self._event_log = EventLog(folder)
        self._handover: HandOver | None = None
        self._begin = Start()
        self._recovery: Recovery | None = None
        self._watcher: Watcher | None = None

    async def run(
        self, name: str | None = None, driver: str | None = None, go_on: GoOn | None = None
    ) -> dict[str, Any]:
        """The whole campaign, to the run's summary; raises what any part of it raised. See ending_with, and Watcher."""
        self._watcher = None if go_on is None else Watcher(self.experiment, self.folder, driver, go_on)
        return await ending_with(self._campaign(), self.folder, name, driver)

    async def _campaign(self) -> dict[str, Any]:
        self._background.begin()
        try:
            if self.folder.recovering:
                await asyncio.to_thread(wait_until_free, self.folder, RUNNER)
            with held(self.folder, RUNNER):
                if self.folder.recovering:
                    await self._recover()
                async with self._event_log:
                    return await self._run()
        finally:
            await self._close()

    async def _recover(self) -> None:
        """Take up state and figures of the run, from its newest checkpoint and the log after it."""
        recovery = self._recovery = await asyncio.to_thread(recover, self.folder, self.experiment)
        self.campaign, self.metrics = recovery.campaign, recovery.metrics
        self._event_log, self._source_ended = EventLog(self.folder, number=recovery.last), recovery.source.ended

    async def _run(self) -> dict[str, Any]:
        try:
            await self._background.unless_failed(in_time(self._set_up()))
            while not self.campaign.finished:
                await self._background.unless_failed(self._event())
            await self._hear_the_last_frames()
            await self._background.unless_failed(self._finishing.finish_all())
            return await self._background.unless_failed(self._sum_up())
        finally:
            self._over = True
            self._background.cancel()

    async def save(self) -> None:
        """Write the live image of every scan so far, and all events, into the run's folder."""
        await asyncio.to_thread(self._event_log.flush)
        if self._executor is not None:
            await self._finishing.save_all()

    async def live(self) -> xr.Dataset | None:
        """The live image of the scan being measured; None before the first frame. After the end it is the one in the
        run's folder."""
        if not self._over:
            try:
                image: xr.Dataset | None = None if self._executor is None else await self.proxy.ask("live")
                return image
            except Exception:  # the run has ended meanwhile
                if not self._over:
                    raise
        return (await asyncio.to_thread(self.folder.objects)).get(str(self.campaign.scan))

    async def command(self, name: str, version: int | None = None, by: str = "", **limits: Any) -> str:
        """Give the campaign a command, see Command. Returns what will be done; raises ValueError, HandedOver."""
        if self._over and not self.campaign.finished:  # the log is closed: nobody would hear of it
            raise HandedOver(f"found a run that has ended here, expected one that goes on: {name} it in a moment")
        if not self._measures.is_set():  # what the campaign asked for now would be done by nobody
            if name == "stop":
                if self.folder.recovering:
                    await asyncio.to_thread(note_stop, self.folder, by)
                    return "stop: noted; the run ends in order once it goes on from its checkpoint"
                await self.give_up("stopped by a person before it began")
                return "stop: the run ends before it began to measure"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._measures.wait(), _BEGIN_S)
            if not self._measures.is_set():
                raise ValueError(f"found a run that is starting, expected one that measures: {name} it in a moment")
        order = Command(time=time.time(), name=name, version=version, by=by, **limits)
        if (objection := self.campaign.objection(order)) is not None:
            raise ValueError(objection)
        said = answer(order, self.campaign)
        self.take(order)
        with contextlib.suppress(TimeoutError, OSError):  # what is asked next may read the log: `steering status` does
            await asyncio.wait_for(asyncio.to_thread(self._event_log.flush), _LOGGED_S)
        return said

    async def identity(self) -> dict[str, Any]:
        """Name of the run's folder, by which people know it, and the process that this runner lives in."""
        return {"name": self.folder.name, **this_process()}

    async def hand_over(self) -> None:
        """Write a checkpoint and end; `run` raises HandedOver, and a runner elsewhere goes on from it."""
        if self._handover is not None:  # else there is nothing to hand over yet
            await self._handover.hand_over()

    async def give_up(self, reason: str) -> None:
        """End the run at once; `run` raises RuntimeError with the reason."""
        self._background.fail(RuntimeError(reason))

    async def snapshot(self) -> dict[str, Any]:
        """The state of the run in numbers, for a progress display; after the end, the last one."""
        if not self._over and self._executor is not None:
            try:
                figures = await self.source.figures(), await self.proxy.ask("figures", False)
                self._last = snapshot(self.metrics, *figures)
            except Exception:  # the run has ended meanwhile: the last one stands
                if not self._over:
                    raise
        return {**self._last, "elapsed_s": self._last.get("elapsed_s", time.time() - self.metrics.begun)}

    async def page_update(self, known: tuple[str, int, int] | None = None) -> PageUpdate:
        """What a page shows now; known: of the newest image it has, see `ImageChange`."""
        live = self._executor is not None and not self.proxy.replacing
        state, image = (await self.snapshot(), await self.proxy.ask("change", known)) if live else (self._last, None)
        return PageUpdate(state=state | self._page.state(self.metrics, self._event_log.trouble), image=image)

    @property
    def proxy(self) -> PredictorProxy:
        """The predictor. Raises RuntimeError before it is there."""
        return self._placed.proxy

    @property
    def source(self) -> SourceProxy:
        """The source. Raises RuntimeError before it is there."""
        return self._placed.source

    @property
    def _placed(self) -> Actors:
        if self._actors is None:
            raise RuntimeError("found no actors yet, expected `run` to have started them")
        return self._actors

    async def _set_up(self) -> None:
        # A worker's client that is used before it has connected may read more than the greeting it expects from the
        # scheduler, and then hears nothing of its futures for ever.
        client, recovery = await get_client(), self._recovery
        self._begin = await asyncio.to_thread(begin, self.experiment, self.folder)
        with self._begin.read:
            actors = self._actors = await assemble(
                client,
                self.experiment,
                self.folder,
                recovery or self._begin,
                emit=self.take,
                log=self._log,
                due=lambda: self.campaign.outstanding > 0,
            )
        executor = self._executor = self._executor_of(client, actors)
        self._finishing = Finishing(client, self.metrics, self.folder, self.proxy, self.optional, self._log)
        if recovery is None:
            self._log(replace(self.campaign.began, time=time.time()))
            for event in self._begin.events:
                self._log(event)
            self.take(self._begin.published)
        else:
            self._go_on(recovery, executor)
        self._background.start(self._hear_the_source())
        self._background.start(self._hear_the_predictor())
        self._background.start(executor.labelling.watch_external_labels())
        self._background.start(executor.labelling.refine_as_time_allows())
        self._background.start(export(client, self.folder, self.optional, self.metrics, actors))
        self._background.start(say_devices(actors, self.optional, self._log))
        self._background.start(take_noted(self.folder, self.take))
        checkpoints = Checkpoints(
            log=self._event_log,
            executor=executor,
            optional=self.optional,
            emit=self.take,
            source_ended=lambda: self._source_ended,
        )
        self._background.start(checkpoints.as_time_goes())
        self._background.start(self._upkeep(client, actors, checkpoints).keep())
        self._measures.set()

    def _go_on(self, recovery: Recovery, executor: Executor) -> None:
        """What was asked for before everything was lost is done, where it is not done yet or void."""
        note_going_on(self.folder)
        for event in recovery.unlogged:
            self._log(event)
        ranks, before, now, lost = executor.ranks, recovery.open, time.time(), recovery.rounds_lost
        self.take(RunRecovered(time=now, number=recovery.manifest.number, remarks=recovery.remarks))
        joined = tuple(range(len(ranks)))
        group: dict[str, Any] = {"ranks": len(ranks), "generation": ranks.generation}
        self.take(GroupChanged(time=now, lost=(), joined=joined, **group, rounds_lost=lost))
        for action in before:
            if action in self.campaign.actions.open:
                self._background.start(executor.again(action))
        for scan in self.campaign.scans[:-1]:
            if scan not in self.proxy.over:
                version = self.metrics.own_end.get(scan, self.campaign.version)
                self._background.start(self._finishing.leave(scan, version))

    def _executor_of(self, client: Client, actors: Actors) -> Executor:
        shared: dict[str, Any] = {
            "experiment": self.experiment,
            "folder": self.folder,
            "campaign": self.campaign,
            "metrics": self.metrics,
            "proxy": actors.proxy,
            "ranks": actors.ranks,
            "optional": self.optional,
        }
        labelling = Labelling(**shared, client=client, emit=self.take)
        return Executor(**shared, source=actors.source, labelling=labelling, take=self.take)

    def _upkeep(self, client: Client, actors: Actors, checkpoints: Checkpoints) -> Upkeep:
        shared: dict[str, Any] = {
            **vars(actors),
            "here": get_worker().address,
            "optional": self.optional,
            "start": self._background.start,
        }
        self._handover = HandOver(
            **shared,
            checkpoints=self.folder.checkpoints,
            write=checkpoints.write,
            end=self._background.fail,
        )
        return Upkeep(
            **shared,
            client=client,
            watcher=self._watcher,
            gate=self.campaign.gate,
            experiment=self.experiment,
            event_log=self._event_log,
            log=self._log,
            handover=self._handover,
        )

    # Events in, actions out.

    def take(self, event: Event) -> None:
        """Log an event, and start the actions that follow from it. A failure here ends the run."""
        try:
            self._log(event)
            before = self.campaign.scan
            actions = advance(self.campaign, self.metrics, event)
            self._page.asked(actions)
            if before not in (None, self.campaign.scan):
                self._background.start(self._finishing.leave(str(before), self.campaign.version))
            for raised in self.campaign.raised:
                self._log(raised)
            self.campaign.raised.clear()
            if self.campaign.hopeless is not None:
                raise LostForGood(self.campaign.hopeless)
            for action in actions:
                if self._executor is not None:
                    self._background.start(self._executor.start(action))
        except Exception as error:  # raised again by `run`
            self._background.fail(error)

    def _log(self, event: Event) -> None:
        self._source_ended = self._source_ended or isinstance(event, SourceEnded)
        self._event_log.append(encode(event))
        self.metrics.note(event)
        if self._next is not None:
            self._next.set_result(None)
            self._next = None

    def _event(self) -> asyncio.Future:
        """Done with the next event after this call."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        return asyncio.shield(self._next)

    async def _hear_the_last_frames(self) -> None:
        """Wait for frames that are still on their way when a person stops the campaign: they belong to the run."""
        await self.source.close()
        while not self._source_ended or any(map(self.metrics.unreported, self.metrics.arrived)):
            try:
                await asyncio.wait_for(self._background.unless_failed(self._event()), _LAST_FRAMES_S)
            except TimeoutError:
                if self.proxy.replacing:
                    continue
                if self._source_ended:
                    return  # the summary says how many were never reported
                raise RuntimeError(
                    f"found a source that goes on {_LAST_FRAMES_S:.0f} s after it was closed, expected its end"
                ) from None

    async def _hear_the_source(self) -> None:
        while True:
            for event in await self.source.events():
                if not isinstance(event, Undelivered):
                    self.take(event)
                elif not await self.proxy.replaced(event.predictor):
                    raise event.error

    async def _hear_the_predictor(self) -> None:
        while True:
            for event in await self.proxy.events():
                self.take(event)

    async def _sum_up(self) -> dict[str, Any]:
        self.metrics.too_late = len(waiting(self.folder.path))
        source, ranks = await self.source.figures(), self._placed.ranks
        figures = summary(self.metrics, source, len(ranks), await self.proxy.ask("figures"))
        figures |= await judge(self.metrics, self.proxy) | {"source_queues": await self.source.ask("queues")}
        figures["total_s"] = time.time() - self.metrics.begun
        self.folder.write_summary(figures)
        refuse_nothing(self.campaign, source["streams"])
        await self.snapshot()
        work = leave(ranks, self.folder, self._begin)
        left = {"left_behind": await self.optional.run("leaving what later runs start from", work)}
        self.folder.write_summary(left)
        return figures | left

    async def _close(self) -> None:
        """Release everything that the run holds on the cluster."""
        self._over = True
        actors, self._actors, self._executor = self._actors, None, None
        if actors is not None:
            await asyncio.gather(actors.proxy.close(), actors.ranks.close(), actors.source.release())
