"""The demo: three samples of different materials in turn, a network trained from scratch while the beam is on.

    steering run workflows/simulated_drift.py [--strategy er] [--ranks 2] [--policy space_filling] ...

Frames come from the simulated beamline at 50 per second at the positions of the policy. The network
reconstructs them live; trust falls when the sample changes; the ranks learn the new sample and keep the old ones.
"""

import argparse

from skimage import data, filters

from steering import (
    STRATEGIES,
    Adaptive,
    CampaignSettings,
    Experiment,
    GradientResidual,
    ProbeFirst,
    Progress,
    Random,
    Raster,
    RunFolder,
    SimulatedBeamline,
    SpaceFilling,
    Stage,
    TrainerSettings,
    Travel,
    add_cluster,
    beam_diameter,
    cluster,
    run,
    sample,
    zone_plate,
)
from steering.ptychography.device import add_device

FIXED = {"space_filling": SpaceFilling, "raster": Raster, "random": Random}
GUIDED = {"gradient_residual": GradientResidual, "adaptive": Adaptive}


def stages(frames: int, size: int) -> list[Stage]:
    """Three samples that differ in structure and in material: the sign of what their matter does to the phase turns."""
    pores = filters.gaussian(data.binary_blobs(256, blob_size_fraction=0.08, rng=1).astype(float), 1)
    return [
        Stage("gravel", sample(data.gravel()[:256, :256], phase=-1.0, absorption=0.2, size=size), frames),
        Stage("pores", sample(pores, phase=1.8, absorption=0.1, size=size), frames),
        Stage("brick", sample(data.brick(), phase=-2.8, absorption=0.05, size=size), frames),
    ]


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Run the demo."""
    options = _options(arguments)
    probe = zone_plate(64, 50.0, aperture=0.52, counts=1e5)
    source = SimulatedBeamline(
        stages(options.frames, options.size),
        probe=probe,
        step=options.step,
        frame_rate=options.frame_rate,
        chunk_frames=10,
        seed=options.seed,
    )
    if options.velocity:
        source.travel = Travel(velocity=1e-6 * options.velocity, settling=0.005)
    if options.policy in FIXED:
        policy = FIXED[options.policy](source.candidates)
        ahead = 50
    else:
        settings = {"beam": beam_diameter(probe) * source.geometry.object_pixel, "frame_s": 1 / source.frame_rate}
        policy = GUIDED[options.policy](source.candidates, travel=source.travel, **settings)
        ahead = 10  # its decisions should follow from frames that are predicted
    experiment = Experiment(
        source=source,
        policy=policy,
        network=ProbeFirst(window=64, patch=40, width=24),
        strategy=STRATEGIES[options.strategy](),
        trainer=TrainerSettings(batch=8, candidates=4, representatives=8, learning_rate=1.5e-3, seed=options.seed),
        campaign=CampaignSettings(steps=options.steps, label_every=150, lookahead=ahead),
        device=options.device,
        checkpoint_s=options.checkpoint or None,
    )
    with cluster(options.cluster, ranks=options.ranks, folder=folder.path, insecure=options.insecure) as client:
        run(experiment, client, folder, show=Progress())


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="steering run workflows/simulated_drift.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--strategy", choices=STRATEGIES, default="er", help="how earlier samples are rehearsed (er)")
    parser.add_argument("--policy", choices=[*FIXED, *GUIDED], default="space_filling", help="where to measure next")
    parser.add_argument("--ranks", type=int, default=2, help="training processes (2)")
    add_device(parser)
    add_cluster(parser)
    parser.add_argument("--frames", type=int, default=1100, help="frames of each sample (1100)")
    parser.add_argument("--frame-rate", type=float, default=50.0, help="frames per second (50)")
    parser.add_argument("--velocity", type=float, default=0.0, help="of the stage, um/s; 0: moves take no time")
    parser.add_argument("--size", type=int, default=256, help="object pixels of a sample's side (256)")
    parser.add_argument("--step", type=float, default=5.5, help="object pixels between candidate positions (5.5)")
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps of a training round (30)")
    parser.add_argument("--checkpoint", type=float, default=60.0, help="seconds between two checkpoints; 0: none (60)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)
