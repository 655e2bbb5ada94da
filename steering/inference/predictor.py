"""The predictor: the fast loop's one place. It predicts chunk by chunk, judges, keeps the live image, asks the policy.

One thread owns all of its state. The methods that others call are async: they answer while it predicts, and leave
their work at the end of that thread's queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from steering.campaign import DecisionSuggested, Event, PredictionReady
from steering.inference.evaluate import HoldOut, Score, patch_errors, score_refined, score_versions
from steering.inference.intake import Batch, Inbox, Intake
from steering.inference.live import LiveImage, Truth
from steering.inference.policy_host import PolicyAnswer, PolicyHost, ResumeState
from steering.inference.scans import LabelFrames, Scans, frames_of, kept_rows
from steering.inference.serving import Canary, Installed, Serving
from steering.inference.settings import PredictorSettings
from steering.models import ModelStore
from steering.policies import Policy
from steering.ptychography import (
    Canvas,
    Refined,
    Verdict,
    far_field_residual,
    judge,
    patch_weight,
    prior_residual,
)
from steering.records import Field, Geometry, Prediction

T = TypeVar("T")
_SWITCH_S = 2e-4
_LATER_S = 0.01
"""When old frames that gave way to new ones ask again."""


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

    async def start(self, resume: ResumeState | None = None) -> None:
        """Load the newest model and be ready for frames.

        resume: where this one takes the place of another, what to go on from. The frames of that one come again;
        only what is not known of them is told.
        """
        torch.set_num_threads(1)
        # Each operator gives up the interpreter and asks for it again: Python in another thread of this process (a
        # version being made ready, messages) must hand it back at once, not after the usual 5 ms.
        self._switch_before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predictor")
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._room = asyncio.Semaphore(self.settings.backlog)
        self._inbox = Inbox(frames=self.settings.batch, gather_s=self.settings.gather_ms / 1e3)
        self._installing = asyncio.Lock()
        self._turn_due = False
        self._models = ModelStore(self.store)
        self._mask = ~self.geometry.good()
        self._resume = resume or ResumeState()
        self._serving = await asyncio.to_thread(Serving.begin, self._models, self.settings, self._resume.version)
        self._serving.engine.serving.mask(self._mask)
        if resume is not None:
            self.probe = self._serving.engine.serving.probe
        self._canvas = Canvas.around(self.field.scaled(1 / self.geometry.object_pixel), self.geometry.shape[0])
        late_bytes, over = self.settings.late_bytes, self._resume.over
        self._scans = Scans(self._canvas, self.geometry, self.truths, late_bytes=late_bytes, over=over)
        self._policy_host = PolicyHost(self.policy, self._scans.images, self._resume.answer)
        self._intake = Intake(self._canvas, self._resume)
        self._again_due = False
        self._at_rest = 0
        """Frames predicted when old ones were last looked at again."""
        self.latency: list[float] = []
        self.seconds = 0.0
        self.predicted = 0
        gc.collect()
        gc.freeze()  # a full collection that looked through all that is there now would stop the frames for 0.2 s

    async def receive(self, chunk: xr.Dataset) -> None:
        """Take a chunk; returns (the acknowledgement) once it is in the queue."""
        arrived = time.perf_counter()
        await self._room.acquire()
        self._inbox.put(chunk, arrived)
        # One turn takes all that waits: with one for each chunk a question would wait for those of all before its own.
        if not self._turn_due:
            self._turn_due = True
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
        A refused version leaves the one in service. Raises as `ModelStore.weights` does.
        """
        async with self._installing:
            frames = await self._do(self._canary) if canary and self.settings.canary else None
            # Loading and trying happen beside the thread that predicts: frames do not wait for them.
            installed = await asyncio.to_thread(
                self._serving.make_ready, number, frames, margin, lambda: len(self._inbox) > 0
            )
            if installed.accepted:
                await self._do(self._swap)
        return installed

    async def suggest(self, n: int, declined: Sequence[tuple[DecisionSuggested, str]] = ()) -> PolicyAnswer:
        """Tell the policy what of its decisions is not carried out, and why, and ask it for up to n positions."""
        return await self._do(self._policy_host.suggest, n, declined)

    async def label_frames(self, scan: str, newest: int) -> LabelFrames | None:
        """The newest frames of a scan and all that a label maker needs; None before the first, and once it is over."""
        return await self._do(self._label_frames, scan, newest)

    async def spare_frames(self, scan: str, newest: int) -> LabelFrames | None:
        """The same for the live image's refinement; None while any frame waits."""
        return await self._do(lambda: None if len(self._inbox) else self._label_frames(scan, newest))

    async def late_frames(self, scan: str, frame_id: NDArray[np.int64]) -> tuple[LabelFrames | None, int]:
        """Frames with these ids whose counts are kept, in order of arrival (None: no such scan); how many are not."""
        return await self._do(self._late_frames, scan, frame_id)

    async def take_refined(self, scan: str, labels: Refined, shown: Refined, residual: float) -> None:
        """Keep what the labels of a scan were cut from, their median residual, and the refined object to show."""
        await self._do(self._scans.images[scan].show_labelled, labels, shown, residual)

    async def take_live(self, scan: str, refined: Refined, refinements: int) -> bool:
        """Show an object refined on from the one of that many refinements; False where a newer one is shown by now."""
        return await self._do(self._scans.images[scan].show, refined, refinements)

    async def live(self, scan: str | None = None) -> xr.Dataset | None:
        """The live image of a scan, by default of the one being measured; None before the first frame."""
        return await self._do(self._live, scan)

    async def evaluate(self, scan: str, versions: tuple[int, ...]) -> dict[int, Score]:
        """How well versions do on the frames of a scan that errors are reported from; empty where there are none."""
        return await self._do(self._score, scan, versions)

    async def evaluate_refined(self, scan: str) -> Score | None:
        """How good the refined object of a scan is; None where the truth is not known or nothing was refined."""
        return await self._do(lambda: None if (live := self._scans.get(scan)) is None else score_refined(live))

    async def versions_of(self, scan: str) -> tuple[int, int]:
        """The version in service when a scan's first frame came, and its last one; now, where no frame is known."""
        return await self._do(self._versions_of, scan)

    async def is_over(self, scan: str) -> bool:
        """Whether nothing of a scan is predicted any more."""
        return await self._do(lambda: scan in self._scans.images and self._scans.images[scan].retired)

    async def close(self) -> None:
        """Give thread, memory and the process's settings back: the worker may serve other runs."""
        self._events.put_nowait(_Failed(time=time.time(), error=RuntimeError("the run has ended")))  # a call waits
        self._thread.shutdown(wait=False, cancel_futures=True)
        gc.unfreeze()
        sys.setswitchinterval(self._switch_before)

    async def figures(self) -> dict[str, Any]:
        """What the predictor has to say in numbers."""
        live = self._scans.get()
        residual = None if live is None else float(np.median(live.frames["residual"][-50:]))
        return {
            "frames_predicted": self.predicted,
            "version": self._serving.version,
            "residual": residual,
            "predict_s": self.seconds,
            "latency_ms": {f"p{q}": 1e3 * float(np.percentile(self.latency or [np.nan], q)) for q in (50, 99)},
            "backend": self._serving.engine.backend.name,
            "backends": {name: trial.figures() for name, trial in self._serving.engine.trials.items()},
            "frames_out_of_order": self._intake.register.out_of_order,
            "frame_ids_missing": self._intake.register.missing,
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
        self._turn_due = False  # what comes from here on has a turn of its own
        left = len(self._inbox)
        while left > 0:
            taken = self._inbox.take()
            left -= len(taken)
            self._predict_taken(taken)

    def _predict_taken(self, taken: list[tuple[xr.Dataset, float]]) -> None:
        begun = time.perf_counter()
        self._loop.call_soon_threadsafe(self._make_room, len(taken))
        live = self._scans.of_chunk(taken[0][0], self._weight)
        batch, mask, aside = self._intake.batch(taken, live, self._mask)
        for event in aside:
            self._emit(event)
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

    def _predict_batch(self, batch: Batch, live: LiveImage) -> None:
        ids, counts, where = batch.frame_id, batch.counts, batch.position
        patches, residual = self._predict(counts)
        prior = None
        if self._policy_host.wants_prior_residual:  # of the image as it is before these frames
            prior = prior_residual(live.stitcher, where, counts, self.probe, self._mask)
        prediction = Prediction(
            frame_id=ids,
            scan=live.scan,
            position=where,
            amplitude=np.abs(patches),
            phase=np.angle(patches),
            residual=residual,
            prior_residual=prior,
            offset=live.stitch(patches, where),
            model_version=np.full(len(ids), self._serving.version),
        )
        known = self._resume.first_version(live.scan, ids)
        verdict = self._judge(counts, residual, prediction.offset)
        live.add(
            prediction,
            trust=verdict.trust,
            first_version=np.where(known < 0, prediction.model_version, known),
            patch=patches,
            counts=counts,
            held_out=self.hold_out.held_out(ids),
            withheld=self.hold_out.withheld(where),
            judged=self.hold_out.judged(ids, where),
            error=patch_errors(live, patches, where),
            acquired=batch.acquired,
        )
        self._policy_host.ingest(prediction, live)
        new = known < 0
        if new.all():
            self._tell(prediction, verdict)
        elif new.any():
            rows = prediction.rows(new)
            self._tell(rows, self._judge(counts[new], rows.residual, rows.offset))

    def _judge(self, counts: NDArray, residual: NDArray, offset: NDArray) -> Verdict:
        """How far to believe predictions of the version in service. While what older versions said is being replaced,
        an offset to it tells more of them than of the frame."""
        offset = np.full(len(counts), np.nan) if self._again_due else offset
        return judge(counts, residual, offset, mask=self._mask, version=self._serving.described)

    def _tell(self, prediction: Prediction, verdict: Verdict) -> None:
        self._emit(
            PredictionReady(
                time=time.time(),
                scan=prediction.scan,
                frame_ids=tuple(prediction.frame_id.tolist()),
                version=self._serving.version,
                residual=float(np.median(prediction.residual)),
                trust_by_residual=tuple(verdict.by_residual.tolist()),
                trust_by_offset=tuple(verdict.by_offset.tolist()),
                validation_frames=len(self._serving.described.validation_residuals),
                why_not=verdict.why_not,
            )
        )

    def _weight(self) -> NDArray[np.float32]:
        return patch_weight(self.probe, int(self._serving.engine.serving.network.hyperparameters["patch"]))

    def _predict(self, counts: NDArray) -> tuple[NDArray, NDArray]:
        """(n, patch, patch) complex64, in memory that the next call overwrites, and (n,) far-field residual."""
        patches = self._serving.engine.predict(counts)
        return patches, far_field_residual(patches, counts, self.probe, self._mask)

    def _canary(self) -> Canary | None:
        """The newest frames of this scan that nobody was trained on."""
        live = self._scans.get()
        if live is None:
            return None
        rows = np.flatnonzero(live.frames["held_out"] | live.frames["withheld"])[-self.settings.canary :]
        return Canary(counts=live.frames["counts"][rows], mask=self._mask.copy())

    def _swap(self) -> None:
        self._serving.swap(self._mask)
        self.probe = self._serving.engine.serving.probe
        if self._scans.get() is not None and not self._again_due:
            self._again_due = True
            self._thread.submit(self._guarded, self._predict_again)

    def _predict_again(self) -> None:
        """A newer model looks at frames of which an older one made less than it should reach, and keeps what is better.

        A few at a time, newest first, and only while no new frame waits. While frames come, it rests for nine times as
        long as it works.
        """
        if len(self._inbox):
            self._loop.call_soon_threadsafe(self._loop.call_later, _LATER_S, self._look_again)
            return
        begun, predicted = time.perf_counter(), self.predicted
        live, version = self._scans.get(), self._serving.version
        rows = np.zeros(0, np.int64)
        if live is not None:
            rows = live.behind(version, self._serving.expected, self.settings.again)
        self._again_due = len(rows) > 0
        if live is None or not len(rows):
            return
        counts = live.frames["counts"][rows]
        patches, residual = self._predict(counts)
        live.frames["looked"][rows] = version
        better = residual < live.frames["residual"][rows]
        trust = self._judge(counts, residual, live.frames["offset"][rows]).trust
        live.improve(rows[better], patches[better], residual=residual[better], trust=trust[better], version=version)
        rest = 9 * (time.perf_counter() - begun) if predicted != self._at_rest else 0.0
        self._at_rest = predicted
        self._loop.call_soon_threadsafe(self._loop.call_later, rest, self._look_again)

    def _look_again(self) -> None:
        with contextlib.suppress(RuntimeError):  # the run has ended
            self._thread.submit(self._guarded, self._predict_again)

    def _score(self, scan: str, versions: tuple[int, ...]) -> dict[int, Score]:
        live = self._scans.get(scan)
        return {} if live is None else score_versions(self._models, versions, live, self._mask)

    def _versions_of(self, scan: str) -> tuple[int, int]:
        live, now = self._scans.get(scan), self._serving.version
        return (now, now) if live is None else live.first_versions

    def _label_frames(self, scan: str, newest: int) -> LabelFrames | None:
        live = self._scans.get(scan)
        if live is None or live.retired:
            return None
        rows = slice(max(0, len(live.frames) - newest), None)
        return self._frames_of(live, rows)

    def _late_frames(self, scan: str, frame_id: NDArray[np.int64]) -> tuple[LabelFrames | None, int]:
        live = self._scans.get(scan)
        if live is None:
            return None, 0
        rows, gone = kept_rows(live, frame_id)
        return self._frames_of(live, rows), gone

    def _frames_of(self, live: LiveImage, rows: slice | NDArray[np.int64]) -> LabelFrames:
        return frames_of(live, rows, version=self._serving.version, probe=self.probe, mask=self._mask)

    def _live(self, scan: str | None) -> xr.Dataset | None:
        live = self._scans.get(scan)
        return None if live is None else live.dataset()


@dataclass(frozen=True, kw_only=True)
class _Failed(Event):
    error: Exception
