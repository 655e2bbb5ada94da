"""The picture of how the exchange scales, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steering.view.pictures import COLOURS, INK, figure, png, styled


@styled
def scaling_picture(figures: Mapping[str, Any], network: Mapping[int, float]) -> bytes:
    """Milliseconds per step over ranks, both logarithmic: what was measured, solid; what is projected, dashed.

    figures: `measured`, `fitted`, `measured_plan_ms`, `stated_network` and perhaps `runs`, as in the summary.
    network: projected milliseconds on the stated network by number of ranks.
    """
    drawing, axes = figure(height=3.8)
    ax = axes[0, 0]
    measured = {int(n): values for n, values in figures["measured"].items()}
    for colour, (key, label) in zip(
        COLOURS,
        {"step_ms": "step, measured here", "exchange_ms": "exchange alone, measured here"}.items(),
        strict=False,
    ):
        ax.plot(list(measured), [values[key] for values in measured.values()], "o-", color=colour, label=label)
    fitted = {int(n): value for n, value in figures["fitted"]["exchange_ms"].items()}
    ax.plot(list(fitted), list(fitted.values()), ":", color=INK, linewidth=1.8, label="exchange alone, as fitted")
    plan = {int(n): value for n, value in figures["measured_plan_ms"].items()}
    ax.plot(list(plan), list(plan.values()), ".-", color=COLOURS[2], label="plan of a step, measured here")
    many = [n for n in network if n > 1]
    stated = figures["stated_network"]
    words = f"{stated['latency_us']:g} µs, {stated['bandwidth_gb_s']:g} GB/s"
    ax.plot(many, [network[n] for n in many], "--", color=COLOURS[3], label=f"messages and bytes, projected ({words})")
    ax.plot(
        many, [network[n] + plan[n] for n in many], "--", color=COLOURS[4], label="exchange, projected: network + plan"
    )
    runs = figures.get("runs", [])
    for marker, (key, label) in zip(
        "sD", {"step_ms": "step, in runs", "exchange_ms": "exchange alone, in runs"}.items(), strict=True
    ):
        if runs:
            ax.plot([one["ranks"] for one in runs], [one[key] for one in runs], marker, color=INK, ms=5, label=label)
    ax.axhline(stated["step_ms"], color=INK, linewidth=0.9, linestyle=":")
    ax.annotate("stated training step", (1.05, stated["step_ms"]), xytext=(0, 3), textcoords="offset points")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(list(network), [str(n) for n in network])
    ax.set_xlabel("ranks")
    ax.set_ylabel("ms per step and rank")
    ax.legend(fontsize=8.5, labelcolor=INK, loc="center left", bbox_to_anchor=(1.01, 0.5))
    ax.grid()
    return png(drawing)
