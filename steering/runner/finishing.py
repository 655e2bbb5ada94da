"""The last work on scans that are over, as the runner has it done: one at a time, after all labels that are due."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, wait

from steering.campaign import Event, ScanRefined
from steering.clusters.roles import LABEL
from steering.labels.final import ALONE, ASIDE, FinalReport, begin, go_on, hand_over, is_over
from steering.runner.actors import LostForGood
from steering.runner.folder import RunFolder
from steering.runner.metrics import Metrics
from steering.runner.predictor_proxy import PredictorProxy

logger = logging.getLogger(__name__)

_PRIORITY = -2
"""Below labels (0) and the live image of the scan being measured (-1)."""


@dataclass
class Finishing:
    """Takes each scan to its final state, once. A failure does not end the run, unless the predictor is lost for good:
    it is reported, and the scan is saved as the live image had it."""

    client: Client
    metrics: Metrics
    folder: RunFolder
    proxy: PredictorProxy
    log: Callable[[Event], None]
    """Where events go: they call for no action."""
    _niceness: int = ASIDE
    _begun: set[str] = field(default_factory=set)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def finish_all(self) -> None:
        """The run is over, and with it every scan."""
        self._niceness = ALONE
        for scan in self.metrics.campaign.scans:
            await self.finish(scan)

    async def finish(self, scan: str) -> None:
        """Predict all frames of a scan by the version in service at its end, and refine its object to convergence.

        Returns when that is done, also where another call has begun it.
        """
        version = self.metrics.own_end[scan]
        async with self._turn:
            if scan in self._begun:
                return
            self._begun.add(scan)
            try:
                event = await self._work(scan, version)
            except LostForGood:  # no matter of this work alone
                raise
            except Exception as error:  # optional work: the scan is there without it
                logger.exception("%s: its last refinement failed, it is saved as the live image had it", scan)
                event = _not_refined(scan, version, f"{type(error).__name__}: {error}")
            if event.reason:
                await self.proxy.ask("conclude", scan, None)
            self.log(event)

    async def _work(self, scan: str, version: int) -> ScanRefined:
        while True:
            number = self.proxy.number
            try:
                return await self._attempt(scan, version)
            except Exception:
                if not await self.proxy.replaced(number):
                    raise
                # The predictor died meanwhile: another one has the frames by now.

    async def _attempt(self, scan: str, version: int) -> ScanRefined:
        experiment, predictor = self.metrics.experiment, self.proxy.reached
        settings = experiment.labels.final
        if not settings.refine.passes:
            return _not_refined(scan, version, "the settings ask for no pass")
        work = await self._done(
            begin,
            predictor,
            scan,
            network=experiment.network,
            store=self.folder.models,
            version=version,
            probe=experiment.source.probe,
            settings=settings,
        )
        # Tasks of a second each, not one of a minute: labels of the scan being measured go in between.
        while not await (await self._done(is_over, work)):
            if self.metrics.stopped:
                return _not_refined(scan, version, "the run was stopped by a person")
            work = await self._done(go_on, work, self._niceness)
        report: FinalReport = await (await self._done(hand_over, work, predictor, scan))
        return ScanRefined(
            time=time.time(),
            scan=scan,
            version=version,
            frames=report.frames,
            passes=report.passes,
            converged=report.converged,
            residual=report.residual,
            seconds=report.seconds,
        )

    async def _done(self, task: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        """The future of a task of the role label, once it is done: its result stays there. Raises what it raised."""
        future = self.client.submit(task, *arguments, **settings, resources={LABEL: 1}, pure=False, priority=_PRIORITY)
        await wait(future)
        if future.status == "error":
            await future
        return future


def _not_refined(scan: str, version: int, reason: str) -> ScanRefined:
    return ScanRefined(time=time.time(), scan=scan, version=version, reason=reason)
