"""Continual learning over distributed ranks: samples, rehearsal buffers, their exchange, strategies, the loop."""

from steering.learning.group import MeetingPoint, Rendezvous
from steering.learning.loop import PARTS, GroupLost, Loop, Tally, TrainerSettings
from steering.learning.objectives import Classification, Objective, Reconstruction
from steering.learning.samples import Labels
from steering.learning.trainer import Rank, Round

__all__ = [
    "PARTS",
    "Classification",
    "GroupLost",
    "Labels",
    "Loop",
    "MeetingPoint",
    "Objective",
    "Rank",
    "Reconstruction",
    "Rendezvous",
    "Round",
    "Tally",
    "TrainerSettings",
]
