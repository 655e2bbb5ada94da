"""Labels as the runner has them made: by refinement, from outside, and the live image's refinement in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from distributed import get_client

from steering.campaign import Campaign, Event, LabelsReady
from steering.labels.external import ExternalReport, arrival, put_away, take_in, waiting
from steering.labels.make import LabelReport, make_labels
from steering.labels.refinement import refine_live
from steering.runner.actors import Actors
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.metrics import Metrics
from steering.runner.predictor_proxy import PredictorProxy

_LOOK_S = 0.5
"""Between two looks at the door for labels from outside."""
_REST_S = 0.1
"""Least rest between two refinements of the live image."""


@dataclass(kw_only=True)
class Labelling:
    """All work of the role `label`: Dask tasks, one at a time where one worker has it."""

    experiment: Experiment
    folder: RunFolder
    campaign: Campaign
    metrics: Metrics
    proxy: PredictorProxy
    emit: Callable[[Event], None]
    """Where events go."""
    re_form: Callable[[list[int]], Awaitable[None]]
    """What to do about lost ranks."""

    @property
    def actors(self) -> Actors:
        """The actors, as they are by now."""
        return self.proxy.actors

    async def make(self, scan: str) -> None:
        """Carry out the action to label: an event answers it, whatever becomes of it."""
        stratum = self._stratum(scan)
        report: LabelReport | None = None
        while report is None:  # somebody died meanwhile: labels are made again
            report = await self._at_labels(
                make_labels,
                self.actors.predictor,
                list(self.actors.ranks),
                scan,
                stratum=stratum,
                patch=int(self.experiment.network.hyperparameters["patch"]),
                settings=self.experiment.labels,
            )
        self.metrics.seconds["label"] += report.seconds
        self.metrics.labels = report.count
        self.metrics.left_out += report.left_out
        self.emit(
            LabelsReady(
                time=time.time(),
                scan=scan,
                count=report.count,
                residual=report.residual,
                seconds=report.seconds,
                left_out=report.left_out,
            )
        )

    def _stratum(self, scan: str) -> int:
        return self.metrics.strata.setdefault(scan, len(self.metrics.strata))

    async def _at_labels(self, task: Callable[..., Any], *arguments: Any, priority: int = 0, **settings: Any) -> Any:
        """The result of a task where labels are made; None where a rank or the predictor died of which it needed
        something."""
        client, generation, predictor = get_client(), self.actors.generation, self.actors.predictor_number
        try:
            return await client.submit(
                task, *arguments, **settings, resources={"label": 1}, pure=False, priority=priority
            )
        except Exception:
            if await self.proxy.replaced(predictor):
                return None
            await asyncio.sleep(_LOOK_S)  # nobody tries again faster than others are told of a loss
            lost = await self.actors.lost_ranks(client)
            if generation != self.actors.generation:
                return None  # it was sent to ranks of a group that has been left since
            if not lost:
                raise
            if not self.campaign.training:  # else the round that fails sees to it
                await self.re_form(lost)
            return None

    async def watch_external_labels(self) -> None:
        """Take in what others put into the folder `labels` of the run, file by file."""
        stuck: set[str] = set()  # opened, and impossible to move away
        while not self.campaign.finished:
            await asyncio.sleep(_LOOK_S)
            for path in await asyncio.to_thread(waiting, self.folder.path):
                if path.name in stuck:
                    continue
                scans = {scan: self._stratum(scan) for scan in self.campaign.scans}
                report: ExternalReport | None = await self._at_labels(
                    take_in,
                    self.actors.predictor,
                    list(self.actors.ranks),
                    path,
                    strata=scans,
                    patch=int(self.experiment.network.hyperparameters["patch"]),
                    settings=self.experiment.labels,
                )
                if report is not None:  # else it is taken in again, by the ranks that are left
                    if not await asyncio.to_thread(put_away, path, report):
                        stuck.add(path.name)
                    self.metrics.outside.append(report)
                    self.emit(arrival(report))

    async def refine_as_time_allows(self) -> None:
        """Take the live image further while labels are not being made: never more than a share of the time."""
        settings, seen, took = self.experiment.labels.live, 0, 0.0
        while settings.window and not self.campaign.finished:
            await asyncio.sleep(max(_REST_S, took * (1 / settings.share - 1)))
            scan, frames = self.campaign.scan, self.campaign.frames
            if scan is None or frames == seen or self.campaign.labelling:
                continue
            # Labels that become due while it waits for its turn go before it.
            seconds = await self._at_labels(refine_live, self.actors.predictor, scan, settings, priority=-1)
            if seconds is None:
                continue  # somebody died meanwhile
            took, seen = seconds, frames
            self.metrics.refinements.append(took)
