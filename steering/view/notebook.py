"""The live image in a notebook cell, redrawn in place."""

from __future__ import annotations

import html
import time
from typing import Any

import xarray as xr
from IPython.display import HTML, DisplayHandle, Image, display

from steering.view.display import Snapshot, clock, drift_in_words, one_line, state_in_words
from steering.view.pictures import live_picture


class LivePanel:
    """Shows the live object under a cell: `update(live, snapshot)` for each new state.

    Needs no widgets: it works in any front end of Jupyter, and in a notebook that is executed without one.
    """

    def __init__(self, every_s: float = 1.0) -> None:
        """every_s: redraw at most so often; the state in which a run ends is always drawn."""
        self._every = every_s
        self._next = 0.0
        self._words: DisplayHandle | None = None
        self._image: DisplayHandle | None = None

    def update(self, live: xr.Dataset, snapshot: Snapshot) -> None:
        """Draw the live object and a line on the state of the run.

        live: a scan's Dataset as in object.zarr (at least amplitude and phase over (y, x)). snapshot: see
        `steering.view.display.Snapshot`.
        """
        now = time.monotonic()
        if now < self._next and (snapshot.get("status") or "running") == "running":
            return
        png = live_picture(live)
        self._words = _shown(self._words, HTML(f"<div>{html.escape(_sentence(snapshot))}</div>"))
        if png is not None:
            self._image = _shown(self._image, Image(data=png, format="png", width=980))
        self._next = time.monotonic() + self._every


def _shown(handle: DisplayHandle | None, content: Any) -> DisplayHandle | None:
    if handle is None:
        return display(content, display_id=True)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]
    handle.update(content)  # type: ignore[no-untyped-call, unused-ignore]
    return handle


def _sentence(snapshot: Snapshot) -> str:
    known = snapshot.get
    parts = [state_in_words(snapshot)]
    if known("elapsed_s") is not None:
        parts.append(clock(snapshot["elapsed_s"]))
    if known("scan") is not None:
        parts.append(f"sample {known('scan')}")
    if known("frames_acquired") is not None:
        parts.append(f"{known('frames_acquired')} frames")
    if known("version") is not None:
        parts.append(f"model version {known('version')}")
    if known("residual") is not None:
        drift = drift_in_words(snapshot)
        parts.append(f"residual {known('residual'):.3f}{f', {drift}' if drift else ''}")
    if known("reason"):
        parts.append(one_line(known("reason")))
    return "  ·  ".join(parts)
