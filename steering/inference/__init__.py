"""Live inference: predict with the newest published model, judge, keep the live image."""

from steering.inference.answers import Answers, PolicyAnswer
from steering.inference.engine import Engine
from steering.inference.evaluate import HoldOut, Score
from steering.inference.live import LiveImage
from steering.inference.policy_host import ResumeState
from steering.inference.predictor import Predictor
from steering.inference.saved_policy import SavedPolicy, SavedPredictor
from steering.inference.scan_reader import ScanReader
from steering.inference.scans import LabelFrames
from steering.inference.serving import Installed
from steering.inference.settings import PredictorSettings
from steering.inference.small_image import ImageChange, Packing, cut, packed
from steering.inference.table import Table
from steering.inference.whole_scan import FinalImage, NetworkImage, ScanFrames, WholeScan, joined

__all__ = [
    "Answers",
    "Engine",
    "FinalImage",
    "HoldOut",
    "ImageChange",
    "Installed",
    "LabelFrames",
    "LiveImage",
    "NetworkImage",
    "Packing",
    "PolicyAnswer",
    "Predictor",
    "PredictorSettings",
    "ResumeState",
    "SavedPolicy",
    "SavedPredictor",
    "ScanFrames",
    "ScanReader",
    "Score",
    "Table",
    "WholeScan",
    "cut",
    "joined",
    "packed",
]
