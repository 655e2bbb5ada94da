"""Ahead-of-time compiled for this machine: it takes a minute and a C++ compiler, once for all versions."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import Tensor

from steering.inference.backends.contract import Decoder
from steering.models import Network


def available(device: torch.device) -> bool:
    """Whether there is a compiler for this device."""
    return device.type == "cuda" or any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def compile_to(exported: Any, file: str) -> None:
    """Compile an exported program (torch.export) into a file (.pt2). Raises whatever the compiler raises."""
    from torch._inductor import aoti_compile_and_package  # noqa: PLC0415 - a second that few need to pay

    # Else vectors of 8 numbers or fewer, such as the last bias, become part of the code.
    keep = {"always_keep_tensor_constants": True}
    aoti_compile_and_package(exported, package_path=file, inductor_configs=keep)


class Compiled:
    """Runs a file of `compile_to` with the weights of a network, which it reads where they lie."""

    def __init__(self, file: str, network: Network) -> None:
        """Raises RuntimeError for a file that holds weights of its own."""
        from torch._inductor import aoti_load_package  # noqa: PLC0415

        self._runner: Any = aoti_load_package(file)
        names = set(self._runner.get_constant_fqns())
        own = {name: weight for name, weight in Decoder(network).state_dict().items() if name in names}
        fixed = {f"network.{name}" for name, _ in network.named_parameters()} - names
        if fixed:
            raise RuntimeError(
                f"found weights that the compiler has made part of its code: {sorted(fixed)}, expected none"
            )
        # Weights that are copied into this memory later need no further step.
        self._runner.load_constants(own, check_full_update=True, user_managed=True)

    def __call__(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitude and phase of the network's views."""
        amplitude, phase = self._runner(views)
        return amplitude, phase

    def renew(self) -> None:
        """Nothing: the network's own memory is read."""
