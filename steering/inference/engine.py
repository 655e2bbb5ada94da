"""The engine: two slots of one network, in the way that a short measurement found fastest on this machine."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from steering.inference.evaluate import patch_phase_error
from steering.inference.ways import REFERENCE, Slot, Way, compile_package, possible
from steering.models import Network
from steering.ptychography import Canvas, extract_patches, patch_weight, simulate
from steering.records import Field

logger = logging.getLogger(__name__)
MOST_WORSE = 1.02
"""Phase error of a way over that of plain float32, above which the way is not used."""
_STEPS = (2, 3)
"""Batches are filled up to 1 or to one of these times a power of two: kernels are made for each size that is met, which
takes as long as predicting twenty frames."""
_TRIAL_FRAMES = 16
_HOPELESS = 2.0
"""A way that takes so many times as long as the reference is not measured further."""


@dataclass
class Trial:
    """What the measurement found of one way."""

    frames_per_s: float = 0.0
    error_over_float32: float = float("nan")
    """Phase error on simulated frames of known truth, over that of plain float32."""
    refused: str = ""
    """Why it is not used; empty where it may be."""
    seconds: list[float] = field(default_factory=list, repr=False)
    """Of each batch."""

    def figures(self) -> dict[str, Any]:
        """As a summary tells it."""
        ratio = self.error_over_float32 if math.isfinite(self.error_over_float32) else None
        return {"frames_per_s": self.frames_per_s, "phase_error_over_float32": ratio, "refused": self.refused}


class Engine:
    """Runs the version in service, and makes the next one ready beside it.

    network: any version of the architecture, its optics set; the serving slot begins with it. frames: the largest
    batch. device: as torch names it. compiled: whether compiled ways and, where it is installed, ONNX Runtime may be
    tried, which takes minutes at the start. measure_s: seconds that the choice may take besides. ways: those to choose
    from; by default all that the machine may have.
    """

    def __init__(
        self,
        network: Network,
        *,
        frames: int = 64,
        device: str = "cpu",
        compiled: bool = False,
        measure_s: float = 0.5,
        ways: Sequence[Way] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._packages: Path | None = None
        self._template = network
        self.trials: dict[str, Trial] = {}
        wanted = possible(self.device, compiled=compiled) if ways is None else [REFERENCE, *ways]
        self.ways = list(dict.fromkeys(wanted))
        slots = self._candidates(self.ways)
        self.way = self._choose(slots, measure_s, None if ways is None else list(ways))
        self.serving = slots[self.way]
        self._spare = self.slot(self.way)
        window, patch = network.dials["window"], network.dials["patch"]
        pinned = self.device.type == "cuda"
        self._counts = torch.zeros(frames, window, window, pin_memory=pinned)
        self._patches = torch.zeros(frames, patch, patch, dtype=torch.complex64, pin_memory=pinned)
        self._sizes = sorted(
            {1, frames, *(n for step in _STEPS for k in range(frames.bit_length()) if (n := step << k) < frames)}
        )
        for size in self._sizes:  # kernels that are there before the first frame is
            self.predict(np.zeros((size, window, window), np.float32))

    @property
    def spare(self) -> Slot:
        """The slot that does not serve. It may be loaded and run in another thread than `predict`."""
        if self._spare.way != self.way:
            self._spare = self.slot(self.way)
        return self._spare

    def swap(self) -> None:
        """Put the spare slot into service: one assignment, for the thread that predicts."""
        self.serving, self._spare = self._spare, self.serving

    def predict(self, counts: NDArray) -> NDArray[np.complex64]:
        """Patches (n, patch, patch) of counts (n, window, window) by the version in service.

        Up to the largest batch they lie in the engine's own memory, which the next call overwrites; above it, in
        memory of their own.
        """
        most = len(self._counts)
        if len(counts) > most:
            return np.concatenate([self.predict(counts[i : i + most]).copy() for i in range(0, len(counts), most)])
        size = next(size for size in self._sizes if size >= len(counts))
        return run(self.serving, counts, self._counts[:size], self._patches)

    def slot(self, way: Way) -> Slot:
        """Another slot that runs in this way, holding the network that the engine was made with."""
        return Slot(self._template, way, self.device, self._package(way) if way.packaged else None)

    def go_without(self, way: Way, exact: Slot, reason: str) -> None:
        """Use the reference from now on: `exact`, which runs in that way, is the spare slot."""
        self._refuse(way, reason)
        self.way, self._spare = REFERENCE, exact

    def _package(self, way: Way) -> str:
        if self._packages is None:
            self._packages = Path(tempfile.mkdtemp(prefix="steering-compiled-"))
            weakref.finalize(self, shutil.rmtree, self._packages, ignore_errors=True)
        package = self._packages / f"{way.name}.{'onnx' if way.kind == 'onnx' else 'pt2'}"
        if not package.exists():
            compile_package(self._template, way, self.device, str(package))
        return str(package)

    def _candidates(self, ways: Sequence[Way]) -> dict[Way, Slot]:
        slots = {}
        for way in ways:
            self.trials[way.name] = Trial()
            try:
                slots[way] = self.slot(way)
            except Exception as error:  # a compiler or a driver that fails costs speed, not the run
                if way == REFERENCE:
                    raise
                self._refuse(way, f"it could not be made ready: {_first_line(error)}")
        return slots

    def _choose(self, slots: dict[Way, Slot], seconds: float, only: list[Way] | None) -> Way:
        """Time the ways in turns, on frames whose truth is known."""
        counts, truth, weight = _known_frames(self._template, _TRIAL_FRAMES)
        there = torch.from_numpy(counts).to(self.device)
        standard = float("nan")
        for way, slot in list(slots.items()):
            try:
                slot(there)
                patches = torch.polar(*slot(there)).cpu().numpy()
            except Exception as error:  # as above: an operator that this build of torch lacks
                if way == REFERENCE:
                    raise
                self._refuse(way, f"it could not run: {_first_line(error)}")
                del slots[way]
                continue
            found = float(patch_phase_error(patches, truth, weight).mean())
            standard = found if way == REFERENCE else standard
            ratio = found / max(standard, 1e-9)
            self.trials[way.name].error_over_float32 = ratio
            if not ratio <= MOST_WORSE:
                self._refuse(way, f"its phase error is {ratio:.3f} of plain float32's, at most {MOST_WORSE} expected")
        self._time(slots, there, seconds)
        allowed = [way for way in slots if not self.trials[way.name].refused and (only is None or way in only)]
        return max(allowed or [REFERENCE], key=lambda way: self.trials[way.name].frames_per_s)

    def _time(self, slots: dict[Way, Slot], counts: torch.Tensor, seconds: float) -> None:
        begun = time.perf_counter()
        turns = 0
        running = list(slots)
        while turns < 2 or time.perf_counter() - begun < seconds:
            for way in list(running):
                self.trials[way.name].seconds.append(timed(slots[way], counts))
                if min(self.trials[way.name].seconds) > _HOPELESS * min(self.trials[REFERENCE.name].seconds):
                    running.remove(way)
            turns += 1
        for way in slots:
            self.trials[way.name].frames_per_s = len(counts) / median(self.trials[way.name].seconds)

    def _refuse(self, way: Way, reason: str) -> None:
        self.trials[way.name].refused = reason
        logger.info("%s is not used: %s", way.name, reason)


def run(slot: Slot, counts: NDArray, frames: torch.Tensor, out: torch.Tensor) -> NDArray[np.complex64]:
    """Patches (n, patch, patch) of counts (n, window, window) in `out`, by way of `frames`: both on the host.

    What `frames` holds beyond n is predicted with them, and left.
    """
    n = len(counts)
    np.copyto(frames[:n].numpy(), counts, casting="unsafe")
    with torch.inference_mode():
        amplitude, phase = (each[:n] for each in slot(frames.to(slot.device, non_blocking=True)))
        if slot.device.type == "cpu":
            torch.polar(amplitude, phase, out=out[:n])
        else:
            out[:n].copy_(torch.polar(amplitude, phase))
    return out[:n].numpy()


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
    window, patch = network.dials["window"], network.dials["patch"]
    probe = network.optics.modes().cpu().numpy().copy()
    rng = np.random.default_rng(0)
    canvas = Canvas.around(Field(-window, window, -window, window), window)
    y, x = (np.arange(side) / (patch / 8) for side in canvas.shape)
    thing = np.exp((0.6j - 0.1) * (1 + np.sin(y)[:, None] * np.cos(x))).astype(np.complex64)
    where = rng.uniform(-window, window, (n, 2))
    counts = simulate(thing, probe, canvas, where)
    return counts, extract_patches(thing, canvas, where, patch), patch_weight(probe, patch)
