"""How many frames a second each live protocol carries through joiner and network, and what is lost on the way.

    steering run workflows/bench_ingest.py [--seconds 60] [--protocols dectris pva swmr] [--rate 1000] [--rate-256 500]

A server process sends frames of 128 x 128 and of 256 x 256 pixels at a steady rate, with their positions; the receiving
process joins all of them; this process predicts what it can by the network's fastest backend, the rest is thinned and
counted apart. `lost` are numbers that never came. Then a server sends faster than the client takes, and drops: the
counts must agree exactly.
"""

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import xarray as xr

from pictures.ingest import ingest_picture
from steering import Geometry, ProbeFirst, RunFolder, make_chunk, zone_plate
from steering.inference import Engine
from steering.ptychography.device import add_device
from steering.sources import JoinSettings, LiveSource, LiveSourceSettings, Window
from steering.sources.addresses import streams_at

PROTOCOLS = ("dectris", "pva", "swmr")
CHUNK = 16  # frames that are predicted together


class Server:
    """A server process that has said its addresses."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process
        self.addresses = self._said()["served"]
        self.cpu = psutil.Process(process.pid)

    def go(self) -> None:
        """Begin to send; or, the second time, leave."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def sent(self) -> dict[str, Any]:
        """What it says when all is sent."""
        return self._said()

    def _said(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"found the server ended with {self._process.wait()}, expected it to send")
        return json.loads(line)


def go_when_connected(server: Server, source: LiveSource, settle_s: float) -> None:
    """Let a server begin so many seconds after the receiving process has first been heard."""
    while not source.streams:
        time.sleep(0.05)
    time.sleep(settle_s)
    server.go()


@contextmanager
def serving(folder: Path, protocol: str, *arguments: str) -> Iterator[Server]:
    """A server process of served/flood.py."""
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    command = [sys.executable, "-m", "served.flood", "--protocol", protocol, "--folder", str(folder), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        yield Server(process)
    finally:
        process.terminate()
        process.communicate(timeout=30)
        for file in folder.glob("*.h5"):
            file.unlink()


def ahead(chunks: Iterator[xr.Dataset]) -> Iterator[xr.Dataset]:
    """The chunks, the next of which is taken out of the receiving process while one is predicted, as in a run, where
    source and predictor are processes of their own."""
    taken: queue.Queue[xr.Dataset | Exception | None] = queue.Queue(1)

    def take() -> None:
        try:
            for chunk in chunks:
                taken.put(chunk)
            taken.put(None)
        except Exception as error:  # the boundary of this thread: raised below
            taken.put(error)

    threading.Thread(target=take, daemon=True).start()
    while (chunk := taken.get()) is not None:
        if isinstance(chunk, Exception):
            raise chunk
        yield chunk


def measured(
    folder: Path, protocol: str, engine: Engine, side: int, rate: float, options: argparse.Namespace
) -> dict[str, Any]:
    """One protocol at one rate, with prediction by an engine for frames of this side beside."""
    arguments = ("--side", str(side), "--rate", str(rate), "--seconds", str(options.seconds))
    with serving(folder / "served", protocol, *arguments) as server:
        source = made(server.addresses, side, capacity=max(64, round(rate)))
        latencies: list[tuple[float, int]] = []
        first, newest, last, predicted = 0.0, 0.0, 0.0, 0
        threading.Thread(target=go_when_connected, args=(server, source, options.settle_s), daemon=True).start()
        begun = cpu = {"server": 0.0, "predict": 0.0, "receive": 0.0}
        for chunk in ahead(source.chunks()):
            if not first:
                first, begun = chunk.attrs["acquired"], begun | parts_cpu(server, source)
                cpu = dict(begun)
            newest = chunk.attrs["acquired"]
            engine.predict(chunk["counts"].values)
            last = time.time()
            predicted += chunk.sizes["frame"]
            latencies.append((1e3 * (last - chunk.attrs["acquired"]), chunk.sizes["frame"]))
            cpu |= parts_cpu(server, source)
        sent = server.sent()
    streams = source.streams
    frames, took, received_s = streams["frames"], max(last - first, 1e-9), max(newest - first, 1e-9)
    waits = np.repeat([wait for wait, _ in latencies], [count for _, count in latencies])
    return {
        "sent": sent["sent"],
        "frames_per_s": frames["received"] / received_s,
        "server_per_s": sent["sent"] / sent["seconds"],
        "lost": sent["sent"] - frames["received"] + frames["dropped"].get("repeat", 0),
        "not_joined": frames["received"] - frames["joined"] - thinned(frames),
        "thinned": thinned(frames),
        "predicted_per_s": predicted / took,
        "backend": engine.backend.name,
        "latency_ms": {f"p{q}": float(np.percentile(waits, q)) for q in (50, 99)},
        "cpu_share": {part: (cpu[part] - begun[part]) / took for part in cpu},
        "adds_up": adds_up(streams),
    }


def overloaded(folder: Path, protocol: str, options: argparse.Namespace) -> dict[str, Any]:
    """A server that sends as fast as it can and drops what is not taken, and a consumer of 1,000 frames a second."""
    arguments = ("--side", "128", "--rate", "1e6", "--seconds", str(options.overload_frames / 1e6), "--overflow")
    with serving(folder / "overload", protocol, *arguments) as server:
        source = made(server.addresses, 128, capacity=200, when_slow="block")
        threading.Thread(target=go_when_connected, args=(server, source, options.settle_s), daemon=True).start()
        taken = 0
        for chunk in source.chunks():
            taken += chunk.sizes["frame"]
            time.sleep(0.001 * chunk.sizes["frame"])
        sent = server.sent()
    frames = source.streams["frames"]
    received = frames["received"] - frames["dropped"].get("repeat", 0)
    return {
        **sent,
        "received": received,
        "lost": frames["lost"],
        "dropped": frames["dropped"],
        "taken": taken,
        "exact": bool(
            received + frames["lost"] == sent["sent"]
            and frames["lost"] == sent["overflowed"]
            and received == taken + sum(frames["dropped"].values())
            and adds_up(source.streams)
        ),
    }


def made(addresses: dict[str, str], side: int, *, capacity: int, when_slow: str = "thin") -> LiveSource:
    """A source for these addresses, with a buffer of so many frames."""
    streams = streams_at(addresses["frames"], addresses["positions"])
    if when_slow == "block":
        streams = replace(streams, frames=replace(streams.frames, high_water=capacity))
    geometry = Geometry(shape=(side, side), wavelength=1.4089e-10, distance=2.4, detector_pixel=75e-6)
    settings = LiveSourceSettings(
        join=JoinSettings(capacity=capacity, when_slow=when_slow), chunk_frames=CHUNK, end_s=60.0
    )
    return LiveSource(
        streams,
        window=Window(size=side, dtype="uint16"),
        geometry=geometry,
        probe=zone_plate(side, 50.0, aperture=0.52, counts=1e5),
        candidates=np.array([[0.0, 0.0], [1e-5, 1e-5]]),
        settings=settings,
    )


def predictor(side: int, options: argparse.Namespace) -> Engine:
    """The network at its fastest backend."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = ProbeFirst(window=side, patch=side // 8 * 5, width=24)
    network.optics.set(zone_plate(side, 50.0, aperture=0.52, counts=1e5), np.zeros((side, side), bool))
    engine = Engine(network.eval(), frames=CHUNK, compiled=options.compiled, measure_s=0.5, device=options.device)
    warm = np.ones((CHUNK, side, side), np.uint16)
    where = np.zeros((CHUNK, 2))
    engine.predict(make_chunk(warm, np.arange(CHUNK), where, Geometry(shape=(side, side)))["counts"].values)
    return engine


def parts_cpu(server: Server, source: LiveSource) -> dict[str, float]:
    """CPU seconds so far of each process that takes part."""
    found = {"server": server.cpu.cpu_times(), "predict": psutil.Process().cpu_times()}
    with contextlib.suppress(psutil.NoSuchProcess):  # it has handed out its last frames and left
        found["receive"] = psutil.Process(source.receiver_pid).cpu_times()
    return {part: times.user + times.system for part, times in found.items()}


def thinned(frames: dict[str, Any]) -> int:
    """Frames that were joined, and that prediction was too slow for."""
    return sum(count for reason, count in frames["dropped"].items() if reason.startswith("thinned"))


def adds_up(streams: dict[str, dict[str, Any]]) -> bool:
    """received = joined + dropped + waiting, of every stream."""
    return all(s["received"] == s["joined"] + sum(s["dropped"].values()) + s["waiting"] for s in streams.values())


def noted(folder: RunFolder, figures: dict[str, Any], protocol: str, part: str, measured_now: dict[str, Any]) -> None:
    """Write the figures so far, and print the newest."""
    folder.write_summary(figures)
    print(protocol, part, json.dumps(measured_now), flush=True)


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Measure, and write the figures as they come."""
    options = _options(arguments)
    figures: dict[str, Any] = {"seconds": options.seconds}
    engines = {side: predictor(side, options) for side in (128, 256)}
    for protocol in options.protocols:
        figures[protocol] = measured(folder.path, protocol, engines[128], 128, options.rate, options)
        noted(folder, figures, protocol, "128", figures[protocol])
        figures[protocol]["256"] = measured(folder.path, protocol, engines[256], 256, options.rate_256, options)
        noted(folder, figures, protocol, "256", figures[protocol]["256"])
        if protocol == "dectris":  # the one whose server knows what was not taken
            figures[protocol]["overload"] = overloaded(folder.path, protocol, options)
            noted(folder, figures, protocol, "overload", figures[protocol]["overload"])
    folder.write_file("ingest.png", ingest_picture({name: figures[name] for name in options.protocols}))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_ingest.py", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement (60)")
    parser.add_argument("--protocols", choices=PROTOCOLS, nargs="+", default=list(PROTOCOLS))
    parser.add_argument("--rate", type=float, default=1000.0, help="frames of 128 x 128 a second (1000)")
    parser.add_argument("--rate-256", type=float, default=500.0, help="frames of 256 x 256 a second (500)")
    parser.add_argument("--overload-frames", type=int, default=20_000, help="sent as fast as possible (20000)")
    parser.add_argument("--settle-s", type=float, default=2.0, help="seconds for the streams to connect (2)")
    parser.add_argument("--threads", type=int, default=1, help="of the network, as PredictorSettings.threads (1)")
    parser.add_argument(
        "--no-compiled", dest="compiled", action="store_false", help="leave out compiled backends and ONNX Runtime"
    )
    add_device(parser)
    return parser.parse_args(arguments)
