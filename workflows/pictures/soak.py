"""The picture of a long run with faults, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steering.view.pictures import COLOURS, INK, figure, png, styled


@styled
def soak_picture(
    samples: Sequence[tuple[float, float]],
    faults: Sequence[Mapping[str, Any]],
    errors: Mapping[str, Mapping[str, float]],
) -> bytes:
    """Memory of all processes over the run with its faults; beside it the image's error by scan, with and without."""
    drawing, axes = figure(1, 2, height=2.8)
    left, right = axes[0]
    time_s, mib = np.array(samples, float).reshape(-1, 2).T
    begun = time_s[0] if len(time_s) else 0.0
    left.plot((time_s - begun) / 60, mib, color=COLOURS[0], linewidth=1.0)
    for fault in faults:
        left.axvline((fault["time"] - begun) / 60, color=INK, linewidth=0.5, alpha=0.5)
    left.set_ylim(bottom=0)
    left.set_xlabel("minutes; lines: faults")
    left.set_ylabel("memory of all processes, MiB")
    for number, (name, found) in enumerate(errors.items()):
        right.plot(range(len(found)), list(found.values()), "ox"[number % 2], color=COLOURS[number], label=name)
    right.set_ylim(bottom=0)
    right.set_xlabel("scan")
    right.set_ylabel("phase error of the refined image, rad")
    if errors:
        right.legend(frameon=False)
    return png(drawing)
