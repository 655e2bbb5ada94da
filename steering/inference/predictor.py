"""The predictor: the fast loop's one place. It predicts chunk by chunk, judges, keeps the live image, asks the policy.

One thread owns all of its state. The methods that others call are async: they answer while it predicts, and leave
their work at the end of that thread's queue.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
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

from steering.campaign import DecisionSuggested, Event, FrameSetAside, PredictionReady
from steering.inference.batch import Batch, Inbox, make_batch
from steering.inference.evaluate import HoldOut, Score, patch_errors, score_refined, score_versions
from steering.inference.frames import LabelFrames, forget_beyond, frames_of
from steering.inference.live import LiveImage, Truth
from steering.inference.serving import Canary, Installed, Serving
from steering.inference.settings import PredictorSettings
from steering.inference.sift import Register
from steering.models import ModelStore
from steering.policies import Policy
from steering.ptychography import (
    Canvas,
    Refined,
    Verdict,
    far_field_residual,
    judge,
    patch_weight,
    surprise,
)
from steering.records import Field, Geometry, Prediction, chunk_geometry

T = TypeVar("T")
_SWITCH_S = 2e-4


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
        # Each operator gives up the interpreter and asks for it again: Python in another thread of this process (a
        # version being made ready, messages) must hand it back at once, not after the usual 5 ms.
        sys.setswitchinterval(_SWITCH_S)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predictor")
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._room = asyncio.Semaphore(self.settings.backlog)
        self._inbox = Inbox(frames=self.settings.batch, gather_s=self.settings.gather_ms / 1e3)
        self._installing = asyncio.Lock()
        self._models = ModelStore(self.store)
        self._mask = ~self.geometry.good()
        self._serving = await asyncio.to_thread(Serving.newest, self._models, self.settings)
        self._serving.engine.serving.mask(self._mask)
        self._canvas = Canvas.around(self.field.scaled(1 / self.geometry.object_pixel), self.geometry.shape[0])
        self._scans: dict[str, LiveImage] = {}
        self._scan: str | None = None
        self._register = Register()
        self._installs: list[Installed] = []
        self._again_due = False
        self._at_rest = 0
        """Frames predicted when old ones were last looked at again."""
        self.latency: list[float] = []
        self.seconds = 0.0
        self.predicted = 0

    async def receive(self, chunk: xr.Dataset) -> None:
        """Take a chunk; returns (the acknowledgement) once it stands in the queue."""
        arrived = time.perf_counter()
        await self._room.acquire()
        self._inbox.put(chunk, arrived)
        self._thread.submit(self._guarded, self._predict_waiting)

    async def events(self) -> list[Event]:
        """What has happened since the last call; waits until there is something."""
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        for event in events:
            if isinstance(event, _Failed):
                raise event.error
        return events

    async def install(self, number: int, *, canary: bool = True, margin: float | None = None) -> Installed:
        """Put a published version into service, between two frames, if it does no worse on held-out frames.

        canary: whether that is asked; not where a person wants an older version back. margin: see Serving.make_ready.
        A version that is refused leaves the one in service where it is. Raises as `ModelStore.weights` does.
        """
        async with self._installing:
            frames = await self._do(self._canary) if canary and self.settings.canary else None
            # Loading and trying happen beside the thread that predicts: frames do not wait for them.
            installed = await asyncio.to_thread(self._serving.make_ready, number, frames, margin)
            if installed.accepted:
                await self._do(self._swap)
            self._installs.append(installed)
        return installed

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

    async def spare_frames(self, scan: str, newest: int) -> LabelFrames | None:
        """The same for the refinement of the live image, which has time only while no frame waits: else None."""
        return await self._do(lambda: None if len(self._inbox) else self._label_frames(scan, newest))

    async def late_frames(self, scan: str, frame_id: NDArray[np.int64]) -> tuple[LabelFrames | None, int]:
        """Those of the frames with these ids whose counts are still kept, and how many are known but no longer kept.

        None for a scan that is not known. In the order of arrival.
        """
        return await self._do(self._late_frames, scan, frame_id)

    async def take_refined(self, scan: str, labels: Refined, shown: Refined, residual: float) -> None:
        """Keep what the labels of a scan were cut from, their median residual, and the refined object to show."""
        await self._do(self._scans[scan].show_labelled, labels, shown, residual)

    async def take_live(self, scan: str, refined: Refined, refinements: int) -> bool:
        """Show an object refined on from the one of that many refinements; False, and nothing is done, where a newer
        one is shown by now."""
        return await self._do(self._scans[scan].show, refined, refinements)

    async def live(self, scan: str | None = None) -> xr.Dataset | None:
        """The live image of a scan, by default of the one being measured; None before the first frame."""
        return await self._do(self._live, scan)

    async def evaluate(self, scan: str, versions: tuple[int, ...]) -> dict[int, Score]:
        """How well model versions do on the frames of a scan that errors are reported from: the network's own patches,
        stitched. Empty where the truth is not known, or no such frame was measured."""
        return await self._do(score_versions, self._models, versions, self._scans[scan], self._mask)

    async def evaluate_refined(self, scan: str) -> Score | None:
        """How good the refined object of a scan is; None where the truth is not known or nothing was refined."""
        return await self._do(score_refined, self._scans[scan])

    async def versions_of(self, scan: str) -> tuple[int, int]:
        """The version in service when the scan's first frame came, and when its last one did."""
        frames = self._scans[scan].frames
        if not len(frames):
            return self._serving.version, self._serving.version
        return int(frames["first_version"][0]), int(frames["first_version"][-1])

    async def figures(self) -> dict[str, Any]:
        """What the predictor has to say in numbers."""
        live = self._scans.get(self._scan or "")
        residual = float(np.median(live.frames["residual"][-50:])) if live and len(live.frames) else None
        return {
            "frames_predicted": self.predicted,
            "version": self._serving.version,
            "residual": residual,
            "predict_s": self.seconds,
            "latency_ms": {f"p{q}": 1e3 * float(np.percentile(self.latency or [np.nan], q)) for q in (50, 99)},
            "way": self._serving.engine.way.name,
            "ways": {name: trial.figures() for name, trial in self._serving.engine.trials.items()},
            "versions_refused": sum(not installed.accepted for installed in self._installs),
            "frames_set_aside": dict(self._register.aside),
            "frames_out_of_order": self._register.out_of_order,
            "frame_ids_missing": self._register.missing,
        }

    async def _do(self, work: Callable[..., T], *arguments: Any) -> T:
        return await self._loop.run_in_executor(self._thread, work, *arguments)

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        """Nobody waits for a job that was only left in the queue: what it raises travels with the events."""
        try:
            work(*arguments)
        except Exception as error:  # handed on to whoever reads the events
            self._emit(_Failed(time=time.time(), error=error))

    def _emit(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    # What follows runs in the one thread that owns the state.

    def _predict_waiting(self) -> None:
        begun = time.perf_counter()
        taken = self._inbox.take()
        if not taken:
            return
        self._loop.call_soon_threadsafe(self._make_room, len(taken))
        live = self._live_image(taken[0][0])
        batch, mask = self._sifted(taken, live)
        if batch is None:
            return
        if (mask & ~self._mask).any():
            self._mask = mask
            self._serving.engine.serving.mask(mask)
        self._predict_batch(batch, live)
        now = time.perf_counter()
        self.latency += (now - batch.arrived).tolist()
        self.seconds += now - begun
        self.predicted += len(batch.frame_id)

    def _make_room(self, chunks: int) -> None:
        for _ in range(chunks):
            self._room.release()

    def _sifted(self, taken: list[tuple[xr.Dataset, float]], live: LiveImage) -> tuple[Batch | None, NDArray[np.bool_]]:
        """What can be used of chunks, and the mask then; what cannot is counted and told."""
        if live.retired:
            batch, mask = None, self._mask
            aside = {"a scan that is over": tuple(i for chunk, _ in taken for i in chunk["frame"].values.tolist())}
        else:
            batch, mask, aside = make_batch(taken, known=live.frames.row, mask=self._mask, canvas=self._canvas)
        used = np.zeros(0, np.int64) if batch is None else batch.frame_id
        self._register.note(live.scan, used, aside)
        for reason, ids in aside.items():
            self._emit(FrameSetAside(time=time.time(), scan=live.scan, frame_ids=ids, reason=reason))
        return batch, mask

    def _predict_batch(self, batch: Batch, live: LiveImage) -> None:
        ids, counts, where = batch.frame_id, batch.counts, batch.position
        patches, residual = self._predict(counts)
        foretold = None
        if getattr(self.policy, "foretold", False):  # of the image as it is before these frames
            foretold = surprise(live.stitcher, where, counts, self.probe, self._mask)
        prediction = Prediction(
            frame_id=ids,
            scan=live.scan,
            position=where,
            amplitude=np.abs(patches),
            phase=np.angle(patches),
            residual=residual,
            surprise=foretold,
            offset=live.stitch(patches, where),
            model_version=np.full(len(ids), self._serving.version),
        )
        live.add(
            prediction,
            patch=patches,
            counts=counts,
            held_out=self.hold_out.held_out(ids),
            withheld=self.hold_out.withheld(where),
            judged=self.hold_out.judged(ids, where),
            error=patch_errors(live, patches, where),
            acquired=batch.acquired,
        )
        self.policy.ingest(prediction, live.view())
        verdict = self._verdict(prediction, counts)
        self._emit(
            PredictionReady(
                time=time.time(),
                scan=live.scan,
                frame_ids=tuple(ids.tolist()),
                version=self._serving.version,
                residual=float(np.median(residual)),
                trust_by_residual=tuple(verdict.by_residual.tolist()),
                trust_by_offset=tuple(verdict.by_offset.tolist()),
                validation_frames=len(self._serving.described.validation_residuals),
                why_not=verdict.why_not,
            )
        )

    def _verdict(self, prediction: Prediction, counts: NDArray) -> Verdict:
        """How far to believe a prediction. While what older versions said is being replaced, an offset to it tells
        more of them than of the frame."""
        offset = np.full(len(counts), np.nan) if self._again_due else prediction.offset
        return judge(counts, prediction.residual, offset, mask=self._mask, version=self._serving.described)

    def _live_image(self, chunk: xr.Dataset) -> LiveImage:
        scan = str(chunk.attrs["scan"])
        if scan not in self._scans:
            if self._scan is not None:
                self._scans[self._scan].retire()
                forget_beyond(self._scans.values(), self.settings.late_bytes)
            patch = int(self._serving.engine.serving.network.dials["patch"])
            geometry = chunk_geometry(chunk)
            self._scans[scan] = LiveImage(
                scan,
                self._canvas,
                patch_weight(self.probe, patch),
                geometry if geometry.shape == self.geometry.shape else self.geometry,
                self.truths.get(scan),
            )
            self._scan = scan
        return self._scans[scan]

    def _predict(self, counts: NDArray) -> tuple[NDArray, NDArray]:
        """(n, patch, patch) complex64, in memory that the next call overwrites, and (n,) far-field residual."""
        patches = self._serving.engine.predict(counts)
        return patches, far_field_residual(patches, counts, self.probe, self._mask)

    def _canary(self) -> Canary | None:
        """The newest frames of this scan that nobody was trained on."""
        live = self._scans.get(self._scan or "")
        if live is None or not len(live.frames):
            return None
        rows = np.flatnonzero(live.frames["held_out"] | live.frames["withheld"])[-self.settings.canary :]
        return Canary(counts=live.frames["counts"][rows], mask=self._mask.copy())

    def _swap(self) -> None:
        self._serving.swap(self._mask)
        self.probe = self._serving.engine.serving.probe
        if self._scan is not None and not self._again_due:
            self._again_due = True
            self._thread.submit(self._guarded, self._predict_again)

    def _predict_again(self) -> None:
        """A newer model looks at frames of which an older one made less than it should reach, and keeps what is better.

        A few at a time, newest first, each time at the end of the queue: new frames go before old ones. While frames
        come, it rests for four times as long as it works.
        """
        begun, predicted = time.perf_counter(), self.predicted
        live = self._scans[self._scan or ""]
        version = self._serving.version
        if not len(live.frames):
            self._again_due = False
            return
        rows = live.behind(version, self._serving.expected, self.settings.again)
        self._again_due = len(rows) > 0
        if not len(rows):
            return
        patches, residual = self._predict(live.frames["counts"][rows])
        live.frames["looked"][rows] = version
        better = residual < live.frames["residual"][rows]
        live.improve(rows[better], patches[better], residual[better], version)
        rest = 4 * (time.perf_counter() - begun) if predicted != self._at_rest else 0.0
        self._at_rest = predicted
        self._loop.call_soon_threadsafe(self._loop.call_later, rest, self._look_again)

    def _look_again(self) -> None:
        self._thread.submit(self._guarded, self._predict_again)

    def _label_frames(self, scan: str, newest: int) -> LabelFrames | None:
        live = self._scans.get(scan)
        if live is None or live.retired or not len(live.frames):
            return None
        rows = slice(max(0, len(live.frames) - newest), None)
        return frames_of(live, rows, version=self._serving.version, probe=self.probe, mask=self._mask)

    def _late_frames(self, scan: str, frame_id: NDArray[np.int64]) -> tuple[LabelFrames | None, int]:
        live = self._scans.get(scan)
        if live is None or not len(live.frames):
            return None, 0
        known = sorted(live.frames.row[frame] for frame in set(frame_id.tolist()) & live.frames.row.keys())
        known, gone = (known, 0) if not live.forgotten else ([], len(known))
        rows = np.array(known, np.int64)
        return frames_of(live, rows, version=self._serving.version, probe=self.probe, mask=self._mask), gone

    def _live(self, scan: str | None) -> xr.Dataset | None:
        live = self._scans.get(scan or self._scan or "")
        return None if live is None or not len(live.frames) else live.dataset()


@dataclass(frozen=True, kw_only=True)
class _Failed(Event):
    error: Exception
