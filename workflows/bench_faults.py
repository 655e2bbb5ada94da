"""Random faults on a running campaign: what is noticed, how fast it goes on, and whether anything is lost or repeated.

    steering run workflows/bench_faults.py [--faults 100] [--seed 0] [--ranks 3] [--only K] [--targets T]
    steering run workflows/bench_faults.py --faults kill:predictor,cut:rank-0,disk:everything
    steering run workflows/bench_faults.py --minutes 6 [--after RUN]

A campaign measures endless scans; scheduler, driver, runner, source, predictor, label worker and every rank have a
process, and where the system allows it a network, of their own. Faults come one after the other in an order drawn with
the seed, each at a random moment after a random kind of event, as soon as the campaign trains and predicts again after
the one before and is complete; `--faults` may also name them, in their order. With `--minutes` no fault begins later
than that; `--after` goes on in the order where an earlier run of this benchmark has ended, in a campaign of its own,
and adds to that run's figures. They are written after every fault.

Kinds: kill (SIGKILL), stop (SIGSTOP, and SIGCONT once the campaign goes on), cut (its network is taken away, and comes
back once the campaign goes on, that of the only node of a role once the loss is noticed), stall (code that holds the
interpreter lock for `--hold` seconds), disk (the run's disk is full for as long; needs the right to mount one).
Targets: rank-0, rank-other, rank-two (two at once), predictor, source, label, runner, scheduler, everything. After the
scheduler or everything was killed the run is continued by `steering recover` on a new cluster (`recover_s`); nothing
else is done by hand.
"""

import argparse
import math
import os
import time
from collections import Counter
from typing import Any

import numpy as np

from measures.bed import (
    TARGETS,
    Bed,
    add_options,
    count_or_cells,
    drawn,
    possible,
    small_disk,
    some_of,
    survivable,
)
from measures.campaign import Died
from measures.nodes import network_of
from pictures.faults import faults_picture
from steering import RunFolder

SHOWN = ("notice_s", "train_again_s", "predict_again_s")
OF_CAMPAIGN = (
    "ranks",
    "ranks_lost",
    "ranks_joined",
    "samples_lost",
    "workers_silent",
    "frames_acquired",
    "frames_unheard",
)


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Run the campaign, do harm to it, and count."""
    options = _options(arguments)
    before = RunFolder(options.after).summary()["faults"] if options.after else {"list": [], "campaigns": 0}
    first = 1 + max((fault["number"] for fault in before["list"]), default=-1)
    if first >= (options.faults if isinstance(options.faults, int) else len(options.faults)):
        _write(folder, before)
        return
    with network_of(options.ranks) as network, small_disk(folder.path) as disk:
        kinds, targets = possible(options.only, network, disk), survivable(options.targets, options.ranks)
        order = drawn(options.seed, options.faults, kinds, targets)[first:]
        faults: list[dict[str, Any]] = []
        found: dict[str, Any] = {}
        bed = Bed(folder.path, network, disk, options)
        try:
            bed.begin()
            until = time.monotonic() + 60 * options.minutes
            for number, fault in enumerate(order, first):
                if time.monotonic() > until:
                    break
                faults.append({"load": os.getloadavg()[0], **bed.suffer(number, fault)})
                _write(folder, added(before, counted(faults)))
                if not faults[-1]["survived"]:
                    break
            if all(fault["survived"] for fault in faults):
                figures, found = bed.end()
                found |= {key: figures[key] for key in OF_CAMPAIGN} | {"accounted": len(faults)}
        except Died as died:
            found = {"why": str(died), "hangs": 1}
        finally:
            bed.close()
    own = counted(faults, found.pop("hangs", 0)) | found
    _write(folder, added(before, own))
    if own["hangs"]:
        raise ValueError(f"found a campaign that did not survive: {found.get('why') or faults[-1]}")


def counted(faults: list[dict[str, Any]], hangs: int = 0) -> dict[str, Any]:
    """What is known of one campaign's faults without its account. hangs: others than after a fault. `healthy_lost`:
    workers that nobody had harmed and that were taken for lost."""
    survived = sum(fault["survived"] for fault in faults)
    counts = {"survived": survived, "hangs": len(faults) - survived + hangs}
    healthy = sum(fault.get("healthy_lost", 0) for fault in faults)
    return {"list": list(faults), **counts, "healthy_lost": healthy, "campaigns": 1}


def added(before: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The figures of earlier campaigns and of this one: lists are joined, numbers are summed. `accounted` is of how
    many faults the campaign came to its end in order: frames, decisions, labels and versions are of these."""
    found = before | own
    for key in before.keys() & own.keys():
        if isinstance(own[key], int | float | list):
            found[key] = before[key] + own[key]
    return found


def figures_of(faults: list[dict[str, Any]]) -> dict[str, Any]:
    """The times of all faults; those after which everything was recovered apart."""
    found: dict[str, Any] = {}
    for key in (*SHOWN, "recover_s"):
        times = [fault[key] for fault in faults if key in fault]
        found[key] = {f"p{q}": float(np.percentile(times, q)) for q in (50, 99)} if times else {}
    noticed = [fault for fault in faults if "notice_s" in fault]
    found["notice_s_by_kind"] = {
        kind: float(np.percentile([f["notice_s"] for f in noticed if f["kind"] == kind], 99))
        for kind in sorted({f["kind"] for f in noticed})
    }
    return found


def _write(folder: RunFolder, found: dict[str, Any]) -> None:
    faults = found["list"]
    cells = Counter(f"{fault['kind']} {fault['target']}" for fault in faults)
    folder.write_summary({"faults": found, **figures_of(faults), "faults_by_cell": dict(sorted(cells.items()))})
    folder.write_file("faults.png", faults_picture(faults))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_faults.py", description=__doc__.split("\n")[0])
    add_options(parser)
    which = "how many, in a random order (100), or which, in this one: KIND:TARGET,KIND:TARGET"
    parser.add_argument("--faults", type=count_or_cells, default=100, help=which)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no fault begins later than that")
    parser.add_argument("--after", metavar="RUN", help="go on where this run has ended, and add to its figures")
    parser.add_argument("--targets", type=some_of(TARGETS), default=list(TARGETS), help="what they hit, with commas")
    return parser.parse_args(arguments)
