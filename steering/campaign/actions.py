"""What the campaign asks the runner to do."""

from __future__ import annotations

from dataclasses import dataclass

from steering.campaign.events import DecisionSuggested


@dataclass(frozen=True)
class Label:
    """Make labels by refinement from the newest frames of a scan, and hand them to the ranks."""

    scan: str


@dataclass(frozen=True)
class Train:
    """Let every rank take that many optimiser steps, all together."""

    scan: str
    steps: int


@dataclass(frozen=True)
class Publish:
    """Publish the candidate that the ranks hold as this version."""

    version: int


@dataclass(frozen=True)
class Refuse:
    """Leave the model in service where it is."""

    reason: str


@dataclass(frozen=True)
class RollBack:
    """Put an older version into service again. if_better: only where it does better on the newest held-out frames."""

    version: int
    reason: str
    if_better: bool = False


@dataclass(frozen=True)
class AskPolicy:
    """Ask the policy for up to that many positions."""

    positions: int


@dataclass(frozen=True)
class Steer:
    """Tell the source where to measure next."""

    decision: DecisionSuggested


@dataclass(frozen=True)
class Remind:
    """Send a tick at that time, seconds since the epoch."""

    at: float


@dataclass(frozen=True)
class Finish:
    """Everything is done: evaluate, write, close."""

    reason: str


Action = Label | Train | Publish | Refuse | RollBack | AskPolicy | Steer | Remind | Finish
