"""The picture of what each live protocol carries, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from steering.view.pictures import COLOURS, figure, png, styled


@styled
def ingest_picture(figures: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Frames received and predicted per second, and the CPU share of each process, by protocol and frame size.

    figures: by protocol, as in the summary of bench_ingest.py.
    """
    cases = [
        (f"{name} {side}", each) for name, one in figures.items() for side, each in (("128", one), ("256", one["256"]))
    ]
    drawing, axes = figure(1, 2, height=1.6 + 0.5 * len(cases))
    rows = np.arange(len(cases))
    rates, shares = axes.ravel()
    for shift, key, label in ((-0.2, "frames_per_s", "received"), (0.2, "predicted_per_s", "predicted")):
        colour = COLOURS[0] if shift < 0 else COLOURS[1]
        rates.barh(rows + shift, [each[key] for _, each in cases], height=0.36, color=colour, label=label)
    for row, (_, each) in enumerate(cases):
        rates.annotate(f"  {each['lost']} lost", (each["frames_per_s"], row - 0.2), va="center", fontsize=8.5)
    rates.set_xlabel("frames per second")
    rates.set_xlim(0, 1.3 * max(each["frames_per_s"] for _, each in cases))
    rates.legend(fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    left = np.zeros(len(cases))
    for colour, part in zip(COLOURS, ("server", "receive", "predict"), strict=False):
        share = np.array([each["cpu_share"][part] for _, each in cases])
        shares.barh(rows, share, left=left, height=0.6, color=colour, label=part)
        left += share
    shares.set_xlabel("CPU cores")
    shares.legend(fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)
    for ax in (rates, shares):
        ax.set_yticks(rows, [name for name, _ in cases])
        ax.invert_yaxis()
    return png(drawing)
