"""The fast loop: predicts, judges and asks the policy, in one thread that owns all that it writes.

Nothing here takes longer because the scan has more frames or the canvas more pixels: what others want to know they
read from copies (`ScanReader`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from steering.campaign import Event, PredictionReady
from steering.inference.evaluate import HoldOut, note_errors
from steering.inference.frame_memory import FrameMemory
from steering.inference.intake import Batch, Inbox, Intake
from steering.inference.latency import Latency
from steering.inference.live import LiveImage
from steering.inference.policy_host import PolicyHost, ResumeState
from steering.inference.scans import Scans
from steering.inference.serving import Serving
from steering.inference.table import BULKY
from steering.ptychography import Verdict, far_field_residual, judge, patch_weight, poisson_floor, prior_residual
from steering.ptychography.device import place_in_words
from steering.records import Prediction

_LATER_S = 0.05
"""After which frames that wait to be predicted again ask again, where no chunk has come meanwhile."""
_REST = 9
"""So many times as long as frames were predicted again nothing is, while frames come."""


@dataclass(kw_only=True)
class FastLoop:
    """What the thread that predicts owns. Its methods are for that thread."""

    serving: Serving
    scans: Scans
    policy_host: PolicyHost
    intake: Intake
    inbox: Inbox
    memory: FrameMemory
    hold_out: HoldOut
    resume: ResumeState
    again: int
    """Most frames that are predicted again in one go."""
    mask: NDArray[np.bool_]
    probe: NDArray[np.complex64]
    emit: Callable[[Event], None]
    """Takes events, in any thread."""
    taken: Callable[[int], None]
    """Called with the number of chunks that have left the inbox."""
    later: Callable[[float], None]
    """Calls `revise` in this thread, so many seconds later."""
    beside: Callable[..., None]
    """Has a function called with these arguments in another thread: one such call after the other, in their order."""
    latency: Latency = field(default_factory=Latency)
    seconds: float = 0.0
    """Spent on predicting and judging."""
    network_cpu_s: float = 0.0
    """CPU seconds that this thread has spent in the network."""
    predicted: int = 0
    """Frames."""
    _predicting: bool = False
    _masked: tuple[str, int] = ("", 0)
    """The scan in which the mask changed last, and its first row after that."""
    _rest_until: float = 0.0
    """Until then nothing is predicted again."""
    _woken_at: float = 0.0
    """When `revise` will be called whether or not frames come."""
    _cost_s: float = 0.0
    """Of predicting one frame again, at most lately."""

    def predict_waiting(self) -> None:
        """Predict what waits in the inbox now."""
        left = len(self.inbox)
        self._predicting = True
        try:
            while left > 0:
                taken = self.inbox.take()
                left -= len(taken)
                if taken:
                    self._predict_taken(taken)
        finally:
            self._predicting = False
        live = self.scans.get()
        if live is not None and live.unrevised and time.perf_counter() >= self._rest_until:
            self.later(0.0)  # the moment after a frame is when the next one is farthest off

    def idle(self) -> float:
        """Seconds until the next frame is expected, infinite in a pause; 0 while one is being predicted or waits. For
        any thread."""
        return 0.0 if self._predicting or len(self.inbox) else self.inbox.time_left(time.perf_counter())

    def known(self, live: LiveImage, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n,) residual of rows by the version in service, NaN where it is not known for the mask of now. For any
        thread."""
        residual, version = live.frames.read("residual", "version", rows=rows)
        scan, first = self._masked
        here = (version == self.serving.version) & ((rows >= first) | (live.scan != scan))
        return np.where(here, residual, np.nan).astype(np.float32)

    def _predict_taken(self, taken: list[tuple[xr.Dataset, float]]) -> None:
        begun = time.perf_counter()
        self.taken(len(taken))
        live = self.scans.of_chunk(taken[0][0], self._weight)
        batch, mask, aside = self.intake.batch(taken, live, self.mask)
        for event in aside:
            self.emit(event)
        if batch is None:
            return
        if (mask & ~self.mask).any():
            self.mask, self._masked = mask, (live.scan, len(live.frames))
            self.serving.engine.serving.mask(mask)
        self._predict_batch(batch, live)
        now = time.perf_counter()
        self.latency.add(now - batch.arrived)
        self.seconds += now - begun
        self.predicted += len(batch.frame_id)
        if self.memory.due:
            self.memory.busy = True
            self.beside(self.memory.relieve, list(self.scans.images.values()))

    def _predict_batch(self, batch: Batch, live: LiveImage) -> None:
        ids, counts, where = batch.frame_id, batch.counts, batch.position
        patches, residual = self.predict(counts)
        prior = None
        if self.policy_host.wants_prior_residual:  # of the image as it is before these frames
            prior = prior_residual(live.stitcher, where, counts, self.probe, self.mask)
        offset = live.stitch(patches, where)
        verdict = self._judge(counts, residual, offset)
        prediction = Prediction(
            frame_id=ids,
            scan=live.scan,
            position=where,
            amplitude=np.abs(patches),
            phase=np.angle(patches),
            residual=residual,
            prior_residual=prior,
            poisson_floor=verdict.floor,
            offset=offset,
            model_version=np.full(len(ids), self.serving.version),
        )
        known = self.resume.first_version(live.scan, ids)
        asked = live.add(
            prediction,
            trust=verdict.trust,
            first_version=np.where(known < 0, prediction.model_version, known),
            patch=patches,
            counts=counts,
            held_out=self.hold_out.held_out(ids),
            withheld=self.hold_out.withheld(where),
            judged=self.hold_out.judged(ids, where),
            error=np.full(len(ids), np.nan, np.float32),
            acquired=batch.acquired,
        )
        if live.truth is not None:
            newest = np.arange(len(live.frames) - len(ids), len(live.frames))
            self.beside(note_errors, live, newest, patches.copy(), where)
        self.memory.took(asked)
        self.policy_host.ingest(prediction, live)
        new = known < 0
        if new.all():
            self._report(prediction, verdict)
        elif new.any():
            rows = prediction.rows(new)
            self._report(rows, self._judge(counts[new], rows.residual, rows.offset))

    def restore(self, live: LiveImage) -> None:
        """Make the image of a scan from the table that an earlier predictor has left, and go on with its policy.

        Frames whose patches are gone are predicted again; frames that were not reported yet are reported. Of a scan
        that is over only this is left to do.
        """
        if live.retired:
            self._report_rest(live)
            return
        table = live.frames
        live.served_by(self.serving.version)
        for block in range(len(table.blocks)):
            rows = np.arange(block * table.block_rows, min((block + 1) * table.block_rows, len(table)))
            bulky = [name for name in BULKY if table.kept(rows[:1], name).all()]
            if not bulky:
                continue  # nothing is left of them but their figures
            where, version = table.read("position", "version", rows=rows)
            if "patch" not in bulky:
                (counts,) = table.read("counts", rows=rows)
                patches, residual = self.predict(counts)
                patches = patches.copy()
                table.set(rows, **self._said(counts, residual, live.stitch(patches, where)))
            else:
                (patches,) = table.read("patch", rows=rows)
                live.stitch_again(patches, where, version == self.serving.version)
            prediction = self._restored(live, rows, patches)
            self.policy_host.ingest(prediction, live, int(rows[0]))
            self._report_late(live, rows, prediction)
        self.predicted += len(table)

    def _restored(self, live: LiveImage, rows: NDArray[np.int64], patches: NDArray) -> Prediction:
        names = ("frame_id", "position", "residual", "offset", "version")
        frame_id, position, residual, offset, version = live.frames.read(*names, rows=rows)
        floor = np.full(len(rows), np.nan)
        if live.frames.kept(rows[:1], "counts").all():
            (counts,) = live.frames.read("counts", rows=rows)
            floor = poisson_floor(counts, self.mask)
        return Prediction(
            frame_id=frame_id,
            scan=live.scan,
            position=position,
            amplitude=np.abs(patches),
            phase=np.angle(patches),
            residual=residual,
            prior_residual=np.full(len(rows), np.nan, np.float32) if self.policy_host.wants_prior_residual else None,
            poisson_floor=floor,
            offset=offset,
            model_version=version,
        )

    def _report_late(self, live: LiveImage, rows: NDArray[np.int64], prediction: Prediction) -> None:
        """Report what was predicted and not reported before the earlier predictor was lost."""
        late = self.resume.unheard(live.scan, prediction.frame_id)
        if late.any() and live.frames.kept(rows[:1], "counts").all():
            part = prediction.rows(late)
            (counts,) = live.frames.read("counts", rows=rows[late])
            self._report(part, self._judge(counts, part.residual, part.offset))

    def _report_rest(self, live: LiveImage) -> None:
        """Report what was predicted and not reported, without a verdict: no frame of it is predicted again."""
        frame_id, residual = live.frames.read("frame_id", "residual")
        late = self.resume.unheard(live.scan, frame_id)
        if late.any():
            self.emit(
                PredictionReady(
                    time=time.time(),
                    scan=live.scan,
                    frame_ids=tuple(frame_id[late].tolist()),
                    version=self.serving.version,
                    residual=float(np.median(residual[late])),
                )
            )

    def _judge(self, counts: NDArray, residual: NDArray, offset: NDArray) -> Verdict:
        """How far to believe predictions of the version in service."""
        return judge(counts, residual, offset, mask=self.mask, version=self.serving.described)

    def _report(self, prediction: Prediction, verdict: Verdict) -> None:
        self.emit(
            PredictionReady(
                time=time.time(),
                scan=prediction.scan,
                frame_ids=tuple(prediction.frame_id.tolist()),
                version=self.serving.version,
                residual=float(np.median(prediction.residual)),
                trust_by_residual=tuple(verdict.by_residual.tolist()),
                trust_by_offset=tuple(verdict.by_offset.tolist()),
                validation_frames=len(self.serving.described.validation_residuals),
                why_not=verdict.why_not,
            )
        )

    def _weight(self) -> NDArray[np.float32]:
        return patch_weight(self.probe, int(self.serving.engine.serving.network.hyperparameters["patch"]))

    def predict(self, counts: NDArray) -> tuple[NDArray, NDArray]:
        """(n, patch, patch) complex64, in memory that the next call overwrites, and (n,) far-field residual."""
        begun = time.thread_time()
        patches = self.serving.engine.predict(counts)
        self.network_cpu_s += time.thread_time() - begun
        return patches, far_field_residual(patches, counts, self.probe, self.mask, device=self.serving.engine.device)

    def swap(self) -> None:
        """Put what `Serving.make_ready` has accepted into service."""
        self.serving.swap(self.mask)
        self.probe = self.serving.engine.serving.probe
        live = self.scans.get()
        if live is not None:
            live.version_changed()
            self._rest_until = self._woken_at = 0.0
            self._wake(time.perf_counter(), 0.0)

    def revise(self) -> None:
        """The version in service looks at frames of which an older one made less than it should reach, and keeps what
        is better.

        A few at a time, newest first, and only while no new frame waits or is expected before these are done. While
        frames come, it rests for nine times as long as it works.
        """
        begun = time.perf_counter()
        live = self.scans.get()
        if live is None or not live.unrevised or begun < self._rest_until:
            return
        left = self.inbox.time_left(begun)
        most = self.again if self._cost_s * self.again <= left else int(left / self._cost_s)
        if len(self.inbox) or most < 1:
            self._wake(begun, _LATER_S)
            return
        rows = live.behind(self.serving.expected, most)
        if len(rows):
            self._revise(live, rows)
            took = time.perf_counter() - begun
            self._cost_s = max(took / len(rows), 0.9 * self._cost_s)
        now = time.perf_counter()
        rest = _REST * (now - begun) if np.isfinite(left) else 0.0
        self._rest_until = now + rest
        self._wake(now, rest)

    def _revise(self, live: LiveImage, rows: NDArray[np.int64]) -> None:
        try:
            counts, before = live.frames.read("counts", "residual", rows=rows)
            patches, residual = self.predict(counts)
            better = residual < before
            if better.any():
                rows, patches, counts, residual = rows[better], patches[better], counts[better], residual[better]
                offset = live.stitch_anew(rows, patches)
                live.frames.set(rows, patch=patches, **self._said(counts, residual, offset))
        except KeyError:  # another thread has just moved them out of memory
            return

    def _said(self, counts: NDArray, residual: NDArray, offset: NDArray) -> dict[str, NDArray]:
        """Columns of frames that the version in service has predicted again."""
        trust = self._judge(counts, residual, offset).trust
        return {
            "residual": residual,
            "offset": offset,
            "trust": trust,
            "version": np.full(len(residual), self.serving.version),
        }

    def _wake(self, now: float, seconds: float) -> None:
        if now >= self._woken_at:
            self._woken_at = now + seconds
            self.later(seconds)

    def figures(self, live: LiveImage | None) -> dict[str, Any]:
        """Counters and times; live: the image of the newest scan. Any thread may ask."""
        return {
            "frames_predicted": self.predicted,
            "frames_to_revise": 0 if live is None else live.unrevised,
            "version": self.serving.version,
            "predict_s": self.seconds,
            "latency_ms": {f"p{q}": 1e3 * self.latency.percentile(q) for q in (50, 99)},
            "latency_buckets": self.latency.buckets(),
            "latency_sum_s": self.latency.sum_s,
            "chunks_waiting": len(self.inbox),
            "backend": self.serving.engine.backend.name,
            "device": place_in_words(self.serving.engine.device),
            "backends": {name: trial.figures() for name, trial in self.serving.engine.trials.items()},
            "frames_out_of_order": self.intake.order.out_of_order,
            "frame_ids_missing": self.intake.order.missing,
            "network_cpu_s": self.network_cpu_s,
        }
