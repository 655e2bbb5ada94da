"""A recorded scan, replayed as if it were being measured: from no trained model to a live image.

    steering run workflows/replay_scan.py FILE [--reference FILE] [--zero-frequency corner] ...

FILE is HDF5 in the CXI or NXcxi_ptycho layout, or .npz / .npz.bz2 with the arrays data, probe, scan. Labels are made by
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
    RefineSettings,
    Replay,
    RunFolder,
    SpaceFilling,
    TrainerSettings,
    add_cluster,
    cluster,
    read_recording,
    run,
)

POLICIES = {"space_filling": SpaceFilling, "raster": Raster, "random": Random}


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Replay a recording."""
    options = _options(arguments)
    recording = read_recording(options.file, zero_frequency=options.zero_frequency, orientation=options.orientation)
    pixel = recording.geometry.object_pixel
    source = Replay(
        recording,
        tolerance=options.tolerance * pixel,
        frame_rate=options.frame_rate,
        scan=Path(options.file).name.split(".")[0],
        reference=None if options.reference is None else read_reference(options.reference),
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
            final=FinalSettings(refine=replace(FinalSettings().refine, alpha=0.3, probe_from_pass=1)),
        ),
        hold_out=HoldOut(region=corner(recording.positions / pixel), margin=options.margin),
    )
    with cluster(options.cluster, ranks=options.ranks, folder=folder.path, insecure=options.insecure) as client:
        run(experiment, client, folder, show=Progress())


def corner(positions: NDArray[np.float64], quantile: float = 0.7) -> Field:
    """The corner of a scan beyond a quantile of its positions (n, 2), object pixels, in both axes."""
    (y0, x0), (y1, x1) = np.quantile(positions, quantile, axis=0), positions.max(axis=0)
    return Field(y0, y1, x0, x1)


def read_reference(path: str, border: int = 70) -> tuple[NDArray[np.complex64], Canvas]:
    """A trusted reconstruction: .npz with `object` (Y, X) whose middle is position 0; its interior, and where it lies.

    border: pixels left away on every side, where too few frames overlap to be trusted.
    """
    with np.load(path, allow_pickle=False) as file:
        if "object" not in file:
            raise ValueError(f"{path}: found the arrays {sorted(file)}, expected one named object: the reconstruction")
        whole = file["object"]
    middle = (whole.shape[0] / 2, whole.shape[1] / 2)
    interior = whole[border:-border, border:-border].astype(np.complex64)
    return interior, Canvas(interior.shape, (border - middle[0], border - middle[1]))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="steering run workflows/replay_scan.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", help="the recording: HDF5 (CXI, NXcxi_ptycho), .npz or .npz.bz2")
    parser.add_argument("--reference", metavar="FILE", help=".npz with a trusted `object` to compare with")
    parser.add_argument(
        "--zero-frequency", choices=("corner", "centre"), default="corner", help="of the frames (corner)"
    )
    parser.add_argument("--orientation", choices=ORIENTATIONS, default="none", help="of the detector (none)")
    parser.add_argument(
        "--tolerance", type=float, default=4.0, help="object pixels from the position asked for to the recorded one (4)"
    )
    parser.add_argument("--strategy", choices=STRATEGIES, default="er")
    parser.add_argument("--policy", choices=POLICIES, default="space_filling")
    parser.add_argument("--ranks", type=int, default=2, help="training processes (2)")
    add_cluster(parser)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of training after the last frame (10)")
    parser.add_argument("--margin", type=float, default=64.0, help="object pixels around the held-out corner (64)")
    parser.add_argument("--frame-rate", type=float, default=50.0, help="frames per second (50)")
    return parser.parse_args(arguments)
