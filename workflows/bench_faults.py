"""Random faults on a running campaign: what is noticed, how fast it goes on, and whether anything is lost or repeated.

    steering run workflows/bench_faults.py [--faults 100] [--first 0] [--seed 0] [--ranks 3] [--only K] [--targets T]
    steering run --out DIR workflows/bench_faults.py --merge RUN RUN ...

A campaign measures endless scans; scheduler, driver, runner, source, predictor, label worker and every rank have a
process, and where the system allows it a network, of their own. Faults come one after the other in an order drawn with
the seed, each at a random moment after a random kind of event, as soon as the campaign trains and predicts again after
the one before and is complete. `--first` goes on with a later part of the same order, in a campaign of its own;
`--merge` puts the parts together.

Kinds: kill (SIGKILL), stop (SIGSTOP, and SIGCONT once the campaign goes on), cut (its network is taken away, and comes
back once the campaign goes on, that of the only node of a role once the loss is noticed), stall (code that holds the
interpreter lock for ten seconds), disk (the run's disk is full for ten seconds; needs the right to mount one). Targets:
rank-0, rank-other, rank-two (two at once), predictor, source, label, runner, scheduler, everything. After the scheduler
or everything was killed the run is continued by `steering recover` on a new cluster (`recover_s`); nothing else is done
by hand.
"""

import argparse
from collections import Counter
from typing import Any

import numpy as np

from measures.bed import TARGETS, Bed, add_options, drawn, possible, small_disk, some_of, survivable
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
    if options.merge:
        _write(folder, _merged([RunFolder(path).summary() for path in options.merge]))
        return
    with network_of(options.ranks) as network, small_disk(folder.path) as disk:
        kinds, targets = possible(options.only, network, disk), survivable(options.targets, options.ranks)
        order = drawn(options.seed, options.first + options.faults, kinds, targets)[options.first :]
        faults: list[dict[str, Any]] = []
        found: dict[str, Any] = {}
        bed = Bed(folder.path, network, disk, options)
        try:
            bed.begin()
            for number, fault in enumerate(order, options.first):
                faults.append(bed.suffer(number, fault))
                folder.write_summary({"faults": {"list": faults}})
                if not faults[-1]["survived"]:
                    break
            else:
                figures, found = bed.end()
                found["campaign"] = {key: figures[key] for key in OF_CAMPAIGN}
        except Died as died:
            found = {"why": str(died)}
        finally:
            bed.close()
    survived = sum(fault["survived"] for fault in faults)
    counts = {"list": faults, "survived": survived, "hangs": len(faults) - survived + ("why" in found)}
    _write(folder, {"faults": {**counts, **found}})
    if counts["hangs"]:
        raise ValueError(f"found a campaign that did not survive: {found.get('why') or faults[-1]}")


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


def _merged(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several parts."""
    parts = [summary["faults"] for summary in summaries]
    numbers = {key for part in parts for key, value in part.items() if isinstance(value, int)}
    counts = {key: sum(part.get(key, 0) for part in parts) for key in sorted(numbers)}
    faults = sorted((fault for part in parts for fault in part["list"]), key=lambda one: one["number"])
    return {"faults": {"list": faults, **counts, "campaigns": len(parts)}}


def _write(folder: RunFolder, found: dict[str, Any]) -> None:
    faults = found["faults"]["list"]
    cells = Counter(f"{fault['kind']} {fault['target']}" for fault in faults)
    folder.write_summary({**found, **figures_of(faults), "faults_by_cell": dict(sorted(cells.items()))})
    folder.write_file("faults.png", faults_picture(faults))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_faults.py", description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first fault in the order of the seed (0)")
    parser.add_argument("--targets", type=some_of(TARGETS), default=list(TARGETS), help="what they hit, with commas")
    parser.add_argument("--merge", nargs="+", metavar="RUN", help="put the figures of these runs together")
    return parser.parse_args(arguments)
