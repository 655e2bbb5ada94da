"""How the exchange of representatives scales: measured on 1 to 8 ranks here, projected to 1,024 on a stated network.

    steering run workflows/bench_scaling.py [--ranks 1,2,4,8] [--steps 60] [--latency-us 2] [--bandwidth-gb-s 25] ...

Measured: the step of a small classifier with rehearsal, and the exchange by itself, on ranks that share this machine's
cores; and the time in which a rank computes the plan of a step, for any number of ranks, which needs no network.
Projected: a step's exchange on the stated network, as messages x latency + bytes / bandwidth + plan. The same form is
fitted to the measurements here, to show how well it describes them.
"""

import argparse
import os
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from pictures.scaling import scaling_picture
from steering.clusters import add_cluster, cluster
from steering.learning import Classification, Loop, Place, TrainerSettings
from steering.learning.buffer import BOOKKEEPING
from steering.learning.exchange import Exchange
from steering.learning.sampling import StepRNG, draw
from steering.learning.strategies import ER
from steering.runner import RunFolder, on_ranks

IMAGE = (3, 32, 32)
SAMPLE = int(np.prod(IMAGE)) + 2 * 8  # image, label, stratum
MANY = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
HEADER = 8 * (5 + 3 * 16)  # the part of every message about fills, in bytes


def measure(place: Place, steps: int, r: int) -> dict[str, float]:
    """Median times of a step and of an exchange on this rank, in ms."""
    torch.set_num_threads(1)  # ranks share this machine's cores
    group = place.join(device="cpu")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(IMAGE)), 64), nn.ReLU(), nn.Linear(64, 10))
    settings = TrainerSettings(batch=56, candidates=14, representatives=r, buffer_bytes=2000 * (SAMPLE + BOOKKEEPING))
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
            f"exchange_{size}_ms": 1e3 * statistics.median(alone(Exchange(loop.buffer, group, size), steps, size))
            for size in sizes(r)
        },
    }


def sizes(r: int) -> list[int]:
    """Representatives per step with which the exchange is measured by itself; the first is that of the step."""
    return [r, 8 * r, 32 * r]


def alone(exchange: Exchange, steps: int, r: int) -> list[float]:
    """Seconds of each exchange without training beside it."""
    out = {"image": torch.zeros(r, *IMAGE, dtype=torch.uint8), "label": torch.zeros(r, dtype=torch.int64)}
    times = []
    for step in range(steps + 10):
        begun = time.perf_counter()
        exchange.start(step)
        exchange.finish(out)
        times.append(time.perf_counter() - begun)
    return times[10:]


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


def sent_bytes(ranks: int, r: int) -> float:
    """Bytes that a rank sends in a step on average: a header to each other rank, and the samples that they draw."""
    return (ranks - 1) * (HEADER + r * SAMPLE / ranks)


def fit(measured: dict[str, dict[str, float]], r: int) -> dict[str, Any]:
    """The exchange as fixed + messages x latency + bytes / bandwidth, none below 0, fitted to what was measured.

    Ranks that share cores do one another's work in turn: times on n ranks are divided by what they share.
    """
    from scipy.optimize import nnls  # noqa: PLC0415 (comes with scikit-image)

    cases = [(int(n), size) for n in measured for size in sizes(r)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    matrix = np.array([[1.0, messages(n), sent_bytes(n, size)] for n, size in cases])
    found = np.array([measured[str(n)][f"exchange_{size}_ms"] / max(1.0, n / cores) for n, size in cases])
    scale = matrix.max(0) + 1e-12
    solution, rest = nnls(matrix / scale, found)
    fixed, latency, per_byte = (solution / scale).tolist()
    fitted = matrix @ (solution / scale)
    return {
        "exchange_ms": {
            str(n): float(value * max(1.0, n / cores))
            for (n, size), value in zip(cases, fitted, strict=True)
            if size == r
        },
        "fixed_ms": fixed,
        "latency_us": 1e3 * latency,
        "bandwidth_gb_s": 1e-6 / per_byte if per_byte else float("inf"),
        "residual_ms": float(rest) / len(cases) ** 0.5,
    }


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Measure, fit, project, and write each of these separately."""
    options = _options(arguments)
    r = options.representatives
    measured: dict[str, dict[str, float]] = {}
    for ranks in (int(n) for n in options.ranks.split(",")):
        with cluster(options.cluster, ranks=ranks, folder=folder.path, insecure=options.insecure) as client:
            by_rank = on_ranks(client, measure, options.steps, r, ranks=ranks)
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
        network_ms = messages(ranks) * options.latency_us / 1e3 + sent_bytes(ranks, r) / options.bandwidth_gb_s / 1e6
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
    figures = {
        "measured": measured,
        "measured_plan_ms": plan,
        "fitted": fit(measured, r),
        "stated_network": stated,
        "projected": projected,
    }
    folder.write_summary(figures)
    folder.write_file("scaling.png", scaling_picture(figures, {n: network(n, options) for n in MANY}))


def network(ranks: int, options: argparse.Namespace) -> float:
    """Projected milliseconds on the stated network, without the plan."""
    sent = sent_bytes(ranks, options.representatives)
    return messages(ranks) * options.latency_us / 1e3 + sent / options.bandwidth_gb_s / 1e6


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_scaling.py", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", default="1,2,4,8", help="numbers of ranks to measure here (1,2,4,8)")
    add_cluster(parser)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--representatives", type=int, default=7)
    parser.add_argument("--latency-us", type=float, default=2.0, help="of a message on the stated network (2)")
    parser.add_argument("--bandwidth-gb-s", type=float, default=25.0, help="of a rank's link in GB/s (25: 200 Gbit/s)")
    parser.add_argument("--step-ms", type=float, default=100.0, help="a training step there, for the share (100)")
    return parser.parse_args(arguments)
