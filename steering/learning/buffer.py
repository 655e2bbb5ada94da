"""The local rehearsal buffer: a rank's bounded memory of what it has been offered.

Samples are mappings of named tensors in their native dtype, plus an integer stratum. Storage is allocated once, at the
first insert, for as many samples as the budget in bytes holds. What to keep is decided with a few integers per sample;
the samples themselves are copied as rows of bytes, straight to their slots. Policies: see insertion.
"""

from collections.abc import Mapping
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from steering.learning.buffer_state import BufferState
from steering.learning.insertion import Insertion, Policy
from steering.learning.rows import STRATUM, Layout, Rows
from steering.learning.strata import BYTES_PER_SLOT, Strata

BOOKKEEPING = BYTES_PER_SLOT + 8  # the last 8: when the slot was written


class RehearsalBuffer:
    """Bounded memory of one rank.

    Args:
        budget_bytes: what the stored samples and their bookkeeping (40 bytes each, the stratum included) may take.
        policy: what is kept, see the module's docstring.
        seed: of the decisions what to keep; give each rank its own.
        device: where samples are stored. Memory on the host is pinned where there is CUDA.
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
        self._store: dict[str, Tensor] = {}
        self._inserted_at = np.zeros(0, dtype=np.int64)
        self._clock = 0
        self._insertion = Insertion(policy, self.strata, seed=seed)

    def __len__(self) -> int:
        """Return the number of stored samples, which never falls. Slots 0 to len - 1 are filled."""
        return self.strata.slots

    @property
    def seen(self) -> int:
        """Samples offered so far."""
        return self._insertion.seen

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

    def insert(self, samples: Mapping[str, Tensor], stratum: Tensor) -> int:
        """Offer samples to the buffer.

        Args:
            samples: tensors (n, ...) of any dtype and device; names, shapes and dtypes stay those of the first insert.
            stratum: int64 (n,), any integers.

        Returns:
            How many of them were stored.

        Raises:
            ValueError: fields that differ from those stored, or one sample larger than the budget.
        """
        count = self._check(samples, stratum)
        if self.layout is None:
            self._allocate(Layout.of(samples))
        if count == 0:
            return 0
        slots, chosen = self._insertion.choose(self.strata.numbers(stratum.tolist()))
        if len(chosen):
            for name, rows in self.rows.items():
                rows.put(slots, (stratum if name == STRATUM else samples[name]).contiguous(), chosen)
            self._inserted_at[slots] = self._clock + 1 + chosen
        self._clock += count
        return len(chosen)

    def gather(self, slots: Tensor, out: Mapping[str, Tensor], start: int = 0) -> None:
        """Copy stored samples into rows start, start + 1, ... of `out`.

        Args:
            slots: int64 (n,) on the CPU, each below len(self).
            out: tensors (rows, ...) of the stored shapes and dtypes, contiguous, on any device; `stratum` may be among
                them, and names that are not stored are left alone.
            start: first row to write.

        Raises:
            IndexError: a slot that is not filled. ValueError: `out` does not fit.
        """
        low, high = (int(slots.min()), int(slots.max())) if len(slots) else (0, -1)
        if low < 0 or high >= len(self):
            raise IndexError(f"found slots {low} to {high}, expected 0 to {len(self) - 1}")
        self.gather_at(slots.numpy(), out, start)

    def gather_at(self, slots: np.ndarray, out: Mapping[str, Tensor], start: int = 0) -> None:
        """Do the same with slots as an array, int64 (n,), that are known to be filled."""
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

    def state(self, since: int = 0, *, copy: bool = True) -> BufferState:
        """Return what `load` needs to restore the buffer: CPU tensors and JSON-able scalars, nothing pickled.

        Args:
            since: the `clock` of an earlier state: only slots written after it are returned. 0: all of them.
            copy: False: tensors of a whole state may be views of the storage, true until the next insert.
        """
        insertion = self._insertion
        changed = np.flatnonzero(self._inserted_at[: len(self)] > since) if since else np.arange(len(self))
        slots = torch.from_numpy(changed)
        whole = len(changed) == len(self)
        state: BufferState = {
            "slot": slots,
            "inserted_at": torch.from_numpy(self._inserted_at[changed]),
            "strata": torch.from_numpy(np.stack([np.array(self.strata.keys, dtype=np.int64), self.strata.seen], 1)),
            "seen": self.seen,
            "clock": self._clock,
            "since": since,
            # what a larger buffer has to go on with; a full one of the same size has no use for it
            "rate": len(self) / self.seen if 0 < len(self) == self.capacity else insertion.rate,
            "rng": insertion.rng.bit_generator.state,
        }
        for name, tensor in self._store.items():
            if whole:
                part = tensor[: len(self)]
                state[f"field.{name}"] = part.clone().cpu() if copy else part.cpu()
            else:
                part = torch.empty((len(slots), *tensor.shape[1:]), dtype=tensor.dtype)
                if len(slots):
                    self.rows[name].take(changed, part)
                state[f"field.{name}"] = part
        return state

    def load(self, state: BufferState) -> None:
        """Restore a state, or bring a restored buffer forward by one that holds only what changed `since` then.

        A state with more samples than fit into the budget leaves a uniform random part of them.

        Raises:
            ValueError: the buffer is not empty, or not at the clock from which the changes were taken.
        """
        if state["since"] != self._clock and (state["since"] or self._clock):
            raise ValueError(
                f"found a buffer at clock {self._clock}, expected {state['since']} for this state: load a whole state "
                "into a new buffer, then the changes in their order"
            )
        self._restore_counters(state)
        fields = {name.removeprefix("field."): t for name, t in state.items() if name.startswith("field.")}
        if not fields:
            return
        if self.layout is None:
            self._allocate(Layout.of(fields))
        if Layout.of(fields) != self.layout:
            raise ValueError(f"found a state of {Layout.of(fields)}, expected {self.layout} as stored")
        slots, chosen = state["slot"].numpy(), np.arange(len(state["slot"]))
        if state["since"] == 0 and len(slots) > self.capacity:
            chosen = np.sort(self._insertion.rng.permutation(len(slots))[: self.capacity])
            slots = np.arange(self.capacity)
        for name, tensor in fields.items():
            self.rows[name].put(slots, tensor.contiguous(), chosen)
        self._inserted_at[slots] = state["inserted_at"].numpy()[chosen]
        self.strata.put(slots.tolist(), self.strata.numbers(fields[STRATUM][torch.from_numpy(chosen)].tolist()))

    def _restore_counters(self, state: BufferState) -> None:
        insertion = self._insertion
        insertion.seen, insertion.rate, self._clock = state["seen"], state["rate"], state["clock"]
        if state["rng"] is not None:
            insertion.rng.bit_generator.state = state["rng"]
        for key, seen in state["strata"].tolist():
            (number,) = self.strata.numbers([key])
            self.strata.see(number, seen - self.strata.offered[number])

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
        self.layout = layout
        self.capacity = self._insertion.capacity = capacity

    def _empty(self, size: int) -> Tensor:
        """Memory of so many bytes: of the GPU, or of the host, where a GPU's copies want it pinned."""
        if self.device.type != "cpu" or torch.cuda.is_available():
            return torch.empty(size, dtype=torch.uint8, device=self.device, pin_memory=self.device.type == "cpu")
        # numpy asks the system for huge pages, torch does not: rows far apart are then found a tenth faster.
        return torch.from_numpy(np.empty(size, np.uint8))


__all__ = ["STRATUM", "Layout", "Policy", "RehearsalBuffer"]
