"""The picture of the time of a step with rehearsal, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steering.view.pictures import COLOURS, figure, png, styled


@styled
def overlap_picture(workloads: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Milliseconds of a step of each loop, and what of it is exposed wait.

    workloads: by name, with step_ms by loop, exposed_wait_ms.p50 and er_over_same_work, as in the summary.
    """
    drawing, axes = figure(1, max(1, len(workloads)), height=2.3)
    for ax, (name, figures) in zip(axes[0], workloads.items(), strict=False):
        loops = list(figures["step_ms"])
        lengths = [figures["step_ms"][loop] for loop in loops]
        ax.barh(loops, lengths, color=COLOURS[: len(loops)], height=0.6)
        for place, (loop, length) in enumerate(zip(loops, lengths, strict=True)):
            more = f", {figures['exposed_wait_ms']['p50']:.2f} ms of it exposed wait" if loop == "er" else ""
            inside = {"xytext": (-5, 0), "ha": "right", "va": "center", "color": "white", "fontsize": 8.5}
            ax.annotate(f"{length:.1f} ms{more}", (length, place), textcoords="offset points", **inside)
        ax.invert_yaxis()
        ax.set_xlabel("ms per step")
        ax.set_title(f"{name}: er takes {figures['er_over_same_work']:.3f} of the same work")
    return png(drawing)
