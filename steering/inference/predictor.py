"""The predictor: the fast loop's one place. It predicts chunk by chunk, judges, keeps the live image, asks the policy.

One thread owns all of its state. The methods that others call are async: they answer while it predicts, and leave
their work at the end of that thread's queue.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from steering.campaign import DecisionSuggested, Event, PredictionReady
from steering.inference.evaluate import HoldOut, Score, patch_phase_error, score_patches
from steering.inference.live import LiveImage, Truth
from steering.models import ModelStore, Network
from steering.policies import Policy
from steering.ptychography import (
    Canvas,
    Refined,
    extract_patches,
    far_field_residual,
    patch_weight,
    phase_correlation,
    surprise,
)
from steering.records import Field, Geometry, Prediction, chunk_geometry, positions_px

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PredictorSettings:
    """The predictor's dials."""

    backlog: int = 64
    """Chunks that may wait for prediction; a source that sends more waits for its acknowledgement."""
    again: int = 16
    """Frames that are predicted again in one go when a newer model is in service."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelFrames:
    """What a label maker needs to know of a scan."""

    scan: str
    frame_id: NDArray[np.int64]
    counts: NDArray
    """(n, y, x)"""
    position: NDArray[np.float64]
    """(n, 2), object pixels."""
    held_out: NDArray[np.bool_]
    withheld: NDArray[np.bool_]
    """(n,) frames of a region that is kept from labels and training altogether."""
    mask: NDArray[np.bool_]
    probe: NDArray[np.complex64]
    canvas: Canvas
    refined_labels: Refined | None
    """What the last labels were cut from."""
    refined: Refined | None
    """The refined object that is shown: the same, but where frames are withheld from labels."""
    predicted: NDArray[np.complex64]
    """(Y, X) the network's own stitched image."""
    seen: NDArray[np.bool_]
    """(Y, X) where the network has said something."""


@dataclass
class Predictor:
    """Made on the driver as a plain description; `start` brings it to life where it is to run."""

    field: Field
    geometry: Geometry
    probe: NDArray[np.complex64]
    policy: Policy
    store: Path
    hold_out: HoldOut = dataclasses.field(default_factory=HoldOut)
    truths: Mapping[str, Truth] = dataclasses.field(default_factory=dict)
    """What is known of scans beforehand: used to report errors, never to predict."""
    settings: PredictorSettings = dataclasses.field(default_factory=PredictorSettings)

    async def start(self) -> None:
        """Load the newest model and be ready for frames."""
        torch.set_num_threads(1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predictor")
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._room = asyncio.Semaphore(self.settings.backlog)
        self._models = ModelStore(self.store)
        newest = self._models.newest()
        if newest is None:
            raise FileNotFoundError(f"found no model in {self.store}, expected version 0 before the first frame")
        self._version = newest
        self._network, self._expected = self._load(newest)
        self._canvas = Canvas.around(self.field.scaled(1 / self.geometry.object_pixel), self.geometry.shape[0])
        self._scans: dict[str, LiveImage] = {}
        self._scan: str | None = None
        self._mask = ~self.geometry.good()
        self._again_due = False
        self.latency: list[float] = []
        self.seconds = 0.0
        self.predicted = 0

    async def receive(self, chunk: xr.Dataset) -> None:
        """Take a chunk; returns (the acknowledgement) once it stands in the queue."""
        arrived = time.perf_counter()
        await self._room.acquire()
        self._thread.submit(self._guarded, self._predict_chunk, chunk, arrived)

    async def events(self) -> list[Event]:
        """What has happened since the last call; waits until there is something."""
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        for event in events:
            if isinstance(event, _Failed):
                raise event.error
        return events

    async def install(self, number: int) -> None:
        """Put a published version into service, between two frames."""
        # Reading happens beside the thread that predicts: frames do not wait for the disk.
        network, expected = await asyncio.to_thread(self._load, number)
        await self._do(self._swap, network, number, expected)

    async def suggest(self, n: int) -> DecisionSuggested:
        """Ask the policy for up to n positions."""
        decision = await self._do(self.policy.suggest, n)
        return DecisionSuggested(
            time=time.time(),
            positions=tuple((float(y), float(x)) for y, x in decision.positions),
            reasons=decision.reasons,
            dwell=None if decision.dwell is None else tuple(float(d) for d in decision.dwell),
            stop=decision.stop,
        )

    async def label_frames(self, scan: str, newest: int) -> LabelFrames | None:
        """The newest frames of a scan, with all that a label maker needs beside them; None once the scan is over, or
        before its first frame is predicted."""
        return await self._do(self._label_frames, scan, newest)

    async def take_refined(self, scan: str, labels: Refined, shown: Refined) -> None:
        """Keep what the labels of a scan were cut from, and the refined object to show beside the network's image."""
        await self._do(self._take_refined, scan, labels, shown)

    async def live(self, scan: str | None = None) -> xr.Dataset | None:
        """The live image of a scan, by default of the one being measured; None before the first frame."""
        return await self._do(self._live, scan)

    async def evaluate(self, scan: str, versions: tuple[int, ...]) -> dict[int, Score]:
        """How well model versions do on the frames of a scan that errors are reported from: the network's own patches,
        stitched. Empty where the truth is not known, or no such frame was measured."""
        return await self._do(self._evaluate, scan, versions)

    async def evaluate_refined(self, scan: str) -> Score | None:
        """How good the refined object of a scan is; None where the truth is not known or nothing was refined."""
        return await self._do(self._evaluate_refined, scan)

    async def versions_of(self, scan: str) -> tuple[int, int]:
        """The version in service when the scan's first frame came, and when its last one did."""
        first = self._scans[scan].frames["first_version"]
        return int(first[0]), int(first[-1])

    async def figures(self) -> dict[str, Any]:
        """What the predictor has to say in numbers."""
        live = self._scans.get(self._scan or "")
        residual = float(np.median(live.frames["residual"][-50:])) if live and len(live.frames) else None
        return {
            "frames_predicted": self.predicted,
            "version": self._version,
            "residual": residual,
            "predict_s": self.seconds,
            "latency_ms": {f"p{q}": 1e3 * float(np.percentile(self.latency or [np.nan], q)) for q in (50, 99)},
        }

    async def _do(self, work: Callable[..., T], *arguments: Any) -> T:
        return await self._loop.run_in_executor(self._thread, work, *arguments)

    def _load(self, number: int) -> tuple[Network, float]:
        """A version, and the residual that it should reach."""
        return self._models.load(number), self._models.describe(number).validation_residual or 0.0

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        """Nobody waits for a job that was only left in the queue: what it raises travels with the events."""
        try:
            work(*arguments)
        except Exception as error:  # handed on to whoever reads the events
            self._emit(_Failed(time=time.time(), error=error))

    def _emit(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    # What follows runs in the one thread that owns the state.

    def _predict_chunk(self, chunk: xr.Dataset, arrived: float) -> None:
        begun = time.perf_counter()
        self._loop.call_soon_threadsafe(self._room.release)
        if (chunk["mask"].values & ~self._mask).any():
            self._mask |= chunk["mask"].values
            self._network.optics.set(self.probe, self._mask)
        live = self._live_image(chunk)
        counts, where = chunk["counts"].values, positions_px(chunk)
        ids = chunk["frame"].values
        patches, residual = self._predict(counts)
        prediction = Prediction(
            frame_id=ids,
            scan=live.scan,
            position=where,
            amplitude=np.abs(patches),
            phase=np.angle(patches),
            residual=residual,
            surprise=surprise(live.stitcher, where, counts, self.probe, self._mask),  # before it is stitched
            offset=live.stitch(patches, where),
            model_version=np.full(len(ids), self._version),
        )
        live.add(
            prediction,
            patch=patches,
            counts=counts,
            held_out=self.hold_out.held_out(ids),
            withheld=self.hold_out.withheld(where),
            judged=self.hold_out.judged(ids, where),
            error=self._errors(live, patches, where),
            acquired=np.full(len(ids), float(chunk.attrs["acquired"])),
        )
        self.policy.ingest(prediction, live.view())
        now = time.perf_counter()
        self.latency += [now - arrived] * len(ids)
        self.seconds += now - begun
        self.predicted += len(ids)
        self._emit(
            PredictionReady(
                time=time.time(),
                scan=live.scan,
                frame_ids=tuple(ids.tolist()),
                version=self._version,
                residual=float(np.median(residual)),
            )
        )

    def _live_image(self, chunk: xr.Dataset) -> LiveImage:
        scan = str(chunk.attrs["scan"])
        if scan not in self._scans:
            if self._scan is not None:
                self._scans[self._scan].retire()
            size = int(self._network.dials["patch"])
            self._scans[scan] = LiveImage(
                scan, self._canvas, patch_weight(self.probe, size), chunk_geometry(chunk), self.truths.get(scan)
            )
            self._scan = scan
        return self._scans[scan]

    @torch.inference_mode()
    def _predict(self, counts: NDArray, network: Network | None = None) -> tuple[NDArray, NDArray]:
        """(n, patch, patch) complex64, and (n,) far-field residual."""
        amplitude, phase = (network or self._network)(torch.from_numpy(counts.astype(np.float32)))
        patches = torch.polar(amplitude, phase).numpy()
        return patches, far_field_residual(patches, counts, self.probe, self._mask)

    def _errors(self, live: LiveImage, patches: NDArray, where: NDArray) -> NDArray[np.float32]:
        if live.truth is None:
            return np.full(len(patches), np.nan, np.float32)
        wanted = extract_patches(live.truth, live.canvas, where, patches.shape[-1])
        known = (wanted != 0).all((1, 2))
        return np.where(known, patch_phase_error(patches, wanted, live.weight), np.nan).astype(np.float32)

    def _swap(self, network: Network, number: int, expected: float) -> None:
        network.optics.set(network.optics.modes().numpy(), self._mask)
        self._network, self._version, self._expected = network, number, expected
        self.probe = network.optics.modes().numpy()
        if self._scan is not None and not self._again_due:
            self._again_due = True
            self._thread.submit(self._guarded, self._predict_again)

    def _predict_again(self) -> None:
        """A newer model looks at frames of which an older one made less than it should reach, and keeps what is better.

        A few at a time, newest first, each time at the end of the queue: new frames go before old ones.
        """
        live = self._scans[self._scan or ""]
        rows = live.behind(self._version, self._expected, self.settings.again)
        self._again_due = len(rows) > 0
        if not len(rows):
            return
        patches, residual = self._predict(live.frames["counts"][rows])
        live.frames["looked"][rows] = self._version
        better = residual < live.frames["residual"][rows]
        live.improve(rows[better], patches[better], residual[better], self._version)
        self._thread.submit(self._guarded, self._predict_again)

    def _label_frames(self, scan: str, newest: int) -> LabelFrames | None:
        live = self._scans.get(scan)
        if live is None or live.retired:
            return None
        rows = slice(max(0, len(live.frames) - newest), None)
        predicted, seen = live.network_image()
        return LabelFrames(
            scan=scan,
            frame_id=live.frames.frame_id[rows],
            counts=live.frames["counts"][rows].copy(),
            position=live.frames["position"][rows].copy(),
            held_out=live.frames["held_out"][rows].copy(),
            withheld=live.frames["withheld"][rows].copy(),
            mask=self._mask.copy(),
            probe=self.probe,
            canvas=self._canvas,
            refined_labels=live.refined_labels,
            refined=live.refined,
            predicted=predicted,
            seen=seen,
        )

    def _take_refined(self, scan: str, labels: Refined, shown: Refined) -> None:
        live = self._scans[scan]
        live.refined_labels, live.refined = labels, shown

    def _live(self, scan: str | None) -> xr.Dataset | None:
        live = self._scans.get(scan or self._scan or "")
        return None if live is None or not len(live.frames) else live.dataset()

    def _evaluate(self, scan: str, versions: tuple[int, ...]) -> dict[int, Score]:
        live = self._scans[scan]
        judged = live.frames["judged"]
        if live.truth is None or not judged.any():
            return {}
        counts = live.frames["counts"] if live.retired else live.frames["counts"][judged]
        where, scores = live.frames["position"][judged], {}
        for version in versions:
            network = self._models.load(version)
            # Pixels that went bad since it was published must not count as light.
            network.optics.set(network.optics.modes().numpy(), self._mask)
            patches, _ = self._predict(counts, network)
            scores[version] = score_patches(patches, where, live)
        return scores

    def _evaluate_refined(self, scan: str) -> Score | None:
        live = self._scans[scan]
        if live.truth is None or live.refined is None:
            return None
        weight = (live.refined.covered & (live.truth != 0)).astype(np.float32)
        return Score(float("nan"), phase_correlation(live.refined.object, live.truth, weight=weight))


@dataclass(frozen=True, kw_only=True)
class _Failed(Event):
    error: Exception
