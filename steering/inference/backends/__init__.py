"""How a network is run on a machine: one file for each kind of backend, and the slot that holds one version of it."""

from steering.inference.backends.contract import REFERENCE, Backend, prepared
from steering.inference.backends.graphs import GRAPH_FRAMES
from steering.inference.backends.slot import Slot, make_package, possible

__all__ = ["GRAPH_FRAMES", "REFERENCE", "Backend", "Slot", "make_package", "possible", "prepared"]
