"""One asynchronous all-to-all of bytes, on its own group: gloo on the host, NCCL on a stream of its own.

What a rank sends to another is a message: a header of the same size for everyone, then any number of bytes. On CUDA all
work is queued on the channel's stream and ordered with the training stream by events; the host waits for headers only,
which arrived while the step before was computed. Buffers belong to the channel's stream: torch gives their memory to
nobody else before what is queued there is done, also where a group breaks with exchanges under way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from steering.learning.group import deadline_of, nccl_of, settle


@dataclass
class Messages:
    """What one exchange sends and receives.

    Attributes:
        send, received: uint8 buffers, messages in the order of ranks.
        send_sizes, receive_sizes: bytes to and from each rank; 0 for the rank itself.
        header_bytes: at the start of every message.
    """

    send: Tensor
    received: Tensor
    send_sizes: list[int]
    receive_sizes: list[int]
    header_bytes: int
    group: dist.ProcessGroup
    _work: dist.Work | None = None
    _headers: Tensor | None = None
    arrived: "torch.cuda.Event | None" = None

    def wait(self) -> list[np.ndarray]:
        """Wait until everything has arrived; raise where a peer is gone or the group's timeout has passed.

        Returns the header from each rank, int64, empty from the rank itself. The bytes of `received` may then be used
        on the current stream.
        """
        if self.arrived is not None and self._headers is not None:
            nccl = nccl_of(self.group, self.received.device)
            settle(self.arrived, [nccl], deadline=deadline_of(nccl))
            training = torch.cuda.current_stream(self.received.device)
            training.wait_event(self.arrived)
            self.received.record_stream(training)
            rows = iter(self._headers.numpy())
            return [next(rows) if size else np.zeros(0, np.int64) for size in self.receive_sizes]
        if self._work is not None:
            self._work.wait()
        bytes_, start, messages = self.received.numpy(), 0, []
        for size in self.receive_sizes:
            # A copy: the message may stand at an address that int64 does not allow.
            messages.append(bytes_[start : start + min(size, self.header_bytes)].copy().view(np.int64))
            start += size
        return messages


@dataclass
class Channel:
    """Sends messages through one group. Buffers are kept, and grown only where an exchange needs more.

    Attributes:
        group: used for nothing else, so that its order of collectives is that of the exchanges.
        device: where messages are packed and received: the host for gloo, the GPU for NCCL.
    """

    group: dist.ProcessGroup
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self._spare: list[tuple[Tensor, Tensor]] = []
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Inside, work on the buffers is queued where it is ordered with what was computed so far."""
        if self._stream is None:
            yield
            return
        training = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(training)
        packed = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            yield
            packed.record(self._stream)
        # Slots that are being read must not be overwritten by the insert that follows on the training stream.
        training.wait_event(packed)

    def messages(self, send_sizes: list[int], receive_sizes: list[int], header_bytes: int) -> Messages:
        """Provide buffers of the given sizes, not initialised."""
        send, received = self._spare.pop() if self._spare else (self._empty(0), self._empty(0))
        send, received = self._at_least(send, sum(send_sizes)), self._at_least(received, sum(receive_sizes))
        return Messages(send, received, send_sizes, receive_sizes, header_bytes, self.group)

    def launch(self, messages: Messages) -> None:
        """Start the collective; returns at once. Every rank must call it in the same order."""
        send = messages.send[: sum(messages.send_sizes)]
        received = messages.received[: sum(messages.receive_sizes)]
        if self._stream is None:
            messages._work = self._all_to_all(received, send, messages)
            return
        with torch.cuda.stream(self._stream):
            work = self._all_to_all(received, send, messages)
            work.wait()  # orders the stream, not the host
            starts = np.cumsum([0, *messages.receive_sizes[:-1]])[np.array(messages.receive_sizes) > 0]
            headers = torch.stack([received[start : start + messages.header_bytes] for start in starts.tolist()])
            messages._headers = torch.empty(
                (len(headers), messages.header_bytes // 8), dtype=torch.int64, pin_memory=True
            )
            messages._headers.view(torch.uint8).copy_(headers, non_blocking=True)
            messages.arrived = torch.cuda.Event()
            messages.arrived.record(self._stream)
            messages._work = work  # keeps what it holds until the host has seen the end

    def give_back(self, messages: Messages) -> None:
        """Let a later exchange use the buffers again."""
        self._spare.append((messages.send, messages.received))

    def _all_to_all(self, received: Tensor, send: Tensor, messages: Messages) -> dist.Work:
        sizes = messages.receive_sizes, messages.send_sizes
        return dist.all_to_all_single(received, send, *sizes, group=self.group, async_op=True)

    def _empty(self, size: int) -> Tensor:
        if self._stream is None:
            return torch.empty(size, dtype=torch.uint8)
        with torch.cuda.stream(self._stream):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _at_least(self, buffer: Tensor, size: int) -> Tensor:
        return buffer if len(buffer) >= size else self._empty(size + size // 4)
