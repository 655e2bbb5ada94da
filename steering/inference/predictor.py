"""The predictor: the fast loop's one place. It predicts chunk by chunk, judges, keeps the live image, asks the policy.

One thread predicts and owns what it writes (`FastLoop`). The methods that others call are async and answer while it
predicts: what they want to know is read by other threads, once all that was acknowledged before is predicted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from steering.campaign import Event
from steering.inference.answers import Failed, PolicyAnswer
from steering.inference.evaluate import HoldOut, Score, score_refined, score_versions
from steering.inference.event_queue import EventQueue
from steering.inference.fast_loop import FastLoop
from steering.inference.frame_memory import FrameMemory
from steering.inference.intake import Inbox, Intake
from steering.inference.live import LiveImage, Truth
from steering.inference.policy_host import PolicyHost, ResumeState
from steering.inference.policy_replay import DeclinedPart
from steering.inference.process import quicken, settle, slacken
from steering.inference.saved_scans import SavedScans
from steering.inference.scans import LabelFrames, Scans, frames_of, kept_rows, never_trained, newest_rows
from steering.inference.serving import Canary, Installed, Serving
from steering.inference.settings import PredictorSettings
from steering.inference.small_image import ImageChange
from steering.inference.whole_scan import FinalImage, ScanFrames
from steering.models import ModelStore, Network
from steering.policies import Policy
from steering.ptychography import Canvas, Refined, patch_weight
from steering.records import Field, Geometry
from steering.records.plain import plain, whole

T = TypeVar("T")
_FULL_S = 0.01
"""Between two looks whether there is room in memory again."""


@dataclass
class Predictor:
    """Made on the driver as a plain description; `start` brings it to life, with `fast` and `scans` in its process."""

    field: Field
    geometry: Geometry
    probe: NDArray[np.complex64]
    policy: Policy
    store: Path
    """Where the model versions are; frames that leave memory go to the folder `frames` beside it."""
    hold_out: HoldOut = dataclasses.field(default_factory=HoldOut)
    truths: Mapping[str, Truth] = dataclasses.field(default_factory=dict)
    """What is known of scans beforehand: used to report errors, never to predict."""
    settings: PredictorSettings = dataclasses.field(default_factory=PredictorSettings)
    network: type[Network] | None = None
    """Class of the versions in the store; None: one of our own, by its name."""
    frame_rate: float = 0.0
    """Frames per second that are expected; the backend is chosen for it. 0: not known."""
    _closed: bool = dataclasses.field(default=True, init=False)

    async def start(self, resume: ResumeState | None = None) -> None:
        """Load the newest model and be ready for frames.

        resume: where this one takes the place of another, what to go on from. The frames of that one come again;
        only results that are not known yet are reported.
        """
        torch.set_num_threads(self.settings.threads)
        quicken()
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="predictor")
        self._readers = ThreadPoolExecutor(3, thread_name_prefix="reader")
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="mover")
        self._loop = asyncio.get_running_loop()
        self._events = EventQueue[Event](heard=False)
        self._room = asyncio.Semaphore(self.settings.backlog)
        self._installing = asyncio.Lock()
        self._saved_scans = SavedScans()
        self._turn_due = False
        self._models = ModelStore(self.store)
        self.fast = await asyncio.to_thread(self._assembled, resume or ResumeState(), resume is not None)
        settle()

    def _assembled(self, resume: ResumeState, resumed: bool) -> FastLoop:
        settings, mask = self.settings, ~self.geometry.good()
        serving = Serving.begin(
            self._models, settings, resume.version, network=self.network, frame_rate=self.frame_rate
        )
        serving.engine.serving.mask(mask)
        canvas = Canvas.around(self.field.scaled(1 / self.geometry.object_pixel), self.geometry.shape[0])
        self._memory = FrameMemory(settings.memory_bytes, Path(self.store).parent / "frames", keep=settings.keep_frames)
        self.scans = Scans(
            canvas,
            self.geometry,
            self.truths,
            over=resume.over,
            begun=lambda live: self._move(self._memory.prepare, live),
            retired=self._retired,
        )
        images, share, saved = self.scans.images, settings.policy_share, resume.saved
        weight = patch_weight(
            serving.engine.serving.probe, int(serving.engine.serving.network.hyperparameters["patch"])
        )
        if saved is not None:
            for part in saved.part["scans"]:
                self.scans.restore(saved.folder, part, weight, self._saved_scans, self._memory)
                self._mover.submit(_nothing).result()  # what is over leaves memory before more is read
            mask = mask | whole(saved.part["mask"])
            serving.engine.serving.mask(mask)
        fast = FastLoop(
            serving=serving,
            scans=self.scans,
            policy_host=PolicyHost(
                self.policy,
                images,
                resume.answer,
                share=share,
                saved=None if saved is None else saved.policy,
                answered=resume.answered,
            ),
            intake=Intake(canvas, resume),
            inbox=Inbox(frames=settings.batch, gather_s=settings.gather_ms / 1e3),
            memory=self._memory,
            hold_out=self.hold_out,
            resume=resume,
            again=settings.again,
            mask=mask,
            probe=serving.engine.serving.probe if resumed else self.probe,
            emit=self._emit,
            taken=lambda chunks: self._call(self._make_room, chunks),
            later=lambda seconds: self._call(self._loop.call_later, seconds, self._revise),
            beside=self._move,
        )
        for live in list(images.values()):
            fast.restore(live)
        return fast

    async def checkpoint(self, folder: Path, tag: str) -> dict[str, Any]:
        """Write the scans into a folder that holds those of earlier calls; the thread that predicts does not stop.

        tag: begins the names of new files, and no earlier call had it. Returns the part of a checkpoint, in JSON's
        types, from which another predictor goes on (see `ResumeState`): all frames that were acknowledged before this
        call are in it. Raises OSError.
        """
        policy = await self._do(self.fast.policy_host.state)
        await self._moved()
        scans = await self._read(self._saved_scans.write, folder, self.scans.images.copy(), tag)
        return {
            "version": self.fast.serving.version,
            "mask": plain(self.fast.mask),
            "policy": policy,
            "scans": scans,
            "bytes": self._saved_scans.bytes,
        }

    async def receive(self, chunk: xr.Dataset) -> None:
        """Take a chunk; returns (the acknowledgement) once it is in the queue."""
        arrived = time.perf_counter()
        await self._room.acquire()
        await self._events.room()
        while self._memory.full:
            await asyncio.sleep(_FULL_S)
        self.fast.inbox.put(chunk, arrived)
        # One turn takes all that waits: with one for each chunk a question would wait for those of all before its own.
        if not self._turn_due:
            self._turn_due = True
            self._thread.submit(self._guarded, self._predict_waiting)

    async def events(self) -> list[Event]:
        """What has happened since the last call; waits until there is something."""
        events = await self._events.take()
        for event in events:
            if isinstance(event, Failed):
                raise event.error
        return events

    async def install(self, number: int, *, canary: bool = True, margin: float | None = None) -> Installed:
        """Put a published version into service, between two frames, if it does no worse on held-out frames.

        canary: whether that is asked; not where a person wants an older version back. margin: see Serving.make_ready.
        A refused version leaves the one in service. Raises as `ModelStore.weights` does.
        """
        async with self._installing:
            frames = await self._read(self._canary, self.settings.canary if canary else 0)
            # Loading and trying happen beside the thread that predicts: frames do not wait for them.
            installed = await asyncio.to_thread(self.fast.serving.make_ready, number, frames, margin, self.fast.idle)
            if installed.accepted:
                await self._do(self.fast.swap)
        return installed

    async def suggest(
        self, n: int, declined: Sequence[DeclinedPart] = (), ended: str = "", *, action: int = 0
    ) -> PolicyAnswer:
        """Ask the policy for up to n positions. declined: what of its earlier decisions is not carried out, each with
        the reason, which it hears first. ended: see `AskPolicy`. action: see `PolicyHost.suggest`."""
        return await self._do(partial(self.fast.policy_host.suggest, action=action), n, declined, ended)

    async def label_frames(self, scan: str, newest: int) -> LabelFrames | None:
        """The newest frames of a scan, with all that a label maker needs beside them; None once the scan is over, or
        before its first frame is predicted."""
        return await self._read(self._label_frames, scan, newest)

    async def spare_frames(self, scan: str, newest: int) -> LabelFrames | None:
        """The same for the refinement of the live image, which has time only while no frame waits: else None."""
        if await self._do(self.fast.inbox.__len__):
            return None
        return await self._reading(self._label_frames, scan, newest)

    async def late_frames(self, scan: str, frame_id: NDArray[np.int64]) -> tuple[LabelFrames | None, int]:
        """Those of the frames with these ids whose counts are still kept, in memory or on disk, in order of arrival,
        and how many are known but no longer kept. None for a scan that is not known."""
        return await self._read(self._late_frames, scan, frame_id)

    async def scan_frames(self, scan: str, first: int, last: int) -> ScanFrames | None:
        """Frames of a scan, over or not, see Scans.between. Raises ValueError."""
        return await self._read(lambda: self.scans.between(scan, first, last, self.fast.mask))

    async def conclude(self, scan: str, final: FinalImage | None) -> None:
        """Nothing more comes of a scan. final: what it leaves, in place of what there is; None: that stays."""
        await self._do(self.scans.retire, scan)
        if (live := self.scans.get(scan)) is not None:
            await self._loop.run_in_executor(self._mover, self._memory.conclude, live, final)

    async def take_refined(self, scan: str, labels: Refined, shown: Refined, canvas: Canvas, residual: float) -> None:
        """Keep what the labels of a scan were cut from, their median residual, and the refined object to show, both of
        the part of the scan's canvas that `LabelFrames` has named."""
        self.scans.images[scan].show_labelled(labels, shown, canvas, residual)

    async def take_live(self, scan: str, refined: Refined, canvas: Canvas, refinements: int) -> bool:
        """Show an object refined on from the one of so many refinements, of that part; False where a newer one is."""
        return self.scans.images[scan].show(refined, canvas, refinements)

    async def live(self, scan: str | None = None, region: tuple[slice, slice] | None = None) -> xr.Dataset | None:
        """The live image of a scan, by default of the one being measured, at most 1024 x 1024 pixels, and its newest
        frames; None before the first frame. See `ScanReader.picture`."""
        reader = await self._read(self.scans.reader, scan)
        return None if reader is None else await self._reading(reader.picture, region)

    async def change(self, known: tuple[str, int, int] | None) -> ImageChange | None:
        """What has changed of the image of the scan being measured, made small, see `ScanReader.change`."""
        reader = self.scans.reader()
        return None if reader is None else await self._reading(reader.change, known, self.fast.idle)

    async def dataset(self, scan: str) -> xr.Dataset | None:
        """The image of a scan at full resolution and all its frames: what object.zarr holds. None before the first
        frame."""
        reader = await self._read(self.scans.reader, scan)
        await self._moved()
        return None if reader is None else await self._reading(reader.dataset)

    async def evaluate(self, scan: str, versions: tuple[int, ...]) -> dict[int, Score]:
        """How well model versions do on the frames of a scan that errors are reported from: the network's own patches,
        stitched. Empty where no such frame was measured."""
        return await self._read(self._score, scan, versions)

    async def evaluate_refined(self, scan: str) -> Score | None:
        """How good the refined object of a scan is; None where the truth is not known or nothing was refined."""
        return await self._read(lambda: None if (live := self.scans.get(scan)) is None else score_refined(live))

    async def versions_of(self, scan: str) -> tuple[int, int]:
        """The version in service when the scan's first frame came, and when its last one did: that in service now for
        a scan of which no frame is known."""
        return await self._read(self._versions_of, scan)

    async def is_over(self, scan: str) -> bool:
        """Whether nothing of a scan is predicted any more."""
        return await self._read(lambda: scan in self.scans.images and self.scans.images[scan].retired)

    async def is_concluded(self, scan: str) -> bool | None:
        """Whether what a scan leaves is there, see `conclude`; None where no frame of it is known."""
        return await self._read(lambda: None if (live := self.scans.get(scan)) is None else live.concluded)

    async def close(self) -> None:
        """Give threads, memory and the process's settings back: the worker may serve other runs."""
        self._closed = True
        self._events.put(Failed(time=time.time(), error=RuntimeError("the run has ended")))  # a call waits
        self._events.close()
        for pool in (self._thread, self._readers, self._mover):
            pool.shutdown(wait=False, cancel_futures=True)
        slacken()

    async def forgotten(self) -> None:
        """Nobody holds this predictor any more: its runner was lost, and has left calls open, which would keep it."""
        if not self._closed:
            await self.close()
            await asyncio.to_thread(self._thread.shutdown)
            await asyncio.to_thread(self._mover.shutdown)
            del self.fast, self.scans, self._memory

    async def figures(self, ask: bool = True) -> dict[str, Any]:
        """Counters, times, percentiles, the backend, memory. ask: the thread that predicts for its CPU time, too."""
        cpu_s = {"fast_thread_cpu_s": await self._do(time.thread_time)} if ask else {}
        return await self._reading(self._figures) | cpu_s

    async def _do(self, work: Callable[..., T], *arguments: Any) -> T:
        """Have the thread that predicts do something, after all that it has to do already."""
        return await self._loop.run_in_executor(self._thread, work, *arguments)

    async def _read(self, work: Callable[..., T], *arguments: Any) -> T:
        """Have another thread read something, once all that was acknowledged before this is predicted."""
        await self._do(_nothing)
        return await self._reading(work, *arguments)

    async def _reading(self, work: Callable[..., T], *arguments: Any) -> T:
        return await self._loop.run_in_executor(self._readers, work, *arguments)

    async def _moved(self) -> None:
        """Returns once all that was begun beside the thread that predicts is done."""
        await self._loop.run_in_executor(self._mover, _nothing)

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run a job that nobody waits for; an exception that it raises is handed to whoever reads the events."""
        try:
            work(*arguments)
        except Exception as error:  # handed on to whoever reads the events
            self._emit(Failed(time=time.time(), error=error))

    def _emit(self, event: Event) -> None:
        self._call(self._events.put, event)

    def _call(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Call something in the event loop, from any thread."""
        self._loop.call_soon_threadsafe(work, *arguments)

    def _move(self, work: Callable[..., None], *arguments: Any) -> None:
        self._mover.submit(self._guarded, work, *arguments)

    def _predict_waiting(self) -> None:
        self._turn_due = False  # what comes from here on has a turn of its own
        self.fast.predict_waiting()

    def _revise(self) -> None:
        if not self._closed:  # a timer set before the end comes after it
            self._thread.submit(self._guarded, self.fast.revise)

    def _make_room(self, chunks: int) -> None:
        for _ in range(chunks):
            self._room.release()

    def _retired(self, live: LiveImage) -> None:
        reader = self.scans.reader(live.scan)
        if reader is not None:
            self._move(reader.let_go)
        self._move(self._memory.retire, live)
        self._move(self._memory.relieve, list(self.scans.images.values()))

    # What follows runs in the threads that read.

    def _canary(self, most: int) -> Canary | None:
        """The newest frames of this scan that nobody was trained on, up to so many."""
        live = self.scans.get()
        if live is None:
            return None
        fast, rows = self.fast, never_trained(live, most)
        (counts,) = live.frames.read("counts", rows=rows)
        return Canary(counts=counts, mask=fast.mask, known=fast.known(live, rows))

    def _score(self, scan: str, versions: tuple[int, ...]) -> dict[int, Score]:
        live = self.scans.get(scan)
        return {} if live is None else score_versions(self._models, versions, live, self.fast.mask, self.network)

    def _versions_of(self, scan: str) -> tuple[int, int]:
        live, now = self.scans.get(scan), self.fast.serving.version
        return (now, now) if live is None else live.first_versions

    def _label_frames(self, scan: str, newest: int) -> LabelFrames | None:
        live = self.scans.get(scan)
        return None if live is None or live.retired else self._frames_of(scan, newest_rows(live, newest))

    def _late_frames(self, scan: str, frame_id: NDArray[np.int64]) -> tuple[LabelFrames | None, int]:
        live = self.scans.get(scan)
        if live is None:
            return None, 0
        rows, gone = kept_rows(live, frame_id)
        return self._frames_of(scan, rows), gone

    def _frames_of(self, scan: str, rows: NDArray[np.int64]) -> LabelFrames | None:
        reader, fast = self.scans.reader(scan), self.fast
        if reader is None:
            return None
        return frames_of(reader, rows, version=fast.serving.version, probe=fast.probe, mask=fast.mask)

    def _figures(self) -> dict[str, Any]:
        held = {"held_bytes": self._memory.held, "moved_bytes": self._memory.written}
        return {**self.fast.figures(self.scans.get()), "memory": held, "events_waited": self._events.waited}


def _nothing() -> None:
    """A job without work: when it is done, everything queued before it is done."""
