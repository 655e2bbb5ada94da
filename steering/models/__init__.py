"""Networks that turn a diffraction frame into a patch of the object, and the store of their published versions."""

from steering.models.networks import Network, build_network
from steering.models.probe_first import ProbeFirst
from steering.models.ptychonn import PtychoNN
from steering.models.resnet import ResNet18
from steering.models.store import ModelStore

__all__ = ["ModelStore", "Network", "ProbeFirst", "PtychoNN", "ResNet18", "build_network"]
