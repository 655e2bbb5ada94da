"""Pictures of what strategies learn and forget, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@styled
def matrix_picture(tasks: Sequence[str], strategies: Mapping[str, Mapping[str, Any]]) -> bytes:
    """For each strategy the errors on every task (columns) after each task was learnt (rows), on one colour scale.

    strategies: by name, with error_matrix in radians, as a benchmark's summary holds them.
    """
    columns = min(3, max(1, len(strategies)))
    rows = -(-len(strategies) // columns)
    drawing, axes = figure(max(1, rows), columns, height=2.9 * max(1, rows))
    top = max((value for f in strategies.values() for row in f["error_matrix"] for value in row), default=1.0)
    for ax, (name, figures) in zip(axes.ravel(), strategies.items(), strict=False):
        matrix = figures["error_matrix"]
        ax.imshow(matrix, cmap="viridis_r", vmin=0, vmax=top)
        for y, row in enumerate(matrix):
            for x, value in enumerate(row):
                colour = "white" if value > 0.5 * top else "black"
                ax.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
        ax.set_title(f"{name}, {figures['error_final']:.3f} at the end")
        ax.set_xticks(range(len(tasks)), tasks, fontsize=8.5)
        ax.set_yticks(range(len(matrix)), [f"after {task}" for task in tasks[: len(matrix)]], fontsize=8.5)
    for ax in axes.ravel()[len(strategies) :]:
        ax.set_axis_off()
    return png(drawing)
