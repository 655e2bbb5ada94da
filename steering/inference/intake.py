"""What comes in: frames are validated, put together into batches, and those set aside are reported once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.campaign import FrameSetAside
from steering.inference.live import LiveImage
from steering.inference.policy_host import ResumeState
from steering.ptychography import Canvas
from steering.records import positions_px

SATURATED_SHARE = 0.01
"""Share of the good pixels that may stand at the frame's highest value, where that is high: a count that so many
pixels share is the end of the counter's range, not a measurement."""
_HIGH = 255
"""No counter ends below it; in a weak frame many pixels share the highest count by chance."""
_GAPS = 8
"""Of so many newest chunks the mean time between two is when the next one is expected, after the last."""
_PAUSE = 4
"""So many times that, without a chunk, is a pause."""


class Intake:
    """Makes batches of chunks. One thread owns it."""

    def __init__(self, canvas: Canvas, resume: ResumeState) -> None:
        """canvas: where the windows of frames have to lie. resume: which results were reported before."""
        self.order = FrameOrder()
        self._canvas = canvas
        self._resume = resume

    def batch(
        self, taken: list[tuple[xr.Dataset, float]], live: LiveImage, mask: NDArray[np.bool_]
    ) -> tuple[Batch | None, NDArray[np.bool_], list[FrameSetAside]]:
        """The usable frames of chunks of one scan (None: there are none), the mask (y, x) with what they bring into it,
        and the events to report."""
        if live.restored:
            taken = [(rest, at) for chunk, at in taken if (rest := _not_restored(chunk, live)) is not None]
        if live.retired:
            batch = None
            aside = {"a scan that is over": tuple(i for chunk, _ in taken for i in chunk["frame"].values.tolist())}
        else:
            batch, mask, aside = make_batch(taken, known=live.frames.row, mask=mask, canvas=self._canvas)
        used = np.zeros(0, np.int64) if batch is None else batch.frame_id
        self.order.note(live.scan, used, aside, known=live.frames.row)
        return (
            batch,
            mask,
            [
                FrameSetAside(time=time.time(), scan=live.scan, frame_ids=new, reason=reason)
                for reason, ids in aside.items()
                if (new := self._resume.unreported(live.scan, ids))
            ],
        )


class Inbox:
    """Chunks that wait for prediction; any number of threads put them in, one takes them out."""

    def __init__(self, *, frames: int, gather_s: float) -> None:
        """frames: most that are taken together. gather_s: seconds that the first of them waits for others, where
        another is expected within them."""
        self._frames = frames
        self._gather_s = gather_s
        self._waiting: deque[tuple[xr.Dataset, float]] = deque()
        self._arrivals: deque[float] = deque(maxlen=_GAPS)
        self._arrival = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, chunk: xr.Dataset, arrived: float) -> None:
        """Add a chunk that arrived then (time.perf_counter)."""
        with self._arrival:
            self._waiting.append((chunk, arrived))
            self._arrivals.append(arrived)
            self._arrival.notify()

    def time_left(self, now: float) -> float:
        """Seconds until the next chunk is expected; infinite in a pause."""
        times = tuple(self._arrivals)
        gap = _mean_gap(times)
        return float("inf") if not gap or now - times[-1] > _PAUSE * gap else max(0.0, times[-1] + gap - now)

    def take(self) -> list[tuple[xr.Dataset, float]]:
        """The oldest chunks, of one scan and together at most `frames` frames (or one chunk that is larger), with the
        time each arrived. Empty where another call has taken them already."""
        with self._arrival:
            if not self._waiting:
                return []
            left = self._waiting[0][1] + self._gather_s - time.perf_counter()
            if left > 0 and _mean_gap(tuple(self._arrivals)) <= self._gather_s:
                self._arrival.wait_for(self._full, left)
            taken = [self._waiting.popleft()]
            room = self._frames - taken[0][0].sizes["frame"]
            while self._waiting:
                chunk = self._waiting[0][0]
                room -= chunk.sizes["frame"]
                if room < 0 or chunk.attrs["scan"] != taken[0][0].attrs["scan"]:
                    break
                taken.append(self._waiting.popleft())
        return taken

    def _full(self) -> bool:
        return sum(chunk.sizes["frame"] for chunk, _ in self._waiting) >= self._frames


def _mean_gap(times: tuple[float, ...]) -> float:
    """Seconds between two arrivals; 0 where fewer are known."""
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Frames of one scan."""

    frame_id: NDArray[np.int64]
    counts: NDArray
    """(n, y, x)"""
    position: NDArray[np.float64]
    """(n, 2), object pixels."""
    acquired: NDArray[np.float64]
    """(n,) seconds since the epoch."""
    arrived: NDArray[np.float64]
    """(n,) by time.perf_counter."""


def make_batch(
    taken: list[tuple[xr.Dataset, float]], *, known: Container[int], mask: NDArray[np.bool_], canvas: Canvas
) -> tuple[Batch | None, NDArray[np.bool_], dict[str, tuple[int, ...]]]:
    """Validate frames of chunks and put what is left together.

    known: ids that the scan has already. mask: bad pixels (y, x) so far. Returns the batch (None where nothing is
    left), the mask with what its frames bring into it, and the ids of the frames set aside by reason.
    """
    parts, aside = [], dict[str, tuple[int, ...]]()
    had = _Either(known, set())
    for frames in _together([ArrivedFrames.of(chunk, arrived) for chunk, arrived in taken], mask):
        keep, refused = validate(frames, known=had, mask=mask, canvas=canvas)
        for reason, ids in refused.items():
            aside[reason] = aside.get(reason, ()) + ids
        if keep.any():
            mask = mask | mask_of(frames, keep)
            parts.append((frames, keep))
            had.new.update(frames.frame_id[keep].tolist())
    if not parts:
        return None, mask, aside
    columns = {
        name: np.concatenate([getattr(frames, name)[keep] for frames, keep in parts])
        for name in ("frame_id", "counts", "position", "acquired", "arrived")
    }
    return Batch(**columns), mask, aside


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrivedFrames(Batch):
    """Frames as they come, in a chunk or in several."""

    mask: NDArray[np.bool_]
    """(y, x), True = do not use."""

    @classmethod
    def of(cls, chunk: xr.Dataset, arrived: float) -> ArrivedFrames:
        """Those of a chunk; each of its fields is read once, since that takes as long as using it."""
        said = chunk.variables
        ids = said["frame"].values
        return cls(
            frame_id=ids,
            counts=said["counts"].values,
            position=positions_px(chunk),
            acquired=np.full(len(ids), _acquired(chunk)),
            arrived=np.full(len(ids), arrived),
            mask=said["mask"].values,
        )


def _together(parts: list[ArrivedFrames], mask: NDArray[np.bool_]) -> list[ArrivedFrames]:
    """The frames of all chunks as those of one, where they are alike, no id comes twice and no pixel is newly bad: to
    look at them one by one would find the same, and take as many times as long. Else the chunks as they are."""
    if len(parts) < 2:  # none: another predictor had all of them, and this one goes on from what that has left
        return parts
    ids = np.concatenate([part.frame_id for part in parts])
    alike = all(
        part.counts.shape[1:] == mask.shape
        and part.counts.dtype == parts[0].counts.dtype
        and not (part.mask & ~mask).any()
        for part in parts
    )
    if not alike or len(set(ids.tolist())) < len(ids):
        return parts
    names = ("counts", "position", "acquired", "arrived")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return [ArrivedFrames(frame_id=ids, mask=parts[0].mask, **columns)]


@dataclass(frozen=True)
class _Either:
    """Ids that the scan has, and those of the batch that is being made."""

    known: Container[int]
    new: set[int]

    def __contains__(self, frame: object) -> bool:
        return frame in self.new or frame in self.known


def _not_restored(chunk: xr.Dataset, live: LiveImage) -> xr.Dataset | None:
    """What of a chunk an earlier predictor had not put into the image; None: nothing."""
    rows = [live.frames.row.get(frame) for frame in chunk["frame"].values.tolist()]
    new = [at for at, row in enumerate(rows) if row is None or row >= live.restored]
    if len(new) == len(rows):
        return chunk
    return chunk.isel(frame=new) if new else None


def _acquired(chunk: xr.Dataset) -> float:
    """When a chunk was measured, or came where the source does not say; seconds since the epoch."""
    return float(chunk.attrs["acquired"]) or time.time()


def validate(
    frames: ArrivedFrames, *, known: Container[int], mask: NDArray[np.bool_], canvas: Canvas
) -> tuple[NDArray[np.bool_], dict[str, tuple[int, ...]]]:
    """Which frames can be used, (n,), and the ids of the others by reason.

    known: ids that the scan has already. mask: bad pixels (y, x) before these frames. canvas: where their windows have
    to lie.
    """
    counts, ids = frames.counts, frames.frame_id
    if counts.shape[1:] != mask.shape:
        said = f"frames of {counts.shape[1]} x {counts.shape[2]} pixels, expected {mask.shape[0]} x {mask.shape[1]}"
        return np.zeros(len(ids), bool), {said: tuple(ids.tolist())}
    good = counts[:, ~mask] if mask.any() else counts.reshape(len(counts), -1)
    if good.dtype.kind == "f":
        unusable = ~(np.isfinite(good) & (good >= 0)).all(1)
    else:
        unusable = (good < 0).any(1) if good.dtype.kind == "i" else np.zeros(len(ids), bool)
    highest = good.max(1)
    at_the_top = np.zeros(len(ids), np.int64)
    if (high := highest >= _HIGH).any():
        at_the_top[high] = (good[high] == highest[high, None]).sum(1)
    repeated, before = np.zeros(len(ids), bool), set[int]()
    for at, frame in enumerate(ids.tolist()):
        repeated[at] = frame in before or frame in known
        before.add(frame)
    reasons = {
        "an id that the scan has already": repeated,
        "counts that are negative or not finite": unusable,
        "no counts at all": highest == 0,
        "saturated": high & (at_the_top > SATURATED_SHARE * good.shape[1]),
        "a position outside the field": _outside(frames.position, canvas, len(mask)),
    }
    keep = np.ones(len(ids), bool)
    aside: dict[str, tuple[int, ...]] = {}
    for reason, found in reasons.items():
        if (found & keep).any():
            aside[reason] = tuple(ids[found & keep].tolist())
            keep &= ~found
    return keep, aside


def mask_of(frames: ArrivedFrames, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Their mask (y, x) without what only frames that are set aside have brought into it."""
    mask, counts = frames.mask, frames.counts
    if keep.all() or counts.dtype.kind != "u":
        return mask
    top = counts == np.iinfo(counts.dtype).max
    return mask & ~(top[~keep].any(0) & ~top[keep].any(0))


def _outside(where: NDArray[np.float64], canvas: Canvas, window: int) -> NDArray[np.bool_]:
    """(n,) True where the window around a position (n, 2), object pixels, leaves the canvas."""
    corner = np.floor(where - canvas.origin + 0.5) - window // 2
    return np.any((corner < 0) | (corner + window > canvas.shape), axis=1)


class FrameOrder:
    """In what order the frames of a campaign came, and which never did. What it does for a frame never grows."""

    def __init__(self) -> None:
        self.out_of_order = 0
        """Frames that came after one with a higher id: they are used like all others."""
        self._seen: dict[str, _Seen] = {}

    def note(
        self, scan: str, used: NDArray[np.int64], aside: Mapping[str, tuple[int, ...]], known: Container[int]
    ) -> None:
        """Take note of a batch: the ids that are used, and those set aside by reason. known: ids used before it."""
        seen = self._seen.setdefault(scan, _Seen())
        before = np.maximum.accumulate(np.concatenate([[seen.highest], used]))
        self.out_of_order += int((used < before[:-1]).sum())
        for frame in used.tolist():
            seen.count += frame not in seen.aside
            seen.aside.discard(frame)
        now = set(used.tolist())
        for ids in aside.values():
            for frame in ids:
                if frame not in now and frame not in known and frame not in seen.aside:
                    seen.aside.add(frame)
                    seen.count += 1
        every = [*now, *(frame for ids in aside.values() for frame in ids)]
        if every:
            seen.highest = max(seen.highest, *every)
            seen.lowest = min(every) if seen.lowest is None else min(seen.lowest, *every)

    @property
    def missing(self) -> int:
        """Ids between the lowest and the highest of each scan that never came."""
        each = list(self._seen.values())
        return sum(seen.highest - seen.lowest + 1 - seen.count for seen in each if seen.lowest is not None)


@dataclass
class _Seen:
    """Ids of one scan."""

    highest: int = -1
    lowest: int | None = None
    count: int = 0
    """Different ids."""
    aside: set[int] = field(default_factory=set)
    """Those that were set aside and never used."""
