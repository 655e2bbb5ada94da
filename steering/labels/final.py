"""The last work on a scan that is over: its network image by one version, and its refined object to convergence.

What a scan leaves does not depend on how much time was left for refinement while it was measured: the object that was
shown by then is not gone on from.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steering.inference import FinalImage, ScanFrames, WholeScan, joined
from steering.labels.refinement import yield_to_frames
from steering.models import ModelStore, Network
from steering.ptychography import Refinement, RefineSettings
from steering.records import ModelVersion

ASIDE, ALONE = 19, 5
"""Niceness of the last work on a scan: while others are measured, and once the run waits for nothing else."""
_BLOCK_BYTES = 2**25
"""Counts that the predictor hands out at once."""


@dataclass(frozen=True, kw_only=True)
class FinalSettings:
    """The settings of the last refinement of a scan."""

    refine: RefineSettings = field(
        default_factory=lambda: RefineSettings(passes=40, alpha=0.1, least_gain=0.01, gain_passes=5)
    )
    """From an empty beam to convergence. The network's image is no start: what its patches do not know of each other's
    constant phase stays in the object as slow waves (on a recorded scan a phase correlation of 0.971 in place of
    0.988). Where the probe is improved too, take an alpha of 0.3: of that scan 0.1 reached 0.976 at most; where it is
    known, 0.1 was better or as good on three samples. passes=0: the object stays as the live image had it."""
    part_s: float = 1.0
    """Seconds of work after which labels that are due go before the rest of it."""

    @classmethod
    def with_probe(cls, *, positions_from_pass: int | None = None) -> FinalSettings:
        """Settings that improve the probe too, as one that was begun from frames, or recorded with another scan, needs.
        positions_from_pass: see `RefineSettings`."""
        better = replace(cls().refine, alpha=0.3, probe_from_pass=1, positions_from_pass=positions_from_pass)
        return cls(refine=better)

    def __post_init__(self) -> None:
        if not self.part_s > 0:
            raise ValueError(f"found part_s={self.part_s}, expected seconds above 0")


@dataclass(frozen=True, kw_only=True)
class FinalReport:
    """What came of it."""

    frames: int
    passes: int
    converged: bool
    residual: float
    """Median far-field residual of the refined object."""
    seconds: float
    """Of work."""


class FinalWork:
    """The work on one scan, part by part. Where the parts end changes nothing of its outcome."""

    def __init__(
        self,
        frames: ScanFrames,
        network: Network,
        version: ModelVersion,
        probe: NDArray[np.complex64],
        settings: FinalSettings,
    ) -> None:
        """network: with the weights and the optics of the version. probe: the source's, (mode, y, x)."""
        self._frames = frames
        self._probe = probe
        self._settings = settings
        self._predicted = WholeScan(frames, network, version)
        self._refinement: Refinement | None = None
        self._seconds = 0.0
        self._thread: ThreadPoolExecutor | None = None
        self._niceness = 0
        """Of that thread."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None}  # another worker starts its own

    @property
    def over(self) -> bool:
        """Nothing more is to be done."""
        return self._refinement is not None and self._refinement.over

    def go_on_at(self, niceness: int) -> None:
        """`go_on` in a thread of this niceness: of its own, since no thread may raise its priority again."""
        if self._thread is None or self._niceness != niceness:
            self._end_thread()
            self._thread = ThreadPoolExecutor(1, "last-work", initializer=yield_to_frames, initargs=(niceness,))
            self._niceness = niceness
        self._thread.submit(self.go_on).result()
        if self.over:
            self._end_thread()

    def _end_thread(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def go_on(self) -> None:
        """Work until it is over, or for about `part_s`, but for a batch at least."""
        begun = time.perf_counter()
        end, asked = begun + self._settings.part_s, itertools.count()

        def late() -> bool:
            return next(asked) > 0 and time.perf_counter() > end

        self._predicted.go_on(late)
        if self._predicted.over:
            self._refinement = self._refinement or self._begun()
            self._refinement.go_on(late)
        self._seconds += time.perf_counter() - begun

    def result(self) -> tuple[FinalImage, FinalReport]:
        """What the scan leaves, and the report of it; once it is over."""
        work = self._refinement
        if work is None:
            raise RuntimeError("found a scan whose frames are not all predicted yet, expected `over` first")
        report = FinalReport(
            frames=len(self._frames.counts),
            passes=work.passes,
            converged=work.converged,
            residual=work.residual,
            seconds=self._seconds,
        )
        how = "converged after" if work.converged else "not converged in"
        refinement = f"{how} {work.passes} passes over all frames"
        return FinalImage(network=self._predicted.result(), refined=work.result(), refinement=refinement), report

    def _begun(self) -> Refinement:
        frames, settings = self._frames, self._settings.refine
        # A probe that is improved starts as the source gives it, whatever labels have made of it by now.
        probe = self._predicted.probe if settings.probe_from_pass is None else self._probe
        return Refinement(frames.counts, frames.position, probe, frames.canvas, mask=frames.mask, settings=settings)


def begin(
    predictor: Any,
    scan: str,
    *,
    network: Network,
    store: Path,
    version: int,
    probe: NDArray[np.complex64],
    settings: FinalSettings,
) -> FinalWork:
    """Fetch the frames of a scan and get ready to work on them: a Dask task.

    predictor: its actor. network: one of the architecture in service. version: of the model, in this store. probe: the
    source's, (mode, y, x). Raises ValueError where not all frames of the scan are kept, or there are none.
    """
    yield_to_frames()
    frames = joined(_handed_out(predictor, scan))
    if frames is None:
        raise ValueError(f"found no frames of scan {scan!r} kept, expected them until its last work is done")
    models = ModelStore(store)
    network.load_state_dict(models.weights(version))
    return FinalWork(frames, network, models.describe(version), probe, settings)


def go_on(work: FinalWork, niceness: int) -> FinalWork:
    """A part of the work: a Dask task. It changes what it was given, which nobody uses again, and returns it."""
    work.go_on_at(niceness)
    return work


def hand_over(work: FinalWork, predictor: Any, scan: str) -> FinalReport:
    """Give the predictor, an actor, what the scan leaves: a Dask task."""
    image, report = work.result()
    predictor.conclude(scan, image).result()
    return report


def is_over(work: FinalWork) -> bool:
    """Whether `hand_over` is due: a Dask task."""
    return work.over


def _handed_out(predictor: Any, scan: str) -> Iterator[ScanFrames]:
    first, some = 0, 1
    while (part := predictor.scan_frames(scan, first, first + some).result()) is not None:
        yield part
        first += len(part.counts)
        some = max(1, _BLOCK_BYTES // part.counts[0].nbytes)
