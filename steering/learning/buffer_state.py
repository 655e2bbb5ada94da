"""What a rehearsal buffer holds, apart from the buffer: restored, given out to other ranks, or united with others.

The small columns of a state are in memory; the samples are read as they are needed, from a buffer or from a file.
Everything here follows from the samples' keys (see identity): the same states give the same samples in any order, and a
state united with itself is itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steering.learning.identity import WHOLE, estimated
from steering.learning.insertion import Policy
from steering.learning.rows import STRATUM, Layout, cast, host_rows
from steering.learning.training_state import Packed


class ScanName(NamedTuple):
    """A scan of a run, and when its first labels came, in seconds since 1970."""

    run: str
    scan: str
    begun: float


Read = Callable[[str, NDArray[np.int64]], Tensor]
"""Rows (n,) of a field, as a tensor (n, ...) on the CPU."""


@dataclass(frozen=True, kw_only=True)
class BufferState:
    """n samples, and what is known of the past they were kept from."""

    policy: Policy
    identified: bool | None
    """Whether the samples came with an identity; None where there was none yet."""
    seen: int
    """Samples offered."""
    clock: int
    """Of the buffer: `inserted_at` counts by it."""
    bound: int
    """Of strata that are not among these, see Insertion."""
    rate: float
    salt: int | None
    """Of the keys of samples without an identity; None: another one than before."""
    rng: Mapping[str, Any] | None
    scans: Mapping[int, ScanName]
    """What is known of strata by name; a library's own strata have none."""
    strata: NDArray[np.int64]
    """(strata, 3): stratum, samples of it offered, bound."""
    inserted_at: NDArray[np.int64]
    """(n,)"""
    key: NDArray[np.int64]
    """(n,)"""
    stratum: NDArray[np.int64]
    """(n,)"""
    layout: Layout | None
    """None where nothing was ever offered."""
    read: Read

    def __len__(self) -> int:
        return len(self.key)

    def scalars(self) -> dict[str, Any]:
        """What is no array, for JSON."""
        found = {name: getattr(self, name) for name in _SCALARS}
        return {**found, "scans": [[key, *name] for key, name in self.scans.items()]}

    def packed(self) -> Packed:
        """The whole state in memory."""
        every = np.arange(len(self))
        names = [name for name, _, _ in self.layout.fields] if self.layout is not None else []
        tensors = {f"field.{name}": self.read(name, every).contiguous() for name in names if name != STRATUM}
        tensors |= {name: torch.from_numpy(getattr(self, name).copy()) for name in COLUMNS}
        return Packed(tensors, self.scalars())

    @classmethod
    def of(cls, packed: Packed) -> BufferState:
        """The state that `packed` returned."""
        fields = packed.named("field.")
        columns = {name: packed.tensors[name].numpy() for name in COLUMNS}
        layout = Layout.of(fields) if fields else None

        def read(name: str, rows: NDArray[np.int64]) -> Tensor:
            tensor = torch.from_numpy(columns["stratum"]) if name == STRATUM else fields[name]
            part = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype)
            if len(rows):
                host_rows(part)[:] = host_rows(tensor)[rows]
            return part

        scalars = {**packed.scalars, "scans": scan_names(packed.scalars["scans"])}
        return cls(**scalars, **columns, layout=layout, read=read)

    def bounds(self) -> dict[int, int]:
        """The bound of each stratum that is known."""
        return {int(key): int(bound) for key, _, bound in self.strata.tolist()}

    def take(self, rows: NDArray[np.int64], **changes: Any) -> BufferState:
        """The state with these of its samples alone."""
        columns = {name: getattr(self, name)[rows] for name in ("inserted_at", "key", "stratum")}
        return replace(self, **columns, read=lambda name, own: self.read(name, rows[own]), **changes)


COLUMNS = ("strata", "inserted_at", "key", "stratum")
_SCALARS = ("policy", "identified", "seen", "clock", "bound", "rate", "salt", "rng")


def scan_names(rows: Sequence[Sequence[Any]]) -> dict[int, ScanName]:
    """Names of strata, from the JSON of `BufferState.scalars`."""
    return {int(key): ScanName(str(run), str(scan), float(begun)) for key, run, scan, begun in rows}


def thin(state: BufferState, capacity: int) -> BufferState:
    """The state with at most so many samples: those that the buffer would have kept with that room.

    Where the policy is `replacement`, which has no such samples, those with the smallest keys: a uniform part.
    """
    if len(state) <= capacity:
        return state
    if state.policy != "balanced":
        order = np.argsort(state.key, kind="stable")
        bound = state.bound if state.policy == "replacement" else int(state.key[order[capacity]])
        strata = state.strata.copy()
        strata[:, 2] = np.minimum(strata[:, 2], bound)
        return state.take(np.sort(order[:capacity]), strata=strata, bound=min(bound, state.bound))
    kept, strata = [], state.strata.copy()
    names = np.unique(state.stratum).tolist()
    every = [np.flatnonzero(state.stratum == name) for name in names]
    every = [rows[np.argsort(state.key[rows], kind="stable")] for rows in every]
    for name, rows, count in zip(names, every, _level([state.key[rows] for rows in every], capacity), strict=True):
        kept.append(rows[:count])
        if count < len(rows):
            strata[strata[:, 0] == name, 2] = state.key[rows[count]]
    return state.take(np.sort(np.concatenate(kept)), strata=strata)


def without(state: BufferState, strata: set[int]) -> BufferState:
    """The state without any sample of these strata, and without a word of them."""
    kept = np.flatnonzero(~np.isin(state.stratum, list(strata)))
    known = ~np.isin(state.strata[:, 0], list(strata))
    gone = int(state.strata[~known, 1].sum())
    scans = {key: name for key, name in state.scans.items() if key not in strata}
    return state.take(kept, strata=state.strata[known], seen=max(0, state.seen - gone), scans=scans)


def merge(states: Sequence[BufferState], policy: Policy) -> BufferState:
    """All states as one, in which every different sample of all their pasts is equally likely to be, once.

    A sample that several states hold counts once. It does not matter in which order they are given, or how often.

    Args:
        states: one or more, of which none has the policy `replacement` and all came with identities.
        policy: of the buffer that goes on: equally likely in all (`reservoir`), or within a stratum (`balanced`).

    Raises:
        ValueError: states that cannot be united, with the reason.
    """
    filled = [state for state in states if len(state)]
    _check_mergeable(filled, policy)
    filled = _alike(filled)
    bounds = [state.bounds() for state in states]
    names = sorted({name for known in bounds for name in known})
    default = min((state.bound for state in states), default=WHOLE)
    lowest = {n: min(b.get(n, s.bound) for b, s in zip(bounds, states, strict=True)) for n in names}
    if policy == "reservoir":
        default = min([default, *lowest.values()])
        lowest = dict.fromkeys(names, default)
    source = np.concatenate([np.full(len(s), i) for i, s in enumerate(filled)] or [np.zeros(0, np.int64)])
    row = np.concatenate([np.arange(len(s)) for s in filled] or [np.zeros(0, np.int64)])
    key, stratum, at = (_joined(filled, name) for name in ("key", "stratum", "inserted_at"))
    rows = _newest(key, stratum, at)
    below = np.array([lowest[name] for name in stratum[rows].tolist()], np.int64) if len(rows) else rows
    rows = rows[key[rows] < below]
    found, counts = np.unique(stratum[rows], return_counts=True)
    stored = dict(zip(found.tolist(), counts.tolist(), strict=True))
    if policy == "reservoir":  # the bound of all says what is to be known of those that have no sample left
        names = sorted(stored)
    offered = {name: estimated(stored.get(name, 0), lowest[name]) for name in names}
    return BufferState(
        policy=policy,
        identified=True if filled else None,
        seen=sum(offered.values()),
        clock=max((state.clock for state in states), default=0),
        bound=default,
        rate=1.0,
        salt=None,
        rng=None,
        scans=_named(states),
        strata=np.array([[n, offered[n], lowest[n]] for n in names], np.int64).reshape(-1, 3),
        inserted_at=at[rows],
        key=key[rows],
        stratum=stratum[rows],
        layout=filled[0].layout if filled else None,
        read=_read_from(filled, source[rows], row[rows]),
    )


def reshard(states: Sequence[BufferState], rank: int, ranks: int) -> BufferState:
    """The state with which `rank` of `ranks` goes on after a run on len(states) ranks, which saw different samples.

    All ranks' parts together hold the samples of all the states below their common bound, each once; every rank gets an
    even part of every stratum, and of what was seen of it in proportion. Ranks that saw about as much have about the
    same bound: a few percent of the samples are left out, so that all are equally likely to be there. `replacement`
    knows no bound: everything is given out. With the same number of ranks each keeps its own state.

    Raises ValueError for states whose fields have different names or shapes.
    """
    if ranks == len(states):
        return states[rank]
    filled = _alike([state for state in states if len(state)])
    policy = states[0].policy
    bounds = [state.bounds() for state in states]
    names = sorted({name for known in bounds for name in known})
    lowest = {n: min(b.get(n, s.bound) for b, s in zip(bounds, states, strict=True)) for n in names}
    source = np.concatenate([np.full(len(s), i) for i, s in enumerate(filled)] or [np.zeros(0, np.int64)])
    row = np.concatenate([np.arange(len(s)) for s in filled] or [np.zeros(0, np.int64)])
    key, stratum, at = (_joined(filled, name) for name in ("key", "stratum", "inserted_at"))
    below = np.array([lowest[name] for name in stratum.tolist()], np.int64)
    kept = np.flatnonzero(key < below)
    if policy != "replacement":  # which stores a sample as often as it was offered
        kept = np.intersect1d(kept, _newest(key, stratum, at))
    order = kept[np.argsort(stratum[kept], kind="stable")]
    mine = order[rank::ranks]
    # Sources in turn, each read once, and forwards.
    mine = mine[np.lexsort((row[mine], source[mine]))]
    seen = _seen(states, names, stratum[order], rank, ranks)
    total = sum(seen.values())
    return BufferState(
        policy=policy,
        identified=next((state.identified for state in filled), None),
        seen=total,
        clock=max(state.clock for state in states),
        bound=min(state.bound for state in states),
        rate=min(1.0, len(mine) / total) if total else 1.0,
        salt=None,
        rng=None,
        scans=_named(states),
        strata=np.array([[n, seen[n], lowest[n]] for n in names], np.int64).reshape(-1, 3),
        inserted_at=at[mine],
        key=key[mine],
        stratum=stratum[mine],
        layout=filled[0].layout if filled else None,
        read=_read_from(filled, source[mine], row[mine]),
    )


def _check_mergeable(filled: Sequence[BufferState], policy: Policy) -> None:
    if any("replacement" in (policy, state.policy) for state in filled):
        raise ValueError(
            "found a buffer with the policy 'replacement' to be united with others, expected 'reservoir' or "
            "'balanced': what it keeps fades with its age, and two buffers of different ages have no common measure; "
            "choose another policy, or start from one run alone"
        )
    if not all(state.identified for state in filled):
        raise ValueError(
            "found samples without an identity in buffers to be united, expected one for each, so that none counts "
            "twice: offer them with the field `identity`"
        )


def _newest(key: NDArray[np.int64], stratum: NDArray[np.int64], at: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the newest copy of each sample, and of equally new ones the same one in whatever order they come."""
    order = np.lexsort((stratum, -at, key))
    first = np.ones(len(order), bool)
    first[1:] = np.diff(key[order]) > 0
    return order[first]


def _alike(states: Sequence[BufferState]) -> list[BufferState]:
    """The states, all of one layout: each field in the dtype that has room for it in all. Raises ValueError for other
    names or shapes."""
    layouts = [state.layout for state in states if state.layout is not None]
    if len(set(layouts)) < 2:
        return list(states)
    if len({tuple((name, shape) for name, shape, _ in layout.fields) for layout in layouts}) > 1:
        raise ValueError(
            f"found buffers with different fields, {' and '.join(map(str, dict.fromkeys(layouts)))}, expected the same "
            "names and shapes in all"
        )
    joint = layouts[0]
    for layout in layouts[1:]:
        joint = joint.widened({name: dtype for name, _, dtype in layout.fields})
    return [fitted(state, joint) for state in states]


def fitted(state: BufferState, layout: Layout) -> BufferState:
    """The state with the fields of this layout alone, in its dtypes, which have room for what is stored."""
    dtypes = {name: dtype for name, _, dtype in layout.fields}
    return replace(state, layout=layout, read=lambda name, rows: cast(state.read(name, rows), dtypes[name]))


def _named(states: Sequence[BufferState]) -> dict[int, ScanName]:
    found: dict[int, ScanName] = {}
    for state in states:
        for key, name in state.scans.items():
            found[key] = min(name, found.get(key, name))
    return dict(sorted(found.items()))


def _joined(states: Sequence[BufferState], name: str) -> NDArray[np.int64]:
    return np.concatenate([getattr(state, name) for state in states] or [np.zeros(0, np.int64)])


def _read_from(states: Sequence[BufferState], source: NDArray[np.int64], row: NDArray[np.int64]) -> Read:
    def read(name: str, rows: NDArray[np.int64]) -> Tensor:
        of, there = source[rows], row[rows]
        found: Tensor | None = None
        for number in np.unique(of).tolist():
            mine = np.flatnonzero(of == number)
            part = states[number].read(name, there[mine])
            if len(mine) == len(rows):
                return part
            found = torch.empty((len(rows), *part.shape[1:]), dtype=part.dtype) if found is None else found
            host_rows(found)[mine] = host_rows(part)
        if found is None:
            raise ValueError(f"found no rows of {name!r} to read, expected some")
        return found

    return read


def _level(keys: Sequence[NDArray[np.int64]], capacity: int) -> list[int]:
    """How many samples each stratum keeps when the fullest gives way again and again, of equally full ones that with
    the largest key. keys: of each stratum, ascending."""
    counts = np.array([len(one) for one in keys], np.int64)
    low, high = 0, int(counts.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(counts, middle).sum() <= capacity else (low, middle - 1)
    kept = np.minimum(counts, low)
    rest = sorted(np.flatnonzero(counts > low).tolist(), key=lambda number: int(keys[number][low]))
    kept[rest[: capacity - int(kept.sum())]] += 1
    return kept.tolist()


def _seen(
    states: Sequence[BufferState], names: Sequence[int], stored: NDArray[np.int64], rank: int, ranks: int
) -> dict[int, int]:
    """What counts as seen by a rank of each stratum.

    Every stored sample stands for its part of what was seen of its stratum; `stored` are the sorted strata of all,
    assigned to the ranks in turn.
    """
    totals = dict.fromkeys(names, 0)
    for state in states:
        for name, seen, _ in state.strata.tolist():
            totals[name] += seen
    rows = {}
    for name, total in totals.items():
        low, high = np.searchsorted(stored, [name, name + 1]).tolist()
        if low == high:
            rows[name] = total if rank == 0 else 0
            continue
        each, rest = divmod(total, high - low)
        own, own_rest = (len(range(low + (rank - low) % ranks, end, ranks)) for end in (high, low + rest))
        rows[name] = own * each + own_rest
    return rows
