"""Pictures of what strategies learn and forget, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steering.view.pictures import COLOURS, INK, figure, png, styled


@styled
def accuracy_picture(strategies: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Top-5 accuracy on all classes so far after each task, and what each strategy cost.

    strategies: by name, as a benchmark's summary holds them: top5_after_task in percent, runtime_s in seconds.
    """
    drawing, axes = figure(1, 2, height=3.6)
    course, cost = axes[0]
    for place, (name, figures) in enumerate(strategies.items()):
        after, colour = figures["top5_after_task"], COLOURS[place % len(COLOURS)]
        style = "--" if name in ("incremental", "from_scratch") else "-"
        course.plot(range(1, len(after) + 1), after, style, marker="o", markersize=4, color=colour, label=name)
        cost.plot([figures["runtime_s"]], [after[-1]], "o", markersize=7, color=colour)
        cost.annotate(name, (figures["runtime_s"], after[-1]), xytext=(7, -3), textcoords="offset points", color=colour)
    course.set_xlabel("tasks learnt")
    course.set_ylabel("top-5 accuracy on all classes so far (%)")
    course.set_xticks(range(1, 1 + max((len(f["top5_after_task"]) for f in strategies.values()), default=1)))
    course.legend(fontsize=8.5, labelcolor=INK)
    cost.set_xlabel("training time (s)")
    cost.set_ylabel("top-5 accuracy at the end (%)")
    cost.set_xlim(0, 1.3 * max((f["runtime_s"] for f in strategies.values()), default=1.0))
    for ax in (course, cost):
        ax.set_ylim(bottom=0)
        ax.grid(axis="y")
    return png(drawing)
