"""The contract of a backend: it runs a network on a machine, in a stated precision."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steering.models import Network


@dataclass(frozen=True)
class Backend:
    """How a network is run: `eager`, `channels_last`, `compiled`, `graphs` or `onnx`, in float32 or bfloat16.

    `eager` in float32 is the network as it is trained, and what all others are held against. What comes before the CNN
    is float32 in every backend. Each kind has a file of its own here.
    """

    kind: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """As in a summary: `channels_last_bfloat16`."""
        return f"{self.kind}_{str(self.dtype).removeprefix('torch.')}"

    @property
    def packaged(self) -> bool:
        """Whether it runs from a file that `make_package` writes, once for all versions."""
        return self.kind in ("compiled", "onnx")


REFERENCE = Backend("eager", torch.float32)


class Decode(Protocol):
    """Runs the network's `decode` with the weights of one version."""

    def __call__(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitude and phase (n, patch, patch) float32 of the network's views, see `Network.preprocess`."""

    def renew(self) -> None:
        """Take the weights that the network holds now; they were copied into the same memory."""


class Decoder(nn.Module):
    """The part of a network that is compiled or exported: complex numbers and FFTs stay outside."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network: Any = network  # a SplitNetwork

    def forward(self, views: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """What the network's `preprocess` makes of n frames -> amplitude and phase (n, patch, patch)."""
        return self.network.decode(*views)


def prepared(network: Network, backend: Backend, device: torch.device) -> Network:
    """A copy of the network, in the precision and the layout of a backend, that learns no more."""
    ready = copy.deepcopy(network).to(device).eval().requires_grad_(False)
    for layer in ready.modules():
        if isinstance(layer, nn.Conv2d) and backend.kind != "eager":
            layer.to(dtype=backend.dtype, memory_format=torch.channels_last)
        elif isinstance(layer, nn.Linear):
            layer.to(dtype=backend.dtype)
    return ready
