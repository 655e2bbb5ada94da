"""The object on its canvas as rPIE uses it: windows out of it, changes into it; on the host, or on a GPU."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Windows(Protocol):
    """An object (Y, X) complex64 and the change that a batch of frames asks for."""

    def take(self, corner: NDArray[np.int64], window: int) -> Tensor:
        """Windows (b, window, window) complex64 with their first pixels at corner (b, 2)."""

    def begin(self) -> None:
        """Forget the change and its weight."""

    def add(self, corner: NDArray[np.int64], part: Tensor, tile: Tensor) -> None:
        """Add part (b, N, N) to the change, and tile (N, N) to its weight, at corner (b, 2)."""

    def apply(self, alpha: float, brightest: Tensor) -> None:
        """Add the change over (1 - alpha) weight + alpha max(weight, brightest) to the object."""

    def object(self) -> NDArray[np.complex64]:
        """(Y, X), on the host."""


class HostWindows:
    """In numpy's memory. A slice for each frame is faster on a CPU than index_add_ on flat views, and the sum has a
    fixed order.
    """

    def __init__(self, thing: NDArray[np.complex64]) -> None:
        """thing: (Y, X), changed in place."""
        self._object = thing
        self._change = np.zeros_like(thing)
        self._weight = np.zeros(thing.shape, np.float32)

    def take(self, corner: NDArray[np.int64], window: int) -> Tensor:
        """As in Windows."""
        windows = np.lib.stride_tricks.sliding_window_view(self._object, (window, window))
        return torch.from_numpy(windows[corner[:, 0], corner[:, 1]])

    def begin(self) -> None:
        """As in Windows."""
        self._change.fill(0)
        self._weight.fill(0)

    def add(self, corner: NDArray[np.int64], part: Tensor, tile: Tensor) -> None:
        """As in Windows."""
        window, light = len(tile), tile.numpy()
        for (y, x), change in zip(corner.tolist(), part.numpy(), strict=True):
            here = (slice(y, y + window), slice(x, x + window))
            self._change[here] += change
            self._weight[here] += light

    def apply(self, alpha: float, brightest: Tensor) -> None:
        """As in Windows."""
        weight = torch.from_numpy(self._weight)
        weight = weight.clamp_min(brightest).mul_(alpha).add_(weight, alpha=1 - alpha)
        torch.from_numpy(self._object).add_(torch.from_numpy(self._change).mul_(weight.reciprocal_()))

    def object(self) -> NDArray[np.complex64]:
        """As in Windows."""
        return self._object


class DeviceWindows:
    """In a device's memory, by flat indices: all frames of a batch at once. The order of sums is the device's own."""

    def __init__(self, thing: NDArray[np.complex64], device: torch.device) -> None:
        """thing: (Y, X), copied."""
        self._object = torch.from_numpy(thing).to(device, copy=True)
        self._change = torch.zeros_like(self._object)
        self._weight = torch.zeros(thing.shape, device=device)

    def take(self, corner: NDArray[np.int64], window: int) -> Tensor:
        """As in Windows."""
        return self._object.view(-1)[self._pixels(corner, window)]

    def begin(self) -> None:
        """As in Windows."""
        self._change.zero_()
        self._weight.zero_()

    def add(self, corner: NDArray[np.int64], part: Tensor, tile: Tensor) -> None:
        """As in Windows."""
        pixels = self._pixels(corner, len(tile)).view(-1)
        # As pairs of real numbers: atomic additions of complex ones are slow, where a device has them at all.
        torch.view_as_real(self._change).view(-1, 2).index_add_(0, pixels, torch.view_as_real(part).reshape(-1, 2))
        self._weight.view(-1).index_add_(0, pixels, tile.expand(len(part), -1, -1).reshape(-1))

    def apply(self, alpha: float, brightest: Tensor) -> None:
        """As in Windows."""
        weight = self._weight.clamp_min(brightest).mul_(alpha).add_(self._weight, alpha=1 - alpha)
        self._object.add_(self._change.mul_(weight.reciprocal_()))

    def object(self) -> NDArray[np.complex64]:
        """As in Windows."""
        return self._object.cpu().numpy()

    def _pixels(self, corner: NDArray[np.int64], window: int) -> Tensor:
        """Flat indices (b, window, window) of the windows' pixels."""
        device = self._object.device
        along = torch.arange(window, device=device)
        y, x = torch.tensor(corner.T).to(device)
        return (y[:, None, None] + along[:, None]) * self._object.shape[1] + x[:, None, None] + along
