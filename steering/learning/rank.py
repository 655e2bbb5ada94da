"""A training rank of a campaign: it takes labels in, trains on them with all other ranks, judges, and publishes."""

from __future__ import annotations

import copy
import gc
import os
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from steering.learning import group
from steering.learning.buffer import RehearsalBuffer
from steering.learning.loop import PARTS, Loop
from steering.learning.minibatch import Fields
from steering.learning.objectives import Reconstruction
from steering.learning.redistribution import redistribute
from steering.learning.samples import Labels, NoSamples, Samples
from steering.learning.settings import TrainerSettings
from steering.learning.strategies import Strategy
from steering.learning.training_state import Packed
from steering.models import ModelStore, Network
from steering.ptychography import (
    above_floor,
    far_field_residual,
    no_evidence,
    pair_offsets,
    patch_weight,
    poisson_floor,
    share_of_noise,
    thinned,
)
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

    def _awake(self, rank: int) -> None:
        """Make what the process of the rank keeps between groups."""
        torch.set_num_threads(self.settings.threads)
        os.nice(max(0, self.settings.niceness - os.nice(0)))  # os.nice adds: a process may hold a second rank later
        self._loop = Loop(self.network, self.strategy, self.settings, rank=rank)
        self._initial = copy.deepcopy(self.network.state_dict())
        self.served = copy.deepcopy(self.network)
        self.samples = Samples(
            seed=self.settings.seed + rank,
            keep_all=self.strategy.restarts,
            most_bytes=self.settings.samples_bytes,
        )
        self._arrived: deque[Labels] = deque()
        self._probe: Labels | None = None

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
        with self._leaving(f"rank {rank}, joining generation {generation},"):
            place = group.Place(rank=rank, ranks=ranks, where=where, deadline=self.settings.deadline)
            exchange_group = place.join(generation, device=self._loop.device)
            self.rank, self.ranks = rank, ranks
            self._loop.rank = rank
            source = self._loop.connect(exchange_group, began=began)
            self._align(source)
            self._take_in()
            redistribute(self.samples, rank=rank, ranks=ranks, source=source, generation=generation)
        return rank

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

    async def receive(self, labels: Labels) -> int:
        """Take labels in, also while `fit` runs; they are trained on from its next call. Returns how many."""
        self._arrived.append(labels)
        while sum(each.nbytes for each in self._arrived) > self.settings.samples_bytes and len(self._arrived) > 1:
            self.samples.dropped += len(self._arrived.popleft().frame_id)
        return len(labels.frame_id)

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
            quality = self._judge(scan) if self.rank == 0 else {}
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
            self._probe = labels if labels.probe is not None else self._probe

    def _without_samples(self, scan: str) -> list[int]:
        """Take in what has arrived; the ranks that have no frame of the scan to train on, the same on every rank."""
        with self._leaving(f"rank {self.rank}, before training on scan {scan!r},"):
            self._take_in()
            has = torch.tensor([int(self.samples.has(scan))])
            everyone = [torch.empty_like(has) for _ in range(self.ranks)]
            dist.all_gather(everyone, has)
        return [rank for rank, there in enumerate(everyone) if not there]

    def _begin(self, scan: str) -> None:
        """Agree on the optics, and be ready for the first step."""
        if self.strategy.restarts and self.samples.scan not in (None, scan):
            self.network.load_state_dict(self._initial)
            self._loop.optimiser.state.clear()
        self.samples.begin(scan)
        if self._probe is not None and self._probe.probe is not None:
            self.network.optics.set(self._probe.probe, self._probe.mask)
            self._probe = None
        if not all(bool(torch.isfinite(p).all()) for p in self.network.parameters()):
            self._return_to_served()  # the ranks' weights are equal: all come here, or none
        # Labels may have reached the ranks at different times; rank 0's optics hold for all.
        dist.broadcast(self.network.optics.probe, 0)
        bad = self.network.optics.bad.to(torch.uint8)
        dist.broadcast(bad, 0)
        self.network.optics.bad.copy_(bad)
        self._loop.prepare(self.samples.example())

    @torch.no_grad()
    def _return_to_served(self) -> None:
        """After a round that diverged: every rank takes the weights that rank 0 last published."""
        if self.rank == 0:
            self.network.load_state_dict(self.served.state_dict())
        for weight in self.network.parameters():
            dist.broadcast(weight, 0)
        self._loop.optimiser.state.clear()

    @torch.no_grad()
    def _judge(self, scan: str) -> dict[str, Any]:
        """Errors on the held-out frames of the scan: the candidate's, and the served weights'."""
        held_out = self.samples.held_out(scan)
        if held_out is None:
            return {}
        self.served.optics.load_state_dict(self.network.optics.state_dict())
        objective = Reconstruction(
            patch_weight(self.network.optics.modes().cpu().numpy(), self.network.hyperparameters["patch"])
        )
        served = float(_outputs(self.served, held_out, objective)[1].mean())
        return {"served_error": served, **_quality(self.network, held_out, objective)}

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


def _outputs(network: Network, fields: Fields, objective: Reconstruction) -> tuple[Tensor, Tensor]:
    """Predicted patches (n, h, w) complex, on the CPU, and their errors (n,)."""
    there = {name: value.to(network.optics.probe.device) for name, value in fields.items()}
    outputs = objective.outputs(network, there)
    return torch.polar(*outputs).cpu(), objective.error(outputs, there)


def _quality(network: Network, fields: Fields, objective: Reconstruction) -> dict[str, Any]:
    """Quality of the candidate on held-out frames: its error, and the distributions that trust is measured against."""
    probe, mask = network.optics.modes().cpu().numpy(), network.optics.bad.cpu().numpy()
    predicted, error = _outputs(network, fields, objective)
    patches, labels = predicted.numpy(), torch.polar(fields["amplitude"], fields["phase"]).numpy()
    counts = fields["counts"].numpy()
    residual, floor = far_field_residual(patches, counts, probe, mask), poisson_floor(counts, mask)
    fewer = thinned(counts, mask)
    again = _outputs(network, {**fields, "counts": torch.from_numpy(fewer)}, objective)[0].numpy()
    share = share_of_noise(residual, floor, far_field_residual(again, fewer, probe, mask), poisson_floor(fewer, mask))
    evidence = np.array([not reason for reason in no_evidence(counts, floor, mask)])
    return {
        "error": float(error.mean()),
        "residual": float(np.median(residual)),
        "residuals": tuple(above_floor(residual, floor, share)[evidence].tolist()),
        "noise_share": share,
        "offsets": tuple(pair_offsets(patches[evidence], labels[evidence], objective.weight.numpy()).tolist()),
    }
