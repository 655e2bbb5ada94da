"""Starts workflows/serve_simulated.py in another process, and makes a live source for it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from steering.sources import JoinSettings, LiveSource, LiveSourceSettings, Window
from steering.sources.addresses import streams_at

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "workflows"))
from served.process import measuring, served, steered_apart  # noqa: E402, F401 - for the tests


def beamline(frames: int = 60, samples: int = 1, **settings):
    """The beamline that serve_simulated.py serves with --frames and --samples, in this process."""
    from simulated_drift import stages
    from steering import SimulatedBeamline, zone_plate

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
        window=Window(size=64, dtype="uint16", orientation=settings.pop("orientation", "none")),
        geometry=like.geometry,
        probe=like.probe,
        candidates=like.candidates,
        settings=LiveSourceSettings(join=join, **settings),
    )


def gathered(chunks: list, name: str) -> np.ndarray:
    return np.concatenate([chunk[name].values for chunk in chunks])
