"""A long run at full rate with a random fault every minute: memory, losses, and the image beside a run without faults.

    steering run workflows/bench_soak.py [--minutes 30] [--every 60] [--seed 0] [--ranks 3] [--rate 20] [--twin RUN]
    steering run workflows/bench_soak.py --every 0 --busy 2 --twin none

The campaign and the faults are those of bench_faults.py. `memory`: how fast the memory of all processes together grows,
beside the standard error of that. `image`: the phase error of each scan's refined image against the truth, the median
over the scans that both runs have finished, over that of a run of the same length without faults, which comes after it,
or is an earlier run of this benchmark that `--twin` names (`none`: none is). Faults after which everything is recovered
on a new cluster are left out: the memory begins anew with them.

The second form does no harm: `faults.workers_silent` is then the number of healthy workers that were taken for lost,
beside so many loops that keep a core busy each.
"""

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from measures.bed import OTHERS, RANKS, Bed, add_options, drawn, possible, small_disk, survivable
from measures.campaign import Died
from measures.memory import MemoryLog, slope
from measures.nodes import network_of
from pictures.soak import soak_picture
from steering import RunFolder
from steering.ptychography import phase_error

_EDGE = 20
"""Pixels at the edge of a field that few frames reach."""


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Run the campaign with faults, then without, and compare."""
    parser = argparse.ArgumentParser(prog="bench_soak.py", description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds from one fault to the next (60); 0: none")
    parser.add_argument("--busy", type=int, default=0, help="loops beside it that keep a core busy each (0)")
    parser.add_argument("--twin", default="", metavar="RUN", help="a run without faults, made before; none: none is")
    options = parser.parse_args(arguments)
    with busy(options.busy):
        found, samples, errors = soak(folder, "campaign", options, faults=options.every > 0)
        folder.write_summary({**found, "errors": errors})
        both = {"with faults": errors}
        if options.twin not in ("", "none"):
            both["without"] = RunFolder(options.twin).summary()["errors"]
        elif not options.twin:
            found["twin"], _, both["without"] = soak(folder, "twin", options, faults=False)
        if "without" in both:
            folder.write_summary({**found, "image": compared(errors, both["without"])})
    folder.write_file("soak.png", soak_picture(samples, found["faults"]["list"], both))
    if found["faults"]["hangs"]:
        last = (found["faults"]["list"] or [None])[-1]
        raise ValueError(f"found a campaign that did not survive: {found['faults'].get('why') or last}")


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many processes that do nothing but count, while the context is open."""
    found = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for one in found:
            one.kill()
            one.wait()


def soak(
    folder: RunFolder, name: str, options: argparse.Namespace, *, faults: bool
) -> tuple[dict[str, Any], list[tuple[float, float]], dict[str, float]]:
    """A run of so many minutes; its figures, its memory over time, and the error of each finished scan's image."""
    place = folder.path / name
    place.mkdir()
    suffered: list[dict[str, Any]] = []
    with network_of(options.ranks) as network, small_disk(place) as disk:
        kinds = possible(options.only, network, disk)
        targets = survivable((*RANKS, *OTHERS, "everything"), options.ranks)
        cells = drawn(options.seed, 1000, kinds, targets)
        order = [one for one in cells if one["target"] != "everything" or one["kind"] == "disk"]
        bed = Bed(place, network, disk, options)
        try:
            bed.begin()
            begun = time.time()
            until = begun + 60 * options.minutes
            with MemoryLog(lambda: [bed.campaign.pid, *bed.nodes.processes()]) as memory:
                for number, fault in enumerate(order):
                    due = begun + options.every * (number + 0.5)
                    if not faults or due > until:
                        break
                    time.sleep(max(0.0, due - time.time()))
                    suffered.append({"time": time.time(), **bed.suffer(number, fault)})
                    so_far = {"memory": slope(memory.samples, block_s=options.every)}
                    folder.write_summary({"faults": {"list": suffered}, **so_far})
                    if not suffered[-1]["survived"]:
                        break
                while time.time() < until and not (suffered and not suffered[-1]["survived"]):
                    time.sleep(min(1.0, max(0.0, until - time.time())))
            survived = sum(fault["survived"] for fault in suffered)
            counts: dict[str, Any] = {"list": suffered, "survived": survived, "hangs": len(suffered) - survived}
            if not counts["hangs"]:
                counts |= accounted(bed)
            errors = image_errors(RunFolder(bed.campaign.path))
        finally:
            bed.close()
    return {"faults": counts, "memory": slope(memory.samples, block_s=options.every or 60.0)}, memory.samples, errors


def accounted(bed: Bed) -> dict[str, Any]:
    """What became of all that was in a campaign, which is stopped for it."""
    try:
        figures, found = bed.end()
    except Died as died:
        return {"hangs": 1, "why": str(died)}
    rate = figures["frames_acquired"] / max(1e-9, figures["wall_s"]["acquire"])
    return {**found, "workers_silent": figures["workers_silent"], "frames_per_s": rate}


def image_errors(run: RunFolder) -> dict[str, float]:
    """Phase error against the truth, radians, of the refined image of every scan that was finished."""
    finished = {e["scan"] for e in run.events() if e["event"] == "ScanRefined"}
    found = {}
    for scan, image in run.objects().items():
        if scan not in finished or "truth_phase" not in image or "phase_refined" not in image:
            continue
        waves = (
            image[amplitude] * np.exp(1j * image[phase])
            for amplitude, phase in (("amplitude_refined", "phase_refined"), ("truth_amplitude", "truth_phase"))
        )
        mine, truth = (wave.values[_EDGE:-_EDGE, _EDGE:-_EDGE] for wave in waves)
        found[scan] = phase_error(mine, truth)
    return found


def compared(disturbed: dict[str, float], quiet: dict[str, float]) -> dict[str, Any]:
    """The two runs' errors over the scans that both have."""
    both = sorted(set(disturbed) & set(quiet))
    if not both:
        return {"scans": 0}
    medians = [float(np.median([errors[scan] for scan in both])) for errors in (disturbed, quiet)]
    return {"scans": len(both), "error": medians[0], "error_without": medians[1], "over": medians[0] / medians[1]}
