"""Live inference: predict with the newest published model, judge, keep the live image."""

from steering.inference.engine import Engine
from steering.inference.evaluate import HoldOut, Score
from steering.inference.live import LiveImage, Table
from steering.inference.policy_host import PolicyAnswer, ResumeState
from steering.inference.predictor import Predictor
from steering.inference.scans import LabelFrames
from steering.inference.serving import Installed
from steering.inference.settings import PredictorSettings
from steering.inference.whole_scan import FinalImage, NetworkImage, ScanFrames, WholeScan, joined

__all__ = [
    "Engine",
    "FinalImage",
    "HoldOut",
    "Installed",
    "LabelFrames",
    "LiveImage",
    "NetworkImage",
    "PolicyAnswer",
    "Predictor",
    "PredictorSettings",
    "ResumeState",
    "ScanFrames",
    "Score",
    "Table",
    "WholeScan",
    "joined",
]
