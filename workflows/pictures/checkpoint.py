"""The picture of how long checkpoints hold training up, as PNG."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from steering.view.pictures import COLOURS, INK, figure, png, styled

BAR_MS = 5.0


@styled
def stalls_picture(stalls: Mapping[str, NDArray[np.float64]]) -> bytes:
    """Each checkpoint's longest stop of the training thread, beside the bar.

    stalls: by size of the buffer, milliseconds (checkpoints,).
    """
    drawing, axes = figure(1, 1, height=2.6)
    ax = axes[0, 0]
    for place, (name, found) in enumerate(stalls.items()):
        ax.plot(np.arange(len(found)), found, "o", markersize=4, color=COLOURS[place], label=name)
    ax.axhline(BAR_MS, color=INK, linewidth=0.8, linestyle="--")
    ax.annotate(f"{BAR_MS:.0f} ms", (0.0, BAR_MS), xytext=(0, 3), textcoords="offset points", fontsize=8.5)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("checkpoint")
    ax.set_ylabel("ms in checkpoint code")
    ax.legend(frameon=False)
    return png(drawing)
