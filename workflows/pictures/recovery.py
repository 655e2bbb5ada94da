"""The picture of a recovery after a shift of material, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.ptychography.align import align
from steering.view.pictures import COLOURS, INK, WIDTH, bare, figure, limits, png, styled

_TITLES = {
    "truth": "the new sample",
    "before": "network at the shift",
    "labels": "labels it made itself",
    "after": "network after learning",
}


@styled
def recovery_picture(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    images: Mapping[str, NDArray[np.complex64]],
    recovered_s: float | None,
) -> bytes:
    """Errors of the new and the old samples over CPU-seconds; below them the new sample's phase, seen and true.

    curves: by name, CPU-seconds, error of the new sample, error of the old ones, radians. images: complex (Y, X), some
    of truth, before, labels, after, on one canvas, 0 where nothing is known. recovered_s: when 90 % were recovered.
    """
    shown = [name for name in _TITLES if name in images]
    heights = [3.2, WIDTH / max(len(shown), 1)]
    drawing, axes = figure(2, max(len(shown), 2), height=sum(heights), height_ratios=heights)
    grid = axes[0, 0].get_gridspec()
    for ax in axes[0]:
        ax.remove()
    middle = axes.shape[1] // 2
    new, old = drawing.add_subplot(grid[0, :middle]), drawing.add_subplot(grid[0, middle:])
    for place, (name, (cpu_s, new_error, old_error)) in enumerate(curves.items()):
        look: dict[str, Any] = {"color": COLOURS[place], "marker": "o", "markersize": 3}
        look["linestyle"] = "-" if place == 0 else "--"
        new.plot(cpu_s, new_error, label=name, **look)
        old.plot(cpu_s, old_error, label=name, **look)
    if recovered_s is not None:
        late = recovered_s > sum(new.get_xlim()) / 2
        new.axvline(recovered_s, color=COLOURS[0], linewidth=0.8, alpha=0.7)
        new.annotate(
            f"90 % after {recovered_s:.0f} CPU-seconds",
            (recovered_s, 0.93),
            xycoords=("data", "axes fraction"),
            xytext=(-5, 0) if late else (5, 0),
            ha="right" if late else "left",
            textcoords="offset points",
            color=COLOURS[0],
        )
    for ax, title in ((new, "the new sample"), (old, "the four samples learnt before")):
        ax.set_title(title)
        ax.set_xlabel("CPU-seconds of labelling and training")
        ax.set_ylabel("phase error (rad)")
        ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
        ax.grid(axis="y")
    old.legend(fontsize=8.5, labelcolor=INK, loc="lower right")
    _phases(axes[1], {name: images[name] for name in shown})
    return png(drawing)


def _phases(axes: NDArray, images: Mapping[str, NDArray[np.complex64]]) -> None:
    """Side by side, in the gauge of the truth and on its scale."""
    truth = images["truth"]
    known = np.logical_and.reduce([image != 0 for image in images.values()])
    low, high = limits(np.angle(truth)[known])
    for ax, (name, image) in zip(axes, images.items(), strict=False):
        same = image if name == "truth" else align(image, truth, weight=known.astype(np.float32))
        phase = np.where(image != 0, np.angle(same), np.nan)
        ax.imshow(phase, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        ax.set_title(_TITLES[name])
        bare(ax)
