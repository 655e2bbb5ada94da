"""Whether the turn of a recorded scan's frames is found: right, refused, wrong.

    steering run workflows/bench_recorded.py [--turns 8] [--shifts 8]

Scans whose orientation is known (the Siemens star where STEERING_DATA has it, and two simulated ones) are turned in
eight ways, with the beam's centre off by up to a sixteenth of the frame in eight ways, and the turn is sought with the
probe known. Then scans that cannot tell (flat objects, frames that do not overlap): these must be refused.
"""

import argparse
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from skimage import data

from steering import ORIENTATIONS, Canvas, Geometry, RunFolder, read_recording, sample, zone_plate
from steering.ptychography import simulate
from steering.ptychography.device import add_device
from steering.sources import Recording, find_orientation, line_field
from steering.sources.finding import turned
from steering.sources.first_probe import TWINS, find_without_probe
from steering.view.pictures import COLOURS, figure, png, styled

WINDOW, SIDE = 64, 192
SCANS = ("siemens", "coins", "lines")
ENDINGS = ("right", "refused", "wrong")
SIEMENS = "ptycho-aps-velociprobe-siemens/siemens-star-small.npz.bz2"


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Seek the turn of every variant; keys orientation.right, .refused, .wrong and undecidable.refused."""
    options = _options(arguments)
    results = Results(options.results or folder.path / "results.jsonl", options.device)
    deadline = time.monotonic() + options.seconds
    for name, recording in scans():
        if name not in options.scans:
            continue
        for k, (variant, wanted) in enumerate(variants(recording, options.turns, options.shifts)):
            one = replace(variant, probe=None) if options.without_probe else variant
            results.judge(f"{name}-{k}", one, wanted, deadline)
        print(name, results.counted(name), flush=True)
    for k, recording in enumerate(itertools.islice(undecidable(), options.undecidable)):
        results.judge(f"undecidable-{k}", recording, None, deadline)
    names = sorted({key.rpartition("-")[0] for key in results.found} - {"undecidable"})
    by_scan = {name: results.counted(name) for name in names}
    total, hopeless = sum(by_scan.values(), Counter()), results.counted("undecidable")
    cpu = [one["cpu_s"] for one in results.found.values()]
    folder.write_summary(
        {
            "orientation": {key: total[key] for key in ENDINGS}
            | {"tried": total.total(), "cpu_s": float(np.mean(cpu)), "scans": {n: dict(c) for n, c in by_scan.items()}},
            "undecidable": {"refused": hopeless["refused"], "tried": hopeless.total()},
            "left": results.left,
        }
    )
    if results.left:
        print(f"{results.left} left: run it again with --results {results.file}", flush=True)
    folder.write_file("orientation.png", picture({name: results.shares(name) for name in (*names, "undecidable")}))


class Results:
    """What was found so far, a line each in a file, so that a run may go on where another one has ended."""

    def __init__(self, file: Path, device: str) -> None:
        self.file, self.device = file, device
        lines = file.read_text().splitlines() if file.is_file() else []
        self.found: dict[str, dict[str, Any]] = {one["key"]: one for one in map(json.loads, lines)}
        self.left = 0

    def judge(self, key: str, recording: Recording, wanted: str | None, deadline: float) -> None:
        """Seek the turn of a recording, unless that was done, or the time is over. wanted: None: it cannot tell."""
        if key in self.found:
            return
        if time.monotonic() > deadline:
            self.left += 1
            return
        begun = time.process_time()
        if recording.probe is None:
            found, _ = find_without_probe(recording, device=self.device)
            turn = wanted if wanted in (found.orientation, TWINS[found.orientation]) else found.orientation
        else:
            found = find_orientation(recording, device=self.device)
            turn = found.orientation
        ending = "refused" if not found.sure else "right" if turn == wanted else "wrong"
        line = {"key": key, "ending": ending, "share": found.share, "cpu_s": time.process_time() - begun}
        self.found[key] = line
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def counted(self, name: str) -> Counter:
        """How often each ending came, of a kind of scan."""
        return Counter(one["ending"] for key, one in self.found.items() if key.rpartition("-")[0] == name)

    def shares(self, name: str) -> list[float]:
        """The best residual over the second best, of a kind of scan."""
        return [one["share"] for key, one in self.found.items() if key.rpartition("-")[0] == name]


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="steering run workflows/bench_recorded.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--turns", type=int, default=8, help="of the frames, of each scan (8)")
    parser.add_argument("--shifts", type=int, default=8, help="of the beam's centre, of each turn (8)")
    parser.add_argument("--scans", nargs="*", choices=SCANS, default=SCANS, help="all of them")
    parser.add_argument("--undecidable", type=int, default=8, help="scans that cannot tell (8)")
    parser.add_argument("--without-probe", action="store_true", help="hide the probe: right is right up to the twin")
    parser.add_argument("--results", type=Path, help="file of results to go on with (results.jsonl of the run)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which the rest is left (no limit)")
    add_device(parser)
    return parser.parse_args(arguments)


def scans() -> Iterator[tuple[str, Recording]]:
    """Scans whose orientation is right as they are, with their names."""
    place = Path(os.environ.get("STEERING_DATA", "/nowhere")) / SIEMENS
    if place.is_file():
        yield "siemens", read_recording(place, zero_frequency="corner")
    yield "coins", simulated(sample(data.coins(), phase=1.5, absorption=0.1, size=SIDE), seed=0)
    lines = line_field(SIDE, lines=40, seed=1)
    yield "lines", simulated(np.exp(-0.1 * lines + 0.8j * lines).astype(np.complex64), seed=1)


def simulated(thing: np.ndarray, *, seed: int, step: float = 8.0) -> Recording:
    """A scan of an object (SIDE, SIDE) in rows, with some jitter."""
    rng = np.random.default_rng(seed)
    probe = zone_plate(WINDOW, 50.0, aperture=0.52, counts=1e5)
    rows = np.arange(-40, 41, step)
    where = np.stack(np.meshgrid(rows, rows, indexing="ij"), -1).reshape(-1, 2) + rng.uniform(
        -1, 1, (len(rows) ** 2, 2)
    )
    canvas = Canvas(thing.shape, (-thing.shape[0] // 2, -thing.shape[1] // 2))
    counts = rng.poisson(simulate(thing, probe, canvas, where)).astype(np.uint16)
    return Recording(counts=counts, positions=where, probe=probe, geometry=Geometry(shape=(WINDOW, WINDOW)))


def variants(recording: Recording, turns: int, shifts: int) -> Iterator[tuple[Recording, str]]:
    """A recording as other detectors would have written it, and the turn that undoes it."""
    undo = {"rot90": "rot270", "rot270": "rot90"}
    reach = recording.geometry.shape[0] // 16
    rng = np.random.default_rng(0)
    for name in list(ORIENTATIONS)[:turns]:
        for k in range(shifts):
            shift = rng.integers(-reach, reach + 1, 2) if k else (0, 0)
            moved = replace(recording, counts=np.roll(recording.counts, shift, (1, 2)))
            yield turned(moved, name), undo.get(name, name)


def undecidable() -> Iterator[Recording]:
    """Scans that hold no evidence of their orientation."""
    flat = np.ones((SIDE, SIDE), np.complex64)
    for seed in range(4):
        yield simulated(flat * np.exp(0.3j * seed), seed=seed)
    rough = np.pad(sample(data.coins(), phase=1.5, absorption=0.1, size=SIDE), 120, mode="wrap")
    probe = zone_plate(WINDOW, 50.0, aperture=0.52, counts=1e5)
    rows = np.arange(-160, 161, 80.0)
    where = np.stack(np.meshgrid(rows, rows, indexing="ij"), -1).reshape(-1, 2)
    for seed in range(4):
        canvas = Canvas(rough.shape, (-rough.shape[0] // 2 + seed, -rough.shape[1] // 2))
        counts = np.random.default_rng(seed).poisson(simulate(rough, probe, canvas, where)).astype(np.uint16)
        yield Recording(counts=counts, positions=where, probe=probe, geometry=Geometry(shape=(WINDOW, WINDOW)))


@styled
def picture(shares: dict[str, list[float]]) -> bytes:
    """The best turn's residual over the second best's, a row for each kind of scan."""
    drawing, [[axes]] = figure(height=2.6)
    for row, values in enumerate(shares.values()):
        axes.plot(values, np.full(len(values), row) + np.linspace(-0.2, 0.2, len(values)), ".", color=COLOURS[0])
    axes.set_yticks(range(len(shares)), list(shares))
    axes.axvline(0.9, color=COLOURS[1])
    axes.set_xlabel("best residual over second best: refused right of the line")
    return png(drawing)
