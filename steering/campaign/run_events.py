"""What happens to a run as a whole: it begins, is saved, is recovered, and what it loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steering.campaign.event import Event


@dataclass(frozen=True, kw_only=True)
class CampaignBegan(Event):
    """The first line of a log: the settings by which the campaign decides, so that the log replays by itself."""

    settings: Mapping[str, Any]
    """Fields of CampaignSettings, nested records as mappings."""
    frame_time: float


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The run begins with what others have learnt."""

    origins: tuple[str, ...]
    """Identities of earlier runs, and names of memories, whose samples it has."""
    model: str
    """What its first model is, in words."""
    without: tuple[str, ...] = ()
    """Whose samples it does not have, and why, in words."""


@dataclass(frozen=True, kw_only=True)
class DevicesFound(Event):
    """Where the ranks and the predictor compute, in words: at the start, and whenever that has changed."""

    ranks: tuple[str, ...]
    """In the order of the ranks, such as "NVIDIA H200 (GPU 0 of node7)"."""
    predictor: str


@dataclass(frozen=True, kw_only=True)
class WorkFailed(Event):
    """Optional work failed, for the first time in this run; the run goes on without it."""

    what: str
    """Which work, in words."""
    error: str
    traceback: str


@dataclass(frozen=True, kw_only=True)
class CheckpointWritten(Event):
    """Checkpoint `number` is on disk. It includes every event of the log up to number `last`. `bytes` were written
    for it, those that an earlier checkpoint shares with it left out, in `seconds`."""

    number: int
    last: int
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RunRecovered(Event):
    """After the loss of everything the run goes on, from checkpoint `number` and the events after it. `remarks` say
    what is not as it was before."""

    number: int
    remarks: tuple[str, ...] = ()
