"""A folder of images, train/CLASS/* and val/CLASS/*: read by every rank, decoded beside training."""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from classes.decoding import BROKEN, decode
from classes.images import Load, first_of_each
from steering.learning.epochs import Epochs

logger = logging.getLogger(__name__)
KINDS = (".jpeg", ".jpg", ".png")
AHEAD = 3  # minibatches that are decoded while one is trained on
LEAST, SHARE = 10, 0.01  # unreadable files at which a training is given up: so many, and that share of those read


@dataclass
class Folder:
    """Images in files. See Images.

    Each image to train on is a new random part of its file, mirrored at random; what the rehearsal buffer keeps is that
    part. One that cannot be decoded is replaced by the next image of its class, and named in `unreadable`.
    """

    root: Path
    names: tuple[str, ...]
    train: list[str]
    label: Tensor
    test: list[str]
    test_label: Tensor
    size: int
    decoders: int
    """Threads of each rank that decode."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    shift: int = 0
    unreadable: list[str] = field(default_factory=list)
    _read: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, size, size)."""
        return 3, self.size, self.size

    @contextmanager
    def loading(self, pool: Tensor, epochs: Epochs, batch: int, seed: int) -> Iterator[Load]:
        """See Images. Raises RuntimeError where more than 1 % of the files, and ten or more, cannot be decoded."""
        slots = deque(torch.empty((batch, *self.shape), dtype=torch.uint8) for _ in range(AHEAD + 1))
        coming: deque[tuple[Tensor, Tensor, list[Future[int]]]] = deque()
        begun = 0

        def begin(threads: ThreadPoolExecutor) -> None:
            nonlocal begun
            chosen, slot = pool[torch.from_numpy(epochs.take(batch))], slots.popleft()
            done = []
            for row, number in enumerate(chosen.tolist()):
                rng = np.random.default_rng([seed, epochs.seed, epochs.rank, begun + row])
                done.append(threads.submit(self._decode, number, slot[row].numpy(), rng))
            begun += batch
            coming.append((slot, self.label[chosen], done))

        threads = ThreadPoolExecutor(self.decoders, thread_name_prefix="decode")
        try:
            for _ in range(AHEAD):
                begin(threads)

            def load(n: int, out: dict[str, Tensor]) -> None:
                slot, label, done = coming.popleft()
                begin(threads)
                for one in done:
                    one.result()
                out["image"][:n].copy_(slot)
                out["label"][:n].copy_(label)
                out["stratum"][:n].copy_(label)
                slots.append(slot)

            yield load
        finally:
            threads.shutdown(cancel_futures=True)

    def testing(self, chosen: Tensor, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See Images. What cannot be decoded is left out."""
        with ThreadPoolExecutor(self.decoders, thread_name_prefix="decode") as threads:
            coming: deque[tuple[list[int], list[Future]]] = deque()
            for part in chosen.split(n):
                numbers = part.tolist()
                coming.append((numbers, [threads.submit(self._middle_of, number) for number in numbers]))
                if len(coming) == AHEAD:
                    yield from self._tested(*coming.popleft())
            while coming:
                yield from self._tested(*coming.popleft())

    def some(self, count: int) -> Folder:
        """With the first `count` images of each class to train on."""
        kept = first_of_each(self.label, len(self.names), count)
        return replace(self, train=[self.train[number] for number in kept.tolist()], label=self.label[kept])

    def _tested(self, numbers: list[int], done: list[Future]) -> Iterator[tuple[Tensor, Tensor]]:
        found = [(number, one.result()) for number, one in zip(numbers, done, strict=True)]
        whole = [(number, pixels) for number, pixels in found if pixels is not None]
        if whole:
            yield torch.stack([pixels for _, pixels in whole]), self.test_label[[number for number, _ in whole]]

    def _decode(self, number: int, out: np.ndarray, rng: np.random.Generator) -> None:
        """Into out (3, y, x). The next image of the class takes the place of one that cannot be decoded."""
        kind = self.label[number]
        for other in range(number, number + len(self.train)):
            place = other % len(self.train)
            if self.label[place] != kind:
                continue
            pixels = self._read_file("train", self.train[place], rng)
            if pixels is not None:
                out[:] = pixels
                return
        raise RuntimeError(f"{self.root / 'train' / self.names[int(kind)]}: found no image that can be decoded there")

    def _middle_of(self, number: int) -> Tensor | None:
        pixels = self._read_file("val", self.test[number], None)
        return None if pixels is None else torch.from_numpy(pixels.copy())

    def _read_file(self, part: str, name: str, rng: np.random.Generator | None) -> np.ndarray | None:
        path = self.root / part / name
        self._read += 1
        try:
            return decode(path, self.size, rng)
        except (FileNotFoundError, PermissionError) as error:
            raise RuntimeError(
                f"{path}: {error.strerror} on {socket.gethostname()}, expected a folder that every rank can read"
            ) from error
        except BROKEN as error:
            if f"{part}/{name}" not in self.unreadable:
                self.unreadable.append(f"{part}/{name}")
                logger.warning("%s: found a file that cannot be decoded (%s), it is left out", path, error)
            if len(self.unreadable) >= LEAST and len(self.unreadable) > SHARE * self._read:
                raise RuntimeError(
                    f"{self.root}: found {len(self.unreadable)} files that cannot be decoded among {self._read} read, "
                    f"as {path}, expected whole JPEG or PNG files: copy them again"
                ) from error
            return None


def find_images(root: Path, *, size: int, decoders: int) -> Folder:
    """The images below train/CLASS and val/CLASS of a folder, by the endings .jpeg, .jpg and .png; none is opened.

    Raises FileNotFoundError where train or val is not there, ValueError for a class without images, or one that is in
    one of the two only.
    """
    root = Path(root).absolute()
    kinds = {part: _classes(root, part) for part in ("train", "val")}
    for one, other in (("val", "train"), ("train", "val")):
        alone = sorted(kinds[one].keys() - kinds[other].keys())
        if alone:
            raise ValueError(
                f"{root}: found the class {alone[0]}{f' and {len(alone) - 1} more' * (len(alone) > 1)} in {one} and "
                f"not in {other}, expected the same classes in both"
            )
    classes = tuple(sorted(kinds["train"]))
    files, labels = [], []
    for found in kinds.values():
        files.append([f"{kind}/{name}" for kind in classes for name in found[kind]])
        counts = torch.tensor([len(found[kind]) for kind in classes])
        labels.append(torch.repeat_interleave(torch.arange(len(classes)), counts))
    return Folder(root, classes, files[0], labels[0], files[1], labels[1], size=size, decoders=decoders)


def _classes(root: Path, part: str) -> dict[str, list[str]]:
    """The names of the images of each class, in alphabetical order."""
    folder = root / part
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: found no such folder, expected train/CLASS and val/CLASS below {root}")
    kinds = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not kinds:
        raise ValueError(f"{folder}: found no class, expected a folder for each")
    found = {}
    for kind in kinds:
        names = [entry.name for entry in os.scandir(folder / kind) if not entry.name.startswith(".")]
        found[kind] = sorted(name for name in names if name.lower().endswith(KINDS))
        if not found[kind]:
            other = f"{len(names)} files of other kinds" if names else "no file"
            raise ValueError(f"{folder / kind}: found {other}, expected images ({', '.join(KINDS)}): fill or remove it")
    return found
