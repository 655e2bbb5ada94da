"""Rates of prediction, operations for a frame, and percentiles."""

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from steering.inference.backends import Slot
from steering.inference.transfer import Transfer
from steering.models import Network


def from_host(ready: dict[str, Slot], counts: NDArray, patch: int, repeats: int) -> dict[str, float]:
    """Frames per second from uint16 counts (n, N, N) to patches, both in the host's memory, by backend on a GPU."""
    device = next(iter(ready.values())).device
    if device.type == "cpu":
        return {}
    transfer = Transfer(device, frames=len(counts), window=counts.shape[-1], patch=patch)
    found = {}
    for name, slot in ready.items():
        times = []
        for _ in range(repeats + 2):
            begun = time.perf_counter()
            transfer(slot, counts)
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


def fastest(measured: dict[str, Any], flops: int) -> dict[str, dict[str, Any]]:
    """For each batch size the backend that is fastest on the device and the one from host to host, in frames/s, with
    the share of a matrix product's speed and, on a GPU, of what the copies allow by themselves."""
    found = {}
    for batch, rates in measured["frames_per_s"].items():
        own, host = (
            max(of, key=lambda name: of[name], default="") for of in (rates, measured["from_host_per_s"][batch])
        )
        peak = measured["peak_flops"]["bfloat16" if own.endswith("bfloat16") else "float32"]
        found[batch] = {"device": own, "per_s": rates[own], "of_peak": flops * rates[own] / peak}
        if host:
            rate, limit = measured["from_host_per_s"][batch][host], measured["pcie_limit_per_s"][batch]
            found[batch] |= {"host": host, "host_per_s": rate} | ({"of_pcie": rate / limit} if limit else {})
    return found
