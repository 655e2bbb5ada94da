"""A real SLURM on this machine, for tests: started by the first that needs it, stopped after the last, also where that
is killed.

It has two nodes: this machine, and where the system allows it, `far`, with host name, process ids and one folder of its
own, which nobody else sees (HIDDEN). Loopback and all other files are shared.

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

FAR = "far"
"""The other node, and the partition that it has to itself."""
HIDDEN = "hidden"
"""A folder beside the configuration: what is put there the other node does not see."""
NEEDED = ("sbatch", "squeue", "slurmctld", "slurmd", "munged", "runuser")
CONFIG = """
ClusterName=steering
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
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
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
KillWait=5
GresTypes=gpu
DefMemPerCPU=500
NodeName={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=12 RealMemory=24000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=OFF
PartitionName=spare Nodes={host} MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
OTHER_NODE = """NodeName={far} NodeAddr=127.0.0.1 Port={far_port} CPUs=12 RealMemory=24000 Gres=gpu:2 State=UNKNOWN
PartitionName={far} Nodes={far} MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=OFF
"""
# Two GPUs that are none: CUDA_VISIBLE_DEVICES is set as on a real node.
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"


def missing() -> str:
    """Why there can be no SLURM here; empty where there can."""
    if os.geteuid() != 0:
        return "starting a SLURM needs root"
    lacks = [name for name in NEEDED if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    return f"this machine has no {', '.join(lacks)} (Debian: slurm-wlm slurmctld slurmd munge)" if lacks else ""


# Owns the daemons, and ends them and all jobs once nobody holds the file, however the holders have ended: the system
# lets go of a killed process's locks. Its own children are in the foreground, so that none stays as a zombie.
KEEPER = """
exec 9> holders
slurmctld -D -f "$PWD/slurm.conf" 9>&- &
slurmd -D -f "$PWD/slurm.conf" -N "$HOST" 9>&- &
if grep -q ^NodeName=far slurm.conf; then
    unshare --uts --pid --fork --kill-child --mount-proc \\
        sh -c 'hostname far; mount -t tmpfs none hidden; exec slurmd -D -f "$PWD/slurm.conf" -N far' 9>&- &
    far=$!
fi
flock 9
scancel --user="$(id -un)"
for _ in $(seq 100); do [ -z "$(squeue -h)" ] && break; sleep 0.1; done
[ -z "${far:-}" ] || kill $(cat "/proc/$far/task/$far/children") || kill -KILL "$far" # unshare itself heeds no other
kill $(jobs -p)
wait
rm running
"""


@contextmanager
def running(folder: Path) -> Iterator[Path]:
    """The configuration of a SLURM that runs; several processes may hold one at the same time.

    folder: the same one for all of them.
    """
    folder.mkdir(exist_ok=True)
    with _locked(folder), open(folder / "holders", "a") as holders:
        fcntl.flock(holders, fcntl.LOCK_SH)  # where one is being stopped, this waits for its end
        if not (folder / "running").exists():
            _start(folder)
        holder = os.dup(holders.fileno())
    try:
        yield folder / "slurm.conf"
    finally:
        os.close(holder)


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
    for name in ("state", "spool", HIDDEN):
        shutil.rmtree(folder / name, ignore_errors=True)  # of one that has stopped: its jobs are not taken up again
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    for node in (host, FAR):
        (folder / "spool" / node).mkdir()
    port, node_port, far_port = _free_ports()
    config, nodes = folder / "slurm.conf", 1 + has_namespaces()
    config.write_text(
        CONFIG.format(host=host, port=port, node_port=node_port, folder=folder)
        + (OTHER_NODE.format(far=FAR, far_port=far_port) if nodes > 1 else "")
    )
    (folder / "gres.conf").write_text(GPUS)
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
        _start_munge()
    environment = {**os.environ, "HOST": host, "SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    (folder / "running").touch()
    with open(folder / "keeper.log", "w") as log:
        told = {"cwd": folder, "env": environment, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        subprocess.run(["setsid", "--fork", "bash", "-c", KEEPER], check=True, **told)  # type: ignore[call-overload]
    deadline = time.monotonic() + 60
    while _idle(environment) < nodes:
        assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
        time.sleep(0.1)


def _idle(environment: dict[str, str]) -> int:
    """Nodes that take jobs."""
    asked = ["sinfo", "--noheader", "--Node", "--partition=debug,far", "--format=%T"]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.split().count("idle")


def has_namespaces() -> bool:
    """Whether this system allows a node with a host name, processes and mounts of its own."""
    tried = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "hostname", FAR]
    return (
        shutil.which("unshare") is not None and not subprocess.run(tried, capture_output=True, check=False).returncode
    )


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


def _free_ports() -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    try:
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()
