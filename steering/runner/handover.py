"""What is on workers whose jobs are about to end goes to others before that: ranks, predictor, the runner itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steering.clusters.roles import INFERENCE, RUNNER, SOURCE, TRAINER, Workers, ending
from steering.runner.optional import Optional
from steering.runner.predictor_proxy import PredictorProxy
from steering.runner.rank_group import RankGroup
from steering.runner.source_proxy import SourceProxy


class HandedOver(RuntimeError):
    """A runner has ended, and another one goes on from the checkpoint that it wrote last."""


@dataclass(kw_only=True)
class HandOver:
    """Hands over what is on workers that have laid down their roles, see `steering.clusters.roles.lay_down`."""

    here: str
    """Address of the runner's own worker."""
    ranks: RankGroup
    proxy: PredictorProxy
    source: SourceProxy
    optional: Optional
    start: Callable[[Coroutine[Any, Any, None]], None]
    """Starts work beside."""
    checkpoints: Path
    """Where ranks write what others take over."""
    write: Callable[[], Awaitable[None]]
    """Writes a checkpoint."""
    end: Callable[[Exception], None]
    """Ends the run here."""
    _under_way: set[str] = field(default_factory=set)

    def leaving(self, workers: Workers) -> list[str]:
        """Addresses of the workers with ranks that are about to end."""
        return [address for address in self.ranks.addresses if ending(workers, address, TRAINER)]

    def look(self, workers: Workers, *, joining: bool) -> None:
        """Begin what is due. joining: ranks are about to join, which will take over what others have."""
        leaving = self.leaving(workers)
        ours = ending(workers, self.here, RUNNER) or ending(workers, self.source.address, SOURCE)
        if ours or (leaving and not joining and len(leaving) == len(self.ranks)):
            self._once("the run", self.hand_over())
        elif leaving and not joining:
            self._once("ranks", self._retire(leaving))
        if ending(workers, self.proxy.address, INFERENCE):
            self._once("the predictor", self.proxy.move())

    def _once(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        """One at a time of each kind; after the whole run nothing."""
        if what in self._under_way or "the run" in self._under_way:
            work.close()
            return
        self._under_way.add(what)
        self.start(self._noted(what, work))

    async def _noted(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        finally:
            self._under_way.discard(what)

    async def _retire(self, leaving: list[str]) -> None:
        work = self.ranks.retire(leaving, self.checkpoints)
        await self.optional.run("handing over what ranks of a job that ends remember", work)

    async def hand_over(self) -> None:
        """Write a checkpoint, and end here: the run raises HandedOver."""
        await self.optional.run("writing a checkpoint before the end of a job", self.write())
        self.end(HandedOver("the runner's job ends: another one goes on from its checkpoint"))
