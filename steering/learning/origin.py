"""What a new run begins with: model, optimiser, buffer and held-out frames of earlier runs, or of a memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from steering.learning.buffer_file import read_buffer
from steering.learning.buffer_state import BufferState, fitted, merge, reshard
from steering.learning.loop import Loop
from steering.learning.objectives import evaluating
from steering.learning.restore import OtherNetwork, read_training
from steering.learning.rows import COUNTS, IDENTITY, STRATUM, Layout
from steering.learning.samples import Row, ScanSamples
from steering.learning.samples_file import read_samples
from steering.learning.strategies import Strategy
from steering.learning.tensor_file import inside
from steering.learning.training_state import Packed, restore

_EARLIER = 4
"""Scans of earlier runs whose held-out frames are kept: those of the runs started from, not of all before them."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Files that a run begins with; names are relative to the folder."""

    folder: Path
    run: str
    """Identity of the run, or name of the memory."""
    buffers: tuple[tuple[str, ...], ...]
    """Of each rank that wrote it: its whole buffer, then the changes after it, in order."""
    weights: str | None = None
    samples: tuple[str, ...] = ()
    number: int = 0
    """Of the run's checkpoint that wrote them: a later one holds more."""


@dataclass(frozen=True, kw_only=True)
class Started:
    """What became of it on a rank."""

    model: bool
    """False: it begins untrained."""
    reason: str
    """Why."""
    samples: int
    """In its buffer."""


def take_up_model(origins: Sequence[Origin], loop: Loop, others: Mapping[str, nn.Module]) -> str:
    """Weights and the optimiser's memory, from the first origin that has weights; its settings stay those of the loop.

    Returns why it was not possible, in words; empty where it was. Raises OSError, and ValueError for a damaged file.
    """
    found = next(((origin, origin.weights) for origin in origins if origin.weights), None)
    if found is None:
        return "there are no weights to begin with"
    origin, weights = found
    try:
        packed = read_training(inside(origin.folder, weights), loop.network, others)
    except OtherNetwork as other:
        return f"only the samples of {origin.run} are used: {other}"
    loop.network.load_state_dict(packed.named("network."))
    for name, network in others.items():
        network.load_state_dict(packed.named(f"{name}.") or packed.named("network."))
    _take_up_optimiser(packed, loop)
    return ""


def _take_up_optimiser(packed: Packed, loop: Loop) -> None:
    """The moments, where the optimiser is of the same kind: another one begins anew."""
    own = loop.optimiser.state_dict()["param_groups"]
    theirs = packed.scalars["groups"]
    if not isinstance(theirs, list) or _settings(theirs) != _settings(own):
        return
    tensors = {name: value for name, value in packed.tensors.items() if not name.startswith(("served.", "rng"))}
    restore(Packed(tensors, {"groups": own, "state": {}}), loop.network, loop.optimiser)


def _settings(groups: Sequence[object]) -> list[set[str]]:
    return [set(group) - {"initial_lr"} if isinstance(group, dict) else set() for group in groups]


def take_up_buffers(origins: Sequence[Origin], loop: Loop, *, rank: int, ranks: int) -> None:
    """This rank's part of the samples of all origins, each once.

    Fields that the strategy does not store are left out. Raises ValueError for buffers that cannot be united, or whose
    samples do not fit the network, or lack what the strategy stores.
    """
    wanted = stored_names(loop.strategy, loop.network)
    with ExitStack() as stack:
        states = [
            [read_buffer([inside(origin.folder, name) for name in chain], stack) for chain in origin.buffers]
            for origin in origins
        ]
        every = [_fitting(state, wanted, loop.network) for of_origin in states for state in of_origin]
        if every and len(origins) == 1 and (len(every) == ranks or every[0].policy == "replacement"):
            loop.buffer.load(reshard(every, rank, ranks))
        elif every:
            loop.buffer.load(reshard([merge(every, loop.settings.insertion)], rank, ranks))


def _fitting(state: BufferState, wanted: set[str], network: nn.Module) -> BufferState:
    _check_fits(state, network)
    if state.layout is None or not wanted:
        return state
    fields = tuple(one for one in state.layout.fields if one[0] in wanted)
    if len(fields) < len(wanted):
        raise ValueError(f"found {_lacking(wanted - {name for name, _, _ in fields})}: start from the model alone")
    return fitted(state, Layout(fields))


def _lacking(names: set[str]) -> str:
    return f"stored samples that lack {', '.join(sorted(names))}, which this run's strategy stores"


@torch.no_grad()
def stored_names(strategy: Strategy, network: nn.Module) -> set[str]:
    """Fields that a buffer of this strategy stores of a sample; none where it stores no sample."""
    sizes = getattr(network, "hyperparameters", {})
    if not strategy.rehearses or not {"window", "patch"} <= set(sizes):
        return set()
    device = next(network.parameters()).device
    window, patch = (torch.ones(1, sizes[key], sizes[key], device=device) for key in ("window", "patch"))
    number = torch.zeros(1, dtype=torch.int64, device=device)
    fields = {"counts": window, "amplitude": patch, "phase": patch, STRATUM: number, IDENTITY: number}
    with evaluating(network):
        outputs = strategy.objective.outputs(network, fields)
    return set(strategy.remember(fields, outputs) or ()) - {IDENTITY}


def names_in(origin: Origin) -> set[str]:
    """Fields of the stored samples of an origin; none where it has none. Raises OSError, ValueError for damage."""
    with ExitStack() as stack:
        for chain in origin.buffers:
            layout = read_buffer([inside(origin.folder, name) for name in chain], stack).layout
            if layout is not None:
                return {name for name, _, _ in layout.fields}
    return set()


def usable(origin: Origin, wanted: set[str]) -> tuple[Origin, str]:
    """The origin, without its buffers where their samples lack some of these fields; why, in words, empty where it does
    not. Raises as `names_in` does."""
    names = names_in(origin)
    if not names or names >= wanted:
        return origin, ""
    return replace(origin, buffers=()), f"without the samples of {origin.run}: they are {_lacking(wanted - names)}"


def _check_fits(state: BufferState, network: nn.Module) -> None:
    sizes = getattr(network, "hyperparameters", {})
    fields = {name: (shape, dtype) for name, shape, dtype in state.layout.fields} if state.layout is not None else {}
    for name, key in (("counts", "window"), ("amplitude", "patch"), ("phase", "patch")):
        shape, dtype = fields.get(name, ((), torch.float32))
        if name in fields and key in sizes and shape != (sizes[key], sizes[key]):
            raise ValueError(
                f"found stored samples whose {name} have {shape} pixels, expected ({sizes[key]}, {sizes[key]}) "
                "as this run's network and detector: start from a run of the same sizes"
            )
        if dtype != torch.float32 and (name != "counts" or dtype not in COUNTS):
            raise ValueError(f"found stored samples whose {name} are {dtype}, expected real numbers as steering stores")


def own_held_out(origin: Origin) -> dict[str, dict[int, Row]]:
    """Held-out frames of the origin's own scans, under the names RUN/SCAN. Raises OSError, ValueError for damage."""
    if not origin.samples:
        return {}
    scans = read_samples(inside(origin.folder, origin.samples[0])).scans  # every rank has all that are held out
    own = {name: scan.held_out for name, scan in scans.items() if "/" not in name and scan.held_out}
    return {f"{origin.run}/{name}": rows for name, rows in own.items()}


def earlier_held_out(origins: Sequence[Origin]) -> dict[str, ScanSamples]:
    """Held-out frames of the runs started from, under the names RUN/SCAN."""
    found: dict[str, ScanSamples] = {}
    for origin in origins:
        found |= {scan: ScanSamples(held_out=rows) for scan, rows in own_held_out(origin).items()}
    return dict(list(found.items())[-_EARLIER:])


@torch.no_grad()
def best_weights(origin: Origin, network: nn.Module) -> str:
    """Have a network hold the weights that the origin's run had in service; why not, in words, empty where it was."""
    if origin.weights is None:
        return "there are no weights to begin with"
    try:
        packed = read_training(inside(origin.folder, origin.weights), network, {"served": network})
    except OtherNetwork as other:
        return f"only the samples of {origin.run} are used: {other}"
    network.load_state_dict(packed.named("served.") or packed.named("network."))
    return ""
