"""Continual learning over distributed ranks: samples, rehearsal buffers, their exchange, strategies, the loop."""

from steering.learning.group import MeetingPoint, Rendezvous
from steering.learning.objectives import Objective, Reconstruction
from steering.learning.samples import Labels
from steering.learning.trainer import PARTS, GroupLost, Rank, Round, TrainerSettings

__all__ = [
    "PARTS",
    "GroupLost",
    "Labels",
    "MeetingPoint",
    "Objective",
    "Rank",
    "Reconstruction",
    "Rendezvous",
    "Round",
    "TrainerSettings",
]
