"""The instrument as a network has it: probe and detector mask, and the amplitude of counts."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class Optics(nn.Module):
    """The probe and the detector mask, as buffers of a network: they are published and swapped with its weights.

    Until `set` is called the probe is zero.
    """

    probe: Tensor
    bad: Tensor

    def __init__(self, window: int, modes: int) -> None:
        super().__init__()
        self.register_buffer("probe", torch.zeros(modes, window, window, 2))
        self.register_buffer("bad", torch.zeros(window, window, dtype=torch.bool))

    def set(self, probe: NDArray[np.complex64], mask: NDArray[np.bool_] | None = None) -> None:
        """Set the probe (mode, y, x) and the mask (y, x), True = do not use; None keeps the mask as it is.

        Raises ValueError for other shapes, a mask that is not bool, and a probe that is not finite or all zero.
        """
        if probe.shape != tuple(self.probe.shape[:3]):
            raise ValueError(f"found a probe of shape {probe.shape}, expected {tuple(self.probe.shape[:3])}")
        if not np.isfinite(probe).all() or not np.any(probe):
            raise ValueError(
                "found a probe that is all zero or not finite, expected the wave that illuminates the sample"
            )
        if mask is not None and (mask.shape != tuple(self.bad.shape) or mask.dtype != np.bool_):
            raise ValueError(f"found a mask of {mask.dtype} {mask.shape}, expected bool {tuple(self.bad.shape)}")
        self.probe.copy_(torch.view_as_real(torch.from_numpy(np.ascontiguousarray(probe, np.complex64))))
        if mask is not None:
            self.bad.copy_(torch.from_numpy(np.ascontiguousarray(mask)))

    def modes(self) -> Tensor:
        """(mode, y, x) complex64."""
        return torch.view_as_complex(self.probe)

    def amplitude(self, counts: Tensor) -> Tensor:
        """Square root of the counts (n, y, x), 0 on bad pixels, scaled so that the good ones have the probe's power.

        The scale makes a network independent of the flux.
        """
        root = self.root(counts)
        power = (self.probe**2).sum()
        return root * (power / (root**2).sum((-2, -1), keepdim=True).clamp_min(1e-12)).sqrt()

    def root(self, counts: Tensor) -> Tensor:
        """Square root of the counts (n, y, x), 0 on bad pixels."""
        # What a bad pixel reads, NaN too, becomes a finite number, and 0 times that is 0: masked_fill is slow on a CPU.
        finite = torch.nan_to_num(counts.to(self.probe.dtype), nan=0.0)
        return finite.clamp_min_(0).sqrt_().mul_((~self.bad).to(self.probe.dtype))
