"""Carries the campaign's actions out with Dask: actors for source, predictor and ranks, tasks for labels.

This is the only room that starts work. Begin at `run`.
"""

from steering.runner.drive import Handle, run, start
from steering.runner.experiment import Experiment
from steering.runner.folder import RunFolder
from steering.runner.labels import LabelSettings
from steering.runner.outside import hand_in
from steering.runner.refinement import LiveSettings
from steering.runner.spread import on_ranks

__all__ = ["Experiment", "Handle", "LabelSettings", "LiveSettings", "RunFolder", "hand_in", "on_ranks", "run", "start"]
