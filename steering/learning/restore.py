"""Going on from the ranks' part of a checkpoint, on any number of ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steering.learning.buffer_file import read_buffer
from steering.learning.buffer_state import BufferState, reshard
from steering.learning.checkpoint import KIND, RanksPart
from steering.learning.loop import Loop
from steering.learning.samples_file import SamplesCut, read_samples
from steering.learning.tensor_file import TensorFile, inside
from steering.learning.training_state import Packed, restore

_RNG_BYTES = 100_000
"""torch's own state of a random generator has 5 kB."""


class OtherNetwork(ValueError):
    """The weights are those of another network than this one."""


def read_training(path: Path, network: nn.Module, others: Mapping[str, Any]) -> Packed:
    """Weights, optimiser and step as a checkpoint holds them, for this network.

    others: further networks or states that are there beside it, by name; those that the file lacks are left out.

    Raises OSError; OtherNetwork where names, shapes or dtypes are others; ValueError for a file that is damaged.
    """
    with TensorFile(path, KIND) as file:
        own = network.state_dict()
        _check_same(file, "network.", own)
        wanted = {f"network.{name}" for name in own}
        for name, one in others.items():
            if any(place.startswith(f"{name}.") for place in file.places):
                state = one.state_dict() if isinstance(one, nn.Module) else one
                _check_same(file, f"{name}.", state)
                wanted |= {f"{name}.{key}" for key in state}
        wanted |= _optimiser_tensors(file, [tuple(p.shape) for p in network.parameters()])
        if "rng" in file.places:
            place = file.place("rng", torch.uint8)
            if len(place.shape) != 1 or place.nbytes > _RNG_BYTES:
                raise ValueError(f"found a random generator's state of shape {place.shape} in {path}, expected bytes")
            wanted.add("rng")
        scalars = {name: file.scalars.get(name) for name in ("groups", "state", "step")}
        if type(scalars["step"]) is not int or not 0 <= scalars["step"] < 2**62:
            raise ValueError(f"found the step {str(scalars['step'])[:50]!r} in {path}, expected a count")
        return Packed({name: file.tensor(name) for name in sorted(wanted)}, scalars)


def _check_same(file: TensorFile, prefix: str, own: Mapping[str, Tensor]) -> None:
    found = {name: (p.dtype, p.shape) for name, p in file.places.items() if name.startswith(prefix)}
    expected = {prefix + name: (value.dtype, tuple(value.shape)) for name, value in own.items()}
    if found != expected:
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        name = wrong[0]
        raise OtherNetwork(
            f"found {name} {found.get(name, 'missing')} in {file.path}, expected {expected.get(name, 'none')}: it does "
            f"not fit this network, {len(wrong)} of {len(expected)} tensors differ; use the network that was trained"
        )


def _optimiser_tensors(file: TensorFile, shapes: list[tuple[int, ...]]) -> set[str]:
    names = {name for name in file.places if name.startswith("optimiser.")}
    for name in names:
        found = re.fullmatch(r"optimiser\.([0-9]{1,9})\.[a-z_]{1,50}", name)
        number = int(found[1]) if found else -1
        if not 0 <= number < len(shapes) or file.places[name].shape not in ((), (1,), shapes[number]):
            raise ValueError(
                f"found {name} of shape {file.places[name].shape} in {file.path}, expected its parameter's"
            )
    return names


def restore_training(packed: Packed, loop: Loop, others: Mapping[str, Any]) -> None:
    """Take up what `read_training` returned: weights, optimiser, step, random numbers, and the others.

    Raises ValueError where the optimiser is another one.
    """
    _check_optimiser(packed, loop.optimiser)
    restore(packed, loop.network, loop.optimiser)
    loop.steps = packed.scalars["step"]
    if "rng" in packed.tensors and loop.rank == 0:  # whose state it is: the others would draw the same
        try:
            torch.set_rng_state(packed.tensors["rng"])
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"found a random generator's state that torch refuses: {error}") from error
    for name, one in others.items():
        found = packed.named(f"{name}.")
        if found and isinstance(one, nn.Module):
            one.load_state_dict(found)
        elif found:
            one.update(found)


def _check_optimiser(packed: Packed, optimiser: torch.optim.Optimizer) -> None:
    """Refuse settings and states of another optimiser, and values of another kind than its own."""
    own, groups = optimiser.state_dict()["param_groups"], packed.scalars["groups"]
    same = isinstance(groups, list) and len(groups) == len(own) and all(isinstance(g, dict) for g in groups)
    for mine, theirs in zip(own, groups, strict=True) if same else ():
        same = same and theirs.get("params") == mine["params"]
        keys = set(theirs) - {"initial_lr"}
        same = same and keys == set(mine) - {"initial_lr"} and all(_alike(theirs[k], mine.get(k, 0.0)) for k in theirs)
    if not same or not isinstance(packed.scalars["state"], dict):
        raise ValueError(
            "found the state of another optimiser, expected that of this one: keep its kind, or start anew"
        )
    for parameter, values in packed.scalars["state"].items():
        numbers = isinstance(values, dict) and all(_alike(value, 0.0) for value in values.values())
        if not str(parameter).isdecimal() or not numbers:
            raise ValueError("found an optimiser's state that is no table of numbers, expected one that steering wrote")
    kinds = {frozenset(names) for names in _state_names(packed).values()}
    if len(kinds) > 1:
        raise ValueError(f"found parameters with different state of the optimiser, {kinds}, expected the same for all")


def _state_names(packed: Packed) -> dict[str, set[str]]:
    """What an optimiser's state holds of each parameter."""
    found = {str(parameter): set(values) for parameter, values in packed.scalars["state"].items()}
    for name in packed.named("optimiser."):
        parameter, kind = name.split(".", 1)
        found.setdefault(parameter, set()).add(kind)
    return found


def _alike(value: Any, mine: Any) -> bool:
    if isinstance(mine, list | tuple):
        return isinstance(value, list) and len(value) == len(mine) and all(map(_alike, value, mine))
    if isinstance(mine, bool) or mine is None:
        return value is None or isinstance(value, bool)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_share(folder: Path, part: RanksPart, rank: int, stack: ExitStack) -> BufferState:
    """What the buffer of one of the ranks held. Samples are read when asked for: stack keeps its files open."""
    return read_buffer([inside(folder, name) for name in part.buffers[rank]], stack)


def restore_buffer(folder: Path, part: RanksPart, loop: Loop, *, rank: int, ranks: int) -> None:
    """Fill an empty buffer: with as many ranks as wrote the checkpoint with this rank's own samples; with more or fewer
    see `reshard`."""
    with ExitStack() as stack:
        numbers = [rank] if part.ranks == ranks else list(range(part.ranks))
        states = [read_share(folder, part, number, stack) for number in numbers]
        loop.buffer.load(states[0] if part.ranks == ranks else reshard(states, rank, ranks))


def read_labelled(folder: Path, part: RanksPart, *, rank: int, ranks: int) -> list[SamplesCut]:
    """Labelled frames of the checkpoint that this rank has to bring: together the ranks bring all."""
    return [read_samples(inside(folder, name)) for name in part.samples[rank::ranks]]
