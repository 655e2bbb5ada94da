"""How ranks form a group of torch.distributed, and how the loss of one is recognised.

The meeting point lives outside the ranks, so that it outlasts any of them.
"""

from __future__ import annotations

import datetime
import gc
import os
import secrets
import socket
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch
import torch.distributed as dist

from steering.learning.sealed_store import SealedStore


class GroupLost(RuntimeError):
    """A collective failed: another rank is gone, or did not come in time. What the rank holds is whole."""


@contextmanager
def group_errors(place: str) -> Iterator[None]:
    """Raise GroupLost for what collectives raise inside; errors of other code pass with their type and traceback.

    place: where it happened, for the message.
    """
    try:
        yield
    except Exception as error:
        if not is_of_group(error):
            raise
        # The traceback's frames would keep the dead group's tensors, and with them its sockets.
        traceback.clear_frames(error.__traceback__)
        raise GroupLost(f"{place} lost its group: {error}") from error


def is_of_group(error: BaseException) -> bool:
    """Whether an error says that a collective failed.

    DDP's collectives raise out of `backward`, as the network's own errors do. torch has types of its own for them; a
    plain RuntimeError of gloo names gloo's source file.
    """
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and "/gloo/" in str(error)


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks meet."""

    address: str
    port: int
    interface: str | None = None
    """Network interface of the ranks' traffic; None: the one that reaches the address."""
    token: str = field(default="", repr=False)
    """Known to the ranks of this run alone, see SealedStore."""


class MeetingPoint:
    """Holds the store through which ranks find one another. Keep it alive as long as the ranks live."""

    def __init__(self, address: str = "127.0.0.1", *, interface: str | None = None) -> None:
        # Port 0 lets the system choose: two campaigns on one machine do not disturb each other.
        self._store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        self.rendezvous = Rendezvous(address, self._store.port, interface, secrets.token_hex(32))


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rank's number among the ranks that run a function at the same time, and where they meet."""

    rank: int
    ranks: int
    where: Rendezvous
    deadline: float
    """Seconds that a rank waits for the others in a collective."""

    def join(self, generation: int = 0, *, device: str | torch.device) -> dist.ProcessGroup:
        """Join the other ranks in torch's default group; returns a second one, for the exchange of representatives.

        generation: a group that forms anew, after ranks were lost or joined, has a number of its own. device: where
        this rank trains. Tensors on a GPU travel by NCCL if every rank has a GPU of its own, and by gloo where ranks
        share one, which NCCL refuses. Tensors on the CPU always travel by gloo.
        """
        # DDP imports it. Imported while a group exists, it would keep that group's sockets open for ever: peers of a
        # rank that leaves would wait for their deadline.
        import torch._dynamo  # noqa: PLC0415

        leave()
        interface = self.where.interface or _interface_to(self.where)
        if interface is not None:  # else torch looks the host's own name up, which many machines resolve to themselves
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        wait = datetime.timedelta(seconds=self.deadline)
        meeting = dist.TCPStore(self.where.address, self.where.port, is_master=False, timeout=wait)
        store = dist.PrefixStore(f"generation-{generation}", self._sealed(meeting))
        store.set(f"device-{self.rank}", identity(torch.device(device)))
        everyone = [store.get(f"device-{other}").decode() for other in range(self.ranks)]
        kind = backend(everyone)
        if kind != "gloo":  # NCCL's own threads use the store, and may not wait for Python
            store = dist.PrefixStore(f"generation-{generation}-nccl", meeting)
        dist.init_process_group(
            kind,
            store=store,
            rank=self.rank,
            world_size=self.ranks,
            timeout=wait,
        )
        return dist.new_group(timeout=wait)

    def _sealed(self, meeting: dist.Store) -> dist.Store:
        if not self.where.token:
            return meeting
        _HELD[:] = [SealedStore(meeting, self.where.token)]
        return _HELD[0]


_HELD: list[SealedStore] = []
"""The store of the group that this process is in."""


def identity(device: torch.device) -> str:
    """A name of the GPU that is the same in every process that sees it, and no other's; `cpu` for the CPU."""
    if device.type != "cuda":
        return device.type
    torch.cuda.set_device(device)  # NCCL takes the current one
    return f"cuda {torch.cuda.get_device_properties(device).uuid} {os.environ.get('NCCL_HOSTID', '')}"


def backend(devices: Sequence[str]) -> str:
    """The group's backend, from every rank's `identity`."""
    own = len(set(devices)) == len(devices)
    return "cpu:gloo,cuda:nccl" if own and all(name.startswith("cuda") for name in devices) else "gloo"


def _interface_to(where: Rendezvous) -> str | None:
    """Name of the network interface through which the meeting point is reached; None where that is unknown."""
    try:
        # Connecting a datagram socket sends nothing; the system only chooses the route.
        family, kind, protocol, _, address = socket.getaddrinfo(where.address, where.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = [name for name, ends in psutil.net_if_addrs().items() if any(end.address == own for end in ends)]
    return found[0] if found else None


def leave() -> None:
    """Leave the group, if in one: its sockets close, and peers that wait for this rank raise at once.

    What holds the group (DDP, an exchange, the frames of a traceback) must be dropped before; else it stays open.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
    _HELD.clear()


def broadcast_bytes(data: bytes, source: int) -> bytes:
    """The bytes that rank `source` of the default group has; the others' argument is ignored."""
    size = torch.tensor([len(data)])
    dist.broadcast(size, source)
    mine = dist.get_rank() == source
    buffer = torch.empty(int(size), dtype=torch.uint8)
    if mine and data:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.broadcast(buffer, source)
    return data if mine else buffer.numpy().tobytes()


def exchange_bytes(to_each: Sequence[bytes]) -> list[bytes]:
    """Send each rank of the default group its bytes; returns what each rank sent here, in the order of ranks."""
    sizes = torch.tensor([len(data) for data in to_each])
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes)
    send = torch.frombuffer(bytearray(b"".join(to_each)) or bytearray(1), dtype=torch.uint8)[: int(sizes.sum())]
    received = torch.empty(int(coming.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, send, coming.tolist(), sizes.tolist())
    return [part.numpy().tobytes() for part in received.split(coming.tolist())]
