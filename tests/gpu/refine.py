"""How fast rPIE refines the recorded Siemens scan, or a simulated one where STEERING_DATA names no data, on a device.

python tests/gpu/refine.py OUT [auto|cpu|cuda] [FRAMES PASSES]
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steering.ptychography import Canvas, RefineSettings, phase_correlation, refine, simulate, zone_plate
from steering.ptychography.device import describe_device, find_device
from steering.ptychography.refine import Refinement
from steering.records import Field
from steering.sources import read_recording

AIM = 0.97


@dataclass(frozen=True, eq=False)
class Scan:
    """Frames (n, N, N) with their positions (n, 2), the probe to begin with, and what they should come to."""

    name: str
    counts: np.ndarray
    where: np.ndarray
    probe: np.ndarray
    canvas: Canvas
    truth: np.ndarray
    trusted: tuple[slice, slice]
    """Rows and columns of the canvas that `truth` is of."""


def recorded(frames: int) -> Scan | None:
    """The scan of a Siemens star and its trusted reconstruction; None where there are no data."""
    folder = Path(os.environ.get("STEERING_DATA", "")) / "ptycho-aps-velociprobe-siemens"
    files = (folder / "siemens-star-small.npz.bz2", *folder.glob("recon_*.npz"))
    if len(files) < 2 or not files[0].exists():
        return None
    recording = read_recording(files[0], zero_frequency="corner")
    where = recording.positions / recording.geometry.object_pixel
    (y0, x0), (y1, x1) = where.min(0), where.max(0)
    canvas = Canvas.around(Field(y0, y1, x0, x1), recording.geometry.shape[0])
    with np.load(files[1]) as file:
        whole = file["object"]
    border = 70  # where too few frames overlap to be trusted
    truth = whole[border:-border, border:-border]
    part = canvas.part(Canvas(truth.shape, (border - whole.shape[0] / 2, border - whole.shape[1] / 2)))
    probe = recording.fitted_probe()
    return Scan("siemens", recording.counts[:frames], where[:frames], probe, canvas, truth, part)


def simulated(frames: int) -> Scan:
    """Frames 128 x 128 of a made-up object at random places."""
    rng, window, reach = np.random.default_rng(0), 128, 150.0
    canvas = Canvas.around(Field(-reach, reach, -reach, reach), window)
    y, x = np.mgrid[: canvas.shape[0], : canvas.shape[1]] / 12
    truth = np.exp(1j * np.sign(np.sin(y) * np.cos(1.3 * x + 0.2 * y))).astype(np.complex64)
    probe, where = zone_plate(window, 90.0, counts=1e6), rng.uniform(-reach, reach, (frames, 2))
    counts = rng.poisson(simulate(truth, probe, canvas, where)).astype(np.uint16)
    inside = (slice(80, -80), slice(80, -80))
    return Scan("simulated", counts, where, probe, canvas, truth[inside], inside)


def progress(scan: Scan, device: torch.device, most: int) -> list[dict[str, float]]:
    """Seconds and correlation with the truth after each pass, until the aim is met or so many are over."""
    settings = RefineSettings(passes=most, probe_from_pass=3, device=str(device))
    work = Refinement(scan.counts, scan.where, scan.probe, scan.canvas, settings=settings)
    spent, found = 0.0, []
    while not work.over and not (found and found[-1]["phase_correlation"] >= AIM):
        before, begun = work.passes, time.perf_counter()
        work.go_on(lambda: work.passes > before)  # noqa: B023 - asked in this turn only
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent += time.perf_counter() - begun
        image = work.result().object[scan.trusted]
        correlation = float(phase_correlation(image, scan.truth, max_shift=10))
        found.append({"pass": work.passes, "seconds": spent, "phase_correlation": correlation})
    return found


def main() -> None:
    """Write the figures into OUT/summary.json."""
    out, device = Path(sys.argv[1]), find_device(sys.argv[2] if len(sys.argv) > 2 else "auto")
    frames, most = map(int, sys.argv[3:5] or ("516", "40"))
    out.mkdir(parents=True, exist_ok=True)
    scan = recorded(frames) or simulated(frames)
    few = RefineSettings(passes=1, device=str(device))
    refine(scan.counts[:64], scan.where[:64], scan.probe, scan.canvas, settings=few)  # kernels are made
    passes, begun = progress(scan, device, most), time.perf_counter()
    refine(scan.counts, scan.where, scan.probe, scan.canvas, settings=RefineSettings(passes=10, device=str(device)))
    labels = len(scan.counts) / (time.perf_counter() - begun)
    last: dict[str, Any] = passes[-1]
    summary = {
        "device": describe_device(device),
        "scan": scan.name,
        "reached": last["phase_correlation"],
        "passes": last["pass"],
        "seconds": last["seconds"],
        "labels_per_s": labels,
        "gpu_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "by_pass": passes,
    }
    (out / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
