"""The engine: two slots of one network, on the backend that a short measurement found fastest on this machine."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steering.inference.backends import REFERENCE, Backend, Slot, make_package, possible
from steering.inference.evaluate import patch_phase_error
from steering.inference.transfer import Transfer
from steering.models import Network, is_split
from steering.ptychography import Canvas, extract_patches, patch_weight, simulate
from steering.ptychography.device import find_device
from steering.records import Field

logger = logging.getLogger(__name__)
MOST_WORSE = 1.02
"""Phase error of a backend over that of plain float32, above which the backend is not used."""
_STEPS = (2, 3)
"""Batches are filled up to 1 or to one of these times a power of two: kernels are made for each size that is met, which
takes as long as predicting twenty frames."""
_TRIAL_FRAMES = (1, 4, 16, 64)
"""Batch sizes that backends are timed with."""
_JUDGED = 16
"""Frames that a backend's errors are measured on."""
_HOPELESS = 2.0
"""A backend that takes so many times as long as the reference is not measured further."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """How frames come."""

    together: int = 16
    """Frames that are usually there to be predicted together."""
    frame_rate: float = 0.0
    """Frames per second; 0: not known."""


@dataclass
class Trial:
    """What the measurement found of one backend."""

    rates: dict[int, float] = field(default_factory=dict)
    """Frames per second by the number of frames that are run at a time."""
    error_over_float32: float = float("nan")
    """Phase error on simulated frames of known truth, over that of plain float32."""
    refused: str = ""
    """Why it is not used; empty where it may be."""
    seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list), repr=False)
    """Of each batch, by its size."""

    @property
    def frames_per_s(self) -> float:
        """At the best size; 0 where it was not measured."""
        return max(self.rates.values(), default=0.0)

    @property
    def piece(self) -> int | None:
        """Frames that are best run at a time: more of them no longer fit into the processor's caches."""
        return max(self.rates, key=lambda size: self.rates[size], default=None)

    def rate(self, frames: int) -> float:
        """Frames per second where so many come together; larger batches are cut into pieces."""
        return max((rate for size, rate in self.rates.items() if size <= frames), default=0.0)

    def figures(self) -> dict[str, Any]:
        """As a summary says it."""
        ratio = self.error_over_float32 if math.isfinite(self.error_over_float32) else None
        return {
            "frames_per_s": self.frames_per_s,
            "by_batch": {str(size): rate for size, rate in self.rates.items()},
            "phase_error_over_float32": ratio,
            "refused": self.refused,
        }


class Engine:
    """Runs the version in service, and makes the next one ready beside it.

    network: any version of the architecture, its optics set; the serving slot begins with it. frames: the largest
    batch. device: see `find_device`. compiled: whether compiled backends and, where it is installed, ONNX Runtime may
    be tried, which takes minutes at the start. stream: what is known of the frames to come. measure_s: seconds that
    the choice may take besides. backends: those to choose from; by default all that the machine may have.

    The fastest backend at the usual batch size is used. Where none keeps up with the stream at that size, frames queue
    up and batches fill: then it is the fastest at the largest.
    """

    def __init__(
        self,
        network: Network,
        *,
        frames: int = 64,
        device: str = "cpu",
        compiled: bool = False,
        stream: Stream | None = None,
        measure_s: float = 0.5,
        backends: Sequence[Backend] | None = None,
    ) -> None:
        self.device = find_device(device, local_rank=-1)
        self._packages: Path | None = None
        self._template = network
        self._stream = stream or Stream()
        self._trial_frames = [n for n in _TRIAL_FRAMES if n < frames] + [frames]
        self.trials: dict[str, Trial] = {}
        wanted = (
            possible(self.device, compiled=compiled, split=is_split(network))
            if backends is None
            else [REFERENCE, *backends]
        )
        self.backends = list(dict.fromkeys(wanted))
        slots = self._candidates(self.backends)
        self._measure(slots, measure_s)
        self.backend = self._choice(None if backends is None else list(backends))
        self.serving = slots[self.backend]
        self.serving.piece = self._piece(self.backend)
        self._spare = self.slot(self.backend)
        window, patch = network.hyperparameters["window"], network.hyperparameters["patch"]
        self._transfer = Transfer(self.device, frames=frames, window=window, patch=patch)
        self._sizes = sorted(
            {1, frames, *(n for step in _STEPS for k in range(frames.bit_length()) if (n := step << k) < frames)}
        )
        for size in self._sizes:  # kernels that are there before the first frame is
            self.predict(np.zeros((size, window, window), np.float32))

    @property
    def spare(self) -> Slot:
        """The slot that does not serve. It may be loaded and run in another thread than `predict`."""
        if self._spare.backend != self.backend:
            self._spare = self.slot(self.backend)
        return self._spare

    def swap(self) -> None:
        """Put the spare slot into service: one assignment, for the thread that predicts."""
        self.serving, self._spare = self._spare, self.serving

    def predict(self, counts: NDArray) -> NDArray[np.complex64]:
        """Patches (n, patch, patch) of counts (n, window, window) by the version in service.

        Up to the largest batch they lie in the engine's own memory, which the next call overwrites; above it, in
        memory of their own.
        """
        most = len(self._transfer)
        if len(counts) > most:
            return np.concatenate([self.predict(counts[i : i + most]).copy() for i in range(0, len(counts), most)])
        size = next(size for size in self._sizes if size >= len(counts))
        return self._transfer(self.serving, counts, size)

    def slot(self, backend: Backend) -> Slot:
        """Another slot that runs on this backend, holding the network that the engine was made with."""
        made = Slot(self._template, backend, self.device, self._package(backend) if backend.packaged else None)
        made.piece = self._piece(backend)
        return made

    def go_without(self, backend: Backend, exact: Slot, reason: str) -> None:
        """Use the reference from now on: `exact`, which runs on that backend, is the spare slot."""
        self._refuse(backend, reason)
        self.backend, self._spare = REFERENCE, exact

    def _package(self, backend: Backend) -> str:
        if self._packages is None:
            self._packages = Path(tempfile.mkdtemp(prefix="steering-compiled-"))
            weakref.finalize(self, shutil.rmtree, self._packages, ignore_errors=True)
        package = self._packages / f"{backend.name}.{'onnx' if backend.kind == 'onnx' else 'pt2'}"
        if not package.exists():
            make_package(self._template, backend, self.device, str(package))
        return str(package)

    def _candidates(self, backends: Sequence[Backend]) -> dict[Backend, Slot]:
        slots = {}
        for backend in backends:
            self.trials[backend.name] = Trial()
            try:
                slots[backend] = self.slot(backend)
            except Exception as error:  # a compiler or a driver that fails costs speed, not the run
                if backend == REFERENCE:
                    raise
                self._refuse(backend, f"it could not be made ready: {_first_line(error)}")
        return slots

    def _piece(self, backend: Backend) -> int | None:
        """A GPU has room for all frames at once."""
        return self.trials[backend.name].piece if self.device.type == "cpu" else None

    def _choice(self, only: list[Backend] | None) -> Backend:
        allowed = [b for b in self.backends if not self.trials[b.name].refused and (only is None or b in only)]
        together = self._stream.together
        best = max(allowed or [REFERENCE], key=lambda b: self.trials[b.name].rate(together))
        if self.trials[best.name].rate(together) < self._stream.frame_rate:
            best = max(allowed or [REFERENCE], key=lambda b: self.trials[b.name].frames_per_s)
        return best

    def _measure(self, slots: dict[Backend, Slot], seconds: float) -> None:
        """Try the backends on frames whose truth is known, and time them in turns."""
        counts, truth, weight = _known_frames(self._template, max(self._trial_frames))
        there = torch.from_numpy(counts).to(self.device)
        judged = slice(min(_JUDGED, len(counts)))
        standard = float("nan")
        for backend, slot in list(slots.items()):
            try:
                slot(there[judged])
                patches = torch.polar(*slot(there[judged])).cpu().numpy()
            except Exception as error:  # as above: an operator that this build of torch lacks
                if backend == REFERENCE:
                    raise
                self._refuse(backend, f"it could not run: {_first_line(error)}")
                del slots[backend]
                continue
            found = float(patch_phase_error(patches, truth[judged], weight).mean())
            standard = found if backend == REFERENCE else standard
            ratio = found / max(standard, 1e-9)
            self.trials[backend.name].error_over_float32 = ratio
            if not ratio <= MOST_WORSE:
                self._refuse(
                    backend, f"its phase error is {ratio:.3f} of plain float32's, at most {MOST_WORSE} expected"
                )
        self._time(slots, there, seconds)

    def _time(self, slots: dict[Backend, Slot], counts: torch.Tensor, seconds: float) -> None:
        begun = time.perf_counter()
        turns = 0
        running = [(backend, size) for size in self._trial_frames for backend in slots]
        while turns < 2 or time.perf_counter() - begun < seconds:
            for backend, size in list(running):
                if not turns:
                    slots[backend](counts[:size])  # kernels for this size are made
                times = self.trials[backend.name].seconds[size]
                times.append(timed(slots[backend], counts[:size]))
                if min(times) > _HOPELESS * min(self.trials[REFERENCE.name].seconds[size]):
                    running.remove((backend, size))
            turns += 1
        for backend in slots:
            trial = self.trials[backend.name]
            trial.rates = {size: size / median(times) for size, times in trial.seconds.items()}

    def _refuse(self, backend: Backend, reason: str) -> None:
        self.trials[backend.name].refused = reason
        logger.info("%s is not used: %s", backend.name, reason)


def timed(slot: Slot, counts: torch.Tensor) -> float:
    """Seconds that a slot takes for a batch (n, window, window) on its device."""
    begun = time.perf_counter()
    slot(counts)
    if slot.device.type == "cuda":
        torch.cuda.synchronize(slot.device)
    return time.perf_counter() - begun


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _known_frames(network: Network, n: int) -> tuple[NDArray, NDArray[np.complex64], NDArray[np.float32]]:
    """Frames (n, window, window) of a smooth object under the network's probe, its patches, and their weight."""
    window, patch = network.hyperparameters["window"], network.hyperparameters["patch"]
    probe = network.optics.modes().cpu().numpy().copy()
    rng = np.random.default_rng(0)
    canvas = Canvas.around(Field(-window, window, -window, window), window)
    y, x = (np.arange(side) / (patch / 8) for side in canvas.shape)
    thing = np.exp((0.6j - 0.1) * (1 + np.sin(y)[:, None] * np.cos(x))).astype(np.complex64)
    where = rng.uniform(-window, window, (n, 2))
    counts = simulate(thing, probe, canvas, where)
    return counts, extract_patches(thing, canvas, where, patch), patch_weight(probe, patch)
