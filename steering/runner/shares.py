"""What the newest checkpoint holds of each rank: where a rank is lost, the others take it over between them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from distributed import Client

from steering.learning import RanksPart
from steering.runner.actors import ActorHandle, CallsFailed, call, every, while_all_there

logger = logging.getLogger(__name__)


class Shares:
    """Of a group of ranks. Each share is taken over once: a rank that is lost with what it had taken over since the
    checkpoint gives back only what it had then."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._folder = Path()
        self._part: RanksPart | None = None
        self._numbers: dict[ActorHandle, int] = {}
        """In the checkpoint, of the ranks that wrote it and whose shares nobody has taken over."""

    def written(self, folder: Path, part: RanksPart, members: Sequence[ActorHandle]) -> None:
        """A checkpoint is there, of these ranks in their order."""
        self._folder, self._part = folder, part
        self._numbers = {member: number for number, member in enumerate(members)}

    async def taken_over(self, lost: Sequence[ActorHandle], kept: Sequence[ActorHandle]) -> int:
        """Have those who are left take over what lost ranks had; how many stored samples came back with it.

        What cannot be read is lost, and is no reason to end the run. Where one of those who are left is lost meanwhile,
        the others may have taken over their parts all the same; who forms the group next will notice.
        """
        found = 0
        for member in lost:
            number = self._numbers.pop(member, None)
            if number is None or self._part is None:
                continue
            calls = (
                call(one.actor, "take_over", self._folder, self._part, number, rank=rank, ranks=len(kept))
                for rank, one in enumerate(kept)
            )
            try:
                found += sum(await while_all_there(self._client, kept, every(calls)))
            except (CallsFailed, OSError) as failed:
                cause = await failed.cause() if isinstance(failed, CallsFailed) else failed
                logger.warning("found no share of a lost rank in checkpoint %d: %s", self._part.number, cause)
        return found
