"""The source's actor outlives its runner: it is published on the cluster, and the next runner adopts it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from distributed import Client

from steering.runner.actors import ActorHandle, call, place, unpublish, while_there
from steering.runner.folder import RunFolder
from steering.runner.source_actor import SourceActor
from steering.runner.source_events import SourceResume

PUBLISHED = "steering-source"
"""Under which it is published."""
_ADOPT_S = 60.0
"""How long a source that has gone on by itself may take to send a new predictor what it has kept."""

logger = logging.getLogger(__name__)


async def place_source(client: Client, actor: SourceActor, worker: str) -> ActorHandle:
    """A new actor, published; one that was published before ends itself, for nobody holds it any more."""
    await withdraw(client)
    handle = await place(client, actor, worker=worker)
    await client.publish_dataset(handle.future, name=PUBLISHED)
    return handle


async def withdraw(client: Client) -> None:
    """The actor need not outlive its runner any more."""
    await unpublish(client, PUBLISHED)


async def adopted(
    client: Client, folder: RunFolder | None, predictor: Any, resume: SourceResume, holder: str = ""
) -> ActorHandle | None:
    """The source of a lost runner of this run, if it is there and can go on; None: another one must be opened. holder:
    who asks it from now on, see SourceActor.asked."""
    if folder is None:
        return None
    try:
        async with asyncio.timeout(_ADOPT_S):
            future = await client.get_dataset(PUBLISHED)
            actor = await future
            answer = call(actor, "adopt", folder.identity, predictor, resume, holder)
            there = await while_there(client, actor._address, answer)
    except Exception as error:  # whatever it is, another source can be opened
        logger.info("found no source to go on with: %r", error)
        return None
    return ActorHandle(actor, future, actor._address) if there else None
