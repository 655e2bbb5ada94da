"""What a network makes of frames."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


@torch.inference_mode()
def patches_of(network: nn.Module, counts: NDArray, together: int = 512) -> NDArray[np.complex64]:
    """Patches (n, patch, patch) of counts (n, window, window), n > 0, on the device where the network is."""
    device = next(network.parameters()).device
    parts = (network(torch.from_numpy(part.astype(np.float32)).to(device)) for part in blocks(counts, together))
    return np.concatenate([torch.polar(*part).cpu().numpy() for part in parts])


def blocks(counts: NDArray, together: int) -> list[NDArray]:
    """The counts, at most so many together."""
    return [counts[first : first + together] for first in range(0, len(counts), together)]
