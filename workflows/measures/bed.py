"""A campaign on a cluster of its own, what is done to both, and how they go on."""

import argparse
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from measures.account import account
from measures.campaign import Campaign, Died
from measures.nodes import Network, Nodes
from steering import RunFolder
from steering.clusters.roles import INFERENCE, LABEL, RUNNER, SOURCE, TRAINER
from steering.ptychography.device import add_device

RANKS, OTHERS = ("rank-0", "rank-other", "rank-two"), ("predictor", "source", "label", "runner")
TARGETS = (*RANKS, *OTHERS, "scheduler", "everything")
MATRIX = {
    "kill": TARGETS,
    "stop": TARGETS,
    "cut": (*RANKS, *OTHERS),
    "stall": (*RANKS, *OTHERS, "scheduler"),
    "disk": ("everything",),
}
"""What each kind of fault can hit."""
Cell = tuple[str, str]
"""A kind of fault and its target."""
ROLES = {"predictor": INFERENCE, "source": SOURCE, "label": LABEL, "runner": RUNNER}
PHASES = ("CandidateReady", "LabelsReady", "ModelPublished", "CheckpointWritten", "DecisionSuggested")
"""Events after which a fault comes, within a second."""
BEGIN_S = 300.0
"""Within so long the campaign must train for the first time."""
COMPLETE_S = 240.0
"""Within so long all nodes must be there again, and train. After a cut that is a matter of TCP and of Dask: half a
minute passes until a nanny takes its connection to the scheduler for broken."""
DISK_MIB = 4096
"""Half an hour of frames in checkpoints, and again those that have left memory."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark with faults is asked."""
    parser.add_argument("--seed", type=int, default=0, help="of the order of the faults (0)")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--rate", type=float, default=20.0, help="frames per second (20)")
    hold = "seconds for which the lock is held, the disk is full, and all processes are stopped (10)"
    parser.add_argument("--hold", type=float, default=10.0, help=hold)
    parser.add_argument("--only", type=some_of(MATRIX), default=list(MATRIX), help="kinds of faults, with commas")
    add_device(parser)


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """What reads words with commas between them. An unknown one is an error."""

    def read(text: str) -> list[str]:
        words = text.split(",")
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"found {', '.join(unknown)}, expected some of {', '.join(known)}")
        return words

    return read


def count_or_cells(text: str) -> int | list[Cell]:
    """What reads a number of faults, or KIND:TARGET with commas between them. An unknown one is an error."""
    if text.isdecimal():
        return int(text)
    cells = [(kind, target) for kind, _, target in (word.partition(":") for word in text.split(","))]
    if unknown := [":".join(cell) for cell in cells if cell[1] not in MATRIX.get(cell[0], ())]:
        raise argparse.ArgumentTypeError(f"found {', '.join(unknown)}, expected a number, or some of {MATRIX}")
    return cells


def possible(kinds: Sequence[str], network: Network, disk: Path | None) -> list[str]:
    """Those of the kinds of faults that can be done here; says so."""
    missing = {"cut": not network.there, "disk": disk is None}
    found = [kind for kind in kinds if not missing.get(kind, False)]
    left_out = [kind for kind in kinds if kind not in found]
    print(f"kinds of faults: {', '.join(found)}{'; not possible here: ' if left_out else ''}{', '.join(left_out)}")
    return found


class Bed:
    """The campaign, the cluster that it is on, and what is done to both."""

    def __init__(self, folder: Path, network: Network, disk: Path | None, options: argparse.Namespace) -> None:
        self.folder, self.network, self.disk, self.options = folder, network, disk, options
        self.nodes = Nodes(folder, network, options.ranks)
        self.campaign = Campaign(folder / "campaign" / "run", *self._words())

    def _words(self) -> list[str]:
        named = {name: getattr(self.options, name) for name in ("ranks", "seed", "rate", "device")}
        numbers = [word for name, value in named.items() for word in (f"--{name}", str(value))]
        return ["--cluster", self.nodes.address, "--insecure", *numbers]

    def begin(self) -> None:
        """Wait until it trains. Raises Died."""
        self.campaign.wait(lambda events: any(e["event"] == "CandidateReady" for e in events), 0, BEGIN_S)

    def suffer(self, number: int, fault: dict[str, Any]) -> dict[str, Any]:
        """Do one fault in its phase; what it led to. `survived` is False where the campaign has ended or hangs."""
        self._await_phase(fault)
        try:
            found = {"number": number, **fault, "survived": True, **self.harm(**fault)}
        except Died as died:
            found = {"number": number, **fault, "survived": False, "why": str(died)}
        words = (f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in found.items())
        print(" ".join(words), flush=True)
        return found

    def end(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Stop the campaign in order; its figures, and the account of all that was in it. Raises Died."""
        figures = self.campaign.stop()
        return figures, account(RunFolder(self.campaign.path))

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
            if kind == "cut" and target in ROLES:  # there is no other node that could take its place
                self.network.cut(names[0], False)
            found = {"notice_s": noticed, **self._back(target, begun + noticed, begun)}
        finally:
            for name, pid in zip(names, pids, strict=True):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                if kind == "cut":
                    self.network.cut(name, False)
        self._complete(begun)
        silent = [e["worker"] for e in self.campaign.since(begun) if e["event"] == "WorkerLost" and e["silent"]]
        return {**found, "healthy_lost": len([name for name in silent if name not in names])}

    def _victims(self, target: str) -> list[str]:
        if target in ROLES:
            return self.nodes.with_role(ROLES[target])[:1]
        ranks = self.nodes.with_role(TRAINER)
        return {"rank-0": ranks[:1], "rank-other": ranks[1:2], "rank-two": ranks[:2]}[target]

    def _strike(self, name: str, pid: int, kind: str) -> None:
        if kind == "stall":
            self.nodes.stall(name, self.options.hold)
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
            self.nodes.stall("scheduler", self.options.hold)
            time.sleep(self.options.hold)
        else:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(self.options.hold)
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
        with open(filler, "wb", buffering=0) as file:
            for step in (2**26, 2**20, 2**12):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), step)
        time.sleep(self.options.hold)
        filler.unlink()
        freed = time.time()
        predicted = self.campaign.wait(lambda events: after(events, "PredictionReady", freed) > 0, begun)
        during = [e for e in predicted if e["event"] == "PredictionReady" and e["time"] < freed]
        return {**self._back("everything", freed, freed), "chunks_predicted_while_full": len(during)}

    def _complete(self, begun: float) -> None:
        """Wait until all workers are there again, and so many ranks train."""
        ranks = self.options.ranks

        def whole(events: list[dict[str, Any]]) -> bool:
            changes = [e for e in events if e["event"] == "GroupChanged"]
            return len(self.nodes.workers()) == len(self.nodes.roles) and (not changes or changes[-1]["ranks"] == ranks)

        self.campaign.wait(whole, begun, COMPLETE_S)

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
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A small disk of its own for `campaign` in a folder; None, and a plain folder, without the right to mount one."""
    place = folder / "campaign"
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
            with tempfile.TemporaryDirectory(dir=folder) as kept:
                subprocess.run(["cp", "-r", str(place), kept], check=False)
                subprocess.run(["umount", "-l", str(place)], check=False)
                subprocess.run(["cp", "-r", f"{kept}/campaign/.", str(place)], check=False)


def survivable(targets: Sequence[str], ranks: int) -> list[str]:
    """Those of the targets that leave a rank: a run ends where all are lost at once."""
    needed = {"rank-0": 2, "rank-other": 2, "rank-two": 3}
    return [target for target in targets if ranks >= needed.get(target, 1)]


def drawn(
    seed: int, faults: int | Sequence[Cell], kinds: Sequence[str], targets: Sequence[str]
) -> list[dict[str, Any]]:
    """The order of so many faults: every cell of the matrix in a random order, and again in another one; or these, in
    this order, as far as they are of the kinds and targets. Each comes at a random moment after a random event."""
    rng = np.random.default_rng(seed)
    named = None if isinstance(faults, int) else faults
    known = [(kind, target) for kind in kinds for target in MATRIX[kind] if target in targets]
    cells = known if named is None else [cell for cell in named if cell in known]
    count = faults if isinstance(faults, int) else len(cells)
    found: list[dict[str, Any]] = []
    if not cells:
        raise ValueError(f"found no fault of the kinds {list(kinds)} on {list(targets)}, expected a cell of {MATRIX}")
    while len(found) < count:
        for k in rng.permutation(len(cells)) if named is None else range(len(cells)):
            phase, moment = str(rng.choice(PHASES)), float(rng.uniform(0.0, 1.0))
            found.append({"kind": cells[k][0], "target": cells[k][1], "phase": phase, "moment_s": moment})
    return found[:count]
