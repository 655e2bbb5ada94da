"""Weights, network buffers, optimiser state and step of a training as tensors and JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

_METADATA = "steering.optimiser"


@dataclass
class Packed:
    """Named tensors with JSON beside them, as bytes in the format of safetensors: nothing is pickled."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)

    def add(self, prefix: str, state: Mapping[str, Tensor]) -> None:
        """Copy tensors in, under names with this prefix."""
        # Copies, for safetensors refuses tensors that share memory, such as tied weights.
        self.tensors |= {
            prefix + name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, value in state.items()
        }

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under names with this prefix, without it."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def to_bytes(self) -> bytes:
        """The whole, as safetensors."""
        return save(self.tensors, {_METADATA: json.dumps(self.scalars)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Packed:
        """What `to_bytes` returned elsewhere."""
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # as safetensors defines its format
        return cls(load(data), json.loads(header["__metadata__"][_METADATA]))


def capture(network: nn.Module, optimiser: torch.optim.Optimizer) -> Packed:
    """The network's state and the optimiser's, whose tensors are named by parameter."""
    found = optimiser.state_dict()
    packed = Packed(scalars={"groups": found["param_groups"], "state": {}})
    packed.add("network.", network.state_dict())
    for parameter, values in found["state"].items():
        packed.add(f"optimiser.{parameter}.", {name: value for name, value in values.items() if _is_tensor(value)})
        rest = {name: value for name, value in values.items() if not _is_tensor(value)}
        if rest:
            packed.scalars["state"][str(parameter)] = rest
    return packed


def restore(packed: Packed, network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Take up what `capture` returned. Raises ValueError where it is of another network or optimiser."""
    state: dict[int, dict[str, Any]] = {int(key): dict(values) for key, values in packed.scalars["state"].items()}
    for name, value in packed.named("optimiser.").items():
        parameter, kind = name.split(".", 1)
        state.setdefault(int(parameter), {})[kind] = value
    try:
        network.load_state_dict(packed.named("network."))
        optimiser.load_state_dict({"state": state, "param_groups": packed.scalars["groups"]})
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"found a state that does not fit this network or optimiser: {error}") from error
    keep_layout(optimiser)


def keep_layout(optimiser: torch.optim.Optimizer) -> None:
    """Bring what the optimiser holds into its parameters' memory format, as it makes it itself: mixed ones are slow."""
    for parameter, values in optimiser.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def digest(network: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> str:
    """A hash over weights, optimiser state and step, in hexadecimal.

    Network buffers are left out: running means belong to the samples that each rank has seen. So is the learning rate
    of the moment, which follows from the step and the number of ranks.
    """
    names = {f"network.{name}" for name, _ in network.named_parameters()}
    packed = capture(network, optimiser)
    groups = [{name: value for name, value in one.items() if name != "lr"} for one in packed.scalars["groups"]]
    found = hashlib.sha256(json.dumps([step, packed.scalars | {"groups": groups}], sort_keys=True).encode())
    for name, value in sorted(packed.tensors.items()):
        if name in names or name.startswith("optimiser."):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
