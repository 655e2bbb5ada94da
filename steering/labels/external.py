"""External labels: files that another process writes into RUN/labels while the run goes on.

A file is an .npz without pickled objects. It holds `scan` (a name), `frame_id` (n,), and either `patches`, complex
(n, patch, patch) around the frames' positions as the network predicts them, or `object`, complex (Y, X), with `origin`
(2,), the position of its pixel [0, 0] in object pixels: patches are then cut where the frames were measured. An
iterative reconstruction may be minutes late, and in any order: frames are found by their id.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steering.campaign import ExternalLabelsRead
from steering.files import Memory, own_file, read_npz
from steering.files.arrays import DAMAGED
from steering.inference import LabelFrames
from steering.labels.make import LabelSettings, fit_to_teach, labels_of, send
from steering.labels.refinement import yield_to_frames
from steering.ptychography import Canvas, extract_patches, far_field_residual
from steering.records.whole_file import write_whole

logger = logging.getLogger(__name__)

_MOST_BYTES = 2**31
"""Largest size of a file once it is unpacked."""
_LEAST_SCALE = 0.5
"""Least ratio of the amplitude of labels to that of the network's image, and of the latter to the former: the far-field
residual does not depend on scale."""
_SETTLED_S = 1.0
"""Seconds without a write after which a file is opened: another program may write it in place."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExternalLabels:
    """What a file holds."""

    scan: str
    frame_id: NDArray[np.int64]
    """(n,)"""
    patches: NDArray[np.complex64] | None = None
    """(n, patch, patch)"""
    object: NDArray[np.complex64] | None = None
    """(Y, X), in place of patches."""
    origin: tuple[float, float] = (0.0, 0.0)
    """Position (y, x) of the object's pixel [0, 0], object pixels."""

    def __post_init__(self) -> None:
        n = len(self.frame_id)
        if (self.patches is None) == (self.object is None):
            raise ValueError("found both patches and object, or neither; expected one of them")
        if self.patches is not None and (self.patches.ndim != 3 or len(self.patches) != n):
            raise ValueError(f"found patches of shape {self.patches.shape} for {n} frame ids, expected (n, y, x)")
        if self.object is not None and self.object.ndim != 2:
            raise ValueError(f"found an object of shape {self.object.shape}, expected (Y, X)")
        if not np.isfinite(self.origin).all():
            raise ValueError(f"found an origin {self.origin}, expected two finite numbers (y, x)")
        values = self.patches if self.patches is not None else self.object
        if not n or not np.isfinite(np.asarray(values)).all():
            raise ValueError(f"found {n} frame ids and values not all finite, expected 1 frame or more, finite values")


@dataclass(frozen=True, kw_only=True)
class ExternalReport:
    """What was read from a file."""

    file: str
    scan: str = ""
    count: int = 0
    """Labels sent to the ranks for training."""
    held_out: int = 0
    """Labels sent to the ranks for validation, never trained on."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """Number of rejected labels, or of files that cannot be read, by reason."""
    late_s: tuple[float, ...] = ()
    """Seconds from the acquisition of the frame of each accepted label to its arrival at the ranks."""
    versions_late: tuple[int, ...] = ()
    """Model versions published in that time, for each accepted label."""


def hand_in(
    run: str | Path,
    scan: str,
    frame_id: ArrayLike,
    *,
    patches: NDArray | None = None,
    object: NDArray | None = None,
    origin: tuple[float, float] = (0.0, 0.0),
) -> Path:
    """Write labels for a run that goes on; the file appears whole. Arguments as in `ExternalLabels`.

    Raises ValueError where they do not fit each other.
    """
    arrays: dict[str, Any] = {"scan": np.array(scan), "frame_id": np.asarray(frame_id), "origin": np.array(origin)}
    arrays |= {name: value for name, value in (("patches", patches), ("object", object)) if value is not None}
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    packed.seek(0)
    read_labels(packed)  # refuses here what the run would refuse
    inbox = Path(run) / "labels"
    inbox.mkdir(exist_ok=True)
    path = inbox / f"{time.time_ns()}-{os.getpid()}.npz"
    write_whole(path, packed.getvalue())
    return path


def waiting(run: Path) -> list[Path]:
    """Label files of the run in this folder that are ready to be read, oldest first."""
    found = []
    for path in (run / "labels").glob("[!.]*.npz"):
        with contextlib.suppress(OSError):  # who put it there may take it away again
            found.append((path.stat().st_mtime, path))
    return [path for changed, path in sorted(found) if time.time() - changed > _SETTLED_S]


def put_away(path: Path, report: ExternalReport) -> bool:
    """Move a file that was read into the folder `taken` or, if none of its labels was accepted, `refused`.

    If that is not possible, log it, leave the file where it is and return False.
    """
    place = path.parent / ("taken" if report.count + report.held_out else "refused")
    try:
        place.mkdir(exist_ok=True)
        os.replace(path, place / path.name)
    except OSError as error:
        logger.warning("%s: could not be moved to %s: %s", path, place, error)
        return False
    return True


def take_in(
    predictor: Any,
    ranks: Sequence[Any],
    path: Path,
    *,
    strata: Mapping[str, int],
    patch: int,
    settings: LabelSettings,
    generation: int = 0,
) -> ExternalReport:
    """Read a file, find its frames, reject bad labels and send each rank its share: a Dask task.

    predictor, ranks: actors; generation: of the ranks. strata: keys of the scans so far in the rehearsal buffer.
    Whatever is wrong with a file stands in the report; it never ends the run.
    """
    yield_to_frames()
    try:
        given = read_labels(path)
        if given.patches is not None and given.patches.shape[1:] != (patch, patch):
            raise ValueError(f"found patches of {given.patches.shape[1:]}, expected ({patch}, {patch}) as predicted")
    except Exception as error:  # a file written by another program must not end a run
        return ExternalReport(file=path.name, refused={f"{type(error).__name__}: {error}": 1})
    frames: LabelFrames | None
    frames, gone = predictor.late_frames(given.scan, given.frame_id).result()
    if frames is None or given.scan not in strata:
        return ExternalReport(file=path.name, scan=given.scan, refused={"scan not known": len(given.frame_id)})
    rows, patches, refused = match(given, frames, gone, patch)
    residual = np.zeros(0, np.float32)
    if len(rows):
        own = extract_patches(frames.predicted, frames.canvas, frames.position[rows], patch)
        if not _LEAST_SCALE < np.median(np.abs(patches)) / max(np.median(np.abs(own)), 1e-6) < 1 / _LEAST_SCALE:
            refused["amplitude not of a transmission's scale"] = len(rows)
            rows, patches, own = rows[:0], patches[:0], own[:0]
    if len(rows):
        # A reconstruction leaves its constant phase open; labels of one scan must agree on it: all are turned alike.
        patches = (patches * np.exp(1j * np.angle(np.vdot(patches, own)))).astype(np.complex64)
        residual = far_field_residual(patches, frames.counts[rows], frames.probe, frames.mask)
    good = fit_to_teach(residual, worst=settings.worst, usual=frames.label_residual, predicted=frames.residual[rows])
    refused["does not explain its frame"] += int((~good).sum())
    rows = rows[good]
    labels = labels_of(frames, rows, patches[good], residual[good], stratum=strata[given.scan], probe=None)
    send(labels, ranks, generation)
    return ExternalReport(
        file=path.name,
        scan=given.scan,
        count=int((~labels.held_out).sum()),
        held_out=int(labels.held_out.sum()),
        refused={reason: count for reason, count in refused.items() if count},
        late_s=tuple((time.time() - frames.acquired[rows]).tolist()),
        versions_late=tuple((frames.version - frames.first_version[rows]).tolist()),
    )


def arrival(report: ExternalReport) -> ExternalLabelsRead:
    """The event that reports a file."""
    return ExternalLabelsRead(
        time=time.time(),
        file=report.file,
        scan=report.scan,
        count=report.count,
        refused=sum(report.refused.values()),
        reasons=tuple(f"{reason}: {count}" for reason, count in report.refused.items()),
        late_s=_median(report.late_s),
        versions_late=_median(report.versions_late),
    )


def external_figures(reports: Sequence[ExternalReport], too_late: int) -> dict[str, Any]:
    """Figures of external labels for the summary. too_late: number of files not yet read when the run ended."""
    refused: Counter[str] = Counter()
    for report in reports:
        refused.update(report.refused)
    late_s = [value for report in reports for value in report.late_s]
    versions = [value for report in reports for value in report.versions_late]
    return {
        "files": len(reports),
        "labels": sum(report.count for report in reports),
        "held_out": sum(report.held_out for report in reports),
        "refused": dict(refused),
        "files_too_late": too_late,
        "late_s": {"p50": _median(late_s), "max": max(late_s, default=None)},
        "versions_late": {"p50": _median(versions), "max": max(versions, default=None)},
    }


def match(
    given: ExternalLabels, frames: LabelFrames, gone: int, patch: int
) -> tuple[NDArray[np.int64], NDArray[np.complex64], Counter[str]]:
    """Rows of the frames that have a label, the labels in that order, and the number of rejected labels by reason.

    frames: the frames of the given ids whose counts are kept. gone: number of those whose counts are no longer kept.
    """
    ids, first = np.unique(given.frame_id, return_index=True)
    refused = Counter({"frame given a second time": len(given.frame_id) - len(ids), "frame no longer kept": gone})
    refused["frame not known"] = len(ids) - gone - len(frames.frame_id)
    rows = np.flatnonzero(~frames.withheld)
    refused["frame kept from training"] = len(frames.frame_id) - len(rows)
    if given.patches is not None:
        place = first[np.searchsorted(ids, frames.frame_id[rows])]
        return rows, given.patches[place], refused
    image = np.asarray(given.object)
    canvas = Canvas((image.shape[0], image.shape[1]), given.origin)
    low = np.array(canvas.origin) + patch // 2
    high = low + np.array(canvas.shape) - patch
    inside = ((frames.position[rows] >= low) & (frames.position[rows] <= high)).all(1)
    refused["frame outside the object"] = int((~inside).sum())
    rows = rows[inside]
    return rows, extract_patches(image, canvas, frames.position[rows], patch), refused


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def read_labels(file: Path | io.BytesIO) -> ExternalLabels:
    """What a file holds. Raises ValueError for what is no label file of ours, and OSError for a damaged one."""
    if isinstance(file, Path):
        own_file(file, file.parent)
    try:
        arrays, names = read_npz(file, Memory(_MOST_BYTES), {"scan", "frame_id", "patches", "object", "origin"})
    except DAMAGED as error:
        raise OSError(f"found a damaged file ({error}), expected .npz: hand the labels in again") from error
    missing = {"scan", "frame_id"} - set(arrays)
    if missing:
        raise ValueError(f"found arrays {sorted(names)[:50]}, expected scan and frame_id among them")
    frame_id = arrays["frame_id"]
    if frame_id.ndim != 1 or frame_id.dtype.kind not in "ui":
        raise ValueError(f"found frame_id {frame_id.dtype} {frame_id.shape}, expected integers (n,)")
    if arrays["scan"].dtype.kind not in "SU" or arrays["scan"].size != 1:
        raise ValueError(f"found scan {arrays['scan'].dtype} {arrays['scan'].shape}, expected a name")
    return ExternalLabels(scan=str(arrays["scan"].item()), frame_id=frame_id.astype(np.int64), **_values(arrays))


def _values(arrays: Mapping[str, NDArray]) -> dict[str, Any]:
    """Patches or object, and origin, as they are in a file. Raises ValueError for other than numbers."""
    found: dict[str, Any] = {}
    for name in {"patches", "object"} & set(arrays):
        if arrays[name].dtype.kind not in "biufc":
            raise ValueError(f"found {name} of {arrays[name].dtype}, expected complex numbers")
        found[name] = np.asarray(arrays[name], np.complex64)
    if "origin" in arrays:
        if arrays["origin"].shape != (2,) or arrays["origin"].dtype.kind not in "uif":
            raise ValueError(f"found an origin {arrays['origin'].dtype} {arrays['origin'].shape}, expected (y, x)")
        y, x = arrays["origin"].astype(float).tolist()
        found["origin"] = (y, x)
    return found
