"""Labels for training, made by refinement or handed in; refinement of the live image and of whole scans."""

from steering.labels.external import (
    ExternalReport,
    arrival,
    external_figures,
    hand_in,
    put_away,
    take_in,
    waiting,
)
from steering.labels.final import FinalReport, FinalSettings
from steering.labels.make import LabelReport, LabelSettings, make_labels
from steering.labels.refinement import LiveSettings, refine_live

__all__ = [
    "ExternalReport",
    "FinalReport",
    "FinalSettings",
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
