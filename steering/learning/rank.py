"""A training rank of a campaign: it takes labels in, trains on them with all other ranks, judges, and publishes."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from steering.learning import group
from steering.learning.buffer import RehearsalBuffer
from steering.learning.buffer_state import ScanName
from steering.learning.checkpoint import RankFiles, RanksPart, Recorder
from steering.learning.loop import Loop
from steering.learning.origin import Origin, Started, earlier_held_out, take_up_buffers, take_up_model
from steering.learning.quality import errors_by_scan, judge
from steering.learning.redistribution import redistribute
from steering.learning.restore import read_labelled, read_share, read_training, restore_buffer, restore_training
from steering.learning.samples import Labels, NoSamples, Samples
from steering.learning.samples_file import read_samples
from steering.learning.settings import TrainerSettings
from steering.learning.strategies import Strategy
from steering.learning.tally import PARTS
from steering.learning.tensor_file import inside
from steering.learning.training_state import Packed
from steering.models import ModelStore, Network
from steering.ptychography.device import place_in_words
from steering.records import ModelVersion


@dataclass(frozen=True, kw_only=True)
class Round:
    """A rank's report of a training round."""

    steps: int
    loss: float
    seconds: dict[str, float]
    """For each of load, train, populate, augment, wait."""
    representatives: int
    remote: int
    """Of the representatives, how many came from another rank."""
    stored: int
    capacity: int
    composition: dict[int, dict[str, float]]
    """Of the local buffer, by stratum."""
    seen: dict[str, int]
    """Labelled frames of each scan that this rank has been given so far."""
    dropped: int = 0
    """Labelled frames that it had no room for, so far."""
    error: float | None = None
    """On held-out frames; rank 0 only."""
    served_error: float | None = None
    """The same for the weights last published."""
    earlier_errors: tuple[float, float] | None = None
    """On held-out frames of the runs that this one was started from: as it began, and now."""
    residual: float | None = None
    """Median far-field residual on the held-out frames."""
    residuals: tuple[float, ...] = ()
    """Of each held-out frame that is evidence, above its Poisson floor."""
    noise_share: float = 1.0
    """How much of the Poisson floor the residuals show."""
    offsets: tuple[float, ...] = ()
    """Phase offsets between pairs of their patches, radians."""


@dataclass
class Rank:
    """One rank: it outlives the groups it joins. Weights, optimiser, samples and buffer belong to it, not to a group.

    Made by the client it is a plain description; the first `join` makes loop and samples, in the process where it runs.
    """

    network: Network
    strategy: Strategy
    settings: TrainerSettings = field(default_factory=TrainerSettings)
    run: str = ""
    """Identity of the run, by which its samples are known from those of others."""

    def _awake(self, rank: int) -> None:
        """Make what the process of the rank keeps between groups."""
        torch.set_num_threads(self.settings.threads)
        os.nice(max(0, self.settings.niceness - os.nice(0)))  # os.nice adds: a process may hold a second rank later
        torch.manual_seed(self.settings.seed + rank)  # else all ranks would draw the same, such as masks of dropout
        self._loop = Loop(self.network, self.strategy, self.settings, rank=rank)
        self._initial = copy.deepcopy(self.network.state_dict())
        self.network.train()
        self.served = copy.deepcopy(self.network).eval()
        self.samples = Samples(
            seed=self.settings.seed + rank,
            keep_all=self.strategy.restarts,
            run=self.run,
            most_bytes=self.settings.samples_bytes,
        )
        self._arrived: deque[Labels] = deque()
        self._probe: tuple[NDArray[np.complex64], NDArray[np.bool_]] | None = None
        self.generation = 0
        self._earlier: tuple[float, float] | None = None
        self._recorder = Recorder(self._loop, self.samples, self._others)

    def prepare(self, number: int) -> None:
        """Do what takes long and needs no group: imports, the start of CUDA. The ranks of a group need not wait for it
        when this one joins them.

        number: which no other living rank has; it seeds what this one keeps, and chooses its GPU.
        """
        group.import_all()
        self._awake(number)
        # To leave a group calls for a garbage collection, which holds the interpreter lock: over all that torch has
        # imported it takes a second and more, and others would take the process for frozen.
        gc.freeze()

    def join(
        self, where: group.Rendezvous, *, rank: int, ranks: int, generation: int = 0, began: int | None = None
    ) -> int:
        """Join a group of ranks; returns the rank. Blocks until all are there, at most `settings.deadline` seconds.

        All ranks then have the weights, network buffers, optimiser state, step and served weights of the most advanced
        one (see `Loop.connect`), and samples are given to the ranks anew (see redistribution). Ranks that were lost
        and ranks that are new make no difference. began: as in `Loop.connect`.

        Raises GroupLost where a rank does not come or is lost meanwhile; join again with another generation.
        """
        if not hasattr(self, "samples"):
            self._awake(rank)
        self.close()
        self.generation = generation
        with self._leaving(f"rank {rank}, joining generation {generation},"):
            place = group.Place(rank=rank, ranks=ranks, where=where, deadline=self.settings.deadline)
            exchange_group = place.join(generation, device=self._loop.device)
            self.rank, self.ranks = rank, ranks
            self._loop.rank = rank
            source = self._loop.connect(exchange_group, began=began)
            self._align(source)
            self._take_in()
            redistribute(self.samples, self.buffer, rank=rank, ranks=ranks, source=source, generation=generation)
        return rank

    @property
    def _others(self) -> dict[str, Any]:
        """What a checkpoint holds of rank 0 beside the loop's own."""
        return {"served": self.served} | ({"initial": self._initial} if self.strategy.restarts else {})

    def cut(self, folder: Path, number: int) -> int:
        """Begin checkpoint `number`, between two rounds; returns the step. See `Recorder.cut`."""
        self._take_in()
        return self._recorder.cut(folder, number)

    async def written(self) -> RankFiles:
        """What this rank has written for the newest checkpoint, once it is on the disk. Raises OSError, and Overrun
        where the disk is too slow; the next checkpoint is whole all the same."""
        return await asyncio.wrap_future(self._recorder.written)

    def take_over(self, folder: Path, part: RanksPart, lost: int, *, rank: int, ranks: int) -> int:
        """Take over this rank's share of what rank `lost` of a checkpoint had, one of `ranks` that do so between them;
        before a `join`, which gives labelled frames to the ranks that train on them. Returns the samples it brings.

        Raises OSError, and ValueError for a checkpoint that is damaged or does not fit.
        """
        if not hasattr(self, "samples"):
            self._awake(rank)
        with ExitStack() as stack:
            state = read_share(folder, part, lost, stack)
            share = state.take(np.arange(len(state))[rank::ranks])
            self.buffer.absorb(share)
        if rank == 0 and part.samples:
            self.samples.bring_back(read_samples(inside(folder, part.samples[lost])).scans)
        return len(share)

    def start(self, origins: Sequence[Origin], *, rank: int, ranks: int) -> Started:
        """Begin with what earlier runs and memories have learnt, before the first `join`.

        Model and optimiser are those of the first origin that has any, the buffers' samples are united within the
        budget. Steps count from 0. Raises OSError, and ValueError for files that are damaged or do not fit.
        """
        if not hasattr(self, "samples"):
            self._awake(rank)
        optics = copy.deepcopy(self.network.optics.state_dict())
        reason = take_up_model(origins, self._loop, {"served": self.served})
        for network in (self.network, self.served):  # the probe is this run's, not an earlier one's
            network.optics.load_state_dict(optics)
        take_up_buffers(origins, self._loop, rank=rank, ranks=ranks)
        self.samples.hold_as(self.buffer.layout)
        for name, rows in earlier_held_out(origins).items():
            self.samples.restore({name: rows}, None)
        self._loop.trained = True
        return Started(model=not reason, reason=reason, samples=len(self.buffer))

    async def recorded(self) -> None:
        """Wait until nothing is being written, however that ends."""
        await asyncio.gather(asyncio.wrap_future(self._recorder.written), return_exceptions=True)

    def restore(self, folder: Path, part: RanksPart, *, rank: int, ranks: int) -> int:
        """Take up what a checkpoint holds of the ranks, before the first `join`; returns the samples of its buffer.

        On as many ranks as wrote it each takes its own; on more or fewer the samples are given out evenly.

        Raises OSError, and ValueError for a checkpoint of another network or optimiser, or a damaged one.
        """
        if not hasattr(self, "samples"):
            self._awake(rank)
        restore_training(
            read_training(inside(folder, part.weights), self.network, self._others), self._loop, self._others
        )
        restore_buffer(folder, part, self._loop, rank=rank, ranks=ranks)
        self.samples.hold_as(self.buffer.layout)
        for held in read_labelled(folder, part, rank=rank, ranks=ranks):
            self.samples.restore(held.scans, held.scan)
            if part.ranks == ranks:
                self.samples.rng.bit_generator.state = held.rng
        self._loop.trained = True
        return len(self.buffer)

    @contextmanager
    def _leaving(self, place: str) -> Iterator[None]:
        """Leave the group at once where anything raises inside, so that no other rank waits for this one."""
        try:
            with group.group_errors(place):
                yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # their locals would keep the group open
            self.close()
            raise

    def _align(self, source: int) -> None:
        """Take over what else `source` has: the served weights, and those that a strategy restarts from."""
        packed = Packed()
        if self.rank == source:
            packed.add("served.", self.served.state_dict())
            if self.strategy.restarts:
                packed.add("initial.", self._initial)
        packed = Packed.from_bytes(group.broadcast_bytes(packed.to_bytes(), source))
        self.served.load_state_dict(packed.named("served."))
        if self.strategy.restarts:
            self._initial = packed.named("initial.")

    @property
    def buffer(self) -> RehearsalBuffer:
        """The local rehearsal buffer."""
        return self._loop.buffer

    async def computes_on(self) -> str:
        """Device and host of this rank, in words, also while `fit` runs."""
        return place_in_words(self._loop.device)

    async def receive(self, labels: Labels) -> int:
        """Take labels in, also while `fit` runs; they are trained on from its next call. Returns how many frames of
        their scan there are to train on then, as far as known.

        What was shared out among the ranks of another generation is left out: others have these frames now.
        """
        if labels.generation == self.generation:
            self._arrived.append(labels)
        arrived = list(self._arrived)  # the thread that trains takes from it meanwhile
        while sum(each.nbytes for each in arrived) > self.settings.samples_bytes and len(arrived) > 1:
            self.samples.dropped += len(self._arrived.popleft().frame_id)
            arrived = list(self._arrived)
        coming = sum(int((~each.held_out).sum()) for each in arrived if each.scan == labels.scan)
        return coming + self.samples.count(labels.scan)

    def fit(self, scan: str, steps: int) -> Round:
        """Train for that many steps on the labelled frames of a scan, together with all other ranks.

        Raises:
            NoSamples: on all ranks, where any of them has no labelled frame of the scan; they stay in the group.
            GroupLost: another rank is gone, or raised something itself. Weights, buffer and optimiser are as after
                the last whole step; join again.
            What network, objective or strategy raise, as they raise it; this rank has then left the group.
        """
        lacking = self._without_samples(scan)
        if lacking:
            raise NoSamples(
                f"found no labelled frame of scan {scan!r} on rank {', '.join(map(str, lacking))}, expected some "
                "on each rank before training: label more frames"
            )
        with self._leaving(f"rank {self.rank}, training on scan {scan!r},"):
            self._begin(scan)
            tally = self._loop.run(steps, self.samples.take)
            quality = judge(self.network, self.served, self.samples, scan, self._earlier) if self.rank == 0 else {}
            self._earlier = quality.get("earlier_errors", self._earlier)
        return Round(
            steps=self._loop.steps,
            loss=tally.loss,
            seconds={part: tally.seconds[part] for part in PARTS},
            representatives=tally.representatives,
            remote=tally.remote,
            stored=len(self.buffer),
            capacity=self.buffer.capacity,
            composition=self.buffer.composition(),
            seen=dict(self.samples.seen),
            dropped=self.samples.dropped,
            **quality,
        )

    def _take_in(self) -> None:
        """Take in the labels that have arrived."""
        while self._arrived:
            labels = self._arrived.popleft()
            self.samples.add(labels)
            name = ScanName(self.run, labels.scan, time.time())
            self.buffer.scans.setdefault(labels.stratum, name)
            self._probe = self._probe if labels.probe is None else (labels.probe, labels.mask)

    def _without_samples(self, scan: str) -> list[int]:
        """Take in what has arrived; the ranks that have no frame of the scan to train on, the same on every rank."""
        with self._leaving(f"rank {self.rank}, before training on scan {scan!r},"):
            self._take_in()
            has = torch.tensor([int(self.samples.count(scan) > 0)])
            everyone = [torch.empty_like(has) for _ in range(self.ranks)]
            dist.all_gather(everyone, has)
        return [rank for rank, there in enumerate(everyone) if not there]

    def _begin(self, scan: str) -> None:
        """Agree on the optics, and be ready for the first step."""
        if self.strategy.restarts and self.samples.scan not in (None, scan):
            self.network.load_state_dict(self._initial)
            self._loop.optimiser.state.clear()
        self.samples.begin(scan)
        if self._probe is not None:
            self.network.optics.set(*self._probe)
            self._probe = None
        dist.all_reduce(diverged := torch.tensor(int(self._diverged)), dist.ReduceOp.MAX)
        if diverged:  # on any rank: weights are equal on all, network buffers are not
            self._return_to_served()
        # Labels may have reached the ranks at different times; rank 0's optics hold for all.
        group.broadcast_tensor(self.network.optics.probe, 0)
        group.broadcast_tensor(self.network.optics.bad.view(torch.uint8), 0)
        self._loop.prepare(self.samples.example())

    @property
    def _diverged(self) -> bool:
        """Whether a weight or a network buffer, such as a running mean, is not finite that was so when published."""
        pairs = zip(self.served.state_dict().values(), self.network.state_dict().values(), strict=True)
        return any(bool((before.isfinite() & ~now.isfinite()).any()) for before, now in pairs)

    def _return_to_served(self) -> None:
        """After a round that diverged: every rank takes the weights and network buffers that rank 0 last published. The
        optics stay: they are those of the present scan."""
        optics = copy.deepcopy(self.network.optics.state_dict())
        self._align(0)
        self.network.load_state_dict(self.served.state_dict())
        self.network.optics.load_state_dict(optics)
        self._loop.optimiser.state.clear()

    def publish(self, store: Path, version: ModelVersion) -> None:
        """Write the weights as they are now, and take them as those that later candidates are compared with.

        For rank 0; the others call `serve`. A version that was written already is written once: a repeated call is
        harmless as long as the weights are the same. Raises FileExistsError where they are not.
        """
        models = ModelStore(store)
        try:
            models.publish(self.network, version)
        except FileExistsError:
            written = models.weights(version.number)
            if not all(torch.equal(written[name], p.detach().cpu()) for name, p in self.network.named_parameters()):
                raise
            models.point_to(version.number)
        self.served.load_state_dict(self.network.state_dict())

    def recalled(self) -> dict[str, float]:
        """Error of the weights last published on held-out frames of each scan so far: what was forgotten shows."""
        return errors_by_scan(self.served, self.samples, self.network.hyperparameters["patch"])

    def serve(self, store: Path, number: int) -> None:
        """Take a published version as the one that candidates are compared with."""
        self.served.load_state_dict(ModelStore(store).weights(number))

    def go_back(self, store: Path, number: int) -> None:
        """Go on from a published version, as all other ranks do: its weights, and an optimiser without a past."""
        weights = ModelStore(store).weights(number)
        self.network.load_state_dict(weights)
        self.served.load_state_dict(weights)
        self._loop.optimiser.state.clear()

    async def abandon(self) -> None:
        """Raise GroupLost out of what waits for another rank now, which is known to be lost; for `join` to come."""
        group.abandon()

    async def digest(self) -> str:
        """A hash over weights, optimiser state and step: between two rounds it is the same on all ranks."""
        return self._loop.digest()

    def close(self) -> None:
        """Leave the group."""
        self._loop.disconnect()
        group.leave()
