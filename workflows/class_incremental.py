"""The benchmark of learning without forgetting: classes that come in tasks, every strategy in turn.

    steering run workflows/class_incremental.py [--strategies er,derpp] [--ranks 2] [--epochs 4] [--seeds 3] ...
    steering run workflows/class_incremental.py --data FOLDER --ranks 128 --cluster slurm:SITE.toml

A ResNet sees the classes of one task after the other. After each task it is tested on all classes so far, without the
task of an image as an input. `incremental` and `from_scratch` are the bounds.

The first line trains on CIFAR-100, from cifar100/ of the folder that the environment variable STEERING_DATA names. The
second one, on a folder with train/CLASS and val/CLASS of JPEG or PNG files, has the settings of the paper (Bouvier et
al., FGCS 2024, DOI 10.1016/j.future.2024.07.016): with ImageNet it repeats its figure. Every setting may be changed.
A strategy is trained in one piece: the site's walltime must hold one. Those that have ended are in summary.json.
"""

import argparse
import math
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from classes.folder import find_images
from classes.images import Images, read_cifar
from classes.networks import Make, checked, maker
from classes.schedule import MOST, Schedule
from measures.exchange import exchange_seconds
from pictures.learning import accuracy_picture
from steering import (
    STRATEGIES,
    Classification,
    Loop,
    Place,
    RunFolder,
    Tally,
    TrainerSettings,
    add_cluster,
    cluster,
    on_ranks,
)
from steering.learning.buffer import BOOKKEEPING
from steering.learning.epochs import Epochs
from steering.learning.exchange import Exchange
from steering.ptychography.device import add_device, describe_device, find_device

# What is not said is this: on CIFAR-100, and, as in the paper, on a folder of images.
CIFAR = {
    **{"network": "resnet18", "width": 16, "size": 32, "epochs": 4.0, "batch": 56, "candidates": 14},
    **{"representatives": 20, "buffer": 0.2, "learning_rate": 0.05, "weight_decay": 5e-4, "schedule": "cosine"},
    "clip": 1.0,
}
PAPER = {
    **{"network": "resnet50", "width": 64, "size": 224, "epochs": 30.0, "batch": 56, "candidates": 14},
    **{"representatives": 7, "buffer": 0.3, "learning_rate": 0.0125, "weight_decay": 5e-5, "schedule": "paper"},
    "clip": 0.0,
}


def learn(
    place: Place, images: Images, make: Make, name: str, options: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Train through all tasks on this rank. Returns the figures of the strategy, the same on every rank."""
    torch.manual_seed(seed)
    classes = len(images.names)
    network = checked(make(classes), classes, images.shape).to(memory_format=torch.channels_last)
    start = {key: value.clone() for key, value in network.state_dict().items()}
    objective = Classification(mean=images.mean, std=images.std, shift=images.shift)
    strategy = STRATEGIES[name](objective)
    task_of = images.label * options.tasks // classes
    pools = [
        torch.nonzero(task_of <= task if strategy.restarts else task_of == task).ravel()
        for task in range(options.tasks)
    ]
    steps = [max(1, math.ceil(options.epochs * len(pool) / (options.batch * place.ranks))) for pool in pools]
    settings = _settings(options, images, name, seed, place.ranks, Schedule(steps, place.ranks, options.schedule))
    loop = Loop(network, strategy, settings, rank=place.rank)
    group = place.join(device=loop.device)
    loop.connect(group)
    # Ranks draw their own augmentations; weights, made above, are alike.
    torch.manual_seed(seed + 1 + place.rank)
    total, accuracies, seconds = Tally(), [], 0.0
    for task, pool in enumerate(pools):
        if strategy.restarts:
            network.load_state_dict(start)
            loop.optimiser.state.clear()
        begun = time.perf_counter()
        total += train(loop, images, pool, place, steps[task])
        seconds += time.perf_counter() - begun
        accuracies.append(test(loop, images, math.ceil(classes * (task + 1) / options.tasks), place))
    return {
        "top1_final": accuracies[-1][0],
        "top5_final": accuracies[-1][1],
        "top1_after_task": [top1 for top1, _ in accuracies],
        "top5_after_task": [top5 for _, top5 in accuracies],
        "runtime_s": seconds,
        "seconds": dict(total.seconds),
        "steps": loop.steps,
        "samples_per_s": loop.steps * options.batch * place.ranks / seconds,
        "representatives": total.representatives,
        "remote": total.remote,
        "stored": len(loop.buffer),
        "buffer_bytes": _over_ranks(loop.buffer.nbytes),
        "unreadable": _over_ranks(len(images.unreadable)),
        **(_exchange(loop, group) if strategy.rehearses else {}),
    }


def _settings(
    options: argparse.Namespace, images: Images, name: str, seed: int, ranks: int, schedule: Schedule
) -> TrainerSettings:
    sample = math.prod(images.shape) + 2 * 8 + BOOKKEEPING  # image, label, stratum
    sample += 4 * len(images.names) if name.startswith("der") else 0
    gpu = find_device(options.device).type == "cuda"
    return TrainerSettings(
        batch=options.batch,
        candidates=options.candidates,
        representatives=options.representatives,
        buffer_bytes=math.ceil(options.buffer * len(images.label) / ranks) * sample,
        precision=options.precision if options.precision != "auto" else "bfloat16" if gpu else "float32",
        optimiser="sgd",
        learning_rate=options.learning_rate,
        momentum=0.9,
        weight_decay=options.weight_decay,
        clip_norm=options.clip or None,
        schedule=schedule,
        seed=seed,
        device=options.device,
    )


def train(loop: Loop, images: Images, pool: Tensor, place: Place, steps: int) -> Tally:
    """So many steps over the images of the pool."""
    epochs = Epochs(len(pool), seed=loop.settings.seed, rank=place.rank, ranks=place.ranks)
    batch, label = loop.settings.batch, torch.tensor(0)
    loop.network.train()
    loop.prepare({"image": torch.zeros(images.shape, dtype=torch.uint8), "label": label, "stratum": label})
    with images.loading(pool, epochs, batch, seed=loop.steps) as load:
        return loop.run(steps, load)


@torch.no_grad()
def test(loop: Loop, images: Images, classes: int, place: Place) -> tuple[float, float]:
    """(top-1, top-5) in percent on all test images of the first classes, tested by all ranks together."""
    network, objective = loop.network, loop.strategy.objective
    network.eval()
    for buffer in network.buffers():
        if buffer.is_floating_point():  # each rank's running means saw its own images
            dist.all_reduce(buffer)
            buffer.div_(place.ranks)
    mine = torch.nonzero(images.test_label < classes).ravel()[place.rank :: place.ranks]
    right = torch.zeros(3)
    for image, label in images.testing(mine, 250):
        with torch.autocast(loop.device.type, torch.bfloat16, enabled=loop.settings.precision == "bfloat16"):
            (logits,) = objective.outputs(network, {"image": image.to(loop.device)})
        hit = logits.topk(min(5, logits.shape[1])).indices.cpu() == label.cpu()[:, None]
        right += torch.tensor([hit[:, 0].sum(), hit.sum(), len(label)])
    first, five, count = (_over_ranks(value) for value in right.tolist())
    return 100 * first / count, 100 * five / count


def _over_ranks(value: float) -> float:
    """The sum over all ranks."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def _exchange(loop: Loop, group: Any) -> dict[str, float]:
    """The exchange by itself, on these ranks and with these samples, for bench_scaling.py."""
    loop.disconnect()
    r, layout = loop.settings.representatives, loop.buffer.layout
    if layout is None:  # nothing was offered
        return {}
    out = {name: torch.zeros((r, *shape), dtype=dtype, device=loop.device) for name, shape, dtype in layout.fields}
    times = exchange_seconds(Exchange(loop.buffer, group, r, device=loop.device), 30, out)
    return {"exchange_ms": 1e3 * statistics.median(times), "sample_bytes": sum(layout.row_bytes.values())}


def whereabouts(place: Place, device: str) -> tuple[str, int, str]:
    """The host of a rank, how many cores it has for its ranks, and what computes there."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return socket.gethostname(), cores, describe_device(find_device(device, local_rank=place.rank))


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Run every strategy, one after the other, and write its figures as soon as it has ended."""
    options = _options(arguments)
    images = read(options)
    print(f"{len(images.label)} images, {len(images.names)} classes, {options.tasks} tasks, {options.network}")
    by_seed: dict[str, dict[str, Any]] = {}
    make = maker(options.network, width=options.width, size=images.shape[-1])
    with cluster(options.cluster, ranks=options.ranks, folder=folder.path, insecure=options.insecure) as client:
        hosts = on_ranks(client, whereabouts, options.device, ranks=options.ranks)
        folder.write_summary(
            {
                "ranks": options.ranks,
                "batch": options.batch,
                "representatives": options.representatives,
                "device": hosts[0][2],
                "ranks_per_core": max(1.0, *(sum(h == host for h, _, _ in hosts) / cores for host, cores, _ in hosts)),
                "settings": vars(options) | {"data": str(options.data) if options.data else "CIFAR-100"},
            }
        )
        for seed in range(options.seed, options.seed + options.seeds):
            for name in options.strategies.split(","):
                found = on_ranks(client, learn, images, make, name, options, seed, ranks=options.ranks)[0]
                by_seed.setdefault(name, {})[str(seed)] = found
                figures = {kind: mean_of(list(runs.values())) for kind, runs in by_seed.items()}
                folder.write_summary({"strategies": figures, "by_seed": by_seed})
                print(f"{name:13} top-1 {found['top1_final']:5.1f}  top-5 {found['top5_final']:5.1f}", end="  ")
                print(f"{found['runtime_s']:6.0f} s  {found['samples_per_s']:7.1f} images/s", end="")
                print(f"  seed {seed}" if options.seeds > 1 else "", flush=True)
    folder.write_file("accuracy.png", accuracy_picture(figures))


def read(options: argparse.Namespace) -> Images:
    """The images that the options name. Raises where they are not there, or cannot be divided into the tasks."""
    if options.data:
        images = find_images(options.data, size=options.size, decoders=options.decoders)
    else:
        data = os.environ.get("STEERING_DATA")
        if not data:
            raise RuntimeError(
                "found no --data and no STEERING_DATA, expected a folder with train/CLASS and val/CLASS, or this "
                "environment variable to name the folder that has cifar100/"
            )
        images = read_cifar(Path(data) / "cifar100" / "cifar100_250x50.zip")
    if options.images:
        images = images.some(options.images)
    if options.tasks > len(images.names):
        raise ValueError(f"found {len(images.names)} classes for {options.tasks} tasks, expected one or more for each")
    return images


def mean_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of every figure, and the standard deviation of the accuracies where there are several."""
    mean: dict[str, Any] = {}
    for key, first in runs[0].items():
        if isinstance(first, dict):
            mean[key] = mean_of([run[key] for run in runs])
        else:
            mean[key] = np.mean([run[key] for run in runs], axis=0).tolist()
    if len(runs) > 1 and "top1_final" in mean:
        for key in ("top1_final", "top5_final"):
            mean[f"{key}_std"] = statistics.stdev(run[key] for run in runs)
    return mean


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="class_incremental.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    own = {"default": None}

    def usual(name: str) -> str:
        return f"({CIFAR[name]} on CIFAR-100, {PAPER[name]} on a folder)"

    add("--data", metavar="FOLDER", type=Path, help="with train/CLASS and val/CLASS of JPEG or PNG files (CIFAR-100)")
    add("--strategies", default=",".join(STRATEGIES), help="names, with commas between them (all)")
    add("--network", help=f"resnet18, resnet50, or module:function, called with the classes {usual('network')}")
    add("--tasks", type=int, default=4, help="that the classes are divided into, in alphabetical order (4)")
    add("--ranks", type=int, default=2)
    add_device(parser)
    add("--precision", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on a GPU")
    add_cluster(parser)
    add("--epochs", type=float, **own, help=f"passes over each task's images {usual('epochs')}")
    add("--batch", type=int, **own, help=f"new images per rank and step {usual('batch')}")
    add("--candidates", type=int, **own, help=f"of them offered to the buffer {usual('candidates')}")
    add("--representatives", type=int, **own, help=f"stored images in a step {usual('representatives')}")
    add("--buffer", type=float, **own, help=f"share of all images that is stored {usual('buffer')}")
    add("--size", type=int, **own, help=f"pixels of a side of the images that a network sees {usual('size')}")
    add("--width", type=int, **own, help=f"channels of the first stage of the own networks {usual('width')}")
    text = f"of one rank; it grows with their number, up to {MOST}"
    add("--learning-rate", type=float, **own, help=f"{text} {usual('learning_rate')}")
    add("--schedule", choices=("paper", "cosine"), help=f"of the learning rate in a task {usual('schedule')}")
    add("--weight-decay", type=float, **own, help=usual("weight_decay"))
    add("--clip", type=float, **own, help=f"norm that the gradient is clipped to; 0: never {usual('clip')}")
    add("--decoders", type=int, default=4, help="threads of each rank that decode files (4)")
    add("--images", type=int, help="of each class to train on; fewer for a quick run")
    add("--seed", type=int, default=0, help="the first of the seeds (0)")
    add("--seeds", type=int, default=1, help="runs of each strategy; the summary has their mean (1)")
    options = parser.parse_args(arguments)
    for name, value in (PAPER if options.data else CIFAR).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("seeds", "tasks", "ranks", "decoders", "size", "epochs"):
        if getattr(options, name) <= 0:
            parser.error(f"found --{name} {getattr(options, name)}, expected more than 0")
    if not options.data and options.size != CIFAR["size"]:
        parser.error(f"found --size {options.size} on CIFAR-100, expected it with --data: those images have 32 pixels")
    if not 0 < options.buffer <= 1:
        parser.error(f"found --buffer {options.buffer}, expected a share of the images, above 0 and up to 1")
    unknown = set(options.strategies.split(",")) - set(STRATEGIES)
    if unknown:
        parser.error(f"found strategies {sorted(unknown)}, expected some of {', '.join(STRATEGIES)}")
    return options
