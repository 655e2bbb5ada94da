"""Curves of a run over its frames, as PNG: error, trust, versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from steering.view.history import Curve, History, running_median
from steering.view.pictures import COLOURS, INK, figure, png, styled

ALARM = "#d64545"


def colour_of(scans: Sequence[str]) -> Mapping[str, str]:
    """One colour per scan, by its place in the run."""
    return {scan: COLOURS[place % len(COLOURS)] for place, scan in enumerate(scans)}


@styled
def course_picture(curves: Sequence[Curve], past: History) -> bytes | None:
    """Error (where the truth is known) and trust over frames, sample changes and models marked. None: no frames."""
    curves = [curve for curve in curves if len(curve.number)]
    if not curves:
        return None
    known = any(np.isfinite(curve.error).any() for curve in curves)
    drawing, axes = figure(1 + known, 1, height=2.75 * (1 + known) + 0.4, sharex=True)
    if known:
        error_axes(axes[0, 0], curves)
        axes[0, 0].set_ylabel("phase error (rad)")
    _trust(axes[-1, 0], curves, past)
    axes[-1, 0].set_xlabel("frame, in order of acquisition")
    for place, ax in enumerate(axes[:, 0]):
        _changes(ax, curves, named=place == 0)
        _versions(ax, past, named=place == 0)
    return png(drawing)


def error_axes(ax: Axes, curves: Sequence[Curve]) -> None:
    """Points for every frame, and a running median over frames never trained on (over all where these are few)."""
    colours = colour_of([curve.scan for curve in curves])
    for curve in curves:
        judged = curve.held_out & np.isfinite(curve.error)
        if judged.sum() < 10:
            judged = np.isfinite(curve.error)
        _points_and_median(ax, curve.number, curve.error, colours[curve.scan], judged=judged)
    _frame(ax, [curve.error for curve in curves])


def _points_and_median(ax: Axes, number: np.ndarray, values: np.ndarray, colour: str, *, judged: np.ndarray) -> None:
    ax.plot(number, values, "o", markersize=2.2, color=colour, alpha=0.45, markeredgewidth=0, zorder=2)
    width = int(np.clip(judged.sum() // 12, 3, 31))
    ax.plot(number[judged], running_median(values[judged], width), color=colour, linewidth=2.0, zorder=3)


def _frame(ax: Axes, values: Sequence[np.ndarray]) -> None:
    every = np.concatenate(values)
    every = every[np.isfinite(every)]
    top = float(np.quantile(every, 0.99)) if len(every) else 1.0
    ax.set_ylim(0, max(top * 1.15, 1e-3))
    ax.grid(axis="y")
    ax.margins(x=0.01)


def _trust(ax: Axes, curves: Sequence[Curve], past: History) -> None:
    colours = colour_of([curve.scan for curve in curves])
    for curve in curves:
        _points_and_median(ax, curve.number, curve.residual, colours[curve.scan], judged=np.isfinite(curve.residual))
    _frame(ax, [curve.residual for curve in curves])
    end = max(int(curve.number[-1]) for curve in curves) + 1
    if past.expected:
        at, level = zip(*past.expected, strict=True)
        ax.step(
            [*at, max(end, at[-1])],
            [*level, level[-1]],
            where="post",
            color=INK,
            linewidth=1.2,
            linestyle="--",
            label="expected of the version in service",
            zorder=4,
        )
    for place, drift in enumerate(past.drifts):
        stop = end if drift.stop is None else drift.stop
        ax.axvspan(
            drift.start,
            max(stop, drift.start + 1),
            color=ALARM,
            alpha=0.13,
            linewidth=0,
            zorder=0,
            label="drift alarm" if place == 0 else None,
        )
    ax.set_ylabel("far-field residual")
    if past.expected or past.drifts:
        ax.legend(loc="upper right", fontsize=8.5, labelcolor=INK)


def _changes(ax: Axes, curves: Sequence[Curve], *, named: bool) -> None:
    for place, (scan, colour) in enumerate(colour_of([curve.scan for curve in curves]).items()):
        start = int(curves[place].number[0])
        if place:
            ax.axvline(start, color=INK, linewidth=0.9, zorder=1)
        if named:
            ax.annotate(
                scan,
                (start, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(4, 13),
                textcoords="offset points",
                color=colour,
                fontweight="bold",
                va="bottom",
            )


def _versions(ax: Axes, past: History, *, named: bool) -> None:
    """A triangle on the upper edge for each version, with its number where there is room."""
    room = max((version.frame for version in past.versions), default=1) / 45
    labelled = -np.inf
    for version in past.versions:
        ax.plot(
            [version.frame],
            [1.0],
            marker="v",
            markersize=4,
            color=INK,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            zorder=4,
        )
        if named and version.frame - labelled >= room:
            labelled = version.frame
            ax.annotate(
                f"v{version.number}",
                (version.frame, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                fontsize=7.5,
                ha="center",
            )


@styled
def buffer_picture(composition: Mapping[str, Any]) -> bytes | None:
    """What the rehearsal buffers of all ranks held over the steps of training, and its age. None: they held nothing.

    composition: `steps`, `stored` by scan and step, `age` by scan (age_p10, age_p50, age_p90), as in summary.json.
    """
    steps, stored, age = (composition.get(key) or {} for key in ("steps", "stored", "age"))
    if not steps or not stored:
        return None
    colours = colour_of(list(stored))
    drawing, axes = figure(1, 2, height=2.6, width_ratios=[2, 1])
    course, ages = axes[0]
    course.stackplot(steps, list(stored.values()), colors=list(colours.values()), alpha=0.75, labels=list(stored))
    course.set_xlabel("steps of training")
    course.set_ylabel("samples stored")
    course.margins(x=0)
    course.legend(loc="upper left", fontsize=8.5, labelcolor=INK)
    for place, (scan, quantiles) in enumerate(age.items()):
        colour = colours[scan]
        ages.plot([quantiles["age_p10"], quantiles["age_p90"]], [place, place], color=colour, linewidth=5, alpha=0.5)
        ages.plot([quantiles["age_p50"]], [place], "o", color=colour)
    ages.set_yticks(range(len(age)), list(age))
    ages.invert_yaxis()
    ages.set_xlabel("age: samples offered since")
    ages.set_xlim(left=0)
    return png(drawing)


@styled
def versions_picture(past: History, started: float) -> bytes | None:
    """Validation error of each published version over the seconds since `started`. None: no version has one."""
    judged = [version for version in past.versions if version.error is not None]
    if not judged:
        return None
    drawing, axes = figure(height=2.3)
    ax = axes[0, 0]
    seconds = [version.time - started for version in judged]
    errors = [version.error for version in judged]
    ax.plot(seconds, errors, "o-", color=COLOURS[0], linewidth=1.5, markersize=5)
    for second, version in zip(seconds, judged, strict=True):
        ax.annotate(
            f"v{version.number}",
            (second, version.error),
            xytext=(0, 6),
            textcoords="offset points",
            fontsize=8,
            ha="center",
        )
    ax.set_ylim(0, max(e for e in errors if e is not None) * 1.25)
    ax.set_xlim(left=0)
    ax.set_xlabel("seconds since the start")
    ax.set_ylabel("validation error")
    ax.grid(axis="y")
    return png(drawing)
