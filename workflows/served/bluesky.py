"""The simulated beamline behind bluesky: a real RunEngine with ophyd-async devices runs `steered_scan` for each sample.

The detector writes HDF5 and says so in documents; motors are ophyd-async's simulated ones. Whatever it is asked to
measure comes from the embedded beamline, so that its frames are those of the other protocols.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from bluesky import RunEngine
from bluesky.utils import RunEngineInterrupted, TransitionError
from numpy.typing import NDArray
from ophyd_async.core import (
    DetectorAcquireLogic,
    DetectorDataLogic,
    DetectorTriggerLogic,
    StandardDetector,
    StreamableDataProvider,
    StreamResourceDataProvider,
    StreamResourceInfo,
    init_devices,
    soft_signal_r_and_setter,
)
from ophyd_async.sim import SimMotor

from served.faults import Faults, Sent
from steering import Decision, SimulatedBeamline
from steering.sources.bluesky_plan import CampaignConnection, steered_scan

DATA = "/entry/data/data"
UNIT, PER_METRE = "um", 1e6


class Camera(StandardDetector):
    """A detector that writes what `measure` returns into files of a folder."""

    def __init__(
        self,
        folder: Path,
        motors: tuple[SimMotor, SimMotor],
        measure: Callable[[float, float], NDArray],
        shape: tuple[int, int],
    ) -> None:
        """measure: the frame (y, x) at a position of the motors; it may take its time."""
        writer = _Writer(folder, motors, measure, shape)
        self.add_detector_logics(_Trigger(), writer, _Data(writer))
        super().__init__(name="")


class _Trigger(DetectorTriggerLogic):
    async def prepare_internal(self, num: int, livetime: float, deadtime: float) -> None:
        """Nothing: `measure` takes the time."""


class _Writer(DetectorAcquireLogic):
    def __init__(self, folder: Path, motors, measure, shape: tuple[int, int]) -> None:  # noqa: ANN001 - as of Camera
        self.folder, self.shape = folder, shape
        self._motors, self._measure = motors, measure
        self.written, self.set_written = soft_signal_r_and_setter(int)
        self.file: h5py.File | None = None
        self._task: asyncio.Task | None = None
        self._files = 0

    def open(self) -> Path:
        """A new file."""
        path = self.folder / f"frames-{self._files}.h5"
        self._files += 1
        self.file = h5py.File(path, "w", libver="latest")
        rows = {"chunks": (1, *self.shape), "maxshape": (None, *self.shape), "dtype": np.uint16}
        self.data = self.file.create_dataset(DATA, (0, *self.shape), **rows, **hdf5plugin.Bitshuffle(cname="lz4"))
        self.file.swmr_mode = True
        self.set_written(0)
        return path

    async def start_acquiring(self) -> None:
        """Expose one frame."""
        self._task = asyncio.create_task(self._expose())

    async def wait_for_idle(self) -> None:
        """Until it is written."""
        if self._task is not None:
            await self._task

    async def ensure_stopped(self) -> None:
        """Finish what was begun."""
        await self.wait_for_idle()

    async def _expose(self) -> None:
        y, x = [await motor.user_readback.get_value() for motor in self._motors]
        frame = await asyncio.to_thread(self._measure, y, x)
        number = len(self.data)
        self.data.resize(number + 1, axis=0)
        self.data[number] = frame
        self.data.flush()
        self.set_written(number + 1)


class _Data(DetectorDataLogic):
    def __init__(self, writer: _Writer) -> None:
        self._writer = writer

    async def prepare_unbounded(self, datakey_name: str) -> StreamableDataProvider:
        """A file for the run, and what documents say of it."""
        path, shape = self._writer.open(), self._writer.shape
        resource = StreamResourceInfo(
            data_key=datakey_name,
            shape=shape,
            chunk_shape=(1, *shape),
            dtype_numpy="<u2",
            parameters={"dataset": DATA},
        )
        return StreamResourceDataProvider(
            uri=f"file://localhost{path.absolute()}",
            resources=[resource],
            mimetype="application/x-hdf5",
            collections_written_signal=self._writer.written,
        )

    async def stop(self) -> None:
        """Close the file, after what is being exposed."""
        await self._writer.ensure_stopped()
        if self._writer.file is not None:
            self._writer.file.close()
            self._writer.file = None


class Faulty:
    """A callback of the RunEngine that hands documents on, with faults: frames' documents dropped, repeated, exchanged,
    those of positions held back."""

    def __init__(self, campaign: CampaignConnection, faults: Faults) -> None:
        self._campaign, self._faults = campaign, faults
        self._held: list[Mapping[str, Any]] = []

    def __call__(self, name: str, document: Mapping[str, Any]) -> None:
        """Take a document."""
        if name == "stream_datum":
            number = document["seq_nums"]["start"] - 1
            if number == self._faults.stall_at:
                time.sleep(self._faults.stall_s)
            for one in self._faults.frames(Sent(number, document, np.zeros(2))):
                self._campaign(name, one.counts)
            return
        if name == "event" and self._faults.silent(document["seq_num"] - 1):
            self._held.append(document)
            return
        for one in self._held:
            self._campaign("event", one)
        self._held = []
        if name == "stop":
            for one in self._faults.rest():
                self._campaign("stream_datum", one.counts)
        self._campaign(name, document)


class BlueskyBeamline:
    """A RunEngine with two motors and a camera at a simulated beamline."""

    def __init__(self, beamline: SimulatedBeamline, folder: Path) -> None:
        field = beamline.field
        self._beamline = beamline
        limits = tuple(PER_METRE * value for value in (field.y0, field.y1, field.x0, field.x1))
        slack = 1e-3 * PER_METRE * beamline.geometry.object_pixel
        self.campaign = CampaignConnection(
            unit=UNIT, field=(limits[0] - slack, limits[1] + slack, limits[2] - slack, limits[3] + slack)
        )
        self.engine = RunEngine(context_managers=[])  # signals are not its own
        with init_devices():
            y, x = SimMotor(units=UNIT), SimMotor(units=UNIT)
            camera = Camera(folder, (y, x), self._measured, beamline.geometry.shape)
        self.motors, self.camera = (y, x), camera
        where = self.campaign.addresses
        self.addresses = {
            **where,
            "frames": f"{where['frames']}?data={camera.name}",
            "positions": f"{where['positions']}?y={y.name}&x={x.name}&unit={UNIT}",
        }
        self._chunks = beamline.chunks()
        self._ending = False
        self._faults = Faults()
        self.frames = self._of_scan = 0

    def run(self, faults: Faults) -> dict[str, int]:
        """A steered scan of each stage. Returns the frames measured and those that the faults dropped."""
        self._faults = faults
        self.engine.subscribe(Faulty(self.campaign, faults))
        # A signal that breaks into the RunEngine's own wait has it panic, and the motors stay where they are: the scans
        # run in another thread, and a signal comes into the wait for that.
        with ThreadPoolExecutor(1) as pool:
            scans = pool.submit(self._scans)
            try:
                scans.result()
            except KeyboardInterrupt:
                self._ending = True
                with contextlib.suppress(TransitionError):  # between two scans
                    self.engine.stop()
                raise
        return {"frames": self.frames, "dropped": faults.dropped}

    def _scans(self) -> None:
        for stage in self._beamline.stages:
            if self._ending:
                return
            self._of_scan = 0
            scan = steered_scan(
                [self.camera], self.motors, self.campaign, md={"sample": stage.name}, points=stage.frames
            )
            with contextlib.suppress(RunEngineInterrupted):
                self.engine(scan)

    def close(self) -> None:
        """Leave."""
        self.campaign.close()

    def _measured(self, y: float, x: float) -> NDArray:
        where = np.array([[y, x]]) / PER_METRE
        field = self._beamline.field
        where = np.clip(where, [field.y0, field.x0], [field.y1, field.x1])  # to the last digit
        self._beamline.apply(Decision(positions=where, reasons=("asked",)))
        chunk = next(self._chunks)
        self.frames, self._of_scan = self.frames + 1, self._of_scan + 1
        return self._faults.exposed(self._of_scan - 1, chunk["counts"].values[0])
