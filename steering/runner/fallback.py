"""What the source may measure if its runner is lost: a safe raster, which the runner allows beforehand."""

from __future__ import annotations

import asyncio
from itertools import islice

from steering.campaign.gate import Gate
from steering.policies import Raster
from steering.runner.experiment import Experiment
from steering.runner.source_proxy import SourceProxy

_BEAT_S = 1.0
"""Between two signs of life."""
_MOST = 512
"""Positions of the reserve."""


class Fallback:
    """Gives the source a sign of life, and with it the reserve, every second."""

    def __init__(self, experiment: Experiment, source: SourceProxy, gate: Gate) -> None:
        """gate: of the campaign."""
        candidates = experiment.source.candidates
        self._raster = tuple(map(tuple, Raster(candidates).suggest(len(candidates)).positions.tolist()))
        self._source, self._gate = source, gate
        self._going_on = experiment.unsteered_s is not None

    async def keep(self) -> None:
        """Do so for ever, where the source is to go on by itself."""
        while self._going_on:
            left = (position for position in self._raster if position not in self._source.decided)
            await self._source.beat(self._gate.reserve(tuple(islice(left, _MOST))))
            await asyncio.sleep(_BEAT_S)
