"""What checkpoints cost the training that goes on meanwhile, and what a run gains that starts from an earlier one.

    steering run workflows/bench_checkpoint.py [--mib 16 1024] [--checkpoints 40] [--earlier]
    steering run workflows/bench_checkpoint.py --mib --recovered 5 [--after RUN]

Stall: one rank trains ER on frames of 64 x 64 pixels (uint16) with labels of 40 x 40, its buffer full, and every step
brings samples never seen before. One checkpoint follows the other. `stall_ms` is, of each checkpoint, the longest time
that the training thread spends in checkpoint code within one step or between two: the cut, and copies of samples about
to be overwritten; `stall_cpu_ms` is the same in CPU time, which others on the machine do not lengthen. `share` is all
such time over the wall time of training. `step_over_quiet` compares median steps while files are written with steps
while none are: the writer uses the disk and a core of its own.

--earlier: the demo, then the demo again from that run, then two new samples from it. `first_over_run_end`: the second
run's first predictions over the first run's last, as phase errors against the truth, the median of the samples;
`old_over_before`: the network's error on held-out frames of the first run, after and before it learns the new ones.

--recovered N: N demos undisturbed, and N that are killed with all their processes at a random moment after their first
checkpoint and recovered. `recover.error_over_uninterrupted`: the median error of these over the median of those.
Figures are written after each pair; --after RUN goes on from those of an earlier run, until there are N.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage import data

from measures.recovered import recovered
from pictures.checkpoint import stalls_picture
from simulated_drift import main as demo
from steering import (
    ER,
    CampaignSettings,
    Experiment,
    ProbeFirst,
    RunFolder,
    SimulatedBeamline,
    SpaceFilling,
    Stage,
    TrainerSettings,
    local,
    run,
    sample,
    zone_plate,
)
from steering.learning import Loop, Reconstruction
from steering.learning.buffer_cut import Cut
from steering.learning.checkpoint import FOLDER, Recorder
from steering.ptychography import patch_weight
from steering.ptychography.device import add_device

WINDOW, PATCH, BATCH = 64, 40, 16


class Watch:
    """Seconds that this thread spends in checkpoint code: of a step, and in all."""

    def __init__(self) -> None:
        self.step_s = self.step_cpu_s = self.total_s = 0.0

    def watching(self, method: Any) -> Any:
        """The method, its time counted."""

        def watched(*arguments: Any) -> Any:
            begun, begun_cpu = time.perf_counter(), time.thread_time()
            try:
                return method(*arguments)
            finally:
                spent = time.perf_counter() - begun
                self.step_s += spent
                self.total_s += spent
                self.step_cpu_s += time.thread_time() - begun_cpu

        return watched

    def step(self) -> tuple[float, float]:
        """Seconds and CPU-seconds since the last call, which begins a step."""
        spent = self.step_s, self.step_cpu_s
        self.step_s = self.step_cpu_s = 0.0
        return spent


def loop_of(mib: int, device: str) -> tuple[Loop, Any]:
    """A rank with a full buffer of so many MiB, and what loads its minibatches."""
    torch.manual_seed(0)
    probe = zone_plate(WINDOW, 50.0, aperture=0.52, counts=1e5)
    network = ProbeFirst(window=WINDOW, patch=PATCH, width=24)
    network.optics.set(probe)
    settings = TrainerSettings(batch=BATCH, candidates=8, representatives=24, buffer_bytes=mib * 2**20, device=device)
    loop = Loop(network, ER(Reconstruction(patch_weight(probe, PATCH))), settings)
    loop.connect(None)
    rng = np.random.default_rng(0)
    pool = {
        "counts": torch.from_numpy(rng.poisson(20, (256, WINDOW, WINDOW)).astype(np.uint16)),
        "amplitude": torch.rand(256, PATCH, PATCH),
        "phase": torch.rand(256, PATCH, PATCH),
    }
    offered = 0

    def identities(n: int) -> torch.Tensor:
        nonlocal offered
        offered += n
        return torch.arange(offered - n, offered)

    def load(n: int, out: dict[str, torch.Tensor]) -> None:
        first = int(rng.integers(0, 256 - n))
        for name, value in pool.items():
            out[name][:n] = value[first : first + n]
        out["stratum"][:n] = 0
        out["identity"][:n] = identities(n)

    while loop.buffer.capacity == 0 or len(loop.buffer) < loop.buffer.capacity:
        loop.buffer.insert(pool, torch.zeros(256, dtype=torch.int64), identities(256))
    example = {name: value[0] for name, value in pool.items()}
    loop.prepare({**example, "stratum": torch.tensor(0), "identity": torch.tensor(0)})
    return loop, load


def stall(folder: Path, mib: int, checkpoints: int, steps: int, device: str) -> dict[str, Any]:
    """Figures of one size of buffer; before each checkpoint come so many steps without one.

    Every second checkpoint writes the whole buffer, the others what has changed.
    """
    loop, load = loop_of(mib, device)
    loop.run(5, load)
    watch, recorder = Watch(), Recorder(loop)
    stalls, spent, quiet, busy, seconds, sizes = [], [], [], [], [], []
    trained = 0.0
    keep = Cut.keep
    Cut.keep = watch.watching(keep)  # type: ignore[method-assign]
    try:
        for number in range(checkpoints):
            recorder = Recorder(loop) if number % 2 == 0 else recorder
            begun = time.perf_counter()
            for _ in range(steps):
                quiet.append(_seconds(loop, load))
            watch.step()
            started = time.perf_counter()
            watch.watching(recorder.cut)(folder, number)
            held_up = [watch.step()]
            while not recorder.written.done():
                busy.append(_seconds(loop, load))
                held_up.append(watch.step())
            seconds.append(time.perf_counter() - started)
            trained += time.perf_counter() - begun
            stalls.append(1000 * max(wall for wall, _ in held_up))
            spent.append(1000 * max(cpu for _, cpu in held_up))
            sizes.append(recorder.written.result().bytes)
            for path in (folder / FOLDER).glob("*") if number % 2 else ():
                path.unlink()
    finally:
        Cut.keep = keep  # type: ignore[method-assign]
    return {
        "stall_ms": {f"p{share}": float(np.percentile(stalls, share)) for share in (50, 99)},
        "stall_cpu_ms": {f"p{share}": float(np.percentile(spent, share)) for share in (50, 99)},
        "share": watch.total_s / trained,
        "step_over_quiet": statistics.median(busy) / statistics.median(quiet) if busy else None,
        "step_ms": 1000 * statistics.median(quiet),
        "seconds": statistics.median(seconds),
        "whole_mib": max(sizes) / 2**20,
        "checkpoints": checkpoints,
        "stalls_ms": stalls,
    }


def _seconds(loop: Loop, load: Any) -> float:
    begun = time.perf_counter()
    loop.run(1, load)
    return time.perf_counter() - begun


def earlier(folder: RunFolder, arguments: list[str], frames: int, device: str) -> dict[str, float]:
    """Figures of the demo, of the demo again from that run, and of new samples from it."""
    base = folder.path / "runs"
    first = RunFolder.create(base / "first")
    demo(first, arguments)
    again = RunFolder.create(base / "again", start={"from": [str(first.path)], "memory": None})
    demo(again, arguments)
    new = RunFolder.create(base / "new", start={"from": [str(first.path)], "memory": None})
    unseen(new, frames, device)
    ends, firsts = first.summary()["phase_error"], again.summary()["phase_error"]
    began, now = new.summary()["earlier_errors"]
    return {
        "first_over_run_end": statistics.median(firsts[scan]["first"] / ends[scan]["run_end"] for scan in ends),
        "first_over_first": statistics.median(firsts[scan]["first"] / ends[scan]["first"] for scan in ends),
        "old_over_before": now / began,
    }


def unseen(folder: RunFolder, frames: int, device: str) -> None:
    """A run on two samples that the demo does not have."""
    probe = zone_plate(WINDOW, 50.0, aperture=0.52, counts=1e5)
    stages = [
        Stage("coins", sample(data.coins()[:256, :256], phase=2.4, absorption=0.1, size=256), frames),
        Stage("grass", sample(data.grass()[:256, :256], phase=-0.6, absorption=0.3, size=256), frames),
    ]
    source = SimulatedBeamline(stages, probe=probe, step=5.5, frame_rate=50.0, chunk_frames=10)
    experiment = Experiment(
        source=source,
        policy=SpaceFilling(source.candidates),
        network=ProbeFirst(window=WINDOW, patch=PATCH, width=24),
        strategy=ER(),
        trainer=TrainerSettings(batch=8, candidates=4, representatives=8, learning_rate=1.5e-3),
        campaign=CampaignSettings(steps=30, label_every=150, lookahead=50),
        device=device,
    )
    with local(ranks=2) as client:
        run(experiment, client, folder)


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Measure, and write figures and picture."""
    parser = argparse.ArgumentParser(prog="bench_checkpoint.py")
    parser.add_argument("--mib", type=int, nargs="*", default=[16, 1024], help="sizes of a rank's buffer (16 1024)")
    parser.add_argument("--checkpoints", type=int, default=40, help="of each size (40)")
    parser.add_argument("--steps", type=int, default=30, help="steps without a checkpoint before each (30)")
    parser.add_argument("--earlier", action="store_true", help="also run the demo, and from it again")
    parser.add_argument("--recovered", type=int, default=0, metavar="N", help="also N demos, and N that are killed")
    parser.add_argument("--after", metavar="RUN", help="go on from the demos of this run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which they are killed (0)")
    parser.add_argument("--frames", type=int, default=1100, help="frames of each sample of these runs (1100)")
    parser.add_argument("--size", type=int, default=256, help="object pixels of a sample's side (256)")
    add_device(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    demo_arguments = ["--frames", str(options.frames), "--size", str(options.size), "--device", options.device]
    if options.mib:
        stalls_of(folder, options)
    if options.earlier:
        figures: dict[str, Any] = earlier(folder, demo_arguments, options.frames, options.device)
        folder.write_summary({"from": figures})
        print("from", figures)
    before = RunFolder(options.after).summary().get("recover") if options.after else None
    runs = recovered(folder.path / "recovered", demo_arguments, options.recovered, options.seed, before)
    for figures in runs:
        folder.write_summary({"recover": figures})
        print("recover", figures, flush=True)


def stalls_of(folder: RunFolder, options: argparse.Namespace) -> None:
    """What checkpoints cost a rank with each size of buffer."""
    found: dict[str, Any] = {}
    stalls: dict[str, Any] = {}
    for mib in options.mib:
        mine = stall(folder.path / "checkpoints", mib, options.checkpoints, options.steps, options.device)
        stalls[f"{mib} MiB per rank"] = np.array(mine.pop("stalls_ms"))
        found[f"mib_{mib}"] = mine
        print(f"mib_{mib}", mine, flush=True)
        worst = max(found.values(), key=lambda one: one["stall_ms"]["p99"])
        checkpoint = {name: worst[name] for name in ("stall_ms", "stall_cpu_ms")}
        checkpoint |= {"share": max(one["share"] for one in found.values()), **found}
        folder.write_summary({"checkpoint": checkpoint})
        folder.write_file("picture.png", stalls_picture(stalls))
