"""The training loop, whole and visible, of any torch module with any strategy: one `Loop` on each rank."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from steering.learning.exchange import Exchange
from steering.learning.group import broadcast_bytes, group_errors
from steering.learning.insertion import Policy
from steering.learning.objectives import Fields
from steering.learning.rehearsal import RehearsalBuffer
from steering.learning.sampling import Mode
from steering.learning.strategies import Minibatch, Strategy
from steering.learning.training_state import Packed, capture, digest, restore

PARTS = ("load", "train", "populate", "augment", "wait")
Load = Callable[[int, Fields], None]
"""Write that many new samples into the first rows of these tensors."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The settings of training."""

    batch: int = 16
    """New samples per rank and step (b)."""
    candidates: int = 8
    """How many of them are offered to the local buffer (c)."""
    representatives: int = 24
    """Stored samples, drawn from the buffers of all ranks, that join each minibatch (r)."""
    learning_rate: float = 1e-3
    buffer_bytes: int = 16 * 2**20
    """Budget of each rank's local buffer."""
    insertion: Policy = "reservoir"
    """What the buffer keeps: `reservoir`, `replacement` (the paper's) or `balanced` over strata."""
    sampling: Mode = "uniform"
    """How representatives are drawn: `uniform`, `balanced` over strata, or by samples `seen`."""
    look_ahead: int = 1
    """Steps that an exchange is started before it is needed (k); more than 1 for slow networks."""
    deadline: float = 30.0
    """Seconds after which a collective that a rank does not enter raises on the others."""
    seed: int = 0
    threads: int = 1
    """Of torch on each rank. Ranks share a machine's cores, and steps on small frames gain nothing from more; more for
    ranks that have cores of their own and larger networks."""
    niceness: int = 5
    """Of a rank's process, as of `nice`: where cores are shared, training yields to prediction. 0: it does not."""
    device: str = "cpu"
    """Where networks are trained: `cpu`, or `cuda` (NCCL where every rank has a GPU of its own, gloo elsewhere)."""
    buffer_device: str = "cpu"
    """Where samples are stored: `cpu` (pinned where there is CUDA), or `cuda` for the memory of the rank's GPU."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.representatives < 0 or not 0 <= self.candidates <= self.batch:
            raise ValueError(
                f"found batch={self.batch}, candidates={self.candidates}, representatives={self.representatives}; "
                "expected a batch of 1 or more, candidates among its samples, representatives not below 0"
            )
        if self.look_ahead < 1:
            raise ValueError(f"found look_ahead={self.look_ahead}, expected 1 or more")
        if self.buffer_device.startswith("cuda") and not self.device.startswith("cuda"):
            raise ValueError(f"found device={self.device!r} with a buffer on the GPU, expected device='cuda' beside it")


@dataclass
class Tally:
    """What the steps of a while cost and did."""

    seconds: Counter[str] = field(default_factory=Counter)
    """For each of PARTS."""
    representatives: int = 0
    remote: int = 0
    """Of the representatives, how many came from another rank."""
    losses: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    """Seconds that each step waited for representatives."""

    @property
    def loss(self) -> float:
        """Mean over the steps; 0 where there was none."""
        return sum(self.losses) / max(1, len(self.losses))

    def __add__(self, other: Tally) -> Tally:
        """Both whiles together."""
        return Tally(
            seconds=self.seconds + other.seconds,
            representatives=self.representatives + other.representatives,
            remote=self.remote + other.remote,
            losses=self.losses + other.losses,
            waits=self.waits + other.waits,
        )

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start  # type: ignore[assignment]


class Loop:
    """Weights, optimiser and rehearsal buffer of one rank: they outlive the groups that the rank joins.

    Args:
        network: trained in place, on the device of the settings.
        strategy: how new samples and representatives are used.
        settings: the same on every rank.
        rank: of this process; it seeds what the local buffer keeps.
        optimiser: of the network's parameters; None: AdamW.
    """

    def __init__(
        self,
        network: nn.Module,
        strategy: Strategy,
        settings: TrainerSettings,
        *,
        rank: int = 0,
        optimiser: torch.optim.Optimizer | None = None,
    ) -> None:
        self.network, self.strategy, self.settings, self.rank = network, strategy, settings, rank
        kind = settings.device
        self.device = torch.device(kind, rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)
        network.to(self.device)
        self.optimiser = optimiser or torch.optim.AdamW(network.parameters(), settings.learning_rate, weight_decay=1e-4)
        self.buffer = RehearsalBuffer(
            settings.buffer_bytes,
            policy=settings.insertion,
            seed=settings.seed + rank,
            device=self.device if settings.buffer_device == "cuda" else settings.buffer_device,
        )
        self.steps = 0
        """Taken so far; the same on every rank."""
        self._fresh = True
        self._module: nn.Module | None = None
        self._exchange: Exchange | None = None
        self._ring: list[dict[str, torch.Tensor]] = []
        self._loaded: tuple[str, ...] = ()

    def connect(self, group: dist.ProcessGroup | None) -> int:
        """Train with the other ranks of torch's default group from now on.

        All ranks take up weights, network buffers, optimiser state and step of one of them: the lowest among those
        with the most steps; a loop that was never connected before is that one only where all are so.

        Args:
            group: a second one of the same ranks, for the exchange alone; None: this rank trains by itself.

        Returns:
            The rank whose state all have now.
        """
        self.disconnect()
        source = 0
        if group is None:
            self._module = self.network
        else:
            source = self._align()
            with warnings.catch_warnings():
                # The argument's new name is not known to the torch of many clusters yet.
                warnings.simplefilter("ignore", FutureWarning)
                self._module = DistributedDataParallel(self.network, broadcast_buffers=False)
        self._fresh = False
        if self.strategy.rehearses:
            settings = self.settings
            self._exchange = Exchange(
                self.buffer,
                group,
                settings.representatives,
                seed=settings.seed,
                mode=settings.sampling,
                device=self.device,
            )
        return source

    def _align(self) -> int:
        mine = torch.tensor([int(not self._fresh), self.steps])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        source = most_advanced([(bool(trained), steps) for trained, steps in torch.stack(everyone).tolist()])
        if dist.get_rank() == source:
            packed = capture(self.network, self.optimiser)
            packed.scalars["step"] = self.steps
            broadcast_bytes(packed.to_bytes(), source)
        else:
            packed = Packed.from_bytes(broadcast_bytes(b"", source))
            restore(packed, self.network, self.optimiser)
            self.steps = packed.scalars["step"]
        return source

    def digest(self) -> str:
        """A hash over weights, optimiser state and step: the same on all ranks between two runs."""
        return digest(self.network, self.optimiser, self.steps)

    def disconnect(self) -> None:
        """Let go of the group, so that it can be left."""
        self._module = None
        self._exchange = None

    def prepare(self, example: Fields) -> None:
        """Be ready for samples like this one, tensors without a sample axis; `stratum` int64 () is among them."""
        if not self._ring:
            self._loaded = tuple(example)
            rows = self.settings.batch + self.settings.representatives
            # Two minibatches in turn: one is trained on while the next is filled.
            self._ring = [
                {name: torch.zeros(shape, dtype=dtype, device=self.device) for name, (shape, dtype) in fields.items()}
                for fields in [self._fields(rows, example)] * 2
            ]
        while self._exchange is not None and self._exchange.in_flight < self.settings.look_ahead:
            self._exchange.start(self.steps + self._exchange.in_flight)

    def _fields(self, rows: int, example: Fields) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each field of an augmented minibatch: the sample's own, and what is remembered of it."""
        fields = {name: value.to(self.device)[None] for name, value in example.items()}
        if self.strategy.rehearses:
            training = self.network.training
            self.network.eval()  # a look at the outputs must leave no trace in running means
            with torch.no_grad():
                outputs = self.strategy.objective.outputs(self.network, fields)
            self.network.train(training)
            fields = {**fields, **(self.strategy.remember(fields, outputs) or {})}
        return {name: ((rows, *value.shape[1:]), value.dtype) for name, value in fields.items()}

    def run(self, steps: int, load: Load) -> Tally:
        """Take that many steps, together with all other ranks.

        Raises GroupLost where a rank is gone, and what network, strategy or `load` raise, as they raise it. Weights,
        buffer and optimiser are then as after the last whole step.
        """
        tally = Tally()
        for _ in range(steps):
            with group_errors(f"rank {self.rank}, at step {self.steps},"):
                self._step(load, tally)
        return tally

    def _step(self, load: Load, tally: Tally) -> None:
        """Load, wait, start the exchange of a later step, loss, backward, step, populate."""
        b, c = self.settings.batch, self.settings.candidates
        with tally.timed("load"):
            fields = self._ring[self.steps % 2]
            load(b, fields)
        delivered = 0
        if self._exchange is not None:
            before = tally.seconds["wait"]
            with tally.timed("wait"):
                arrived = self._exchange.finish(fields, b)
            tally.waits.append(tally.seconds["wait"] - before)
            delivered = arrived.count
            tally.representatives += arrived.count
            tally.remote += arrived.remote
            with tally.timed("augment"):
                self._exchange.start(self.steps + self.settings.look_ahead)
        minibatch = Minibatch({name: value[: b + delivered] for name, value in fields.items()}, new=b)
        with tally.timed("train"):
            self.optimiser.zero_grad(set_to_none=True)
            loss = self.strategy.gradient(self._trained, minibatch)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimiser.step()
            tally.losses.append(loss.value.item())
        with tally.timed("populate"), torch.no_grad():
            new = {name: fields[name][:b] for name in self._loaded}
            kept = self.strategy.remember(new, loss.outputs)
            if kept is not None:
                rows = {name: value[:c] for name, value in kept.items() if name != "stratum"}
                self.buffer.insert(rows, kept["stratum"][:c])
        self.steps += 1

    @property
    def _trained(self) -> nn.Module:
        if self._module is None:
            raise RuntimeError("found no group, expected `connect` before the first step")
        return self._module


def most_advanced(standings: Sequence[tuple[bool, int]]) -> int:
    """The rank whose state all others take up, from (whether it was connected before, its steps) of each rank."""
    return min(range(len(standings)), key=lambda rank: (-standings[rank][0], -standings[rank][1], rank))
