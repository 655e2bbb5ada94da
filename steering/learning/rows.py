"""Rows of bytes: how samples of any dtype are copied between storage, minibatches and the wire.

A row is one sample of one field, seen as uint8. Copies of rows never convert, so every dtype survives bit for bit, also
those that a backend refuses to send (gloo knows no uint16). On the CPU numpy's `take` is the fastest gather for rows of
256 bytes to 600 kB (measured against index_select and row copies), and it writes into the minibatch itself.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

STRATUM = "stratum"  # the field that every sample has, int64
IDENTITY = "identity"  # the field with who a sample is, int64; kept beside the samples, not with them
# Types that numpy knows too; bfloat16 and those of one byte with a point it does not.
_NUMPY = frozenset(
    {torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32}
    | {torch.int64, torch.float32, torch.float64, torch.complex64, torch.complex128}
)
COUNTS = _NUMPY - {torch.bool, torch.complex64, torch.complex128} | {torch.float16}
"""Types that a detector's counts may have."""
_BLOCK_BYTES = 2**22  # that leave a GPU at once
LONG_ROW = 2048  # bytes from which a loop of plain copies costs no more than a gather through a temporary


@dataclass(frozen=True)
class Layout:
    """Fields of a sample in the order of their names: name, shape and dtype of each. The stratum is one of them."""

    fields: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, samples: Mapping[str, Tensor]) -> "Layout":
        """Layout of a batch of samples, tensors (n, ...); a field named `stratum` is taken for the stratum itself."""
        fields = {name: (name, tuple(t.shape[1:]), t.dtype) for name, t in samples.items()}
        fields[STRATUM] = (STRATUM, (), torch.int64)
        return cls(tuple(fields[name] for name in sorted(fields)))

    @cached_property
    def row_bytes(self) -> dict[str, int]:
        """Bytes per sample of each field."""
        return {name: math.prod(shape) * dtype.itemsize for name, shape, dtype in self.fields}

    @cached_property
    def digest(self) -> int:
        """A number by which ranks see that they store the same, > 0."""
        return 1 + zlib.crc32(str(self).encode())

    def widened(self, dtypes: Mapping[str, torch.dtype]) -> "Layout":
        """The same fields, each in a dtype that has room for its own and for the one that is named."""
        return Layout(tuple((name, shape, roomy(dtype, dtypes.get(name, dtype))) for name, shape, dtype in self.fields))

    def check(self, samples: Mapping[str, Tensor], count: int = 0) -> None:
        """Refuse tensors (n, ...) that lack a field, hold it in another shape or dtype, or have n < count.

        Raises:
            ValueError: which field, what was found, what is stored.
        """
        for name, shape, dtype in self.fields:
            tensor = samples.get(name)
            if tensor is None:
                if name == STRATUM:
                    continue
                raise ValueError(f"found no field {name!r} among {sorted(samples)}; the buffer stores {self}")
            if tensor.dtype != dtype or tensor.shape[1:] != shape:
                raise ValueError(
                    f"found {name!r} with samples {tensor.dtype} {tuple(tensor.shape[1:])}, expected {dtype} {shape} "
                    "as in the first insert: convert them, or make another buffer"
                )
            if tensor.shape[0] < count:
                raise ValueError(
                    f"found {tensor.shape[0]} rows in {name!r}, expected {count} or more: new samples and r"
                )

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {str(dtype).removeprefix('torch.')}{list(shape)}" for name, shape, dtype in self.fields
        )


def selected(tensor: Tensor, rows: Tensor) -> Tensor:
    """These rows (int64, on its device) of a tensor (n, ...) of any dtype: torch cannot select from all."""
    found = as_rows(tensor.contiguous()).index_select(0, rows)
    return found.view(tensor.dtype).view(len(rows), *tensor.shape[1:])


def finite(tensor: Tensor) -> Tensor:
    """(n,) True for the rows of a tensor (n, ...) in which every number is finite, and their sum, which is all that is
    looked at: a fifth of the time."""
    wide = torch.float32 if tensor.dtype.itemsize == 2 else None
    return tensor[:, None].flatten(1).sum(1, dtype=wide).isfinite()


def numpy_of(dtype: torch.dtype) -> np.dtype:
    """The same type in numpy. Raises TypeError for one that numpy does not know."""
    return torch.empty(0, dtype=dtype).numpy().dtype


def roomy(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """A type that holds every value of both. Raises ValueError where numpy knows none."""
    if one == other:
        return one
    known = {one, other} <= _NUMPY
    joint = np.promote_types(numpy_of(one), numpy_of(other)) if known else None  # torch has no rule for uint16
    large = {torch.int64, torch.uint64}  # numpy calls float64 a type for them
    if joint is None or (joint.kind not in "iu" and large & {one, other}):
        raise ValueError(
            f"found different fields, of {one} and of {other}, expected one type, or one with room for both"
        )
    return torch.from_numpy(np.empty(0, joint)).dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU in a type that has room for its values."""
    return tensor if tensor.dtype == dtype else torch.from_numpy(tensor.numpy().astype(numpy_of(dtype)))


class Rows:
    """One field of the storage, seen as rows of bytes.

    Attributes:
        tensor: uint8 (capacity, width), on the storage's device.
        width: bytes per sample.
    """

    def __init__(self, storage: Tensor) -> None:
        self.tensor = as_rows(storage)
        self.width = self.tensor.shape[1]
        self._host = self.tensor.numpy() if storage.is_cpu else None

    def take(self, slots: np.ndarray, out: Tensor, start: int = 0) -> None:
        """Copy the rows of `slots` (int64, in range) to samples start, start + 1, ... of `out`, on any device.

        Between host and CUDA the copy is queued on the current stream and goes through pinned memory of torch's caching
        allocator, which hands it out again only when the copy is done.
        """
        end = start + len(slots)
        if self._host is not None and out.is_cpu:
            # mode "raise" would gather into a temporary first
            self._host.take(slots, 0, host_rows(out)[start:end], "clip")
            return
        rows = as_rows(out[start:end])
        if self._host is not None:
            staging = torch.empty(rows.shape, dtype=torch.uint8, pin_memory=True)
            self._host.take(slots, 0, staging.numpy(), "clip")
            rows.copy_(staging, non_blocking=True)
            return
        index = on_device(slots, self.tensor.device)
        if rows.device == self.tensor.device:
            source, rows = _widest(self.tensor, rows)
            torch.index_select(source, 0, index, out=rows)
            return
        most = max(1, _BLOCK_BYTES // max(1, self.width))
        for first in range(0, len(slots), most):  # so that a copy of all of a buffer needs no second one on the GPU
            part = slice(first, first + most)
            rows[part].copy_(self.tensor.index_select(0, index[part]))

    def read(self, slots: np.ndarray, out: np.ndarray) -> None:
        """Copy the rows of `slots` (int64, ascending) to `out`, uint8 (n, width), complete on return; from any thread.

        Copies of many bytes let other threads run.
        """
        if self._host is None:
            index = torch.from_numpy(slots).to(self.tensor.device)
            torch.from_numpy(out).copy_(self.tensor.index_select(0, index))
        elif len(slots) and slots[-1] - slots[0] == len(slots) - 1:
            np.copyto(out, self._host[slots[0] : slots[-1] + 1])
        else:
            self._host.take(slots, 0, out, "clip")

    def put(self, slots: np.ndarray, samples: Tensor, chosen: np.ndarray) -> None:
        """Copy samples `chosen` (ascending) to rows `slots` (distinct); int64 arrays of one length.

        Samples that lie on another device than the storage are moved there first.
        """
        if len(chosen) == 0:
            return
        whole = len(chosen) == samples.shape[0]
        if self._host is not None:
            if not samples.is_cpu:
                # Only the chosen ones leave the GPU. The host waits for them: it is to write them now.
                samples = as_rows(samples)
                samples = samples if whole else samples.index_select(0, on_device(chosen, samples.device))
                samples, whole = samples.cpu(), True
            rows = host_rows(samples)
            if whole:
                self._host[slots] = rows
            elif self.width < LONG_ROW:
                self._host[slots] = rows[chosen]
            else:
                for slot, row in zip(slots.tolist(), chosen.tolist(), strict=True):
                    self._host[slot] = rows[row]
            return
        if samples.is_cpu and self.tensor.is_cuda:
            source = torch.empty((len(chosen), self.width), dtype=torch.uint8, pin_memory=True)
            host_rows(samples).take(chosen, 0, source.numpy(), "clip")
        else:
            source = as_rows(samples)
            source = source if whole else source.index_select(0, on_device(chosen, source.device))
        storage, source = _widest(self.tensor, source.to(self.tensor.device, non_blocking=True))
        storage.index_copy_(0, on_device(slots, storage.device), source)


def on_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A copy of an array, also of a read-only one, on a device. The host does not wait for a GPU.

    It goes through pinned memory of torch's caching allocator, which hands that out again only when the copy is done; a
    copy of what is not pinned would wait for all that the GPU was given before.
    """
    copy = torch.empty(numbers.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
    copy.numpy()[...] = numbers
    return copy.to(device, non_blocking=True)


def host_rows(tensor: Tensor) -> np.ndarray:
    """Bytes of a contiguous tensor (n, ...) on the CPU, uint8 (n, bytes per sample), sharing its memory; n > 0."""
    if not tensor.is_contiguous():
        return as_rows(tensor).numpy()
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype not in _NUMPY:
        tensor = tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.uint8)
    array = tensor.numpy()
    return array.reshape(len(array), -1).view(np.uint8)


def as_rows(tensor: Tensor) -> Tensor:
    """Bytes of a contiguous tensor (n, ...) on any device, uint8 (n, bytes per sample), sharing its memory.

    Raises:
        ValueError: the tensor has no sample axis or is not contiguous.
    """
    if tensor.ndim == 0 or not tensor.is_contiguous():
        raise ValueError(
            f"found a tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()}; expected a contiguous one "
            "with the samples along its first axis: call .contiguous() on it"
        )
    width = math.prod(tensor.shape[1:])
    # as_strided, for torch calls a single sample contiguous whatever its strides, and then refuses to view it
    return tensor.detach().as_strided((tensor.shape[0], width), (width, 1)).view(torch.uint8)


def _widest(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return both row tensors as int64 where their addresses allow it: a GPU moves eight bytes as easily as one."""
    if first.shape[1] % 8 or (first.data_ptr() | second.data_ptr()) % 8:
        return first, second
    if first.storage_offset() % 8 or second.storage_offset() % 8:
        return first, second
    return first.view(torch.int64), second.view(torch.int64)
