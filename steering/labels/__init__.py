"""Labels for training: made by refinement, or handed in from outside; and the refinement of the live image."""

from steering.labels.external import (
    ExternalReport,
    arrival,
    external_figures,
    hand_in,
    put_away,
    take_in,
    waiting,
)
from steering.labels.make import LabelReport, LabelSettings, make_labels
from steering.labels.refinement import LiveSettings, refine_live

__all__ = [
    "ExternalReport",
    "LabelReport",
    "LabelSettings",
    "LiveSettings",
    "arrival",
    "external_figures",
    "hand_in",
    "make_labels",
    "put_away",
    "refine_live",
    "take_in",
    "waiting",
]
