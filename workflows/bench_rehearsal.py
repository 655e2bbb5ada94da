"""The time of a step of rehearsal, over that of its copies alone and beside other replay buffers.

A step inserts 14 samples of a minibatch of 56 and draws 7 into the augmented minibatch, which also receives the 56. The
buffer is full and its policy is `replacement`, which stores every candidate, so that the raw step moves the same bytes
to the same places: by plain row copies, or by index_copy_ and index_select on preallocated tensors, whichever is
faster. One torch thread; medians of repeats that take turns, each of a few calls in a row. With minibatches on a GPU
the buffer is in its memory, and once in the host's (`host` in the summary), where the raw step's storage is pinned.

    steering run workflows/bench_rehearsal.py [--payload NAME] [--repeats N] [--fraction F] [--device auto]
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steering.learning.buffer import BOOKKEEPING, RehearsalBuffer
from steering.learning.exchange import Exchange
from steering.ptychography.device import add_device, describe_device, find_device

if TYPE_CHECKING:
    from steering.runner.folder import RunFolder

B, C, R = 56, 14, 7
DRAW = 64
ROW = 8  # calls in a row that make one repeat
PTYCHO = {"amplitude": ((64, 64), torch.float32), "phase": ((64, 64), torch.float32)}
# fields, samples stored, strata
PAYLOADS: dict[str, tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], int, int]] = {
    "image": ({"image": ((3, 224, 224), torch.float32)}, 2000, 40),
    "ptycho": ({"diffraction": ((64, 64), torch.uint16), **PTYCHO}, 20000, 20),
    "ptycho_float32": ({"diffraction": ((64, 64), torch.float32), **PTYCHO}, 20000, 20),
}


class Ours:
    """The rehearsal buffer with the exchange of a single rank."""

    def __init__(
        self, fields: dict[str, Tensor], capacity: int, strata: int, storage: str | torch.device = "cpu"
    ) -> None:
        sample = sum(t[0].nbytes for t in fields.values()) + 8 + BOOKKEEPING
        device = next(iter(fields.values())).device
        self._strata = strata
        self.buffer = RehearsalBuffer(capacity * sample, policy="replacement", device=storage)
        while len(self.buffer) < capacity:
            self.insert(fields)
        self._exchange = Exchange(self.buffer, None, R, device=device)
        self._draw = Exchange(self.buffer, None, DRAW, device=device)
        self._steps = 0

    def insert(self, fields: dict[str, Tensor]) -> None:
        """Offer samples of random strata."""
        count = len(next(iter(fields.values())))
        self.buffer.insert(fields, torch.randint(0, self._strata, (count,)))

    def step(self, minibatch: dict[str, Tensor], candidates: dict[str, Tensor], out: dict[str, Tensor]) -> None:
        """One step, as in the module\'s docstring."""
        for name, tensor in minibatch.items():
            out[name][:B].copy_(tensor)
        self._steps += 1
        self._exchange.start(self._steps)
        self._exchange.finish(out, B)
        self.insert(candidates)

    def draw(self, out: dict[str, Tensor]) -> None:
        """Draw into the rows of `out`."""
        self._steps += 1
        self._draw.start(self._steps)
        self._draw.finish(out, 0)


class Raw:
    """Copies alone, to random slots of a storage where minibatches are, or in pinned memory of the host."""

    def __init__(self, storage: dict[str, Tensor], by_row: bool) -> None:
        self._storage, self._by_row = {name: _signed(t) for name, t in storage.items()}, by_row
        self._capacity = len(next(iter(storage.values())))

    def insert(self, fields: dict[str, Tensor]) -> None:
        """Offer samples of random strata."""
        count = len(next(iter(fields.values())))
        slots = self._slots(count)
        for name, tensor in fields.items():
            if tensor.device != self._storage[name].device:
                self._storage[name].index_copy_(0, slots, _signed(tensor).cpu())
            elif self._by_row:
                for row, slot in enumerate(slots.tolist()):
                    self._storage[name][slot].copy_(_signed(tensor)[row])
            else:
                self._storage[name].index_copy_(0, slots, _signed(tensor))

    def draw(self, out: dict[str, Tensor], first: int = 0, count: int = DRAW) -> None:
        """Draw into the rows of `out`."""
        slots = self._slots(count)
        for name, storage in self._storage.items():
            to = _signed(out[name])
            if to.device != storage.device:
                staging = torch.empty((count, *to.shape[1:]), dtype=to.dtype, pin_memory=True)
                torch.index_select(storage, 0, slots, out=staging)
                to[first : first + count].copy_(staging, non_blocking=True)
            elif self._by_row:
                for row, slot in enumerate(slots.tolist(), first):
                    to[row].copy_(storage[slot])
            else:
                torch.index_select(storage, 0, slots, out=to[first : first + count])

    def step(self, minibatch: dict[str, Tensor], candidates: dict[str, Tensor], out: dict[str, Tensor]) -> None:
        """One step, as in the module\'s docstring."""
        for name, tensor in minibatch.items():
            out[name][:B].copy_(tensor)
        self.draw(out, B, R)
        self.insert(candidates)

    def _slots(self, count: int) -> Tensor:
        device = next(iter(self._storage.values())).device
        return torch.randint(0, self._capacity, (count,), device="cpu" if self._by_row else device)


def _signed(tensor: Tensor) -> Tensor:
    """The same bits as int16 where they are uint16, which index_copy_ does not know."""
    return tensor.view(torch.int16) if tensor.dtype == torch.uint16 else tensor


class TorchRL:
    """torchrl's tensor storage with its random sampler and round-robin writer."""

    def __init__(self, fields: dict[str, Tensor], capacity: int, strata: int) -> None:
        from tensordict import TensorDict  # noqa: PLC0415 (the bench extra)
        from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer  # noqa: PLC0415

        self._dict = TensorDict
        self._strata = strata
        self._buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity), batch_size=R)
        for _ in range(-(-capacity // B)):
            self.insert(fields)

    def insert(self, fields: dict[str, Tensor]) -> None:
        """Offer samples of random strata."""
        count = len(next(iter(fields.values())))
        stratum = torch.randint(0, self._strata, (count,))
        self._buffer.extend(self._dict({**fields, "stratum": stratum}, batch_size=count))

    def draw(self, out: dict[str, Tensor], first: int = 0, count: int = DRAW) -> None:
        """Draw into the rows of `out`."""
        drawn = self._buffer.sample(count)
        for name, tensor in out.items():
            tensor[first : first + count].copy_(drawn[name])

    def step(self, minibatch: dict[str, Tensor], candidates: dict[str, Tensor], out: dict[str, Tensor]) -> None:
        """One step, as in the module\'s docstring."""
        for name, tensor in minibatch.items():
            out[name][:B].copy_(tensor)
        self.draw(out, B, R)
        self.insert(candidates)


class Avalanche:
    """Avalanche's reservoir: datasets of references, joined and cut at every update, read sample by sample."""

    def __init__(self, fields: dict[str, Tensor], capacity: int, strata: int) -> None:
        from avalanche.benchmarks.utils import AvalancheDataset  # noqa: PLC0415 (the bench extra)
        from avalanche.training.storage_policy import ReservoirSamplingBuffer  # noqa: PLC0415
        from torch.utils.data import TensorDataset  # noqa: PLC0415

        self._dataset = lambda tensors: AvalancheDataset([TensorDataset(*tensors)])
        self._buffer = ReservoirSamplingBuffer(max_size=capacity)
        for _ in range(-(-capacity // B)):
            self.insert(fields)

    def insert(self, fields: dict[str, Tensor]) -> None:
        """Offer samples of random strata."""
        self._buffer.update_from_dataset(self._dataset([tensor.clone() for tensor in fields.values()]))

    def draw(self, out: dict[str, Tensor], first: int = 0, count: int = DRAW) -> None:
        """Draw into the rows of `out`."""
        stored = self._buffer.buffer
        for row, index in enumerate(torch.randperm(len(stored))[:count].tolist(), first):
            for name, value in zip(out, stored[index], strict=False):
                out[name][row].copy_(value)

    def step(self, minibatch: dict[str, Tensor], candidates: dict[str, Tensor], out: dict[str, Tensor]) -> None:
        """One step, as in the module\'s docstring."""
        for name, tensor in minibatch.items():
            out[name][:B].copy_(tensor)
        self.draw(out, B, R)
        self.insert(candidates)


def measure(payload: str, repeats: int, fraction: float, device: torch.device) -> dict[str, Any]:
    """All figures of a payload; `fraction` of its samples are stored."""
    if device.type == "cuda":
        return _on_gpu(payload, repeats, fraction, device)
    shapes, stored, strata = PAYLOADS[payload]
    capacity = max(2 * DRAW, int(stored * fraction))
    minibatch = {name: torch.ones(B, *shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    out = {name: torch.zeros(DRAW, *shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    # Written once: memory that never was is one page of zeros, read from the cache.
    storage = {name: torch.ones(capacity, *shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    subjects: dict[str, Any] = {
        "ours": Ours(minibatch, capacity, strata),
        "rows": Raw(storage, True),
        "index": Raw(storage, False),
    }
    absent: dict[str, Any] = {}
    for name, peer in (("torchrl", TorchRL), ("avalanche", Avalanche)):
        try:
            subjects[name] = peer(minibatch, capacity, strata)
        except ImportError as error:
            absent[name] = {"absent": f"{error}: install the bench extra"}
        except (RuntimeError, NotImplementedError) as error:
            absent[name] = {"absent": f"cannot hold this payload: {error}"[:200]}
    seconds = _medians(subjects, minibatch, out, repeats)
    figures = {name: _figures(parts) for name, parts in seconds.items()}
    raw = min(figures["rows"]["step_us"], figures["index"]["step_us"])
    peers = {name: figures[name] for name in figures if name not in ("ours", "rows", "index")}
    for own in (figures["ours"], *peers.values()):
        own |= {"raw_step_us": raw, "step_over_raw": own["step_us"] / raw}
    return {**figures["ours"], "peers": peers | absent}


def _on_gpu(payload: str, repeats: int, fraction: float, device: torch.device) -> dict[str, Any]:
    """Of minibatches on a GPU: with the buffer in its memory, and with the buffer in the host's."""
    shapes, stored, strata = PAYLOADS[payload]
    capacity = max(2 * DRAW, int(stored * fraction))
    minibatch = {name: torch.ones(B, *shape).to(dtype).to(device) for name, (shape, dtype) in shapes.items()}
    out = {name: torch.zeros(DRAW, *shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
    found = {}
    for place in (device, torch.device("cpu")):
        there = {name: torch.ones(capacity, *shape).to(dtype) for name, (shape, dtype) in shapes.items()}
        there = {name: t.to(place) if place.type == "cuda" else t.pin_memory() for name, t in there.items()}
        subjects = {"ours": Ours(minibatch, capacity, strata, place), "raw": Raw(there, False)}
        figures = {name: _figures(parts) for name, parts in _medians(subjects, minibatch, out, repeats).items()}
        raw = figures["raw"]["step_us"]
        found[place.type] = {
            **figures["ours"],
            "raw_step_us": raw,
            "step_over_raw": figures["ours"]["step_us"] / raw,
        }
    return {**found["cuda"], "host": found["cpu"]}


def _figures(seconds: dict[str, float]) -> dict[str, float]:
    return {
        "step_us": seconds["step"] * 1e6,
        "insert_samples_per_s": C / seconds["insert"],
        "draw64_samples_per_s": DRAW / seconds["draw"],
    }


def _medians(
    subjects: dict[str, Any], minibatch: dict[str, Tensor], out: dict[str, Tensor], repeats: int
) -> dict[str, dict[str, float]]:
    candidates = {name: tensor[:C] for name, tensor in minibatch.items()}
    times: dict[str, dict[str, list[float]]] = {name: {"step": [], "insert": [], "draw": []} for name in subjects}
    for turn in range(repeats + 3):
        # In random order: who comes after whom decides what is left in the caches.
        for name, subject in random.sample(list(subjects.items()), len(subjects)):
            spent = {
                "step": _time(lambda subject=subject: subject.step(minibatch, candidates, out)),
                "insert": _time(lambda subject=subject: subject.insert(candidates)),
                "draw": _time(lambda subject=subject: subject.draw(out)),
            }
            for part, value in spent.items() if turn >= 3 else ():
                times[name][part].append(value)
    return {name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in times.items()}


def _time(act: Callable[[], None]) -> float:
    """Seconds of one call, the mean of a few in a row."""
    start = time.perf_counter()
    for _ in range(ROW):
        act()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / ROW


def main(folder: "RunFolder", arguments: list[str]) -> None:
    """Measure, and write the figures into the summary."""
    options = _options(arguments)
    torch.set_num_threads(1)
    device = find_device(options.device)
    for payload in options.payload or PAYLOADS:
        figures = measure(payload, options.repeats, options.fraction, device)
        folder.write_summary({"device": describe_device(device), payload: figures})
        print(payload, {name: value for name, value in figures.items() if name != "peers"})


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_rehearsal.py", description=__doc__.split("\n")[0])
    parser.add_argument("--payload", choices=list(PAYLOADS), action="append")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the samples stored; less for a quick run")
    add_device(parser)
    return parser.parse_args(arguments)
