"""When the predictor's worker is lost another takes its place, and the campaign goes on where it was."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distributed import get_client

from steering.campaign import Campaign, DecisionSuggested, Event, FrameSetAside, PredictionReady, PredictorReplaced
from steering.inference import Advice, Handover
from steering.runner.asking import asked
from steering.runner.crew import Crew

_ATTEMPTS = 3
"""The worker that takes the place may be lost as well, so often in a row."""


@dataclass(kw_only=True)
class Failover:
    """Asks the predictor, whichever it is by now, and keeps what the next one would have to know.

    Nothing that decides lives in the predictor alone: the frames are with the source until their scan is saved, the
    versions in the store, the policy comes with each of its answers, and what was told of a frame is noted here. A
    question that a lost predictor has not answered is put to the next one; what it may have decided was never heard.
    """

    crew: Crew
    campaign: Campaign
    emit: Callable[[Event], None]
    """Where events go."""
    _advice: Advice | None = None
    _predicted: defaultdict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    _aside: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """The predictor's answer. Raises what the predictor raised, and RuntimeError where it is lost for good."""
        while True:
            number = self.crew.predictor_number
            try:
                return await asked(self.crew.predictor, method, *arguments, **named)
            except Exception:
                if not await self.replaced(number):
                    raise

    async def suggest(self, positions: int) -> DecisionSuggested:
        """The policy's answer."""
        self._advice = await self.ask("suggest", positions)
        return self._advice.decision

    async def events(self) -> list[Event]:
        """What has happened at the predictor since the last call; waits until there is something."""
        events: list[Event] = await self.ask("events")
        for event in events:
            match event:
                case PredictionReady(scan=scan, frame_ids=ids, version=version):
                    self._predicted[scan].update(dict.fromkeys(ids, version))
                case FrameSetAside(scan=scan, frame_ids=ids):
                    self._aside[scan].update(ids)
        return events

    async def let_go(self, scan: str) -> None:
        """A scan is over and saved: a predictor that starts again need not know it."""
        await self.crew.source.let_go(scan)
        self._predicted.pop(scan, None)
        self._aside.pop(scan, None)

    async def replaced(self, number: int) -> bool:
        """See to it that another sits where the predictor of this number sat, if it is lost; False where it is not."""
        async with self._one_at_a_time:
            if self.crew.predictor_number != number:
                return True
            client, begun = get_client(), time.perf_counter()
            if not await self.crew.predictor_lost(client):
                return False
            if self._advice is not None and self._advice.policy is None:
                raise RuntimeError(
                    "found the predictor's worker lost, and a policy that cannot be pickled, expected one that can, so "
                    "that it goes on elsewhere: keep files, sockets and threads out of it"
                )
            frames = await self._replace(client)
            self.emit(PredictorReplaced(time=time.time(), frames=frames, seconds=time.perf_counter() - begun))
            return True

    async def _replace(self, client: Any) -> int:
        attempts = 0
        while True:
            attempts += 1
            handover = Handover(
                version=self.campaign.version,
                advice=self._advice,
                predicted={scan: dict(known) for scan, known in self._predicted.items()},
                aside={scan: frozenset(ids) for scan, ids in self._aside.items()},
            )
            try:
                return await self.crew.replace_predictor(client, handover)
            except (OSError, ValueError):  # what an actor raises whose worker is lost
                if attempts == _ATTEMPTS:
                    raise
