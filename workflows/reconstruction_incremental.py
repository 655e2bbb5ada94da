"""Learning one sample after the other without forgetting: the matrix of errors, task by task, for every strategy.

    steering run workflows/reconstruction_incremental.py [--tasks simulated] [--strategies er,derpp] [--ranks 2] ...

`--tasks simulated`: four samples of different structure and material, labelled with the truth. `--tasks siemens`: four
regions of the recorded Siemens star, in the folder that STEERING_DATA names, labelled by refinement of the whole scan.
After each task the network is judged on frames of every task, those to come too, that were never trained on: median
phase error in radians, each patch's constant phase taken out.
"""

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from skimage import data, filters

from pictures.learning import matrix_picture
from steering import (
    STRATEGIES,
    Canvas,
    Field,
    Loop,
    Place,
    ProbeFirst,
    Reconstruction,
    RunFolder,
    Tally,
    TrainerSettings,
    add_cluster,
    cluster,
    on_ranks,
    read_recording,
    sample,
    zone_plate,
)
from steering.inference.evaluate import patch_phase_error
from steering.learning.buffer import BOOKKEEPING
from steering.learning.epochs import Epochs
from steering.learning.rows import as_rows
from steering.ptychography import extract_patches, patch_weight, simulate
from steering.ptychography.device import add_device

HELD_OUT = 10  # every tenth frame is never trained on


@dataclass(frozen=True)
class Task:
    """Labelled frames of one sample or region: counts (n, N, N), patches complex64 (n, patch, patch)."""

    name: str
    counts: NDArray
    patches: NDArray[np.complex64]


@dataclass(frozen=True)
class Course:
    """Tasks in the order in which they are learnt, and what all have in common."""

    tasks: list[Task]
    probe: NDArray[np.complex64]
    mask: NDArray[np.bool_]


def simulated(options: argparse.Namespace) -> Course:
    """Four samples, each at its own random positions, with Poisson noise."""
    rng = np.random.default_rng(options.seed)
    probe = zone_plate(64, 50.0, aperture=0.52, counts=1e5)
    reach = 80.0
    canvas = Canvas.around(Field(-reach, reach, -reach, reach), 64)
    pores = filters.gaussian(data.binary_blobs(256, blob_size_fraction=0.08, rng=1).astype(float), 1)
    size = canvas.shape[0]
    samples = {
        "gravel": sample(data.gravel()[:256, :256], phase=-1.0, absorption=0.2, size=size),
        "pores": sample(pores, phase=1.8, absorption=0.1, size=size),
        "brick": sample(data.brick(), phase=-2.8, absorption=0.05, size=size),
        "coins": sample(data.coins(), phase=1.2, absorption=0.4, size=size),
    }
    tasks = []
    for name, thing in samples.items():
        where = rng.uniform(-reach, reach, (options.frames, 2))
        counts = rng.poisson(simulate(thing, probe, canvas, where)).astype(np.uint16)
        tasks.append(Task(name, counts, extract_patches(thing, canvas, where, 40)))
    return Course(tasks, probe, np.zeros((64, 64), bool))


def siemens(options: argparse.Namespace) -> Course:
    """The four quarters of the recorded scan; its labels are cut out of the object that all its frames refine to."""
    named = os.environ.get("STEERING_DATA")
    if not named:
        raise RuntimeError("found no STEERING_DATA, expected this environment variable to name the folder of the data")
    file = Path(named) / "ptycho-aps-velociprobe-siemens" / "siemens-star-small.npz.bz2"
    recording = read_recording(file, zero_frequency="corner")
    where = recording.positions / recording.geometry.object_pixel
    patches, probe = recording.labels(patch=64, passes=options.passes, device=options.device)
    middle = np.median(where, axis=0)
    quarter = 2 * (where[:, 0] > middle[0]) + (where[:, 1] > middle[1])
    names = ("upper left", "upper right", "lower left", "lower right")
    tasks = [Task(name, recording.counts[quarter == k], patches[quarter == k]) for k, name in enumerate(names)]
    return Course(tasks, probe, ~recording.geometry.good())


def learn(place: Place, course: Course, name: str, options: argparse.Namespace) -> dict:
    """Learn all tasks in turn on this rank. Returns the figures of the strategy, the same on every rank."""
    torch.manual_seed(options.seed)
    patch = course.tasks[0].patches.shape[-1]
    window = course.mask.shape[0]
    network = ProbeFirst(window=window, patch=patch, width=options.width, modes=len(course.probe))
    network.optics.set(course.probe, course.mask)
    weight = patch_weight(course.probe, patch)
    start = {key: value.clone() for key, value in network.state_dict().items()}
    strategy = STRATEGIES[name](Reconstruction(weight))
    fields = [as_fields(task, number) for number, task in enumerate(course.tasks)]
    stored = options.buffer * sum(len(task.counts) for task in course.tasks) / place.ranks
    bytes_each = sum(value[0].nbytes for value in fields[0].values()) + BOOKKEEPING
    bytes_each += 8 * patch * patch if name.startswith("der") else 0
    settings = TrainerSettings(
        batch=options.batch,
        candidates=options.candidates,
        representatives=options.representatives,
        learning_rate=options.learning_rate,
        buffer_bytes=math.ceil(stored) * bytes_each,
        seed=options.seed,
        device=options.device,
    )
    loop = Loop(network, strategy, settings, rank=place.rank)
    loop.connect(place.join(device=loop.device))
    total, matrix, seconds = Tally(), [], 0.0
    for number in range(len(fields)):
        if strategy.restarts:
            network.load_state_dict(start)
            loop.optimiser.state.clear()
        parts = fields[: number + 1] if strategy.restarts else fields[number : number + 1]
        begun = time.perf_counter()
        total += train(loop, parts, place, options)
        seconds += time.perf_counter() - begun
        matrix.append([judge(network, task, weight) for task in course.tasks])
    own, end = [matrix[k][k] for k in range(len(matrix))], matrix[-1]
    return {
        "error_final": float(np.mean(end)),
        "error_own_end": float(np.mean(own)),
        "worst_final_over_own_end": float(np.max(np.array(end) / own)),
        "runtime_s": seconds,
        "representatives": total.representatives,
        "remote": total.remote,
        "error_matrix": matrix,
    }


def as_fields(task: Task, stratum: int) -> dict[str, torch.Tensor]:
    """The frames of a task that are trained on, as samples."""
    trained_on = np.arange(len(task.counts)) % HELD_OUT != 0
    patches = task.patches[trained_on]
    return {
        "counts": torch.from_numpy(task.counts[trained_on]),
        "amplitude": torch.from_numpy(np.abs(patches)),
        "phase": torch.from_numpy(np.angle(patches)),
        "stratum": torch.full((len(patches),), stratum),
    }


def train(loop: Loop, parts: list[dict[str, torch.Tensor]], place: Place, options: argparse.Namespace) -> Tally:
    """So many passes over the samples of these tasks."""
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    count = len(whole["stratum"])
    epochs = Epochs(count, seed=options.seed, rank=place.rank, ranks=place.ranks)

    def load(n: int, out: dict[str, torch.Tensor]) -> None:
        rows = torch.from_numpy(epochs.take(n))
        for name, value in whole.items():
            torch.index_select(as_rows(value), 0, rows, out=as_rows(out[name][:n]))  # torch cannot select from uint16

    loop.prepare({name: value[0] for name, value in whole.items()})
    return loop.run(math.ceil(options.epochs * count / (options.batch * place.ranks)), load)


@torch.no_grad()
def judge(network: ProbeFirst, task: Task, weight: NDArray[np.float32]) -> float:
    """Median phase error on the frames of a task that were never trained on, radians."""
    held_out = np.arange(len(task.counts)) % HELD_OUT == 0
    amplitude, phase = network(torch.from_numpy(task.counts[held_out]).to(network.optics.probe.device))
    patches = torch.polar(amplitude, phase).cpu().numpy()
    return float(np.median(patch_phase_error(patches, task.patches[held_out], weight)))


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Run every strategy, one after the other, and write its figures as soon as it has ended."""
    options = _options(arguments)
    course = simulated(options) if options.tasks == "simulated" else siemens(options)
    names = [task.name for task in course.tasks]
    print("tasks: " + ", ".join(f"{task.name} ({len(task.counts)} frames)" for task in course.tasks))
    figures = {}
    with cluster(options.cluster, ranks=options.ranks, folder=folder.path, insecure=options.insecure) as client:
        for name in options.strategies.split(","):
            figures[name] = on_ranks(client, learn, course, name, options, ranks=options.ranks)[0]
            folder.write_summary({"strategies": figures, "tasks": names, "ranks": options.ranks})
            end = "  ".join(f"{error:.3f}" for error in figures[name]["error_matrix"][-1])
            print(f"{name:13} errors at the end (rad): {end}   {figures[name]['runtime_s']:5.0f} s", flush=True)
    folder.write_file("errors.png", matrix_picture(names, figures))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="reconstruction_incremental.py", description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", choices=("simulated", "siemens"), default="simulated")
    fitting = [name for name, kind in STRATEGIES.items() if not kind.needs_classes]
    parser.add_argument("--strategies", default=",".join(fitting), help="names, with commas between them (all)")
    parser.add_argument("--ranks", type=int, default=2)
    add_device(parser)
    add_cluster(parser)
    parser.add_argument("--frames", type=int, default=500, help="of each simulated sample (500)")
    parser.add_argument("--passes", type=int, default=20, help="of refinement over the recorded scan (20)")
    parser.add_argument("--epochs", type=float, default=8, help="passes over each task's frames (8)")
    parser.add_argument("--batch", type=int, default=8, help="new frames per rank and step (8)")
    parser.add_argument("--candidates", type=int, default=4, help="of them offered to the buffer (4)")
    parser.add_argument("--representatives", type=int, default=12, help="stored frames in a step (12)")
    parser.add_argument("--buffer", type=float, default=0.2, help="share of all frames that is stored (0.2)")
    parser.add_argument("--width", type=int, default=16, help="of the network (16)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    unknown = set(options.strategies.split(",")) - set(fitting)
    if unknown:
        parser.error(f"found strategies {sorted(unknown)}, expected some of {', '.join(fitting)}")
    return options
