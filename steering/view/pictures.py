"""Pictures of the live object and of the measured positions, with a transparent background."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from steering.ptychography.align import align
from steering.view.history import Curve, curves as curves_of

P = ParamSpec("P")
R = TypeVar("R")
INK = "#7a828c"
"""Text and lines: about 4:1 against a white and against a near-black page."""
COLOURS = ("#1f83c4", "#d9730d", "#2a9d6f", "#b85bb0", "#8a78d6", "#a8842c")
"""One for each scan, in order, and then from the first again."""
VERSIONS = (
    ("network alone", "amplitude", "phase"),
    ("refined", "amplitude_refined", "phase_refined"),
    ("truth", "truth_amplitude", "truth_phase"),
)
DPI = 140
WIDTH = 10.4
"""Inches of a picture as wide as the page."""
_STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.facecolor": "none",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.18,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """A function that draws, in the style of the page."""

    @wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return inner


def figure(rows: int = 1, columns: int = 1, *, height: float, **kinds: Any) -> tuple[Figure, NDArray]:
    """A figure of the page's width and its axes (rows, columns); `kinds` go to Figure.subplots."""
    drawing = Figure(figsize=(WIDTH, height))
    return drawing, drawing.subplots(rows, columns, squeeze=False, **kinds)


def png(drawing: Figure) -> bytes:
    """The figure as PNG with a transparent background."""
    out = io.BytesIO()
    drawing.savefig(out, dpi=DPI, transparent=True, pil_kwargs={"compress_level": 3})  # thrice as fast, 10 % larger
    return out.getvalue()


def webp(drawing: Figure) -> bytes:
    """The figure as WebP with a transparent background: a third of the PNG where most of it is an image."""
    out = io.BytesIO()
    drawing.savefig(out, dpi=DPI, transparent=True, format="webp", pil_kwargs={"quality": 85, "method": 3})
    return out.getvalue()


@dataclass(frozen=True, eq=False)
class Shown:
    """One version of an object, ready to be drawn; NaN where it is not known."""

    title: str
    amplitude: NDArray[np.float32]
    phase: NDArray[np.float32]


def shown(image: xr.Dataset) -> list[Shown]:
    """The network's object, the refined one and the truth, as far as there are any, in one gauge.

    What ptychography cannot determine (a small shift, global phase, linear ramp, and a factor, without the flux) is
    removed with respect to the truth; where there is none, to the refined object; else global phase and ramp alone.
    """
    waves = {}
    for title, amplitude, phase in VERSIONS:
        if amplitude in image and phase in image:
            wave = np.nan_to_num(image[amplitude].values) * np.exp(1j * np.nan_to_num(image[phase].values))
            if (wave != 0).any():
                waves[title] = wave.astype(np.complex64)
    if not waves:
        return []
    best = list(waves)[-1]
    waves[best] = waves[best] if best == "truth" else align(waves[best], np.ones_like(waves[best]), max_shift=0)
    reach = float(min(5, min(waves[best].shape) // 4 - 1))
    return list(_in_one_gauge(waves, best, reach))


def _in_one_gauge(waves: dict[str, NDArray[np.complex64]], best: str, reach: float) -> Iterator[Shown]:
    middle = np.angle(waves[best].sum())
    for title, wave in waves.items():
        there = wave != 0
        free = wave
        if title != best:
            free = align(wave, waves[best], weight=there, max_shift=max(reach, 0))
            size, wanted = np.abs(free[there]), np.abs(waves[best][there])
            free = free * (size @ wanted / max(float(size @ size), 1e-30))
        phase = np.angle(free * np.exp(-1j * middle)) + middle  # no wrap in the middle of the range
        yield Shown(title, np.where(there, np.abs(free), np.nan), np.where(there, phase, np.nan))


def limits(values: NDArray, others: Sequence[NDArray] = ()) -> tuple[float, float]:
    """A colour scale from the 1 % to the 99 % quantile of the values, or of others where these are empty."""
    for candidate in (values, *others):
        known = candidate[np.isfinite(candidate)]
        if len(known):
            low, high = np.quantile(known, [0.01, 0.99])
            return float(low), float(max(high, low + 1e-3))
    return 0.0, 1.0


@styled
def object_picture(image: xr.Dataset) -> bytes | None:
    """Amplitude above, phase below; network, refined and truth side by side on one colour scale, as WebP. None: nothing
    yet."""
    versions = shown(image)
    if not versions:
        return None
    ny, nx = versions[0].phase.shape
    panel = (WIDTH - 1.2) / 3
    drawing, axes = figure(2, len(versions), height=2 * min(panel * ny / nx, 4.2) + 0.5)
    drawing.set_figwidth(min(WIDTH, panel * len(versions) + 1.2))
    for row, name, colours, unit in ((0, "amplitude", "gray", ""), (1, "phase", "viridis", " (rad)")):
        low, high = limits(getattr(versions[-1], name))
        drawn: Any = None
        for ax, version in zip(axes[row], versions, strict=True):
            drawn = ax.imshow(getattr(version, name), cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            bare(ax)
            if row == 0:
                ax.set_title(version.title)
        axes[row, 0].set_ylabel(f"{name}{unit}")
        drawing.colorbar(drawn, ax=list(axes[row]), fraction=0.05, pad=0.01, aspect=26).outline.set_visible(False)
    return webp(drawing)


def bare(ax: Axes) -> None:
    """Axes for an image: a thin frame, no ticks."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


@styled
def positions_picture(curves: Sequence[Curve]) -> bytes | None:
    """Measured positions of each scan: a line in their order, points coloured by residual. None: no frames."""
    if not curves:
        return None
    columns = min(len(curves), 4)
    rows = -(-len(curves) // columns)
    side = (WIDTH - 1.0) / max(columns, 3)
    drawing, axes = figure(rows, columns, height=rows * (side + 0.35))
    drawing.set_figwidth(min(WIDTH, side * columns + 1.0))
    low, high = limits(np.concatenate([curve.residual for curve in curves]))
    drawn: Any = None
    for ax, curve in zip(axes.flat, curves, strict=False):
        drawn = scatter(ax, curve, low, high)
        ax.set_title(f"{curve.scan}   {len(curve.number)} frames")
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    bar = drawing.colorbar(drawn, ax=list(axes.flat), fraction=0.04, pad=0.01, aspect=28)
    bar.set_label("residual, low is good")
    bar.outline.set_visible(False)
    return png(drawing)


def scatter(ax: Axes, curve: Curve, low: float, high: float) -> Any:
    """Draw the positions of a scan into axes; returns what a colour bar needs."""
    scale, unit = (1e6, "µm") if curve.unit == "m" else (1.0, "px" if curve.unit == "object pixel" else curve.unit)
    y, x = curve.y * scale, curve.x * scale
    ax.plot(x, y, color=INK, linewidth=0.4, alpha=float(np.clip(60 / max(len(x), 1), 0.06, 0.45)), zorder=1)
    size = float(np.clip(4000 / max(len(x), 1), 3, 28))
    look: dict[str, Any] = {"cmap": "viridis_r", "vmin": low, "vmax": high, "linewidths": 0.4, "edgecolors": INK}
    dots = ax.scatter(x, y, c=curve.residual, s=size, zorder=2, **look)
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.tick_params(labelsize=8, length=2)
    ax.set_xlabel(unit, fontsize=8, labelpad=1)
    return dots


@styled
def live_picture(live: xr.Dataset) -> bytes | None:
    """Amplitude, phase, trust and measured positions in a row: the live object in a notebook cell. None: no object yet.

    live: as in object.zarr; only `amplitude` and `phase` are needed.
    """
    there = np.isfinite(live["amplitude"].values) & (live["amplitude"].values > 0)
    if not there.any():
        return None
    phase = live["phase"].values
    middle = np.angle(np.exp(1j * phase[there]).sum())
    phase = np.where(there, np.angle(np.exp(1j * (phase - middle))), np.nan)
    amplitude = np.where(there, live["amplitude"].values, np.nan)
    parts = [("amplitude", amplitude, "gray", limits(amplitude)), ("phase (rad)", phase, "viridis", limits(phase))]
    if "trust" in live and np.isfinite(live["trust"].values).any():
        parts.append(("trust, 0 is worst", live["trust"].values, "viridis", (0.0, 1.0)))
    elif "pixel_residual" in live:  # no version with validation frames has predicted yet
        residual = live["pixel_residual"].values
        parts.append(("residual, low is good", residual, "viridis_r", limits(residual)))
    measured = curves_of({"live": live})
    columns = len(parts) + bool(measured)
    ny, nx = there.shape
    drawing, axes = figure(1, columns, height=min(WIDTH / columns * ny / nx, 5.0) + 0.3)
    for ax, (title, values, colours, (low, high)) in zip(axes[0], parts, strict=False):
        drawn = ax.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
        drawing.colorbar(drawn, ax=ax, location="bottom", fraction=0.05, pad=0.02).outline.set_visible(False)
        ax.set_title(title)
        bare(ax)
    if measured:
        scatter(axes[0, -1], measured[0], *limits(measured[0].residual))
        axes[0, -1].set_title(f"{len(measured[0].number)} frames")
    return png(drawing)
