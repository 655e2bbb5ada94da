"""The cost of rehearsal over several ranks: time of a step, beside steps on as many new samples; exposed wait.

    steering run workflows/bench_overlap.py [--ranks 2] [--workload reconstruction] [--repeats 30] [--device auto]

Three loops take turns in the same processes, a few steps each: `er` (b new samples and r representatives),
`incremental_same_work` (b + r new samples) and `incremental_b` (b new samples). idle_cpu_share is the CPU time of a
rank that waits for a late one, less that of an idle worker of the same cluster, as a share of a core.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from distributed import Client
from torch import nn

from pictures.overlap import overlap_picture
from steering.clusters import add_cluster, cluster
from steering.clusters.roles import INFERENCE, addresses, workers_of
from steering.learning import Classification, Loop, Objective, Place, Reconstruction, TrainerSettings
from steering.learning.strategies import ER, Incremental, Strategy
from steering.models import ProbeFirst, ResNet18
from steering.ptychography import patch_weight, zone_plate
from steering.ptychography.device import add_device, describe_device, find_device
from steering.runner import RunFolder, on_ranks

POOL = 256  # samples that new ones are taken from
BLOCK = 4  # steps in a row of one loop
LATE_S = 4.0  # how long the last rank keeps the others waiting

Problem = tuple[nn.Module, Objective, dict[str, torch.Tensor], dict[str, int]]


def reconstruction(seed: int) -> Problem:
    """The default network with frames as a detector gives them; b = 16, r = 24."""
    rng = np.random.default_rng(seed)
    network, probe = ProbeFirst(), zone_plate(64, 50.0)
    network.optics.set(probe)
    patch = network.hyperparameters["patch"]
    samples = {
        "counts": torch.from_numpy(rng.poisson(5, (POOL, 64, 64)).astype(np.uint16)),
        "amplitude": torch.from_numpy(rng.uniform(0.5, 1, (POOL, patch, patch)).astype(np.float32)),
        "phase": torch.from_numpy(rng.uniform(-1, 1, (POOL, patch, patch)).astype(np.float32)),
        "stratum": torch.from_numpy(rng.integers(0, 4, POOL)),
    }
    settings = {"batch": 16, "candidates": 8, "representatives": 24}
    return network, Reconstruction(patch_weight(probe, patch)), samples, settings


def classification(seed: int) -> Problem:
    """A ResNet-18 of width 16 with images of 32 x 32; b = 56, r = 7."""
    rng = np.random.default_rng(seed)
    label = torch.from_numpy(rng.integers(0, 100, POOL))
    image = torch.from_numpy(rng.integers(0, 256, (POOL, 3, 32, 32), dtype=np.uint8))
    network = ResNet18(100, width=16).to(memory_format=torch.channels_last)
    objective = Classification(mean=[0.5] * 3, std=[0.25] * 3)
    settings = {"batch": 56, "candidates": 14, "representatives": 7}
    return network, objective, {"image": image, "label": label, "stratum": label.clone()}, settings


WORKLOADS = {"reconstruction": reconstruction, "classification": classification}


def measure(place: Place, workload: str, repeats: int, device: str) -> dict[str, Any]:
    """What this rank measures: seconds of each step by loop, waits, and its share of a core while it waits."""
    torch.set_num_threads(1)  # ranks share this machine's cores
    there = find_device(device, local_rank=place.rank)
    group = place.join(device=there) if place.ranks > 1 else None
    b, r = (WORKLOADS[workload](0)[3][key] for key in ("batch", "representatives"))
    loops = {
        "incremental_same_work": loop_of(place, group, workload, Incremental, device, batch=b + r, candidates=0),
        "er": loop_of(place, group, workload, ER, device),
        "incremental_b": loop_of(place, group, workload, Incremental, device),
    }
    pool = WORKLOADS[workload](place.rank)[2]
    turn = np.random.default_rng(place.rank)

    def load(n: int, out: dict[str, torch.Tensor]) -> None:
        first = int(turn.integers(0, POOL - n))
        for name, value in pool.items():
            out[name][:n] = value[first : first + n]

    times: dict[str, list[float]] = {name: [] for name in loops}
    waits: list[float] = []
    warm = min(3, repeats)  # turns that fill the buffer and warm caches
    for repeat in range(warm + repeats):
        for name, loop in loops.items():
            begun = time.perf_counter()
            tally = loop.run(BLOCK, load)
            if there.type == "cuda":
                torch.cuda.synchronize(there)
            if repeat >= warm:
                times[name].append((time.perf_counter() - begun) / BLOCK)
                waits += tally.waits if name == "er" else []
    idle_share = waiting(place) if place.ranks > 1 else 0.0
    return {"times": times, "waits": waits, "waiting_cpu_share": idle_share, "device": describe_device(there)}


def loop_of(
    place: Place, group: dist.ProcessGroup | None, workload: str, kind: type[Strategy], device: str, **settings: int
) -> Loop:
    """A loop with a network of its own, ready to run; on a GPU its buffer is there too."""
    network, objective, samples, usual = WORKLOADS[workload](0)
    storage = find_device(device, local_rank=place.rank).type
    settings = TrainerSettings(**{**usual, **settings}, buffer_bytes=2**24, device=device, buffer_device=storage)
    loop = Loop(network, kind(objective), settings, rank=place.rank)
    loop.connect(group)
    loop.prepare({name: value[0] for name, value in samples.items()})
    return loop


def waiting(place: Place) -> float:
    """Share of a core that this process uses while it waits in a collective for the last rank; 0 on that one."""
    dist.barrier()
    if place.rank == place.ranks - 1:
        time.sleep(LATE_S)
    begun, before = time.perf_counter(), time.process_time()
    total = torch.zeros(1000)
    dist.all_reduce(total)
    spent, lasted = time.process_time() - before, time.perf_counter() - begun
    return spent / lasted if lasted > LATE_S / 2 else 0.0


def idle(client: Client) -> float:
    """Share of a core that an idle worker uses: the one for inference, which has no task here."""
    [home] = addresses(workers_of(client), INFERENCE)
    worker = psutil.Process(client.run(_pid, workers=[home])[home])
    before, begun = worker.cpu_times(), time.perf_counter()
    time.sleep(2 * LATE_S)
    after, lasted = worker.cpu_times(), time.perf_counter() - begun
    return (after.user + after.system - before.user - before.system) / lasted


def _pid() -> int:
    return psutil.Process().pid


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Measure each workload and write its figures."""
    options = _options(arguments)
    figures = {}
    for workload in options.workload or WORKLOADS:
        with cluster(options.cluster, ranks=options.ranks, folder=folder.path, insecure=options.insecure) as client:
            by_rank = on_ranks(client, measure, workload, options.repeats, options.device, ranks=options.ranks)
            at_rest = idle(client)
        figures[workload] = summed_up(by_rank, at_rest)
        folder.write_summary({"ranks": options.ranks, "devices": [one["device"] for one in by_rank], **figures})
        found = figures[workload]
        print(
            f"{workload}: er {found['step_ms']['er']:.1f} ms, {found['er_over_same_work']:.3f} of the same work;",
            end=" ",
        )
        print(f"exposed wait {found['exposed_wait_ms']['p50']:.2f} ms", flush=True)
    folder.write_file("steps.png", overlap_picture(figures))


def summed_up(by_rank: list[dict[str, Any]], at_rest: float) -> dict[str, Any]:
    """The figures of a workload: a step takes as long as its slowest rank; ratios are of neighbours in time."""
    times = {name: np.max([one["times"][name] for one in by_rank], axis=0) for name in by_rank[0]["times"]}
    waits = 1e3 * np.concatenate([one["waits"] for one in by_rank])
    er, same = times["er"], times["incremental_same_work"]
    wait = float(np.percentile(waits, 50))
    step = 1e3 * float(np.median(er))
    return {
        "step_ms": {name: 1e3 * float(np.median(values)) for name, values in times.items()},
        "er_over_same_work": float(np.median(er) / np.median(same)),
        "er_over_same_work_by_turn": float(np.median(er / same)),
        "exposed_wait_ms": {"p50": wait, "p99": float(np.percentile(waits, 99))},
        "exposed_wait_over_step": wait / step,
        "idle_cpu_share": statistics.median(one["waiting_cpu_share"] for one in by_rank[:-1]) - at_rest
        if len(by_rank) > 1
        else 0.0,
    }


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_overlap.py", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    add_cluster(parser)
    parser.add_argument("--workload", choices=list(WORKLOADS), action="append", help="one of them (both)")
    parser.add_argument("--repeats", type=int, default=30, help="turns of each loop (30)")
    add_device(parser)
    return parser.parse_args(arguments)
