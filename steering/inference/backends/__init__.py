"""How a network is run on a machine: one file for each kind of backend, and the slot that holds one version of it."""

from steering.inference.backends.slot import GRAPH_FRAMES, REFERENCE, Backend, Slot, compile_package, possible, prepared

__all__ = ["GRAPH_FRAMES", "REFERENCE", "Backend", "Slot", "compile_package", "possible", "prepared"]
