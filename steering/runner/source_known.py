"""What the runner knows of a source: enough for another one to go on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from steering.campaign import FellBack, Steer
from steering.runner.source_events import GoOn


@dataclass(kw_only=True)
class Known:
    """What the runner knows of the stream: enough for another source to go on."""

    position: Any = None
    """The newest that the source has said; None: it cannot say it."""
    applied: int = 0
    """Id of the newest Steer that this position includes."""
    handed: defaultdict[str, list[int]]
    """Ids of the frames of scans that are still kept, by scan."""

    def point(self, decisions: Iterable[Steer | FellBack], scans: Mapping[str, str]) -> GoOn:
        """Where another source goes on. decisions, scans: see GoOn."""
        handed = {scan: tuple(ids) for scan, ids in self.handed.items()}
        return GoOn(
            position=self.position,
            applied=self.applied,
            decisions=tuple(decisions),
            handed=handed,
            arrived=frozenset(i for ids in handed.values() for i in ids),
            scans=dict(scans),
            known=self.applied,
        )


class SinceCheckpoint:
    """Enough for another source to go on from the newest checkpoint: it can give once more what arrived since then,
    which is what another predictor lacks that goes on from the same checkpoint. Pure.

    Not usable after a raster that the source has measured by itself, until the next checkpoint: where that stands among
    the decisions is not known here.
    """

    def __init__(
        self, position: Any, applied: int = 0, decisions: Iterable[Steer | FellBack] = (), arrived: Iterable[int] = ()
    ) -> None:
        """position: of the source; None: it cannot say it, and nothing is kept. applied: id of the newest Steer that it
        includes. decisions: those that came after it, in order. arrived: ids of the frames since then."""
        self.position, self.applied = position, applied
        self.decisions: list[Steer | FellBack] = list(decisions)
        self.arrived: list[int] = list(arrived)
        self._keeping = position is not None
        self._rasters = 0
        self._marked: tuple[Any, int, int] | None = None

    def steered(self, steer: Steer) -> None:
        """The source hears of a decision."""
        if self._keeping:
            self.decisions.append(steer)

    def came(self, ids: Iterable[int]) -> None:
        """Frames have arrived."""
        if self._keeping:
            self.arrived += ids

    def asked(self) -> tuple[int, int]:
        """Now the source is asked for its position, for a checkpoint; to be handed to `mark`."""
        return len(self.arrived), self._rasters

    def mark(self, position: Any, applied: int, asked: tuple[int, int]) -> None:
        """The checkpoint that is being written has this position."""
        arrived, rasters = asked
        self._marked = (position, applied, arrived) if rasters == self._rasters else None

    def commit(self) -> None:
        """It is on the disk."""
        if self._marked is not None:
            (self.position, self.applied, before), self._marked = self._marked, None
            self.decisions = [one for one in self.decisions if isinstance(one, Steer) and one.id > self.applied]
            del self.arrived[:before]

    def fell_back(self) -> None:
        """The source has measured by itself."""
        self._rasters += 1
        self.position = self._marked = None

    def instead_of(self, newest: GoOn) -> GoOn:
        """Where another source goes on: from the newest checkpoint, else from the newest position."""
        if self.position is None:
            return newest
        return replace(
            newest,
            position=self.position,
            applied=self.applied,
            decisions=tuple(self.decisions),
            arrived=newest.arrived.union(self.arrived),
        )
