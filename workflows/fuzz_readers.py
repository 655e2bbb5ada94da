"""Damaged and hostile files against every reader: only clear errors, no hang, no memory beyond the bound.

    steering run workflows/fuzz_readers.py [--inputs 10000] [--first 0] [--readers cxi,model,...] [--seed 0]

Each input is made from a valid file: bits flipped, cut short, parts exchanged, lengths replaced, and, for HDF5, wrong
types, shapes, links, filters and chunks. Recorded scans are read as `read_recording` reads them, in a process with
limits, and a file that is being written is followed in one of its own, as a run does: what ends that process is counted
(`Crashed`). What Python reads is read here. An input that ends in anything but ValueError or OSError is a finding, with
the number that makes it again; --first continues at a number.
"""

import argparse
import json
import random
import resource
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from measures import streaming
from measures.spoiling import spoil
from steering import ER, ModelStore, ModelVersion, ProbeFirst, RunFolder, TrainerSettings, hand_in, read_recording
from steering.files import Bounds
from steering.labels.external import read_labels
from steering.learning import Labels, Loop, Memory, Origin, Reconstruction, best_weights, identities, joined, stratum_of
from steering.learning.buffer_state import ScanName
from steering.learning.checkpoint import Recorder
from steering.learning.origin import earlier_held_out, take_up_buffers
from steering.learning.samples import Samples
from steering.runner.earlier_runs import origin_of
from steering.runner.manifest import (
    LAST,
    Manifest,
    NoCheckpoint,
    checkpoints,
    commit,
    newest_whole,
    read_part,
    write_part,
)
from steering.sources.probe_file import read_probe
from steering.sources.recordings import ReadSettings

BOUNDS = ReadSettings(bounds=Bounds(bytes=2**24, seconds=20.0))
N, FRAMES = 16, 6


@dataclass
class Outcome:
    """What became of all inputs of one reader."""

    read: int = 0
    refused: Counter = field(default_factory=Counter)
    """Inputs by kind of error."""
    findings: list[str] = field(default_factory=list)
    """Inputs that ended in another way, with their numbers."""
    longest_s: float = 0.0
    memory_mib: float = 0.0
    """By which the largest size of this process grew meanwhile."""


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Fuzz the readers; ends with an error where there are findings."""
    parser = argparse.ArgumentParser(prog="steering run workflows/fuzz_readers.py", description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="of each reader (10000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (0)")
    parser.add_argument("--readers", default=",".join(READERS), help=f"({','.join(READERS)})")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    figures = {}
    for name in options.readers.split(","):
        place = folder.path / "inputs" / name
        outcome = fuzz(name, options.inputs, place, seed=options.seed, first=options.first)
        shutil.rmtree(place)
        figures[name] = asdict(outcome) | {"inputs": options.inputs, "refused": dict(outcome.refused)}
        folder.write_summary({"fuzz": figures})
        print(name, json.dumps(figures[name])[:400], flush=True)
    found = [f"{name}: {one}" for name, figure in figures.items() for one in figure["findings"]]
    if found:
        raise ValueError(f"found {len(found)} inputs that ended in no clear error, the first {found[0]}")


def fuzz(name: str, inputs: int, place: Path, *, seed: int = 0, first: int = 0) -> Outcome:
    """Read so many bad inputs with a reader, in a folder that is made for it; first: number of the first."""
    prepare, call = READERS[name]
    outcome = Outcome()
    valid = place / "valid"
    valid.mkdir(parents=True)
    prepare(valid)
    call(valid)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, first + inputs):
        rng = random.Random(f"{name}-{seed}-{number}")  # noqa: S311 - to be made again, not to be secret
        bad = place / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(valid, bad)
        spoil(bad, rng)
        started = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(bad)
            outcome.read += 1
        except (ValueError, OSError) as error:
            outcome.refused[type(error).__name__] += 1
            if "Error, " in str(error) or "ended the process" in str(error) or "found" not in str(error):
                outcome.findings.append(f"input {number}: {type(error).__name__}: {error!s:.300}")
        except Exception as error:
            outcome.findings.append(f"input {number}: {type(error).__name__}: {error!s:.300}")
        outcome.longest_s = max(outcome.longest_s, time.monotonic() - started)
    outcome.memory_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return outcome


def _write_cxi(folder: Path) -> None:
    import h5py  # noqa: PLC0415

    rng = np.random.default_rng(0)
    with h5py.File(folder / "scan.cxi", "w") as file:
        file["entry_1/data_1/data"] = rng.poisson(20, (FRAMES, N, N)).astype(np.uint16)
        file["entry_1/sample_1/geometry_1/translation"] = rng.uniform(-1e-6, 1e-6, (FRAMES, 3))
        file["entry_1/instrument_1/source_1/energy"] = 1.4e-15
        file["entry_1/instrument_1/source_1/probe"] = np.ones((N, N), np.complex64)
        detector = file.create_group("entry_1/instrument_1/detector_1")
        detector["distance"], detector["mask"] = 2.0, np.zeros((N, N), np.uint32)
        detector["x_pixel_size"] = detector["y_pixel_size"] = 75e-6


def _write_npz(folder: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.poisson(20, (FRAMES, N, N)).astype(np.float32)
    np.savez(
        folder / "scan.npz", data=frames, scan=rng.uniform(-4, 4, (FRAMES, 2)), probe=np.ones((1, N, N), np.complex64)
    )


def _write_model(folder: Path) -> None:
    network = ProbeFirst(window=16, patch=8, width=2)
    network.optics.set(np.ones((1, 16, 16), np.complex64))
    described = ModelVersion(number=0, network="ProbeFirst", hyperparameters=network.hyperparameters)
    ModelStore(folder).publish(network, described)


def _write_run(folder: Path) -> None:
    run = RunFolder.create(folder / "run")
    for k in range(5):
        run.append_event({"event": "ChunkArrived", "time": float(k), "scan": "a", "frame_id": list(range(k))})
    image = xr.Dataset({"phase": (("y", "x"), np.ones((8, 8), np.float32)), "held_out": ("frame", np.ones(4, bool))})
    run.write_object("a", image.assign_coords(y=("y", np.arange(8.0), {"units": "m"})))


def _write_labels(folder: Path) -> None:
    (folder / "summary.json").write_text("{}")
    hand_in(folder, "a", np.arange(3), patches=np.ones((3, 8, 8), np.complex64))


def _read_run(folder: Path) -> None:
    run = RunFolder(folder / "run")
    run.events()
    run.objects()


def _read_labels(folder: Path) -> None:
    for path in (folder / "labels").glob("*.npz"):
        read_labels(path)


def _read_model(folder: Path) -> None:
    store = ModelStore(folder)
    number = store.newest()
    store.versions()
    store.load(0 if number is None else number)


def _loop() -> Loop:
    """A rank's network, optimiser and buffer."""
    torch.manual_seed(0)
    network = ProbeFirst(window=N, patch=8, width=2)
    network.optics.set(np.ones((1, N, N), np.complex64))
    settings = TrainerSettings(batch=2, candidates=2, representatives=2, buffer_bytes=2**16)
    return Loop(network, ER(Reconstruction(torch.ones(8, 8))), settings)


def _labels() -> Labels:
    rng, n = np.random.default_rng(0), 12
    return Labels(
        scan="a",
        stratum=stratum_of("run", "a"),
        frame_id=np.arange(n),
        counts=rng.poisson(5, (n, N, N)).astype(np.uint16),
        amplitude=np.ones((n, 8, 8), np.float32),
        phase=np.zeros((n, 8, 8), np.float32),
        residual=np.full(n, 0.01, np.float32),
        held_out=np.arange(n) % 4 == 3,
        probe=None,
        mask=np.zeros((N, N), bool),
    )


def _write_ranks(root: Path) -> Any:
    """What one rank leaves in a folder of checkpoints: weights, labelled frames, its buffer and a change of it."""
    loop, labels, samples = _loop(), _labels(), Samples(seed=0, keep_all=False, run="run")
    samples.add(labels)
    recorder = Recorder(loop, samples, {"served": loop.network})
    loop.buffer.scans[labels.stratum] = ScanName("run", "a", 1.0)
    for number in (1, 2):
        there = slice(6 * number - 6, 6 * number)
        fields = {name: torch.from_numpy(getattr(labels, name)[there]) for name in ("counts", "amplitude", "phase")}
        own = torch.from_numpy(identities("run", "a", labels.frame_id[there]))
        loop.buffer.insert(fields, torch.full((6,), labels.stratum), own)
        recorder.cut(root, number)
        written = recorder.written.result()
    return joined(2, [written])


def _write_checkpoint(folder: Path) -> None:
    run = RunFolder.create(folder / "run")
    root = checkpoints(run)
    part = _write_ranks(root)
    (root / LAST).write_text(json.dumps(part.to_json()))
    digest, size = write_part(root, 2, "ranks", part.to_json())
    sizes = {name: (root / name).stat().st_size for name in part.files}
    commit(root, Manifest(number=2, event=5, time=1.0, parts={"ranks": digest}, files=sizes, bytes=size))


def _read_checkpoint(folder: Path) -> None:
    run = RunFolder(folder / "run")
    _begin(origin_of(run))
    try:
        manifest, _ = newest_whole(run)
        read_part(checkpoints(run), manifest, "ranks")
    except NoCheckpoint as none:
        raise ValueError(str(none)) from none


def _write_memory(folder: Path) -> None:
    part = _write_ranks(folder / "left")
    origin = Origin(folder=folder / "left", run="run", buffers=part.buffers, weights=part.weights)
    Memory(folder / "memory").add("run", origin, {"number": 2, "network": "ProbeFirst"})
    shutil.rmtree(folder / "left")


def _read_memory(folder: Path) -> None:
    memory = Memory(folder / "memory")
    memory.held()
    origin = memory.origin()
    if origin is not None:
        _begin(origin)


def _begin(origin: Origin) -> None:
    """As a rank begins with it."""
    loop = _loop()
    best_weights(origin, loop.network)
    take_up_buffers([origin], loop, rank=0, ranks=1)
    earlier_held_out([origin])


def _packed_npz(folder: Path) -> None:
    import bz2  # noqa: PLC0415

    _write_npz(folder)
    (folder / "scan.bz2").write_bytes(bz2.compress((folder / "scan.npz").read_bytes()))
    (folder / "scan.npz").unlink()


def _write_table(folder: Path) -> None:
    """Positions in a text file beside the frames."""
    _write_cxi(folder)
    rows = "".join(f"0,{100 * k},0,0,0,{70 * k},0,{k}\n" for k in range(FRAMES))
    (folder / "scan.csv").write_text(rows)


def _read_table(folder: Path) -> None:
    settings = replace(BOUNDS, positions="scan.csv")
    read_recording(folder / "scan.cxi", zero_frequency="centre", settings=settings)


def _write_probe(folder: Path) -> None:
    np.save(folder / "probe.npy", np.ones((1, N, N), np.complex64))


READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "cxi": (_write_cxi, lambda f: read_recording(f / "scan.cxi", zero_frequency="centre", settings=BOUNDS)),
    "npz": (_write_npz, lambda f: read_recording(f / "scan.npz", zero_frequency="corner", settings=BOUNDS)),
    "bz2": (_packed_npz, lambda f: read_recording(f / "scan.bz2", zero_frequency="corner", settings=BOUNDS)),
    "npy": (_write_probe, lambda f: read_probe(f / "probe.npy", bounds=BOUNDS.bounds)),
    "labels": (_write_labels, _read_labels),
    "model": (_write_model, _read_model),
    "run": (_write_run, _read_run),
    "checkpoint": (_write_checkpoint, _read_checkpoint),
    "memory": (_write_memory, _read_memory),
    "table": (_write_table, _read_table),
    "swmr": (streaming.write_swmr, streaming.follow_swmr),
    "dectris": (streaming.write_dectris, streaming.read_dectris),
    "panda": (streaming.write_panda, streaming.read_panda),
    "bluesky": (streaming.write_documents, streaming.read_documents),
    "tape": (streaming.write_tape, streaming.play_tape),
}
"""What writes a valid folder, and what reads it."""
