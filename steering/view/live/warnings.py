"""What is wrong with a run, in words for whoever looks at it. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from steering.runner.stream_lines import stream_lines, troubled

_SLOW_S = 5.0
"""Without an answer of the runner."""


def warnings(
    state: Mapping[str, Any], *, waits: Sequence[str] = (), source: str = "", silent_s: float = 0.0, ended: str = ""
) -> list[dict[str, str]]:
    """What is wrong, the worst first: `kind` (alarm or notice) and `text`.

    state: a look's. waits: what the batch system's jobs wait for. source: since when it is silent, as `silence` says.
    silent_s: for how long the runner has not answered. ended: why the run ended before its end.
    """
    found: list[tuple[str, str]] = []
    if ended:
        found.append(("alarm", f"The run ended early: {ended}"))
    if state.get("trouble"):
        found.append(("alarm", f"The disk takes nothing: events wait in memory. {state['trouble']}"))
    if silent_s > _SLOW_S:
        found.append(("alarm", f"The run has not answered for {silent_s:.0f} s: what is shown is as old."))
    found += [("alarm", line) for line in waits if line.startswith("given up: ")]
    if source:
        found.append(("alarm", f"The source is {source}"))
    streams = state.get("streams") or {}
    silent = troubled(streams) if state.get("status") == "running" else ()
    found += [("alarm", line) for line in stream_lines(streams) if line.split(":")[0] in silent]
    if state.get("drift"):
        found.append(("alarm", _drift(state.get("residual"), state.get("residual_expected"))))
    found += [("notice", line) for line in waits if " waits: " in line]
    if state.get("frames_dropped"):
        found.append(("notice", f"{state['frames_dropped']:,} frames were dropped."))
    proposed = state.get("proposed")
    if proposed is not None:
        left = max(0.0, proposed["until"] - time.time())
        found.append(("notice", f"A decision waits for your answer: {left:.0f} s, then {proposed['default']}."))
    if state.get("paused"):
        found.append(("notice", "Paused: nothing more is decided until you resume."))
    return [{"kind": kind, "text": text} for kind, text in found]


def _drift(level: float | None, expected: float | None) -> str:
    badly = "Drift: the network explains the newest frames badly"
    if level is None or expected is None:
        return f"{badly}."
    words = badly if level > expected else "Drift was raised and is not over yet, though the newest frames look well"
    return f"{words}: residual {level:.3f}, {expected:.3f} expected."
