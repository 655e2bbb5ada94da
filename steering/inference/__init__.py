"""Live inference: predict with the newest published model, judge, keep the live image."""

from steering.inference.evaluate import HoldOut, Score
from steering.inference.frames import LabelFrames
from steering.inference.live import LiveImage, Table
from steering.inference.predictor import Predictor, PredictorSettings

__all__ = ["HoldOut", "LabelFrames", "LiveImage", "Predictor", "PredictorSettings", "Score", "Table"]
