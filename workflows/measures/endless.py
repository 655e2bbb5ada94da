"""The campaign that faults are done to: endless scans of small frames.

steering run workflows/measures/endless.py [--cluster WHERE] [--ranks 3] [--rate 20] [--checkpoint 10]
"""

import argparse

from skimage import data

from steering import (
    ER,
    CampaignSettings,
    Experiment,
    PredictorSettings,
    ProbeFirst,
    RunFolder,
    SimulatedBeamline,
    SpaceFilling,
    Stage,
    TrainerSettings,
    add_cluster,
    cluster,
    run,
    sample,
    zone_plate,
)
from steering.ptychography.device import add_device


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Measure until somebody says stop, or until so many frames are there."""
    parser = argparse.ArgumentParser(prog="endless.py", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=20.0, help="frames per second (20)")
    parser.add_argument("--scans", type=int, default=400, help="(400)")
    parser.add_argument("--checkpoint", type=float, default=10.0, help="seconds between two (10)")
    add_device(parser)
    add_cluster(parser)
    options = parser.parse_args(arguments)
    parts = experiment(options)
    where = {"ranks": options.ranks, "folder": folder.path, "insecure": options.insecure}
    with cluster(options.cluster, **where) as client:
        run(parts, client, folder)


def experiment(options: argparse.Namespace) -> Experiment:
    """Scans of about a thousand candidates each; the policy ends each after them."""
    probe = zone_plate(64, 50.0, aperture=0.52, counts=1e5)
    pictures = [data.brick(), data.coins(), data.gravel(), data.cell()]
    objects = [
        sample(pictures[k % 4], phase=1.5 + 0.1 * (k % 7), absorption=0.1, size=128)
        for k in range(min(28, options.scans))
    ]
    stages = [Stage(f"scan-{k}", objects[k % len(objects)], frames=5000) for k in range(options.scans)]
    source = SimulatedBeamline(stages, probe=probe, step=2.0, frame_rate=options.rate, seed=options.seed)
    return Experiment(
        source=source,
        policy=SpaceFilling(source.candidates),
        network=ProbeFirst(window=64, patch=40, width=8),
        strategy=ER(),
        # What may be kept is there after the first minutes: memory that grows then is a leak.
        trainer=TrainerSettings(batch=8, candidates=4, representatives=8, samples_bytes=2**27),
        prediction=PredictorSettings(memory_bytes=2**26),
        campaign=CampaignSettings(steps=10, gain=0.0, rounds_after_end=0, labels_after_end=0),
        ranks=options.ranks,
        checkpoint_s=options.checkpoint,
        device=options.device,
    )
