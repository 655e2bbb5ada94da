"""Files from strangers: what is read is bounded in memory and time, stays inside its folder and executes no code.

Nothing here imports another room: what reads a foreign file runs in a process of its own (`isolated`), which starts in
a third of a second without torch, xarray or dask.
"""

from __future__ import annotations

from steering.files.arrays import read_npz
from steering.files.bounds import Bounds, Memory, own_file, read_bytes, read_json
from steering.files.isolated import isolated, isolated_array

__all__ = ["Bounds", "Memory", "isolated", "isolated_array", "own_file", "read_bytes", "read_json", "read_npz"]
