"""What a frame costs the fast loop as the scan and the canvas grow, while others look on.

    steering run workflows/bench_scale.py [--tiny] [--chunks 1 10] [--pairs 5] ...

One synthetic scan at a time streams in, each chunk once the one before is predicted and the policy was asked.
Meanwhile labels are asked for, the live image is drawn twice a second, the state of the run is read four times a
second, and old frames are asked for again. Scans of 1e3, 1e4 and 1e5 frames on a canvas of 512 x 512 pixels, and of
1e4 frames on canvases of 512, 2048 and 4096: CPU time of the thread that predicts, per frame and without the network's
own; delay from a frame to its prediction; how memory grows. Then pairs of scans with and without all that is asked.
"""

import argparse
import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import xarray as xr
from skimage import data

from steering.campaign import PredictionReady
from steering.inference import Predictor, PredictorSettings
from steering.models import ModelStore, ProbeFirst
from steering.policies import SpaceFilling
from steering.ptychography import Canvas, Refined, simulate, zone_plate
from steering.ptychography.device import add_device
from steering.records import Field, Geometry, ModelVersion, make_chunk
from steering.runner import RunFolder
from steering.sources import sample
from steering.view.pictures import COLOURS, figure, png, styled

WINDOW = 64
MARGIN = WINDOW // 2 + 10  # of the canvas that no probe's centre may come near
PATTERNS = 256  # different frames: a scan goes through them again and again, at other positions
LAST = 0.2  # share of a scan, its end, that costs are measured on
GEOMETRY = Geometry(shape=(WINDOW, WINDOW))
PROBE = zone_plate(WINDOW, 50.0, aperture=0.52, counts=1e5)


def patterns() -> np.ndarray:
    """Frames of one sample, with Poisson noise."""
    rng, reach = np.random.default_rng(0), 80.0
    canvas = Canvas.around(Field(-reach, reach, -reach, reach), WINDOW)
    thing = sample(data.brick(), phase=-2.0, absorption=0.1, size=canvas.shape[0])
    return rng.poisson(simulate(thing, PROBE, canvas, rng.uniform(-reach, reach, (PATTERNS, 2)))).astype(np.uint16)


def stream(counts: np.ndarray, frames: int, chunk: int, reach: float, scan: str) -> Iterator[xr.Dataset]:
    """Chunks of a scan in lines there and back over the field, as a stage moves."""
    lines = max(2, int(np.sqrt(frames)))
    for first in range(0, frames, chunk):
        ids = np.arange(first, min(frames, first + chunk))
        line, step = np.divmod(ids, lines)
        step = np.where(line % 2, lines - 1 - step, step)
        where = np.stack([np.minimum(line / (lines - 1), 1.0), step / (lines - 1)], 1) * 2 * reach - reach
        yield make_chunk(counts[ids % PATTERNS], ids, where, GEOMETRY, scan=scan)


async def predictor(folder: Path, canvas: int, options: argparse.Namespace) -> tuple[Predictor, float]:
    """A predictor with that canvas, and how far its field reaches from the middle, object pixels."""
    torch.manual_seed(0)
    network = ProbeFirst(window=WINDOW, width=options.width)
    network.optics.set(PROBE)
    version = ModelVersion(number=0, network="ProbeFirst", hyperparameters=network.hyperparameters)
    ModelStore(folder / "models").publish(network, version)
    reach = canvas / 2 - MARGIN
    me = Predictor(
        field=Field(-reach, reach, -reach, reach),
        geometry=GEOMETRY,
        probe=PROBE,
        policy=SpaceFilling(np.random.default_rng(0).uniform(-reach, reach, (500, 2))),
        store=folder / "models",
        settings=PredictorSettings(
            memory_bytes=options.budget, compiled=options.compiled, gather_ms=0.0, device=options.device
        ),
    )
    await me.start()
    return me, reach


class Onlookers:
    """Whoever asks for something while frames are predicted."""

    def __init__(self, me: Predictor, scan: str) -> None:
        self.live_ms: list[float] = []
        self._me, self._scan = me, scan
        asks = ((0.5, self._live), (2.0, self._labels), (0.25, self._me.figures), (1.0, self._old))
        self._tasks = [asyncio.create_task(self._every(seconds, ask)) for seconds, ask in asks]

    async def go(self) -> None:
        """Ask no more. Raises what any of them raised."""
        for task in self._tasks:
            task.cancel()
        for found in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(found, Exception):
                raise found

    async def _every(self, seconds: float, ask: Callable[[], Awaitable[Any]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            await ask()

    async def _live(self) -> None:
        begun = time.perf_counter()
        live = await self._me.live(self._scan)
        if live is not None:
            self.live_ms.append(1e3 * (time.perf_counter() - begun))
            if max(live.sizes["y"], live.sizes["x"]) > 1024:
                raise RuntimeError(f"found a live image of {dict(live.sizes)}, expected at most 1024 x 1024")

    async def _labels(self) -> None:
        frames = await self._me.label_frames(self._scan, 400)
        if frames is not None:
            residual = np.zeros(len(frames.frame_id), np.float32)
            made = Refined(object=frames.predicted, probe=frames.probe, residual=residual, covered=frames.seen)
            await self._me.take_refined(self._scan, made, made, frames.canvas, 0.1)

    async def _old(self) -> None:
        frames, gone = await self._me.late_frames(self._scan, np.arange(0, 2000, 50))
        if gone or frames is None:
            raise RuntimeError(f"found {gone} old frames no longer kept, expected all")


async def measure(me: Predictor, chunks: Iterator[xr.Dataset], frames: int, *, watched: bool) -> dict[str, Any]:
    """Send a scan chunk by chunk. What it cost, over its last frames."""
    scan, delays = "", []
    process, sent, begun = psutil.Process(), 0, None
    before: dict[str, Any] = {}
    onlookers = None
    for chunk in chunks:
        scan = str(chunk.attrs["scan"])
        if sent + chunk.sizes["frame"] > (1 - LAST) * frames and not before:
            before, begun, rss = await me.figures(), sent, process.memory_info().rss
        handed = time.perf_counter()
        await me.receive(chunk)
        predicted = 0
        while predicted < chunk.sizes["frame"]:
            predicted += sum(len(e.frame_ids) for e in await me.events() if isinstance(e, PredictionReady))
        delays.append(time.perf_counter() - handed)
        await me.suggest(1)
        sent += chunk.sizes["frame"]
        if onlookers is None and watched:
            onlookers = Onlookers(me, scan)
    if onlookers is not None:
        await onlookers.go()
    after, counted = await me.figures(), sent - (begun or 0)
    spent = {name: after[name] - before[name] for name in ("fast_thread_cpu_s", "network_cpu_s")}
    return {
        "frames": frames,
        "cost_us": 1e6 * (spent["fast_thread_cpu_s"] - spent["network_cpu_s"]) / counted,
        "network_us": 1e6 * spent["network_cpu_s"] / counted,
        "delay_ms": {f"p{q}": 1e3 * float(np.percentile(delays, q)) for q in (50, 99)},
        "live_ms": float(np.median(onlookers.live_ms)) if onlookers and onlookers.live_ms else None,
        "rss_growth_per_frame_bytes": (process.memory_info().rss - rss) / counted,
        "held_bytes": after["memory"]["held_bytes"],
        "moved_bytes": after["memory"]["moved_bytes"],
    }


def case(folder: Path, canvas: int, frames: int, chunk: int, options: argparse.Namespace) -> dict[str, Any]:
    """One scan with a predictor of its own."""

    async def run() -> dict[str, Any]:
        me, reach = await predictor(folder / f"{canvas}-{frames}-{chunk}", canvas, options)
        warm = stream(options.counts, 200, chunk, reach, "warm-up")
        await measure(me, warm, 200, watched=False)
        found = await measure(me, stream(options.counts, frames, chunk, reach, "scan"), frames, watched=True)
        await me.close()
        return {"canvas": canvas, "chunk": chunk, **found}

    found = asyncio.run(run())
    print(f"canvas {canvas}, {frames} frames in chunks of {chunk}: {found['cost_us']:.0f} us a frame, ", end="")
    print(f"delay {found['delay_ms']}, live {found['live_ms'] or 0:.0f} ms", flush=True)
    return found


def pairs(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Scans with and without onlookers in turns, with one predictor: the p99 of their delays."""

    async def run() -> list[tuple[float, float]]:
        me, reach = await predictor(folder / "pairs", options.canvases[1], options)
        found = []
        for turn in range(options.pairs + 1):
            p99 = {}
            for watched in (False, True) if turn % 2 else (True, False):
                name, frames = f"{turn}-{watched}", options.pair_frames
                scan = stream(options.counts, frames, 1, reach, name)
                p99[watched] = (await measure(me, scan, frames, watched=watched))["delay_ms"]["p99"]
            found.append((p99[False], p99[True]))
        await me.close()
        return found[1:]  # the first one warms up

    found = asyncio.run(run())
    ratios = [watched / alone for alone, watched in found]
    return {"p99_ms": found, "ratios": ratios, "p99_over_without": float(np.median(ratios))}


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Measure, and write the figures as they come."""
    options = _options(arguments)
    torch.set_num_threads(1)
    options.counts = patterns()
    small, most, large = options.canvases[0], options.frames[-1], options.canvases[-1]
    middle = options.frames[1]
    wanted = [(small, n) for n in options.frames] + [(canvas, middle) for canvas in options.canvases[1:]]
    cases = [
        case(folder.path / "predictors", canvas, n, chunk, options)
        for chunk, (canvas, n) in itertools.product(options.chunks, wanted)
    ]
    figures: dict[str, Any] = {"cases": cases, "budget_bytes": options.budget, "by_chunk": {}}
    for chunk in options.chunks:
        mine = {(c["canvas"], c["frames"]): c for c in cases if c["chunk"] == chunk}
        figures["by_chunk"][str(chunk)] = {
            "cost_over_smallest": {
                "frames_1e5": mine[small, most]["cost_us"] / mine[small, options.frames[0]]["cost_us"],
                "canvas_4096": mine[large, middle]["cost_us"] / mine[small, middle]["cost_us"],
            },
            "delay_ms": {f"{canvas}-{n}": c["delay_ms"] for (canvas, n), c in mine.items()},
        }
    worst = figures["by_chunk"].values()
    figures["cost_over_smallest"] = {
        key: max(each["cost_over_smallest"][key] for each in worst) for key in ("frames_1e5", "canvas_4096")
    }
    figures["delay_ms"] = {"p99": {f"{c['canvas']}-{c['frames']}-{c['chunk']}": c["delay_ms"]["p99"] for c in cases}}
    figures["memory_per_frame_bytes"] = max(c["rss_growth_per_frame_bytes"] for c in cases if c["frames"] == most)
    figures["held_over_budget"] = max(c["held_bytes"] for c in cases) / options.budget
    folder.write_summary(figures)
    if options.pairs:
        folder.write_summary({"onlookers": pairs(folder.path / "predictors", options)})
    folder.write_file("scale.png", scale_picture(folder.summary()))


@styled
def scale_picture(figures: dict[str, Any]) -> bytes:
    """Cost of a frame by frames and by canvas, and the delays with and without onlookers, as PNG."""
    drawing, axes = figure(1, 3, height=2.6)
    for number, chunk in enumerate(sorted({c["chunk"] for c in figures["cases"]})):
        mine = [c for c in figures["cases"] if c["chunk"] == chunk]
        small, middle = mine[0]["canvas"], mine[1]["frames"]
        for ax, key, fixed in ((axes[0, 0], "frames", ("canvas", small)), (axes[0, 1], "canvas", ("frames", middle))):
            shown = sorted((c[key], c["cost_us"]) for c in mine if c[fixed[0]] == fixed[1])
            ax.plot(*zip(*shown, strict=True), "o-", color=COLOURS[number], label=f"chunks of {chunk}")
            ax.set_xscale("log")
            ax.set_xlabel({"frames": "frames of the scan", "canvas": "pixels of the canvas's side"}[key])
            ax.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("us of CPU a frame, without the network")
    axes[0, 0].legend(fontsize=8.5)
    for place, (alone, watched) in enumerate(figures.get("onlookers", {}).get("p99_ms", [])):
        axes[0, 2].bar([place - 0.2, place + 0.2], [alone, watched], 0.36, color=[COLOURS[0], COLOURS[1]])
    axes[0, 2].set_xlabel("pairs: without and with onlookers")
    axes[0, 2].set_ylabel("p99 of the delay, ms")
    return png(drawing)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_scale.py", description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, nargs=3, default=[1000, 10_000, 100_000], help="of the scans")
    parser.add_argument("--canvases", type=int, nargs=3, default=[512, 2048, 4096], help="pixels of a side")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 10], help="frames that come together (1 10)")
    parser.add_argument("--pairs", type=int, default=5, help="of scans with and without onlookers, 0: none (5)")
    parser.add_argument("--pair-frames", type=int, default=4000, help="of each such scan (4000)")
    parser.add_argument("--budget", type=int, default=2**28, help="budget of the predictor, bytes (2^28)")
    parser.add_argument("--width", type=int, default=32, help="of the network: its own default is 32")
    parser.add_argument("--compiled", action="store_true", help="try compiled backends and ONNX Runtime too")
    parser.add_argument("--tiny", action="store_true", help="all of it in seconds: says whether it runs, not how fast")
    add_device(parser)
    options = parser.parse_args(arguments)
    for name, sizes in (("frames", options.frames), ("canvases", options.canvases)):
        if len(set(sizes)) < len(sizes):
            parser.error(f"found --{name} {sizes}, expected three different ones")
    if options.tiny:
        options.frames, options.canvases, options.chunks = [40, 60, 200], [192, 200, 256], [10]
        options.pairs, options.pair_frames, options.budget, options.width = 1, 40, 2**20, 4
    return options
