"""How ranks find one another. The meeting point lives outside the ranks, so that it outlasts any of them."""

from __future__ import annotations

import datetime
import gc
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks meet."""

    address: str
    port: int
    interface: str | None = None
    """Network interface of the ranks' traffic; None: the one that reaches the address."""


class MeetingPoint:
    """Holds the store through which ranks find one another. Keep it alive as long as the ranks live."""

    def __init__(self, address: str = "127.0.0.1", *, interface: str | None = None) -> None:
        # Port 0 lets the system choose: two campaigns on one machine do not disturb each other.
        self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        self.rendezvous = Rendezvous(address, self._store.port, interface)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a function finds itself: on one of several ranks that run it at the same time."""

    rank: int
    ranks: int
    where: Rendezvous
    deadline: float
    """Seconds that a rank waits for the others in a collective."""

    def join(self, generation: int = 0, *, device: torch.device = CPU) -> dist.ProcessGroup:
        """Join the other ranks in torch's default group; returns a second one, for the exchange of representatives.

        generation: a group that forms anew, after a rank was lost, has a number of its own. device: where this rank
        trains. What lies on a GPU travels by NCCL if every rank has a GPU of its own, and by gloo where ranks share
        one, which NCCL refuses. What lies on the CPU always travels by gloo.
        """
        leave()
        torch.set_num_threads(1)  # ranks share the machine's cores, and small steps gain nothing from more
        interface = self.where.interface or _interface_to(self.where)
        if interface is not None:  # else torch looks the host's own name up, which many machines resolve to themselves
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        wait = datetime.timedelta(seconds=self.deadline)
        meeting = dist.TCPStore(self.where.address, self.where.port, is_master=False, timeout=wait)
        store = dist.PrefixStore(f"generation-{generation}", meeting)
        store.set(f"device-{self.rank}", identity(device))
        everyone = [store.get(f"device-{other}").decode() for other in range(self.ranks)]
        dist.init_process_group(
            backend(everyone),
            store=store,
            rank=self.rank,
            world_size=self.ranks,
            timeout=wait,
        )
        return dist.new_group(timeout=wait)


def identity(device: torch.device) -> str:
    """A name of the GPU that is the same in every process that sees it, and no other's; `cpu` for the CPU."""
    if device.type != "cuda":
        return device.type
    torch.cuda.set_device(device)  # NCCL takes the current one
    return f"cuda {torch.cuda.get_device_properties(device).uuid} {os.environ.get('NCCL_HOSTID', '')}"


def backend(devices: Sequence[str]) -> str:
    """What the group speaks, from every rank's `identity`."""
    own = len(set(devices)) == len(devices)
    return "cpu:gloo,cuda:nccl" if own and all(name.startswith("cuda") for name in devices) else "gloo"


def _interface_to(where: Rendezvous) -> str | None:
    """Name of the network interface through which the meeting point is reached; None where that is unknown."""
    try:
        # Connecting a datagram socket sends nothing; the system only chooses the way.
        family, kind, protocol, _, address = socket.getaddrinfo(where.address, where.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = [name for name, ends in psutil.net_if_addrs().items() if any(end.address == own for end in ends)]
    return found[0] if found else None


def leave() -> None:
    """Leave the group, if in one. What held it must be dropped before, or its threads live on."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
