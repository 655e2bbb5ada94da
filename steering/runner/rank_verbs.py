"""What is asked of all ranks of a group at once, beside training and checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from steering.campaign import GroupChanged
from steering.records import ModelVersion
from steering.runner.actors import call, every

T = TypeVar("T")


class RankVerbs(ABC):
    """Verbs of a group. Each may be asked again where the answer is a change of the group."""

    @abstractmethod
    async def _together(
        self, work: Callable[[list[Any]], Awaitable[T]], generation: int | None = None
    ) -> T | GroupChanged:
        """Work in which all ranks take part, given their actors; it has its turn."""

    async def publish(self, store: Path, version: ModelVersion) -> GroupChanged | None:
        """Write the weights that all ranks hold as a version, and judge later candidates against it."""

        async def work(ranks: list[Any]) -> None:
            await call(ranks[0], "publish", store, version)
            await every(call(rank, "serve", store, version.number) for rank in ranks[1:])

        return await self._together(work)

    async def recalled(self) -> dict[str, float] | GroupChanged:
        """Errors of the version last published on held-out frames of each scan so far."""
        return await self._together(lambda ranks: call(ranks[0], "recalled"))

    async def serve(self, store: Path, number: int) -> GroupChanged | None:
        """Judge later candidates against a published version."""

        async def work(ranks: list[Any]) -> None:
            await every(call(rank, "serve", store, number) for rank in ranks)

        return await self._together(work)

    async def go_back(self, store: Path, number: int) -> GroupChanged | None:
        """Go on from the weights of a published version, with an optimiser without a past."""

        async def work(ranks: list[Any]) -> None:
            await every(call(rank, "go_back", store, number) for rank in ranks)

        return await self._together(work)

    async def digest(self) -> list[str] | GroupChanged:
        """Of each rank, a digest of weights, optimiser state and step: equal on all ranks of a sound group."""
        return await self._together(lambda ranks: every(call(rank, "digest") for rank in ranks))
