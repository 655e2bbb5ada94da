"""Networks that predict a patch of the object from a diffraction frame, and the store of their published versions."""

from steering.models.networks import (
    Network,
    SplitNetwork,
    as_split,
    build_network,
    check_network,
    find_network,
    is_split,
)
from steering.models.optics import Optics
from steering.models.probe_first import ProbeFirst
from steering.models.ptychonn import PtychoNN
from steering.models.resnet import ResNet18, ResNet50
from steering.models.store import ModelStore

__all__ = [
    "ModelStore",
    "Network",
    "Optics",
    "ProbeFirst",
    "PtychoNN",
    "ResNet18",
    "ResNet50",
    "SplitNetwork",
    "as_split",
    "build_network",
    "check_network",
    "find_network",
    "is_split",
]
