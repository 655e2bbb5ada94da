"""The training loop, whole and visible, of any torch module with any strategy: one `Loop` on each rank."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from steering.learning.buffer import RehearsalBuffer
from steering.learning.clock import Clock
from steering.learning.execution import PLAIN, Execution, fastest, possible
from steering.learning.group import broadcast_bytes, deadline_of, group_errors, nccl_of, queued_so_far, settle
from steering.learning.minibatch import Fields, Minibatch, Ring, Specification
from steering.learning.objectives import evaluating
from steering.learning.rehearsal import Rehearsal
from steering.learning.rows import IDENTITY, STRATUM
from steering.learning.settings import TrainerSettings
from steering.learning.staging import Load, Staging
from steering.learning.strategies import Strategy
from steering.learning.strategies.contract import Loss
from steering.learning.tally import Tally
from steering.learning.training_state import Packed, capture, digest, restore
from steering.ptychography.device import find_device


class Loop:
    """Weights, optimiser and rehearsal buffer of one rank: they outlive the groups that the rank joins.

    Args:
        network: trained in place, on the device of the settings.
        strategy: how new samples and representatives are used.
        settings: the same on every rank.
        rank: of this process; it seeds what the local buffer keeps.
        local_rank: of this process among the ranks on its host, which share out its GPUs; None: LOCAL_RANK, as
            torchrun says it, or else the rank.
        optimiser: of the network's parameters; None: the one of the settings.
    """

    def __init__(
        self,
        network: nn.Module,
        strategy: Strategy,
        settings: TrainerSettings,
        *,
        rank: int = 0,
        local_rank: int | None = None,
        optimiser: torch.optim.Optimizer | None = None,
    ) -> None:
        self.network, self.strategy, self.rank = network, strategy, rank
        self.settings = self._began_with = settings
        """As they are on the present number of ranks, and as they were on the one that the training began with."""
        on_host = int(os.environ.get("LOCAL_RANK", rank)) if local_rank is None else local_rank
        self.device = find_device(settings.device, local_rank=on_host)
        if settings.buffer_device == "cuda" and self.device.type != "cuda":
            raise ValueError("found a buffer on the GPU and training on the CPU, expected both on the GPU")
        network.to(self.device)
        self.optimiser = optimiser or settings.make_optimiser(network.parameters())
        for group in self.optimiser.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.rehearsal = Rehearsal(
            r=settings.representatives,
            candidates=settings.candidates,
            budget=settings.buffer_bytes,
            insertion=settings.insertion,
            sampling=settings.sampling,
            look_ahead=settings.look_ahead,
            storage=str(self.device) if settings.buffer_device == "cuda" else settings.buffer_device,
            seed=settings.seed,
            group=None,
            rank=rank,
        )
        self.steps = 0
        """Taken so far; the same on every rank."""
        self.nccl: list[Any] = []
        """The backend of the gradients, where it is NCCL."""
        self.trained = False
        """It was connected before, or restored: its state counts more than that of loops which were not."""
        self._module: nn.Module | None = None
        self._grouped = False
        self._ring: Ring | None = None
        self.staging: Staging | None = None
        """Where new samples are loaded on their way to a GPU."""
        self._loaded: tuple[str, ...] = ()
        self.execution: Execution | None = None
        """How a step is computed; None: not chosen yet."""
        self._chooses = False
        """There are several executions on all ranks."""

    @property
    def buffer(self) -> RehearsalBuffer:
        """The local rehearsal buffer."""
        return self.rehearsal.buffer

    def connect(self, group: dist.ProcessGroup | None, *, began: int | None = None) -> int:
        """Train with the other ranks of torch's default group from now on.

        All ranks take up weights, network buffers, optimiser state and step of one of them: the lowest among those
        with the most steps; a loop that was never connected before is that one only where all are so.

        Args:
            group: a second one of the same ranks, for the exchange alone; None: this rank trains by itself.
            began: ranks that the training began with, see TrainerSettings.on; None: as many as there are.

        Returns:
            The rank whose state all have now.
        """
        self.disconnect()
        self._chooses = len(self._executions) > 1
        source = 0 if group is None else self._align()
        self._grouped = group is not None
        self._wrap()
        found = None if group is None else nccl_of(None, self.device)
        self.nccl = [] if found is None else [found]
        self.trained = True
        ranks = 1 if group is None else dist.get_world_size()
        self._suit(self._began_with.on(ranks, began or ranks))
        if self.strategy.rehearses:
            self.rehearsal.connect(group, step=self.steps, device=self.device)
        return source

    def _wrap(self) -> None:
        """Make what a step runs of the network, as it lies in memory now."""
        self._module = self.network
        if self._grouped:
            with warnings.catch_warnings():
                # The argument's new name is not known to the torch of many clusters yet.
                warnings.simplefilter("ignore", FutureWarning)
                # No init_sync: all have the same weights already, and it would wait for the GPU unseen by `settle`.
                self._module = DistributedDataParallel(self.network, broadcast_buffers=False, init_sync=False)
        if self.settings.precision == "bfloat16":
            self._module = Autocast(self._module, self.device.type)

    @property
    def _executions(self) -> list[Execution]:
        return possible(self.device, self.network, self.optimiser, compiled=self.settings.compiled)

    def _suit(self, settings: TrainerSettings) -> None:
        """Go on with the settings for another number of ranks."""
        rows = [(one.batch, one.representatives) for one in (self.settings, settings)]
        if rows[0] != rows[1]:
            self._ring = None
        self.settings = settings
        self.rehearsal.r, self.rehearsal.candidates = settings.representatives, settings.candidates
        self._set_rate(1.0)

    def _set_rate(self, factor: float) -> None:
        """The learning rate, times a schedule's factor."""
        factor *= self.settings.learning_rate / self._began_with.learning_rate
        for group in self.optimiser.param_groups:
            group["lr"] = factor * group["initial_lr"]

    def _align(self) -> int:
        mine = torch.tensor([int(self.trained), self.steps, int(self._chooses)])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        source = most_advanced([(bool(trained), steps) for trained, steps, _ in torch.stack(everyone).tolist()])
        self._chooses = all(int(one[2]) for one in everyone)
        if dist.get_rank() == source:
            packed = capture(self.network, self.optimiser)
            packed.scalars |= {
                "step": self.steps,
                "execution": None if self.execution is None else asdict(self.execution),
            }
            broadcast_bytes(packed.to_bytes(), source)
        else:
            packed = Packed.from_bytes(broadcast_bytes(b"", source))
            restore(packed, self.network, self.optimiser)
            self.steps = packed.scalars["step"]
            if packed.scalars["execution"] is not None:  # weights must lie in memory alike on all ranks
                self.execution = Execution(**packed.scalars["execution"])
                self.execution.apply(self.network, self.optimiser)
        return source

    def digest(self) -> str:
        """A hash over weights, optimiser state and step: the same on all ranks between two runs."""
        return digest(self.network, self.optimiser, self.steps)

    def disconnect(self) -> None:
        """Drop what holds the group, so that it can be left."""
        self._module = None
        self.nccl = []
        self.rehearsal.disconnect()

    def prepare(self, example: Fields) -> None:
        """Be ready for samples like this one, tensors without a sample axis; `stratum` int64 () is among them."""
        if self._ring is None:
            self._loaded = tuple(example)
            rows = self.settings.batch + self.settings.representatives
            fields = self._fields(example)
            if self.strategy.rehearses:  # what an earlier run has stored may have narrower counts
                self.buffer.widen({name: dtype for name, (_, dtype) in fields.items()})
            self._ring = Ring(fields, rows, self.device)
            if self.device.type == "cuda":
                loaded = {name: fields[name] for name in self._loaded}
                self.staging = Staging(loaded, self.settings.batch, self.device)
        if self.execution is None:
            self._choose(example)
        self.rehearsal.prefetch()

    def _choose(self, example: Fields) -> None:
        """Take the fastest execution of a step, which rank 0 says, from now on."""
        self.execution = PLAIN
        if not self._chooses or self._ring is None:
            return
        fields = self._ring.next()
        for name, value in example.items():
            fields[name][:] = value.to(self.device)
        minibatch = Minibatch(fields, new=self.settings.batch)

        def step(network: nn.Module, optimiser: torch.optim.Optimizer) -> torch.Tensor:
            optimiser.zero_grad(set_to_none=True)
            half = self.settings.precision == "bfloat16"
            loss = self.strategy.gradient(Autocast(network, self.device.type) if half else network, minibatch)
            optimiser.step()
            return loss.value.detach()

        execution = fastest(self._executions, self.network, self.optimiser, step)
        if self._grouped:
            execution = Execution(**json.loads(broadcast_bytes(json.dumps(asdict(execution)).encode(), 0)))
        self.execution = execution
        execution.apply(self.network, self.optimiser)
        self._wrap()

    def _fields(self, example: Fields) -> Specification:
        """Shape and dtype of each field of an augmented minibatch, with what the strategy stores of a sample."""
        fields = {name: value.to(self.device)[None] for name, value in example.items()}
        if self.strategy.rehearses:
            with evaluating(self.network), torch.no_grad():  # this pass must not change running means
                outputs = self.strategy.objective.outputs(self.network, fields)
            fields = {**fields, **(self.strategy.remember(fields, outputs) or {})}
        return {name: (tuple(value.shape[1:]), value.dtype) for name, value in fields.items()}

    def run(self, steps: int, load: Load) -> Tally:
        """Take that many steps, together with all other ranks.

        Raises GroupLost where a rank is gone, and what network, strategy or `load` raise, as they raise it. Weights,
        buffer and optimiser are then as after the last whole step.
        """
        tally = Tally(clock=Clock(self.device))
        for _ in range(steps):
            with group_errors(f"rank {self.rank}, at step {self.steps},"):
                self._step(load, tally)
        tally.settle()
        return tally

    def _step(self, load: Load, tally: Tally) -> None:
        """Load, wait, start the exchange of a later step, loss, backward, step, populate."""
        b, ring, staging = self.settings.batch, self._ring, self.staging
        if ring is None:
            raise RuntimeError("found no example of a sample, expected `prepare` before the first step")
        tally.clock.start()
        fields = ring.next()
        if staging is None:
            load(b, fields)
            on_host: Fields = {}
        else:
            on_host = staging.fill(load, b, fields)
        tally.lap("load")
        delivered = 0
        if self.strategy.rehearses:
            arrived = self.rehearsal.finish(fields, b)
            tally.lap("wait")
            delivered = arrived.count
            tally.representatives += arrived.count
            tally.remote += arrived.remote
            self.rehearsal.prefetch()
            tally.lap("augment")
        minibatch = Minibatch({name: value[: b + delivered] for name, value in fields.items()}, new=b)
        loss = self._learn(minibatch)
        tally.add(loss.value.detach())
        tally.lap("train")
        with torch.no_grad():
            new = {name: fields[name][:b] for name in self._loaded}
            kept = self.strategy.remember(new, loss.outputs)
            if kept is not None:
                self.rehearsal.store(self._nearest(kept, new, on_host))
        tally.lap("populate")
        self.steps += 1

    def _learn(self, minibatch: Minibatch) -> Loss:
        """One step of the optimiser."""
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.strategy.gradient(self._trained, minibatch)
        if self.nccl:  # no garbage of a collective that failed may reach the weights
            settle(queued_so_far(self.device), self.nccl, deadline=deadline_of(self.nccl[0]))
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip_norm)
        if self.settings.schedule is not None:
            self._set_rate(self.settings.schedule(self.steps))
        self.optimiser.step()
        return loss

    def _nearest(self, kept: Fields, new: Fields, on_host: Fields) -> Fields:
        """What is to be stored, where storing it makes the host wait least: fields that the strategy keeps as they were
        loaded are there on the host too, and the numbers that decide what is kept are read there."""
        wanted = {STRATUM, IDENTITY} if self.buffer.device.type == "cuda" else set(on_host)
        return {
            name: on_host[name] if name in wanted and name in on_host and value is new.get(name) else value
            for name, value in kept.items()
        }

    @property
    def _trained(self) -> nn.Module:
        if self._module is None:
            raise RuntimeError("found no group, expected `connect` before the first step")
        self._module.training = self.network.training  # wrappers do not follow the network's `train` and `eval`
        return self._module


class Autocast(nn.Module):
    """A network that runs in bfloat16 where its layers allow it; float outputs are float32."""

    def __init__(self, network: nn.Module, device_type: str) -> None:
        super().__init__()
        self.network, self.device_type = network, device_type

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The network's outputs, a tensor or a tuple of tensors."""
        with torch.autocast(self.device_type, torch.bfloat16):
            outputs = self.network(*inputs)
        return tuple(map(_float32, outputs)) if isinstance(outputs, tuple) else _float32(outputs)


def _float32(output: torch.Tensor) -> torch.Tensor:
    return output.float() if output.is_floating_point() else output


def most_advanced(standings: Sequence[tuple[bool, int]]) -> int:
    """The rank whose state all others take up, from (whether it was connected before, its steps) of each rank."""
    return min(range(len(standings)), key=lambda rank: (-standings[rank][0], -standings[rank][1], rank))
