"""Plain torch: `eager`, the network as it is trained; `channels_last`, which keeps a pixel's channels side by side."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Eager:
    """Runs the network itself."""

    def __init__(self, decode: Callable[..., tuple[Tensor, Tensor]]) -> None:
        """decode: the network's own."""
        self._decode = decode

    def __call__(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitude and phase of the network's views."""
        return self._decode(*views)

    def renew(self) -> None:
        """Nothing: the network's own memory is read."""
