"""How the exchange of representatives scales: measured on 1 to 8 ranks here, projected to 1,024 on a stated network.

    steering run workflows/bench_scaling.py [--ranks 1,2,4,8] [--steps 60] [--latency-us 2] [--bandwidth-gb-s 25] ...
    steering run workflows/bench_scaling.py --runs runs/on-8,runs/on-64,runs/on-128

Measured: the step of a small classifier with rehearsal, and the exchange by itself, on ranks that share this machine's
cores; and the time in which a rank computes the plan of a step, for any number of ranks, which needs no network.
Projected: a step's exchange on the stated network, as messages x latency + bytes / bandwidth + plan. The same form is
fitted to the measurements here, to show how well it describes them.

Runs of class_incremental.py, on whatever cluster, add what they measured: each strategy that rehearses has the exchange
by itself, its step, and what of the exchange it waited for. Beside each stands the projection for its number of ranks
and bytes; to three or more different points the model is fitted by themselves.
"""

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from measures.exchange import exchange_seconds
from pictures.scaling import scaling_picture
from steering.clusters import add_cluster, cluster
from steering.learning import Classification, Loop, Place, TrainerSettings
from steering.learning.buffer import BOOKKEEPING
from steering.learning.exchange import Exchange
from steering.learning.sampling import StepRNG, draw
from steering.learning.strategies import ER
from steering.ptychography.device import add_device, find_device
from steering.runner import RunFolder, on_ranks

IMAGE = (3, 32, 32)
SAMPLE = int(np.prod(IMAGE)) + 2 * 8  # image, label, stratum
MANY = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
HEADER = 8 * (5 + 3 * 16)  # the part of every message about fills, in bytes


def measure(place: Place, steps: int, r: int, device: str) -> dict[str, float]:
    """Median times of a step and of an exchange on this rank, in ms."""
    torch.set_num_threads(1)  # ranks share this machine's cores
    there = find_device(device, local_rank=place.rank)
    group = place.join(device=there)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(IMAGE)), 64), nn.ReLU(), nn.Linear(64, 10))
    budget = 2000 * (SAMPLE + BOOKKEEPING)
    settings = TrainerSettings(batch=56, candidates=14, representatives=r, buffer_bytes=budget, device=device)
    objective = Classification(mean=[0.5] * 3, std=[0.25] * 3)
    loop = Loop(network, ER(objective), settings, rank=place.rank)
    loop.connect(group)
    rng = np.random.default_rng(place.rank)
    images = torch.from_numpy(rng.integers(0, 256, (560, *IMAGE), dtype=np.uint8))
    label = torch.from_numpy(rng.integers(0, 10, 560))

    def load(n: int, out: dict[str, torch.Tensor]) -> None:
        first = int(rng.integers(0, 560 - n))
        out["image"][:n], out["label"][:n] = images[first : first + n], label[first : first + n]
        out["stratum"][:n] = out["label"][:n]

    loop.prepare({"image": images[0], "label": label[0], "stratum": label[0]})
    loop.run(20, load)
    times, waits = [], []
    for _ in range(steps):
        begun = time.perf_counter()
        tally = loop.run(1, load)
        times.append(time.perf_counter() - begun)
        waits += tally.waits
    loop.disconnect()
    return {
        "step_ms": 1e3 * statistics.median(times),
        "exposed_wait_ms": 1e3 * statistics.median(waits),
        # Several sizes, to separate the cost of messages from that of bytes.
        **{
            f"exchange_{size}_ms": 1e3
            * statistics.median(
                exchange_seconds(Exchange(loop.buffer, group, size, device=there), steps, room(size, there))
            )
            for size in sizes(r)
        },
    }


def sizes(r: int) -> list[int]:
    """Representatives per step with which the exchange is measured by itself; the first is that of the step."""
    return [r, 8 * r, 32 * r]


def room(r: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What an exchange writes."""
    image, label = torch.zeros(r, *IMAGE, dtype=torch.uint8), torch.zeros(r, dtype=torch.int64)
    return {"image": image.to(device), "label": label.to(device)}


def plan_ms(ranks: int, r: int, repeats: int = 15) -> float:
    """Median time in which a rank computes the draws of all ranks, in ms."""
    counts, step_rng, times = np.full((ranks, 10), 200), StepRNG(0), []
    for step in range(repeats):
        begun = time.perf_counter()
        draw(counts, counts, r, step_rng.of_step(step))
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)


def messages(ranks: int) -> int:
    """Messages that a rank sends in a step: one to each other rank."""
    return ranks - 1


def sent_bytes(ranks: int, r: int, sample: float = SAMPLE) -> float:
    """Bytes that a rank sends in a step on average: a header to each other rank, and the samples that they draw."""
    return (ranks - 1) * (HEADER + r * sample / ranks)


@dataclass(frozen=True)
class Point:
    """A measured exchange: what was sent, how long it took, and how many ranks did one another's work in turn."""

    ranks: int
    bytes: float
    ms: float
    shared: float


def points_here(measured: dict[str, dict[str, float]], r: int) -> list[Point]:
    """What was measured here: ranks that share cores do one another's work in turn."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [
        Point(int(n), sent_bytes(int(n), size), values[f"exchange_{size}_ms"], max(1.0, int(n) / cores))
        for n, values in measured.items()
        for size in sizes(r)
    ]


def fit(points: list[Point]) -> dict[str, Any]:
    """The exchange as fixed + messages x latency + bytes / bandwidth, none below 0, fitted to what was measured.

    Ranks that share cores do one another's work in turn: their times are divided by how many share one.
    """
    from scipy.optimize import nnls  # noqa: PLC0415 (comes with scikit-image)

    matrix = np.array([[1.0, messages(one.ranks), one.bytes] for one in points])
    shared = np.array([one.shared for one in points])
    scale = matrix.max(0) + 1e-12
    solution, rest = nnls(matrix / scale, np.array([one.ms for one in points]) / shared)
    fixed, latency, per_byte = (solution / scale).tolist()
    return {
        "points_ms": (matrix @ (solution / scale) * shared).tolist(),
        "fixed_ms": fixed,
        "latency_us": 1e3 * latency,
        "bandwidth_gb_s": 1e-6 / per_byte if per_byte else float("inf"),
        "residual_ms": float(rest) / len(points) ** 0.5,
    }


def read_runs(paths: list[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """What runs of class_incremental.py measured, by run and strategy, with the projection beside it.

    Raises ValueError for a folder that holds no such run.
    """
    found = []
    for path in paths:
        summary = RunFolder(path).summary()
        strategies = {k: v for k, v in (summary.get("strategies") or {}).items() if v.get("exchange_ms")}
        if not strategies or "ranks_per_core" not in summary:
            raise ValueError(f"{path}: found no strategy that rehearsed, expected a run of class_incremental.py")
        ranks, r = summary["ranks"], summary["representatives"]
        for name, figures in strategies.items():
            sent = sent_bytes(ranks, r, figures["sample_bytes"])
            found.append(
                {
                    "run": str(path),
                    "strategy": name,
                    "ranks": ranks,
                    "ranks_per_core": summary["ranks_per_core"],
                    "messages": messages(ranks),
                    "bytes": sent,
                    "exchange_ms": figures["exchange_ms"],
                    "step_ms": 1e3 * figures["runtime_s"] / figures["steps"],
                    "exposed_wait_ms": 1e3 * figures["seconds"]["wait"] / figures["steps"],
                    "samples_per_s": figures["samples_per_s"],
                    "projected_ms": network(ranks, sent, options) + plan_ms(ranks, r),
                }
            )
    return found


def fit_runs(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The model fitted to the points of runs; None where they are too few to say what messages and bytes cost."""
    points = [Point(one["ranks"], one["bytes"], one["exchange_ms"], one["ranks_per_core"]) for one in runs]
    if len({(one.ranks, one.bytes) for one in points}) < 3:
        return None
    return fit(points)


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Measure, fit, project, and write each of these separately."""
    options = _options(arguments)
    r = options.representatives
    runs = read_runs(options.runs, options)  # what is wrong with one is said at once
    measured: dict[str, dict[str, float]] = {}
    for ranks in (int(n) for n in options.ranks.split(",")):
        with cluster(options.cluster, ranks=ranks, folder=folder.path, insecure=options.insecure) as client:
            by_rank = on_ranks(client, measure, options.steps, r, options.device, ranks=ranks)
        measured[str(ranks)] = {
            **{name: statistics.median(one[name] for one in by_rank) for name in by_rank[0]},
            "exchange_ms": statistics.median(one[f"exchange_{r}_ms"] for one in by_rank),
            "messages": messages(ranks),
            "bytes": sent_bytes(ranks, r),
        }
        print(f"{ranks} ranks: step {measured[str(ranks)]['step_ms']:.2f} ms", end=", ")
        print(f"exchange alone {measured[str(ranks)]['exchange_ms']:.2f} ms", flush=True)
    plan = {str(n): plan_ms(n, r) for n in MANY}
    projected = {}
    for ranks in (128, 1024):
        network_ms = network(ranks, sent_bytes(ranks, r), options)
        whole = network_ms + plan[str(ranks)]
        projected[str(ranks)] = {
            "network_ms": network_ms,
            "plan_ms": plan[str(ranks)],
            "exchange_ms": whole,
            "share_of_step": whole / options.step_ms,
        }
    stated = {
        "latency_us": options.latency_us,
        "bandwidth_gb_s": options.bandwidth_gb_s,
        "step_ms": options.step_ms,
        "representatives": r,
        "sample_bytes": SAMPLE,
    }
    fitted = fit(points_here(measured, r))
    of_steps = fitted.pop("points_ms")[:: len(sizes(r))]
    figures = {
        "measured": measured,
        "measured_plan_ms": plan,
        "fitted": {"exchange_ms": dict(zip(measured, of_steps, strict=True)), **fitted},
        **({"runs": runs, "fitted_to_runs": fit_runs(runs)} if runs else {}),
        "stated_network": stated,
        "projected": projected,
    }
    if runs and figures["fitted_to_runs"] is None:
        print("the model is not fitted to the runs: it needs three of different numbers of ranks or bytes")
    folder.write_summary(figures)
    folder.write_file("scaling.png", scaling_picture(figures, {n: network(n, sent_bytes(n, r), options) for n in MANY}))


def network(ranks: int, sent: float, options: argparse.Namespace) -> float:
    """Projected milliseconds on the stated network, without the plan; sent: bytes that a rank sends."""
    return messages(ranks) * options.latency_us / 1e3 + sent / options.bandwidth_gb_s / 1e6


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_scaling.py", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", default="1,2,4,8", help="numbers of ranks to measure here (1,2,4,8)")
    add_cluster(parser)
    text = "folders of runs of class_incremental.py, with commas between them, whose points are added"
    parser.add_argument("--runs", default=[], type=lambda text: [Path(one) for one in text.split(",")], help=text)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--representatives", type=int, default=7)
    parser.add_argument("--latency-us", type=float, default=2.0, help="of a message on the stated network (2)")
    parser.add_argument("--bandwidth-gb-s", type=float, default=25.0, help="of a rank's link in GB/s (25: 200 Gbit/s)")
    parser.add_argument("--step-ms", type=float, default=100.0, help="a training step there, for the share (100)")
    add_device(parser)
    return parser.parse_args(arguments)
