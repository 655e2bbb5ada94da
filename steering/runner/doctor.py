"""What a machine has for a run, and what would stop one: facts are gathered, then judged without touching anything."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import re
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steering.learning.hardware import Hardware, find_hardware

PURPOSES = {
    "onnx": "one more backend of prediction",
    "dectris": "Dectris stream2, and positions over ZMQ",
    "epics": "EPICS PV Access",
    "tiled": "images of a run on a Tiled server",
    "jobqueue": "batch jobs by SLURM, PBS or HTCondor",
    "bluesky": "a policy that steers a bluesky plan",
    "ptychi": "refinement by Pty-Chi",
    "view": "the live page",
    "metrics": "figures of runs for Prometheus",
    "tensorboard": "figures of runs as curves in TensorBoard",
    "notebook": "notebooks",
    "completion": "completion of commands in a shell",
}
"""What extras are for."""
DEVELOPERS = ("test", "lint", "bench", "docs")
"""Extras that no run needs."""
QUEUES = {"sbatch": "SLURM", "qsub": "PBS", "condor_submit": "HTCondor"}
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "panfs", "wekafs", "orangefs", "afs", "fuse.")
"""Beginnings of the names of file systems that several machines see."""

GIB = 2**30
DISK, DISK_FEW, MEMORY, FILES = 5 * GIB, GIB // 2, 3 * GIB // 2, 256
"""Free disk below which it may not last, and none begins; free memory of the demo's processes; open files."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The facts that are judged."""

    hardware: Hardware | None
    broken: str = ""
    """Why torch cannot be loaded, where hardware is None."""
    folder: Path
    refused: str = ""
    """Why nothing can be written there."""
    unlocked: str = ""
    """Why no file can be locked there."""
    disk_bytes: int = 0
    filesystem: str = ""
    """Its kind, where the folder is."""
    scratch: Path
    scratch_bytes: int
    open_files: int
    loopback: str = ""
    """Why no port can be opened on 127.0.0.1."""
    extras: tuple[str, ...] = ()
    """That are installed whole."""
    missing: tuple[str, ...] = ()
    """Extras of which something is missing."""
    queues: tuple[str, ...] = ()
    """Commands of batch systems that are there."""


@dataclass(frozen=True)
class Finding:
    """A sentence for a person."""

    kind: str
    """`has`, `note` or `STOPS`."""
    sentence: str

    @property
    def stops(self) -> bool:
        """Whether a run would not begin, or not end well."""
        return self.kind == "STOPS"


def findings(machine: Machine) -> list[Finding]:
    """What there is to say, in the order in which a person asks: what computes, where it writes, what it reaches."""
    found = [*_computing(machine), *_writing(machine), *_reaching(machine)]
    return [Finding(kind, sentence) for kind, sentence in found]


def _computing(machine: Machine) -> Iterator[tuple[str, str]]:
    hardware = machine.hardware
    if hardware is None:
        yield "STOPS", f"torch cannot be loaded ({machine.broken}): install the build that fits this machine"
        return
    cores = f"{hardware.cores} core{'s' * (hardware.cores > 1)}"
    yield "has", f"{cores}, {_size(hardware.memory_bytes)} of free memory, torch {hardware.torch}"
    if hardware.cores == 1:
        yield "note", "1 core: prediction and training take turns on it, so that frames wait; two or more are better"
    if hardware.memory_bytes < MEMORY:
        yield "STOPS", f"{_size(hardware.memory_bytes)} of free memory, and the demo alone takes {_size(MEMORY)}"
    if hardware.gpus:
        yield "has", f"{len(hardware.gpus)} GPU: {', '.join(hardware.gpus)}; CUDA {hardware.cuda}"
    elif not hardware.devices:
        yield "has", "no GPU: networks are trained and predict on the CPU"
    elif hardware.cuda is None:
        yield (
            "note",
            f"{hardware.devices} GPU of which torch {hardware.torch} uses none, since it was built for CPUs: "
            "install torch's build for CUDA",
        )
    else:
        yield (
            "note",
            f"{hardware.devices} GPU of which torch sees none: look at CUDA_VISIBLE_DEVICES, and whether the driver is "
            f"new enough for CUDA {hardware.cuda}",
        )
    if hardware.gpus and hardware.nccl:
        yield "has", f"NCCL {hardware.nccl}: ranks with a GPU each exchange from GPU to GPU"
    elif len(hardware.gpus) > 1:
        yield (
            "STOPS",
            "several GPUs and a torch without NCCL, by which their ranks speak: install torch's build for CUDA",
        )
    if not hardware.bfloat16 and not hardware.gpus:
        yield "note", "a processor without bfloat16: leave precision at float32, bfloat16 is many times slower here"


def _writing(machine: Machine) -> Iterator[tuple[str, str]]:
    if machine.refused:
        yield "STOPS", f"{machine.folder}: nothing can be written there ({machine.refused}): name another folder"
        return
    yield "has", f"{_size(machine.disk_bytes)} free in {machine.folder}"
    if machine.disk_bytes < DISK_FEW:
        yield "STOPS", f"{_size(machine.disk_bytes)} free, and a run needs {_size(DISK_FEW)} and more: make room"
    elif machine.disk_bytes < DISK:
        yield "note", f"{_size(machine.disk_bytes)} free: checkpoints and images of a long scan may need more"
    if machine.unlocked:
        yield (
            "STOPS",
            f"{machine.folder}: no file can be locked there ({machine.unlocked}), by which two runs keep out of "
            "one folder: have locks enabled, or name another folder",
        )
    if machine.scratch_bytes < DISK_FEW:
        yield (
            "STOPS",
            f"{_size(machine.scratch_bytes)} free in {machine.scratch}, where processes keep what they send: set "
            "TMPDIR to a folder with more",
        )
    if machine.filesystem.startswith(SHARED):
        yield "has", f"a shared file system ({machine.filesystem}): jobs on other machines see the run's folder"
    elif machine.filesystem:
        yield (
            "note",
            f"a file system of this machine ({machine.filesystem}): where jobs run on other machines, put runs on one "
            "that all of them see, by --out",
        )


def _reaching(machine: Machine) -> Iterator[tuple[str, str]]:
    if machine.loopback:
        yield (
            "STOPS",
            f"no port can be opened on 127.0.0.1 ({machine.loopback}): the processes of a run could not speak",
        )
    if machine.open_files < FILES:
        yield "STOPS", f"{machine.open_files} files may be open at once, and a run needs {FILES}: raise it by ulimit -n"
    if machine.hardware is not None:
        others = [
            f"{name} {address}" for name, address in machine.hardware.interfaces if not address.startswith("127.")
        ]
        yield "has", f"network interfaces: {', '.join(others)}" if others else "no network interface but the loopback"
    for command in machine.queues:
        yield "has", f"{QUEUES[command]} ({command})"
    if machine.queues and "jobqueue" in machine.missing:
        yield "note", "a batch system, and not what submits its jobs: pip install 'steering[jobqueue]'"
    yield "has", f"extras: {', '.join(machine.extras) or 'none'}"
    for name in machine.missing:
        yield "note", f"without {PURPOSES.get(name, name)}: pip install 'steering[{name}]'"


def examine(folder: Path) -> Machine:
    """The facts of this machine, for runs in this folder, which need not be there yet; what is written for it is
    removed."""
    broken, hardware = "", None
    try:
        hardware = find_hardware()
    except (ImportError, OSError, RuntimeError) as error:
        broken = " ".join(str(error).split())
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    refused, unlocked = _tried(there)
    extras = find_extras()
    scratch = Path(tempfile.gettempdir())
    return Machine(
        hardware=hardware,
        broken=broken,
        folder=folder.absolute(),
        refused=refused,
        unlocked=unlocked,
        disk_bytes=shutil.disk_usage(there).free,
        filesystem=filesystem(there, _mounts()),
        scratch=scratch,
        scratch_bytes=shutil.disk_usage(scratch).free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        loopback=_port(),
        extras=tuple(name for name, whole in extras.items() if whole),
        missing=tuple(name for name, whole in extras.items() if not whole),
        queues=tuple(command for command in QUEUES if shutil.which(command)),
    )


def filesystem(folder: Path, mounts: str) -> str:
    """The kind of the file system that a folder is on; mounts: as in /proc/mounts. Empty where it is not said."""
    best, kind = "", ""
    for line in mounts.splitlines():
        _, point, name, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if folder.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, name
    return kind


def _mounts() -> str:
    try:
        return Path("/proc/mounts").read_text()
    except OSError:
        return ""


def _tried(folder: Path) -> tuple[str, str]:
    """Why no file can be written, and none locked; empty where they can."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=".steering-doctor-", dir=folder)
    except OSError as error:
        return error.strerror or str(error), ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return "", error.strerror or str(error)
    finally:
        os.close(descriptor)
        os.unlink(name)
    return "", ""


def _port() -> str:
    try:
        socket.create_server(("127.0.0.1", 0)).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def find_extras() -> dict[str, bool]:
    """Whether all that an extra asks for is installed, in any version; for those that a run may need."""
    found: dict[str, bool] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for line in importlib.metadata.requires("steering") or ():
            extra = re.search(r"extra == ['\"]([\w-]+)", line)
            if extra and extra[1] not in DEVELOPERS:
                found[extra[1]] = found.get(extra[1], True) and _is_installed(re.split(r"[\s\[<>=~!;(]", line)[0])
    return found


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
