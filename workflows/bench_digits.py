"""Rehearsal on handwritten digits beside a plain implementation of the same methods, which is written out below.

    steering run workflows/bench_digits.py [--seeds 20]

scikit-learn's digits (8 x 8 pixels, divided by 16): the first 1,200 to train on, the rest to test. Five tasks of two
classes each come one after the other, each sample once; the accuracy is that on all ten classes at the end. ER, ER-ACE,
DER and DER++ run through `Loop`, and through `reference`, with the same first weights and the same order of samples.
What is drawn and kept is random in both, so their difference is judged over seeds, by its standard error.
"""

import argparse
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from steering.learning import Loop, TrainerSettings
from steering.learning.buffer import BOOKKEEPING
from steering.learning.strategies import DER, ER, ERACE, DERpp
from steering.ptychography.device import add_device
from steering.view.pictures import COLOURS, figure, png, styled

if TYPE_CHECKING:
    from steering.runner.folder import RunFolder

TRAIN, CLASSES, TASKS = 1200, 10, 5
BATCH, STORED = 16, 191
RATE, ALPHA, BETA = 0.1, 0.8, 1.0
STRATEGIES = {"er": ER, "er_ace": ERACE, "der": DER, "derpp": DERpp}


def read_digits() -> tuple[Tensor, Tensor]:
    """Pixels float32 (n, 64) between 0 and 1, labels int64 (n,)."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 (the test extra)

    digits = load_digits()
    return torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target).long()


def make_network(seed: int) -> nn.Module:
    """The network with its first weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, CLASSES))


def order_of(label: Tensor, seed: int) -> Tensor:
    """The order of the samples to train on, int64: task after task, at random within each."""
    mixed = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(seed))
    return mixed[torch.argsort(label[mixed] * TASKS // CLASSES, stable=True)]


def reference(method: str, seed: int, pixels: Tensor, label: Tensor, order: Tensor) -> nn.Module:
    """ER, ER-ACE, DER and DER++ as in their papers, on one process, with nothing of this library."""
    network, rng = make_network(seed), np.random.default_rng(seed)
    optimiser = torch.optim.SGD(network.parameters(), RATE)
    kept_x, kept_y = torch.zeros(STORED, 64), torch.zeros(STORED, dtype=torch.int64)
    kept_z = torch.zeros(STORED, CLASSES)
    seen = 0
    for new in order.split(BATCH):
        stored = min(seen, STORED)
        drawn = torch.from_numpy(rng.permutation(stored)[:BATCH])
        x, y = pixels[new], label[new]
        z = network(torch.cat([x, kept_x[drawn]]))
        old_z = z[len(new) :]
        if method == "er":
            loss = cross_entropy(z, torch.cat([y, kept_y[drawn]]))
        elif method == "er_ace":
            among = y.unique()  # the only classes that compete for the new samples
            loss = cross_entropy(z[: len(new), among], torch.searchsorted(among, y))
            if stored:
                loss = loss + cross_entropy(old_z, kept_y[drawn])
        else:
            loss = cross_entropy(z[: len(new)], y)
            if stored:
                loss = loss + ALPHA * mse_loss(old_z, kept_z[drawn])
            if stored and method == "derpp":
                loss = loss + BETA * cross_entropy(old_z, kept_y[drawn])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for i in range(len(new)):  # reservoir sampling
            slot = seen if seen < STORED else int(rng.integers(seen + 1))
            seen += 1
            if slot < STORED:
                kept_x[slot], kept_y[slot], kept_z[slot] = x[i], y[i], z[i].detach()
    return network


class Digits:
    """Pixels in, logits out; cross entropy."""

    names = ("logits",)

    def outputs(self, network: nn.Module, fields: dict[str, Tensor]) -> tuple[Tensor]:
        """(logits,), float32 (n, 10)."""
        return (network(fields["pixels"]),)

    def error(self, outputs: tuple[Tensor], fields: dict[str, Tensor]) -> Tensor:
        """(n,) cross entropy in nats."""
        return cross_entropy(outputs[0], fields["label"], reduction="none")

    def error_among_own(self, outputs: tuple[Tensor], fields: dict[str, Tensor]) -> Tensor:
        """(n,) cross entropy in nats over the classes of these samples."""
        among = fields["label"].unique()
        return cross_entropy(outputs[0][:, among], torch.searchsorted(among, fields["label"]), reduction="none")

    def distance(self, outputs: tuple[Tensor], stored: tuple[Tensor]) -> Tensor:
        """(n,) mean squared difference of the logits."""
        return (outputs[0] - stored[0]).square().mean(1)


def through_loop(method: str, seed: int, pixels: Tensor, label: Tensor, order: Tensor, device: str) -> nn.Module:
    """The same by this library."""
    network, weights = make_network(seed), {"der": {"alpha": ALPHA}, "derpp": {"alpha": ALPHA, "beta": BETA}}
    # pixels, label, stratum, logits
    sample = 64 * 4 + 8 + 8 + BOOKKEEPING + (4 * CLASSES if method.startswith("der") else 0)
    settings = TrainerSettings(
        batch=BATCH,
        candidates=BATCH,
        representatives=BATCH,
        buffer_bytes=STORED * sample,
        optimiser="sgd",
        learning_rate=RATE,
        weight_decay=0.0,
        clip_norm=None,
        seed=seed,
        device=device,
    )
    loop = Loop(network, STRATEGIES[method](Digits(), **weights.get(method, {})), settings)
    loop.connect(None)
    loop.prepare({"pixels": pixels[0], "label": label[0], "stratum": label[0]})

    def load(n: int, out: dict[str, Tensor]) -> None:
        new = order[n * loop.steps : n * (loop.steps + 1)]
        out["pixels"][:n], out["label"][:n], out["stratum"][:n] = pixels[new], label[new], label[new]

    loop.run(TRAIN // BATCH, load)
    if loop.buffer.capacity != STORED:
        raise RuntimeError(f"found room for {loop.buffer.capacity} samples, expected {STORED}: the layout has changed")
    return network.cpu()


@torch.no_grad()
def accuracy(network: nn.Module, pixels: Tensor, label: Tensor) -> float:
    """Percent of the test samples, of all classes, that are recognised."""
    return 100 * float((network(pixels[TRAIN:]).argmax(1) == label[TRAIN:]).float().mean())


def summed_up(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, Any]:
    """The figures: mean accuracies in percent, and the paired difference to the reference with its standard error."""
    found: dict[str, Any] = {
        f"{method}_over_er": statistics.mean(ours[method]) - statistics.mean(ours["er"])
        for method in ("er_ace", "derpp")
    }
    for method in STRATEGIES:
        difference = [a - b for a, b in zip(ours[method], theirs[method], strict=True)]
        mean, error = statistics.mean(difference), statistics.stdev(difference) / len(difference) ** 0.5
        found[method] = {
            "accuracy": statistics.mean(ours[method]),
            "reference": statistics.mean(theirs[method]),
            "difference": mean,
            "standard_error": error,
            "difference_in_standard_errors": mean / error if error else 0.0,
            "by_seed": {"accuracy": ours[method], "reference": theirs[method]},
        }
    return found


@styled
def digits_picture(figures: dict[str, Any]) -> bytes:
    """Accuracy by the library over that by the reference, a point for each seed."""
    drawing, axes = figure(1, 1, height=4.2)
    ax = axes.ravel()[0]
    for colour, method in zip(COLOURS, STRATEGIES, strict=False):
        seeds = figures[method]["by_seed"]
        ax.plot(seeds["reference"], seeds["accuracy"], "o", markersize=5, color=colour, label=method)
        ax.plot(figures[method]["reference"], figures[method]["accuracy"], "+", markersize=16, color=colour)
    ax.axline((20, 20), slope=1, color="0.6", linewidth=1)
    ax.set_xlabel("accuracy of the reference (%)")
    ax.set_ylabel("accuracy of the library (%)")
    ax.legend(title="+ mean")
    return png(drawing)


def main(folder: "RunFolder", arguments: list[str]) -> None:
    """Train every method by both implementations with every seed, and write the figures."""
    parser = argparse.ArgumentParser(prog="bench_digits.py", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20, help="2 or more (20)")
    add_device(parser)
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"found --seeds {options.seeds}, expected 2 or more")
    torch.set_num_threads(1)
    pixels, label = read_digits()
    ours: dict[str, list[float]] = {method: [] for method in STRATEGIES}
    theirs: dict[str, list[float]] = {method: [] for method in STRATEGIES}
    for seed in range(options.seeds):
        order = order_of(label, seed)
        for method in STRATEGIES:
            network = through_loop(method, seed, pixels, label, order, options.device)
            ours[method].append(accuracy(network, pixels, label))
            theirs[method].append(accuracy(reference(method, seed, pixels, label, order), pixels, label))
    figures = summed_up(ours, theirs)
    folder.write_summary({"seeds": options.seeds, **figures})
    folder.write_file("accuracy.png", digits_picture(figures))
    for method in STRATEGIES:
        one = figures[method]
        print(f"{method:6} {one['accuracy']:5.1f} %, reference {one['reference']:5.1f} %", end=", ")
        print(f"difference {one['difference']:+.2f} +- {one['standard_error']:.2f}")
