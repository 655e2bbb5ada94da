"""ResNet-18 for images of 32 x 32 pixels: the usual reference of continual learning on CIFAR.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385): its basic blocks, two
in each of four stages; as is usual for 32 x 32, the first convolution keeps the size and no pooling follows it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu


class ResNet18(nn.Module):
    """Images in, logits out.

    Args:
        classes: outputs; classes that appear later in a stream need theirs from the start.
        width: channels of the first stage; 64 as published, 11 million parameters, which grow with its square.
    """

    def __init__(self, classes: int, *, width: int = 64) -> None:
        super().__init__()
        if classes < 1 or width < 1:
            raise ValueError(f"found classes={classes} and width={width}, expected 1 or more of each")
        self.enter = _convolution(3, width)
        self.stages = nn.Sequential(
            _Block(width, width),
            _Block(width, width),
            _Block(width, 2 * width, stride=2),
            _Block(2 * width, 2 * width),
            _Block(2 * width, 4 * width, stride=2),
            _Block(4 * width, 4 * width),
            _Block(4 * width, 8 * width, stride=2),
            _Block(8 * width, 8 * width),
        )
        self.leave = nn.Linear(8 * width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """(n, 3, 32, 32) float -> (n, classes) logits. Larger images work too: the last stage is averaged over."""
        return self.leave(self.stages(relu(self.enter(image))).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _convolution(channels, out, stride)
        self.second = _convolution(out, out)
        self.stride = stride
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else _convolution(channels, out, size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> (n, out, h / stride, w / stride)."""
        # Every second pixel, then a convolution of 1 x 1: the same as one with a stride, whose gradient in oneDNN
        # overwrites foreign memory on CPUs without AVX-512 where there are fewer than 8 channels.
        passed = self.shortcut(x[:, :, :: self.stride, :: self.stride])
        return relu(self.second(relu(self.first(x))) + passed)


def _convolution(channels: int, out: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out))
