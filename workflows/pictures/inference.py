"""The picture of how fast frames are predicted, and of what a swap of the model costs them, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from steering.view.pictures import COLOURS, INK, figure, png, styled


@styled
def inference_picture(
    figures: Mapping[str, Any], asked: Sequence[tuple[float, float, bool]], swaps: Sequence[tuple[float, float]]
) -> bytes:
    """Frames per second of each network in each backend at batch 64, and the wait for a decision through swaps.

    figures: networks.NAME.batch64 and while_training.NAME.frames_per_s.64, as in the summary. asked: for each frame
    when it was handed over, when the decision was there (s), and whether versions were swapped in its part. swaps:
    begin and end of each (s).
    """
    names = list(figures["networks"])
    drawing, axes = figure(2, max(1, len(names)), height=5.4)
    for ax, name in zip(axes[0], names, strict=True):
        beside = figures.get("while_training", {}).get(name, {}).get("frames_per_s", {}).get("64", {})
        _bars(ax, figures["networks"][name]["batch64"], beside)
        ax.set_title(name, loc="left")
    grid = axes[1, 0].get_gridspec()
    for ax in axes[1]:
        ax.remove()
    _waits(drawing.add_subplot(grid[1, :]), asked, swaps)
    return png(drawing)


def _bars(ax: Axes, alone: Mapping[str, Any], beside: Mapping[str, float]) -> None:
    backends = list(alone["frames_per_s"])
    eager, shift = alone["frames_per_s"][backends[0]], 0.19 if beside else 0.0
    for row, backend in enumerate(backends):
        for at, rates, colour, label in (
            (row - shift, alone["frames_per_s"], COLOURS[0], "alone"),
            (row + shift, beside, COLOURS[1], "while two ranks train"),
        ):
            if backend not in rates:
                continue
            ax.barh(at, rates[backend], height=0.36, color=colour, label=label if row == 0 else None)
            more = f"  {rates[backend]:,.0f}" + (
                f"   {rates[backend] / eager:.2f} x" if rates is alone["frames_per_s"] else ""
            )
            ax.annotate(more, (rates[backend], at), va="center", fontsize=8.5)
    ax.set_yticks(range(len(backends)), [backend.replace("_", " ") for backend in backends])
    ax.set_xlim(0, 1.35 * max([*alone["frames_per_s"].values(), *beside.values()]))
    ax.invert_yaxis()
    ax.set_xlabel("frames per second, batches of 64, one core")
    if beside:
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, fontsize=8.5)


def _waits(ax: Axes, asked: Sequence[tuple[float, float, bool]], swaps: Sequence[tuple[float, float]]) -> None:
    begun, ended, swapping = (np.array(column) for column in zip(*asked, strict=True))
    wait, begin = 1e3 * (ended - begun), begun.min()
    p99 = float(np.percentile(wait[swapping == 0], 99))
    for number, (start, end) in enumerate(swaps):
        label = "a version is tried and swapped in" if number == 0 else None
        ax.axvspan(
            start - begin, max(end, start + 0.04) - begin, color=COLOURS[1], alpha=0.35, linewidth=0, label=label
        )
    ax.plot(begun - begin, wait, ".", color=COLOURS[0], markersize=2.2)
    ax.axhline(p99, color=INK, linewidth=0.8, linestyle="--", label=f"p99 without swaps, {p99:.1f} ms")
    ax.set_ylim(0, max(3 * p99, 1.1 * float(wait.max())))
    ax.set_xlabel("seconds")
    ax.set_ylabel("ms from frame to decision")
    ax.legend(loc="upper right", fontsize=8.5, ncols=2)
