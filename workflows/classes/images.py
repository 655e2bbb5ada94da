"""What a training needs of images of classes, and images in memory."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from steering.learning.epochs import Epochs

Load = Callable[[int, dict[str, Tensor]], None]
MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)


class Images(Protocol):
    """Images to train on and to test, with the number of their class, classes in alphabetical order."""

    names: tuple[str, ...]
    label: Tensor
    """int64 (n,), of each image to train on."""
    test_label: Tensor
    shape: tuple[int, int, int]
    """Of an image: channels, y, x."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of each channel, of values from 0 to 1."""
    shift: int
    """Pixels by which the objective moves an image while a network trains, see Classification."""
    unreadable: list[str]
    """Files that could not be decoded by this process, and were left out."""

    def loading(self, pool: Tensor, epochs: Epochs, batch: int, seed: int) -> AbstractContextManager[Load]:
        """What writes the next minibatch of images, uint8, and labels of the pool, in the order of the epochs."""

    def testing(self, chosen: Tensor, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 (up to n, channels, y, x) and labels of the chosen ones to test."""

    def some(self, count: int) -> Images:
        """With the first `count` images of each class to train on."""


@dataclass
class InMemory:
    """Images uint8 (n, 3, y, x) and labels int64 (n,), to train on and to test. See Images."""

    names: tuple[str, ...]
    image: Tensor
    label: Tensor
    test_image: Tensor
    test_label: Tensor
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    shift: int = 4

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, y, x)."""
        return tuple(self.image.shape[1:])

    @property
    def unreadable(self) -> list[str]:
        """None: what is in memory was decoded."""
        return []

    @contextmanager
    def loading(self, pool: Tensor, epochs: Epochs, batch: int, seed: int) -> Iterator[Load]:
        """See Images."""

        def load(n: int, out: dict[str, Tensor]) -> None:
            chosen = pool[torch.from_numpy(epochs.take(n))]
            torch.index_select(self.image, 0, chosen, out=out["image"][:n])
            torch.index_select(self.label, 0, chosen, out=out["label"][:n])
            out["stratum"][:n] = out["label"][:n]

        yield load

    def testing(self, chosen: Tensor, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See Images."""
        for part in chosen.split(n):
            yield self.test_image[part], self.test_label[part]

    def some(self, count: int) -> InMemory:
        """With the first `count` images of each class to train on."""
        kept = first_of_each(self.label, len(self.names), count)
        return replace(self, image=self.image[kept], label=self.label[kept])


def first_of_each(label: Tensor, classes: int, count: int) -> Tensor:
    """The places of the first `count` labels of each class, int64."""
    return torch.cat([torch.nonzero(label == kind).ravel()[:count] for kind in range(classes)])


def read_cifar(path: Path) -> InMemory:
    """The images of a zip file with train/<class>/*.png and test/<class>/*.png."""
    found: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "test": []}
    with zipfile.ZipFile(path) as file:
        for name in sorted(file.namelist()):
            if name.endswith(".png"):
                part, kind, _ = name.split("/")
                with Image.open(io.BytesIO(file.read(name))) as image:
                    found[part].append((kind, np.asarray(image.convert("RGB")).transpose(2, 0, 1)))
    kinds = sorted({kind for kind, _ in found["train"]})
    tensors = []
    for part in found.values():
        tensors.append(torch.from_numpy(np.stack([image for _, image in part])))
        tensors.append(torch.tensor([kinds.index(kind) for kind, _ in part]))
    return InMemory(tuple(kinds), *tensors)
