"""Rehearsal for any training loop: a distributed rehearsal buffer with two methods, `augment` and `offer`.

It works in one process, or on torch's default process group, whoever started the processes. Samples are mappings of
tensors (n, ...); it is independent of networks and losses.

What holds on several ranks:
- `augment` is a collective, as `backward` of DDP is: all ranks call it equally often. Where their data loaders are of
  unequal length, `with Join([model, rehearsal]):` of torch.distributed.algorithms.join lets the ranks that have ended
  go on serving the others. Without it the others raise GroupLost after `deadline`.
- With gradient accumulation each micro-batch is augmented, and offered, by itself.
- The first minibatches are shorter, for little is stored yet: n + s rows, with s from 0 up to r. torch.compile with its
  default settings compiles once for the first number of rows and once for any number.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from steering.learning.buffer import RehearsalBuffer
from steering.learning.buffer_state import BufferState, reshard
from steering.learning.exchange import Delivered, Exchange
from steering.learning.group import group_errors, nccl_of
from steering.learning.identity import ELSEWHERE
from steering.learning.insertion import Policy
from steering.learning.minibatch import Minibatch, Ring, Specification
from steering.learning.rows import IDENTITY, STRATUM, finite, selected
from steering.learning.sampling import Mode
from steering.learning.training_state import Packed

STORED = "stored_"
"""Prefix of the fields that hold what a network gave for a sample when it was offered."""


@dataclass(kw_only=True, eq=False)
class Rehearsal(Joinable):
    """Stored samples that join each minibatch, drawn from the buffers of all ranks.

    Make one on every rank, with the same settings, after `torch.distributed.init_process_group` if there is a group.
    """

    r: int
    """Representatives: stored samples that join each minibatch of this rank."""
    candidates: int | None
    """How many of the new samples, the first ones, are offered to the local buffer in each step; None: all."""
    budget: int | str
    """What the local buffer may take: bytes, or a text such as "2GiB" or "500MB"."""
    insertion: Policy = "reservoir"
    """What the buffer keeps: `reservoir`, `replacement` or `balanced` over strata; see insertion."""
    sampling: Mode = "uniform"
    """How representatives are drawn: `uniform`, `balanced` over strata, or by samples `seen`; see sampling."""
    strata: str = STRATUM
    """The field, int64 (n,), with the stratum of each sample, such as its class; where a minibatch has no
    such field all samples are of one stratum."""
    identity: str = IDENTITY
    """The field, int64 (n,), with a number for each sample that is the same whenever it is offered, such as its index
    in the data set. `reservoir` and `balanced` then count a sample once however often it comes, and buffers of several
    runs can be united. Where minibatches have no such field every sample counts as a new one."""
    look_ahead: int = 1
    """Steps that an exchange is started before it is needed; more than 1 where a step is shorter than an exchange."""
    storage: str = "cpu"
    """Where samples are stored: `cpu` or a GPU, such as `cuda:0`."""
    seed: int = 0
    """Of the draws, the same on every rank; with the rank, of what the local buffer keeps."""
    deadline: float = 1800.0
    """Seconds after which an exchange that a rank does not enter raises on the others; torch's own default."""
    group: Literal["default"] | None = "default"
    """`default`: torch's default group where there is one; the exchange makes a second one of the same ranks. None:
    this process alone, until `connect`."""
    rank: int | None = None
    """None: that of the group, 0 without one."""

    def __post_init__(self) -> None:
        super().__init__()
        if self.r < 0 or (self.candidates is not None and self.candidates < 0):
            raise ValueError(f"found r={self.r}, candidates={self.candidates}, expected neither below 0")
        if self.look_ahead < 1:
            raise ValueError(f"found look_ahead={self.look_ahead}, expected 1 or more")
        self._grouped = self.group == "default" and dist.is_available() and dist.is_initialized()
        self.ranks = dist.get_world_size() if self._grouped else 1
        if self.rank is None:
            self.rank = dist.get_rank() if self._grouped else 0
        self.buffer = RehearsalBuffer(
            bytes_of(self.budget), policy=self.insertion, seed=self.seed + self.rank, device=self.storage
        )
        """Of this rank."""
        self.step = 0
        """Minibatches augmented so far; the same on every rank."""
        self.delivered = Delivered(0, 0)
        """What the last exchange brought."""
        self.exchange: Exchange | None = None
        self._ring: Ring | None = None

    def augment(self, batch: Mapping[str, Tensor]) -> Minibatch:
        """New samples with representatives behind them, in tensors of their own.

        Args:
            batch: tensors (n, ...) on one device. The last minibatch of an epoch may have fewer samples than others.

        Returns:
            `minibatch[name]` (n + s, ...) for each field, with `minibatch.new` = n, and s = r as soon as so many
            samples are stored. Outputs that were offered are in `stored_NAME`, of which only the rows from n on have a
            meaning. The tensors are used again by the second call after this one.

        Raises:
            GroupLost: a rank is gone, or did not call `augment`. ValueError: fields that differ from those stored.
        """
        Join.notify_join_context(self)
        n, device = _check(batch)
        if self.exchange is None:
            self._connect_default(device)
        fields = self._room(batch, n)
        for name, value in batch.items():
            fields[name][:n].copy_(value)
        self.prefetch()
        self.finish(fields, n)
        self.prefetch()
        return Minibatch({name: value[: n + self.delivered.count] for name, value in fields.items()}, new=n)

    def offer(self, batch: Minibatch | Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None) -> int:
        """Offer new samples to the local buffer; returns how many were stored.

        Args:
            batch: what `augment` returned, of which the new samples are taken, or tensors (n, ...).
            outputs: what the network gave, tensors of n or more rows, the first n of the new samples; stored in the
                dtype they have, as `stored_NAME`, and returned so by `augment`.
        """
        new = batch.batch if isinstance(batch, Minibatch) else batch
        fields = {name: value for name, value in new.items() if not name.startswith(STORED)}
        n, _ = _check(fields)
        fields |= {STORED + name: value[:n].detach() for name, value in (outputs or {}).items()}
        return self.store(fields)

    def store(self, fields: Mapping[str, Tensor]) -> int:
        """Offer samples whose fields are all named as they shall be stored; returns how many were.

        Left out are those with ELSEWHERE for an identity, and, in the host's memory, those whose stored outputs are not
        finite: a GPU is not waited for, and DER leaves them out when they are drawn.
        """
        count = self.candidates
        rows = {name: value[:count] for name, value in fields.items()}
        if self.identity in rows:
            rows[self.identity] = rows[self.identity].to("cpu", torch.int64)
        good = _to_offer(rows, self.identity)
        if good is not None:
            rows = {name: selected(value, good.to(value.device)) for name, value in rows.items()}
        if self.strata in rows:
            stratum = rows[self.strata].to(torch.int64)
        else:
            stratum = torch.zeros(len(next(iter(rows.values()))), dtype=torch.int64)
        rows.pop(STRATUM, None)
        own = rows.pop(self.identity, None)
        return self.buffer.insert(rows, stratum, own)

    def state_dict(self) -> dict[str, Any]:
        """Step and local buffer. torch.distributed.checkpoint can carry it: each rank's entry has a name of its own."""
        data = self.buffer.state().packed().to_bytes()
        return {"step": self.step, "ranks": self.ranks, f"rank-{self.rank}": data}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state, before the first `augment`.

        On as many ranks as wrote it each takes its own entry. On more or fewer, `state` must hold the entries
        `rank-0`, `rank-1`, ... of all that wrote it; the samples are then given out evenly, stratum by stratum.

        Raises ValueError where an entry is missing or this buffer is in use already.
        """
        before, rank = int(state["ranks"]), int(self.rank or 0)
        needed = [rank] if before == self.ranks else list(range(before))
        missing = [f"rank-{k}" for k in needed if f"rank-{k}" not in state]
        if missing:
            raise ValueError(
                f"found no {', '.join(missing)} in a state of {before} ranks to be loaded by rank {rank} of "
                f"{self.ranks}, expected them: load the entries of all ranks where their number has changed"
            )
        parts = [BufferState.of(Packed.from_bytes(state[f"rank-{k}"])) for k in needed]
        self.buffer.load(parts[0] if before == self.ranks else reshard(parts, rank, self.ranks))
        self.step = int(state["step"])

    # What `Loop` uses, and what keeps ranks together.

    def connect(self, group: dist.ProcessGroup | None, *, step: int, device: torch.device) -> None:
        """Exchange with the ranks of this group, for the exchange alone, from this step on; None: without others."""
        self.step = step
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.exchange = Exchange(self.buffer, group, self.r, seed=self.seed, mode=self.sampling, device=device)

    def disconnect(self) -> None:
        """Drop what holds the group, so that it can be left."""
        self.exchange = None

    def prefetch(self) -> None:
        """Start the exchanges of the next `look_ahead` steps that were not started yet."""
        while self.exchange is not None and self.exchange.in_flight < self.look_ahead:
            with group_errors(f"rank {self.rank}, starting the exchange after step {self.step},"):
                self.exchange.start(self.step + self.exchange.in_flight)

    def finish(self, fields: Mapping[str, Tensor] | None, start: int = 0) -> Delivered:
        """Wait for this step's representatives and write them into rows start, start + 1, ...; None: not at all."""
        if self.exchange is None:
            raise RuntimeError("found no exchange, expected `connect` before the first step")
        if fields is not None:  # the identity is not stored with a sample: of stored ones the field has no meaning
            fields = {name: value for name, value in fields.items() if name != self.identity}
        with group_errors(f"rank {self.rank}, in the exchange of step {self.step},"):
            self.delivered = self.exchange.finish(fields, start)
        self.step += 1
        return self.delivered

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For torch's Join: a rank without further minibatches serves the others."""
        return _Shadow(self)

    @property
    def join_device(self) -> torch.device:
        """For torch's Join: the device of its own collectives."""
        nccl = "nccl" in str(dist.get_backend())
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    @property
    def join_process_group(self) -> Any:
        """For torch's Join: the default group, as of DDP."""
        return dist.group.WORLD

    def _connect_default(self, device: torch.device) -> None:
        group = None
        if self._grouped:
            wait = datetime.timedelta(seconds=self.deadline)
            # NCCL cannot send what is on the CPU, where ranks introduce themselves, whatever the default group speaks.
            nccl = device.type == "cuda" and nccl_of(None, device) is not None
            group = dist.new_group(timeout=wait, backend="cpu:gloo,cuda:nccl" if nccl else "gloo")
        self.connect(group, step=self.step, device=device)

    def _room(self, batch: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """Tensors for n new samples and r representatives: made anew where fields are new or rows too few."""
        fields: Specification = {}
        if self.buffer.layout is not None:
            fields = {name: (shape, dtype) for name, shape, dtype in self.buffer.layout.fields if name != STRATUM}
        fields |= {name: (tuple(value.shape[1:]), value.dtype) for name, value in batch.items()}
        device = next(iter(batch.values())).device
        if self._ring is None or not self._ring.fits(fields, n + self.r, device):
            self._ring = Ring(fields, n + self.r, device)
        return self._ring.next()


class _Shadow(JoinHook):
    """Takes part in the exchanges of ranks that still train."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal = rehearsal

    def main_hook(self) -> None:
        """One step of the others: what this rank stores is sent, what it receives is dropped."""
        if self.rehearsal.exchange is None:
            self.rehearsal._connect_default(self.rehearsal.join_device)
        self.rehearsal.prefetch()
        self.rehearsal.finish(None)
        self.rehearsal.prefetch()


def _to_offer(rows: Mapping[str, Tensor], identity: str) -> Tensor | None:
    """Rows to be offered, int64; None: all of them, as nearly always."""
    found = [finite(value) for name, value in rows.items() if name.startswith(STORED) and value.is_cpu]
    if identity in rows:
        found.append(torch.from_numpy(rows[identity].numpy() != ELSEWHERE))
    if all(one.numpy().all() for one in found):
        return None
    return torch.stack(found).all(0).nonzero()[:, 0]


def bytes_of(budget: int | str) -> int:
    """A number of bytes from a number or a text: "500MB" is 500 * 10**6, "2GiB" is 2 * 2**30.

    Raises ValueError for another text.
    """
    if isinstance(budget, int):
        return budget
    found = re.fullmatch(r"([0-9.]+) ?([kMGT]?)(i?)B", budget.strip())
    if not found:
        raise ValueError(f'found a budget of {budget!r}, expected bytes, or a text such as "500MB" or "2GiB"')
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" kMGT".index(prefix) if prefix else 0))


def _check(batch: Mapping[str, Tensor]) -> tuple[int, torch.device]:
    """(samples, device) of tensors (n, ...)."""
    wrong = {name: type(value).__name__ for name, value in batch.items() if not isinstance(value, Tensor)}
    if wrong or not batch:
        raise ValueError(f"found fields {json.dumps(wrong)}, expected one or more tensors (n, ...) by their names")
    sizes = {name: tuple(value.shape) for name, value in batch.items()}
    if len({shape[:1] for shape in sizes.values()}) > 1 or () in sizes.values():
        raise ValueError(f"found fields of shapes {sizes}, expected (n, ...) with one n for all")
    first = next(iter(batch.values()))
    return len(first), first.device
