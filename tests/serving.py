"""Starts workflows/serve_simulated.py in another process, and makes a live source for it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from steering.sources import JoinSettings, LiveSettings, LiveSource, Window
from steering.sources.addresses import streams_at

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def served(folder: Path, *arguments: str) -> Iterator[dict[str, str]]:
    """The addresses of a simulated beamline that is served meanwhile; it is ended at the end."""
    out = folder / f"served-{len(list(folder.iterdir()))}"
    command = [
        sys.executable,
        "-m",
        "steering.cli",
        "run",
        "--out",
        str(out),
        "workflows/serve_simulated.py",
        *arguments,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith('{"served"'):
                told = json.loads(line)
                yield {**told["served"], "probe": told["probe"]}
                break
        else:
            raise AssertionError(f"the server ended with {process.wait()}")
    finally:
        process.terminate()
        process.communicate(timeout=60)


def beamline(frames: int = 60, samples: int = 1, **settings):
    """The beamline that serve_simulated.py serves with --frames and --samples, in this process."""
    from steering import SimulatedBeamline, zone_plate

    sys.path.insert(0, str(ROOT / "workflows"))
    try:
        from simulated_drift import stages
    finally:
        sys.path.remove(str(ROOT / "workflows"))
    return SimulatedBeamline(
        stages(frames, 256)[:samples],
        probe=zone_plate(64, 50.0, aperture=0.52, counts=1e5),
        step=5.5,
        frame_rate=settings.pop("frame_rate", 2000.0),
        **settings,
    )


def live(addresses: dict[str, str], like, **settings) -> LiveSource:
    """A live source for these addresses, with the optics of a simulated beamline."""
    join = JoinSettings(**settings.pop("join", {}))
    return LiveSource(
        streams_at(addresses["frames"], addresses["positions"], addresses["motion"]),
        window=Window(size=64, dtype="uint16"),
        geometry=like.geometry,
        probe=like.probe,
        candidates=like.candidates,
        settings=LiveSettings(join=join, **settings),
    )


def gathered(chunks: list, name: str) -> np.ndarray:
    return np.concatenate([chunk[name].values for chunk in chunks])
