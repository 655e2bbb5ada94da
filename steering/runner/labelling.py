"""Labels as the runner has them made: by refinement, from outside, and the live image's refinement in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from distributed import Client

from steering.campaign import Campaign, Event, GroupChanged, LabelsReady
from steering.clusters.roles import LABEL
from steering.labels.external import ExternalReport, arrival, put_away, take_in, waiting
from steering.labels.make import make_labels
from steering.labels.refinement import refine_live
from steering.learning import stratum_of
from steering.runner.actors import Reached
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.metrics import Metrics
from steering.runner.optional import Optional
from steering.runner.predictor_proxy import PredictorProxy
from steering.runner.rank_group import RankGroup

_LOOK_S = 0.5
"""Between two looks into the inbox for external labels."""
_REST_S = 0.1
"""Least rest between two refinements of the live image."""


T = TypeVar("T")


@dataclass(kw_only=True)
class Labelling:
    """All work of the role `label`: Dask tasks, one at a time where one worker has it."""

    client: Client
    experiment: Experiment
    folder: RunFolder
    campaign: Campaign
    metrics: Metrics
    proxy: PredictorProxy
    ranks: RankGroup
    optional: Optional
    emit: Callable[[Event], None]
    """Where events go."""

    async def make(self, scan: str, generation: int) -> LabelsReady | None:
        """Make labels and send them to the ranks of a generation; None where the group of ranks changed meanwhile."""
        stratum = self._stratum(scan)
        report = await self._sent(
            generation,
            lambda ranks: self._task(
                make_labels,
                ranks,
                scan,
                stratum=stratum,
                patch=int(self.experiment.network.hyperparameters["patch"]),
                settings=self.experiment.labels,
                generation=generation,
            ),
        )
        if report is None:
            return None
        self.metrics.labelled(report)
        return LabelsReady(
            time=time.time(),
            scan=scan,
            count=report.count,
            residual=report.residual,
            seconds=report.seconds,
            left_out=report.left_out,
            reason=report.reason,
        )

    def _stratum(self, scan: str) -> int:
        return self.metrics.strata.setdefault(scan, stratum_of(self.folder.identity, scan))

    async def _sent(self, generation: int, work: Callable[[list[Any]], Awaitable[T]]) -> T | None:
        answer = await self.ranks.send(lambda ranks: work([Reached(rank) for rank in ranks]), generation)
        return None if isinstance(answer, GroupChanged) else answer

    async def _task(self, task: Callable[..., T], *arguments: Any, priority: int = 0, **settings: Any) -> T:
        """The result of a task where labels are made: its first argument is the predictor."""

        async def work(predictor: Any) -> T:
            result: T = await self.client.submit(
                task, Reached(predictor), *arguments, **settings, resources={LABEL: 1}, pure=False, priority=priority
            )
            return result

        return await self.proxy.outlived(work)

    async def watch_external_labels(self) -> None:
        """Read the files that others put into the folder `labels` of the run, one by one."""
        stuck: set[str] = set()  # opened, and impossible to move away
        while not self.campaign.finished:
            await asyncio.sleep(_LOOK_S)
            found = await self.optional.run("looking for external labels", asyncio.to_thread(waiting, self.folder.path))
            for path in found or ():
                if path.name not in stuck and not await self._take_in(path):
                    stuck.add(path.name)

    async def _take_in(self, path: Path) -> bool:
        """Read a file of labels; False where it cannot be moved away afterwards."""
        scans = {scan: self._stratum(scan) for scan in self.campaign.scans}
        generation = self.ranks.generation
        report = await self.optional.run(
            "reading external labels",
            self._sent(
                generation,
                lambda ranks: self._task(
                    take_in,
                    ranks,
                    path,
                    strata=scans,
                    patch=int(self.experiment.network.hyperparameters["patch"]),
                    settings=self.experiment.labels,
                    generation=generation,
                ),
            ),
            lambda failed: ExternalReport(file=path.name, refused={"reading it failed: see the log": 1}),
        )
        if report is None:
            return True  # the group of ranks changed: it is taken in again
        self.metrics.outside.append(report)
        self.emit(arrival(report))
        return await asyncio.to_thread(put_away, path, report)

    async def refine_as_time_allows(self) -> None:
        """Refine the live image while no labels are being made, for at most a share of the time."""
        settings, seen, took = self.experiment.labels.live, 0, 0.0
        while settings.window and not self.campaign.finished:
            await asyncio.sleep(max(_REST_S, took * (1 / settings.share - 1)))
            scan, frames = self.campaign.scan, self.campaign.frames
            if scan is None or frames == seen or self.campaign.labelling:
                continue
            # Labels that become due while it waits for its turn go before it.
            begun = time.perf_counter()
            seconds = await self.optional.run(
                "refining the live image", self._task(refine_live, scan, settings, priority=-1)
            )
            seen = frames
            took = time.perf_counter() - begun if seconds is None else seconds
            if seconds is not None:
                self.metrics.refinements += 1
                self.metrics.refine_s += seconds
