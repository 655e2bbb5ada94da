"""The workflow of tests/test_recover.py: two small samples, and a checkpoint every second."""

import argparse

from skimage import data as pictures

from steering import (
    ER,
    CampaignSettings,
    Experiment,
    ProbeFirst,
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


class Forgets(SimulatedBeamline):
    """A beamline that knows where it was, and keeps no frame that it has handed out."""

    def again(self, ids):
        list(super().again(ids))
        return iter(())


def main(folder, arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--checkpoint", type=float, default=1.0)
    parser.add_argument("--forgets", action="store_true")
    parser.add_argument("--spool", action="store_true")
    parser.add_argument("--rate", type=float, default=25.0)
    parser.add_argument("--unsteered", type=float, default=10.0)
    add_cluster(parser)
    options = parser.parse_args(arguments)
    probe = zone_plate(64, 50.0, aperture=0.52, counts=1e5)
    stages = [
        Stage(name, sample(getattr(pictures, name)(), phase=-2.0, absorption=0.1, size=128), 150)
        for name in ("brick", "coins")
    ]
    source = (Forgets if options.forgets else SimulatedBeamline)(stages, probe=probe, step=3.5, frame_rate=options.rate)
    experiment = Experiment(
        source=source,
        policy=SpaceFilling(source.candidates),
        network=ProbeFirst(window=64, patch=40, width=8),
        strategy=ER(),
        trainer=TrainerSettings(batch=4, candidates=2, representatives=4, deadline=10.0),
        campaign=CampaignSettings(steps=10),
        checkpoint_s=options.checkpoint,
        spool=options.spool,
        unsteered_s=options.unsteered,
    )
    with cluster(options.cluster, ranks=options.ranks, folder=folder.path, insecure=options.insecure) as client:
        run(experiment, client, folder)
