"""The simulated beamline in a process of its own, a campaign over its protocol, and what of it was measured where."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from steering import RunFolder

HERE = Path(__file__).parents[1]


@contextlib.contextmanager
def served(folder: Path, *arguments: str) -> Iterator[dict[str, str]]:
    """The addresses of a beamline that serve_simulated.py serves meanwhile with these arguments, the files of its
    probe and truth, and its field and step; it is ended at the end, and its run folder lies in `folder`."""
    out = folder / f"served-{len(list(folder.iterdir()))}"
    command = [sys.executable, "-m", "steering.cli", "run", "--out", str(out), str(HERE / "serve_simulated.py")]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith('{"served"'):
                said = json.loads(line)
                yield {**said["served"], **{name: said[name] for name in ("probe", "truth", "field", "step")}}
                break
        else:
            raise RuntimeError(f"found the server ended with {process.wait()}, expected it to say its addresses")
    finally:
        process.terminate()
        process.communicate(timeout=60)


def measuring(
    addresses: Mapping[str, str], *, probe: bool = True, truth: bool = True, optics: bool = True
) -> list[str]:
    """Arguments of live_scan.py for a beamline that is served: its streams, optics and field, and what is known."""
    words = [f for name in ("positions", "motion") for f in (f"--{name}", addresses[name])]
    for known, name in ((probe, "probe"), (truth, "truth")):
        words += [f"--{name}", addresses[name]] if known else []
    words += ["--energy", "8800", "--distance", "2.4", "--pixel", "0.0006"] if optics else []
    window = ["--window", "64", "--dtype", "uint16"]
    field = ["--field", *addresses["field"].split(), "--step", addresses["step"]]
    return ["--source", addresses["frames"], *words, *window, *field]


def steered_apart(folder: RunFolder, frames: int) -> float:
    """The largest distance, metres, between where a frame was measured and what was decided for it; nan where nothing
    was. frames: of each scan that was served. The first of each must not be lost: some detectors number from 1, or on.
    """
    events = [event for event in folder.events() if event["event"] == "DecisionSuggested"]
    decided = np.array([place for event in events for place in event["positions"]]).reshape(-1, 2)
    apart = []
    for k, image in enumerate(folder.objects().values()):
        order = k * frames + image["frame"].values - image["frame"].values.min()
        if order.max() >= len(decided):
            return float("nan")
        where = np.stack([image["position_y"].values, image["position_x"].values], axis=1)
        apart.append(np.linalg.norm(where - decided[order], axis=1).max())
    return float(max(apart, default=np.nan))
