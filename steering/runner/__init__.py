"""Carries the campaign's actions out with Dask: actors for source, predictor and ranks, tasks for labels.

This is the only room that starts work. Begin at `run`.
"""

from steering.labels.external import hand_in
from steering.labels.final import FinalSettings
from steering.labels.make import LabelSettings
from steering.labels.refinement import LiveSettings
from steering.runner.attach import Attached, attach
from steering.runner.client import Handle, run, start
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.on_ranks import on_ranks

__all__ = [
    "Attached",
    "Experiment",
    "FinalSettings",
    "Handle",
    "LabelSettings",
    "LiveSettings",
    "RunFolder",
    "attach",
    "hand_in",
    "on_ranks",
    "run",
    "start",
]
