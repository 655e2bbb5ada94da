"""Continual learning over distributed ranks: samples, rehearsal buffers, their exchange, strategies, the loop."""

from steering.learning.group import GroupLost, MeetingPoint, Place, Rendezvous
from steering.learning.loop import PARTS, Loop, Tally, TrainerSettings
from steering.learning.objectives import Classification, Objective, Reconstruction
from steering.learning.rank import Rank, Round
from steering.learning.samples import Labels, NoSamples

__all__ = [
    "PARTS",
    "Classification",
    "GroupLost",
    "Labels",
    "Loop",
    "MeetingPoint",
    "NoSamples",
    "Objective",
    "Place",
    "Rank",
    "Reconstruction",
    "Rendezvous",
    "Round",
    "Tally",
    "TrainerSettings",
]
