"""Continual learning over distributed ranks: samples, rehearsal buffers, their exchange, strategies, the loop."""

from steering.learning.checkpoint import RankFiles, RanksPart, joined, newest_number, prune
from steering.learning.group import GroupLost, MeetingPoint, Place, Rendezvous
from steering.learning.identity import identities, stratum_of
from steering.learning.loop import Loop
from steering.learning.memory import Held, Memory, memories
from steering.learning.objectives import Classification, Objective, Reconstruction
from steering.learning.origin import Origin, Started, best_weights, names_in, stored_names, usable
from steering.learning.rank import Rank, Round
from steering.learning.rehearsal import Rehearsal, bytes_of
from steering.learning.samples import Labels, NoSamples
from steering.learning.settings import TrainerSettings
from steering.learning.tally import PARTS, Tally

__all__ = [
    "PARTS",
    "Classification",
    "GroupLost",
    "Held",
    "Labels",
    "Loop",
    "MeetingPoint",
    "Memory",
    "NoSamples",
    "Objective",
    "Origin",
    "Place",
    "Rank",
    "RankFiles",
    "RanksPart",
    "Reconstruction",
    "Rehearsal",
    "Rendezvous",
    "Round",
    "Started",
    "Tally",
    "TrainerSettings",
    "best_weights",
    "bytes_of",
    "identities",
    "joined",
    "memories",
    "names_in",
    "newest_number",
    "prune",
    "stored_names",
    "stratum_of",
    "usable",
]
