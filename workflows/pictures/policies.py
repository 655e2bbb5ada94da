"""The pictures of where policies measure, and what that leaves of the error, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steering.view.pictures import COLOURS, INK, WIDTH, bare, figure, limits, png, styled

ORDER = ("raster_planned", "raster", "random", "space_filling", "gradient_residual", "adaptive")
LOOK: dict[str, dict[str, Any]] = {
    "raster_planned": {"color": INK, "linestyle": "--", "linewidth": 1.0},
    "raster": {"color": INK, "linewidth": 1.0},
    "random": {"color": COLOURS[3], "linewidth": 1.0},
    "space_filling": {"color": COLOURS[2], "linewidth": 1.2},
    "gradient_residual": {"color": COLOURS[1], "linewidth": 1.2},
    "adaptive": {"color": COLOURS[0], "linewidth": 1.8},
}
COLUMNS = 5


@styled
def errors_picture(samples: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Feature error over frames and over beam time, a column per sample, a line per policy: medians over the seeds.

    samples: by name, with by_seed.SEED.policies.POLICY of frames, seconds and feature_error, as in the summary.
    """
    rows = -(-len(samples) // COLUMNS)
    drawing, axes = figure(2 * rows, COLUMNS, height=4.1 * rows + 0.4)
    for place, (name, sample) in enumerate(samples.items()):
        row, column = divmod(place, COLUMNS)
        for below, key in enumerate(("frames", "seconds")):
            ax = axes[2 * row + below, column]
            for policy in ORDER:
                runs = [seed["policies"][policy] for seed in sample["by_seed"].values()]
                x, error = (np.median([run[what] for run in runs], axis=0) for what in (key, "feature_error"))
                ax.plot(x, error, label=policy, **LOOK[policy])
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter("")
            ax.tick_params(labelsize=8, length=2)
            ax.grid(visible=True)
            ax.set_xlabel(key, fontsize=8.5, labelpad=1)
            if not below:
                ax.set_title(f"{name} ({sample['set']})")
            if not column:
                ax.set_ylabel("feature error (rad)", fontsize=8.5)
    for ax in axes.flat:
        ax.set_visible(bool(ax.lines))
    lines, names = axes[0, 0].get_legend_handles_labels()
    drawing.legend(lines, names, loc="outside upper center", ncols=len(names), fontsize=8.5)
    return png(drawing)


@styled
def seen_picture(samples: Sequence[Mapping[str, Any]]) -> bytes:
    """The phase that each policy had seen after the same number of frames, a row per sample, beside the truth.

    samples: each with `sample`, `frames` and `phases`, (Y, X) in radians by policy, NaN where unseen, `truth` first.
    """
    columns = max(len(sample["phases"]) for sample in samples)
    drawing, axes = figure(len(samples), columns, height=len(samples) * (WIDTH / columns + 0.25))
    for line, sample in zip(axes, samples, strict=True):
        low, high = limits(sample["phases"]["truth"])
        y, x = (slice(k.min(), k.max() + 1) for k in np.nonzero(np.isfinite(sample["phases"]["truth"])))
        for ax, (name, phase) in zip(line, sample["phases"].items(), strict=True):
            ax.imshow(phase[y, x], cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
            bare(ax)
            ax.set_title(name.replace("_", " "))
        line[0].set_ylabel(f"{sample['sample']}, {sample['frames']} frames")
    return png(drawing)
