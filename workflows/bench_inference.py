"""How fast frames are predicted, in every backend that this machine has, and what a change of the model costs them.

    steering run workflows/bench_inference.py [--repeats 15] [--turns 6] [--no-compiled] [--no-training] ...

Frames per second at batches of 1 to 256 and the latency at batch 1, alone and while two ranks train; the share of what
a matrix product reaches on one core in the same minute; the phase error of each backend over plain float32's, of
networks that were trained before, on simulated frames and on recorded ones where STEERING_DATA names the folder of
data. Then frames come one by one at a steady rate, the policy is asked after each, and models are swapped meanwhile.
"""

import argparse
import asyncio
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xarray as xr
from numpy.typing import NDArray
from skimage import data

from measures.rates import fastest, flops_of, from_host, pcie_limit, percentiles
from pictures.inference import inference_picture
from steering.clusters import local
from steering.inference import Engine, Predictor, PredictorSettings
from steering.inference.backends import REFERENCE, Slot
from steering.inference.engine import timed
from steering.inference.evaluate import patch_phase_error
from steering.learning import Loop, Place, Reconstruction, TrainerSettings
from steering.learning.strategies import ER
from steering.models import ModelStore, Network, ProbeFirst, PtychoNN
from steering.policies import SpaceFilling
from steering.ptychography import Canvas, extract_patches, patch_weight, simulate, zone_plate
from steering.ptychography.device import add_device
from steering.records import Field, Geometry, ModelVersion, make_chunk
from steering.runner import RunFolder, on_ranks
from steering.sources import read_recording, sample

HELD_OUT = 10  # every tenth frame is never trained on
SIDE = 1024  # of the matrices whose product stands for the machine's peak
AFTER_S = 0.5  # seconds after a swap in which frames are still counted to it: old ones are looked at again then


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Frames whose object is known: counts (n, N, N), patches (n, P, P) at positions (n, 2), and the optics."""

    counts: NDArray
    patches: NDArray[np.complex64]
    position: NDArray[np.float64]
    probe: NDArray[np.complex64]
    mask: NDArray[np.bool_]

    @property
    def taught(self) -> NDArray[np.bool_]:
        """(n,) those that may be trained on."""
        return np.arange(len(self.counts)) % HELD_OUT != HELD_OUT - 1


def simulated(n: int) -> Frames:
    """Frames 64 x 64 of one sample, with Poisson noise."""
    rng = np.random.default_rng(0)
    probe, reach = zone_plate(64, 50.0, aperture=0.52, counts=1e5), 80.0
    canvas = Canvas.around(Field(-reach, reach, -reach, reach), 64)
    thing = sample(data.brick(), phase=-2.0, absorption=0.1, size=canvas.shape[0])
    where = rng.uniform(-reach, reach, (n, 2))
    counts = rng.poisson(simulate(thing, probe, canvas, where)).astype(np.uint16)
    patches = extract_patches(thing, canvas, where, 40)
    return Frames(counts=counts, patches=patches, position=where, probe=probe, mask=np.zeros((64, 64), bool))


def recorded(passes: int, device: str) -> Frames | None:
    """The recorded scan of a Siemens star with the object that its frames refine to; None where there are no data."""
    file = Path(os.environ.get("STEERING_DATA", "")) / "ptycho-aps-velociprobe-siemens" / "siemens-star-small.npz.bz2"
    if not file.exists():
        return None
    recording = read_recording(file, zero_frequency="corner")
    where, mask = recording.positions / recording.geometry.object_pixel, ~recording.geometry.good()
    patches, probe = recording.labels(patch=64, passes=passes, device=device)
    return Frames(counts=recording.counts, patches=patches, position=where, probe=probe, mask=mask)


def trained(kind: type[Network], frames: Frames, options: argparse.Namespace) -> Network:
    """A network that has learnt from frames for so long."""
    torch.manual_seed(0)
    window, patch = frames.counts.shape[-1], frames.patches.shape[-1]
    network = kind(window=window, patch=patch, modes=len(frames.probe), width=options.width)
    network.optics.set(frames.probe, frames.mask)
    objective = Reconstruction(patch_weight(frames.probe, patch))
    fields = as_fields(frames)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    until, rng = time.perf_counter() + options.train_s, np.random.default_rng(0)
    while True:
        rows = torch.from_numpy(rng.integers(0, len(fields["counts"]), 16))
        batch = {name: value[rows] for name, value in fields.items()}
        optimiser.zero_grad()
        objective.error(objective.outputs(network, batch), batch).mean().backward()
        optimiser.step()
        if time.perf_counter() > until:
            return network.eval()


def as_fields(frames: Frames) -> dict[str, torch.Tensor]:
    """The frames that may be trained on, as samples."""
    patches = frames.patches[frames.taught]
    return {
        "counts": torch.from_numpy(frames.counts[frames.taught]),
        "amplitude": torch.from_numpy(np.abs(patches)),
        "phase": torch.from_numpy(np.angle(patches)),
        "stratum": torch.zeros(len(patches), dtype=torch.int64),
    }


def slots(engine: Engine) -> dict[str, Slot]:
    """A slot for every backend that runs here, by name; each cuts batches into the pieces that suit it."""
    return {each.name: engine.slot(each) for each in engine.backends if not engine.trials[each.name].refused}


def errors(ready: dict[str, Slot], frames: Frames) -> dict[str, float]:
    """Phase error of each backend on frames that were never trained on, over that of plain float32."""
    counts = torch.from_numpy(frames.counts[~frames.taught].astype(np.float32)).to(next(iter(ready.values())).device)
    weight = patch_weight(frames.probe, frames.patches.shape[-1])
    found = {}
    for name, slot in ready.items():
        patches = torch.cat([torch.polar(*slot(part)).clone() for part in counts.split(64)]).cpu().numpy()
        found[name] = float(patch_phase_error(patches, frames.patches[~frames.taught], weight).mean())
    return {name: error / found[REFERENCE.name] for name, error in found.items()} | {
        "float32_rad": found[REFERENCE.name]
    }


def speeds(ready: dict[str, Slot], frames: Frames, options: argparse.Namespace) -> dict[str, Any]:
    """Frames per second by batch and backend, latency at batch 1, and FLOP/s of matrix products: medians of turns."""
    device = next(iter(ready.values())).device
    side = SIDE if device.type == "cpu" else 8 * SIDE
    kinds = (torch.float32, torch.bfloat16)
    products = {str(kind).removeprefix("torch."): torch.rand(side, side, device=device).to(kind) for kind in kinds}
    rates: dict[str, dict[str, float]] = {}
    peaks: dict[str, list[float]] = {name: [] for name in products}
    latency: dict[str, dict[str, float]] = {}
    host: dict[str, dict[str, float]] = {}
    limit: dict[str, float | None] = {}
    for batch in options.batches:
        whole = np.resize(frames.counts, (batch, *frames.counts.shape[1:]))
        counts = torch.from_numpy(whole.astype(np.float32)).to(device)
        host[str(batch)] = from_host(ready, whole, frames.patches.shape[-1], options.repeats)
        limit[str(batch)] = pcie_limit(device, whole, frames.patches.shape[-1], options.repeats)
        times: dict[str, list[float]] = {name: [] for name in ready}
        turns = options.repeats * (20 if batch == 1 else 1)
        for turn in range(turns + 1):
            for name, slot in ready.items():
                took = timed(slot, counts)
                if turn:
                    times[name].append(took)
            for name, matrix in products.items() if batch > 1 else ():
                begun = time.perf_counter()
                matrix @ matrix
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                peaks[name].append(2 * side**3 / (time.perf_counter() - begun))
        rates[str(batch)] = {name: batch / float(np.median(values)) for name, values in times.items()}
        if batch == 1:
            latency = {name: percentiles(1e3 * np.array(values)) for name, values in times.items()}
    return {
        "frames_per_s": rates,
        "from_host_per_s": host,
        "pcie_limit_per_s": limit,
        "latency_ms": latency,
        "peak_flops": {name: float(np.median(values)) for name, values in peaks.items()},
    }


def summed_up(measured: dict[str, Any], batch: int, flops: int) -> dict[str, Any]:
    """What a network's speeds at a batch size come to."""
    rates = measured["frames_per_s"][str(batch)]
    best = max(rates, key=lambda name: rates[name])
    peak = measured["peak_flops"]["bfloat16" if best.endswith("bfloat16") else "float32"]
    return {
        "frames_per_s": rates,
        "best": best,
        "best_over_eager": rates[best] / rates[REFERENCE.name],
        "share_of_peak": flops * rates[best] / peak,
        "eager_share_of_peak": flops * rates[REFERENCE.name] / measured["peak_flops"]["float32"],
    }


def train_until(place: Place, frames: Frames, started: Path, stop: Path) -> int:
    """Train on this rank, as a campaign does, until a file `stop` is there. Returns the steps taken."""
    os.nice(5)
    network = ProbeFirst(window=frames.counts.shape[-1], patch=frames.patches.shape[-1], modes=len(frames.probe))
    network.optics.set(frames.probe, frames.mask)
    objective = Reconstruction(patch_weight(frames.probe, frames.patches.shape[-1]))
    settings = TrainerSettings(batch=16, candidates=8, representatives=24, buffer_bytes=2**24)
    loop = Loop(network, ER(objective), settings, rank=place.rank)
    loop.connect(place.join(device=loop.device))
    fields = as_fields(frames)
    loop.prepare({name: value[0] for name, value in fields.items()})
    rng = np.random.default_rng(place.rank)

    def load(n: int, out: dict[str, torch.Tensor]) -> None:
        rows = torch.from_numpy(rng.integers(0, len(fields["counts"]), n))
        for name, value in fields.items():
            out[name][:n] = value[rows]

    go_on, steps = torch.ones(1), 0
    while go_on:
        loop.run(4, load)
        steps += 4
        started.touch()
        go_on.fill_(float(not stop.exists()))
        dist.broadcast(go_on, 0)  # all ranks end together
    return steps


@contextmanager
def training(folder: Path, frames: Frames) -> Iterator[None]:
    """Two ranks train while the block runs."""
    started, stop, failed = folder / ".started", folder / ".stop", []
    with local(ranks=2) as client:

        def train() -> None:
            try:
                on_ranks(client, train_until, frames, started, stop, ranks=2)
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=train)
        thread.start()
        while not started.exists() and thread.is_alive():
            time.sleep(0.1)
        try:
            yield
        finally:
            stop.touch()
            thread.join()
            started.unlink(missing_ok=True)
            stop.unlink()
    if failed:
        raise failed[0]


async def live(folder: Path, network: Network, frames: Frames, options: argparse.Namespace) -> dict[str, Any]:
    """Frames one by one at a steady rate, the policy asked after each. In every other part versions are swapped."""
    store, numbers, ids = ModelStore(folder), itertools.count(1), itertools.count()
    for number in range(1 + 2 * options.turns):  # a rank would do it, in another process
        version = ModelVersion(number=number, network=type(network).__name__, hyperparameters=network.hyperparameters)
        store.publish(network, version)
    store.point_to(0)
    reach = float(np.abs(frames.position).max())
    me = Predictor(
        field=Field(-reach, reach, -reach, reach),
        geometry=Geometry(shape=frames.mask.shape),
        probe=frames.probe,
        policy=SpaceFilling(frames.position),
        store=folder,
        settings=PredictorSettings(compiled=options.compiled, device=options.device),
        frame_rate=options.rate,
    )
    await me.start()
    asked: list[tuple[float, float, bool]] = []  # frame handed over, decision there, in a part with swaps
    swaps: list[tuple[float, float]] = []
    sent: list[int] = []

    async def one(chunk: xr.Dataset, swapping: bool) -> None:
        begun = time.perf_counter()
        await me.receive(chunk)
        await me.suggest(1)
        asked.append((begun, time.perf_counter(), swapping))

    async def swap() -> None:
        for _ in range(2):
            await asyncio.sleep(options.part / 8)
            begun = time.perf_counter()
            installed = await me.install(next(numbers))
            if not installed.accepted:
                raise RuntimeError(f"found the same weights refused ({installed.reason}), expected them to be taken")
            swaps.append((begun, time.perf_counter()))
            await asyncio.sleep(options.part * 3 / 8)

    for turn, swapping in itertools.product(range(options.turns), (False, True)):
        chunks = [chunk_of(frames, next(ids), me.geometry, turn) for _ in range(round(options.part * options.rate))]
        sent += [int(chunk["frame"][0]) for chunk in chunks]
        swapper = asyncio.create_task(swap()) if swapping else None
        due, jobs = time.perf_counter(), []
        for chunk in chunks:
            due += 1 / options.rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            jobs.append(asyncio.create_task(one(chunk, swapping)))
        await asyncio.gather(*jobs, *([swapper] if swapper else []))
    predicted = [i for event in await me.events() for i in event.frame_ids]
    return {
        "asked": asked,
        "swaps": swaps,
        "sent": sent,
        "predicted": predicted,
        "backend": (await me.figures())["backend"],
    }


def chunk_of(frames: Frames, number: int, geometry: Geometry, turn: int) -> xr.Dataset:
    """A chunk of one frame, with that id, of the scan of a turn."""
    row = slice(number % len(frames.counts), number % len(frames.counts) + 1)
    return make_chunk(frames.counts[row], [number], frames.position[row], geometry, scan=f"scan {turn}")


def judged(measured: dict[str, Any]) -> dict[str, Any]:
    """What a live part says: latency without swaps, and what frames near a swap waited more."""
    begun, ended, swapping = (np.array(column) for column in zip(*measured["asked"], strict=True))
    wait = 1e3 * (ended - begun)
    quiet = wait[swapping == 0]
    p99 = float(np.percentile(quiet, 99))
    near = [(ended > start) & (begun < end + AFTER_S) for start, end in measured["swaps"]]
    worst = [float(wait[rows].max() / p99) for rows in near if rows.any()]
    # As many frames in a row without a swap: what the machine does by itself.
    length = max(1, round(float(np.mean([rows.sum() for rows in near]))))
    calm = [float(quiet[i : i + length].max() / p99) for i in range(0, len(quiet) - length + 1, length)]
    usual = float(np.median(calm))
    missing = set(measured["sent"]) - set(measured["predicted"])
    return {
        "frame_to_decision_ms": percentiles(quiet),
        "swap": {
            "swaps": len(measured["swaps"]),
            "frames": len(measured["sent"]),
            "frames_dropped": len(missing) + len(measured["predicted"]) - len(set(measured["predicted"])),
            "delay_over_p99": max(worst),
            "delay_over_p99_median": float(np.median(worst)),
            "median_over_without": float(np.median(worst)) / usual,
            "share_above_p90": float(np.mean(np.array(worst) > np.percentile(calm, 90))),
            "without_swap_over_p99": {"median": usual, "max": max(calm)},
            "install_ms": 1e3 * float(np.median([end - start for start, end in measured["swaps"]])),
        },
    }


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Measure, and write the figures as they come."""
    options = _options(arguments)
    torch.set_num_threads(1)  # as the predictor does
    frames, real = simulated(options.frames), recorded(options.passes, options.device) if options.passes else None
    figures: dict[str, Any] = {"networks": {}}
    ready: dict[str, dict[str, Slot]] = {}
    for kind in (ProbeFirst, PtychoNN):
        network = trained(kind, frames, options)
        ready[kind.__name__] = slots(Engine(network, compiled=options.compiled, measure_s=0.2, device=options.device))
        flops = flops_of(network)
        measured = speeds(ready[kind.__name__], frames, options)
        at1, at64 = (summed_up(measured, batch, flops) for batch in (1, 64))
        at64["phase_error_over_float32"] = {"simulated": errors(ready[kind.__name__], frames)}
        if real is not None:
            on_real = slots(Engine(trained(kind, real, options), compiled=False, measure_s=0, device=options.device))
            at64["phase_error_over_float32"]["recorded"] = errors(on_real, real)
        figures["networks"][kind.__name__] = {
            "flops_per_frame": flops,
            **measured,
            "fastest": fastest(measured, flops),
            "batch1": at1,
            "batch64": at64,
        }
        print(f"{kind.__name__}: {at64['best']} {at64['best_over_eager']:.2f} x eager at batch 64,", end=" ")
        print(f"{at64['share_of_peak']:.2f} of a matrix product's speed; at batch 1 {at1['best']},", end=" ")
        print(f"{at1['share_of_peak']:.2f}", flush=True)
        if kind is ProbeFirst:
            figures |= {"batch1": at1, "batch64": at64}
            lived = asyncio.run(live(folder.path / "versions", network, frames, options))
            figures |= {"chosen": lived["backend"], **judged(lived)}
            print(f"frame to decision: {figures['frame_to_decision_ms']}; swap: {figures['swap']}", flush=True)
        folder.write_summary(figures)
    if options.training:
        with training(folder.path, frames):
            figures["while_training"] = {n: speeds(r, frames, options) for n, r in ready.items()}
        folder.write_summary(figures)
    folder.write_file("inference.png", inference_picture(figures, lived["asked"], lived["swaps"]))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_inference.py", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="turns of each backend and batch (15)")
    parser.add_argument("--frames", type=int, default=600, help="simulated frames to learn and to be judged by (600)")
    parser.add_argument("--passes", type=int, default=15, help="of refinement over the recorded scan, 0: leave it (15)")
    parser.add_argument("--train-s", type=float, default=15.0, help="seconds that each network learns (15)")
    parser.add_argument("--rate", type=float, default=200.0, help="frames per second that arrive (200)")
    parser.add_argument("--part", type=float, default=4.0, help="seconds of each part with or without swaps (4)")
    parser.add_argument("--turns", type=int, default=6, help="pairs of such parts (6)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256], help="1 and 64 at least")
    parser.add_argument("--width", type=int, default=32, help="of the networks: their own default is 32")
    parser.add_argument(
        "--no-compiled", dest="compiled", action="store_false", help="leave out compiled backends and ONNX Runtime"
    )
    add_device(parser)
    parser.add_argument("--no-training", dest="training", action="store_false", help="leave out the part beside ranks")
    return parser.parse_args(arguments)
