"""What every source promises. A new kind of source is one more entry in SOURCES."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import numpy as np
import pytest
import xarray as xr

from steering.ptychography import zone_plate
from steering.records import Decision, Geometry, chunk_geometry
from steering.sources import (
    LiveSource,
    LiveSourceSettings,
    Recording,
    Replay,
    SimulatedBeamline,
    Source,
    Stage,
    Streams,
    Window,
)
from tests.loop_beamline import LoopFrames, LoopMotion, Silent

WINDOW = 16
FRAMES = 40


def simulated() -> Source:
    rng = np.random.default_rng(0)
    thing = np.exp(1j * rng.uniform(-1, 1, (64, 64)))
    return SimulatedBeamline(
        [Stage("scan", thing, FRAMES)],
        probe=zone_plate(WINDOW, 0.0, counts=1e4),
        step=7.0,
        frame_rate=2000,
        chunk_frames=4,
    )


def replay() -> Source:
    rng = np.random.default_rng(0)
    y, x = np.meshgrid(np.arange(5.0), np.arange(8.0), indexing="ij")
    recording = Recording(
        counts=rng.poisson(30, (FRAMES, WINDOW, WINDOW)).astype(np.uint16),
        positions=10 * np.stack([y.ravel(), x.ravel()], axis=1),
        probe=zone_plate(WINDOW, 0.0),
        geometry=Geometry(shape=(WINDOW, WINDOW)),
    )
    return Replay(recording, tolerance=2.0, frame_rate=2000, chunk_frames=4)


def live() -> Source:
    y, x = np.meshgrid(np.arange(5.0), np.arange(8.0), indexing="ij")
    source = LiveSource(
        Streams(frames=LoopFrames(frames=FRAMES), positions=Silent(), motion=LoopMotion()),
        window=Window(size=WINDOW, dtype="uint16"),
        geometry=Geometry(shape=(WINDOW, WINDOW)),
        probe=zone_plate(WINDOW, 0.0),
        candidates=10 * np.stack([y.ravel(), x.ravel()], axis=1),
        frame_rate=2000,
        settings=LiveSourceSettings(chunk_frames=4),
    )
    source.scans, source.frames = ("scan",), FRAMES  # a live stream does not know them
    return source


SOURCES: dict[str, Callable[[], Source]] = {"simulated": simulated, "replay": replay, "live": live}


@pytest.fixture(
    params=[pytest.param(make, id=name, marks=[pytest.mark.slow] * (name == "live")) for name, make in SOURCES.items()]
)
def source(request: pytest.FixtureRequest) -> Iterator[Source]:
    made = request.param()
    yield made
    made.close()


def ask(positions: np.ndarray, *, stop: bool = False) -> Decision:
    return Decision(positions=positions, reasons=("test",) * max(len(positions), int(stop)), stop=stop)


def gather(chunks: list[xr.Dataset], name: str) -> np.ndarray:
    return np.concatenate([chunk[name].values for chunk in chunks])


def test_what_a_policy_needs_is_there(source: Source) -> None:
    assert source.probe.dtype == np.complex64
    assert source.probe.shape[1:] == source.geometry.shape
    assert source.candidates.ndim == 2
    assert source.field.contains(source.candidates, tolerance=1e-12).all()
    assert source.frame_rate == 2000
    assert source.truth("no such scan") is None
    assert tuple(source.scans) == ("scan",)
    assert source.frames == FRAMES


def test_frames_come_from_where_they_were_asked_for(source: Source) -> None:
    wanted = source.candidates[[3, 30, 0, 17, 9, 11, 22]]
    source.apply(ask(wanted, stop=True))
    chunks = list(source.chunks())
    measured = np.stack([gather(chunks, "position_y"), gather(chunks, "position_x")], axis=1)
    np.testing.assert_array_equal(measured, wanted)
    ids = gather(chunks, "frame")
    assert len(np.unique(ids)) == len(ids) == 7
    for chunk in chunks:
        assert chunk["counts"].dims == ("frame", "y", "x")
        assert chunk["counts"].dtype.kind == "u"
        assert chunk.sizes["frame"] <= 4
        assert chunk.attrs["scan"] == "scan"
        assert chunk.attrs["acquired"] > 0
        assert chunk_geometry(chunk).object_pixel == source.geometry.object_pixel
    assert source.frames_dropped == 0


def test_apply_wakes_a_waiting_consumer(source: Source) -> None:
    with ThreadPoolExecutor(1) as consumer:
        chunks = source.chunks()
        first = consumer.submit(next, chunks)
        assert not first.done()
        source.apply(ask(source.candidates[:4]))
        assert first.result(timeout=20).sizes["frame"] == 4
        second = consumer.submit(next, chunks)
        source.apply(ask(source.candidates[4:7]))  # fewer than a chunk holds: they leave when nothing follows
        assert second.result(timeout=20).sizes["frame"] == 3
        consumer.submit(chunks.close).result(timeout=20)


def test_close_wakes_a_waiting_consumer(source: Source) -> None:
    with ThreadPoolExecutor(1) as consumer:
        rest = consumer.submit(list, source.chunks())
        source.close()
        assert rest.result(timeout=20) == []
    source.close()  # a second time does no harm


def test_stop_without_positions_ends_it_after_what_is_queued(source: Source) -> None:
    source.apply(ask(source.candidates[:5]))
    source.apply(ask(np.empty((0, 2)), stop=True))
    source.apply(ask(source.candidates[5:8]))
    assert len(gather(list(source.chunks()), "frame")) == 5


def test_it_ends_when_all_is_measured(source: Source) -> None:
    source.apply(ask(source.candidates[:FRAMES]))
    assert len(gather(list(source.chunks()), "frame")) == FRAMES


def test_apply_is_thread_safe(source: Source) -> None:
    parts = np.split(source.candidates[:FRAMES], 8)
    with ThreadPoolExecutor(9) as pool:
        rest = pool.submit(list, source.chunks())
        for done in [pool.submit(source.apply, ask(part)) for part in parts]:
            done.result(timeout=20)
        chunks = rest.result(timeout=20)
    ids = gather(chunks, "frame")
    assert len(np.unique(ids)) == len(ids) == FRAMES
    measured = set(zip(gather(chunks, "position_y"), gather(chunks, "position_x"), strict=True))
    assert measured == set(map(tuple, source.candidates[:FRAMES]))


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_it_travels_before_it_measures(source: Source, pickler: object) -> None:
    source.apply(ask(source.candidates[:3], stop=True))
    copy = pickle.loads(pickler.dumps(source))  # type: ignore[attr-defined]
    assert len(gather(list(copy.chunks()), "frame")) == 3
    assert len(gather(list(source.chunks()), "frame")) == 3
    with pytest.raises(TypeError, match="before chunks"):
        pickler.dumps(source)  # type: ignore[attr-defined]


def test_it_has_one_consumer(source: Source) -> None:
    source.apply(ask(np.empty((0, 2)), stop=True))
    assert list(source.chunks()) == []
    with pytest.raises(RuntimeError, match="second call"):
        next(source.chunks())


def test_a_consumer_that_leaves_ends_the_measurement(source: Source) -> None:
    source.apply(ask(source.candidates[:8]))
    chunks = source.chunks()
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "measuring"]
