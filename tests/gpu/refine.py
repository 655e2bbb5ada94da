"""How fast rPIE refines the recorded Siemens scan, or a simulated one where STEERING_DATA names no data, on a device.

python tests/gpu/refine.py OUT [auto|cpu|cuda]
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from steering.ptychography import Canvas, RefineSettings, phase_correlation, refine, simulate, zone_plate
from steering.ptychography.device import describe_device, find_device
from steering.records import Field


def main() -> None:
    """Seconds for 1, 10 and 30 passes, and the correlation with the truth after each."""
    out, device = Path(sys.argv[1]), find_device(sys.argv[2] if len(sys.argv) > 2 else "auto")
    frames = int(sys.argv[3]) if len(sys.argv) > 3 else 516
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    window, reach = 128, 150.0
    canvas = Canvas.around(Field(-reach, reach, -reach, reach), window)
    y, x = np.mgrid[: canvas.shape[0], : canvas.shape[1]] / 12
    truth = np.exp(1j * np.sign(np.sin(y) * np.cos(1.3 * x + 0.2 * y))).astype(np.complex64)
    probe = zone_plate(window, 90.0, counts=1e6)
    where = rng.uniform(-reach, reach, (frames, 2))
    counts = rng.poisson(simulate(truth, probe, canvas, where)).astype(np.uint16)
    found = {}
    for passes in (1, 10, 30):
        settings = RefineSettings(passes=passes, device=str(device))
        begun = time.perf_counter()
        refined = refine(counts, where, probe, canvas, settings=settings)
        seconds = time.perf_counter() - begun
        correlation = phase_correlation(refined.object, truth, weight=refined.covered)
        found[str(passes)] = {"seconds": seconds, "phase_correlation": float(correlation)}
    labels_per_s = len(counts) / found["10"]["seconds"]
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    summary = {"device": describe_device(device), "passes": found, "labels_per_s": labels_per_s, "gpu_bytes": memory}
    (out / "summary.json").write_text(json.dumps({"figures": summary, "data": os.environ.get("STEERING_DATA")}))


if __name__ == "__main__":
    main()
