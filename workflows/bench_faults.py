"""Random faults on a running campaign: what is noticed, how fast it goes on, and whether anything is lost or repeated.

    steering run workflows/bench_faults.py [--faults 100] [--seed 0] [--ranks 3] [--only kill,stop] [--targets rank-0]

A campaign measures endless scans with three ranks on a cluster of this machine, where every role has a process of its
own. Faults come one after the other, at a random moment of a training step, each as soon as the campaign trains and
predicts again after the one before. At the end every frame, decision and version is accounted for by its identity.

Kinds: `kill` (SIGKILL), `stop` (SIGSTOP, and SIGCONT once the campaign goes on, where the process is still there),
`stall` (code that holds the interpreter lock for ten seconds). Targets: rank-0, rank-other, rank-two (two at once),
predictor, source, label.
Losing the runner, or everything, is what `steering recover` is for.
"""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
from distributed import Client
from skimage import data

from pictures.faults import faults_picture
from steering import (
    ER,
    CampaignSettings,
    Experiment,
    ProbeFirst,
    SimulatedBeamline,
    SpaceFilling,
    Stage,
    TrainerSettings,
    local,
    sample,
    zone_plate,
)
from steering.clusters.roles import INFERENCE, LABEL, SOURCE, TRAINER, workers_of
from steering.models import ModelStore
from steering.runner import RunFolder, start
from steering.runner.client import Handle

TARGETS = ("rank-0", "rank-other", "rank-two", "predictor", "source", "label")
KINDS = ("kill", "stop", "stall")
ROLES = {"predictor": INFERENCE, "source": SOURCE, "label": LABEL}
STALL_S = 10.0
"""How long a stall holds the interpreter lock."""
HANG_S = 60.0
"""A campaign that does not go on within so long hangs."""


def main(folder: RunFolder, arguments: list[str]) -> None:
    """Run the campaign, do harm to it, and count."""
    options = _options(arguments)
    rng = np.random.default_rng(options.seed)
    parts = experiment(options.ranks, options.seed)
    if not hasattr(parts.source, "resume"):  # the loss of a source that cannot go on elsewhere ends its campaign
        options.targets = [target for target in options.targets if target != "source"]
    with local(ranks=options.ranks, apart=True) as client:
        run = start(parts, client, folder)
        log = Log(folder, run)
        log.wait(lambda events: any(e["event"] == "CandidateReady" for e in events), 0)
        faults = []
        for number in range(options.faults):
            fault = {"target": str(rng.choice(options.targets)), "kind": str(rng.choice(options.only))}
            time.sleep(rng.uniform(0.0, 1.0))  # the phase of a step, and of a round
            try:
                fault |= harm(client, log, **fault)
            except Died as died:
                faults.append(fault | {"survived": False, "why": str(died)})
                break
            faults.append(fault)
            folder.write_summary({"faults": {"list": faults}})
            _say(number, fault)
        calm = calm_beside_others(log, options.calm)
        figures = _ended(run)
    folder.write_summary({**measured(faults, folder), "calm": calm, "campaign": figures})
    folder.write_file("faults.png", faults_picture(faults))


def experiment(ranks: int, seed: int) -> Experiment:
    """Scans without end, of small frames; the policy ends each after its thousand candidates."""
    probe = zone_plate(64, 50.0, aperture=0.52, counts=1e5)
    pictures = [data.brick(), data.coins(), data.gravel(), data.cell()]
    stages = [
        Stage(f"scan-{k}", sample(pictures[k % 4], phase=1.5 + 0.1 * (k % 7), absorption=0.1, size=128), frames=5000)
        for k in range(200)
    ]
    source = SimulatedBeamline(stages, probe=probe, step=2.0, frame_rate=20.0, seed=seed)
    return Experiment(
        source=source,
        policy=SpaceFilling(source.candidates),
        network=ProbeFirst(window=64, patch=40, width=8),
        strategy=ER(),
        trainer=TrainerSettings(batch=8, candidates=4, representatives=8),
        campaign=CampaignSettings(steps=10, gain=0.0, rounds_after_end=0, labels_after_end=0),
        ranks=ranks,
    )


class Died(Exception):
    """The campaign has ended, or hangs."""


class Log:
    """The campaign's events as they are written."""

    def __init__(self, folder: RunFolder, run: Handle) -> None:
        self._file = folder.path / "events.jsonl"
        self._run = run
        self._read = 0
        self._events: list[dict[str, Any]] = []

    def since(self, begun: float) -> list[dict[str, Any]]:
        """Those later than `begun`; earlier ones are forgotten."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as lines:
            lines.seek(self._read)
            for line in lines:
                if line.endswith(b"\n"):
                    self._read += len(line)
                    self._events.append(json.loads(line))
        self._events = [event for event in self._events if event["time"] >= begun]
        return self._events

    def wait(self, true: Any, since: float, limit_s: float = HANG_S) -> list[dict[str, Any]]:
        """Events later than `since`, once `true` holds of them. Raises Died."""
        until = time.monotonic() + limit_s
        while True:
            found = self.since(since)
            if true(found):
                return found
            if self._run.done:
                self._run.result()
                raise Died("the campaign has ended")
            if time.monotonic() > until:
                raise Died(f"nothing of what was waited for within {limit_s:.0f} s")
            time.sleep(0.05)


def harm(client: Client, log: Log, *, target: str, kind: str) -> dict[str, Any]:
    """One fault; times in seconds from it until it was noticed, and until training and prediction went on."""
    names = victims(client, target)
    pids = [pid_of(client, name) for name in names]
    begun = time.time()
    for name, pid in zip(names, pids, strict=True):
        strike(client, name, pid, kind)
    lost = {"rank": "GroupChanged", "predictor": "PredictorReplaced", "source": "SourceReopened"}
    awaited = lost.get(target.partition("-")[0])

    def back(events: list[dict[str, Any]]) -> bool:
        gone = {e["worker"] for e in events if e["event"] == "WorkerLost"}
        if not set(names) <= gone or (awaited and not any(e["event"] == awaited for e in events)):
            return False
        return all(after(events, name, begun) is not None for name in ("CandidateReady", "PredictionReady"))

    try:
        events = log.wait(back, begun)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    noticed = max(e["time"] for e in events if e["event"] == "WorkerLost" and e["worker"] in names)
    found = {
        "survived": True,
        "notice_s": noticed - begun,
        "train_again_s": after(events, "CandidateReady", noticed) - begun,  # type: ignore[operator]
        "predict_again_s": after(events, "PredictionReady", noticed) - begun,  # type: ignore[operator]
    }
    log.wait(lambda _: complete(client, names), begun)
    return found


def after(events: list[dict[str, Any]], name: str, since: float) -> float | None:
    """When the first event of this name came that was begun after the newest change of what had been lost."""
    changes = [e["time"] for e in events if e["event"] in ("WorkerLost", "PredictorReplaced", "SourceReopened")]
    if name == "CandidateReady":
        changes += [e["time"] for e in events if e["event"] == "GroupChanged" and e["lost"]]
    newest = max([since, *changes])
    return next((e["time"] for e in events if e["event"] == name and e["time"] >= newest), None)


def victims(client: Client, target: str) -> list[str]:
    """Names of the workers that a fault is to hit."""
    if target in ROLES:
        return [name for name, worker in named(client).items() if worker["resources"].get(ROLES[target])][:1]
    ranks = sorted(name for name, worker in named(client).items() if worker["resources"].get(TRAINER))
    return {"rank-0": ranks[:1], "rank-other": ranks[1:2], "rank-two": ranks[:2]}[target]


def named(client: Client) -> dict[str, Any]:
    """Workers by name."""
    return {str(worker["name"]): worker | {"address": address} for address, worker in workers_of(client).items()}


def complete(client: Client, names: list[str]) -> bool:
    """Whether workers of these names are there again."""
    return set(names) <= set(named(client))


def pid_of(client: Client, name: str) -> int:
    """Process of a worker."""
    address = named(client)[name]["address"]
    pid: int = client.run(os.getpid, workers=[address])[address]
    return pid


def strike(client: Client, name: str, pid: int, kind: str) -> None:
    """Do harm to the process of a worker."""
    if kind == "stall":
        client.run(hold_the_lock, STALL_S, workers=[named(client)[name]["address"]], wait=False)
    else:
        os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)


async def hold_the_lock(seconds: float) -> None:
    """Sleep in C without giving up the interpreter lock, as a bad extension does. A coroutine only because Dask waits
    for the end of all else."""
    ctypes.PyDLL(None).usleep(int(1e6 * seconds))


def calm_beside_others(log: Log, seconds: float) -> dict[str, Any]:
    """How many healthy workers are taken for lost within so many seconds beside two busy loops."""
    begun = time.time()
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 if seconds else 0)]
    try:
        while time.time() < begun + seconds:
            time.sleep(1.0)
            log.wait(lambda _: True, begun)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    alarms = [e for e in log.since(begun) if e["event"] == "WorkerLost"]
    return {"seconds": seconds, "false_alarms": len(alarms)}


def measured(faults: list[dict[str, Any]], folder: RunFolder) -> dict[str, Any]:
    """The figures of all faults, and the account of frames, decisions and versions."""
    whole = [fault for fault in faults if fault["survived"]]
    times = {
        key: {f"p{q}": float(np.percentile([fault[key] for fault in whole], q)) for q in (50, 99)} if whole else {}
        for key in ("notice_s", "train_again_s", "predict_again_s")
    }
    return {
        "faults": {"list": faults, "survived": len(whole), "hangs": len(faults) - len(whole), **account(folder)}
    } | {
        **times,
        "notice_s_by_kind": {
            kind: float(np.percentile([f["notice_s"] for f in whole if f["kind"] == kind], 99))
            for kind in sorted({f["kind"] for f in whole})
        },
    }


def account(folder: RunFolder) -> dict[str, Any]:
    """What became of each frame, decision and version, by its identity."""
    events = folder.events()
    arrived = [i for e in events if e["event"] == "ChunkArrived" for i in e["frame_ids"]]
    told = [i for e in events if e["event"] in ("PredictionReady", "FrameSetAside") for i in e["frame_ids"]]
    lost = sorted({i for e in events if e["event"] == "FramesLost" for i in e["frame_ids"]})
    unknown = sorted(set(arrived) - set(told) - set(lost))
    images = folder.objects()
    in_images = Counter(int(i) for image in images.values() for i in image["frame"].values)
    decided = [
        (scan, tuple(p)) for scan, positions in by_scan(events).items() for p in np.round(positions, 15).tolist()
    ]
    published = {e["version"] for e in events if e["event"] == "ModelPublished"}
    stored = {version.number for version in ModelStore(folder.models).versions()}
    return {
        "frames": len(set(arrived)),
        "frames_lost": len(set(lost) | set(unknown)),
        "frames_lost_ids": [*lost, *unknown][:100],
        "frames_twice": len(arrived) - len(set(arrived)) + sum(count > 1 for count in in_images.values()),
        "decisions": len(decided),
        "decisions_repeated": len(decided) - len(set(decided)),
        "versions": len(published),
        "versions_lost": len(published - stored),
    }


def by_scan(events: list[dict[str, Any]]) -> dict[int, list[Any]]:
    """Positions decided on, by the number of the scan they were for: a decision that ends a scan is its last."""
    found: dict[int, list[Any]] = {0: []}
    for event in events:
        if event["event"] == "DecisionSuggested":
            found[max(found)] += event["positions"]
            if event["stop"]:
                found[max(found) + 1] = []
    return found


def _ended(run: Handle) -> dict[str, Any]:
    """The campaign's own figures, once it has been stopped."""
    with contextlib.suppress(Exception):
        run.command("stop")
    try:
        figures = run.result()
    except Exception as error:
        return {"ended": f"{type(error).__name__}: {error}"}
    keys = (
        "ranks",
        "ranks_lost",
        "ranks_joined",
        "samples_lost",
        "workers_silent",
        "frames_acquired",
        "frames_unheard",
    )
    return {key: figures[key] for key in keys}


def _say(number: int, fault: dict[str, Any]) -> None:
    print(
        f"{number}: {fault['kind']} {fault['target']}: noticed after {fault['notice_s']:.2f} s, training again after "
        f"{fault['train_again_s']:.2f} s, prediction after {fault['predict_again_s']:.2f} s",
        flush=True,
    )


def _options(arguments: list[str]) -> argparse.Namespace:
    def words(known: tuple[str, ...]) -> Any:
        return lambda text: [word for word in text.split(",") if word in known]

    parser = argparse.ArgumentParser(prog="bench_faults.py", description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument(
        "--calm", type=float, default=0.0, help="seconds without faults beside two busy loops, at the end"
    )
    parser.add_argument("--only", type=words(KINDS), default=list(KINDS), help="kinds of faults, with commas")
    parser.add_argument("--targets", type=words(TARGETS), default=list(TARGETS), help="what they hit, with commas")
    return parser.parse_args(arguments)
