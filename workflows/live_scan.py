"""The loop on a live source: frames, positions and motion at addresses, from one command line.

    steering run workflows/live_scan.py --source dectris://HOST --positions "zmq://HOST:PORT?y=INENC1&x=INENC2&unit=um"
        --motion zmq://HOST:PORT --energy 8800 --distance 2.4 --pixel 75e-6 --window 256 --probe FILE --field -1 1 -1 1

What addresses look like is in steering.sources.addresses. `--dry-run` listens, prints what each stream sends, and ends.
Without --probe one is begun from the first frames, which are measured on a raster in the middle of the field; with
--orientation auto they say how the detector is turned.
"""

import argparse
import json
import sys
import zipfile
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering import (
    ER,
    CampaignSettings,
    Experiment,
    FinalSettings,
    Geometry,
    LabelSettings,
    ProbeFirst,
    Progress,
    Raster,
    RunFolder,
    SpaceFilling,
    TrainerSettings,
    add_cluster,
    cluster,
    read_probe,
    run,
)
from steering.files.units import ENERGY_TO_WAVELENGTH
from steering.ptychography.device import add_device
from steering.sources import ORIENTATIONS, JoinSettings, LiveSource, LiveSourceSettings, Window
from steering.sources.address_text import says_optics, unit_of
from steering.sources.addresses import __doc__ as GRAMMAR, frames_at, streams_at
from steering.sources.beam import BeamSettings
from steering.sources.correction import add_correction, given_correction
from steering.sources.first_frames import announced, begun
from steering.sources.lengths import refuse_impossible_numbers, refuse_impossible_optics
from steering.sources.listening import listen
from steering.sources.streams import FRAMES, WHEN_SLOW, Began

POLICIES = {"space_filling": SpaceFilling, "raster": Raster}
OPTICS = ("energy", "distance", "pixel")


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Measure, learn and steer."""
    options = _options(arguments)
    if options.dry_run:
        dry_run(options)
        return
    before = take_announced(options, folder.path / "announced.json")
    probe = None if options.probe is None else given_probe(options.probe, options.window)
    # Labels keep the probe that was begun: so few frames could be explained by another probe and another object too.
    labels = LabelSettings() if probe is not None else LabelSettings(final=FinalSettings.with_probe())
    patch = options.window // 8 * 5 // 4 * 4
    if probe is None or options.orientation == "auto":
        probe, options.orientation, before = begun_with(options, probe, before, folder.path / "begun.npz")
    source = made(options, probe, before)
    experiment = Experiment(
        source=source,
        policy=POLICIES[options.policy](source.candidates),
        network=ProbeFirst(window=options.window, patch=patch, width=24, modes=len(source.probe)),
        strategy=ER(),
        trainer=TrainerSettings(batch=8, candidates=4, representatives=8, learning_rate=1.5e-3),
        campaign=CampaignSettings(steps=options.steps, label_every=150, rounds_after_end=options.rounds),
        labels=labels,
        device=options.device,
    )
    with cluster(options.cluster, ranks=options.ranks, folder=folder.path, insecure=options.insecure) as client:
        figures = run(experiment, client, folder, show=Progress())
    if options.truth is not None:
        warn_of_unknown(options.truth, source.settings.truths, figures["scans"])


def dry_run(options: argparse.Namespace) -> None:
    """Print what each stream sends, and how the frames are turned. Raises RuntimeError where one is silent."""
    found = listen(streams_at(options.source, options.positions, monitor=options.monitor).named(), options.listen)
    for name, seen in found.items():
        print(f"{name}: {seen.line()}", flush=True)
    if found[FRAMES].armed and says_optics(options.source):
        print("this dry run has taken the detector's start message: arm it anew before the run", flush=True)
    silent = [name for name, seen in found.items() if not seen.count]
    if silent:
        asks = "what is armed waits for its trigger, or to be told where to measure"
        asks = asks if any(found[name].armed for name in silent) else "is it armed?"
        raise RuntimeError(f"found {' and '.join(silent)} silent for {options.listen:g} s, expected it to send: {asks}")
    if options.orientation != "auto":
        return
    if unit_of(options.positions) != "px" and says_optics(options.source):
        take_optics(options, found[FRAMES].header)
    # As they come: a dry run moves nothing.
    options.motion, options.field = None, options.field or [-1.0, 1.0, -1.0, 1.0]
    options.end_after = options.listen + LiveSourceSettings.give_up_s
    try:
        begun_with(options, None if options.probe is None else given_probe(options.probe, options.window), None)
    except (ValueError, RuntimeError) as error:
        print(f"orientation: not known: {error}", flush=True)


def take_announced(options: argparse.Namespace, kept: Path) -> Began | None:
    """Take energy, distance and pixel that are not given from what the detector says when it is armed, where its stream
    says such things and positions are in metres. Returns what it said; None where it was not asked. kept: a file for
    the numbers, for a run that is recovered: they are said once."""
    missing = [name for name in OPTICS if getattr(options, name) is None]
    if not missing or unit_of(options.positions) == "px" or not says_optics(options.source):
        return None
    if kept.is_file():
        said = Began(None, None, json.loads(kept.read_text()))
    else:
        print(f"waiting for the detector to be armed, which says {' and '.join(missing)}", flush=True)
        said = announced(frames_at(options.source), options.end_after or None)
    kept.write_text(json.dumps(take_optics(options, said.header)))
    # What is asked for later begins later; another scan goes on from here, and what nobody receives of it is lost.
    return None if said.name is None else said._replace(first=None if options.motion else said.first)


def take_optics(options: argparse.Namespace, header: Mapping[str, Any]) -> dict[str, float]:
    """Take energy, distance and pixel that are not given from what a detector has said, and say so. Returns the numbers
    that it has said."""
    said = {name: value for name, value in header.items() if isinstance(value, float)}
    said |= {"energy": ENERGY_TO_WAVELENGTH / said["wavelength"]} if "wavelength" in said else {}
    said |= {"pixel": said["pixel_x"]} if "pixel_x" in said else {}
    for name in OPTICS:
        if getattr(options, name) is None:
            setattr(options, name, said.get(name))
            print(f"the detector says: {name} {said.get(name, 'nothing')}", flush=True)
    if "centre" in header and options.centre is None and options.roi is None:
        y, x = header["centre"]
        print(f"the detector says: centre {y:g} {x:g}, which is not used: give --centre {y:g} {x:g}", flush=True)
    return said


def geometry(options: argparse.Namespace) -> Geometry:
    """The far-field geometry of the window; in object pixels where nothing is given."""
    given, unit = tuple(getattr(options, name) for name in OPTICS), unit_of(options.positions)
    if all(value is None for value in given):
        if unit != "px":
            raise ValueError(
                f"found positions in {unit} and no --energy, --distance and --pixel, expected these, by which object "
                "pixels are known, or positions in object pixels (unit=px)"
            )
        return Geometry(shape=(options.window, options.window))
    if any(value is None for value in given):
        raise ValueError(
            f"found --energy {given[0]}, --distance {given[1]}, --pixel {given[2]}; expected all three, or none of "
            "them (positions are then in object pixels, unit=px)"
        )
    if unit == "px":
        raise ValueError(
            "found positions in object pixels (unit=px) and --energy, --distance and --pixel, by which everything else "
            "is in metres; expected their unit, or none of the three"
        )
    refuse_impossible_numbers(energy=options.energy, distance=options.distance, detector_pixel=options.pixel)
    found = Geometry(
        shape=(options.window, options.window),
        wavelength=ENERGY_TO_WAVELENGTH / options.energy,
        distance=options.distance,
        detector_pixel=options.pixel * options.binning,
    )
    refuse_impossible_optics(found)
    return found


def candidates(options: argparse.Namespace) -> NDArray[np.float64]:
    """(n, 2) of (y, x): a grid over the field, in metres, or in object pixels where the geometry is not given."""
    y0, y1, x0, x1 = options.field
    # The last one lies on the edge or before it: a beamline refuses what is beyond.
    axes = [np.arange(low, high + 1e-6 * options.step, options.step) for low, high in ((y0, y1), (x0, x1))]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    if len(grid) < 2:
        raise ValueError(f"found a field {options.field} with one position at --step {options.step}: expected more")
    return grid * (1.0 if options.energy is None else 1e-6)


def made(options: argparse.Namespace, probe: NDArray[np.complex64], before: Began | None = None) -> LiveSource:
    """A source for the streams of the options; it is opened once. before: how the scan began that goes on."""
    return LiveSource(
        streams_at(options.source, options.positions, options.motion, options.monitor),
        window=Window(
            size=options.window,
            roi=None if options.roi is None else tuple(options.roi),
            centre=None if options.centre is None else tuple(options.centre),
            binning=options.binning,
            orientation=options.orientation,
            dtype=options.dtype,
            correction=given_correction(options),
        ),
        geometry=geometry(options),
        probe=probe,
        candidates=candidates(options),
        frame_rate=options.frame_rate,
        settings=LiveSourceSettings(
            join=JoinSettings(wait_s=options.wait, oldest_s=options.oldest, when_slow=options.when_slow),
            beam=BeamSettings(least_counts=options.least_counts, least_monitor=options.least_monitor),
            scans=options.scans or None,
            give_up_s=max(LiveSourceSettings.give_up_s, options.wait + 5.0),
            end_s=options.end_after or None,
            going_on=before,
            truths={} if options.truth is None else known_objects(options.truth),
        ),
    )


def begun_with(
    options: argparse.Namespace, probe: NDArray[np.complex64] | None, before: Began | None, kept: Path | None = None
) -> tuple[NDArray[np.complex64], str, Began]:
    """The probe (mode, window, window), begun from the first frames where none is given, the frames' orientation, found
    by them where that is asked for, and how their scan began. before: as far as that is known by now. kept: a file for
    all, for a run that is recovered."""
    if kept is not None and kept.is_file():
        with np.load(kept, allow_pickle=False) as found:
            header: dict[str, object] = {"bad": found["bad"]} if "bad" in found else {}
            header |= {"saturation": float(found["saturation"])} if "saturation" in found else {}
            return found["probe"], str(found["orientation"]), Began(str(found["scan"]) or None, None, header)
    first = copy(options)
    first.orientation = "none" if options.orientation == "auto" else options.orientation
    unknown = np.ones((1, options.window, options.window), np.complex64)
    source = made(first, unknown if probe is None else probe, before)
    recording, turn = begun(
        source,
        probe=probe,
        orientation="auto" if options.orientation == "auto" else "none",
        frames=options.probe_frames,
        modes=options.modes,
        focus=options.focus,
        phase=options.phase,
        device=options.device,
    )
    for note in recording.notes:
        print(f"{len(recording.counts)} frames: {note}", flush=True)
    turn = turn if options.orientation == "auto" else options.orientation
    scan = source.goes_on
    if kept is not None:
        said = {name: scan.header[name] for name in ("bad", "saturation") if name in scan.header}
        np.savez(kept, probe=recording.probe, orientation=turn, scan=scan.name or "", **said)
    return recording.probe, turn, scan


def given_probe(path: Path, window: int) -> NDArray[np.complex64]:
    """(mode, window, window), in the counts of an open beam."""
    probe = read_probe(path)
    if probe.ndim != 3 or probe.shape[1:] != (window, window):
        raise ValueError(
            f"{path}: found a probe {probe.shape}, expected (mode, {window}, {window}): give --window, or crop it"
        )
    return probe


def warn_of_unknown(path: Path, truths: Mapping[str, object], scans: Sequence[str]) -> None:
    """Say of which scans no error was measured, as the file has nothing of their names."""
    if unknown := [scan for scan in scans if scan not in truths]:
        print(
            f"{path}: found arrays {', '.join(truths) or 'none'} and measured {', '.join(unknown)}, expected an array "
            "of each scan's name: there are no errors of these. A scan has the name that the detector's start message "
            "says; who listens before the run, as a dry run does, takes that message away",
            file=sys.stderr,
            flush=True,
        )


def known_objects(path: Path) -> dict[str, NDArray[np.complex64]]:
    """(Y, X) of each array of an npz file, by its name: that of a scan."""
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("one array without a name, as in .npy")
        with arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: found no npz file ({error}), expected one with an array for each scan") from error
    for name, thing in found.items():
        if thing.ndim != 2 or not np.iscomplexobj(thing) or not np.isfinite(thing).all():
            raise ValueError(f"{path}: found {name} {thing.shape} {thing.dtype}, expected finite complex (Y, X)")
    return found


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="steering run workflows/live_scan.py",
        description=__doc__.split("\n")[0],
        epilog=GRAMMAR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    streams = parser.add_argument_group("streams")
    streams.add_argument("--source", required=True, help="address of the frames")
    streams.add_argument("--positions", required=True, help="address of the positions")
    streams.add_argument("--motion", help="address of the motion; none: the beamline scans by itself")
    streams.add_argument("--monitor", help="address of the incident intensity (none)")
    streams.add_argument(
        "--least-counts", type=float, default=0.0, help="of a frame: with fewer the beam is away; it is measured again"
    )
    streams.add_argument("--least-monitor", type=float, help="the same, of the monitor")
    streams.add_argument("--dry-run", action="store_true", help="listen, print what each stream sends, and end")
    streams.add_argument("--listen", type=float, default=5.0, help="seconds of a dry run (5)")
    streams.add_argument("--wait", type=float, default=5.0, help="seconds that a frame waits for its position (5)")
    streams.add_argument("--when-slow", choices=WHEN_SLOW, default="block", help="where prediction is slower (block)")
    streams.add_argument(
        "--oldest",
        type=float,
        default=float("inf"),
        help="seconds after which a frame gives way, unless it blocks (no)",
    )
    streams.add_argument("--scans", type=int, default=1, help="scans to measure; 0: until the streams end (1)")
    streams.add_argument("--end-after", type=float, default=300.0, help="seconds without a frame; 0: never (300)")
    _add_optics(parser.add_argument_group("optics"))
    add_correction(parser.add_argument_group("detector"))
    scan = parser.add_argument_group("scan")
    scan.add_argument("--field", type=float, nargs=4, metavar=("Y0", "Y1", "X0", "X1"), help="um, or object pixels")
    scan.add_argument("--step", type=float, default=0.05, help="between candidate positions, as the field (0.05)")
    scan.add_argument("--policy", choices=POLICIES, default="space_filling")
    scan.add_argument("--frame-rate", type=float, default=50.0, help="frames per second (50)")
    scan.add_argument("--ranks", type=int, default=2, help="training processes (2)")
    scan.add_argument("--steps", type=int, default=30, help="optimiser steps of a training round (30)")
    scan.add_argument("--rounds", type=int, default=5, help="of training after the last frame (5)")
    add_device(scan)
    add_cluster(parser)
    options = parser.parse_args(arguments)
    if options.field is None and not options.dry_run:
        parser.error("expected --field, or --dry-run")
    if options.least_monitor is not None and options.monitor is None:
        parser.error("found --least-monitor without --monitor, expected the address of the incident intensity as well")
    return options


def _add_optics(optics: argparse._ArgumentGroup) -> None:
    said = "as the detector says, by stream2"
    optics.add_argument("--energy", type=float, help=f"eV ({said})")
    optics.add_argument("--distance", type=float, help=f"sample to detector, m ({said})")
    optics.add_argument("--pixel", type=float, help=f"of the detector, m ({said})")
    optics.add_argument(
        "--probe", type=Path, help=".npy, .npz, .mat or HDF5, complex, in counts (begun from the first frames)"
    )
    optics.add_argument("--probe-frames", type=int, default=100, help="from which a probe is begun (100)")
    optics.add_argument("--modes", type=int, default=1, help="of a probe that is begun from frames (1)")
    optics.add_argument(
        "--truth", type=Path, help=".npz: a test sample's known object, complex (Y, X), by the scan's name, for errors"
    )
    optics.add_argument("--window", type=int, default=128, help="pixels of the network's window, binned (128)")
    optics.add_argument("--binning", type=int, default=1, help="detector pixels added to one, along a side (1)")
    optics.add_argument("--roi", type=int, nargs=4, metavar=("Y0", "Y1", "X0", "X1"), help="detector pixels")
    optics.add_argument("--centre", type=float, nargs=2, metavar=("Y", "X"), help="of the beam, detector pixels")
    optics.add_argument(
        "--orientation",
        choices=("auto", *ORIENTATIONS),
        default="none",
        help="of the detector (none); auto: found by the first frames",
    )
    optics.add_argument("--focus", choices=("before", "behind"), help="where the sample is, for auto without --probe")
    optics.add_argument("--phase", choices=("negative", "positive"), help="where the sample absorbs more, the same")
    optics.add_argument("--dtype", choices=("uint16", "uint32"), default="uint32", help="of the counts (uint32)")
