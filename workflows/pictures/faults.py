"""The picture of how a campaign goes on after faults, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steering.view.pictures import COLOURS, INK, figure, png, styled

SHOWN = {"notice_s": "noticed", "train_again_s": "training again", "predict_again_s": "predicting again"}


@styled
def faults_picture(faults: Sequence[Mapping[str, Any]]) -> bytes:
    """Seconds after each fault until it was noticed and until training and prediction went on, by what was hit."""
    drawing, axes = figure(height=3.8)
    ax = axes[0, 0]
    targets = sorted({fault["target"] for fault in faults})
    for number, (key, label) in enumerate(SHOWN.items()):
        for kind, marker in (("kill", "x"), ("stop", "o"), ("stall", "s"), ("cut", "^")):
            mine = [fault for fault in faults if key in fault and fault["kind"] == kind]
            ax.plot(
                [targets.index(fault["target"]) + 0.2 * (number - 1) for fault in mine],
                [fault[key] for fault in mine],
                marker,
                color=COLOURS[number],
                markerfacecolor="none",
                label=f"{label}, {kind}",
            )
    ax.set_xticks(range(len(targets)), targets)
    ax.set_ylabel("seconds after the fault")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8.5, labelcolor=INK, loc="center left", bbox_to_anchor=(1.01, 0.5))
    ax.grid()
    return png(drawing)
