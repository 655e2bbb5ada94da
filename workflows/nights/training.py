"""Training on all that a memory holds, and judging on the held-out frames of every scan: what each rank does."""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steering import Incremental, Loop, ModelStore, ModelVersion, Place, Reconstruction, TrainerSettings
from steering.learning import Memory, best_weights
from steering.learning.buffer_file import read_buffer
from steering.learning.buffer_state import BufferState, ScanName
from steering.learning.epochs import Epochs
from steering.learning.quality import outputs_of, quality_of
from steering.learning.rows import as_rows
from steering.learning.samples import HELD_OUT, Row, stacked
from steering.learning.training_state import Packed, capture
from steering.models import Network, build_network, find_network
from steering.ptychography import patch_weight

FIELDS = ("counts", "amplitude", "phase")
_ONE_IN = 10
"""Of the samples of a scan without held-out frames."""


class Changed(Exception):
    """The memory has become another one while it was read."""


@dataclass(frozen=True, kw_only=True)
class Night:
    """What is learnt, and how; the same on every rank."""

    memory: Path
    samples: str
    """File of the samples that the memory had when the night began."""
    version: ModelVersion
    """Description of the model in service."""
    scratch: bool
    epochs: float
    batch: int
    learning_rate: float
    device: str
    seed: int
    earlier: tuple[int, ...]
    """Versions of earlier nights, for the forgetting matrix."""

    @property
    def store(self) -> ModelStore:
        """Of the versions that nights have published."""
        return ModelStore(self.memory / "models")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What rank 0 reports. Errors are those that models are judged by in a run, by scan (RUN/SCAN)."""

    errors: dict[str, dict[str, float]]
    """Of each model by name, oldest first; the last two are the one in service and the candidate."""
    borrowed: list[str]
    """Scans without held-out frames: judged by samples that the model in service may have learnt from."""
    quality: dict[str, Any]
    """Of the candidate, on all these frames."""
    trained_on: dict[str, int]
    steps: int
    loss: float
    seconds: float
    packed: Packed = field(repr=False)
    """Weights and optimiser of the candidate, as a checkpoint holds them."""
    weights: dict[str, torch.Tensor] = field(repr=False)


IN_SERVICE, CANDIDATE = "in service", "this night"


def learn(place: Place, night: Night) -> Outcome | None:
    """Train on this rank's part of the memory, together with all other ranks; rank 0 judges and returns the outcome.

    Raises Changed where the memory was written meanwhile, OSError, ValueError for one that is damaged.
    """
    torch.manual_seed(night.seed)
    kind, sizes = find_network(night.version.network), night.version.hyperparameters
    served, network = build_network(kind, sizes), build_network(kind, sizes)
    memory = Memory(night.memory)
    with memory.reading(), ExitStack() as stack:
        if memory.contents().samples != night.samples:
            raise Changed(f"{night.memory}: found a run added while it was read: try again later")
        origin = memory.origin()
        reason = best_weights(origin, served)
        if reason:
            raise ValueError(f"found no model to compare with in {night.memory}: {reason}")
        state = read_buffer([night.memory / night.samples], stack)
        held_out = {name: stacked(list(rows.values())) for name, rows in memory.held_out().items()}
        to_train, borrowed = divided(state, set(held_out))
        held_out |= {name: _read(state, rows) for name, rows in borrowed.items()}
        fields = _read(state, to_train[place.rank :: place.ranks])
    if night.scratch:
        network.optics.load_state_dict(served.optics.state_dict())
    else:
        network.load_state_dict(served.state_dict())
    weight = patch_weight(served.optics.modes().numpy(), int(sizes["patch"]))
    loop, loss, seconds = trained(place, network, fields, len(to_train), Reconstruction(weight), night)
    if place.rank:
        return None
    order = [f"{one.run}/{one.scan}" for one in by_age(state)]
    held_out = {name: held_out[name] for name in sorted(held_out, key=lambda n: order.index(n) if n in order else -1)}
    models = {f"night {number}": night.store.load(number) for number in night.earlier}
    models |= {IN_SERVICE: served, CANDIDATE: network.cpu()}
    objective = Reconstruction(weight)
    packed = capture(network, loop.optimiser)
    packed.scalars["step"] = loop.steps
    packed.add("served.", network.state_dict())
    quality = quality_of(network, together(held_out), objective)
    counts = {f"{s.run}/{s.scan}": int((state.stratum[to_train] == k).sum()) for k, s in state.scans.items()}
    return Outcome(
        errors={name: errors_of(one, held_out, objective) for name, one in models.items()},
        borrowed=sorted(borrowed),
        quality=quality,
        trained_on={name: count for name, count in counts.items() if count},
        steps=loop.steps,
        loss=loss,
        seconds=seconds,
        packed=packed,
        weights=dict(network.state_dict()),
    )


def by_age(state: BufferState) -> list[ScanName]:
    """The scans of a memory, oldest first."""
    return sorted(state.scans.values(), key=lambda one: (one.begun, one.run, one.scan))


def divided(state: BufferState, judged: set[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows to train on, and rows held out of each scan that has no held-out frames in the memory. Which ones follows
    from the samples' keys, so that they are the same every night.

    judged: scans that have some, RUN/SCAN.
    """
    borrowed = {}
    for stratum, name in state.scans.items():
        rows = np.flatnonzero((state.stratum == stratum) & (state.key % _ONE_IN == 0))
        if f"{name.run}/{name.scan}" not in judged and len(rows):
            borrowed[f"{name.run}/{name.scan}"] = rows
    kept = np.setdiff1d(np.arange(len(state)), np.concatenate([*borrowed.values(), np.zeros(0, np.int64)]))
    return kept, borrowed


def _read(state: BufferState, rows: np.ndarray) -> Row:
    return {name: state.read(name, rows) for name in FIELDS}


def trained(
    place: Place, network: Network, fields: Row, total: int, objective: Reconstruction, night: Night
) -> tuple[Loop, float, float]:
    """So many passes over the samples; the loop, the mean loss of the last tenth, and the seconds that it took."""
    steps = math.ceil(night.epochs * total / (night.batch * place.ranks))
    settings = TrainerSettings(
        batch=night.batch,
        learning_rate=night.learning_rate,
        schedule=partial(falling, steps=steps),
        deadline=120.0,
        seed=night.seed,
        device=night.device,
    )
    loop = Loop(network, Incremental(objective), settings, rank=place.rank)
    loop.connect(place.join(device=loop.device))
    count = len(fields["counts"])
    epochs = Epochs(count, seed=night.seed + place.rank)
    whole = {**{name: value.to(loop.device) for name, value in fields.items()}}
    whole["stratum"] = torch.zeros(count, dtype=torch.int64, device=loop.device)  # nothing is stored: all is there

    def load(n: int, out: Row) -> None:
        rows = torch.from_numpy(epochs.take(n)).to(loop.device)
        for name, value in whole.items():
            torch.index_select(as_rows(value), 0, rows, out=as_rows(out[name][:n]))  # torch cannot select from uint16

    network.train()
    loop.prepare({name: value[0] for name, value in whole.items()})
    begun = time.perf_counter()
    losses = loop.run(steps, load).losses
    loop.disconnect()
    return loop, float(np.mean(losses[-max(1, steps // 10) :])), time.perf_counter() - begun


def falling(step: int, *, steps: int) -> float:
    """The learning rate over its highest value: half a cosine, down to a hundredth."""
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


def together(held_out: dict[str, Row]) -> Row:
    """Some of the frames of each scan, evenly over it, in one type of counts."""
    each = max(1, HELD_OUT // len(held_out))
    some = [
        {name: fields[name][:: -(-len(fields[name]) // each)].numpy() for name in FIELDS}
        for fields in held_out.values()
    ]
    return {name: torch.from_numpy(np.concatenate([fields[name] for fields in some])) for name in FIELDS}


def errors_of(network: Network, held_out: dict[str, Row], objective: Reconstruction) -> dict[str, float]:
    """Mean error on the held-out frames of each scan."""
    return {scan: float(outputs_of(network, fields, objective)[1].mean()) for scan, fields in held_out.items()}
