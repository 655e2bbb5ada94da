"""The simulated beamline behind real protocols: one publisher for each, in a process of its own."""
