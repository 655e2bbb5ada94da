"""Random faults on a running campaign: what is noticed, how fast it goes on, and whether anything is lost or repeated.

    steering run workflows/bench_faults.py [--faults 100] [--first 0] [--seed 0] [--ranks 3] [--only K] [--targets T]
    steering run --out DIR workflows/bench_faults.py --merge RUN RUN ...

A campaign measures endless scans; scheduler, driver, runner, source, predictor, label worker and every rank have a
process, and where the system allows it a network, of their own. Faults come one after the other in an order drawn with
the seed, each at a random moment after a random kind of event, as soon as the campaign trains and predicts again after
the one before and is complete. `--first` goes on with a later part of the same order, in a campaign of its own;
`--merge` puts the parts together.

Kinds: kill (SIGKILL), stop (SIGSTOP, and SIGCONT once the campaign goes on), cut (its network is taken away, and comes
back once the campaign goes on), stall (code that holds the interpreter lock for ten seconds), disk (the run's disk is
full for ten seconds; needs the right to mount one). Targets: rank-0, rank-other, rank-two (two at once), predictor,
source, label, runner, scheduler, everything. After the scheduler or everything was killed the run is continued by
`steering recover` on a new cluster (`recover_s`); nothing else is done by hand.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from measures.account import account
from measures.campaign import Campaign, Died
from measures.nodes import Network, Nodes, network_of
from pictures.faults import faults_picture
from steering import RunFolder
from steering.clusters.roles import INFERENCE, LABEL, RUNNER, SOURCE, TRAINER

RANKS, OTHERS = ("rank-0", "rank-other", "rank-two"), ("predictor", "source", "label", "runner")
TARGETS = (*RANKS, *OTHERS, "scheduler", "everything")
MATRIX = {
    "kill": TARGETS,
    "stop": TARGETS,
    "cut": (*RANKS, *OTHERS),
    "stall": (*RANKS, *OTHERS, "scheduler"),
    "disk": ("everything",),
}
ROLES = {"predictor": INFERENCE, "source": SOURCE, "label": LABEL, "runner": RUNNER}
PHASES = ("CandidateReady", "LabelsReady", "ModelPublished", "CheckpointWritten", "DecisionSuggested")
"""Events after which a fault comes, within a second."""
HOLD_S = 10.0
"""How long the lock is held, the disk is full, and all processes are stopped."""
DISK_MIB = 512
SHOWN = ("notice_s", "train_again_s", "predict_again_s")


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Run the campaign, do harm to it, and count."""
    options = _options(arguments)
    if options.merge:
        _write(folder, _merged([RunFolder(path).summary() for path in options.merge]))
        return
    with network_of(options.ranks) as network, _disk(folder) as disk:
        kinds = {kind: None for kind in options.only if (kind != "cut" or network.there) and (kind != "disk" or disk)}
        print(f"kinds of faults: {', '.join(kinds)}", flush=True)
        order = drawn(options.seed, options.first + options.faults, list(kinds), options.targets)[options.first :]
        bed = Bed(folder.path, network, disk, options)
        try:
            faults, found = bed.run(order, folder)
        finally:
            bed.close()
    parts = {
        "list": faults,
        "survived": sum(f["survived"] for f in faults),
        "hangs": sum(not f["survived"] for f in faults),
    }
    _write(folder, {"faults": {**parts, **found}})


def drawn(seed: int, count: int, kinds: list[str], targets: list[str]) -> list[dict[str, Any]]:
    """The order of faults: every cell of the matrix in a random order, and again in another one."""
    rng = np.random.default_rng(seed)
    cells = [(kind, target) for kind in kinds for target in MATRIX[kind] if target in targets]
    found: list[dict[str, Any]] = []
    while len(found) < count:
        for k in rng.permutation(len(cells)):
            phase, moment = str(rng.choice(PHASES)), float(rng.uniform(0.0, 1.0))
            found.append({"kind": cells[k][0], "target": cells[k][1], "phase": phase, "moment_s": moment})
    return found[:count]


class Bed:
    """The campaign, the cluster that it is on, and what is done to both."""

    def __init__(self, folder: Path, network: Network, disk: Path | None, options: argparse.Namespace) -> None:
        self.folder, self.network, self.disk, self.options = folder, network, disk, options
        self.nodes = Nodes(folder, network, options.ranks)
        self.campaign = Campaign(folder / "campaign" / "run", *self._words())

    def _words(self) -> list[str]:
        numbers = [
            "--ranks",
            str(self.options.ranks),
            "--seed",
            str(self.options.seed),
            "--rate",
            str(self.options.rate),
        ]
        return ["--cluster", self.nodes.address, "--insecure", *numbers]

    def run(self, order: list[dict[str, Any]], folder: RunFolder) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The faults in this order; what each led to, and the account of all."""
        faults: list[dict[str, Any]] = []
        self.campaign.wait(lambda events: any(e["event"] == "CandidateReady" for e in events), 0)
        for number, fault in enumerate(order, self.options.first):
            self._await_phase(fault)
            try:
                faults.append({"number": number, **fault, "survived": True, **self.harm(**fault)})
            except Died as died:
                faults.append({"number": number, **fault, "survived": False, "why": str(died)})
            folder.write_summary({"faults": {"list": faults}})
            print(
                " ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in faults[-1].items()),
                flush=True,
            )
            if not faults[-1]["survived"]:
                return faults, {}
        figures = self.campaign.stop()
        keys = (
            "ranks",
            "ranks_lost",
            "ranks_joined",
            "samples_lost",
            "workers_silent",
            "frames_acquired",
            "frames_unheard",
        )
        return faults, {**account(RunFolder(self.campaign.path)), "campaign": {key: figures[key] for key in keys}}

    def _await_phase(self, fault: dict[str, Any]) -> None:
        now = time.time()
        with contextlib.suppress(Died):
            self.campaign.wait(lambda events: any(e["event"] == fault["phase"] for e in events), now, 12.0)
        time.sleep(fault["moment_s"])

    def harm(self, *, kind: str, target: str, **_: Any) -> dict[str, Any]:
        """One fault; times in seconds from it until it was noticed, and until training and prediction went on."""
        if kind == "disk":
            return self._fill()
        if target == "everything" or (target == "scheduler" and kind != "cut"):
            return self._kill_all(target) if kind == "kill" else self._hold(kind, target)
        names = self._victims(target)
        before = {name: self.nodes.workers()[name]["address"] for name in names}
        pids = [self.nodes.process(name) for name in names]
        begun = time.time()
        for name, pid in zip(names, pids, strict=True):
            self._strike(name, pid, kind)
        try:
            noticed = self._gone(before) - begun
            found = {"notice_s": noticed, **self._back(target, begun + noticed, begun)}
        finally:
            for name, pid in zip(names, pids, strict=True):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                if kind == "cut":
                    self.network.cut(name, False)
        self._complete(begun)
        return found

    def _victims(self, target: str) -> list[str]:
        if target in ROLES:
            return self.nodes.with_role(ROLES[target])[:1]
        ranks = self.nodes.with_role(TRAINER)
        return {"rank-0": ranks[:1], "rank-other": ranks[1:2], "rank-two": ranks[:2]}[target]

    def _strike(self, name: str, pid: int, kind: str) -> None:
        if kind == "stall":
            self.nodes.stall(name, HOLD_S)
        elif kind == "cut":
            self.network.cut(name, True)
        else:
            os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)

    def _gone(self, before: dict[str, str]) -> float:
        """When the last of these workers was off the cluster."""

        def off(_: list[dict[str, Any]]) -> bool:
            there = {one["address"] for one in self.nodes.workers().values()}
            return not there & set(before.values())

        self.campaign.wait(off, time.time())
        return time.time()

    def _back(self, target: str, noticed: float, begun: float) -> dict[str, float]:
        """Wait until the campaign trains and predicts after what has changed for it."""
        awaited = {
            "rank": "GroupChanged",
            "predictor": "PredictorReplaced",
            "source": "SourceReopened",
            "runner": "RunRecovered",
        }
        name = awaited.get(target.partition("-")[0])

        def on(events: list[dict[str, Any]]) -> bool:
            if name and not any(e["event"] == name and e.get("lost", True) for e in events):
                return False
            return all(after(events, one, noticed) for one in ("CandidateReady", "PredictionReady"))

        events = self.campaign.wait(on, begun)
        return {
            "train_again_s": after(events, "CandidateReady", noticed) - begun,
            "predict_again_s": after(events, "PredictionReady", noticed) - begun,
        }

    def _hold(self, kind: str, target: str) -> dict[str, Any]:
        """The scheduler, or all processes, stand still for a time, and go on."""
        pids = (
            [self.nodes.process("scheduler")] if target == "scheduler" else [*self.nodes.processes(), self.campaign.pid]
        )
        begun = time.time()
        if kind == "stall":
            self.nodes.stall("scheduler", HOLD_S)
            time.sleep(HOLD_S)
        else:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(HOLD_S)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        thawed = time.time()
        found = self._back(target, thawed, thawed)
        self._complete(thawed)
        lost = [e for e in self.campaign.since(begun) if e["event"] == "WorkerLost"]
        return {**found, "lost_by_it": len(lost)}

    def _kill_all(self, target: str) -> dict[str, Any]:
        """Kill the scheduler alone, or every process of the run, and have it recovered on a new cluster."""
        begun = time.time()
        if target == "scheduler":
            os.kill(self.nodes.process("scheduler"), signal.SIGKILL)
            until = time.monotonic() + 60
            while not self.campaign.ended:
                if time.monotonic() > until:
                    raise Died("the driver did not notice within 60 s that the scheduler is gone")
                time.sleep(0.05)
        noticed = time.time()
        self.campaign.kill()
        self.nodes.close()
        started = time.time()
        self.nodes = Nodes(self.folder, self.network, self.options.ranks)
        up = time.time()
        self.campaign.recover(*self._words())
        found = self._back("runner", up, begun)
        times = {"recover_s": max(found.values()), "cluster_s": up - started, "again": found}
        self._complete(up)
        return {**times, **({"driver_ended_s": noticed - begun} if target == "scheduler" else {})}

    def _fill(self) -> dict[str, Any]:
        """No byte can be written into the run's folder for a time."""
        begun, filler = time.time(), self.folder / "campaign" / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(2**20))
        time.sleep(HOLD_S)
        filler.unlink()
        freed = time.time()
        found = self._back("everything", freed, freed)
        during = [e for e in self.campaign.since(begun) if e["event"] == "PredictionReady" and e["time"] < freed]
        return {**found, "chunks_predicted_while_full": len(during)}

    def _complete(self, begun: float) -> None:
        """Wait until all workers are there again, and so many ranks train."""
        ranks = self.options.ranks

        def whole(events: list[dict[str, Any]]) -> bool:
            changes = [e for e in events if e["event"] == "GroupChanged"]
            return len(self.nodes.workers()) == len(self.nodes.roles) and (not changes or changes[-1]["ranks"] == ranks)

        self.campaign.wait(whole, begun)

    def close(self) -> None:
        """Leave no process behind."""
        self.campaign.kill()
        self.nodes.close()


def after(events: list[dict[str, Any]], name: str, since: float) -> float:
    """When the first event of this name came that was begun after the newest change of what had been lost; 0: none."""
    changes = [e["time"] for e in events if e["event"] in ("PredictorReplaced", "SourceReopened", "RunRecovered")]
    if name == "CandidateReady":
        changes += [e["time"] for e in events if e["event"] == "GroupChanged" and e["lost"]]
    newest = max([since, *changes])
    return next((e["time"] for e in events if e["event"] == name and e["time"] >= newest), 0.0)


@contextlib.contextmanager
def _disk(folder: RunFolder) -> Iterator[Path | None]:
    """A small disk of its own for the campaign's folder; None, and a plain folder, without the right to mount one."""
    place = folder.path / "campaign"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "steering-faults", str(place)],
        capture_output=True,
        check=False,
    )
    try:
        yield place if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
            with tempfile.TemporaryDirectory(dir=folder.path) as kept:
                subprocess.run(["cp", "-r", str(place), kept], check=False)
                subprocess.run(["umount", "-l", str(place)], check=False)
                subprocess.run(["cp", "-r", f"{kept}/campaign/.", str(place)], check=False)


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
    def words(known: Any) -> Any:
        return lambda text: [word for word in text.split(",") if word in known]

    parser = argparse.ArgumentParser(prog="bench_faults.py", description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first fault in the order of the seed (0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--rate", type=float, default=20.0, help="frames per second (20)")
    parser.add_argument("--only", type=words(MATRIX), default=list(MATRIX), help="kinds of faults, with commas")
    parser.add_argument("--targets", type=words(TARGETS), default=list(TARGETS), help="what they hit, with commas")
    parser.add_argument("--merge", nargs="+", metavar="RUN", help="put the figures of these runs together")
    return parser.parse_args(arguments)
