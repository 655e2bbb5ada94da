"""The runner: one actor on the cluster that feeds events to the campaign and carries its actions out."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import xarray as xr
from distributed import get_client

from steering.campaign import (
    Action,
    AskPolicy,
    Campaign,
    CandidateReady,
    CandidateRefused,
    Command,
    DecisionSuggested,
    Event,
    Finish,
    Label,
    ModelPublished,
    Publish,
    RankJoined,
    RankLost,
    Refuse,
    Remind,
    RollBack,
    RollBackRefused,
    RolledBack,
    SourceEnded,
    Steer,
    Tick,
    Train,
    encode,
)
from steering.inference import Installed
from steering.labels.external import waiting
from steering.learning import PARTS, GroupLost, Round
from steering.models import ModelStore
from steering.records import ModelVersion
from steering.runner.actors import Actors, call
from steering.runner.describe import tell
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.labelling import Labelling
from steering.runner.metrics import Metrics, snapshot, summary
from steering.runner.predictor_proxy import PredictorProxy
from steering.runner.source_actor import Undelivered

_LAST_FRAMES_S = 30.0
"""How long a stopped run waits for the frames that are under way."""
_BETTER = 0.1
"""Share by which an older version's residual must be lower for the campaign to go back to it of its own accord."""
_LOOK_S = 0.5
"""Between two looks whether all of a scan was told."""
_SET_UP_S = 300.0
"""How long the actors may take to be there: workers that import torch from a slow shared disk need a minute."""


class Runner:
    """Conducts one campaign. Its methods are async: it answers while the campaign runs."""

    def __init__(self, experiment: Experiment, folder: RunFolder) -> None:
        self.experiment = experiment
        self.folder = folder
        self.campaign = Campaign(settings=experiment.safe_campaign, frame_time=1 / experiment.source.frame_rate)
        self.metrics = Metrics(experiment, self.campaign)
        self.candidate: CandidateReady | None = None
        self.proxy: PredictorProxy | None = None
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._jobs: set[asyncio.Task] = set()
        self._source_ended = False
        self._writing = asyncio.Lock()

    async def run(self) -> dict[str, Any]:
        """The whole campaign, from the untrained network to the run's summary. Raises what any part of it raised."""
        try:
            await self._be_ready()
            await self._conduct()
            await self.save()
            return await self._sum_up()
        finally:
            for job in self._jobs:
                job.cancel()
            if self.proxy is not None:
                self.proxy.close()
                await self.proxy.actors.close()

    async def save(self) -> None:
        """Write the live image of every scan so far into the run's folder."""
        if self.proxy is None:
            return
        for scan in self.campaign.scans:
            await self._save(scan)

    async def _save(self, scan: str) -> None:
        async with self._writing:
            live = await self._proxy.ask("dataset", scan)
            if live is not None:  # else it is a scan that was saved before the predictor was lost
                await asyncio.to_thread(self.folder.write_object, scan, live)

    async def live(self) -> xr.Dataset | None:
        """The live image of the scan being measured; None before the first frame."""
        image: xr.Dataset | None = None if self.proxy is None else await self.proxy.ask("live")
        return image

    async def command(self, name: str, version: int | None = None) -> str:
        """A person's word, see Command. Returns what will be done; raises ValueError where it cannot be done now."""
        order = Command(time=time.time(), name=name, version=version)
        objection = self.campaign.objection(order)
        if objection is not None:
            raise ValueError(objection)
        proposed = self.campaign.gate.proposed
        self._events.put_nowait(order)
        if name in ("approve", "veto") and proposed is not None:
            return f"{name}: {tell(proposed)}"
        return name

    async def snapshot(self) -> dict[str, Any]:
        """The state of the run in numbers, for a progress display."""
        if self.proxy is None:
            return {"status": "starting", "elapsed_s": time.time() - self.metrics.begun}
        return snapshot(self.metrics, await self._actors.source.figures(), await self.proxy.ask("figures"))

    async def _be_ready(self) -> None:
        try:
            await asyncio.wait_for(self._set_up(), _SET_UP_S)
        except TimeoutError as late:
            raise RuntimeError(
                f"found the actors of the run not ready after {_SET_UP_S:.0f} s, expected them within that time: "
                "look at the workers' logs, and start the run again"
            ) from late

    async def _set_up(self) -> None:
        experiment = self.experiment
        network = experiment.network
        network.optics.set(experiment.source.probe, ~experiment.source.geometry.good())
        first = self._version(0, ())
        await asyncio.to_thread(ModelStore(self.folder.models).publish, network, first)
        # A worker's client that is used before it has connected may read more than the greeting it expects from the
        # scheduler, and then hears nothing of its futures for ever.
        client = await get_client()
        actors = await Actors.assemble(client, experiment, self.folder)
        self.proxy = PredictorProxy(actors=actors, emit=self._events.put_nowait)
        self._take(ModelPublished(time=time.time(), version=0, validation_error=None, validation_residual=None))
        self._start(self._hear_the_source())
        self._start(self._hear_the_predictor())
        self._labelling = Labelling(
            experiment=experiment,
            folder=self.folder,
            campaign=self.campaign,
            metrics=self.metrics,
            proxy=self.proxy,
            emit=self._events.put_nowait,
            re_form=self._re_form,
        )
        self._start(self._labelling.watch_external_labels())
        self._start(self._labelling.refine_as_time_allows())

    async def _conduct(self) -> None:
        """Event by event, until the campaign says that it is finished."""
        while not self.campaign.finished:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            self._take(event)
        await self._hear_the_last_frames()

    async def _hear_the_last_frames(self) -> None:
        """A person's stop finishes the campaign while frames are on their way: they still belong to the run."""
        await self._actors.source.close()
        while not self._source_ended or any(map(self.metrics.unheard, self.metrics.arrived)):
            try:
                event = await asyncio.wait_for(self._events.get(), _LAST_FRAMES_S)
            except TimeoutError:
                if self._proxy.replacing:
                    continue
                if self._source_ended:
                    return  # the summary says how many were never heard of
                raise RuntimeError(
                    f"found a source that goes on {_LAST_FRAMES_S:.0f} s after it was closed, expected its end"
                ) from None
            if isinstance(event, Exception):
                raise event
            self._log(event)

    def _take(self, event: Event) -> None:
        self._log(event)
        before = self.campaign.scan
        actions = self.campaign.handle(event)
        if self.campaign.scan is not None:
            self.metrics.own_end[self.campaign.scan] = self.campaign.version
        if before not in (None, self.campaign.scan):
            self._start(self._leave(str(before)))
        for raised in self.campaign.raised:
            self._log(raised)
        self.campaign.raised.clear()
        for action in actions:
            self._start(self._carry_out(action))

    def _log(self, event: Event) -> None:
        self._source_ended = self._source_ended or isinstance(event, SourceEnded)
        self.folder.append_event(encode(event))
        self.metrics.note(event)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        job = asyncio.ensure_future(self._guarded(work))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # raised again by `_conduct`, which is what ends the run
            self._events.put_nowait(error)

    async def _hear_the_source(self) -> None:
        while True:
            for event in await self._actors.source.events():
                if not isinstance(event, Undelivered):
                    self._events.put_nowait(event)
                elif not await self._proxy.replaced(event.predictor):
                    raise event.error

    async def _hear_the_predictor(self) -> None:
        while True:
            for event in await self._proxy.events():
                self._events.put_nowait(event)

    async def _leave(self, scan: str) -> None:
        """A scan is over: what came of it is written down, so that no loss can take it away."""
        await self._save(scan)
        while self.metrics.unheard(scan):
            await asyncio.sleep(_LOOK_S)
        if await self._proxy.ask("is_over", scan):  # else it was only interrupted
            await self._proxy.let_go(scan)

    async def _carry_out(self, action: Action) -> None:
        match action:
            case AskPolicy(positions):
                self._events.put_nowait(await self._proxy.suggest(positions))
            case Steer(decision):
                await self._steer(decision)
            case Label(scan):
                await self._labelling.make(scan)
            case Train(scan, steps):
                await self._train(scan, steps)
            case Publish(version):
                await self._publish(version)
            case RollBack():
                await self._roll_back(action)
            case Remind(at):
                await asyncio.sleep(max(0.0, at - time.time()))
                self._events.put_nowait(Tick(time=max(at, time.time())))
            case Refuse(reason):
                self._events.put_nowait(CandidateRefused(time=time.time(), reason=reason))
            case Finish():
                await self._actors.source.close()

    @property
    def _proxy(self) -> PredictorProxy:
        if self.proxy is None:
            raise RuntimeError("found no actors yet, expected `run` to have started them")
        return self.proxy

    @property
    def _actors(self) -> Actors:
        return self._proxy.actors

    async def _steer(self, decision: DecisionSuggested) -> None:
        if decision.reasons:
            self.metrics.reason = decision.reasons[0]
        await self._actors.source.apply(decision)

    async def _train(self, scan: str, steps: int) -> None:
        fits = (call(rank, "fit", scan, steps) for rank in self._actors.ranks)
        outcomes: list[Round | BaseException] = await asyncio.gather(*fits, return_exceptions=True)
        rounds = [outcome for outcome in outcomes if isinstance(outcome, Round)]
        if len(rounds) < len(outcomes):
            await self._go_on_without(outcomes)
            return
        self.metrics.rounds.append(rounds)
        for part in PARTS:
            self.metrics.seconds[part] += sum(r.seconds[part] for r in rounds) / len(rounds)
        first = rounds[0]
        self.candidate = CandidateReady(
            time=time.time(),
            scan=scan,
            steps=first.steps,
            error=_number(first.error),
            served_error=_number(first.served_error),
            residual=_number(first.residual),
            loss=sum(r.loss for r in rounds) / len(rounds),
        )
        self._events.put_nowait(self.candidate)

    async def _go_on_without(self, outcomes: list[Round | BaseException]) -> None:
        """A round has failed. Where ranks are gone, the others form a group of their own; else the failure is ours."""
        lost = await self._actors.lost_ranks(get_client())
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if not lost or len(lost) == len(outcomes):
            # What the ranks say of one another is a consequence; the cause is what one of them says of itself.
            raise next((error for error in errors if not isinstance(error, GroupLost)), errors[0])
        await self._re_form(lost)

    async def _re_form(self, lost: list[int]) -> None:
        await self._actors.re_form(lost)
        await self._actors.ranks[0].serve(self.folder.models, self.campaign.version)
        now = time.time()
        for rank in lost:
            self._events.put_nowait(RankLost(time=now, rank=rank, reason="its worker is gone"))
        joined = RankJoined(time=now, ranks=len(self._actors.ranks), generation=self._actors.generation)
        self._events.put_nowait(joined)

    async def _publish(self, number: int) -> None:
        begun = time.perf_counter()
        version = self._version(number, (self.campaign.version,))
        await self._actors.ranks[0].publish(self.folder.models, version)
        installed: Installed = await self._proxy.install(number)
        self.metrics.seconds["publish"] += time.perf_counter() - begun
        if not installed.accepted:
            await self._take_back(number, installed)
            return
        self.metrics.published += 1
        self._events.put_nowait(
            ModelPublished(
                time=time.time(),
                version=number,
                validation_error=version.validation_error,
                validation_residual=version.validation_residual,
            )
        )

    async def _roll_back(self, action: RollBack) -> None:
        """Serve an older version, and let the ranks go on from it: candidates that descend from the other one would
        bring back what it was."""
        number, wanted = action.version, -_BETTER if action.if_better else None
        installed: Installed = await self._proxy.install(number, canary=action.if_better, margin=wanted)
        if not installed.accepted:
            self.metrics.refused += 1
            self._events.put_nowait(RollBackRefused(time=time.time(), version=number, reason=installed.reason))
            return
        await asyncio.to_thread(ModelStore(self.folder.models).point_to, number)
        await asyncio.gather(*(call(rank, "go_back", self.folder.models, number) for rank in self._actors.ranks))
        residual = ModelStore(self.folder.models).describe(number).validation_residual
        self._events.put_nowait(
            RolledBack(time=time.time(), version=number, validation_residual=residual, reason=action.reason)
        )

    async def _take_back(self, number: int, installed: Installed) -> None:
        """A version that the predictor has refused was never in service: later candidates are held against the one
        that is, and its number is free for the next of them."""
        self.metrics.refused += 1
        await asyncio.to_thread(ModelStore(self.folder.models).withdraw, number, installed.version)
        await self._actors.ranks[0].serve(self.folder.models, installed.version)
        self._events.put_nowait(
            CandidateRefused(time=time.time(), reason=f"refused by the predictor: {installed.reason}")
        )

    def _version(self, number: int, parents: tuple[int, ...]) -> ModelVersion:
        seen: Counter[str] = Counter()
        for last in self.metrics.rounds[-1] if self.metrics.rounds else []:
            seen.update(last.seen)
        candidate = self.candidate
        last_round = self.metrics.rounds[-1][0] if self.metrics.rounds else None
        return ModelVersion(
            number=number,
            network=type(self.experiment.network).__name__,
            hyperparameters=dict(self.experiment.network.hyperparameters),
            parents=parents,
            trained_on=dict(seen),
            steps=candidate.steps if candidate else 0,
            validation_error=candidate.error if candidate else None,
            validation_residual=candidate.residual if candidate else None,
            validation_residuals=last_round.residuals if last_round else (),
            noise_share=last_round.noise_share if last_round else 1.0,
            validation_offsets=last_round.offsets if last_round else (),
        )

    async def _sum_up(self) -> dict[str, Any]:
        self.metrics.too_late = len(waiting(self.folder.path))
        figures = await summary(self.metrics, self._actors, self._proxy)
        self.folder.write_summary(figures)
        return figures


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
