"""The course of a run, read from its folder alone: the data of the status lines, the report and a comparison."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Version:
    """A published model; `frame` is how many frames had been acquired by then."""

    number: int
    frame: int
    time: float
    error: float | None


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Drift was raised at `start` and lowered at `stop` (frames acquired by then), or never (None)."""

    scan: str
    start: int
    stop: int | None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What belongs to the frames of one scan, in the order in which they were acquired over the whole run."""

    scan: str
    number: NDArray[np.int64]
    """(frame,) place in the whole run, from 0."""
    error: NDArray[np.float64]
    """(frame,) radians, NaN where unknown."""
    residual: NDArray[np.float64]
    """(frame,) 0..1."""
    y: NDArray[np.float64]
    """(frame,) position, `unit`."""
    x: NDArray[np.float64]
    """(frame,) position, `unit`."""
    unit: str
    held_out: NDArray[np.bool_]
    """(frame,) True where a frame was kept from training."""


@dataclass(frozen=True, kw_only=True)
class History:
    """The events of a run, counted."""

    scans: tuple[str, ...] = ()
    acquired: int = 0
    predicted: int = 0
    versions: tuple[Version, ...] = ()
    drifts: tuple[Drift, ...] = ()
    expected: tuple[tuple[int, float], ...] = ()
    """(frames acquired by then, residual that the model in service should reach)."""
    residuals: tuple[tuple[int, float], ...] = ()
    """(frames predicted by then, median residual of the chunk)."""
    in_service: int | None = None
    """The version; None before the first."""
    in_service_expects: float | None = None
    """Residual that it should reach; None where that is not known."""
    last: Mapping[str, Any] = field(default_factory=dict)
    """The last event."""


_SWAPS = ("ModelPublished", "RolledBack")
"""What puts a version into service."""


def history(events: list[dict[str, Any]]) -> History:
    """Count the events of a run."""
    acquired, predicted = _count(events, "ChunkArrived"), _count(events, "PredictionReady")
    published = [(at, e) for at, e in zip(acquired, events, strict=True) if _is(e, "ModelPublished")]
    swaps = [(at, e) for at, e in zip(acquired, events, strict=True) if e.get("event") in _SWAPS]
    last = swaps[-1][1] if swaps else {}
    residuals = [(at, e.get("residual")) for at, e in zip(predicted, events, strict=True) if _is(e, "PredictionReady")]
    return History(
        scans=tuple(dict.fromkeys(e["scan"] for e in events if _is(e, "ChunkArrived"))),
        acquired=acquired[-1] if events else 0,
        predicted=predicted[-1] if events else 0,
        versions=tuple(
            Version(number=e["version"], frame=at, time=e["time"], error=e.get("validation_error"))
            for at, e in published
        ),
        drifts=_drifts(events, acquired),
        expected=tuple((at, level) for at, e in swaps if (level := e.get("validation_residual")) is not None),
        residuals=tuple((at, level) for at, level in residuals if level is not None),
        in_service=last.get("version"),
        in_service_expects=last.get("validation_residual"),
        last=events[-1] if events else {},
    )


def _is(event: Mapping[str, Any], kind: str) -> bool:
    return event.get("event") == kind


def _count(events: list[dict[str, Any]], kind: str) -> list[int]:
    """For each event the number of frames in all events of `kind` up to it."""
    return list(itertools.accumulate(len(e["frame_ids"]) if _is(e, kind) else 0 for e in events))


def _drifts(events: list[dict[str, Any]], acquired: list[int]) -> tuple[Drift, ...]:
    found: list[Drift] = []
    for at, event in zip(acquired, events, strict=True):
        if _is(event, "DriftRaised"):
            found.append(Drift(scan=event["scan"], start=at, stop=None))
        elif _is(event, "DriftLowered") and found and found[-1].stop is None:
            found[-1] = replace(found[-1], stop=at)
    return tuple(found)


def curves(objects: Mapping[str, xr.Dataset]) -> list[Curve]:
    """One curve per scan, its frames numbered in the order of acquisition over the whole run."""
    with_frames = {scan: image for scan, image in objects.items() if image.sizes.get("frame")}
    times = [_per_frame(image, "acquired") for image in with_frames.values()]
    number = np.empty(sum(len(t) for t in times), np.int64)
    if times:
        number[np.argsort(np.concatenate(times), kind="stable")] = np.arange(len(number))
    found, start = [], 0
    for (scan, image), time in zip(with_frames.items(), times, strict=True):
        mine = number[start : start + len(time)]
        start += len(time)
        order = np.argsort(mine)
        y, x = _per_frame(image, "position_y"), _per_frame(image, "position_x")
        unit = str(image["position_y"].attrs.get("units", "object pixel")) if "position_y" in image else "object pixel"
        held_out = image["held_out"].values.astype(bool) if "held_out" in image else np.zeros(len(mine), bool)
        found.append(
            Curve(
                scan=scan,
                number=mine[order],
                error=_per_frame(image, "error")[order],
                residual=_per_frame(image, "residual")[order],
                y=y[order],
                x=x[order],
                unit=unit,
                held_out=held_out[order],
            )
        )
    return found


def _per_frame(image: xr.Dataset, name: str) -> NDArray[np.float64]:
    if name not in image:
        return np.full(image.sizes["frame"], np.nan)
    return image[name].values.astype(np.float64)


def running_median(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """(n,) median over the `width` values around each; NaN are left out, NaN where nothing is left."""
    half = width // 2
    padded = np.concatenate([np.full(half, np.nan), values, np.full(width - 1 - half, np.nan)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    known = np.isfinite(windows).any(axis=1)
    smooth = np.full(len(values), np.nan)
    smooth[known] = np.nanmedian(windows[known], axis=1)
    return smooth
