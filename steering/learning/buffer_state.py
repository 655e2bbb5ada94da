"""The state of a rehearsal buffer: stored on disk without pickle, and resharded to another number of ranks."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from steering.learning.rows import host_rows

BufferState = dict[str, Any]
"""Tensors `slot`, `inserted_at` (n,), `strata` (strata, 2: key, seen), `field.NAME` (n, ...); scalars `seen`, `clock`,
`since`, `rate`, and `rng`, a mapping of numbers and strings, or None."""


def write_state(path: Path, state: BufferState) -> None:
    """Write a state as one safetensors file, whole or not at all."""
    tensors = {name: value.contiguous() for name, value in state.items() if isinstance(value, torch.Tensor)}
    scalars = {name: value for name, value in state.items() if name not in tensors}
    temporary = path.with_name(path.name + ".part")
    save_file(tensors, temporary, metadata={"steering.buffer": json.dumps(scalars)})
    temporary.replace(path)


def read_state(path: Path) -> BufferState:
    """Read what `write_state` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "steering.buffer" not in metadata:
            raise ValueError(f"found {path} without a rehearsal buffer's state, expected a file made by write_state")
        state: BufferState = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return state | json.loads(metadata["steering.buffer"])


def merge(states: Iterable[BufferState]) -> BufferState:
    """Return the whole state that a whole one and the changes after it, in their order, amount to.

    Raises:
        ValueError: none is given, the first holds changes only, or changes do not follow from the state before.
    """
    merged: BufferState | None = None
    for state in states:
        clock = 0 if merged is None else merged["clock"]
        if state["since"] != clock:
            raise ValueError(f"found changes since clock {state['since']}, expected {clock} as in the state before")
        merged = state if merged is None else _changed(merged, state)
    if merged is None:
        raise ValueError("found no state, expected a whole one and the changes after it")
    return merged


def _changed(whole: BufferState, change: BufferState) -> BufferState:
    slots = change["slot"].numpy()
    count = max(len(whole["slot"]), int(slots.max(initial=-1)) + 1)
    merged = {**change, "slot": torch.arange(count), "since": 0}
    for name in [name for name in change if name == "inserted_at" or name.startswith("field.")]:
        old, new = whole.get(name), change[name]
        values = torch.empty((count, *new.shape[1:]), dtype=new.dtype)
        if old is not None and len(old):
            host_rows(values)[: len(old)] = host_rows(old)
        if len(new):
            host_rows(values)[slots] = host_rows(new)
        merged[name] = values
    return merged


def reshard(states: Sequence[BufferState], rank: int, ranks: int) -> BufferState:
    """Return the state with which `rank` of `ranks` continues after a run on len(states) ranks.

    All ranks' parts together hold the samples of all the states, each once; every rank gets an even part of every
    stratum, and of what was seen of it in proportion. With the same number of ranks each keeps its own state. The
    states must be whole ones; a part that a rank's budget does not hold is thinned by `load`.

    Raises:
        ValueError: a state that holds changes only, or states with different fields.
    """
    if any(state["since"] for state in states):
        raise ValueError("found a state with changes only, expected whole ones: load them into a buffer first")
    if ranks == len(states):
        return states[rank]
    filled = [state for state in states if len(state["slot"])]
    names = {frozenset(name for name in state if name.startswith("field.")) for state in filled}
    if len(names) > 1:
        raise ValueError(f"found states with different fields: {sorted(sorted(n) for n in names)}")
    keys = [state["field.stratum"].numpy() for state in filled]
    source = np.concatenate([np.full(len(k), index) for index, k in enumerate(keys)] or [np.zeros(0, np.int64)])
    row = np.concatenate([np.arange(len(k)) for k in keys] or [np.zeros(0, np.int64)])
    everything = np.concatenate(keys or [np.zeros(0, np.int64)])
    order = np.argsort(everything, kind="stable")
    mine = order[rank::ranks]
    # Sources in turn, each read once, so that memory-mapped states need not fit into memory together.
    mine = mine[np.argsort(source[mine], kind="stable")]
    strata = _seen(states, everything[order], rank, ranks)
    seen = int(strata[:, 1].sum())
    state: BufferState = {
        "slot": torch.arange(len(mine)),
        "strata": torch.from_numpy(strata),
        "seen": seen,
        "clock": max((s["clock"] for s in states), default=0),
        "since": 0,
        "rate": min(1.0, len(mine) / seen) if seen else 1.0,
        "rng": None,
    }
    for name in ("inserted_at", *sorted(next(iter(names), ()))):
        parts = [s[name][torch.from_numpy(row[mine[source[mine] == i]])] for i, s in enumerate(filled)]
        state[name] = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    return state


def _seen(states: Sequence[BufferState], stored: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """Return what counts as seen by a rank, int64 (strata, 2: key, seen).

    Every stored sample stands for its part of what was seen of its stratum; `stored` are the sorted strata of all,
    assigned to the ranks in turn.
    """
    totals: dict[int, int] = {}
    for state in states:
        for key, seen in state["strata"].tolist():
            totals[key] = totals.get(key, 0) + seen
    rows = np.zeros((len(totals), 2), dtype=np.int64)
    for index, (key, total) in enumerate(totals.items()):
        low, high = np.searchsorted(stored, [key, key + 1]).tolist()
        if low == high:
            rows[index] = key, total if rank == 0 else 0
            continue
        each, rest = divmod(total, high - low)
        own, own_rest = (len(range(low + (rank - low) % ranks, end, ranks)) for end in (high, low + rest))
        rows[index] = key, own * each + own_rest
    return rows
