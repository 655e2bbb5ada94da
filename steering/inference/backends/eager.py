"""Plain torch: `eager`, the network as it is trained; `channels_last`, which keeps a pixel's channels side by side."""

from __future__ import annotations

from torch import Tensor

from steering.models import Network


class Eager:
    """Runs the network itself."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __call__(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitude and phase of the network's views."""
        return self._network.decode(*views)

    def renew(self) -> None:
        """Nothing: the network's own memory is read."""
