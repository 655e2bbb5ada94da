"""Continual learning over distributed ranks: samples, rehearsal buffers, their exchange, strategies, the loop."""

from steering.learning.checkpoint import RankFiles, RanksPart, joined, prune
from steering.learning.group import GroupLost, MeetingPoint, Place, Rendezvous
from steering.learning.loop import PARTS, Loop, Tally
from steering.learning.objectives import Classification, Objective, Reconstruction
from steering.learning.rank import Rank, Round
from steering.learning.rehearsal import Rehearsal
from steering.learning.samples import Labels, NoSamples
from steering.learning.settings import TrainerSettings

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
    "RankFiles",
    "RanksPart",
    "Reconstruction",
    "Rehearsal",
    "Rendezvous",
    "Round",
    "Tally",
    "TrainerSettings",
    "joined",
    "prune",
]
