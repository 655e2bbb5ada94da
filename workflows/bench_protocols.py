"""Whether the demo's campaign learns as well over each live protocol as in one piece, and steers through it.

    steering run workflows/bench_protocols.py [--protocols dectris pva swmr bluesky] [--runs 3] [--embedded 5]

The demo runs `--embedded` times with its beamline inside; then its beamline is served over each protocol by another
process (serve_simulated.py), measured by live_scan.py, `--runs` times. `worse` names the phase errors above the range
of the embedded runs, widened by a tenth; `lost` counts frames; `steered_apart_nm` is the largest distance of a frame's
position from the one decided for it. A run may go on where another one has ended (--results).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from served.process import HERE, measuring, served, steered_apart
from steering import RunFolder
from steering.ptychography.device import add_device
from steering.view.pictures import COLOURS, figure, png, styled

PROTOCOLS = ("dectris", "pva", "swmr", "bluesky")
MOMENTS = ("own_end", "run_end")
WIDER = 0.1
_RUN_S = 600.0


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Run what has not been run, and compare."""
    options = _options(arguments)
    file = options.results or folder.path / "results.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    deadline, left = time.monotonic() + options.seconds, 0
    for kind, number in _wanted(options):
        if any((one["kind"], one["number"]) == (kind, number) for one in found):
            continue
        if time.monotonic() > deadline:
            left += 1
            continue
        place = folder.path / f"{kind}-{number}"
        place.mkdir()
        run = embedded(place, number, options) if kind == "embedded" else over(kind, place, number, options)
        found.append({"kind": kind, "number": number, **run})
        with file.open("a") as lines:
            lines.write(json.dumps(found[-1]) + "\n")
        print(json.dumps(found[-1]), flush=True)
        folder.write_summary(compared(found) | {"left": left})
    folder.write_summary(compared(found) | {"left": left})
    folder.write_file("protocols.png", picture(found))


def embedded(place: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The demo, with its beamline inside."""
    rate = ("--frames", str(options.frames), "--frame-rate", str(options.frame_rate))
    return _figures(_campaign(place, "simulated_drift.py", *rate, *_training(options), "--seed", str(seed)))


def over(protocol: str, place: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The demo's beamline behind a protocol, and a campaign that measures there."""
    rate = ("--frames", str(options.frames), "--frame-rate", str(options.frame_rate))
    with served(place, "--protocol", protocol, *rate, "--seed", str(seed)) as addresses:
        scans = ("--scans", "3", "--rounds", "2", "--frame-rate", str(options.frame_rate))
        run = _campaign(place, "live_scan.py", *measuring(addresses), *scans, *_training(options))
    summary = run.summary()
    frames = summary["streams"]["frames"]
    return _figures(run) | {
        "lost": 3 * options.frames - frames["joined"],
        "steered_apart_nm": 1e9 * steered_apart(run, options.frames),
    }


def compared(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the summary says: the range of the embedded runs, and each protocol beside it."""
    inside = [one["phase_error"] for one in found if one["kind"] == "embedded"]
    figures: dict[str, Any] = {"embedded": {"runs": len(inside)}}
    limits = {}
    for key in inside[0] if inside else ():
        low, high = min(one[key] for one in inside), max(one[key] for one in inside)
        figures["embedded"][key] = [low, high]
        limits[key] = (1 + WIDER) * high
    for kind in dict.fromkeys(one["kind"] for one in found if one["kind"] != "embedded"):
        runs = [one for one in found if one["kind"] == kind]
        figures[kind] = {
            "runs": len(runs),
            "lost": sum(one["lost"] for one in runs),
            "steered_apart_nm": max(one["steered_apart_nm"] for one in runs),
            "phase_error": {key: [one["phase_error"][key] for one in runs] for key in limits},
            "worse": {
                f"{key} of run {one['number']}": one["phase_error"][key]
                for one in runs
                for key, most in limits.items()
                if not one["phase_error"][key] <= most
            },
        }
    return figures


def _figures(run: RunFolder) -> dict[str, Any]:
    """Of the scans in their order: over files they are called otherwise."""
    summary = run.summary()
    errors = [summary["phase_error"][scan] for scan in summary["scans"]]
    return {
        "phase_error": {f"{k + 1}.{moment}": one[moment] for k, one in enumerate(errors) for moment in MOMENTS},
        "versions": summary["versions_published"],
        "dropped": summary["frames_dropped"],
    }


def _campaign(place: Path, workflow: str, *arguments: str) -> RunFolder:
    """A run of a workflow, in processes of its own."""
    out = place / "run"
    command = [sys.executable, "-m", "steering.cli", "run", "--out", str(out), str(HERE / workflow), *arguments]
    with (place / "run.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, timeout=_RUN_S, check=False).returncode
    if code:
        words = (place / "run.log").read_text(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"{place.name}: found exit {code} of {workflow}, expected 0: {' / '.join(words)}")
    return RunFolder(out)


def _wanted(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Embedded runs first; then one of each protocol, then the second of each."""
    yield from (("embedded", number) for number in range(options.embedded))
    yield from ((protocol, number) for number in range(options.runs) for protocol in options.protocols)


def _training(options: argparse.Namespace) -> tuple[str, ...]:
    return ("--ranks", str(options.ranks), "--steps", str(options.steps), "--device", options.device)


@styled
def picture(found: list[dict[str, Any]]) -> bytes:
    """Phase errors of every run, a panel for each scan's end and the run's end, a column of dots for each kind."""
    kinds = list(dict.fromkeys(one["kind"] for one in found))
    drawing, [axes] = figure(1, len(MOMENTS), height=2.8)
    for panel, moment in zip(axes, MOMENTS, strict=True):
        for place, kind in enumerate(kinds):
            for k, colour in enumerate(COLOURS[:3]):
                errors = [one["phase_error"][f"{k + 1}.{moment}"] for one in found if one["kind"] == kind]
                spread = place + 0.2 * (k - 1) + np.linspace(-0.05, 0.05, len(errors))
                panel.plot(spread, errors, ".", color=colour, label=f"scan {k + 1}" if not place else None)
        panel.set_xticks(range(len(kinds)), kinds)
        panel.set_title("at the scan's end" if moment == "own_end" else "at the run's end")
        panel.set_ylabel("phase error (rad)")
    axes[0].legend()
    return png(drawing)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_protocols.py", description=__doc__.split("\n")[0])
    parser.add_argument("--protocols", choices=PROTOCOLS, nargs="+", default=list(PROTOCOLS))
    parser.add_argument("--runs", type=int, default=3, help="over each protocol (3)")
    parser.add_argument("--embedded", type=int, default=5, help="runs with the beamline inside (5)")
    parser.add_argument("--frames", type=int, default=1100, help="of each of the three samples (1100)")
    parser.add_argument("--frame-rate", type=float, default=50.0, help="frames per second (50)")
    parser.add_argument("--ranks", type=int, default=2, help="training processes (2)")
    parser.add_argument("--steps", type=int, default=30, help="optimiser steps of a training round (30)")
    parser.add_argument("--results", type=Path, help="file of results to go on with (results.jsonl of the run)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which the rest is left (no limit)")
    add_device(parser)
    return parser.parse_args(arguments)
