"""Where ranks and predictor compute, said in the log: a GPU that nobody uses shows at once, not by a slow run."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

from steering.campaign import DevicesFound, Event, GroupChanged
from steering.runner.actors import call, every
from steering.runner.assembly import Actors
from steering.runner.optional import Optional

LOOK_S = 2.0
_LISTED = 4
"""Ranks that are named one by one; more are counted."""


async def say_devices(actors: Actors, optional: Optional, log: Callable[[Event], None]) -> None:
    """Log where they compute, and again whenever others have taken their places; goes on until it is cancelled."""
    said = None
    while True:
        now = (actors.ranks.generation, actors.proxy.number)
        found = None if now == said else await optional.run("asking where is computed", _found(actors, now[0]))
        if found is not None:
            log(found)
            said = now
        await asyncio.sleep(LOOK_S)


async def _found(actors: Actors, generation: int) -> DevicesFound | None:
    ranks = await actors.ranks.send(lambda each: every(call(one, "computes_on") for one in each), generation)
    if isinstance(ranks, GroupChanged):
        return None
    predictor = (await actors.proxy.ask("figures", False))["device"]
    return DevicesFound(time=time.time(), ranks=tuple(ranks), predictor=predictor)


def devices_in_words(ranks: Sequence[str], predictor: str) -> str:
    """In half a line."""
    if len(ranks) > _LISTED:
        kinds = Counter(one.partition(" (")[0] for one in ranks)
        listed = ", ".join(f"{count} on {kind}" for kind, count in kinds.items())
    else:
        listed = ", ".join(ranks)
    return f"{len(ranks)} rank{'s' if len(ranks) > 1 else ''}: {listed}; predictor: {predictor}"
