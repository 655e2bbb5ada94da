"""A cluster on this machine of which every part can be harmed alone: a process for the scheduler, and for each worker a
node of its own, a nanny and the worker that it forks, where the system allows it in a network of its own.

`Nodes` starts and harms it; run as a script, this module is the process that forks all others, so that torch is
imported once.
"""

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed import Client, Nanny, Scheduler
from distributed.utils import get_mp_context  # noqa: F401 - imported before anything is forked

from steering.clusters.local import CONFIG, PRELOAD, SILENT
from steering.clusters.roles import INFERENCE, LABEL, RUNNER, SOURCE, TRAINER, workers_of

SETTINGS = {**CONFIG, "distributed.worker.multiprocessing-method": "fork"}
SERVER = {"host": None, "memory_limit": 0, "dashboard": False, "silence_logs": 60, "config": SETTINGS}
_UP_S = 90.0
_CLONE_NEWNET = 0x40000000


def roles_of(ranks: int) -> dict[str, str]:
    """Names of the nodes and the role of each."""
    others = {"inference": INFERENCE, "source": SOURCE, "label": LABEL, "runner": RUNNER}
    return {f"trainer-{k}": TRAINER for k in range(ranks)} | others


class Network:
    """A bridge, and behind it a network namespace for each node; without the right to make them nothing is made."""

    def __init__(self, names: Sequence[str]) -> None:
        self.prefix = f"s{os.getpid() % 100_000}"
        self.names = list(names)
        self.octet = 16 + os.getpid() % 200
        self.there = False
        try:
            self._make()
            self.there = True
        except (OSError, subprocess.CalledProcessError):
            self.close()

    def host(self, name: str) -> str:
        """Address of a node; of the scheduler, where it is none."""
        if not self.there:
            return "127.0.0.1"
        return f"10.77.{self.octet}.{2 + self.names.index(name) if name in self.names else 1}"

    def space(self, name: str) -> str:
        """Path of a node's namespace; empty where there is none."""
        return f"/run/netns/{self.prefix}-{self.names.index(name)}" if self.there else ""

    def cut(self, name: str, off: bool) -> None:
        """Take a node's network away without a word to anybody, or give it back."""
        _ip("link", "set", f"{self.prefix}v{self.names.index(name)}", "down" if off else "up")

    def close(self) -> None:
        """Take everything away."""
        for k in range(len(self.names)):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip("link", "del", f"{self.prefix}v{k}")
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip("netns", "del", f"{self.prefix}-{k}")
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            _ip("link", "del", f"{self.prefix}b")

    def _make(self) -> None:
        bridge = f"{self.prefix}b"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"10.77.{self.octet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for k in range(len(self.names)):
            space, here = f"{self.prefix}-{k}", f"{self.prefix}v{k}"
            _ip("netns", "add", space)
            _ip("link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", here, "master", bridge, "up")
            _ip("-n", space, "addr", "add", f"10.77.{self.octet}.{2 + k}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Nodes:
    """The cluster while it runs."""

    def __init__(self, folder: Path, network: Network, ranks: int) -> None:
        """Start it, and wait until all workers are there. Raises TimeoutError."""
        self.folder, self.network, self.roles = folder, network, roles_of(ranks)
        spaces = {name: [network.host(name), network.space(name)] for name in self.roles}
        said = folder / "nodes.json"
        said.unlink(missing_ok=True)
        words = [network.host("scheduler"), json.dumps(self.roles), json.dumps(spaces), str(said)]
        self._process = subprocess.Popen([sys.executable, __file__, *words], start_new_session=True)
        try:
            self._reach(said)
        except BaseException:
            self._kill()
            raise

    def _reach(self, said: Path) -> None:
        until = time.monotonic() + _UP_S
        while not said.exists():
            self._alive(until)
        self.pids: dict[str, int] = json.loads(said.read_text())
        self.address = f"tcp://{self.network.host('scheduler')}:{self.pids.pop('port')}"
        self.client = Client(self.address, timeout=_UP_S)
        while len(self.workers()) < len(self.roles):
            self._alive(until)

    def workers(self) -> dict[str, dict[str, Any]]:
        """What the scheduler knows of each worker, by name."""
        found = workers_of(self.client)
        return {str(worker["name"]): {**worker, "address": address} for address, worker in found.items()}

    def with_role(self, role: str) -> list[str]:
        """Names of the nodes of a role whose workers are there."""
        return sorted(name for name in self.workers() if self.roles.get(name) == role)

    def process(self, name: str) -> int:
        """Process of a node's worker, or of the scheduler."""
        if name == "scheduler":
            return self.pids[name]
        address = self.workers()[name]["address"]
        pid: int = self.client.run(os.getpid, workers=[address])[address]
        return pid

    def processes(self) -> list[int]:
        """All of them."""
        group = psutil.Process(self._process.pid)
        return [group.pid, *(child.pid for child in group.children(recursive=True))]

    def stall(self, name: str, seconds: float) -> None:
        """Hold the interpreter lock of a process."""
        if name == "scheduler":
            self.client.loop.add_callback(self.client.run_on_scheduler, hold_the_lock, seconds)
            return
        self.client.run(hold_the_lock, seconds, workers=[self.workers()[name]["address"]], wait=False)

    def close(self) -> None:
        """Kill every process."""
        self._kill()
        with contextlib.suppress(Exception):
            self.client.close(timeout=1)

    def _kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _alive(self, until: float) -> None:
        time.sleep(0.1)
        if self._process.poll() is not None or time.monotonic() > until:
            raise TimeoutError("found no cluster that is up, expected its workers")


@contextmanager
def network_of(ranks: int) -> Iterator[Network]:
    """The network of a cluster, taken away at the end."""
    network = Network(list(roles_of(ranks)))
    try:
        yield network
    finally:
        network.close()


async def hold_the_lock(seconds: float) -> None:
    """Sleep in C without giving up the interpreter lock, as a bad extension does. A coroutine only because Dask waits
    for the end of all else."""
    ctypes.PyDLL(None).usleep(int(1e6 * seconds))


async def _schedule(host: str, pipe: int) -> None:
    async with Scheduler(host=host, port=0, dashboard=False, dashboard_address=f"{host}:0") as scheduler:
        os.write(pipe, str(scheduler.port).encode())
        os.close(pipe)
        await scheduler.finished()


async def _serve(name: str, role: str, host: str, address: str) -> None:
    """A node: where its nanny ends, as after a time without network, another one is started, as a batch system does."""
    own = {**SERVER, "host": host, "name": name, "nthreads": 2 if role in (SOURCE, LABEL, RUNNER) else 1}
    while True:
        with contextlib.suppress(Exception):
            async with Nanny(address, resources={role: 1}, env=dict(os.environ), **own) as nanny:
                await nanny.finished()
        await asyncio.sleep(0.5)


def _forked(work: Any, space: str = "") -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        if space:
            enter(space)
        with dask.config.set(SETTINGS):
            asyncio.run(work())
        code = 0
    os._exit(code)


def enter(space: str) -> None:
    """Have this process, and all that it starts from now on, use another network. Raises OSError."""
    descriptor = os.open(space, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"could not enter {space}")
    os.close(descriptor)


def _main(host: str, roles: str, spaces: str, said: str) -> None:
    starter = os.getppid()
    sys.path.append(str(Path(__file__).parents[1]))  # what is asked of a node may come by its module's name
    for module in PRELOAD:
        __import__(module)
    logging.getLogger("distributed").setLevel(SILENT)
    reading, writing = os.pipe()
    scheduler = _forked(lambda: _schedule(host, writing))
    os.close(writing)
    port = int(os.read(reading, 20))
    where = json.loads(spaces)
    pids = {
        name: _forked(lambda n=name, r=role: _serve(n, r, where[n][0], f"tcp://{host}:{port}"), where[name][1])
        for name, role in json.loads(roles).items()
    }
    draft = Path(said + ".draft")
    draft.write_text(json.dumps({**pids, "scheduler": scheduler, "port": port}))
    draft.rename(said)
    while os.getppid() == starter:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.1)
    os.killpg(os.getpgid(0), signal.SIGKILL)  # whoever started it was killed


if __name__ == "__main__":
    _main(*sys.argv[1:])
