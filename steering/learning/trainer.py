"""A training rank: one visible loop that every rank runs at the same time."""

from __future__ import annotations

import copy
import os
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from steering.learning import group
from steering.learning.exchange import Exchange
from steering.learning.objectives import Fields, Reconstruction
from steering.learning.rehearsal import RehearsalBuffer
from steering.learning.samples import Labels, Samples
from steering.learning.strategies import Minibatch, Strategy
from steering.models import ModelStore, Network
from steering.ptychography import far_field_residual, patch_weight
from steering.records import ModelVersion

PARTS = ("load", "train", "populate", "augment", "wait")


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The dials of training."""

    batch: int = 16
    """New samples per rank and step (b)."""
    candidates: int = 8
    """How many of them are offered to the local buffer (c)."""
    representatives: int = 24
    """Stored samples, drawn from the buffers of all ranks, that join each minibatch (r)."""
    learning_rate: float = 1e-3
    buffer_bytes: int = 16 * 2**20
    """Budget of each rank's local buffer."""
    deadline: float = 30.0
    """Seconds after which a collective that a rank does not enter raises on the others."""
    seed: int = 0
    device: str = "cpu"
    """Where networks are trained: `cpu`, or `cuda` for a GPU of each rank's own (NCCL between them)."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a rank says of a training round."""

    steps: int
    loss: float
    seconds: dict[str, float]
    """For each of load, train, populate, augment, wait."""
    representatives: int
    remote: int
    """Of the representatives, how many came from another rank."""
    stored: int
    capacity: int
    seen: dict[str, int]
    """Labelled frames of each scan that this rank has been given so far."""
    error: float | None = None
    """On held-out frames; rank 0 only."""
    served_error: float | None = None
    """The same for the weights last published."""
    residual: float | None = None
    """Median far-field residual on the held-out frames."""


class GroupLost(RuntimeError):
    """A collective failed: another rank is gone, or did not come in time. What the rank holds is whole."""


@dataclass
class Rank:
    """One rank: it outlives the groups it joins. Weights, optimiser, samples and buffer belong to it, not to a group.

    Made on the driver, it is a plain description; `join` brings it to life where it is to run.
    """

    network: Network
    strategy: Strategy
    settings: TrainerSettings = field(default_factory=TrainerSettings)

    def join(self, where: group.Rendezvous, *, rank: int, ranks: int, generation: int = 0) -> int:
        """Join a group of ranks. Blocks until all are there, at most `settings.deadline` seconds. Returns the rank."""
        torch.set_num_threads(1)
        if not hasattr(self, "_samples"):
            self._awake(rank)
        self._ddp: DistributedDataParallel | None = None
        self._exchange: Exchange | None = None
        exchange_group = group.join(
            where, rank=rank, ranks=ranks, generation=generation, deadline=self.settings.deadline
        )
        self.rank, self.ranks = rank, ranks
        # DDP hands rank 0's weights to everyone when it is made: a rank that joins later starts with them.
        with warnings.catch_warnings():
            # The argument's new name is not known to the torch of many clusters yet.
            warnings.simplefilter("ignore", FutureWarning)
            self._ddp = DistributedDataParallel(self.network, broadcast_buffers=False)
        if self.strategy.rehearses:
            self._exchange = Exchange(
                self.buffer,
                exchange_group if ranks > 1 else None,
                self.settings.representatives,
                seed=self.settings.seed,
            )
        step = torch.tensor([self._step])
        dist.broadcast(step, 0)  # the draws of a step follow from its number: all must count alike
        self._step: int = int(step)
        return rank

    def _awake(self, rank: int) -> None:
        os.nice(5)  # where cores are shared, the slow loop yields to the fast one
        seed = self.settings.seed
        kind = self.settings.device
        self._device = torch.device(kind, rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)
        self.network.to(self._device)
        self._initial = copy.deepcopy(self.network.state_dict())
        self._served = copy.deepcopy(self.network)
        self._optimiser = torch.optim.AdamW(self.network.parameters(), self.settings.learning_rate, weight_decay=1e-4)
        self._samples = Samples(seed=seed + rank, keep_all=self.strategy.restarts)
        self.buffer = RehearsalBuffer(self.settings.buffer_bytes, seed=seed + rank)
        self._arrived: deque[Labels] = deque()
        self._scan: str | None = None
        self._step = 0

    async def receive(self, labels: Labels) -> int:
        """Take labels in, also while `fit` runs; they are trained on from its next call. Returns how many."""
        self._arrived.append(labels)
        return len(labels.frame_id)

    def fit(self, scan: str, steps: int) -> Round:
        """Train for that many steps on the labelled frames of a scan, together with all other ranks."""
        self._begin(scan)
        clock: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        losses: list[float] = []
        try:
            for _ in range(steps):
                self._one_step(clock, counts, losses)
        except RuntimeError as error:
            # The traceback's frames would keep the dead group's tensors, and with them its threads.
            traceback.clear_frames(error.__traceback__)
            raise GroupLost(f"rank {self.rank} lost its group at step {self._step}: {error}") from None
        quality = self._judge(scan) if self.rank == 0 else {}
        return Round(
            steps=self._step,
            loss=sum(losses) / max(1, len(losses)),
            seconds={part: clock[part] for part in PARTS},
            representatives=counts["representatives"],
            remote=counts["remote"],
            stored=len(self.buffer),
            capacity=self.buffer.capacity,
            seen=dict(self._samples.seen),
            **quality,
        )

    def _one_step(self, clock: Counter[str], counts: Counter[str], losses: list[float]) -> None:
        """Load, wait, start the next exchange, loss, backward, step, populate."""
        b, c = self.settings.batch, self.settings.candidates
        with _timed(clock, "load"):
            fields = self._ring[self._step % len(self._ring)]
            self._samples.take(b, fields)
        delivered = 0
        if self._exchange is not None:
            with _timed(clock, "wait"):
                arrived = self._exchange.finish(fields, b)
                delivered = arrived.count
                counts.update(representatives=arrived.count, remote=arrived.remote)
            with _timed(clock, "augment"):
                self._exchange.start(self._step + 1)
        minibatch = Minibatch({name: value[: b + delivered] for name, value in fields.items()}, new=b)
        with _timed(clock, "train"):
            loss = self.strategy.loss(self._ddp, minibatch)
            self._optimiser.zero_grad(set_to_none=True)
            loss.value.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self._optimiser.step()
            losses.append(loss.value.item())
        with _timed(clock, "populate"):
            kept = self.strategy.remember(minibatch.batch, loss.outputs)
            if kept is not None:
                rows = {name: value[:c] for name, value in kept.items() if name != "stratum"}
                self.buffer.insert(rows, kept["stratum"][:c])
        self._step += 1

    def _begin(self, scan: str) -> None:
        """Take in what has arrived, agree on the optics, and be ready for the first step."""
        newest: Labels | None = None
        while self._arrived:
            newest = self._arrived.popleft()
            self._samples.add(newest)
        self._samples.begin(scan)
        if self.strategy.restarts and scan != self._scan and self._scan is not None:
            self.network.load_state_dict(self._initial)
            self._optimiser.state.clear()
        self._scan = scan
        if newest is not None:
            self.network.optics.set(newest.probe, newest.mask)
        if not all(bool(torch.isfinite(p).all()) for p in self.network.parameters()):
            self._return_to_served()  # the ranks' weights are alike: all come here, or none
        # Labels may have reached the ranks at different times; rank 0's optics hold for all.
        dist.broadcast(self.network.optics.probe, 0)
        bad = self.network.optics.bad.to(torch.uint8)
        dist.broadcast(bad, 0)
        self.network.optics.bad.copy_(bad)
        if not hasattr(self, "_ring"):
            rows = self.settings.batch + self.settings.representatives
            example = self._samples.example()
            # Two minibatches in turn: one is trained on while the next is filled.
            shapes = {name: ((rows, *value.shape), value.dtype) for name, value in example.items()}
            self._ring = [
                {name: torch.zeros(shape, dtype=dtype, device=self._device) for name, (shape, dtype) in shapes.items()}
                for _ in range(2)
            ]
        if self._exchange is not None and not self._exchange.in_flight:
            self._exchange.start(self._step)

    @torch.no_grad()
    def _return_to_served(self) -> None:
        """After a round that diverged: every rank takes up the weights that rank 0 last published."""
        if self.rank == 0:
            self.network.load_state_dict(self._served.state_dict())
        for weight in self.network.parameters():
            dist.broadcast(weight, 0)
        self._optimiser.state.clear()

    @torch.no_grad()
    def _judge(self, scan: str) -> dict[str, float]:
        """Errors on the held-out frames of the scan: the candidate's, and the served weights'."""
        held_out = self._samples.held_out(scan)
        if held_out is None:
            return {}
        self._served.optics.load_state_dict(self.network.optics.state_dict())
        objective = Reconstruction(patch_weight(self.network.optics.modes().cpu().numpy(), self.network.dials["patch"]))
        error, residual = _quality(self.network, held_out, objective)
        served, _ = _quality(self._served, held_out, objective)
        return {"error": error, "served_error": served, "residual": residual}

    def publish(self, store: Path, version: ModelVersion) -> None:
        """Write the weights as they are now, and take them as those that later candidates are held against."""
        ModelStore(store).publish(self.network, version)
        self._served.load_state_dict(self.network.state_dict())

    def serve(self, store: Path, number: int) -> None:
        """Take a published version as the one that candidates are held against: for a rank that becomes rank 0."""
        self._served.load_state_dict(ModelStore(store).weights(number))

    def close(self) -> None:
        """Leave the group."""
        self._ddp = None
        self._exchange = None
        group.leave()


def _quality(network: Network, fields: Fields, objective: Reconstruction) -> tuple[float, float]:
    optics, counts = network.optics, fields["counts"].numpy()
    fields = {name: value.to(optics.probe.device) for name, value in fields.items()}
    outputs = objective.outputs(network, fields)
    patches = torch.polar(*outputs).cpu().numpy()
    residual = far_field_residual(patches, counts, optics.modes().cpu().numpy(), optics.bad.cpu().numpy())
    return float(objective.error(outputs, fields).mean()), float(torch.from_numpy(residual).median())


@contextmanager
def _timed(clock: Counter[str], part: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        clock[part] += time.perf_counter() - start  # type: ignore[assignment]
