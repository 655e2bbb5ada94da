"""Recorded scans read from files: HDF5 in the layouts of `steering.files.layouts`, and .npz.

Conventions, applied here once. A file's frames are turned by `orientation` about the zero frequency, which is then
brought to (y // 2, x // 2). Positions are (y, x) of the probe on the sample, relative to their mean. CXI stores where
the SAMPLE is, with x to the left seen along the beam and y up; the probe moves on the sample in the opposite direction,
and rows of an image run down and columns to the right, so that both signs cancel: (y, x) = (translation y, translation
x). Where a file has another convention, give `orientation`: frames turned by rot180 are positions with their signs
changed. A file is read in a process of its own, with limits; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.files import Bounds, isolated
from steering.ptychography import Canvas, RefineSettings, aim_probe, extract_patches, refine, rescale_probe
from steering.records import Field, Geometry
from steering.sources.correction import Correction
from steering.sources.frames import (
    brightest,
    clean,
    cut,
    light,
    light_in_corners,
    never_counting,
    say_saturated,
    squared,
)
from steering.sources.lengths import optics, positions_in_unit, refuse_impossible_optics
from steering.sources.orientation import ORIENTATIONS, turn
from steering.sources.positions import crowded, outliers, refuse_impossible
from steering.sources.probe_file import fitted_probe, modes_of
from steering.sources.window import Window, refuse_empty_region, region

_READER = "steering.files.scan:read_scan_file"


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """What a file does not say, or says wrongly, and how its frames are made to fit."""

    frames: str | None = None
    """FILE:/path of the frames, where they are not where a known layout has them."""
    positions: str | None = None
    """FILE:/path[unit] or FILE:/x,/y[unit], of each frame or of a raster's rows and columns. A unit goes before the
    file's; without one it is the file's, or metres. x is in the first column, but the layout's own place keeps what the
    layout says of it, as do the columns of a known table."""
    energy: float | None = None
    """Of the photons, eV."""
    distance: float | None = None
    """Sample to detector, metres."""
    detector_pixel: float | None = None
    """Pitch, metres."""
    mask: str = "file"
    """The file's mask: `file` as it is, `inverted` (1 is good), `none` (left out)."""
    roi: tuple[int, int, int, int] | None = None
    """y0, y1, x0, x1 of the part of the file's frames that is used, detector pixels; None: whole frames."""
    centre: tuple[float, float] | None = None
    """Of the beam (y, x) in the file's frames, detector pixels; None: the middle of `roi`, or, of whole frames, their
    zero frequency. Where these are cut, by `window` or to the largest even square, it is the centre of the light if
    that is farther from their zero frequency than an eighth of what is cut out."""
    window: int | None = None
    """Side of the square that is cut out around the beam, pixels after binning; None: the largest even one. Where `roi`
    or `centre` is given it may reach beyond that part: what is outside is masked."""
    binning: int = 1
    """So many pixels along each side become one, with the sum of their counts."""
    drop_outliers: bool = False
    """Leave out frames whose positions are far from all others, or not finite, in place of refusing the file."""
    correction: Correction | None = None
    """What turns the file's readings into photons, (y, x) as the file's frames are."""
    least_counts: float = 0.0
    """Frames with fewer, bad pixels left out, were taken without the beam and are left out."""
    bounds: Bounds = field(default_factory=Bounds)
    """What reading may cost, and where links may lead."""

    def __post_init__(self) -> None:
        if self.mask not in ("file", "inverted", "none"):
            raise ValueError(f"found mask={self.mask!r}, expected 'file', 'inverted' or 'none'")
        if self.binning < 1 or (self.window is not None and (self.window < 8 or self.window % 2)):
            raise ValueError(f"found binning={self.binning}, window={self.window}, expected 1 or more; even, 8 or more")
        refuse_empty_region(self.roi)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """A scan as it was recorded."""

    counts: NDArray
    """(frame, y, x) in the file's dtype (whole floats as the smallest unsigned one), zero frequency at (y//2, x//2)."""
    positions: NDArray[np.float64]
    """(frame, 2) of (y, x) in `geometry.length_unit`, relative to their mean."""
    probe: NDArray[np.complex64] | None
    """(mode, y, x), power arbitrary; None where the file has none."""
    geometry: Geometry
    notes: tuple[str, ...] = ()
    """What was recognised and changed when it was read, a sentence each."""
    numbers: NDArray[np.int64] = field(default=None)  # type: ignore[arg-type]
    """(frame,) where each is in the file, from 0; left out: they are all of the file's, in its order."""

    def __post_init__(self) -> None:
        if self.numbers is None:
            object.__setattr__(self, "numbers", np.arange(len(self.counts)))
        if self.counts.ndim != 3 or self.counts.shape[1:] != self.geometry.shape:
            raise ValueError(
                f"found frames of shape {self.counts.shape}, expected (frame, y, x) of {self.geometry.shape}"
            )
        if not len(self.counts):
            raise ValueError("found an empty scan, expected one frame or more: was it aborted before the first?")
        if self.positions.shape != (len(self.counts), 2):
            raise ValueError(
                f"found {len(self.counts)} frames and positions of shape {self.positions.shape}, "
                "expected one (y, x) for each frame"
            )
        if self.numbers.shape != (len(self.counts),):
            raise ValueError(f"found numbers {self.numbers.shape} of {len(self.counts)} frames, expected one for each")
        if not np.isfinite(self.positions).all():
            lost = int((~np.isfinite(self.positions)).any(axis=1).sum())
            raise ValueError(
                f"found {lost} positions that are not finite, expected (y, x) of each frame: repair them, or leave "
                "these frames out (drop_outliers=True, --drop-outliers)"
            )
        if self.probe is not None and self.probe.shape[1:] != self.geometry.shape:
            raise ValueError(
                f"found a probe of shape {self.probe.shape}, expected (mode, y, x) of {self.geometry.shape}"
            )
        if self.counts.dtype.kind not in "uif":
            raise ValueError(f"found frames of dtype {self.counts.dtype}, expected real counts (integers or floats)")
        self._refuse_bad_counts()

    def _refuse_bad_counts(self) -> None:
        bad = ~(np.isfinite(self.counts) & (self.counts >= 0)) & self.geometry.good()
        if bad.any():
            frame, y, x = np.argwhere(bad)[0]
            raise ValueError(
                f"found {self.counts[frame, y, x]} at pixel ({y}, {x}) of frame {frame} ({int(bad.sum())} such values "
                "in all), expected finite counts of 0 or more: mask such pixels or repair the file"
            )

    def fitted_probe(self) -> NDArray[np.complex64]:
        """The probe (mode, y, x), aimed and scaled as the counts say. Raises ValueError where there is none."""
        if self.probe is None:
            raise ValueError(
                "found a recording without a probe, expected one: give read_recording(..., probe=...), or --probe FILE"
            )
        mask = self.geometry.mask
        return rescale_probe(aim_probe(self.probe, self.counts, mask), self.counts, mask)

    def labels(
        self, *, patch: int, passes: int, device: str = "auto"
    ) -> tuple[NDArray[np.complex64], NDArray[np.complex64]]:
        """Patches (frame, patch, patch), cut out of the object that all frames refine to in so many passes, and the
        probe (mode, y, x) of these. device: see `find_device`. Raises ValueError where there is no probe."""
        where = self.positions / self.geometry.object_pixel
        (y0, x0), (y1, x1) = where.min(0), where.max(0)
        canvas = Canvas.around(Field(y0, y1, x0, x1), self.geometry.shape[0])
        settings = RefineSettings(passes=passes, probe_from_pass=1, device=device)
        mask = self.geometry.mask
        refined = refine(self.counts, where, self.fitted_probe(), canvas, mask=mask, settings=settings)
        return extract_patches(refined.object, canvas, where, patch), refined.probe


def read_recording(
    path: str | Path,
    *,
    zero_frequency: str,
    orientation: str = "none",
    probe: NDArray[np.complex64] | None = None,
    settings: ReadSettings | None = None,
) -> Recording:
    """Read a recorded scan; what kind of file it is follows from what is in it.

    zero_frequency: where it is in the FILE's frames, "corner" or "centre" (y // 2, x // 2). orientation: a name of
    ORIENTATIONS, how the file's frames must be turned to agree with the positions. probe: (y, x) or (mode, y, x),
    instead of the file's. HDF5 gives lengths in metres; .npz (arrays data, probe, scan) gives object pixels, or metres
    where settings say energy, distance and detector pixel.
    Raises OSError for a file that is missing, damaged or of no known kind, ValueError for one whose content does not
    make a scan, takes more than the bounds allow or leads out of its folder.
    """
    path, settings = Path(path), settings or ReadSettings()
    if not path.is_file():
        raise FileNotFoundError(f"found no file {path}, expected a recorded scan: check the path")
    given = {name: where for name in ("frames", "positions") if (where := getattr(settings, name)) is not None}
    try:
        fields = isolated(_READER, path, settings.bounds, given=given, mask=settings.mask)
        return _recording(fields, settings, (zero_frequency, orientation), probe)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except OSError as error:
        raise OSError(f"{path}: {error}") from error


def _recording(
    fields: dict[str, Any], settings: ReadSettings, turned: tuple[str, str], probe: NDArray[np.complex64] | None
) -> Recording:
    zero_frequency, orientation = turned
    numbers = optics(fields, energy=settings.energy, distance=settings.distance, detector_pixel=settings.detector_pixel)
    data = squared(fields["frames"]) if fields["amplitude"] else fields["frames"]
    say_saturated(data)
    data = _in_photons(data, settings.correction)
    mask = fields.get("mask")
    whole = data.shape[1:]
    data, mask, said = _region(data, mask, settings, zero_frequency)
    data, bad, notes = clean(data, mask)
    if zero_frequency != "centre":
        data, bad = turn(data, zero_frequency, "none"), turn(bad[None], zero_frequency, "none")[0]
    said += _zero_frequency(data, bad, settings, zero_frequency)
    counts, bad, more = _fitted(data, bad, settings)
    if orientation != "none":
        counts, bad = turn(counts, "centre", orientation), turn(bad[None], "centre", orientation)[0]
        whole = whole[::-1] if ORIENTATIONS[orientation][0] else whole
    said += more
    geometry = Geometry(
        shape=counts.shape[1:],
        wavelength=numbers.get("wavelength"),
        distance=numbers.get("distance"),
        detector_pixel=numbers["detector_pixel"] * settings.binning if numbers else None,
        mask=bad if bad.any() else None,
    )
    refuse_impossible_optics(geometry)
    where = positions_in_unit(fields, [n / settings.binning for n in whole], geometry)
    given = fields.get("probe") if probe is None else probe
    modes = None if given is None else fitted_probe(modes_of(given), whole, counts, bad, settings.binning)
    which = np.asarray(fields.get("numbers", np.arange(len(counts))))
    if settings.least_counts and where.shape == (len(counts), 2):
        lit = counts.sum((1, 2), where=~bad, dtype=np.float64) >= settings.least_counts
        said.append(f"{int((~lit).sum())} frames with less than {settings.least_counts:g} counts are left out")
        where, counts, which = where[lit], counts[lit], which[lit]
    kept, more = _judged(where, which, geometry, settings, fields.get("units", ()))
    where, which, counts = where[kept], which[kept], counts[kept] if not isinstance(kept, slice) else counts
    readable = np.isfinite(where).all() and len(where) > 0  # Recording refuses the others
    y, x = where.mean(0).tolist() if readable else (0.0, 0.0)
    return Recording(
        counts=counts,
        positions=where - (y, x),
        numbers=which,
        probe=modes,
        geometry=replace(geometry, origin=(y, x)),
        notes=(f"layout: {fields['layout']}", *fields["notes"], *notes, *said, *more),
    )


def _in_photons(frames: NDArray, correction: Correction | None) -> NDArray:
    """Frames (n, y, x) as a correction says; what marks a pixel is looked for before, since no mark is one after."""
    if correction is None or frames.ndim != 3 or not len(frames) or frames.dtype.kind not in "uif":
        return frames if correction is None else correction.photons(frames)
    never = never_counting(frames)
    photons = correction.photons(frames)
    photons[:, never] = np.nan
    return photons


def _zero_frequency(frames: NDArray, bad: NDArray[np.bool_], settings: ReadSettings, said: str) -> list[str]:
    """Notes on where the light is in frames whose zero frequency was brought to their middle, from `said`. Raises
    ValueError where it is not there beyond doubt."""
    looked_for = any(given is not None for given in (settings.roi, settings.centre, settings.window))  # or said
    if frames.dtype.kind not in "uif" or (said == "centre" and looked_for):
        return []
    share = light_in_corners(frames, bad)
    here, there = ("the middle", "the corners") if said == "corner" else ("the corners", "the middle")
    found = f"{100 * share:.0f} % of the light (squared) in {here} of the file's frames, expected it in {there}, where"
    wanted = "centre" if said == "corner" else "corner"
    if share > _ELSEWHERE:
        otherwise = " or, where the beam itself is off, --centre Y X" if said == "centre" else ""
        raise ValueError(
            f"found {found} zero_frequency={said!r} says that the direct beam is: say {wanted!r} "
            f"(--zero-frequency {wanted}){otherwise}"
        )
    return [f"{found} the zero frequency is said to be: is --zero-frequency {said} right?"] if share > 0.5 else []


_ELSEWHERE = 0.9
"""Share of the light, squared, which even light has to a quarter there, that shows where the direct beam is."""


def _region(
    frames: NDArray, mask: NDArray[np.bool_] | None, settings: ReadSettings, zero_frequency: str
) -> tuple[NDArray, NDArray[np.bool_] | None, list[str]]:
    """The part of frames (n, y, x) and of their mask that is used, before anything of them is judged, and notes."""
    if frames.ndim != 3 or (settings.roi is None and settings.centre is None):
        return frames, mask, []
    if zero_frequency != "centre":
        raise ValueError(
            f"found zero_frequency={zero_frequency!r} with a region or a centre, expected 'centre': the beam is in a "
            "corner of such frames, around which there is no region (--zero-frequency centre)"
        )
    y0, y1, x0, x1 = region(settings.roi, frames.shape[1:])
    part = np.s_[y0:y1, x0:x1]
    mask = mask[part] if mask is not None and mask.shape == frames.shape[1:] else mask
    return frames[:, *part], mask, [] if settings.roi is None else [f"pixels y {y0}..{y1}, x {x0}..{x1} are used"]


def _fitted(
    frames: NDArray, bad: NDArray[np.bool_], settings: ReadSettings
) -> tuple[NDArray, NDArray[np.bool_], list[str]]:
    """Frames (n, y, x) and mask as an even square with the zero frequency at its middle, and notes. frames, bad: the
    region of them that is used."""
    ny, nx = frames.shape[1:]
    window, notes = _window(frames, bad, settings), list[str]()
    if window is None:
        return np.ascontiguousarray(frames), bad, notes
    if settings.binning > 1:
        notes.append(f"{settings.binning} x {settings.binning} pixels are one, their counts added")
    side = window.size * window.binning
    square, outside = cut(frames, bad, window)
    if (ny, nx) != (side, side):
        at = tuple(o + low + side // 2 for o, low in zip(_origin(settings), window.corner((ny, nx)), strict=True))
        kept, whole = light(square, outside), light(frames, bad)
        if not kept:
            raise ValueError(
                f"found no light within {side} x {side} pixels around pixel {at} (y, x), expected the beam: say where "
                "it is (--centre), or where the zero frequency is (--zero-frequency)"
            )
        notes.append(
            f"frames of {ny} x {nx} pixels are cut to {side} x {side} around pixel {at} (y, x), which leaves out "
            f"{100 * (1 - kept / whole) if whole else 0:.1f} % of the light"
        )
    return np.ascontiguousarray(square), outside, notes


def _window(frames: NDArray, bad: NDArray[np.bool_], settings: ReadSettings) -> Window | None:
    """How frames (n, y, x), the region of them that is used, are cut; None: they stay as they are."""
    shape, b = frames.shape[1:], settings.binning
    ny, nx = (n // b for n in shape)
    square = settings.window is None and settings.centre is None and ny == nx and not ny % 2
    if not len(frames) or (square and b == 1):
        return None
    if square:
        return Window(size=ny, binning=b)
    y0, x0 = _origin(settings)
    centre = None if settings.centre is None else (settings.centre[0] - y0, settings.centre[1] - x0)
    middle = shape[0] // 2, shape[1] // 2
    given = settings.roi is not None or centre is not None
    if not given:
        found = brightest(frames, bad)
        side = min(*shape, *(() if settings.window is None else (settings.window * b,)))
        far = max(abs(a - c) for a, c in zip(middle, found, strict=True)) > side // 8
        centre = found if far else None  # what is nearer is the probe's tilt
    at = centre or middle
    room = min(min(c, n - c) for c, n in zip(at, shape, strict=True)) - (b - 1) / 2 * (centre is not None)
    most = 2 * int(room // b)
    if (settings.window or 8) > most and not (given and settings.window):
        raise ValueError(
            f"found frames of {shape[0]} x {shape[1]} pixels with the beam at {(at[0] + y0, at[1] + x0)} (y, x), "
            f"expected room for a window of {settings.window or '8 or more'} around it: choose one of at most {most} "
            "pixels (--window), or say where the beam is (--centre) and how large the window: what is outside of the "
            "frames is then masked"
        )
    return Window(size=settings.window or most, centre=centre, binning=b)


def _origin(settings: ReadSettings) -> tuple[int, int]:
    """Pixel (y, x) of the file's frames at which the region begins."""
    return (0, 0) if settings.roi is None else (settings.roi[0], settings.roi[2])


def _judged(
    where: NDArray[np.float64],
    numbers: NDArray[np.int64],
    geometry: Geometry,
    settings: ReadSettings,
    units: Sequence[str],
) -> tuple[slice | NDArray[np.int64], list[str]]:
    """Which frames are kept, and notes. numbers: of the frames in the file. units: in which positions were. Raises
    ValueError for those that cannot be."""
    frames = len(numbers)
    if where.shape != (frames, 2):
        return slice(None), []  # Recording refuses them
    finite = np.flatnonzero(np.isfinite(where).all(axis=1))
    if not len(finite) or (len(finite) < frames and not settings.drop_outliers):
        return slice(None), []
    far = finite[outliers(where[finite], geometry.object_pixel * geometry.shape[0])]
    kept = np.setdiff1d(finite, far)
    refuse_impossible(where[kept], geometry, units)
    notes = crowded(where[kept], geometry)
    if len(far) and not settings.drop_outliers:
        raise ValueError(
            f"found positions far from all others at frames {_some(numbers[far])}, expected one scan: repair them, or "
            "leave these frames out (drop_outliers=True, --drop-outliers)"
        )
    left_out = {"not finite": np.setdiff1d(np.arange(frames), finite), "far from all others": far}
    notes += [
        f"frames {_some(numbers[those])} are left out: their positions are {why}"
        for why, those in left_out.items()
        if len(those)
    ]
    return slice(None) if len(kept) == frames else kept, notes


def _some(numbers: NDArray[np.int64]) -> str:
    return ", ".join(map(str, numbers[:10].tolist())) + (", ..." if len(numbers) > 10 else "")
