"""ResNet-18 and ResNet-50, the usual references of continual learning on images.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385). In the bottleneck
blocks of ResNet-50 the stride is in the convolution of 3 x 3, as in Goyal et al., arXiv 1706.02677.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import relu

Stem = Literal["cifar", "imagenet"]


class ResNet(nn.Module):
    """Images in, logits out: four stages of blocks, each of half the size and twice the channels of the one before.

    Args:
        block: kind of the blocks, `Basic` or `Bottleneck`.
        depths: blocks in each stage.
        classes: outputs; classes that appear later in a stream need theirs from the start.
        width: channels of the first stage; 64 as published.
        stem: what comes before the stages. `imagenet`: a convolution of 7 x 7 and a maximum, which together leave a
            quarter of the size, and weights that begin as published; `cifar`, as usual for 32 x 32: a convolution of
            3 x 3 that keeps the size, and weights that begin as torch's own do.
    """

    def __init__(
        self, block: type[Basic | Bottleneck], depths: Sequence[int], classes: int, *, width: int = 64, stem: Stem
    ) -> None:
        super().__init__()
        if classes < 1 or width < 1:
            raise ValueError(f"found classes={classes} and width={width}, expected 1 or more of each")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"found stem {stem!r}, expected cifar or imagenet")
        self.enter = _convolution(3, width) if stem == "cifar" else _convolution(3, width, stride=2, size=7)
        self.shrink = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, padding=1)
        blocks: list[nn.Module] = []
        channels = width
        for stage, depth in enumerate(depths):
            for number in range(depth):
                blocks.append(block(channels, width * 2**stage, stride=2 if stage and not number else 1))
                channels = width * 2**stage * block.expansion
        self.stages = nn.Sequential(*blocks)
        self.leave = nn.Linear(channels, classes)
        if stem == "imagenet":
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        """(n, 3, y, x) float of any size -> (n, classes) logits: the last stage is averaged over."""
        return self.leave(self.stages(self.shrink(relu(self.enter(image)))).mean((2, 3)))


class ResNet18(ResNet):
    """Two basic blocks in each stage: 11.7 million parameters for 1000 classes. See ResNet for the arguments."""

    def __init__(self, classes: int, *, width: int = 64, stem: Stem = "cifar") -> None:
        super().__init__(Basic, (2, 2, 2, 2), classes, width=width, stem=stem)


class ResNet50(ResNet):
    """3, 4, 6 and 3 bottleneck blocks: 25.6 million parameters for 1000 classes. See ResNet for the arguments."""

    def __init__(self, classes: int, *, width: int = 64, stem: Stem = "imagenet") -> None:
        super().__init__(Bottleneck, (3, 4, 6, 3), classes, width=width, stem=stem)


class Basic(nn.Module):
    """Two convolutions of 3 x 3, and the input added."""

    expansion = 1

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _convolution(channels, out, stride)
        self.second = _convolution(out, out)
        self.shortcut = _Shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> (n, out, h / stride, w / stride)."""
        return relu(self.second(relu(self.first(x))) + self.shortcut(x))


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1, the middle one with a quarter of the channels, and the input added."""

    expansion = 4

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _convolution(channels, out, size=1)
        self.second = _convolution(out, out, stride)
        self.third = _convolution(out, 4 * out, size=1)
        self.shortcut = _Shortcut(channels, 4 * out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> (n, 4 * out, h / stride, w / stride)."""
        return relu(self.third(relu(self.second(relu(self.first(x))))) + self.shortcut(x))


class _Shortcut(nn.Sequential):
    """The input in the shape of a block's output."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        same = stride == 1 and channels == out
        super().__init__(*([] if same else _convolution(channels, out, size=1)))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # Every second pixel, then a convolution of 1 x 1: the same as one with a stride, whose gradient in oneDNN
        # overwrites foreign memory on CPUs without AVX-512 where there are fewer than 8 channels.
        return super().forward(x[:, :, :: self.stride, :: self.stride])


def _convolution(channels: int, out: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out))
