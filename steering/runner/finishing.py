"""The last work on scans that are over, as the runner has it done: one at a time, after all labels that are due. What
they leave is saved in the run's folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from distributed import Client, wait

from steering.campaign import Event, ScanRefined
from steering.clusters.roles import LABEL
from steering.inference.live import AS_MEASURED
from steering.labels.final import ALONE, ASIDE, FinalReport, begin, go_on, hand_over, is_over
from steering.runner.actors import Reached
from steering.runner.folder import RunFolder
from steering.runner.metrics import Metrics
from steering.runner.optional import Optional
from steering.runner.predictor_proxy import PredictorProxy

_PRIORITY = -2
"""Below labels (0) and the live image of the scan being measured (-1)."""
_LOOK_S = 0.5
"""Between two looks whether all of a scan was reported."""

T = TypeVar("T")


@dataclass
class Finishing:
    """Takes each scan to its final state, and saves it. A scan of which that fails is saved as the live image had it.

    What a scan has come to is in the predictor alone until it is saved. Where another predictor takes its place before
    that, the work is done again; after that, what is saved stays as it is.
    """

    client: Client
    metrics: Metrics
    folder: RunFolder
    proxy: PredictorProxy
    optional: Optional
    log: Callable[[Event], None]
    """Where events go: they call for no action."""
    _niceness: int = ASIDE
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def leave(self, scan: str, version: int) -> None:
        """Take a scan that is over to its final state, and save it, so that no loss can take it away. version: in
        service when it was left."""
        if await self._stood(scan):
            return
        saved = await self._saved("saving the live image of a scan that is over", scan)
        while self.metrics.unreported(scan):
            await asyncio.sleep(_LOOK_S)
        if not (saved and await self.proxy.ask("is_over", scan)):
            return  # it was only interrupted, or is saved at the end of the run

        async def kept() -> bool:
            await self._finish(scan, version)
            return await self._saved("saving what became of a scan that is over", scan)

        if await self._by_one_predictor(kept):
            await self.proxy.let_go(scan)

    async def finish_all(self) -> None:
        """The run is over, and with it every scan. Raises OSError where one cannot be saved."""
        self._niceness, campaign = ALONE, self.metrics.campaign

        async def kept() -> None:
            for scan in campaign.scans:
                if await self._stood(scan):
                    continue
                now = scan == campaign.scan or scan not in self.metrics.own_end
                await self._finish(scan, campaign.version if now else self.metrics.own_end[scan])
            await self.save_all()

        await self._by_one_predictor(kept)

    async def _finish(self, scan: str, version: int) -> None:
        """Predict all frames of a scan by this version, and refine its object to convergence.

        Returns when that is done, also where another call has begun it.
        """
        async with self._turn:
            if await self._finished(scan):
                return
            self.metrics.finals.pop(scan, None)  # of a predictor that was lost before that was saved
            what = f"the last refinement of {scan}"
            event = await self.optional.run(
                what,
                self.proxy.outlived(lambda predictor: self._work(Reached(predictor), scan, version)),
                lambda failed: _not_refined(scan, version, failed.error),
            )
            if event.reason:
                await self.proxy.ask("conclude", scan, None)
            self.log(event)

    async def _stood(self, scan: str) -> bool:
        """Whether a scan was saved as it was finished before its predictor, or all, was lost: it is let go of."""
        if scan in self.proxy.over:
            return True
        final = self.metrics.finals.get(scan)
        if final is None or final.reason or await self.proxy.ask("is_concluded", scan) is not False:
            return False
        stood = await asyncio.to_thread(self.folder.refinement, scan) not in ("", AS_MEASURED)
        if stood:
            await self.proxy.let_go(scan)
        return stood

    async def _finished(self, scan: str) -> bool:
        """Whether nothing is left to do: it is saved as it was left, or the predictor has what it leaves, or knows
        nothing of it any more."""
        if scan in self.proxy.over:
            return True
        return scan in self.metrics.finals and await self.proxy.ask("is_concluded", scan) is not False

    async def save_all(self) -> None:
        """Write the live image of every scan so far into the run's folder. Raises OSError."""
        for scan in list(self.metrics.campaign.scans):
            await self._save(scan)

    async def _save(self, scan: str) -> bool:
        async with self._writing:
            # What is let go of is there as it was left: a predictor that came later may have less of it.
            live = None if scan in self.proxy.over else await self.proxy.ask("dataset", scan)
            if live is not None:  # else it is a scan that was saved before the predictor was lost
                await asyncio.to_thread(self.folder.write_object, scan, live)
            return True

    async def _saved(self, what: str, scan: str) -> bool:
        return bool(await self.optional.run(what, self._save(scan)))

    async def _by_one_predictor(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of work that a predictor was not lost in the middle of: else it is done again."""
        while True:
            number = self.proxy.number
            done = await work()
            if self.proxy.number == number:
                return done

    async def _work(self, predictor: Any, scan: str, version: int) -> ScanRefined:
        experiment = self.metrics.experiment
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
            if self.metrics.campaign.stopped:
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
