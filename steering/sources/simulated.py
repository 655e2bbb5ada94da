"""A simulated beamline: it measures any object at the positions of the decisions, with noise, gaps and drift."""

from __future__ import annotations

import time
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import skimage
import xarray as xr
from numpy.typing import NDArray

from steering.ptychography import Canvas, simulate
from steering.records import Decision, Field, Geometry, Travel, make_chunk
from steering.sources.pacing import Pacer

ALL_ONES = np.iinfo(np.uint16).max
"""What photon counters read in a gap, at a dead pixel and where a pixel is saturated."""
_AGAIN = 100
"""Most frames of a chunk that is given again."""


@dataclass(frozen=True, eq=False)
class Stage:
    """What is in the beam for some frames."""

    name: str
    """Of the scan that starts here; not used when `new_scan` is False."""
    object: NDArray[np.complex64]
    """(Y, X) transmission."""
    frames: int
    """The stage ends after so many, or when a decision to stop is done."""
    flux: float = 1.0
    """Incident photons, relative to the beamline's probe."""
    new_scan: bool = True
    """False: a drift inside the scan before it (another flux, another material contrast)."""

    def __post_init__(self) -> None:
        thing = np.asarray(self.object)
        if thing.ndim != 2 or not np.isfinite(thing).all():
            raise ValueError(f"stage {self.name!r}: found an object of shape {thing.shape}, expected finite (Y, X)")
        object.__setattr__(self, "object", thing.astype(np.complex64))
        if self.frames < 1 or not (np.isfinite(self.flux) and self.flux > 0):
            raise ValueError(
                f"stage {self.name!r}: found frames={self.frames}, flux={self.flux}, expected both positive"
            )


def sample(image: NDArray, *, phase: float, absorption: float, size: int | None = None) -> NDArray[np.complex64]:
    """Make a sample of one material out of an image: (1 - absorption t) exp(i phase (t - 0.5)), t = image in 0..1.

    image: (Y, X) real, or (Y, X, 3 or 4) in colours, which turn grey. phase: radians between t = 0 and t = 1.
    absorption: share of the amplitude lost at t = 1. size: the central square of the image, resized to
    (size, size); None: the image as it is. Returns (Y, X) complex64. Raises ValueError for an image without contrast.
    """
    grey = np.asarray(image, np.float64)
    if grey.ndim == 3:
        grey = skimage.color.rgb2gray(grey[..., :3])
    if grey.ndim != 2 or not np.isfinite(grey).all() or np.ptp(grey) == 0:
        raise ValueError(f"found an image of shape {np.shape(image)}, expected a finite (Y, X) with some contrast")
    if not 0 <= absorption < 1:
        raise ValueError(f"found absorption={absorption}, expected 0 or more and less than 1")
    if size is not None:
        side = min(grey.shape)
        y, x = ((n - side) // 2 for n in grey.shape)
        square = grey[y : y + side, x : x + side]
        grey = skimage.transform.resize(square, (size, size), anti_aliasing=True)
    thickness = (grey - grey.min()) / np.ptp(grey)
    return ((1 - absorption * thickness) * np.exp(1j * phase * (thickness - 0.5))).astype(np.complex64)


def hard_xray_geometry(window: int, *, mask: NDArray[np.bool_] | None = None) -> Geometry:
    """8.8 keV, and 2.4 m away a counter of 512 pixels of 75 um, binned to `window`: object pixels of 8.8 nm."""
    return Geometry(
        shape=(window, window), wavelength=1.4089e-10, distance=2.4, detector_pixel=512 * 75e-6 / window, mask=mask
    )


def detector_gap(shape: tuple[int, int], *, start: int, width: int, axis: str = "y") -> NDArray[np.bool_]:
    """(y, x) mask of one gap between detector modules: `width` rows (axis "y") or columns ("x") from `start` on."""
    if axis not in ("y", "x") or width < 1 or not 0 <= start <= shape["yx".index(axis)] - width:
        raise ValueError(
            f"found a gap {start}..{start + width} along {axis!r}, expected it inside {shape}, axis y or x"
        )
    mask = np.zeros(shape, bool)
    band = slice(start, start + width)
    mask[(band, slice(None)) if axis == "y" else (slice(None), band)] = True
    return mask


class SimulatedBeamline:
    """A source that measures the objects of its stages in turn, in real time, at the positions of the decisions.

    Its attributes are those of the contract, `Source`: the probe (mode, N, N) in photons per frame at flux 1, lengths
    in `geometry.length_unit`, metres for the default geometry. Position (0, 0) is the middle pixel (Y // 2, X // 2) of
    the object. Frame ids count up over the whole campaign.
    The same seed and the same decisions give the same frames: the noise of a frame follows from its id.
    Pixels of the mask read the all-ones value of uint16, and so do those with more counts than uint16 holds.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        probe: NDArray[np.complex64],
        geometry: Geometry | None = None,
        step: float = 8.0,
        frame_rate: float = 50.0,
        chunk_frames: int = 10,
        seed: int = 0,
    ) -> None:
        """probe: (m, N, N). step: of the grid of candidates, object pixels. frame_rate: per second."""
        probe = np.asarray(probe, np.complex64)
        if probe.ndim != 3 or not np.isfinite(probe).all() or not np.any(probe):
            raise ValueError(f"found a probe of shape {probe.shape}, expected finite (mode, y, x) that is not all zero")
        self.probe = probe
        self.geometry = geometry or hard_xray_geometry(probe.shape[-1])
        self.stages = tuple(stages)
        self.frame_rate = frame_rate
        self.seed = seed
        shapes = {stage.object.shape for stage in self.stages}
        if len(shapes) != 1 or not self.stages[0].new_scan:
            raise ValueError(
                f"found {len(self.stages)} stages with objects of shapes {sorted(shapes)}, "
                "expected one shape for all, and a first stage that starts a scan (new_scan=True)"
            )
        if probe.shape[1:] != self.geometry.shape:
            raise ValueError(f"found a probe of {probe.shape[1:]}, expected the frames' {self.geometry.shape}")
        names = [stage.name for stage in self.stages if stage.new_scan]
        if len(set(names)) != len(names):
            raise ValueError(f"found scans named {names}, expected each name once")
        ((ny, nx),) = shapes
        self._canvas = Canvas((ny, nx), (-(ny // 2), -(nx // 2)))
        field = _reachable((ny, nx), probe.shape[-1])
        pixel = self.geometry.object_pixel
        self.field = field.scaled(pixel)
        self.candidates = _jittered_grid(field, step, seed) * pixel
        self._scans = _scan_names(self.stages)
        self.scans = tuple(names)
        self.frames = sum(stage.frames for stage in self.stages)
        self.travel: Travel | None = None
        """The time from one position to the next; None: it takes none. Set it before chunks()."""
        self.travel_s = 0.0
        """Seconds of travel to the positions queued so far."""
        self._here: NDArray[np.float64] | None = None
        self._in_beam = self._next_id = self._asked = 0
        """The last: positions so far; each brings one frame, and their order is that of the ids."""
        self._first_id = 0
        """Of the frames in `_measured`."""
        self._measured = array("d")
        """Part, y, x and seconds of each frame: what makes it once more."""
        self._handed = 0
        """Ids below this one were handed out before this source was made."""
        self._pacer: Pacer[tuple[float, float]] = Pacer(
            [stage.frames for stage in self.stages],
            frame_rate=frame_rate,
            chunk_frames=chunk_frames,
            scans=[names.index(scan) for scan in self._scans],
        )

    @property
    def frames_dropped(self) -> int:
        """Frames measured that the consumer of chunks() was too slow to take."""
        return self._pacer.frames_dropped

    def chunks(self) -> Iterator[xr.Dataset]:
        """Measure; yield chunks of uint16 counts until the stages are over or close() is called."""
        self._skip_handed()
        return self._pacer.run(self._measure)

    def position(self) -> dict[str, Any]:
        """See the contract, `Source`."""
        with self._pacer.lock:
            found = self._pacer.position()
            here = None if self._here is None else self._here.tolist()
            waiting = sum(request[0] is not None for request in found["requests"])
            return {**found, "next_id": self._asked - waiting, "here": here}

    def resume(self, position: Mapping[str, Any], handed: Collection[int] = ()) -> None:
        """See the contract, `Source`."""
        self._pacer.resume(position, lambda where: (float(where[0]), float(where[1])))
        self._next_id = self._first_id = int(position["next_id"])
        self._asked = self._next_id + len(self._pacer.waiting())
        self._here = None if position["here"] is None else np.array(position["here"], np.float64)
        self._handed = max(handed, default=-1) + 1

    def again(self, ids: Sequence[int]) -> Iterator[xr.Dataset]:
        """See the contract, `Source`: every frame that this source, or the one that it goes on from, handed out since
        its position."""
        self._skip_handed()
        # A copy in one step: while an array reads another one's memory the thread that measures cannot extend it.
        known = np.frombuffer(self._measured.tobytes(), np.float64).reshape(-1, 4)
        mine = [i for i in sorted(set(ids)) if 0 <= i - self._first_id < len(known)]
        for (part, _), same in groupby(mine, lambda i: (int(known[i - self._first_id, 0]), i // _AGAIN)):
            frame_ids = np.array(list(same))
            _, y, x, seconds = known[frame_ids - self._first_id].T
            yield self._frames(part, frame_ids, np.stack([y, x], axis=1), seconds)

    def _skip_handed(self) -> None:
        for part, (y, x), seconds in self._pacer.skip(self._handed - self._next_id):
            self._in_beam = part
            self._measured.extend((part, y, x, seconds))
            self._next_id += 1

    def apply(self, decision: Decision) -> NDArray[np.float64]:
        """Queue the positions of a decision; dwell, where given, sets the time and the photons of each. Returns the
        positions (m, 2) outside `field`: nothing is measured there."""
        inside = self.field.contains(decision.positions, tolerance=1e-6 * self.geometry.object_pixel)
        where = decision.positions[inside]
        dwell = None if decision.dwell is None else decision.dwell[inside]
        with self._pacer.lock:
            moving = self._moving(where)
            self.travel_s += float(moving.sum())
            targets = [(float(y), float(x)) for y, x in where]
            self._asked += len(targets)
            self._pacer.add(targets, dwell=dwell, travel=moving, stop=decision.stop, scan=decision.scan)
        return decision.positions[~inside]

    def close(self) -> None:
        """End the campaign; a waiting chunks() hands out what was measured and ends."""
        self._pacer.close()

    def truth(self, scan: str) -> tuple[NDArray[np.complex64], Canvas] | None:
        """The object (Y, X) measured last under this scan's name, and where it lies; None for a name not known."""
        mine = [k for k, name in enumerate(self._scans) if name == scan]
        if not mine:
            return None
        return self.stages[max(mine[0], min(mine[-1], self._in_beam))].object, self._canvas

    def _moving(self, where: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) seconds to each of the next positions (n, 2); the first of a campaign is where the stage is."""
        if self.travel is None or not len(where):
            return np.zeros(len(where))
        start = where[:1] if self._here is None else self._here[None]
        self._here = where[-1]
        return self.travel.along(np.concatenate([start, where]))[1:]

    def _measure(self, part: int, targets: list[tuple[float, float]], seconds: NDArray[np.float64]) -> xr.Dataset:
        self._in_beam = part
        where = np.array(targets)
        ids = np.arange(self._next_id, self._next_id + len(targets))
        for (y, x), exposure in zip(targets, seconds.tolist(), strict=True):
            self._measured.extend((part, y, x, exposure))
        self._next_id += len(targets)
        return self._frames(part, ids, where, seconds)

    def _frames(
        self, part: int, ids: NDArray[np.int64], where: NDArray[np.float64], seconds: NDArray[np.float64]
    ) -> xr.Dataset:
        stage = self.stages[part]
        expected = simulate(stage.object, self.probe, self._canvas, where / self.geometry.object_pixel)
        scale = stage.flux * seconds * self.frame_rate
        counts = np.empty(expected.shape, np.uint16)
        for k, frame_id in enumerate(ids):
            noise = np.random.default_rng((self.seed, int(frame_id)))
            counts[k] = np.minimum(noise.poisson(expected[k] * scale[k]), ALL_ONES)
        counts[:, ~self.geometry.good()] = ALL_ONES
        return make_chunk(counts, ids, where, self.geometry, scan=self._scans[part], acquired=time.time())


def _scan_names(stages: Sequence[Stage]) -> list[str]:
    """The scan that each stage belongs to: its own, or the one before it."""
    names: list[str] = []
    for stage in stages:
        names.append(stage.name if stage.new_scan else names[-1])
    return names


def _reachable(shape: tuple[int, int], window: int) -> Field:
    """Positions, object pixels, whose window of the object does not leave it."""
    if min(shape) < window:
        raise ValueError(f"found an object of {shape}, expected at least the probe's window of {window} pixels")
    limits = [(window // 2 - n // 2, n - n // 2 - window + window // 2) for n in shape]
    return Field(*limits[0], *limits[1])


def _jittered_grid(field: Field, step: float, seed: int) -> NDArray[np.float64]:
    """(n, 2): a grid over the field, each point moved by up to a fifth of a step, so that no artefact has a period."""
    if not (np.isfinite(step) and step > 0):
        raise ValueError(f"found step={step}, expected a positive number of object pixels")
    y, x = (
        np.linspace(low, high, 1 + round((high - low) / step)) if high > low else np.array([low])
        for low, high in ((field.y0, field.y1), (field.x0, field.x1))
    )
    grid = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1).reshape(-1, 2)
    moved = grid + np.random.default_rng(seed).uniform(-step / 5, step / 5, grid.shape)
    return np.clip(moved, [field.y0, field.x0], [field.y1, field.x1])
