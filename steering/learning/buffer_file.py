"""Rehearsal buffers in files: a whole one or what has changed, written from a cut and read sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.learning.buffer_cut import BLOCK_BYTES, Cut
from steering.learning.buffer_state import BufferState, scan_names
from steering.learning.identity import WHOLE
from steering.learning.insertion import Policy
from steering.learning.rows import STRATUM, Layout, host_rows
from steering.learning.samples_file import checked_rng
from steering.learning.tensor_file import TensorFile, TensorWriter

KIND = "rehearsal buffer"
_FIELD = "field."


def write_cut(cut: Cut, path: Path) -> int:
    """Write a cut to a file, whole or not at all; returns its bytes. Raises OSError, and what `Cut.blocks` raises."""
    counters, count = dict(cut.counters), len(cut.slots)
    strata, layout = counters.pop("strata"), counters.pop("layout")
    counters["scans"] = [[key, *name] for key, name in counters["scans"].items()]
    scalars = {"kind": KIND, "since": cut.since, "count": cut.count, **counters}
    fields = layout.fields if layout is not None else ()
    with TensorWriter(path, _tensors(fields, count, len(strata)), scalars) as file:
        _write_columns(file, {"strata": strata, "slot": cut.slots, "inserted_at": cut.inserted_at, "key": cut.key})
        for first, block in cut.blocks():
            for name, rows in block.items():
                file.write(_FIELD + name, rows, first)
        return file.finish()


def write_state(state: BufferState, path: Path) -> int:
    """Write a whole state to a file, as `write_cut` does."""
    scalars = {"kind": KIND, "since": 0, "count": len(state), **state.scalars()}
    fields = state.layout.fields if state.layout is not None else ()
    with TensorWriter(path, _tensors(fields, len(state), len(state.strata)), scalars) as file:
        every = np.arange(len(state))
        own = {"strata": state.strata, "slot": every, "inserted_at": state.inserted_at, "key": state.key}
        _write_columns(file, own)
        block = max(1, BLOCK_BYTES // max(1, sum(state.layout.row_bytes.values()))) if state.layout is not None else 1
        for first in range(0, len(state), block):
            for name, _, _ in fields:
                part = state.read(name, every[first : first + block])
                file.write_tensor(_FIELD + name, part.contiguous(), first)
        return file.finish()


def _tensors(fields: Any, count: int, strata: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    columns = {name: (torch.int64, (count,)) for name in ("slot", "inserted_at", "key")}
    content = {_FIELD + name: (dtype, (count, *shape)) for name, shape, dtype in fields}
    return {"strata": (torch.int64, (strata, 3)), **columns, **content}


def _write_columns(file: TensorWriter, columns: dict[str, NDArray[np.int64]]) -> None:
    for name, values in columns.items():
        file.write_tensor(name, torch.from_numpy(np.ascontiguousarray(values)))


@dataclass(frozen=True)
class _Part:
    """The small columns of a file."""

    file: TensorFile
    slot: NDArray[np.int64]
    inserted_at: NDArray[np.int64]
    key: NDArray[np.int64]
    stratum: NDArray[np.int64]
    layout: Layout | None


def read_buffer(paths: Sequence[Path], stack: ExitStack) -> BufferState:
    """The state that a whole file and the changes after it, in their order, amount to.

    Samples are read from the files when they are asked for: stack keeps these open.

    Raises OSError, and ValueError for files that are damaged, not ours, or do not follow one another.
    """
    parts, clock = [], 0
    for path in paths:
        file = stack.enter_context(TensorFile(path, KIND))
        if file.scalars.get("since") != clock:
            found = str(file.scalars.get("since"))[:50]
            raise ValueError(f"found {path} with changes since clock {found}, expected since {clock}")
        clock = _number(file.scalars, "clock", file)
        parts.append(_part(file))
    if not parts:
        raise ValueError("found no file of a rehearsal buffer, expected one or more")
    last, chain = parts[-1].file, _Chain(parts)
    strata, stratum = _strata(last), chain.column("stratum")
    if not np.isin(stratum, strata[:, 0]).all():
        raise ValueError(f"found samples of a stratum that the table in {last.path} lacks, expected every one there")
    return BufferState(
        **_scalars(last),
        strata=strata,
        inserted_at=chain.column("inserted_at"),
        key=chain.column("key"),
        stratum=stratum,
        layout=chain.layout,
        read=chain.read,
    )


class _Chain:
    """Of each slot: the newest file that holds it, and its row there."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts, last = parts, parts[-1].file
        self.count = _number(last.scalars, "count", last)
        if self.count > sum(len(part.slot) for part in parts):
            raise ValueError(f"found {self.count} samples announced in {last.path}, expected as many in the files")
        self.source, self.row = np.full(self.count, -1), np.zeros(self.count, np.int64)
        for number, part in enumerate(parts):
            if len(part.slot) and part.slot[-1] >= self.count:
                raise ValueError(f"found slot {part.slot[-1]} in {part.file.path}, expected slots below {self.count}")
            self.source[part.slot], self.row[part.slot] = number, np.arange(len(part.slot))
        if (self.source < 0).any():
            raise ValueError(f"found slots without a sample in {last.path} and the files before it, expected none")
        layouts = {part.layout for part in parts if part.layout is not None}
        if len(layouts) > 1:
            raise ValueError(f"found files of one buffer with different fields: {', '.join(map(str, layouts))}")
        self.layout = next(iter(layouts), None)

    def column(self, name: str) -> NDArray[np.int64]:
        """A small column, by slot."""
        found = np.zeros(self.count, np.int64)
        for number, part in enumerate(self.parts):
            mine = self.source == number
            found[mine] = getattr(part, name)[self.row[mine]]
        return found

    def read(self, name: str, slots: NDArray[np.int64]) -> Tensor:
        """Samples of these slots, from the files."""
        place = next(part.file.place(_FIELD + name) for part in self.parts if part.layout is not None)
        out = torch.empty((len(slots), *place.shape[1:]), dtype=place.dtype)
        space = host_rows(out) if len(slots) else np.zeros((0, place.width), np.uint8)
        for number in np.unique(self.source[slots]).tolist():
            mine = np.flatnonzero(self.source[slots] == number)
            some = space if len(mine) == len(slots) else np.empty((len(mine), place.width), np.uint8)
            self.parts[number].file.rows(_FIELD + name, self.row[slots[mine]], some)
            if some is not space:
                space[mine] = some
        return out


def _part(file: TensorFile) -> _Part:
    slot = file.numbers("slot", (None,))
    if len(slot) and (slot[0] < 0 or (np.diff(slot) <= 0).any()):
        raise ValueError(f"found slots of {file.path} in no order, expected ascending ones")
    fields = {name.removeprefix(_FIELD): p for name, p in file.places.items() if name.startswith(_FIELD)}
    layout = None
    if fields:
        for name in fields:
            place = file.place(_FIELD + name, rows=len(slot))
            if not place.shape or (place.width == 0):
                raise ValueError(f"found field {name!r} without content in {file.path}, expected samples")
        layout = Layout(tuple((name, fields[name].shape[1:], fields[name].dtype) for name in sorted(fields)))
    elif len(slot):
        raise ValueError(f"found {len(slot)} samples without a field in {file.path}, expected some")
    stratum = file.numbers(_FIELD + STRATUM, (len(slot),)) if fields else slot
    inserted_at, key = (file.numbers(name, (len(slot),)) for name in ("inserted_at", "key"))
    if len(key) and (key.min() < 0 or key.max() >= WHOLE):
        raise ValueError(f"found keys outside 0 to {WHOLE - 1} in {file.path}, expected those that steering wrote")
    return _Part(file, slot, inserted_at, key, stratum, layout)


def _strata(file: TensorFile) -> NDArray[np.int64]:
    found = file.numbers("strata", (None, 3))
    if len(found) and (found[:, 1:].min() < 0 or len(np.unique(found[:, 0])) < len(found)):
        raise ValueError(f"found a table of strata in {file.path} with negative counts, or one twice")
    return found


def _scalars(file: TensorFile) -> dict[str, Any]:
    found, path = file.scalars, file.path
    counts = {name: _number(found, name, file) for name in ("seen", "clock", "bound")}
    policy, rate, salt, identified = (found.get(name) for name in ("policy", "rate", "salt", "identified"))
    fits = policy in get_args(Policy) and identified in (True, False, None)
    fits = fits and isinstance(rate, int | float) and 0 <= rate <= 1
    if not fits or not (salt is None or (type(salt) is int and 0 <= salt < 2**63)):
        raise ValueError(f"found policy {policy!r}, rate {rate!r} in {path}, expected those that steering wrote")
    try:
        scans = scan_names(found.get("scans", []))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"found names of scans in {path} that are none ({error})") from None
    rng = None if found.get("rng") is None else checked_rng(found["rng"])
    return {
        **counts,
        "policy": policy,
        "rate": rate,
        "salt": salt,
        "identified": identified,
        "rng": rng,
        "scans": scans,
    }


def _number(scalars: dict[str, Any], name: str, file: TensorFile) -> int:
    value = scalars.get(name)
    if type(value) is not int or not 0 <= value <= WHOLE:
        raise ValueError(f"found {name} = {str(value)[:50]!r} in {file.path}, expected a count")
    return value
