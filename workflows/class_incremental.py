"""The benchmark of learning without forgetting: CIFAR-100 in 4 tasks of 25 classes, every strategy in turn.

    steering run workflows/class_incremental.py [--strategies er,derpp] [--ranks 2] [--epochs 4] [--seeds 3] ...

A ResNet-18 sees the classes of one task after the other. After each task it is tested on all classes so far, without
the task of an image as an input. `incremental` and `from_scratch` are the bounds. The images are those in
cifar100/ of the folder that the environment variable STEERING_DATA names.
"""

import argparse
import io
import math
import os
import statistics
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from pictures.learning import accuracy_picture
from steering import (
    STRATEGIES,
    Classification,
    Loop,
    Place,
    ResNet18,
    RunFolder,
    Tally,
    TrainerSettings,
    add_cluster,
    cluster,
    on_ranks,
)
from steering.learning.buffer import BOOKKEEPING
from steering.learning.epochs import Epochs

TASKS = 4
PIECES = 24  # of a task; the learning rate falls from one to the next


@dataclass(frozen=True)
class Images:
    """Images uint8 (n, 3, 32, 32) and labels int64 (n,), to train on and to test."""

    train: torch.Tensor
    train_label: torch.Tensor
    test: torch.Tensor
    test_label: torch.Tensor


def read_cifar(path: Path) -> Images:
    """The images of a zip file with train/<class>/*.png and test/<class>/*.png; classes in alphabetical order."""
    found: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "test": []}
    with zipfile.ZipFile(path) as file:
        for name in sorted(file.namelist()):
            if name.endswith(".png"):
                part, kind, _ = name.split("/")
                with Image.open(io.BytesIO(file.read(name))) as image:
                    found[part].append((kind, np.asarray(image.convert("RGB")).transpose(2, 0, 1)))
    kinds = sorted({kind for kind, _ in found["train"]})
    tensors = []
    for part in found.values():
        tensors.append(torch.from_numpy(np.stack([image for _, image in part])))
        tensors.append(torch.tensor([kinds.index(kind) for kind, _ in part]))
    return Images(*tensors)


def learn(place: Place, images: Images, name: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train through all tasks on this rank. Returns the figures of the strategy, the same on every rank."""
    torch.manual_seed(seed)
    classes = int(images.train_label.max()) + 1
    network = ResNet18(classes, width=options.width).to(memory_format=torch.channels_last)
    start = {key: value.clone() for key, value in network.state_dict().items()}
    objective = Classification(mean=(0.507, 0.487, 0.441), std=(0.267, 0.256, 0.276), shift=4)
    strategy = STRATEGIES[name](objective)
    sample = images.train[0].nbytes + 2 * 8 + BOOKKEEPING + (4 * classes if name.startswith("der") else 0)
    settings = TrainerSettings(
        batch=options.batch,
        candidates=options.candidates,
        representatives=options.representatives,
        buffer_bytes=math.ceil(options.buffer * len(images.train) / place.ranks) * sample,
        precision="bfloat16",
        seed=seed,
        device=options.device,
    )
    optimiser = torch.optim.SGD(network.parameters(), options.learning_rate, momentum=0.9, weight_decay=5e-4)
    loop = Loop(network, strategy, settings, rank=place.rank, optimiser=optimiser)
    loop.connect(place.join(device=loop.device))
    there = {name: value.to(loop.device) for name, value in vars(images).items() if name.startswith("test")}
    images = Images(**{**vars(images), **there})
    # Ranks draw their own augmentations; weights, made above, are alike.
    torch.manual_seed(seed + 1 + place.rank)
    total, accuracies, seconds = Tally(), [], 0.0
    for task in range(TASKS):
        label = images.train_label * TASKS // classes
        pool = torch.nonzero(label <= task if strategy.restarts else label == task).ravel()
        if strategy.restarts:
            network.load_state_dict(start)
            optimiser.state.clear()
        begun = time.perf_counter()
        total += train(loop, images, pool, place, options)
        seconds += time.perf_counter() - begun
        accuracies.append(test(network, objective, images, classes * (task + 1) // TASKS, place))
    return {
        "top1_final": accuracies[-1][0],
        "top5_final": accuracies[-1][1],
        "top1_after_task": [top1 for top1, _ in accuracies],
        "top5_after_task": [top5 for _, top5 in accuracies],
        "runtime_s": seconds,
        "seconds": dict(total.seconds),
        "representatives": total.representatives,
        "remote": total.remote,
        "stored": len(loop.buffer),
    }


def train(loop: Loop, images: Images, pool: torch.Tensor, place: Place, options: argparse.Namespace) -> Tally:
    """So many passes over the images of the pool, with a learning rate that falls to zero along a cosine."""
    epochs = Epochs(len(pool), seed=loop.settings.seed, rank=place.rank, ranks=place.ranks)

    def load(n: int, out: dict[str, torch.Tensor]) -> None:
        chosen = pool[torch.from_numpy(epochs.take(n))]
        torch.index_select(images.train, 0, chosen, out=out["image"][:n])
        torch.index_select(images.train_label, 0, chosen, out=out["label"][:n])
        out["stratum"][:n] = out["label"][:n]

    label = images.train_label[0]
    loop.network.train()
    loop.prepare({"image": images.train[0], "label": label, "stratum": label})
    steps = math.ceil(options.epochs * len(pool) / (options.batch * place.ranks))
    tally = Tally()
    for piece in range(PIECES):
        for group in loop.optimiser.param_groups:
            group["lr"] = options.learning_rate * (1 + math.cos(math.pi * piece / PIECES)) / 2
        tally += loop.run(steps * (piece + 1) // PIECES - steps * piece // PIECES, load)
    return tally


@torch.no_grad()
def test(
    network: torch.nn.Module, objective: Classification, images: Images, classes: int, place: Place
) -> tuple[float, float]:
    """(top-1, top-5) in percent on all test images of the first classes, tested by all ranks together."""
    network.eval()
    for buffer in network.buffers():
        if buffer.is_floating_point():  # each rank's running means saw its own images
            dist.all_reduce(buffer)
            buffer.div_(place.ranks)
    mine = torch.nonzero(images.test_label < classes).ravel()[place.rank :: place.ranks]
    right = torch.zeros(3)
    for part in mine.split(250):
        with torch.autocast(part.device.type, torch.bfloat16):
            (logits,) = objective.outputs(network, {"image": images.test[part]})
        hit = logits.topk(5).indices == images.test_label[part, None]
        right += torch.tensor([hit[:, 0].sum(), hit.sum(), len(part)])
    dist.all_reduce(right)
    return float(100 * right[0] / right[2]), float(100 * right[1] / right[2])


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Run every strategy, one after the other, and write its figures as soon as it has ended."""
    options = _options(arguments)
    data = os.environ.get("STEERING_DATA")
    if not data:
        raise RuntimeError("found no STEERING_DATA, expected this environment variable to name the folder of the data")
    images = read_cifar(Path(data) / "cifar100" / "cifar100_250x50.zip")
    if options.images:
        each = len(images.train) // (int(images.train_label.max()) + 1)
        chosen = torch.arange(len(images.train)) % each < options.images
        images = Images(images.train[chosen], images.train_label[chosen], images.test, images.test_label)
    print(f"{len(images.train)} images, {int(images.train_label.max()) + 1} classes, {TASKS} tasks")
    by_seed: dict[str, dict[str, Any]] = {}
    with cluster(options.cluster, ranks=options.ranks, folder=folder.path, insecure=options.insecure) as client:
        for seed in range(options.seed, options.seed + options.seeds):
            for name in options.strategies.split(","):
                found = on_ranks(client, learn, images, name, options, seed, ranks=options.ranks)[0]
                by_seed.setdefault(name, {})[str(seed)] = found
                figures = {kind: mean_of(list(runs.values())) for kind, runs in by_seed.items()}
                folder.write_summary({"strategies": figures, "by_seed": by_seed, "ranks": options.ranks})
                print(f"{name:13} top-1 {found['top1_final']:5.1f}  top-5 {found['top5_final']:5.1f}", end="  ")
                print(f"{found['runtime_s']:6.0f} s" + (f"  seed {seed}" if options.seeds > 1 else ""), flush=True)
    folder.write_file("accuracy.png", accuracy_picture(figures))


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
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="names, with commas between them (all)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda: where networks are trained (auto)")
    add_cluster(parser)
    parser.add_argument("--epochs", type=float, default=4, help="passes over each task's images (4)")
    parser.add_argument("--batch", type=int, default=56, help="new images per rank and step (56)")
    parser.add_argument("--candidates", type=int, default=14, help="of them offered to the buffer (14)")
    parser.add_argument("--representatives", type=int, default=20, help="stored images in a step (20)")
    parser.add_argument("--buffer", type=float, default=0.2, help="share of all images that is stored (0.2)")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage (16)")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--images", type=int, help="of each class to train on; fewer for a quick run")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds (0)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each strategy; the summary has their mean (1)")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"found --seeds {options.seeds}, expected 1 or more")
    unknown = set(options.strategies.split(",")) - set(STRATEGIES)
    if unknown:
        parser.error(f"found strategies {sorted(unknown)}, expected some of {', '.join(STRATEGIES)}")
    return options
