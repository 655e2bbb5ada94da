"""Global sampling: representatives from the buffers of all ranks, moved while the step before is trained.

Every rank computes the whole plan of a step from the fills that all ranks announced with the exchanges before, so no
rank asks for anything: one asynchronous all-to-all of bytes carries the samples and the next announcement. What a rank
draws from its own buffer never leaves it.
"""

import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from steering.learning.buffer import RehearsalBuffer
from steering.learning.channel import Channel, Messages
from steering.learning.group import nccl_of
from steering.learning.rows import Layout, as_rows, on_device
from steering.learning.sampling import MODES, Fills, Mode, StepRNG, draw, draw_slots

# A header is int64: step, bytes of a sample, digest of its layout, strata that changed, announcements that follow (all
# of them, or none); then three numbers for each announcement.
HEAD = 5
FEW = 16  # announcements that a header has room for at first


@dataclass(frozen=True)
class Delivered:
    """What an exchange has brought.

    Attributes:
        count: representatives written: r, or all that were announced where that is less.
        remote: how many of them came from other ranks.
    """

    count: int
    remote: int


@dataclass
class Flight:
    """An exchange under way: own slots to read, rows to come from each rank, own header, the messages."""

    step: int
    local: np.ndarray
    coming: list[int]
    header: np.ndarray
    messages: Messages | None


class Exchange:
    """Draws r representatives per rank and step, and brings them into the augmented minibatch.

    All ranks of the group call `start` and `finish` in the same order, with the same arguments of the constructor but
    the buffer. Several exchanges may be under way: a trainer that starts k of them before it finishes the first is
    k steps ahead, for slow networks. What is drawn rests on the announcements of the last finished exchange, so a
    sample can be drawn two exchanges after it was stored. A buffer that was filled before the first `start` is known at
    once: the first start of every group announces all fills, and is the only one that waits.

    Args:
        buffer: of this rank.
        group: for the exchange alone, with a timeout; None for a single rank.
        r: representatives per rank and step.
        seed: of the draws, the same on every rank.
        mode: `uniform`, `balanced` or `seen`, see sampling.
        device: where the augmented minibatches are. On a GPU with the NCCL backend samples travel from GPU to GPU,
            also those of a buffer in host memory.
    """

    def __init__(
        self,
        buffer: RehearsalBuffer,
        group: dist.ProcessGroup | None,
        r: int,
        *,
        seed: int = 0,
        mode: Mode = "uniform",
        device: str | torch.device = "cpu",
    ) -> None:
        if r < 0 or seed < 0:
            raise ValueError(f"found r = {r} and seed = {seed}, expected neither below 0")
        if mode not in MODES:
            raise ValueError(f"found mode {mode!r}, expected one of {MODES}")
        self.buffer, self.r, self.seed, self.mode = buffer, r, seed, mode
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.fills = Fills(self.ranks)
        """What every rank is known to hold."""
        self.channel = (
            Channel(group, _wire(group, torch.device(device))) if group is not None and self.ranks > 1 else None
        )
        """To the other ranks; None: there is none."""
        self._step_rng = StepRNG(seed)
        self.flights: deque[Flight] = deque()
        """Exchanges under way, the oldest first."""
        self._room = 0  # announcements in a header; 0 until the ranks know one another
        self._row_bytes = 0
        self._digest = 0

    @property
    def in_flight(self) -> int:
        """Exchanges started and not finished."""
        return len(self.flights)

    def start(self, step: int) -> None:
        """Draw for a step, pack what this rank has to send, and start the exchange. Only the first call waits.

        Raises:
            RuntimeError: a rank is gone. ValueError: ranks differ in what they store or how they draw (first time).
        """
        if self.channel is None:
            slots = self._draw_alone(self._step_rng.of_step(step))
            self.flights.append(Flight(step, slots, [0], slots[:0], None))
            return
        if not self._room:
            self._introduce(self.channel.group)
        keys = self.fills.keys
        plan = draw(self.fills.counts, self.fills.seen, self.r, self._step_rng.of_step(step), mode=self.mode)
        mine = plan.owner == self.rank
        own = mine[self.rank]
        local = self._slots(keys, plan.column[self.rank, own], plan.ordinal[self.rank, own])
        coming = np.bincount(plan.owner[self.rank][~own], minlength=self.ranks).tolist()
        mine[self.rank] = False
        going = {
            int(to): self._slots(keys, plan.column[to, mine[to]], plan.ordinal[to, mine[to]])
            for to in np.flatnonzero(mine.any(axis=1))
        }
        header = self._header(step, self._room)
        messages = self._pack(self.channel, header, going, coming)
        self.channel.launch(messages)
        self.flights.append(Flight(step, local, coming, header, messages))

    def finish(self, out: Mapping[str, Tensor] | None, start: int = 0) -> Delivered:
        """Wait for the oldest exchange and write its representatives into rows start, start + 1, ... of `out`.

        Args:
            out: the augmented minibatch: tensors (rows, ...) of the stored shapes and dtypes, contiguous, any device.
                If `stratum` (int64) is among them, it is written too. Rows behind the last representative are left
                as they are. None: what arrives is dropped.
            start: first row to write; usually the number of new samples.

        Raises:
            RuntimeError: nothing was started, a rank is gone, or the ranks are not at the same step. After that the
                exchange is of no more use: make another one, with a new group.
            ValueError: `out` does not fit what is stored, or ranks store different fields.
        """
        if not self.flights:
            raise RuntimeError("found no exchange under way, expected start(step) before finish")
        flight = self.flights.popleft()
        remote = sum(flight.coming)
        if flight.messages is not None and self.channel is not None:
            headers = flight.messages.wait()
            headers[self.rank] = flight.header
            self._learn(flight.step, headers)
            if remote and out is not None:
                self._unpack(flight, flight.messages, out, start + len(flight.local))
            self.channel.give_back(flight.messages)
        if out is not None:
            self.buffer.gather(flight.local, out, start)
        return Delivered(len(flight.local) + remote, remote)

    def _draw_alone(self, rng: np.random.Generator) -> np.ndarray:
        """Slots of a single rank's draw, int64 (count,)."""
        strata, count = self.buffer.strata, min(self.r, len(self.buffer))
        if self.mode == "uniform" or not count:
            return draw_slots(rng, len(self.buffer), (1, count))[0]
        past = self.buffer.past(strata.keys) if self.mode == "seen" else strata.seen
        plan = draw(strata.counts[None], past[None], self.r, rng, mode=self.mode)
        return self._slots(strata.keys, plan.column[0], plan.ordinal[0])

    def _slots(self, keys: list[int], columns: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """Slots of this rank's part of a draw, int64."""
        if self.mode == "uniform":
            return np.ascontiguousarray(ordinals)
        slots = self.buffer.locate([keys[column] for column in columns.tolist()], ordinals.tolist())
        return np.array(slots, dtype=np.int64)

    def _pack(self, channel: Channel, header: np.ndarray, going: dict[int, np.ndarray], coming: list[int]) -> Messages:
        others = [int(rank != self.rank) for rank in range(self.ranks)]
        sent = [len(going.get(rank, ())) for rank in range(self.ranks)]
        messages = channel.messages(
            [other * (header.nbytes + count * self._row_bytes) for other, count in zip(others, sent, strict=True)],
            [other * (header.nbytes + count * self._row_bytes) for other, count in zip(others, coming, strict=True)],
            header.nbytes,
        )
        with channel.packing():
            packed_header = on_device(header, channel.device).view(torch.uint8)
            position = 0
            for rank, size in enumerate(messages.send_sizes):
                if size:
                    messages.send[position : position + header.nbytes].copy_(packed_header)
                if rank in going:
                    self._pack_rows(going[rank], messages.send[position + header.nbytes : position + size])
                position += size
        return messages

    def _pack_rows(self, slots: np.ndarray, space: Tensor) -> None:
        """Write one field after another, each with all its rows."""
        position = 0
        for rows in self.buffer.rows.values():
            size = len(slots) * rows.width
            rows.take(slots, space[position : position + size].view(len(slots), rows.width))
            position += size

    def _unpack(self, flight: Flight, messages: Messages, out: Mapping[str, Tensor], row: int) -> None:
        layout = self.buffer.layout or Layout.of(out)
        layout.check(out, row + sum(flight.coming))
        if layout.digest != self._digest:
            raise ValueError(f"found a minibatch of {layout}; the ranks store other fields, expected the same")
        position = 0
        for count, size in zip(flight.coming, messages.receive_sizes, strict=True):
            inside = position + messages.header_bytes
            for name, width in layout.row_bytes.items() if count else ():
                if name in out:
                    rows = messages.received[inside : inside + count * width].view(count, width)
                    as_rows(out[name][row : row + count]).copy_(rows, non_blocking=True)
                inside += count * width
            row += count
            position += size

    def _header(self, mark: int, room: int) -> np.ndarray:
        layout, strata = self.buffer.layout, self.buffer.strata
        waiting = strata.touched
        # All or none: others must never think that more is stored than there is. They see how much waits, and from
        # then on headers have room for it.
        news = strata.announce() if waiting <= room else np.zeros((0, 3), dtype=np.int64)
        if self.mode == "seen":
            news[:, 2] = self.buffer.past(news[:, 0].tolist())
        header = np.zeros(HEAD + 3 * room, dtype=np.int64)
        header[:HEAD] = (
            mark,
            sum(layout.row_bytes.values()) if layout else 0,
            layout.digest if layout else 0,
            waiting,
            len(news),
        )
        header[HEAD : HEAD + news.size] = news.ravel()
        return header

    def _introduce(self, group: dist.ProcessGroup) -> None:
        """Announce all fills to every rank, and check that all ranks draw with the same settings.

        Over gloo, also where samples travel by NCCL: there the host would wait for a rank that is lost unseen.
        """
        strata = self.buffer.strata
        strata.touch_all()
        room = torch.tensor([max(strata.touched, FEW)])
        dist.all_reduce(room, dist.ReduceOp.MAX, group=group)
        mark = zlib.crc32(f"{self.r} {self.seed} {self.mode}".encode())
        header = torch.from_numpy(self._header(mark, int(room)))
        headers = [torch.empty_like(header) for _ in range(self.ranks)]
        dist.all_gather(headers, header, group=group)
        marks = [int(other[0]) for other in headers]
        if len(set(marks)) > 1:
            raise ValueError(f"found ranks {marks} with different r, seed or mode of sampling, expected one for all")
        self._learn(mark, [other.numpy() for other in headers])
        self._room = FEW

    def _learn(self, mark: int, headers: list[np.ndarray]) -> None:
        """Update the fills with what all ranks announced."""
        for rank, header in enumerate(headers):
            found, row_bytes, digest, waiting, news = header[:HEAD].tolist()
            if found != mark:
                raise RuntimeError(f"found rank {rank} at step {found}, expected {mark} as on rank {self.rank}")
            if row_bytes:
                if self._row_bytes and (row_bytes, digest) != (self._row_bytes, self._digest):
                    raise ValueError(
                        f"found rank {rank} with other fields, {row_bytes} bytes per sample, than ranks before it, "
                        f"{self._row_bytes} bytes; expected the same names, shapes and dtypes on all ranks; "
                        f"this rank stores {self.buffer.layout}"
                    )
                self._row_bytes, self._digest = row_bytes, digest
            if news:
                self.fills.update(rank, header[HEAD : HEAD + 3 * news].reshape(news, 3))
            while waiting > self._room > 0:
                self._room *= 2


def _wire(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where messages are packed: the minibatches' GPU where the group's backend for it is NCCL, the host elsewhere."""
    return torch.device("cpu") if nccl_of(group, device) is None else device
