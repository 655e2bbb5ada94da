"""How ranks form a group of torch.distributed, and how the loss of one is recognised.

The meeting point lives outside the ranks, so that it outlasts any of them.
"""

from __future__ import annotations

import datetime
import gc
import logging
import os
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as dist

from steering.learning.sealed_store import SealedStore

logger = logging.getLogger(__name__)


class GroupLost(RuntimeError):
    """A collective failed: another rank is gone, or did not come in time. What the rank holds is whole."""


class OutOfMemory(RuntimeError):
    """A rank found no memory for what it was doing: who keeps the group gives it up as if it were lost."""

    def __init__(self, said: str, rank: int) -> None:
        super().__init__(said, rank)
        self.rank = rank

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def group_errors(place: str) -> Iterator[None]:
    """Raise GroupLost for what collectives raise inside, and OutOfMemory where a rank of a group finds no memory.
    Errors of other code pass with their type and traceback.

    place: where it happened, for the message.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) and dist.is_initialized():
            traceback.clear_frames(error.__traceback__)
            raise OutOfMemory(f"{place} found no memory ({error}), expected some", dist.get_rank()) from None
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of the host or of a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)


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
        """address: of this process, where it listens, there alone. Raises OSError for one that is not its own."""
        # torch's own server would listen on all interfaces. Port 0 lets the system choose: two campaigns on one machine
        # do not disturb each other.
        family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server((str(where[0]), 0), family=family, backlog=1024)
        port = listening.getsockname()[1]
        self._store = dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        self.rendezvous = Rendezvous(address, port, interface, secrets.token_hex(32))


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
        import_all()
        leave()
        interface = self.where.interface or _interface_to(self.where)
        if interface is not None:  # else torch looks the host's own name up, which many machines resolve to themselves
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        wait = datetime.timedelta(seconds=self.deadline)
        meeting = dist.TCPStore(self.where.address, self.where.port, is_master=False, timeout=wait)
        _prepare_nccl()
        store = dist.PrefixStore(f"generation-{generation}", self._sealed(meeting))
        store.set(f"device-{self.rank}", identity(torch.device(device)))
        everyone = [store.get(f"device-{other}").decode() for other in range(self.ranks)]
        shared = sorted({name for name in everyone if name != "cpu" and everyone.count(name) > 1})
        if shared and self.rank == 0:
            logger.warning("found ranks that share %s: they speak gloo, by way of the host", ", ".join(shared))
        kind = backend(everyone)
        if kind != "gloo":  # NCCL's own threads use the store, and may not wait for Python
            store = dist.PrefixStore(f"generation-{generation}-nccl", meeting)
        before = _sockets()
        dist.init_process_group(
            kind,
            store=store,
            rank=self.rank,
            world_size=self.ranks,
            timeout=wait,
        )
        exchange = dist.new_group(timeout=wait)
        _of_group.update(_sockets().items() - before.items())
        NCCL[:] = [each for group in (None, exchange) if (each := nccl_of(group, torch.device(device))) is not None]
        return exchange

    def _sealed(self, meeting: dist.Store) -> dist.Store:
        if not self.where.token:
            return meeting
        _HELD[:] = [SealedStore(meeting, self.where.token)]
        return _HELD[0]


_of_group: set[tuple[int, str]] = set()
"""Sockets of the present group, as descriptor and name."""


def _sockets() -> dict[int, str]:
    """The sockets of this process that no Python object owns, by descriptor; empty where the system does not say."""
    # By `type`: some of torch's objects warn where they are asked for their class.
    owned = {one.fileno() for one in gc.get_objects() if issubclass(type(one), socket.socket)}
    found = {}
    for entry in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{entry}")
            if name.startswith("socket:") and int(entry) not in owned:
                found[int(entry)] = name
    return found


def abandon() -> None:
    """Give up the connections to the other ranks, from any thread: a collective that waits for a rank which is frozen
    or cut off raises at once, and not at its deadline. The group is still to be left.

    gloo's connections are shut down; NCCL's collectives are aborted by a thread of their own, for that may take as long
    as the collective that it ends.
    """
    backends = list(NCCL)  # whoever waits may leave the group as soon as it hears of this
    if backends:
        _abandoned.set()
        threading.Thread(target=_abort, args=(backends,), name="abort NCCL", daemon=True).start()
    for descriptor, name in list(_of_group):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{descriptor}") == name:
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    connection.getpeername()  # raises where it listens: gloo ends the process if that is shut down
                    connection.shutdown(socket.SHUT_RDWR)


NCCL: list[Any] = []
"""The backends of the present groups that are NCCL."""
_abandoned = threading.Event()
"""The present group was given up: what its collectives have left on a GPU is garbage, although it looks done."""


def _abort(backends: Sequence[Any]) -> None:
    """End what these backends have under way. All of them at once: one would wait for what another has on the GPU."""
    try:
        backends[0]._group_start()
        for each in backends:
            each.abort()
        backends[0]._group_end()
    except Exception:  # whoever waits is ended by the deadline then
        logger.exception("found a group of NCCL that could not be aborted")


def import_all() -> None:
    """Import what forming a group imports."""
    # DDP imports it. Imported while a group exists, it would keep that group's sockets open for ever: peers of a rank
    # that leaves would wait for their deadline.
    import torch._dynamo  # noqa: PLC0415, F401


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
    _of_group.clear()
    NCCL.clear()
    _abandoned.clear()
    if not dist.is_initialized():
        return
    gc.collect()
    if "nccl" in str(dist.get_backend_config()):
        # A destroyed group waits for what is under way, and an exchange is always under way: a lost peer would never
        # end it.
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()
    _HELD.clear()


def _prepare_nccl() -> None:
    """Settings that NCCL and torch read when the first group with it is made.

    By default torch ends the process in which a collective of NCCL fails: a lost rank would take all others with it.
    With 2 it aborts the collective and leaves the process alone; `settle` raises. Before that torch's watchdog would
    sleep four times as long as it waits for a dump of what was under way, a minute, and its monitor ends a process
    whose group is still there some minutes after it failed: neither is for ranks that are to go on. The last: two
    groups are used from one thread, and NCCL is told that the order of their launches is the same on all ranks.
    """
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "2"
    os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")


class Waitable(Protocol):
    """What `settle` needs of a CUDA event."""

    def query(self) -> bool:
        """Whether all that was queued before it is done."""


def queued_so_far(device: torch.device) -> Waitable:
    """What is done once the GPU has done all that is queued on its current stream."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class Collectives(Protocol):
    """What `settle` needs of a backend of torch.distributed."""

    def get_error(self) -> Any:
        """What a collective of this backend failed with, an enumeration; its name is SUCCESS where none has."""


def settle(event: Waitable, backends: Sequence[Collectives], *, deadline: float, pause: float = 2e-5) -> None:
    """Wait on the host for an event, and see that no collective before it failed.

    A collective of NCCL that was aborted looks done to the GPU, with garbage in its result: nothing may be computed
    from it before this has returned. deadline, pause: seconds. Raises torch's DistBackendError where a collective
    failed, or the event does not come within the deadline.
    """
    until = time.monotonic() + deadline
    while True:
        done = event.query()
        found = [name for each in backends if (name := each.get_error().name) != "SUCCESS"]
        if _abandoned.is_set():
            found.append("a rank that was given up")
        if found:
            raise dist.DistBackendError(f"found {', '.join(found)} in a collective, expected all ranks to take part")
        if done:
            return
        if time.monotonic() > until:
            raise dist.DistBackendError(
                f"found work on the GPU that is not done after {deadline:.0f} s, expected all ranks to take part in "
                "its collectives"
            )
        time.sleep(pause)


def nccl_of(group: dist.ProcessGroup | None, device: torch.device) -> Any:
    """The backend by which a group sends what is on this device, where that is NCCL; None elsewhere.

    group: None for the default one.
    """
    group = group or dist.group.WORLD
    if group is None or device.type != "cuda" or "cuda:nccl" not in str(dist.get_backend_config(group)):
        return None
    return group._get_backend(device)


def deadline_of(backend: Any) -> float:
    """Seconds after which a collective of this backend fails."""
    return float(backend.options._timeout.total_seconds())


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


def broadcast_tensor(tensor: torch.Tensor, source: int) -> None:
    """Write into the tensor what rank `source` of the default group has in its own.

    By way of the host, also from GPU to GPU: what NCCL has left there when a rank was lost meanwhile would be garbage
    that nobody heard of.
    """
    there = tensor.detach().cpu()
    dist.broadcast(there, source)
    if there.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            tensor.copy_(there)


def exchange_bytes(to_each: Sequence[bytes]) -> list[bytes]:
    """Send each rank of the default group its bytes; returns what each rank sent here, in the order of ranks."""
    sizes = torch.tensor([len(data) for data in to_each])
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes)
    send = torch.frombuffer(bytearray(b"".join(to_each)) or bytearray(1), dtype=torch.uint8)[: int(sizes.sum())]
    received = torch.empty(int(coming.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, send, coming.tolist(), sizes.tolist())
    return [part.numpy().tobytes() for part in received.split(coming.tolist())]
