"""Rates of prediction, operations for a frame, and percentiles."""

import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from steering.inference.backends import Slot
from steering.inference.engine import run as run_slot
from steering.models import Network


def from_host(ready: dict[str, Slot], counts: NDArray, patch: int, repeats: int) -> dict[str, float]:
    """Frames per second from uint16 counts (n, N, N) to patches, both in the host's memory, by backend on a GPU."""
    if next(iter(ready.values())).device.type == "cpu":
        return {}
    frames = torch.zeros(counts.shape, dtype=torch.int16, pin_memory=True)
    out = torch.zeros(len(counts), patch, patch, dtype=torch.complex64, pin_memory=True)
    found = {}
    for name, slot in ready.items():
        times = []
        for _ in range(repeats + 2):
            begun = time.perf_counter()
            run_slot(slot, counts, frames, out)
            times.append(time.perf_counter() - begun)
        found[name] = len(counts) / float(np.median(times[2:]))
    return found


def pcie_limit(device: torch.device, counts: NDArray, patch: int, repeats: int) -> float | None:
    """Frames per second that pinned copies of uint16 counts (n, N, N) to a GPU, and of patches back, allow by
    themselves, both at once."""
    if device.type == "cpu":
        return None
    frames = torch.zeros(counts.shape, dtype=torch.int16, pin_memory=True)
    out = torch.zeros(len(counts), patch, patch, dtype=torch.complex64, pin_memory=True)
    there, back, times = frames.to(device), out.to(device), []
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    for _ in range(repeats + 2):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        with torch.cuda.stream(streams[0]):
            there.copy_(frames, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            out.copy_(back, non_blocking=True)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return len(counts) / float(np.median(times[2:]))


def percentiles(values: NDArray) -> dict[str, float]:
    """The 50th and the 99th."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 99)}


def flops_of(network: Network) -> int:
    """Floating-point operations for one frame in convolutions and matrix products; FFTs are not counted."""
    window = network.hyperparameters["window"]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.ones(1, window, window))
    return counter.get_total_flops()
