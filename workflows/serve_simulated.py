"""A beamline in a box: the simulated beamline of the demo behind a real protocol, for workflows/live_scan.py.

    steering run workflows/serve_simulated.py --protocol dectris [--drop 0.02] [--reorder 0.1] [--stall-at 200] ...

It prints a line of JSON with the addresses of its frames, positions and motion, with the files of its probe and of what
its samples are (--probe and --truth of live_scan.py), and with its field and step in um; then the command that measures
there. It measures where it is asked to over the protocol, and ends when its samples are over. Frames can be dropped,
repeated, reordered and stalled on request.
"""

import argparse
import json
import math
import shlex
from dataclasses import astuple
from typing import Any

import numpy as np

from served.faults import Faults
from served.process import measuring
from served.publisher import publish
from simulated_drift import stages
from steering import RunFolder, SimulatedBeamline, zone_plate
from steering.ptychography.device import one_thread

STEP = 5.5  # between candidate positions, object pixels


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Serve until the samples are over."""
    with one_thread():  # frames are made one at a time, beside a campaign that needs the cores
        serve(folder, _options(arguments))


def serve(folder: RunFolder, options: argparse.Namespace) -> None:
    """Serve until the samples are over, as the options say."""
    beamline = SimulatedBeamline(
        stages(options.frames, options.size)[: options.samples],
        probe=zone_plate(64, 50.0, aperture=0.52, counts=1e5),
        step=STEP,
        frame_rate=options.frame_rate,
        chunk_frames=1,
        seed=options.seed,
    )
    faults = Faults(
        drop=options.drop,
        repeat=options.repeat,
        reorder=options.reorder,
        stall_at=options.stall_at,
        stall_s=options.stall_s,
        silent_from=options.silent_from,
        silent_frames=options.silent_frames,
        dark_from=options.dark_from,
        dark_frames=options.dark_frames,
        seed=options.seed,
    )
    publisher = make_publisher(options, folder, beamline)
    probe, truth = folder.path / "probe.npy", folder.path / "truth.npz"
    np.save(probe, beamline.probe)
    # A scan of files is called as its file is.
    names = [f"scan-{k}" if options.protocol == "swmr" else stage.name for k, stage in enumerate(beamline.stages)]
    np.savez(truth, **{name: stage.object for name, stage in zip(names, beamline.stages, strict=True)})
    said = {"probe": str(probe), "truth": str(truth)} | field_of(beamline)
    print(json.dumps({"served": publisher.addresses, **said}), flush=True)
    words = ["steering", "run", "workflows/live_scan.py", *measuring({**publisher.addresses, **said})]
    print(shlex.join([*words, "--scans", str(options.samples)]), flush=True)
    folder.write_summary({"addresses": publisher.addresses})
    try:
        over_bluesky = options.protocol == "bluesky"
        figures = publisher.run(faults) if over_bluesky else publish(beamline, publisher, faults)
        folder.write_summary({"addresses": publisher.addresses, "sent": figures, "scans": list(beamline.scans)})
        print(json.dumps({"sent": figures}), flush=True)
    finally:
        beamline.close()
        publisher.close()


def field_of(beamline: SimulatedBeamline) -> dict[str, str]:
    """--field and --step of live_scan.py, um: whole nanometres within the beamline's field, and its own step nearly."""
    edges = [math.trunc(1e9 * edge) / 1e3 for edge in astuple(beamline.field)]
    across = edges[3] - edges[2]
    positions = round(across / (1e6 * STEP * beamline.geometry.object_pixel))
    return {"field": " ".join(f"{edge:g}" for edge in edges), "step": f"{across / positions:.6g}"}


def make_publisher(options: argparse.Namespace, folder: RunFolder, beamline: SimulatedBeamline) -> Any:
    """The publisher of the protocol, or the beamline with its RunEngine; only its own library is imported."""
    if options.protocol == "bluesky":
        from served.bluesky import BlueskyBeamline  # noqa: PLC0415

        return BlueskyBeamline(beamline, folder.path)
    if options.protocol == "dectris":
        from served.dectris import DectrisPublisher  # noqa: PLC0415

        return DectrisPublisher(
            port=options.port,
            positions_port=options.port + 1 if options.port else 0,
            compression=options.compression,
            samples=options.position_samples,
            geometry=beamline.geometry,
        )
    if options.protocol == "swmr":
        from served.swmr import SwmrPublisher  # noqa: PLC0415

        return SwmrPublisher(folder.path, keys=not options.no_keys)
    from served.pva import PvaPublisher  # noqa: PLC0415

    return PvaPublisher(compression=options.compression)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="serve_simulated.py", description=__doc__.split("\n")[0])
    parser.add_argument("--protocol", choices=("dectris", "pva", "swmr", "bluesky"), required=True)
    parser.add_argument(
        "--port",
        type=int,
        default=0,
        help="of the frames, with dectris; positions are at the next one (any that is free)",
    )
    parser.add_argument("--compression", choices=("bslz4", "lz4"), default="bslz4", help="of the frames (bslz4)")
    parser.add_argument("--no-keys", action="store_true", help="swmr: the file says nowhere which rows are written")
    parser.add_argument("--samples", type=int, default=3, help="how many of the demo's three samples (3)")
    parser.add_argument("--frames", type=int, default=1100, help="of each sample (1100)")
    parser.add_argument("--frame-rate", type=float, default=50.0, help="frames per second (50)")
    parser.add_argument("--size", type=int, default=256, help="object pixels of a sample's side (256)")
    parser.add_argument("--position-samples", type=int, default=1, help="encoder samples of a frame (1)")
    parser.add_argument("--drop", type=float, default=0.0, help="share of the frames that are lost (0)")
    parser.add_argument("--repeat", type=float, default=0.0, help="share of the frames that come twice (0)")
    parser.add_argument("--reorder", type=float, default=0.0, help="share of the frames that come after the next (0)")
    parser.add_argument("--stall-at", type=int, default=-1, help="frame before which all is silent for --stall-s")
    parser.add_argument("--stall-s", type=float, default=5.0)
    parser.add_argument("--silent-from", type=int, default=-1, help="frame from which on positions are held back")
    parser.add_argument("--silent-frames", type=int, default=250, help="for so many frames (250)")
    parser.add_argument("--dark-from", type=int, default=-1, help="frame from which on there is no beam")
    parser.add_argument("--dark-frames", type=int, default=60, help="for so many frames (60)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)
