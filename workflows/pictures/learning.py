"""Pictures of what strategies learn and forget, as PNG."""

from __future__ import annotations

import math
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
        ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
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


@styled
def nights_picture(errors: Mapping[str, Mapping[str, float]]) -> bytes:
    """The forgetting matrix: errors of each model (rows, oldest first) on the held-out frames of each scan (columns).

    errors: by model and scan, as the summary of a nightly run holds them.
    """
    scans = list(next(iter(errors.values())))
    drawing, axes = figure(1, 1, height=1.6 + 0.35 * len(errors))
    ax, matrix = axes[0][0], [[row[scan] for scan in scans] for row in errors.values()]
    finite = [value for row in matrix for value in row if math.isfinite(value)]
    ax.imshow(matrix, cmap="viridis_r", vmin=0, vmax=max(finite, default=1.0), aspect="auto")
    if len(scans) <= 12:
        for y, row in enumerate(matrix):
            for x, value in enumerate(row):
                colour = "white" if value > 0.5 * max(finite, default=1.0) else "black"
                ax.text(x, y, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=9)
    short = [scan.rpartition("/")[2] for scan in scans]
    names = [
        name if short.count(name) == 1 else scan.replace("/", "\n") for name, scan in zip(short, scans, strict=True)
    ]
    ax.set_xticks(range(len(scans)), names, fontsize=8.5, rotation=30 if len(scans) > 6 else 0)
    ax.set_yticks(range(len(errors)), list(errors), fontsize=8.5)
    ax.set_title("error on held-out frames by scan, oldest first")
    return png(drawing)
