"""Checkpoints of the whole loop, written while it goes on: nobody stops for one.

Each part is taken at its own moment, in an order that leaves no gap: first the campaign, with the number of its last
event; then the source's position; then, once all frames that were acknowledged by then are predicted, policy and scans;
and the ranks between two rounds. So what a part does not include is in the log after that number, or the source has it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steering.campaign import CheckpointWritten, Event, state_of
from steering.inference import SavedPolicy, SavedPredictor
from steering.records.plain import plain
from steering.runner.actors import answered, call
from steering.runner.event_log import EventLog
from steering.runner.executor import Executor
from steering.runner.manifest import Manifest, checkpoints, commit, newest_number, prune, write_part
from steering.runner.optional import Optional
from steering.runner.spool import drop_spooled

FRAMES = "frames"
"""Below RUN/checkpoints: what predictors have written of each frame."""
_LOOK_S = 0.25
"""Between two looks whether a checkpoint is due."""


@dataclass(kw_only=True)
class Checkpoints:
    """Writes one after the other. Failure costs a checkpoint, not the run."""

    log: EventLog
    executor: Executor
    """Who knows all parts."""
    optional: Optional
    emit: Callable[[Event], None]
    source_ended: Callable[[], bool]
    number: int = field(init=False)
    """Of the newest folder of one, whole or not."""
    _written: list[float] = field(default_factory=list)
    """When those that are kept were begun."""
    _predictor_bytes: tuple[int, int] = (0, 0)
    """By the predictor of that number: all that it has written."""
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        folder = self.executor.folder
        # What a lost runner has left on the workers may be writing the files of the one after the newest.
        self.number = newest_number(folder) + folder.recovering

    async def as_time_goes(self) -> None:
        """Write one whenever it is due: after so many seconds, and when another scan begins."""
        campaign, every_s = self.executor.campaign, self.executor.experiment.checkpoint_s
        last, scan = time.monotonic(), campaign.scan
        while every_s is not None and not campaign.finished:
            await asyncio.sleep(min(_LOOK_S, every_s))
            if time.monotonic() - last >= every_s or campaign.scan != scan:
                await self.optional.run("writing a checkpoint", self.write())
                last, scan = time.monotonic(), campaign.scan

    async def write(self) -> None:
        """Write one. Raises OSError, and what an actor raises."""
        async with self._turn:
            begun, root, number = time.time(), checkpoints(self.executor.folder), self.number + 1
            self.number, event = number, self.log.number
            told = self.executor.proxy.told()
            parts: dict[str, Any] = {
                "campaign": state_of(self.executor.campaign),
                "metrics": self.executor.metrics.state(),
            }
            parts["runner"] = {
                "unsent": plain(list(self.executor.unsent.values())),
                "over": list(self.executor.proxy.over),
                **told,
                "source_ended": self.source_ended(),
            }
            await asyncio.to_thread((root / FRAMES).mkdir, parents=True, exist_ok=True)
            parts["source"] = await self.executor.source.position()
            maker = 0

            def ask(predictor: Any) -> Any:  # its number in the names: a lost one may be writing still
                nonlocal maker
                maker = self.executor.proxy.number
                return call(predictor, "checkpoint", root / FRAMES, f"{number:06d}-{maker}")

            parts["predictor"] = await self.executor.proxy.outlived(ask)
            parts["ranks"], files = await self._of_ranks(root)
            files |= {f"{FRAMES}/{name}": -1 for name in _names(parts["predictor"])}
            before = self._predictor_bytes[1] if self._predictor_bytes[0] == maker else 0
            self._predictor_bytes = (maker, parts["predictor"]["bytes"])
            written = await asyncio.to_thread(
                self._commit,
                root,
                number,
                event,
                begun,
                parts,
                files,
                parts["predictor"]["bytes"] - before + parts["ranks"]["bytes"],
            )
            saved = SavedPredictor(
                folder=root / FRAMES, part=parts["predictor"], policy=SavedPolicy.read(parts["predictor"]["policy"])
            )
            self.executor.proxy.rebase(saved, told)
            self.executor.source.rebase()
            now = time.time()
            self.emit(CheckpointWritten(time=now, number=number, last=event, bytes=written, seconds=now - begun))

    async def _of_ranks(self, root: Path) -> tuple[Any, dict[str, int]]:
        """The ranks' part in JSON's types, and its files."""
        part = await answered(lambda: self.executor.ranks.checkpoint(root))
        return part.to_json(), dict.fromkeys(part.files, -1)

    def _commit(
        self, root: Path, number: int, event: int, begun: float, parts: dict[str, Any], files: dict[str, int], more: int
    ) -> int:
        """Write what the runner itself has to write, and the manifest; in a thread. Returns the bytes in all."""
        self.log.sync()
        written = {name: write_part(root, number, name, part) for name, part in parts.items()}
        sizes = {name: (root / name).stat().st_size if size < 0 else size for name, size in files.items()}
        total = more + sum(size for _, size in written.values())
        digests = {name: digest for name, (digest, _) in written.items()}
        commit(
            root,
            Manifest(number=number, event=event, time=begun, parts=digests, files=sizes, bytes=total),
        )
        keep = self.executor.experiment.checkpoints
        prune(root, keep)
        self._written = [*self._written, begun][-keep:]
        if len(self._written) == keep:
            drop_spooled(root / "spool", self._written[0])
        return total


def _names(part: dict[str, Any]) -> set[str]:
    """The files that a predictor's part names."""
    found = {name for scan in part["scans"] for name in scan["blocks"]}
    return found | {scan["image"] for scan in part["scans"] if scan["image"]}
