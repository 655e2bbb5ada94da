"""What the live page costs: CPU time, bytes and delayed frames, with several browsers that look at objects of any size.

    steering run workflows/bench_view.py [--seconds 60] [--sizes 512 4096] [--viewers 1 10]

For each size a campaign runs on this machine: simulated frames, prediction, training. Periods without a viewer and
with so many real browser sessions take turns; the figures of each are written as soon as they are there. `cpu_share` is
the CPU time of the page's process, of the looks in the runner and of making the small image in the predictor, over the
period; the browsers' own is not in it. The run is paused while the browsers open the page, one after the other: beside
a run that fills the cores the last of ten would come after minutes, so `page_first_paint_s` is that of a paused run. A
frame is delayed where it is predicted later than the latest one of the periods without a viewer, before and after.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from skimage import data

from steering import (
    ER,
    CampaignSettings,
    Experiment,
    ProbeFirst,
    Raster,
    RunFolder,
    SimulatedBeamline,
    Stage,
    TrainerSettings,
    local,
    sample,
    start,
    zone_plate,
)
from steering.ptychography.device import add_device

KEYS = ("cpu_share", "bytes_per_update", "page_first_paint_s", "frames_delayed")  # of the worst cell
WIDTH = 8  # of the network: small, so that the frames come fast on two cores
SETTLE_S = 2.0  # after a period, so that the log has what became of its last frames, too
WARM_S = 20.0  # before the first period: the first labels are made and the first versions are in service


def experiment(size: int, rate: float, seconds: float, device: str) -> Experiment:
    """A scan in lines over an object of size x size pixels, longer than all periods."""
    probe = zone_plate(64, 50.0, aperture=0.52, counts=1e5)
    step = max(4.0, size / np.sqrt(rate * seconds))
    thing = sample(data.brick(), phase=-2.0, absorption=0.1, size=size)
    stages = [Stage("brick", thing, int(rate * seconds))]
    source = SimulatedBeamline(stages, probe=probe, step=step, frame_rate=rate)
    return Experiment(
        source=source,
        policy=Raster(source.candidates),
        network=ProbeFirst(window=64, patch=40, width=WIDTH),
        strategy=ER(),
        trainer=TrainerSettings(batch=4, candidates=2, representatives=4),
        campaign=CampaignSettings(steps=10, label_every=500),
        ranks=1,
        device=device,
    )


@contextmanager
def page(folder: RunFolder) -> Iterator[tuple[psutil.Process, str]]:
    """The page's process, and the address that it has printed."""
    command = [sys.executable, "-u", "-m", "steering.cli", "view", str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            yield psutil.Process(process.pid), process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            process.stdout.read()  # it says goodbye


@contextmanager
def viewers(address: str, count: int, seconds: float) -> Iterator[subprocess.Popen]:
    """Browsers that have the page open; they give way to the run, see `measures.viewers`."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    command = [sys.executable, "-m", "measures.viewers", address, str(count), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        if process.stdout.readline().strip() != "open":
            raise RuntimeError(f"found browsers that ended with {process.wait()}, expected the page open in them")
        yield process


def cpu(process: psutil.Process) -> float:
    """CPU seconds of a process so far."""
    times = process.cpu_times()
    return times.user + times.system


def delays(folder: RunFolder, begun: float, ended: float) -> np.ndarray:
    """Seconds from arrival to prediction of each frame that arrived in a period, by the log; inf where it is not there.

    The log may have a prediction before the arrival that it belongs to: they come from two processes.
    """
    events = folder.events()
    arrived = {
        frame: event["time"]
        for event in events
        if event["event"] == "ChunkArrived" and begun <= event["time"] < ended
        for frame in event["frame_ids"]
    }
    predicted = {
        frame: event["time"] for event in events if event["event"] == "PredictionReady" for frame in event["frame_ids"]
    }
    return np.array([predicted.get(frame, np.inf) - time for frame, time in arrived.items()])


class Period:
    """What the page, the looks and the frames of a period cost."""

    def __init__(self, run: Any, folder: RunFolder, page: psutil.Process) -> None:
        self._run, self._folder, self._page = run, folder, page
        self.begun, self._before = time.time(), self._spent()

    def end(self) -> dict[str, float]:
        """CPU seconds by part, and the seconds of the period."""
        after, self.ended = self._spent(), time.time()
        return {name: after[name] - self._before[name] for name in after} | {"seconds": self.ended - self.begun}

    def delays(self) -> np.ndarray:
        """Of each frame that arrived in it."""
        return delays(self._folder, self.begun, self.ended)

    def _spent(self) -> dict[str, float]:
        update = self._run.page_update()
        image = 0.0 if update.image is None else update.image.header["cpu_s"]
        return {"page": cpu(self._page), "looks": update.state["look_cpu_s"], "image": image}


def case(folder: RunFolder, size: int, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """A campaign of one size: periods without and with viewers in turns. Yields the figures for each number of viewers
    once they are there, and at the end those of the run."""
    seconds = WARM_S + options.seconds * (2 * len(options.viewers) + 1) + 60.0 * len(options.viewers)
    with local(ranks=1) as client:
        run = start(experiment(size, options.rate, 2 * seconds, options.device), client, folder)
        with page(folder) as (process, address):
            time.sleep(WARM_S)
            alone = [quiet_period(run, folder, process, options.seconds)]
            for count in options.viewers:
                run.command("pause")
                with viewers(address, count, options.seconds + SETTLE_S) as browsers:
                    run.command("resume")
                    time.sleep(SETTLE_S)
                    period = Period(run, folder, process)
                    time.sleep(options.seconds)
                    spent = period.end()
                    seen = json.loads(browsers.stdout.readline())
                alone.append(quiet_period(run, folder, process, options.seconds))
                time.sleep(SETTLE_S)
                yield str(count), figures(spent, seen, period.delays(), alone[-2:])
        run.command("stop")
        yield "run", {name: run.result()[name] for name in ("frames_acquired", "frames_predicted", "frames_dropped")}


def quiet_period(run: Any, folder: RunFolder, process: psutil.Process, seconds: float) -> Period:
    """A period without a viewer."""
    period = Period(run, folder, process)
    time.sleep(seconds)
    period.end()
    return period


def figures(
    spent: dict[str, float], seen: list[dict[str, float]], delay: np.ndarray, alone: list[Period]
) -> dict[str, Any]:
    """The figures of a period with viewers. alone: the periods without, before and after it."""
    before = np.concatenate([period.delays() for period in alone])
    updates = sum(one["updates"] for one in seen)
    parts = {name: spent[name] / spent["seconds"] for name in ("page", "looks", "image")}
    return {
        "cpu_share": sum(parts.values()),
        "cpu_share_by_part": parts,
        "bytes_per_update": sum(one["bytes"] for one in seen) / max(1, updates),
        "updates_per_s": updates / len(seen) / (spent["seconds"] + SETTLE_S),
        "page_first_paint_s": float(np.median([one["first_paint_s"] for one in seen])),
        "frames": len(delay),
        "frames_delayed": int((delay > before.max()).sum()),
        "delay_ms": {f"p{q}": 1e3 * float(np.percentile(delay, q)) for q in (50, 99, 100)},
        "delay_alone_ms": {f"p{q}": 1e3 * float(np.percentile(before, q)) for q in (50, 99, 100)},
    }


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Measure, and write the figures as they come."""
    options = _options(arguments)
    found: dict[str, Any] = {"seconds": options.seconds}
    for size in options.sizes:
        of_size = found[str(size)] = {}
        for name, one in case(RunFolder.create(folder.path / f"run-{size}"), size, options):
            of_size[name] = one
            print(f"{size} px, {name}{'' if name == 'run' else ' viewers'}: {json.dumps(one)}", flush=True)
            for key in KEYS if name != "run" else ():
                found[key] = max(found.get(key, 0), one[key])
            folder.write_summary(found)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_view.py", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of a period (60)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 4096], help="of the object, pixels (512 4096)")
    parser.add_argument("--viewers", type=int, nargs="+", default=[1, 10], help="browser sessions (1 10)")
    parser.add_argument("--rate", type=float, default=40.0, help="frames a second (40)")
    add_device(parser)
    return parser.parse_args(arguments)
