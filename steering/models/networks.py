"""The contract of a network, and how one is built from a class and its hyperparameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from steering.models.optics import Optics
from steering.models.probe_first import ProbeFirst
from steering.models.ptychonn import PtychoNN

_SPLIT = ("constants", "preprocess", "decode")


class Network(Protocol):
    """The contract of a network: a `torch.nn.Module` with `hyperparameters`, `optics` and `forward`.

    It may be a class of your own, in a workflow file or in a module beside it:

        class Mine(torch.nn.Module):
            def __init__(self, *, window: int = 64, patch: int = 40, modes: int = 1, width: int = 16) -> None:
                super().__init__()
                self.hyperparameters = {"window": window, "patch": patch, "modes": modes, "width": width}
                self.optics = Optics(window, modes)
                ...

    Its class and its state are pickled to the workers, by value where workers cannot import the class; all that its
    methods need should be imported at the top of its file. Published versions hold `state_dict()` only, never code: to
    load one, supply the class, `ModelStore.load(number, network=Mine)`.

    A network that defines `SplitNetwork`'s three methods too may be run by more backends.
    """

    hyperparameters: Mapping[str, Any]
    """The keyword arguments that build this network again: numbers, `window` (detector pixels) and `patch` (predicted
    pixels, at most as many) among them."""
    optics: Optics
    """Probe and detector mask, set by the run before the first frame and with every version. A network may ignore it,
    but it must be there: the probe of a version is kept in it."""

    def forward(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitude (transmission, 0 or more) and phase (radians) of the object around each position.

        counts: (n, window, window) photon counts, zero frequency at pixel (window // 2, window // 2); any real dtype,
        integers too; any n of 1 or more; what bad pixels (`optics.bad`) read has no meaning. The result must not depend
        on the flux, nor on the other frames of the batch. Returns two float32 (n, patch, patch). Called by `network(
        counts)`, with gradients where it is trained; the device is that of the parameters.
        """

    # Of torch.nn.Module.

    def __call__(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`, with torch's hooks."""

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and buffers by name, `optics` included; safetensors must be able to write them."""

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> Any:
        """Take these, in place. Raises RuntimeError where they do not fit."""

    def parameters(self) -> Iterator[Tensor]:
        """The weights."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The weights, with their names."""

    def modules(self) -> Iterator[Any]:
        """The network and all its layers."""

    def to(self, *arguments: Any, **named: Any) -> Any:
        """Move to a device or a dtype. Returns the network."""

    def train(self, mode: bool = True) -> Any:
        """Whether it learns. Returns the network."""

    def eval(self) -> Any:
        """It predicts. Returns the network."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Whether its weights collect gradients. Returns the network."""


class SplitNetwork(Network, Protocol):
    """A network in parts, which compiled backends, bfloat16 and ONNX need: complex numbers and FFTs stay outside.

    `forward(counts)` must equal `decode(*preprocess(counts, *constants()))`.
    """

    def constants(self) -> tuple[Tensor, ...]:
        """What follows from `optics` alone, computed once for each version and mask: tensors of fixed shapes."""

    def preprocess(self, counts: Tensor, *constants: Tensor) -> tuple[Tensor, ...]:
        """Real float32 tensors (n, ...) made of counts (n, window, window), always in float32."""

    def decode(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What the layers make of these, in the precision of their weights: amplitude and phase, float32."""


OWN: tuple[type[Network], ...] = (ProbeFirst, PtychoNN)
"""The networks that are found by their names; every other class is supplied by the caller."""


def is_split(network: Network) -> TypeGuard[SplitNetwork]:
    """Whether a network defines the three methods of SplitNetwork."""
    return all(callable(getattr(network, name, None)) for name in _SPLIT)


class WholeNetwork:
    """A network with `forward` alone in the form of SplitNetwork's three methods: `decode` is all of it."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def constants(self) -> tuple[Tensor, ...]:
        """None."""
        return ()

    def preprocess(self, counts: Tensor) -> tuple[Tensor, ...]:
        """The counts (n, window, window) as they are."""
        return (counts,)

    def decode(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`."""
        return self._network(counts)


def as_split(network: Network) -> SplitNetwork | WholeNetwork:
    """The network's own three methods, or those of WholeNetwork."""
    return network if is_split(network) else WholeNetwork(network)


def build_network(kind: type[Network], hyperparameters: Mapping[str, float]) -> Network:
    """A network of a class with fresh weights. Numbers without a fraction are given as integers.

    Raises ValueError for hyperparameters that are no numbers, or that the class does not take.
    """
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in hyperparameters.values()):
        raise ValueError(f"found hyperparameters {dict(hyperparameters)} for {kind.__name__}, expected numbers")
    numbers = {key: int(value) if value == int(value) else value for key, value in hyperparameters.items()}
    try:
        return kind(**numbers)
    except TypeError as error:
        raise ValueError(
            f"found hyperparameters {dict(hyperparameters)} that {kind.__name__} cannot be built with ({error}), "
            f"expected some of {list(inspect.signature(kind).parameters)}"
        ) from error


def find_network(name: str) -> type[Network]:
    """The class of that name among our own. Raises ValueError for another: no file names code to be imported."""
    for kind in OWN:
        if kind.__name__ == name:
            return kind
    raise ValueError(
        f"found network {name!r}, expected one of {sorted(kind.__name__ for kind in OWN)}: for a network of your own "
        "supply its class, as in ModelStore.load(number, network=Mine)"
    )


def check_network(network: Network, *, window: int, modes: int) -> None:
    """Refuse a network that a run could not use: for the moment before one starts.

    window: pixels of a frame's side; modes: of the probe. Raises ValueError.
    """
    name, given = type(network).__name__, getattr(network, "hyperparameters", None)
    if not isinstance(network, torch.nn.Module) or not isinstance(getattr(network, "optics", None), Optics):
        raise ValueError(
            f"found a network {name} without `optics`, expected a torch.nn.Module with "
            "self.optics = steering.Optics(window, modes)"
        )
    if not isinstance(given, Mapping) or not {"window", "patch"} <= set(given):
        raise ValueError(
            f"found hyperparameters {given} of the network {name}, expected the arguments it was built with, `window` "
            "and `patch` among them"
        )
    wanted, found = (modes, window, window), tuple(network.optics.probe.shape[:3])
    if given["window"] != window or found != wanted:
        raise ValueError(
            f"found a network {name} for probes {found}, expected (mode, y, x) = {wanted} as the source has: build it "
            f"with window={window}, modes={modes}"
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        again = build_network(type(network), given)
        if {k: v.shape for k, v in again.state_dict().items()} != {k: v.shape for k, v in network.state_dict().items()}:
            raise ValueError(
                f"found a network {name} that its hyperparameters {dict(given)} do not build again, expected all the "
                "arguments that set its size among them"
            )
        patch = int(given["patch"])
        outputs = again.eval()(torch.ones(2, window, window))
    shapes = [(tuple(each.shape), each.dtype) for each in outputs]
    if shapes != [((2, patch, patch), torch.float32)] * 2:
        raise ValueError(
            f"found outputs {shapes} of the network {name} for 2 frames, expected amplitude and phase, each float32 "
            f"(2, {patch}, {patch})"
        )
