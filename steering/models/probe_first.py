"""The default network: a back-projection with the known probe, then a small CNN."""

from __future__ import annotations

import torch
from torch import Tensor, nn, relu_
from torch.nn.functional import adaptive_avg_pool2d, pixel_shuffle, pixel_unshuffle

from steering.models.optics import Optics


class ProbeFirst(nn.Module):
    """One Fourier-modulus back-projection with the known probe, then a CNN on the central patch.

    The measured amplitude is given the phase that the bare probe has in the far field, carried back to the sample
    and divided by the probe: a first guess whose errors are local and small enough for a small network. It learns in
    seconds what a network that has to learn the Fourier transform too does not learn in minutes.

    window: detector pixels; patch: predicted pixels, a multiple of 4; width: channels at full patch resolution.
    """

    def __init__(self, *, window: int = 64, patch: int = 40, width: int = 32, modes: int = 1) -> None:
        super().__init__()
        if patch % 4 or not 4 <= patch <= window or window % 2:
            raise ValueError(
                f"found patch={patch}, window={window}, expected a patch of 4, 8, 12, ..., at most an even window"
            )
        if width < 1 or modes < 1:
            raise ValueError(f"found width={width}, modes={modes}, expected 1 or more of both")
        self.hyperparameters = {"window": window, "patch": patch, "width": width, "modes": modes}
        self.optics = Optics(window, modes)
        wide = 2 * width
        self.enter = nn.Conv2d(12, width, 3, padding=1)
        self.before = _Residual(width)
        self.down = nn.Conv2d(width, wide, 3, stride=2, padding=1)
        self.whole_frame = nn.Linear(256, wide)
        self.middle = nn.Sequential(_Residual(wide), _Residual(wide))
        self.up = nn.Conv2d(wide, 4 * width, 1)
        self.after = _Residual(width)
        self.leave = nn.Conv2d(width, 8, 3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                # A quarter faster on CPUs, and what tensor cores want.
                layer.to(memory_format=torch.channels_last)

    def forward(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """counts (n, window, window), any flux -> amplitude and phase (n, patch, patch), transmission and radians."""
        return self.decode(*self.preprocess(counts, *self.constants()))

    def constants(self) -> tuple[Tensor, ...]:
        """What follows from probe and mask alone, and need not be computed for every batch.

        Returns, the zero frequency in the middle as in the frames: the bare probe's amplitude in the far field, 0 on
        bad pixels, and the real and the imaginary part of the factor of its phase (window, window); the factor of the
        back-projection and the probe's relative amplitude (patch, patch); and the root mean square of the bare
        amplitude.
        """
        modes = self.optics.modes()
        wave = torch.fft.fft2(modes, norm="ortho")
        bare = torch.fft.fftshift((wave.abs() ** 2).sum(0).sqrt()).masked_fill(self.optics.bad, 0.0)
        main = modes[0]
        # A Wiener-like division: where the probe is weak the frame has little information, and the guess goes to zero.
        # The share says where: it shapes the guess only, which the layers behind it correct.
        divide = main.conj() / (main.abs() ** 2 + 0.02 * main.abs().max() ** 2).clamp_min(1e-12)
        strength = main.abs() / main.abs().max().clamp_min(1e-12)
        lo = (len(main) - self.hyperparameters["patch"]) // 2
        keep = slice(lo, lo + self.hyperparameters["patch"])
        rms = bare.square().mean().sqrt().clamp_min(1e-12)
        phase = torch.fft.fftshift(wave[0].angle())
        # A transform of what has its zero frequency in the middle is that of the shifted one, every other sign turned.
        sign = 1 - 2 * (torch.arange(len(main), device=main.device) % 2)
        divide = divide * (sign[:, None] * sign)
        return bare, phase.cos(), phase.sin(), divide[keep, keep].contiguous(), strength[keep, keep].contiguous(), rms

    def preprocess(
        self, counts: Tensor, bare: Tensor, cos: Tensor, sin: Tensor, divide: Tensor, strength: Tensor, rms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The CNN's two inputs made of counts (n, window, window) and the `constants`.

        Returns (n, 3, patch, patch), in the plane of the sample: real and imaginary part of the back-projected contrast
        and the probe's relative amplitude; and (n, 256), in the plane of the detector: the mean amplitude in 16 x 16
        fields, relative to the bare probe's root mean square.
        """
        root = self.optics.root(counts)
        # Only a part of the probe's power falls on good pixels: an empty beam has no contrast, with a gap either.
        measured = root * (bare.square().sum() / root.square().sum((-2, -1), keepdim=True).clamp_min(1e-12)).sqrt()
        context = adaptive_avg_pool2d(measured[:, None], 16).flatten(1) / rms
        contrast = measured - bare
        back = torch.fft.ifft2(torch.complex(contrast * cos, contrast * sin), norm="ortho")
        lo = (back.shape[-1] - len(divide)) // 2
        keep = slice(lo, lo + len(divide))
        back = back[:, keep, keep] * divide
        return torch.stack([back.real, back.imag, strength.expand(len(back), -1, -1)], 1), context

    def decode(self, guess: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitude and phase, float32, by the CNN from its two inputs, computed in the precision of its weights."""
        dtype = self.enter.weight.dtype
        first = relu_(self.enter(pixel_unshuffle(guess.to(dtype), 2).contiguous(memory_format=torch.channels_last)))
        first = self.before(first)
        whole = self.whole_frame(context.to(dtype))
        deep = self.middle(relu_(self.down(first).add_(whole[:, :, None, None])))
        last = self.after(relu_(pixel_shuffle(self.up(deep), 2).add_(first)))
        out = pixel_shuffle(self.leave(last), 2).float()
        # Amplitudes up to 1.2, for a beam that varies by as much; outputs of 0 are an almost empty beam (0.98, 0 rad).
        return 1.2 * torch.sigmoid(out[:, 0] + 1.5), torch.pi * torch.tanh(out[:, 1])


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w), and the same again."""
        return relu_(self.two(relu_(self.one(x))).add_(x))
