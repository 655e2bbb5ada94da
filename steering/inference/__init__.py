"""Live inference: predict with the newest published model, judge, keep the live image."""

from steering.inference.adviser import Advice, Handover
from steering.inference.engine import Engine
from steering.inference.evaluate import HoldOut, Score
from steering.inference.frames import LabelFrames
from steering.inference.live import LiveImage, Table
from steering.inference.predictor import Predictor
from steering.inference.serving import Installed
from steering.inference.settings import PredictorSettings

__all__ = [
    "Advice",
    "Engine",
    "Handover",
    "HoldOut",
    "Installed",
    "LabelFrames",
    "LiveImage",
    "Predictor",
    "PredictorSettings",
    "Score",
    "Table",
]
