"""What the live page costs: CPU time, bytes and delayed frames, with several browsers that look at objects of any size.

    steering run workflows/bench_view.py [--seconds 60] [--sizes 512 4096] [--viewers 1 10]

For each size a campaign runs on this machine: simulated frames, prediction, training. Periods without a viewer and
with so many real browser sessions take turns; the figures of each are written as soon as they are there. `cpu_share` is
the CPU time of the page's process, of the looks in the runner and of making the small image in the predictor, over the
period; the browsers' own is not in it. The run is paused while the browsers open the page, the first one alone and then
the others at once: beside a run that fills the cores the last of ten would come after minutes. `page_first_paint_s` is
that of the first one. `frames_delayed` counts frames that waited in the fast thread for longer than any did in the
periods without a viewer, before and after, by the limits of the run's latency histogram (`alone_within_s`).
"""

import argparse
import json
import os
import re
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
SETTLE_S = 3.0  # between periods: figures of how long frames waited are renewed every two seconds
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


def waits(run: Any) -> dict[float, int]:
    """How many frames have been predicted within so many seconds of their arrival, since the run's start: the fast
    thread's own histogram, at most two seconds old."""
    found = re.findall(r'steering_latency_seconds_bucket\{[^}]*le="([^"]+)"[^}]*\} (\S+)', run.metrics().decode())
    return {float(limit.replace("+Inf", "inf")): int(float(count)) for limit, count in found}


class Period:
    """What the page and the looks cost in a period, and how long its frames waited."""

    def __init__(self, run: Any, page: psutil.Process, seconds: float) -> None:
        """It takes so many seconds, here."""
        self._run, self._page = run, page
        begun, spent, waited = time.monotonic(), self._spent(), waits(run)
        time.sleep(seconds)
        after, within = self._spent(), waits(run)
        self.seconds = time.monotonic() - begun
        self.spent = {name: after[name] - spent[name] for name in after}
        """CPU seconds by part."""
        self.within = {limit: within[limit] - waited.get(limit, 0) for limit in within}
        """Frames that waited for at most so many seconds."""

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
            alone = [Period(run, process, options.seconds)]
            for count in options.viewers:
                run.command("pause")
                with viewers(address, count, options.seconds + SETTLE_S) as browsers:
                    run.command("resume")
                    time.sleep(SETTLE_S)
                    beside = Period(run, process, options.seconds)
                    seen = json.loads(browsers.stdout.readline())
                time.sleep(SETTLE_S)
                alone.append(Period(run, process, options.seconds))
                yield str(count), figures(beside, seen, alone[-2:])
        run.command("stop")
        yield "run", {name: run.result()[name] for name in ("frames_acquired", "frames_predicted", "frames_dropped")}


def figures(beside: Period, seen: list[dict[str, float]], alone: list[Period]) -> dict[str, Any]:
    """The figures of a period with viewers. alone: the periods without, before and after it."""
    updates = sum(one["updates"] for one in seen)
    parts = {name: beside.spent[name] / beside.seconds for name in ("page", "looks", "image")}
    without = {limit: sum(period.within[limit] for period in alone) for limit in beside.within}
    longest = min(limit for limit, count in without.items() if count == without[np.inf])
    return {
        "cpu_share": sum(parts.values()),
        "cpu_share_by_part": parts,
        "bytes_per_update": sum(one["bytes"] for one in seen) / max(1, updates),
        "updates_per_s": updates / sum(one["seconds"] for one in seen),
        "page_first_paint_s": seen[0]["first_paint_s"],
        "frames": beside.within[np.inf],
        "frames_delayed": beside.within[np.inf] - beside.within[longest],
        "alone_within_s": longest,
        "share_within_s": {"viewers": shares(beside.within), "alone": shares(without)},
    }


def shares(within: dict[float, int]) -> dict[str, float]:
    """Of all frames, those within each limit that some exceed and some do not."""
    found = {f"{limit:g}": count / max(1, within[np.inf]) for limit, count in within.items()}
    return {limit: round(share, 4) for limit, share in found.items() if 0 < share < 1}


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
