"""Averaged gradient episodic memory: a step may not raise the error of the representatives.

Source: Chaudhry et al., "Efficient Lifelong Learning with A-GEM", ICLR 2019 (arXiv 1812.00420), equation 11.
"""

from __future__ import annotations

import torch
from torch import nn

from steering.learning.minibatch import Minibatch
from steering.learning.strategies.contract import Loss, Strategy


class AGEM(Strategy):
    """The gradient of the new samples, less its part against the gradient of the representatives.

    Both gradients are means over all ranks before they are compared, so every rank takes the same step.
    """

    rehearses = True

    def gradient(self, network: nn.Module, minibatch: Minibatch) -> Loss:
        """Two passes, two collectives; the loss is that of the new samples."""
        new = Minibatch(dict(minibatch.batch), new=minibatch.new)
        old = Minibatch(dict(minibatch.representatives), new=0)
        if len(next(iter(old.fields.values()))) == 0:  # on every rank at once: draws are planned for all
            return super().gradient(network, new)
        super().gradient(network, old)
        parameters = [p for p in network.parameters() if p.grad is not None]
        reference = [p.grad.clone() for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None
        loss = super().gradient(network, new)
        _project([p.grad for p in parameters if p.grad is not None], reference)
        return loss


@torch.no_grad()
def _project(gradient: list[torch.Tensor], reference: list[torch.Tensor]) -> None:
    """Take from the gradient, in place, its component against the reference."""
    along = torch.stack([(g * r).sum() for g, r in zip(gradient, reference, strict=True)]).sum()
    size = torch.stack([(r * r).sum() for r in reference]).sum()
    # On a GPU a choice by `if` would make the host wait for the whole step.
    part = torch.where((along < 0) & (size > 0), along / size, torch.zeros_like(along))
    for g, r in zip(gradient, reference, strict=True):
        g.sub_(r * part)
