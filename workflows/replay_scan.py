"""A recorded scan, replayed as if it were being measured: from no trained model to a live image.

    steering run workflows/replay_scan.py FILE [--reference FILE] [--zero-frequency corner] ...

FILE is HDF5 in a known layout (`steering inspect FILE` says which), or .npz / .npz.bz2 with the arrays data, probe,
scan. Labels are made by
refinement, the probe is improved with them. One corner of the field and a margin around it are excluded from labels and
training: what the network predicts there it has learnt elsewhere.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steering import (
    ORIENTATIONS,
    STRATEGIES,
    CampaignSettings,
    Canvas,
    Experiment,
    Field,
    FinalSettings,
    HoldOut,
    LabelSettings,
    ProbeFirst,
    Progress,
    Random,
    Raster,
    ReadSettings,
    RefineSettings,
    Replay,
    RunFolder,
    SpaceFilling,
    TrainerSettings,
    add_cluster,
    cluster,
    read_probe,
    read_recording,
    run,
)
from steering.files import Bounds, isolated_array
from steering.ptychography.device import add_device
from steering.sources import Recording, begun_and_oriented, oriented, with_probe
from steering.sources.correction import add_correction, given_correction

LEAST_FRAMES = 16
POLICIES = {"space_filling": SpaceFilling, "raster": Raster, "random": Random}


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Replay a recording."""
    options = _options(arguments)
    reference = None if options.reference is None else read_reference(options.reference)
    recording = read(options)
    pixel = recording.geometry.object_pixel
    region, margin = held_out(recording.positions / pixel, options.margin)
    source = Replay(
        recording,
        tolerance=options.tolerance * pixel,
        frame_rate=options.frame_rate,
        scan=Path(options.file).name.lstrip(".").split(".")[0],
        reference=reference,
    )
    window = recording.geometry.shape[0]
    experiment = Experiment(
        source=source,
        policy=POLICIES[options.policy](source.candidates),
        network=ProbeFirst(window=window, patch=window // 8 * 4, width=24, modes=len(source.probe)),
        strategy=STRATEGIES[options.strategy](),
        trainer=TrainerSettings(batch=8, candidates=4, representatives=8, learning_rate=1e-3),
        campaign=CampaignSettings(rounds_after_end=options.rounds, labels_after_end=3),
        labels=LabelSettings(
            window=len(recording.counts),
            first=RefineSettings(passes=10, probe_from_pass=1),
            again=RefineSettings(passes=5, probe_from_pass=0),
            final=FinalSettings.with_probe(positions_from_pass=5 if options.correct_positions else None),
        ),
        device=options.device,
        hold_out=HoldOut(region=region, margin=margin),
    )
    with cluster(options.cluster, ranks=options.ranks, folder=folder.path, insecure=options.insecure) as client:
        run(experiment, client, folder, show=Progress())


def read(options: argparse.Namespace) -> Recording:
    """The recording, as the options say; what was recognised and changed is printed."""
    bounds = Bounds(folders=tuple(options.allow_folder))
    if options.most_bytes is not None:
        bounds = replace(bounds, bytes=options.most_bytes)
    settings = ReadSettings(
        frames=options.frames,
        positions=options.positions,
        energy=options.energy,
        distance=options.distance,
        detector_pixel=options.pixel,
        mask=options.mask,
        roi=None if options.roi is None else tuple(options.roi),
        centre=None if options.centre is None else tuple(options.centre),
        window=options.window,
        binning=options.binning,
        drop_outliers=options.drop_outliers,
        least_counts=options.least_counts,
        correction=given_correction(options, bounds),
        bounds=bounds,
    )
    recording = read_recording(
        options.file,
        zero_frequency=options.zero_frequency,
        orientation="none" if options.orientation == "auto" else options.orientation,
        probe=None if options.probe is None else _given_probe(options, bounds),
        settings=settings,
    )
    if options.orientation == "auto" and recording.probe is None:
        signs = {"focus": options.focus, "phase": options.phase}
        recording = begun_and_oriented(recording, modes=options.modes, **signs, device=options.device)
    elif options.orientation == "auto":
        recording = oriented(recording, device=options.device)
    if recording.probe is None:
        recording = with_probe(recording, modes=options.modes, device=options.device)
    for note in recording.notes:
        print(note)
    return recording


def _given_probe(options: argparse.Namespace, bounds: Bounds) -> NDArray[np.complex64]:
    """FILE may be left out of FILE:/path for the scan itself."""
    return read_probe(f"{options.file if options.probe.startswith(':') else ''}{options.probe}", bounds=bounds)


def held_out(positions: NDArray[np.float64], margin: float | None) -> tuple[Field, float]:
    """The corner that is kept from training and the margin around it, object pixels. positions: (n, 2), object pixels.

    margin: None for 64, or a quarter of the scan's extent where that is less. Raises ValueError where next to nothing
    is left to learn from.
    """
    region = corner(positions)
    extent = float(np.ptp(positions, axis=0).min())
    margin = min(64.0, extent / 4) if margin is None else margin
    left = int((~region.contains(positions, margin)).sum())
    if left < LEAST_FRAMES:
        raise ValueError(
            f"found {len(positions)} frames, {left} of them outside the corner that is held out and its margin of "
            f"{margin:.3g} object pixels, expected {LEAST_FRAMES} or more to learn from: choose a smaller --margin, or "
            "a larger scan"
        )
    return region, margin


def corner(positions: NDArray[np.float64], quantile: float = 0.7) -> Field:
    """The corner of a scan beyond a quantile of its positions (n, 2), object pixels, in both axes."""
    (y0, x0), (y1, x1) = np.quantile(positions, quantile, axis=0), positions.max(axis=0)
    return Field(y0, y1, x0, x1)


def read_reference(path: str, border: int = 70) -> tuple[NDArray[np.complex64], Canvas]:
    """A trusted reconstruction: `object` (Y, X), whose middle is position 0, of an .npz file, or the array of an .npy
    file or at FILE:/path of another; its interior, and where it lies.

    border: pixels left away on every side, where too few frames overlap to be trusted. Raises ValueError for another
    array, and OSError for a file that is missing or damaged.
    """
    whole = isolated_array(path, ("object",))
    if whole.ndim != 2 or min(whole.shape) <= 2 * border or whole.dtype.kind not in "cfiu":
        raise ValueError(
            f"{path}: found {whole.dtype} {whole.shape}, expected a reconstructed object, complex (Y, X) of more "
            f"than {2 * border} pixels each way, {border} of which on every side are left away"
        )
    middle = (whole.shape[0] / 2, whole.shape[1] / 2)
    interior = whole[border:-border, border:-border].astype(np.complex64)
    return interior, Canvas(interior.shape, (border - middle[0], border - middle[1]))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="steering run workflows/replay_scan.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", help="the recording: HDF5, .npz or .npz.bz2 (see steering inspect)")
    parser.add_argument(
        "--reference",
        metavar="FILE",
        help="a trusted object (y, x) to compare with: .npz with `object`, .npy, .mat or HDF5",
    )
    parser.add_argument(
        "--zero-frequency", choices=("corner", "centre"), default="corner", help="of the frames (corner)"
    )
    parser.add_argument(
        "--orientation",
        choices=("auto", *ORIENTATIONS),
        default="auto",
        help="of the detector (auto: found by the frames)",
    )
    parser.add_argument(
        "--tolerance", type=float, default=4.0, help="object pixels from the position asked for to the recorded one (4)"
    )
    parser.add_argument("--strategy", choices=STRATEGIES, default="er")
    parser.add_argument("--policy", choices=POLICIES, default="space_filling")
    parser.add_argument("--ranks", type=int, default=2, help="training processes (2)")
    add_device(parser)
    add_cluster(parser)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of training after the last frame (10)")
    parser.add_argument("--margin", type=float, help="object pixels around the held-out corner (64 or less)")
    parser.add_argument("--frame-rate", type=float, default=50.0, help="frames per second (50)")
    _add_reading(parser.add_argument_group("what the file does not say, or says wrongly"))
    return parser.parse_args(arguments)


def _add_reading(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--probe",
        metavar="FILE[:/path]",
        help=".npy, .npz, .mat or HDF5 with a probe (y, x), (mode, y, x) or (y, x, mode), and where in it",
    )
    group.add_argument(
        "--correct-positions", action="store_true", help="by the frames, when the object is refined at the end"
    )
    group.add_argument("--modes", type=int, default=1, help="of a probe that is begun from the frames (1)")
    group.add_argument(
        "--focus", choices=("before", "behind"), help="where the sample is: tells a scan without a probe from its twin"
    )
    group.add_argument(
        "--phase",
        choices=("negative", "positive"),
        help="where the sample absorbs more: tells it from its twin as well",
    )
    group.add_argument("--frames", metavar="FILE:/path", help="where the frames are")
    group.add_argument(
        "--positions",
        metavar="FILE:/path[unit]",
        help="where the positions are, x in the first column (but at the layout's own place), or FILE:/x,/y[unit]",
    )
    group.add_argument("--energy", type=float, help="of the photons, eV")
    group.add_argument("--distance", type=float, help="sample to detector, metres")
    group.add_argument("--pixel", type=float, help="pitch of a detector pixel, metres")
    group.add_argument("--mask", choices=("file", "inverted", "none"), default="file", help="the file's mask (file)")
    group.add_argument(
        "--roi", type=int, nargs=4, metavar=("Y0", "Y1", "X0", "X1"), help="part that is used, detector pixels"
    )
    group.add_argument(
        "--centre",
        type=float,
        nargs=2,
        metavar=("Y", "X"),
        help="of the beam, detector pixels (middle of --roi, or found)",
    )
    group.add_argument("--window", type=int, help="pixels of the square that is cut out around the beam, binned")
    group.add_argument("--binning", type=int, default=1, help="pixels along each side that become one (1)")
    group.add_argument("--least-counts", type=float, default=0.0, help="of a frame: those with fewer are left out (0)")
    group.add_argument(
        "--drop-outliers", action="store_true", help="leave out frames with positions far from all others or not finite"
    )
    add_correction(group)
    group.add_argument("--allow-folder", metavar="DIR", action="append", default=[], help="where links may lead")
    group.add_argument("--most-bytes", type=int, help="most bytes of all arrays (half of the machine's memory)")
