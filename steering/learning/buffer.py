"""The local rehearsal buffer: a rank's bounded memory of what it has been offered.

Samples are mappings of named tensors in their native dtype, plus an integer stratum. Storage is allocated once, at the
first insert, for as many samples as the budget in bytes holds. What to keep is decided with a few integers per sample;
the samples themselves are copied as rows of bytes, straight to their slots. Policies: see insertion.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from steering.learning.buffer_cut import Cut
from steering.learning.buffer_state import BufferState, ScanName, fitted, merge, thin
from steering.learning.identity import WHOLE, keys_of
from steering.learning.insertion import Insertion, Policy
from steering.learning.key_index import KeyIndex
from steering.learning.rows import STRATUM, Layout, Rows
from steering.learning.strata import BYTES_PER_SLOT, Strata

BOOKKEEPING = BYTES_PER_SLOT + KeyIndex.BYTES_PER_SLOT + 16  # the last 16: when the slot was written, and its key
_BLOCK = 2**22  # bytes that `load` reads at once


class RehearsalBuffer:
    """Bounded memory of one rank.

    Args:
        budget_bytes: what the stored samples and their bookkeeping (56 bytes each, the stratum included) may take.
        policy: what is kept, see the module's docstring.
        seed: of the decisions what to keep; give each rank its own.
        device: where samples are stored. The host's memory is not pinned: what a GPU is sent of it is gathered first,
            into a few pinned rows, so that the storage is as large as the budget says and a rank without a GPU leaves
            those of its machine alone.
    """

    def __init__(
        self, budget_bytes: int, *, policy: Policy = "reservoir", seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        if policy not in get_args(Policy):
            raise ValueError(f"found policy {policy!r}, expected one of {get_args(Policy)}")
        if budget_bytes <= 0:
            raise ValueError(f"found a budget of {budget_bytes} bytes, expected a positive one")
        self.budget_bytes = budget_bytes
        self.policy = policy
        self.device = torch.device(device)
        self.capacity = 0
        """Samples that fit into the budget; 0 until the first insert shows how large a sample is."""
        self.layout: Layout | None = None
        self.strata = Strata()
        self.rows: dict[str, Rows] = {}
        """The storage as bytes, by field."""
        self.scans: dict[int, ScanName] = {}
        """What strata stand for, as far as somebody has said it here; it goes into states."""
        self._store: dict[str, Tensor] = {}
        self._inserted_at = np.zeros(0, dtype=np.int64)
        self._clock = 0
        self._insertion = Insertion(policy, self.strata, seed=seed)
        self._cut: Cut | None = None

    def __len__(self) -> int:
        """Return the number of stored samples, which never falls. Slots 0 to len - 1 are filled."""
        return self.strata.slots

    @property
    def seen(self) -> int:
        """Samples offered so far."""
        return self._insertion.seen

    def past(self, strata: list[int]) -> np.ndarray:
        """From how many samples those stored of each of these strata were chosen, int64 (n,): see Insertion."""
        return np.array([self._insertion.past(number) for number in self.strata.numbers(strata)], np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, bookkeeping included; at most the budget."""
        return sum(t.nbytes for t in self._store.values()) + self.capacity * BOOKKEEPING

    @property
    def fills(self) -> dict[int, int]:
        """Stored samples of each stratum that has any."""
        counts = self.strata.counts.tolist()
        return {key: count for key, count in zip(self.strata.keys, counts, strict=True) if count}

    @property
    def ages(self) -> np.ndarray:
        """How many samples were offered after each stored one, int64 (len,), by slot."""
        return self._clock - self._inserted_at[: len(self)]

    def composition(self) -> dict[int, dict[str, float]]:
        """What is stored of each stratum: `count`, and the `age` of its samples, 10 %, median and 90 %."""
        numbers, ages = self.strata.of_slots, self.ages
        found = {}
        for number, key in enumerate(self.strata.keys):
            own = ages[numbers == number]
            if len(own):
                young, middle, old = np.percentile(own, (10, 50, 90)).tolist()
                found[key] = {"count": float(len(own)), "age_p10": young, "age_p50": middle, "age_p90": old}
        return found

    def insert(self, samples: Mapping[str, Tensor], stratum: Tensor, identity: Tensor | None = None) -> int:
        """Offer samples to the buffer.

        Args:
            samples: tensors (n, ...) of any dtype and device; names, shapes and dtypes stay those of the first insert.
            stratum: int64 (n,), any integers.
            identity: int64 (n,), the same for a sample whenever it is offered, see identity; None: all are different.
                Given always or never.

        Returns:
            How many of them were stored.

        Raises:
            ValueError: fields that differ from those stored, or one sample larger than the budget.
        """
        count = self._check(samples, stratum)
        keys = None if identity is None else keys_of(_identity(identity, count))
        if self._insertion.identified is (keys is None) and self.seen:
            raise ValueError(
                f"found samples {'without' if keys is None else 'with'} an identity, expected the other as in inserts "
                "before: give all of them one, or none"
            )
        if self.layout is None:
            self._allocate(Layout.of(samples))
        return self._offer(samples, stratum, keys) if count else 0

    def absorb(self, state: BufferState) -> int:
        """Offer what another buffer has kept, as of a rank that was lost; returns how many samples were stored.

        Samples of both are then kept by their keys, each once. Raises ValueError where they cannot be united.
        """
        if not len(state) or state.layout is None:
            return 0
        if self.policy != "replacement" and not (state.identified and self._insertion.identified in (True, None)):
            raise ValueError("found samples without an identity to be taken over, expected one for each: offer them so")
        if self.layout is None:
            self._allocate(state.layout)
        if state.layout != self.layout:
            raise ValueError(f"found samples of {state.layout} to be taken over, expected {self.layout}")
        self.scans |= {key: name for key, name in state.scans.items() if key not in self.scans}
        stored, rows = 0, np.arange(len(state))
        block = max(1, _BLOCK // sum(self.layout.row_bytes.values()))
        for first in range(0, len(rows), block):
            part = rows[first : first + block]
            fields = {name: state.read(name, part).contiguous() for name in self.rows if name != STRATUM}
            stored += self._offer(fields, torch.from_numpy(state.stratum[part]), state.key[part])
        bounds = state.bounds()
        self._insertion.lower(dict(zip(self.strata.numbers(list(bounds)), bounds.values(), strict=True)), state.bound)
        return stored

    def _offer(self, samples: Mapping[str, Tensor], stratum: Tensor, keys: np.ndarray | None) -> int:
        """Offer samples that were checked; how many were stored."""
        slots, chosen = self._insertion.choose(self.strata.numbers(stratum.tolist()), keys)
        if len(chosen):
            cut = self._cut  # its reader may close it at any time
            if cut is not None:
                cut.keep(slots)
            for name, rows in self.rows.items():
                rows.put(slots, (stratum if name == STRATUM else samples[name]).contiguous(), chosen)
            self._inserted_at[slots] = self._clock + 1 + chosen
        self._clock += len(stratum)
        return len(chosen)

    def gather(self, slots: np.ndarray, out: Mapping[str, Tensor], start: int = 0) -> None:
        """Copy stored samples into rows start, start + 1, ... of `out`.

        Args:
            slots: int64 (n,), each below len(self).
            out: tensors (rows, ...) of the stored shapes and dtypes, contiguous, on any device; `stratum` may be among
                them, and names that are not stored are left alone.
            start: first row to write.

        Raises ValueError where `out` does not fit.
        """
        if len(slots) == 0 or self.layout is None:
            return
        self.layout.check(out, start + len(slots))
        for name, rows in self.rows.items():
            if name in out:
                rows.take(slots, out[name], start)

    def locate(self, keys: list[int], ordinals: list[int]) -> list[int]:
        """Return distinct slots for distinct (stratum, ordinal) pairs drawn from fills announced a little earlier.

        Where the stratum has shrunk since, another of its samples stands in, and another stratum's where none is left.
        """
        slots: list[int] = []
        late: list[int] = []
        for key, ordinal in zip(keys, ordinals, strict=True):
            members = self.strata.members(key)
            if ordinal < len(members):
                slots.append(members[ordinal])
            else:
                late.append(key)
        taken = set(slots)
        for key in late:
            free = [slot for slot in self.strata.members(key) if slot not in taken]
            free = free or [slot for slot in range(len(self)) if slot not in taken]
            slot = free[int(self._insertion.rng.random() * len(free))]
            taken.add(slot)
            slots.append(slot)
        return slots

    def state(self) -> BufferState:
        """What `load` needs to restore the buffer. Samples are read from the storage: true until the next insert."""
        insertion, count = self._insertion, len(self)

        def read(name: str, rows: np.ndarray) -> Tensor:
            tensor = self._store[name]
            part = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype)
            if len(rows):
                self.rows[name].take(rows, part)
            return part

        return BufferState(
            **self.counters(),
            inserted_at=self._inserted_at[:count].copy(),
            key=insertion.keys[:count].copy(),
            stratum=np.array(self.strata.keys, dtype=np.int64)[self.strata.of_slots] if count else _none(),
            layout=self.layout,
            read=read,
        )

    def cut(self, since: int = 0, *, aside: float = 0.25) -> Cut:
        """What is stored now, for another thread to read while this one goes on inserting; close it afterwards.

        Args:
            since: the clock of an earlier cut: only samples stored after it are read. 0: all.
            aside: share of the storage that may be copied aside at most, of what is overwritten before it was read.

        Raises RuntimeError while an earlier cut is open.
        """
        if self._cut is not None:
            raise RuntimeError("found a cut of the buffer still being read, expected it closed before the next one")
        self._cut = Cut(
            self.rows,
            {**self.counters(), "layout": self.layout},
            inserted_at=self._inserted_at[: len(self)],
            key=self._insertion.keys[: len(self)],
            since=since,
            most_bytes=int(aside * self.budget_bytes),
            done=self._cut_is_read,
        )
        return self._cut

    def _cut_is_read(self) -> None:
        self._cut = None

    def counters(self) -> dict[str, Any]:
        """The part of a state that does not grow with the number of samples."""
        insertion, strata = self._insertion, self.strata
        bounds = [insertion.bound_of(number) for number in range(len(strata))]
        return {
            "policy": self.policy,
            "identified": insertion.identified,
            "seen": self.seen,
            "clock": self._clock,
            "bound": insertion.bound,
            # what a larger buffer has to go on with; a full one of the same size has no use for it
            "rate": len(self) / self.seen if 0 < len(self) == self.capacity else insertion.rate,
            "salt": insertion.maker.salt,
            "rng": insertion.rng.bit_generator.state,
            "scans": dict(self.scans),
            "strata": np.stack([np.array(strata.keys, np.int64), strata.seen, np.array(bounds, np.int64)], 1),
        }

    def load(self, state: BufferState) -> None:
        """Restore a state. One with more samples than fit into the budget leaves those that this budget would have.

        Raises:
            ValueError: the buffer is not empty, or the policy of the state is another one that says nothing of this.
        """
        if self._clock or len(self):
            raise ValueError(f"found a buffer of {len(self)} samples, expected an empty one: make another to load into")
        if not _follows(state, self.policy):
            state = merge([state], self.policy)
        if state.layout is not None:
            self._allocate(state.layout)
            state = thin(state, self.capacity)
        if self.policy == "balanced":
            state = replace(state, bound=WHOLE)  # of a new stratum nothing was turned away yet
        self._restore_counters(state)
        if self.layout is None or not len(state):
            return
        slots = np.arange(len(state))
        block = max(1, _BLOCK // sum(self.layout.row_bytes.values()))
        for first in range(0, len(state), block):
            part = slots[first : first + block]
            for name, rows in self.rows.items():
                rows.put(part, state.read(name, part).contiguous(), np.arange(len(part)))
        self._inserted_at[slots] = state.inserted_at
        insertion = self._insertion
        insertion.keys[slots] = state.key
        self.strata.put(slots.tolist(), self.strata.numbers(state.stratum.tolist()))
        self._restore_bounds(state)

    def widen(self, dtypes: Mapping[str, torch.dtype]) -> None:
        """Hold fields that are stored in narrower types than these in types with room for both. Storage is made anew:
        for a buffer that nothing reads meanwhile, neither an exchange nor a cut."""
        layout = self.layout
        if layout is None or (wide := layout.widened(dtypes)) == layout:
            return
        state, scans = fitted(self.state(), wide), self.scans
        fresh = RehearsalBuffer(self.budget_bytes, policy=self.policy, device=self.device)
        fresh.load(state)
        vars(self).update(vars(fresh), scans=scans)

    def _restore_counters(self, state: BufferState) -> None:
        insertion = self._insertion
        insertion.seen, insertion.rate, self._clock = state.seen, state.rate, state.clock
        insertion.identified = state.identified
        self.scans |= state.scans
        if state.rng is not None:
            insertion.rng.bit_generator.state = dict(state.rng)
        # Keys that were made before must not be made again for other samples: a salt that differs in a few low bits
        # would give those of other numbers.
        other = insertion.maker.salt ^ (2 * state.clock + 1)
        insertion.maker.go_on(state.salt if state.salt is not None else int(keys_of(np.array([other]))[0]))
        for key, seen, _ in state.strata.tolist():
            (number,) = self.strata.numbers([key])
            self.strata.see(number, seen - self.strata.offered[number])
        self._restore_bounds(state)

    def _restore_bounds(self, state: BufferState) -> None:
        bounds = state.bounds()
        numbers = dict(zip(self.strata.keys, range(len(self.strata)), strict=True))
        self._insertion.restore({numbers[key]: bound for key, bound in bounds.items()}, state.bound)

    def _check(self, samples: Mapping[str, Tensor], stratum: Tensor) -> int:
        if stratum.dtype != torch.int64 or stratum.ndim != 1:
            raise ValueError(f"found strata {stratum.dtype} {tuple(stratum.shape)}, expected int64 (n,)")
        if not samples or STRATUM in samples:
            raise ValueError(f"found fields {sorted(samples)}, expected at least one, and none called {STRATUM!r}")
        count = len(stratum)
        for name, tensor in samples.items():
            if tensor.ndim == 0 or len(tensor) != count:
                raise ValueError(f"found {name!r} of shape {tuple(tensor.shape)}, expected {count} samples")
        if self.layout is not None:
            self.layout.check(samples)
            if len(samples) + 1 != len(self.rows):
                raise ValueError(f"found fields {sorted(samples)}; the buffer stores {self.layout}")
        return count

    def _allocate(self, layout: Layout) -> None:
        sample = sum(layout.row_bytes.values()) + BOOKKEEPING
        capacity = self.budget_bytes // sample
        if capacity == 0:
            raise ValueError(
                f"found samples of {sample} bytes ({layout}), larger than the budget of {self.budget_bytes} bytes: "
                "raise the budget"
            )
        empty = [name for name, size in layout.row_bytes.items() if size == 0]
        if empty:
            raise ValueError(f"found fields without elements: {empty}; leave them out")
        for name, shape, dtype in layout.fields:
            tensor = self._empty(capacity * layout.row_bytes[name]).view(dtype).view(capacity, *shape)
            self._store[name] = tensor
            self.rows[name] = Rows(tensor)
        self._inserted_at = np.zeros(capacity, dtype=np.int64)
        self._insertion.allocate(capacity)
        self.layout = layout
        self.capacity = capacity

    def _empty(self, size: int) -> Tensor:
        """Memory of so many bytes."""
        if self.device.type != "cpu":
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        # numpy asks the system for huge pages, torch does not: rows far apart are then found a tenth faster.
        return torch.from_numpy(np.empty(size, np.uint8))


def _identity(identity: Tensor, count: int) -> np.ndarray:
    if identity.dtype != torch.int64 or identity.shape != (count,):
        raise ValueError(f"found identities {identity.dtype} {tuple(identity.shape)}, expected int64 ({count},)")
    return identity.cpu().numpy()


def _follows(state: BufferState, policy: Policy) -> bool:
    """Whether a buffer of this policy can go on from the state as it is."""
    if policy == "reservoir":
        return state.policy == policy and set(state.bounds().values()) <= {state.bound}
    return policy == "replacement" or state.policy != "replacement"


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


__all__ = ["STRATUM", "Layout", "Policy", "RehearsalBuffer"]
