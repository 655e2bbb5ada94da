"""Events about parts of a run that are lost, and about what takes their place."""

from __future__ import annotations

from dataclasses import dataclass

from steering.campaign.event import Event


@dataclass(frozen=True, kw_only=True)
class WorkerLost(Event):
    """A worker of the cluster is gone, or was silent for too long and was taken off it (`silent`). What that means for
    the run is in other events."""

    worker: str
    roles: tuple[str, ...]
    silent: bool


@dataclass(frozen=True, kw_only=True)
class GroupChanged(Event):
    """The ranks have formed a new group: `generation`, of `ranks` ranks. A training round and a making of labels that
    were under way are void."""

    lost: tuple[int, ...]
    """Their numbers in the group before."""
    joined: tuple[int, ...]
    """Numbers of new ranks in this group."""
    ranks: int
    generation: int
    seconds: float = 0.0
    """From when the loss was noticed, or the new ranks were ready, until the new group had formed."""
    retired: tuple[int, ...] = ()
    """Of the lost ones, those that left in order: what they remembered is with the others."""
    samples_lost: int = 0
    """Stored samples that the lost ranks reported after their last training round, without those that came back: they
    are rehearsed no more."""
    samples_back: int = 0
    """Stored samples of the lost ranks that the others have taken over from the newest checkpoint."""
    rounds_lost: int = 0
    """Training rounds that came after the checkpoint from which all of this group begin: they are made up for after the
    last frame."""


@dataclass(frozen=True, kw_only=True)
class PredictorReplaced(Event):
    """The predictor's worker was lost; `seconds` after that was noticed another had taken its place and was sent
    `frames` frames again. What was predicted and decided before stands."""

    frames: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SourceSilent(Event):
    """The source has handed out nothing since the time `since`, although positions are due."""

    since: float


@dataclass(frozen=True, kw_only=True)
class SourceReopened(Event):
    """The source had failed for this reason, or was lost, and another has gone on from it, `seconds` after that was
    noticed. attempt: so often in a row, without a frame in between."""

    reason: str
    attempt: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class FellBack(Event):
    """The source had heard nothing of its runner since the time `since`, and measured these positions by itself: a part
    of the safe raster that the limits had allowed beforehand."""

    positions: tuple[tuple[float, float], ...]
    since: float


@dataclass(frozen=True, kw_only=True)
class FramesLost(Event):
    """Frames that had arrived are gone for good: they are in no checkpoint, and the source cannot give them again."""

    scan: str
    frame_ids: tuple[int, ...]
    reason: str
