"""The picture of how well trust finds wrong predictions, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from steering.view.pictures import COLOURS, INK, figure, png, styled


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Frames of a scene that replaced a known one."""

    name: str
    residual: NDArray[np.float64]
    """(frame,) above the Poisson floor."""
    error: NDArray[np.float64]
    """(frame,) radians."""
    trust: NDArray[np.float64]
    """(scan, frame of it) by residual alone."""


@styled
def trust_picture(
    shifts: Sequence[Shift],
    *,
    bad: float,
    roc: Mapping[str, tuple[NDArray, NDArray, float]],
    since: int,
    window: int,
    lowest: float,
    caught: tuple[Sequence[float], Sequence[float]],
) -> bytes:
    """Residual against error, how well bad frames are found, the alarm's course, and planted offsets that are found.

    bad: error above which a frame is bad, radians. roc: by name, false and true positive rates and the area. since:
    the frame of a scan with which the shift comes. window: newest frames that are judged together. lowest: their mean
    trust at which drift is raised. caught: planted offsets, radians, and the share found.
    """
    drawing, axes = figure(2, 2, height=7.4)
    colours = {shift.name: _COLOURS[place % len(_COLOURS)] for place, shift in enumerate(shifts)}
    _scatter(axes[0, 0], shifts, colours, bad)
    _roc(axes[0, 1], roc)
    _course(axes[1, 0], shifts, colours, (since, window, lowest))
    _caught(axes[1, 1], *caught)
    handles, names = axes[1, 0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9)
    return png(drawing)


_COLOURS = (INK, *COLOURS, "#c4475a")


def _scatter(ax: Axes, shifts: Sequence[Shift], colours: Mapping[str, str], bad: float) -> None:
    for shift in shifts:
        show = slice(None, None, max(1, len(shift.error) // 250))
        seen = np.maximum(shift.residual[show], 1e-4)
        ax.scatter(seen, shift.error[show], s=7, alpha=0.5, linewidths=0, color=colours[shift.name])
    ax.axhline(bad, color=INK, linewidth=0.8, linestyle="--")
    ax.annotate("bad above", (0.01, bad), xycoords=("axes fraction", "data"), va="bottom", fontsize=8.5)
    ax.set(xscale="log", yscale="log", xlabel="far-field residual above the Poisson floor", ylabel="phase error (rad)")
    ax.set_title("residual and true error")


def _roc(ax: Axes, roc: Mapping[str, tuple[NDArray, NDArray, float]]) -> None:
    for colour, (name, (false, true, area)) in zip(COLOURS, roc.items(), strict=False):
        ax.plot(false, true, color=colour, label=f"{name}: area {area:.3f}")
    ax.plot([0, 1], [0, 1], color=INK, linewidth=0.6, linestyle=":")
    ax.set(xlabel="good frames called bad", ylabel="bad frames called bad", title="bad frames by the residual")
    ax.legend(loc="lower right")


def _course(ax: Axes, shifts: Sequence[Shift], colours: Mapping[str, str], test: tuple[int, int, float]) -> None:
    since, window, lowest = test
    for shift in shifts:
        newest = np.lib.stride_tricks.sliding_window_view(shift.trust, window, axis=1).mean(-1)
        frames = np.arange(newest.shape[1]) + window - since
        ax.plot(frames, np.median(newest, axis=0), color=colours[shift.name], linewidth=1.5, label=shift.name)
    ax.axhline(lowest, color=INK, linewidth=0.8, linestyle="--")
    ax.annotate("drift is raised below", (0.01, lowest), xycoords=("axes fraction", "data"), va="bottom", fontsize=8.5)
    ax.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    ax.set(xlabel="frames since the shift", ylabel=f"mean trust of the newest {window} frames", ylim=(0, 1))
    ax.set_title("the alarm's course")


def _caught(ax: Axes, offsets: Sequence[float], share: Sequence[float]) -> None:
    ax.plot(offsets, share, color=COLOURS[0], marker="o", markersize=4)
    ax.axhline(0.95, color=INK, linewidth=0.8, linestyle="--")
    ax.set(xlabel="constant phase planted on a patch (rad)", ylabel="share found", ylim=(0, 1.02))
    ax.set_title("offsets found by the neighbours alone")
