"""How fast a network learns a new material from self-made labels, and what it forgets of the samples before.

    steering run workflows/bench_recovery.py [--steps 200] [--seeds 1]

A network has learnt four samples; their frames fill its rehearsal buffer. Then a sample of another structure and
material is measured. Labels are made as a run makes them (predict, refine with rPIE, cut out, leave bad ones out), and
rehearsal continues with these weights, optimiser and buffer. For comparison, from the same start and for as many steps:
true labels, and joint training on all frames of all samples. Everything runs in one process: CPU-seconds are those of
label making and training, without the evaluations. Errors are those of held-out frames against the
truth, in radians, each patch freed of its constant phase. Recovery is (start - now) / (start - the lowest that true
labels reach); old_error_over_start is the largest evaluation until 90 % of it, old_error_over_joint compares the ends.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage import data

from measures.patches import patches_of
from pictures.recovery import recovery_picture
from steering.inference import LiveImage, ScanReader
from steering.inference.evaluate import patch_phase_error
from steering.inference.scans import frames_of
from steering.labels.make import label
from steering.learning import Labels, Loop, Reconstruction, TrainerSettings
from steering.learning.samples import Samples
from steering.learning.strategies import ER, Incremental, Strategy
from steering.models import ProbeFirst
from steering.ptychography import (
    Canvas,
    extract_patches,
    far_field_residual,
    patch_weight,
    simulate,
    zone_plate,
)
from steering.ptychography.device import add_device
from steering.records import Field, Geometry, Prediction
from steering.runner import LabelSettings, RunFolder
from steering.sources import sample

PATCH = 40
HELD_OUT = 10  # every tenth frame is never trained on
PROBE = zone_plate(64, 50.0, aperture=0.52, counts=1e5)
WEIGHT = patch_weight(PROBE, PATCH)
MASK = np.zeros((64, 64), bool)
RECOVERED = 0.9
NEW = 99  # stratum of the new sample


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Frames of one sample, and the truth: object (Y, X), patches (n, PATCH, PATCH)."""

    name: str
    object: NDArray[np.complex64]
    canvas: Canvas
    where: NDArray[np.float64]
    counts: NDArray
    patches: NDArray[np.complex64]

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """(n,)"""
        return np.arange(len(self.counts)) % HELD_OUT == 0

    def labelled(self, stratum: int) -> Labels:
        """The true labels of its frames."""
        return Labels(
            scan=self.name,
            stratum=stratum,
            frame_id=np.arange(len(self.counts)),
            counts=self.counts,
            amplitude=np.abs(self.patches),
            phase=np.angle(self.patches),
            residual=np.zeros(len(self.counts), np.float32),
            held_out=self.held_out,
            probe=None,
            mask=MASK,
        )


@dataclass
class Arm:
    """One kind of training after the shift: its cost and its errors."""

    cpu_s: list[float] = field(default_factory=lambda: [0.0])
    wall_s: list[float] = field(default_factory=lambda: [0.0])
    label_cpu_s: float = 0.0
    new: list[float] = field(default_factory=list)
    old: list[float] = field(default_factory=list)
    left_out: int = 0


def scans(options: argparse.Namespace, seed: int) -> tuple[list[Scan], Scan]:
    """The old samples and the new one, each at its own random positions, with Poisson noise."""
    rng = np.random.default_rng(seed)
    reach = 80.0
    canvas = Canvas.around(Field(-reach, reach, -reach, reach), 64)
    natural = {"camera": data.camera(), "gravel": data.gravel(), "coins": data.coins(), "grass": data.grass()}

    def scan(name: str, thing: NDArray[np.complex64], frames: int) -> Scan:
        where = rng.uniform(-reach, reach, (frames, 2))
        counts = rng.poisson(simulate(thing, PROBE, canvas, where)).astype(np.uint16)
        patches = extract_patches(thing, canvas, where, PATCH)
        return Scan(name=name, object=thing, canvas=canvas, where=where, counts=counts, patches=patches)

    size = canvas.shape[0]
    old = [
        scan(name, sample(image, phase=1.6, absorption=0.3, size=size), options.old_frames)
        for name, image in natural.items()
    ]
    return old, scan("lines", sample(lines(size, rng), phase=2.6, absorption=0.08), options.frames)


def lines(size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(size, size) of the kind of a printed circuit: bars along both axes, of two heights, 3 to 8 pixels wide."""
    image = np.zeros((size, size))
    for _ in range(round(220 * (size / 384) ** 2)):
        (y, x), wide, long = rng.integers(0, size, 2), rng.integers(3, 9), rng.integers(20, 120)
        height, width = (wide, long) if rng.random() < 0.5 else (long, wide)
        image[y : y + height, x : x + width] = rng.choice([0.5, 1.0])
    return image


def learnt(old: list[Scan], options: argparse.Namespace, seed: int) -> Loop:
    """A network trained on the old samples, its optimiser, and a buffer with some of their frames."""
    torch.manual_seed(seed)
    network = ProbeFirst(window=64, patch=PATCH, width=options.width)
    network.optics.set(PROBE, MASK)
    loop = Loop(network, ER(Reconstruction(WEIGHT)), _settings(options, seed))
    loop.connect(None)
    samples = Samples(seed=seed, keep_all=True)
    take_up(loop, samples, [scan.labelled(number) for number, scan in enumerate(old)])
    loop.run(options.old_steps, samples.take)
    return loop


def take_up(loop: Loop, samples: Samples, labels: list[Labels]) -> None:
    """Add labels to train on; newer ones replace older ones of the same frame."""
    for some in labels:
        samples.add(some)
    samples.begin(labels[-1].scan)
    loop.prepare(samples.example())


def again(loop: Loop, kind: type[Strategy], settings: TrainerSettings) -> Loop:
    """The same weights, optimiser, step and buffer in a loop of its own."""
    twin = Loop(copy.deepcopy(loop.network), kind(Reconstruction(WEIGHT)), settings)
    twin.optimiser.load_state_dict(copy.deepcopy(loop.optimiser.state_dict()))
    twin.buffer.load(loop.buffer.state())
    twin.steps = loop.steps
    twin.connect(None)
    return twin


class SelfMade:
    """The new sample's labels as the runner makes them: first from the network's image, then from the last ones."""

    def __init__(self, scan: Scan, network: torch.nn.Module, device: str) -> None:
        self.scan, self.network, self.left_out = scan, network, 0
        self.settings = LabelSettings().on(device)
        self.live: LiveImage | None = None

    def __call__(self) -> list[Labels]:
        """Labels of all frames, better each time."""
        self.live = self.live or predicted(self.network, self.scan)
        rows = np.arange(len(self.scan.counts))
        frames = frames_of(ScanReader(self.live), rows, version=0, probe=PROBE, mask=MASK)
        labels, refined, left_out = label(frames, stratum=NEW, patch=PATCH, settings=self.settings)
        self.live.show_labelled(refined, refined, frames.canvas, 0.0)
        self.left_out += left_out
        return [labels]


def predicted(network: torch.nn.Module, scan: Scan) -> LiveImage:
    """The live image of a scan, predicted by the network as it is now."""
    patches = patches_of(network, scan.counts)
    live = LiveImage(scan.name, scan.canvas, WEIGHT, Geometry(shape=MASK.shape))
    n = len(scan.counts)
    live.add(
        Prediction(
            frame_id=np.arange(n),
            scan=scan.name,
            position=scan.where,
            amplitude=np.abs(patches),
            phase=np.angle(patches),
            residual=far_field_residual(patches, scan.counts, PROBE, MASK),
            offset=live.stitch(patches, scan.where),
            model_version=np.zeros(n, np.int64),
        ),
        counts=scan.counts,
        held_out=scan.held_out,
        withheld=np.zeros(n, bool),
        acquired=np.zeros(n),
    )
    return live


def judge(network: torch.nn.Module, of: list[Scan]) -> float:
    """Mean phase error on the held-out frames of scans, radians."""
    errors = []
    for scan in of:
        patches = patches_of(network, scan.counts[scan.held_out])
        wanted = scan.patches[scan.held_out]
        errors.append(patch_phase_error(patches, wanted, WEIGHT))
    return float(np.concatenate(errors).mean())


def go_on(
    loop: Loop, labels: Callable[[], list[Labels]], old: list[Scan], new: Scan, options: argparse.Namespace
) -> Arm:
    """Round by round: new labels, training, and evaluations, during which the clocks are stopped."""
    arm = Arm(new=[judge(loop.network, [new])], old=[judge(loop.network, old)])
    per_evaluation = max(1, options.steps // (options.rounds * options.evaluations))
    samples = Samples(seed=loop.settings.seed, keep_all=True)
    for _ in range(options.rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        known = labels()
        arm.label_cpu_s += time.process_time() - cpu
        take_up(loop, samples, known)
        for _ in range(options.evaluations):
            loop.run(per_evaluation, samples.take)
            arm.cpu_s.append(arm.cpu_s[-1] + time.process_time() - cpu)
            arm.wall_s.append(arm.wall_s[-1] + time.perf_counter() - wall)
            arm.new.append(judge(loop.network, [new]))
            arm.old.append(judge(loop.network, old))
            cpu, wall = time.process_time(), time.perf_counter()
    return arm


def recovery(options: argparse.Namespace, seed: int) -> tuple[dict[str, Any], dict[str, Arm], dict[str, NDArray]]:
    """All three kinds of training after one shift: figures, arms by name, and images of the new sample."""
    old, new = scans(options, seed)
    base = learnt(old, options, seed)
    settings = _settings(options, seed)
    images = {"truth": new.object, "before": predicted(base.network, new).stitcher.image()}
    loop = again(base, ER, settings)
    make = SelfMade(new, loop.network, options.device)
    arms = {"self-made labels": go_on(loop, make, old, new, options)}
    arms["self-made labels"].left_out = make.left_out
    made = make.live.refined_labels
    images |= {
        "labels": np.where(made.covered, made.object, 0),
        "after": predicted(loop.network, new).stitcher.image(),
    }
    true = [new.labelled(NEW)]
    arms["true labels"] = go_on(again(base, ER, settings), lambda: true, old, new, options)
    both = _settings(options, seed, batch=options.batch + options.representatives, candidates=0)
    everything = [scan.labelled(number) for number, scan in enumerate([*old, new])]
    arms["joint training"] = go_on(again(base, Incremental, both), lambda: everything, old, new, options)
    return figures_of(arms), arms, images


def figures_of(arms: dict[str, Arm]) -> dict[str, Any]:
    """The figures of one shift."""
    own, true, joint = arms.values()
    recovered = recovery_of(own, true)
    there = np.flatnonzero(recovered >= RECOVERED)
    until = slice(None, int(there[0]) + 1) if len(there) else slice(None)
    return {
        "cpu_s_to_90_percent": own.cpu_s[there[0]] if len(there) else None,
        "wall_s_to_90_percent": own.wall_s[there[0]] if len(there) else None,
        "old_error_over_start": max(own.old[until]) / own.old[0],
        "old_error_over_joint": own.old[-1] / joint.old[-1],
        "recovered_at_end": float(recovered[-1]),
        "old_error_over_start_at_end": own.old[-1] / own.old[0],
        "true_labels_old_error_over_start_at_end": true.old[-1] / true.old[0],
        "new_error": {"start": own.new[0], **{name: arm.new[-1] for name, arm in arms.items()}},
        "old_error": {"start": own.old[0], **{name: arm.old[-1] for name, arm in arms.items()}},
        "cpu_s": {name: arm.cpu_s[-1] for name, arm in arms.items()},
        "label_cpu_s": own.label_cpu_s,
        "labels_left_out": own.left_out,
    }


def recovery_of(own: Arm, true: Arm) -> NDArray[np.float64]:
    """(start - now) / (start - the lowest error that true labels reach) at every evaluation."""
    return (own.new[0] - np.array(own.new)) / (own.new[0] - min(true.new[1:]))


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Measure, seed by seed, and write medians over the seeds and the picture of the first."""
    options = _options(arguments)
    torch.set_num_threads(1)
    every: list[dict[str, Any]] = []
    courses: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        figures, arms, images = recovery(options, seed)
        every.append(figures)
        courses.append({name: {"cpu_s": arm.cpu_s, "new": arm.new, "old": arm.old} for name, arm in arms.items()})
        if seed == 0:
            curves = {name: (arm.cpu_s, arm.new, arm.old) for name, arm in arms.items()}
            folder.write_file("recovery.png", recovery_picture(curves, images, figures["cpu_s_to_90_percent"]))
        folder.write_summary({**_median(every), "seeds": every, "courses": courses})
        print(
            f"seed {seed}: {figures['cpu_s_to_90_percent']} CPU-seconds to 90 %, {figures['recovered_at_end']:.2f} "
            f"at the end; old error over start {figures['old_error_over_start']:.3f}, over joint "
            f"{figures['old_error_over_joint']:.3f}",
            flush=True,
        )


def _median(every: list[dict[str, Any]]) -> dict[str, Any]:
    """Key by key; a seed that did not recover counts as never."""
    found: dict[str, Any] = {}
    for key, value in every[0].items():
        if isinstance(value, dict):
            found[key] = _median([one[key] for one in every])
        else:
            found[key] = float(np.median([np.inf if one[key] is None else one[key] for one in every]))
    return found


def _settings(options: argparse.Namespace, seed: int, **other: int) -> TrainerSettings:
    settings = {"batch": options.batch, "candidates": options.batch // 2, "representatives": options.representatives}
    return TrainerSettings(
        **{**settings, **other},
        learning_rate=options.learning_rate,
        buffer_bytes=options.buffer * 2**20,
        seed=seed,
        device=options.device,
    )


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_recovery.py", description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=600, help="of the new sample (600)")
    parser.add_argument("--old-frames", type=int, default=500, help="of each of the four old samples (500)")
    parser.add_argument("--old-steps", type=int, default=600, help="of training on the old samples (600)")
    parser.add_argument("--steps", type=int, default=240, help="of training after the shift (240)")
    parser.add_argument("--rounds", type=int, default=3, help="of label making (3)")
    parser.add_argument("--evaluations", type=int, default=4, help="of the errors in each round (4)")
    parser.add_argument("--batch", type=int, default=32, help="new frames of a step (32)")
    parser.add_argument("--representatives", type=int, default=32, help="stored frames in a step (32)")
    parser.add_argument("--buffer", type=int, default=16, help="MiB (16)")
    parser.add_argument("--width", type=int, default=24, help="of the network (24)")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    add_device(parser)
    return parser.parse_args(arguments)
