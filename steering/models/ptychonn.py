"""The published network: the reference for the default one."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from steering.models.optics import Optics


class PtychoNN(nn.Module):
    """An encoder and two decoders, diffraction in, amplitude and phase out.

    Source: Cherukara et al., "AI-enabled high-resolution scanning coherent diffraction imaging", Appl. Phys. Lett.
    117, 044103 (2020). The published layout has width=32 and depth=3.

    window: detector pixels, a multiple of 2**depth; patch: the central pixels that are kept of the output.
    """

    def __init__(self, *, window: int = 64, patch: int = 40, width: int = 32, depth: int = 3, modes: int = 1) -> None:
        super().__init__()
        if min(width, depth, modes) < 1:
            raise ValueError(f"found width={width}, depth={depth}, modes={modes}, expected 1 or more of each")
        if window % 2**depth or not 2 <= patch <= window or patch % 2:
            raise ValueError(
                f"found window={window}, patch={patch}, expected an even patch and a window divisible by {2**depth}"
            )
        self.hyperparameters = {"window": window, "patch": patch, "width": width, "depth": depth, "modes": modes}
        self.optics = Optics(window, modes)
        widths = [width * 2**i for i in range(depth)]
        self.encoder = nn.Sequential(*[_down(i, o) for i, o in zip([1, *widths], widths, strict=False)])
        self.amplitude = self._decoder(widths)
        self.phase = self._decoder(widths)

    @staticmethod
    def _decoder(widths: list[int]) -> nn.Sequential:
        deep = [widths[-1], *reversed(widths)]
        blocks = [_up(i, o) for i, o in pairwise(deep)]
        return nn.Sequential(*blocks, nn.Conv2d(widths[0], 1, 3, padding=1))

    def forward(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """counts (n, window, window), any flux -> amplitude and phase (n, patch, patch), transmission and radians."""
        return self.decode(*self.preprocess(counts))

    def constants(self) -> tuple[Tensor, ...]:
        """None: this network does not use the probe."""
        return ()

    def preprocess(self, counts: Tensor) -> tuple[Tensor]:
        """The measured amplitude (n, 1, window, window), its mean square brought to 1."""
        measured = self.optics.amplitude(counts)
        return ((measured / measured.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-12))[:, None],)

    def decode(self, measured: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitude and phase, float32, computed in the precision of the weights."""
        code = self.encoder(measured.to(self.encoder[0][0].weight.dtype))
        lo = (measured.shape[-1] - self.hyperparameters["patch"]) // 2
        keep = slice(lo, lo + self.hyperparameters["patch"])
        amplitude = torch.sigmoid(self.amplitude(code)[:, 0, keep, keep].float())
        phase = torch.pi * torch.tanh(self.phase(code)[:, 0, keep, keep].float())
        return amplitude, phase


def _down(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def _up(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    )
