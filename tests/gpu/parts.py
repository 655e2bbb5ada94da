"""Run the parts of run.sh one after the other, each guarded, and put their figures on one screen."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WHOLE_S = {"gpu": 285.0, "cpu": 1800.0, "class": 590.0, "compiled": 590.0}
"""What all parts together may take, by what is run; with the set-up before them it is 5 minutes on a GPU."""
PATIENCE = {"gpu": 1.0, "cpu": 6.0, "class": 1.0, "compiled": 1.0}
"""Times the limit of a part: on a CPU, which may be busy, it is only to say that a part hangs."""
BATCHES = (1, 16, 64, 256, 1024)
LINES, COLUMNS = 48, 150
"""A screen."""
RATES = (
    *(f"networks.ProbeFirst.fastest.{batch}" for batch in BATCHES),
    *(f"networks.ProbeFirst.latency_ms.{name}" for name in ("eager_float32", "graphs_float32", "graphs_bfloat16")),
    *(f"networks.PtychoNN.fastest.{batch}" for batch in BATCHES[-2:]),
    "frame_to_decision_ms",
    "chosen",
)


@dataclass(frozen=True)
class Part:
    """One command, its limit, and which of its figures are shown."""

    name: str
    command: tuple[str, ...]
    seconds: float
    shown: tuple[str, ...] = ()
    """Keys of the run's summary.json, with dots."""


def workflow(name: str, out: Path, *arguments: str) -> tuple[str, ...]:
    """The command of a workflow, its run in a folder of OUT."""
    file, _, label = name.partition(":")
    run = ("-m", "steering.cli", "run", "--out", str(out / (label or file)))
    return (sys.executable, *run, f"workflows/{file}.py", *arguments)


def parts(out: Path, kind: str) -> list[Part]:
    """What is run, in the order of importance."""
    if kind == "class":
        wider = ("--device", "cuda", "--ranks", "1", "--width", "64", "--strategies", "er,derpp,from_scratch")
        command = workflow("class_incremental", out, *wider, "--epochs", os.environ.get("EPOCHS", "10"))
        return [Part("class_incremental", command, 540, ("er", "derpp", "from_scratch"))]
    tiny = kind == "cpu"
    device = ("--device", "cpu" if tiny else "cuda")
    frames = ("--frames", "60", "--frame-rate", "100", "--size", "128", "--steps", "3") if tiny else ("--frames", "500")
    inference = ("--no-training", "--turns", "2", "--part", "1" if tiny else "3")
    if tiny:
        inference += ("--repeats", "1", "--frames", "60", "--passes", "1", "--train-s", "0.1")
        inference += ("--width", "4", "--batches", "1", "64", "--rate", "20")
    else:
        inference += ("--passes", "0", "--train-s", "5", "--batches", *map(str, BATCHES))
    if kind == "compiled":
        return [Part("inference", workflow("bench_inference:inference", out, *device, *inference), 540, RATES)]
    inference += ("--no-compiled",)
    quick = ("--repeats", "2", "--fraction", "0.02") if tiny else ("--repeats", "30", "--fraction", "0.5")
    overlap = ("--repeats", "2" if tiny else "20", "--workload", "reconstruction")
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "90", "tests/gpu")
    several = ("-n", "1" if tiny else "5", "-k", "not computes")
    ran = ("versions_published", "frames_dropped", "phase_error", "prediction.backend", "wall_s", "total_s")
    rehearsal = ("image.step_over_raw", "ptycho.step_over_raw", "image.host.step_over_raw", "ptycho.host.step_over_raw")
    ratios = ("reconstruction.er_over_same_work", "reconstruction.exposed_wait_ms", "devices")
    size = ("20", "4") if tiny else ("516", "40")
    refine = (sys.executable, "tests/gpu/refine.py", str(out / "refine"), device[1], *size)
    # First what is measured, by itself; then the laws, several at once; then what time is left for.
    return [
        Part("inference", workflow("bench_inference:inference", out, *device, *inference), 75, RATES),
        Part("rehearsal", workflow("bench_rehearsal:rehearsal", out, *device, *quick), 40, ("device", *rehearsal)),
        Part("overlap-1", workflow("bench_overlap:overlap-1", out, *device, *overlap, "--ranks", "1"), 40, ratios),
        Part("refine", refine, 30, ("scan", "reached", "passes", "seconds", "labels_per_s", "gpu_bytes")),
        Part("tests", (*pytest, *several), 110),
        Part("campaign", workflow("simulated_drift:campaign", out, *device, *frames), 75, ran),
        Part("overlap-law", (*pytest, "-n", "0", "-k", "computes"), 40),
        Part("overlap-2", workflow("bench_overlap:overlap-2", out, *device, *overlap, "--ranks", "2"), 40, ratios),
    ]


def run(part: Part, out: Path, left: float = float("inf"), patience: float = 1.0) -> dict[str, Any]:
    """How a part ended, in how many seconds. left: seconds for all that is still to run. patience: see PATIENCE."""
    begun, limit = time.monotonic(), min(patience * part.seconds, left)
    if limit < 5:
        return {"ended": "not run: no time was left", "seconds": 0.0}
    with (out / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            ended = "ok" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:  # its workers too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return {"ended": ended, "seconds": round(time.monotonic() - begun, 1)}


def figures(part: Part, out: Path) -> dict[str, Any]:
    """What a part wrote of what is shown."""
    file = out / part.name / "summary.json"
    if not file.is_file():
        return {}
    summary, found = json.loads(file.read_text()), {}
    for key in part.shown:
        value: Any = summary
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found[key] = value
    return found


def short(value: Any) -> str:
    """A figure on a line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} {short(one)}" for name, one in value.items()) + "}"
    return str(value)


def told(part: Part, said: dict[str, Any], log: Path) -> list[str]:
    """Lines about a part: how it ended, its figures, and the end of its log where that says more."""
    lines = [f"{part.name}: {said['ended']}, {said['seconds']} s"]
    lines += [f"    {key}: {short(value)}" for key, value in said["figures"].items()]
    if not part.shown or said["ended"] != "ok":
        written = log.read_text(errors="replace").splitlines() if log.is_file() else []
        lines += ["    | " + line for line in written[-1 if said["ended"] == "ok" else -3 :]]
    return [line[:COLUMNS] for line in lines]


def measure(every: list[Part], out: Path, kind: str, machine: dict[str, Any]) -> dict[str, Any]:
    """Run the parts in turn; what they said so far is in summary.json and summary.txt after each."""
    begun, summary = time.monotonic(), {"machine": machine, "parts": {}}
    lines = [", ".join(f"{name} {value}" for name, value in machine.items())]
    for part in every:
        said = run(part, out, WHOLE_S[kind] - (time.monotonic() - begun), PATIENCE[kind])
        said["figures"] = figures(part, out)
        summary["parts"][part.name] = said
        lines += told(part, said, out / f"{part.name}.log")
        (out / "summary.json").write_text(json.dumps(summary, indent=1))
        (out / "summary.txt").write_text("\n".join(lines[:LINES]) + "\n")
    return summary


def main() -> int:
    """Run all parts, or those that are named. Returns 0 where every one ended well."""
    (folder, kind), only = sys.argv[1:3], sys.argv[3:]
    out = Path(folder)
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"gpu": gpu, "torch": torch.__version__, "python": sys.version.split()[0], "cores": os.cpu_count()}
    every = [part for part in parts(out, kind) if part.name in only] if only else parts(out, kind)
    summary = measure(every, out, kind, machine)
    print((out / "summary.txt").read_text(), end="")
    return int(any(said["ended"] != "ok" for said in summary["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
