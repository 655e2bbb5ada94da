"""How a training step is computed: what changes no result but its rounding is chosen by a measurement at the start."""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from steering.learning.training_state import keep_layout

logger = logging.getLogger(__name__)
_WARM, _TURNS = 3, 5
"""Steps of each execution before it is timed, in which kernels are made; and those that are timed, in turns."""
_SAME = 0.01
"""What the loss after the first steps may differ from that of the plain one, relatively: one that rounds otherwise
stays far below it, one that computes something else does not."""

Step = Callable[[nn.Module, torch.optim.Optimizer], Tensor]
"""Takes one training step of these two; returns its loss ()."""


@dataclass(frozen=True)
class Execution:
    """How a step is computed: by plain torch, and each of these beside."""

    layout: str = ""
    """Of the weights of convolutions: `channels_last`, the channels of a pixel side by side, or `contiguous`; empty: as
    the network was made."""
    fused: bool = False
    """All of the optimiser in one kernel; where it has such a one."""
    compiled: bool = False
    """By torch.compile."""

    def __str__(self) -> str:
        named = (self.layout, "fused" * self.fused, "compiled" * self.compiled)
        return " ".join(name for name in named if name) or "plain"

    def apply(self, network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Have the network and its optimiser compute so from now on; what they hold stays."""
        for layer in _convolutions(network) if self.layout else ():
            layer.to(memory_format=_LAYOUTS[self.layout])
        if self.fused:
            for group in optimiser.param_groups:
                group.update(fused=True, foreach=False)
            optimiser.load_state_dict(optimiser.state_dict())  # its counters of steps move to where the weights are
        keep_layout(optimiser)
        if self.compiled:
            network.compile()


PLAIN = Execution()
_LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def _convolutions(network: nn.Module) -> list[nn.Module]:
    return [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]


def possible(
    device: torch.device, network: nn.Module, optimiser: torch.optim.Optimizer, *, compiled: bool
) -> list[Execution]:
    """The executions to be tried, the plain one first.

    On a CPU it is the only one unless code is to be compiled: there results are the same to the last bit from run to
    run, and a choice that hangs on the clock would end that.
    """
    layouts, kernels = [""], [False]
    if device.type == "cuda":
        weights = [layer.weight for layer in _convolutions(network)]
        if weights:
            last = all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
            layouts.append("contiguous" if last else "channels_last")
        if all("fused" in group for group in optimiser.param_groups):
            kernels.append(True)
    codes = (False, True) if compiled else (False,)
    return [Execution(*execution) for execution in itertools.product(layouts, kernels, codes)]


@dataclass
class _Trial:
    """An execution with a network and an optimiser of its own."""

    network: nn.Module
    optimiser: torch.optim.Optimizer
    loss: float = float("nan")
    seconds: list[float] = field(default_factory=list)


def fastest(
    executions: Sequence[Execution],
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: Step,
    clock: Callable[[], float] = time.perf_counter,
) -> Execution:
    """The fastest of these executions, by steps of copies: the network and its optimiser are left alone.

    One that fails, as a compiler may, or that comes to another loss than the plain one is not taken. Reading a loss
    waits for the GPU: times are whole.
    """
    trials: dict[Execution, _Trial] = {}
    for execution in executions:
        trial = _Trial(*copy.deepcopy((network, optimiser)))
        try:
            execution.apply(trial.network, trial.optimiser)
            for _ in range(_WARM):
                trial.loss = float(step(trial.network, trial.optimiser))
        except Exception as error:  # a compiler or a driver that fails costs speed, not the run
            if execution == PLAIN:
                raise
            first = (str(error).splitlines() or [""])[0]
            logger.info("training is not %s: %s: %s", execution, type(error).__name__, first)
            continue
        expected = trials[PLAIN].loss if trials else trial.loss
        if execution == PLAIN or abs(trial.loss - expected) <= _SAME * abs(expected):  # also where all are NaN
            trials[execution] = trial
        else:
            logger.info("training is not %s: found a loss of %.6g, expected %.6g", execution, trial.loss, expected)
    for _ in range(_TURNS):
        for trial in trials.values():
            begun = clock()
            float(step(trial.network, trial.optimiser))
            trial.seconds.append(clock() - begun)
    times = {execution: median(trial.seconds) for execution, trial in trials.items()}
    best = min(times, key=lambda execution: times[execution])
    times_of = ", ".join(f"{execution} {1e3 * seconds:.2f} ms" for execution, seconds in times.items())
    logger.info("training is %s; median step: %s", best, times_of)
    return best
