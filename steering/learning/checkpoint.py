"""The ranks' part of a checkpoint: what is in it, how it is written while training goes on, and how it is read.

All ranks make their cuts after the same step. A cut copies the weights and marks the buffer; a thread then writes the
files and waits for the disk. What is drawn for a step follows from the seed and the step's number, so the number is the
plan's position. A rank writes its whole buffer once, then only the samples stored since, until these weigh more than
the whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steering.learning.buffer_cut import Cut
from steering.learning.buffer_file import write_cut
from steering.learning.loop import Loop
from steering.learning.rows import Layout
from steering.learning.samples import Samples
from steering.learning.samples_file import SamplesCut
from steering.learning.tensor_file import TensorFile, TensorWriter
from steering.learning.training_state import Packed, capture

FOLDER = "ranks"
"""Below the folder of all checkpoints."""
KIND = "training"
_NAME = re.compile(rf"{FOLDER}/[0-9]{{8}}\.(weights|rank-[0-9]{{1,6}}\.(buffer|samples))\.safetensors")
_MOST_RANKS, _LONGEST_CHAIN = 100_000, 20
_MOST_WEIGHTS = 16 * 2**30
"""Bytes of a file of weights and optimiser that is copied."""


@dataclass(frozen=True, kw_only=True)
class RanksPart:
    """A checkpoint's part of the ranks: what belongs together. Names of files are relative to the folder of all
    checkpoints."""

    number: int
    """Of the checkpoint."""
    step: int
    """All ranks had taken when they made their cuts."""
    ranks: int
    weights: str
    buffers: tuple[tuple[str, ...], ...]
    """Of each rank: its whole buffer, then the changes after it, in order."""
    samples: tuple[str, ...]
    """Of each rank; empty where there are none, as of a loop without a campaign."""
    bytes: int
    """Written for this checkpoint."""
    began: int = 0
    """Ranks that the training began with, see TrainerSettings.on; 0: as many as wrote this."""

    @property
    def files(self) -> set[str]:
        """All of them."""
        return {self.weights, *self.samples, *(name for chain in self.buffers for name in chain)}

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> RanksPart:
        """What `to_json` returned, from outside. Raises ValueError for anything else."""
        try:
            counts = {name: _count(found[name]) for name in ("number", "step", "ranks", "bytes")}
            buffers = tuple(tuple(map(_file_name, chain)) for chain in found["buffers"])
            part = cls(
                **counts,
                began=_count(found.get("began", 0)),
                weights=_file_name(found["weights"]),
                buffers=buffers,
                samples=tuple(map(_file_name, found["samples"])),
            )
            fits = len(buffers) == part.ranks > 0 and len(part.samples) in (0, part.ranks) and all(buffers)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"found a ranks' part without what it needs ({type(error).__name__}: {error}), expected one that "
                "steering wrote"
            ) from None
        if not fits or part.ranks > _MOST_RANKS:
            raise ValueError(f"found a part of {part.ranks} ranks with {len(buffers)} buffers, expected one for each")
        return part


@dataclass(frozen=True, kw_only=True)
class RankFiles:
    """What one rank has written."""

    step: int
    buffer: tuple[str, ...]
    samples: str | None
    weights: str | None
    """Of rank 0 alone: they are the same on all."""
    bytes: int


def joined(number: int, files: Sequence[RankFiles]) -> RanksPart:
    """The part, from what each rank has written. Raises RuntimeError where they were not at one step."""
    steps = sorted({one.step for one in files})
    weights = next((one.weights for one in files if one.weights is not None), None)
    if len(steps) != 1 or weights is None:
        raise RuntimeError(
            f"found ranks at the steps {steps} in one checkpoint, expected one step, and weights with it"
        )
    return RanksPart(
        number=number,
        step=steps[0],
        ranks=len(files),
        weights=weights,
        buffers=tuple(one.buffer for one in files),
        samples=tuple(one.samples for one in files if one.samples is not None),
        bytes=sum(one.bytes for one in files),
    )


@dataclass
class Recorder:
    """Writes the checkpoints of one rank's process, one after the other.

    loop: its weights, optimiser, step and buffer. samples, others: what a rank of a campaign has beside it; others are
    networks and states by name, taken from rank 0.
    """

    loop: Loop
    samples: Samples | None = None
    others: Mapping[str, nn.Module | Mapping[str, torch.Tensor]] = field(default_factory=dict)
    _chain: list[tuple[str, int]] = field(default_factory=list)
    """Files of this rank's buffer, with their bytes: a whole state, then changes."""
    _folder: Path | None = None
    _layout: Layout | None = None
    _clock: int = 0
    _number: int = -1
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    written: Future[RankFiles] = field(default_factory=Future)
    """Of the newest checkpoint: done when its files are on the disk."""

    def __post_init__(self) -> None:
        self._thread.submit(int)  # it is there before the first cut: starting one can take milliseconds
        self.written.set_exception(RuntimeError("found no checkpoint that was begun, expected `cut` before"))

    def cut(self, folder: Path, number: int) -> int:
        """Begin checkpoint `number` in a folder that all ranks share: the state is as of now; returns the step.

        Numbers rise. The thread that trains calls it, and goes on: `written` says when all is on the disk.

        Raises RuntimeError while the one before is being written, ValueError for a number that was used.
        """
        if not self.written.done():
            raise RuntimeError(f"found checkpoint {self._number} still being written, expected it done before the next")
        if number <= self._number:
            raise ValueError(f"found checkpoint {number} after {self._number}, expected numbers that rise")
        buffer, self._number = self.loop.buffer, number
        same = folder == self._folder and buffer.layout == self._layout
        whole = not same or not self._chain or self._grown(folder)
        cut = buffer.cut(0 if whole else self._clock)
        try:
            weights = self._weights() if self.loop.rank == 0 else None
            samples = None if self.samples is None else SamplesCut.of(self.samples)
        except BaseException:
            cut.close()
            raise
        job = _Job(folder, number, self.loop.rank, self.loop.steps, cut, weights, samples, whole)
        self._layout = buffer.layout
        self.written = self._thread.submit(self._write, job)
        return self.loop.steps

    def _weights(self) -> Packed:
        packed = capture(self.loop.network, self.loop.optimiser)
        packed.scalars["step"] = self.loop.steps
        packed.tensors["rng"] = torch.get_rng_state()
        for name, one in self.others.items():
            packed.add(f"{name}.", one.state_dict() if isinstance(one, nn.Module) else one)
        return packed

    def _grown(self, folder: Path) -> bool:
        """Whether the changes weigh as much as the whole, or a file is gone."""
        changes = sum(size for _, size in self._chain[1:])
        there = all((folder / name).is_file() for name, _ in self._chain)
        return changes >= self._chain[0][1] or len(self._chain) >= _LONGEST_CHAIN or not there

    def _write(self, job: _Job) -> RankFiles:
        folder, prefix = job.folder, f"{FOLDER}/{job.number:08d}"
        try:
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)
            name = f"{prefix}.rank-{job.rank}.buffer.safetensors"
            size = total = write_cut(job.cut, folder / name)
        finally:
            job.cut.close()
        chain = [(name, size)] if job.whole else [*self._chain, (name, size)]
        samples_name = weights_name = None
        if job.samples is not None:
            samples_name = f"{prefix}.rank-{job.rank}.samples.safetensors"
            total += job.samples.write(folder / samples_name)
        if job.weights is not None:
            weights_name = f"{prefix}.weights.safetensors"
            total += write_training(folder / weights_name, job.weights)
        self._chain, self._folder, self._clock = chain, folder, job.cut.counters["clock"]
        names = tuple(one for one, _ in chain)
        return RankFiles(step=job.step, buffer=names, samples=samples_name, weights=weights_name, bytes=total)


@dataclass(frozen=True)
class _Job:
    """What a thread writes."""

    folder: Path
    number: int
    rank: int
    step: int
    cut: Cut
    weights: Packed | None
    samples: SamplesCut | None
    whole: bool


def newest_number(folder: Path) -> int:
    """The highest number that a file of the ranks has; 0 for none."""
    names = [path.name.split(".")[0] for path in (folder / FOLDER).glob("*.safetensors*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def prune(folder: Path, kept: Iterable[RanksPart]) -> int:
    """Remove the ranks' files that none of these parts needs; those of a checkpoint that is newer than all stay, for it
    may be under way. Returns the bytes that are free again."""
    parts = list(kept)
    needed = {name for part in parts for name in part.files}
    newest = f"{max((part.number for part in parts), default=0):08d}"
    freed = 0
    place = folder / FOLDER
    for path in place.iterdir() if place.is_dir() and not place.is_symlink() else ():
        if f"{FOLDER}/{path.name}" not in needed and path.name.split(".")[0] < newest and not path.is_dir():
            freed += path.lstat().st_size
            path.unlink(missing_ok=True)
    return freed


def write_training(path: Path, packed: Packed) -> int:
    """Write weights, optimiser and step to a file, whole or not at all; returns its bytes. Raises OSError."""
    tensors = {name: (value.dtype, tuple(value.shape)) for name, value in packed.tensors.items()}
    with TensorWriter(path, tensors, {"kind": KIND, **packed.scalars}) as file:
        for name, value in packed.tensors.items():
            file.write_tensor(name, value)
        return file.finish()


def copy_training(source: Path, path: Path) -> None:
    """Copy a file that `write_training` wrote; it is on the disk when this returns.

    Raises OSError, and ValueError for a file that is damaged, of another kind or larger than 16 GiB: another file of
    this machine does not pass for one because a link leads to it.
    """
    with TensorFile(source, KIND) as file:
        if file.size > _MOST_WEIGHTS:
            raise ValueError(f"found {source} of {file.size:,} bytes, expected {_MOST_WEIGHTS:,} at most")
        with open(path, "xb") as copy:
            for block in file.content():
                copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise TypeError(f"found {str(value)[:50]!r}, expected a count")
    return value


def _file_name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise TypeError(f"found {str(value)[:100]!r} for the name of a file")
    return value
