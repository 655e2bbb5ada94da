"""A real SLURM of one node on this machine, for tests: started by the first that needs it, stopped after the last.

It needs root and Debian's packages: apt-get install --no-install-recommends slurm-wlm slurmctld slurmd munge
(.ci/run does that). Nothing of it is written outside a temporary folder, but for munge's key and socket.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDED = ("sbatch", "squeue", "slurmctld", "slurmd", "munged", "runuser")
CONFIG = """
ClusterName=steering
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
KillWait=5
GresTypes=gpu
DefMemPerCPU=500
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
# Two GPUs that are none: CUDA_VISIBLE_DEVICES is set as on a real node.
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"


def missing() -> str:
    """Why there can be no SLURM here; empty where there can."""
    if os.geteuid() != 0:
        return "starting a SLURM needs root"
    lacks = [name for name in NEEDED if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    return f"this machine has no {', '.join(lacks)} (Debian: slurm-wlm slurmctld slurmd munge)" if lacks else ""


@contextmanager
def running(folder: Path) -> Iterator[Path]:
    """The configuration of a SLURM that runs; several processes may hold one at the same time.

    folder: the same one for all of them.
    """
    folder.mkdir(exist_ok=True)
    holders = folder / "holders"
    with _locked(folder):
        number = int(holders.read_text()) if holders.exists() else 0
        if number == 0:
            _start(folder)
        holders.write_text(str(number + 1))
    try:
        yield folder / "slurm.conf"
    finally:
        with _locked(folder):
            number = int(holders.read_text()) - 1
            holders.write_text(str(number))
            if number == 0:
                _stop(folder)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Held by the test that has the queue to itself."""
    with _locked(folder, "queue"):
        yield


@contextmanager
def _locked(folder: Path, name: str = "lock") -> Iterator[None]:
    with open(folder / name, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(folder: Path) -> None:
    for name in ("state", "spool"):
        shutil.rmtree(folder / name, ignore_errors=True)  # of one that has stopped: its jobs are not taken up again
        (folder / name).mkdir()
    port, node_port = _free_ports()
    host = socket.gethostname().split(".")[0]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, port=port, node_port=node_port, folder=folder))
    (folder / "gres.conf").write_text(GPUS)
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
        _start_munge()
    environment = {**os.environ, "SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    for daemon in ("slurmctld", "slurmd"):
        subprocess.run([daemon, "-f", str(config)], env=environment, check=True, stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (
        "idle"
        not in subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False
        ).stdout
    ):
        assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
        time.sleep(0.1)


def _start_munge() -> None:
    key = Path("/etc/munge/munge.key")
    if not key.exists() or not key.stat().st_size:
        key.write_bytes(os.urandom(1024))
    shutil.chown(key, "munge", "munge")
    key.chmod(0o400)
    socket_folder = Path("/run/munge")
    socket_folder.mkdir(exist_ok=True)
    shutil.chown(socket_folder, "munge", "munge")
    socket_folder.chmod(0o755)
    subprocess.run(["runuser", "-u", "munge", "--", "/usr/sbin/munged"], check=True, capture_output=True)


def _stop(folder: Path) -> None:
    for name in ("slurmd", "slurmctld"):
        file = folder / f"{name}.pid"
        if not file.exists():
            continue
        pid = int(file.read_text())
        os.kill(pid, 15)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.05)


def _free_ports() -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    try:
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()
