"""Laws of the simulated beamline, of the replayed scan, and of the pacing that they share."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from steering.ptychography import Canvas, simulate, zone_plate
from steering.records import Decision, Geometry, Travel, chunk_geometry
from steering.sources import (
    Recording,
    Replay,
    SimulatedBeamline,
    Stage,
    detector_gap,
    hard_xray_geometry,
    pacing,
    sample,
)
from steering.sources.pacing import Pacer

WINDOW = 32


def thing(seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).uniform(-1, 1, (24, 24))
    return np.exp(1j * np.kron(coarse, np.ones((4, 4)))).astype(np.complex64)


def beamline(stages: list[Stage] | None = None, *, counts: float = 1e5, **settings: object) -> SimulatedBeamline:
    probe = zone_plate(WINDOW, 20.0, counts=counts)
    settings = {"step": 6.0, "frame_rate": 5000.0, "chunk_frames": 4, **settings}
    return SimulatedBeamline(stages or [Stage("first", thing(), 1000)], probe=probe, **settings)  # type: ignore[arg-type]


def ask(positions: np.ndarray, *, stop: bool = False, dwell: np.ndarray | None = None) -> Decision:
    reasons = ("test",) * max(len(positions), int(stop))
    return Decision(positions=positions, reasons=reasons, stop=stop, dwell=dwell)


def run(source: SimulatedBeamline | Replay, positions: np.ndarray, **more: object) -> list[xr.Dataset]:
    source.apply(ask(positions, stop=True, **more))  # type: ignore[arg-type]
    return list(source.chunks())


def frames(chunks: list[xr.Dataset]) -> np.ndarray:
    return np.concatenate([chunk["counts"].values for chunk in chunks])


# The simulated beamline


def test_same_seed_same_frames_whatever_the_chunks() -> None:
    where = beamline().candidates[:9]
    first = frames(run(beamline(chunk_frames=4), where))
    np.testing.assert_array_equal(first, frames(run(beamline(chunk_frames=9), where)))
    np.testing.assert_array_equal(beamline().candidates, beamline().candidates)
    assert (first != frames(run(beamline(seed=1), where))).any()


def test_ways_take_time_and_no_light() -> None:
    plain, moving = beamline(), beamline()
    where = plain.candidates[:9]
    travel = Travel(velocity=1e-5, settling=0.002)
    moving.travel = travel
    began = time.monotonic()
    np.testing.assert_array_equal(frames(run(moving, where)), frames(run(plain, where)))
    assert moving.travel_s == pytest.approx(travel.along(where).sum())
    assert moving.travel_s > 8 * travel.settling
    assert time.monotonic() - began >= moving.travel_s  # a lower bound: the ways are waited for


def test_it_measures_exactly_where_it_is_told() -> None:
    source = beamline(counts=5e5)
    pixel = source.geometry.object_pixel
    where = np.array([[0.0, 0.0], [0.4, -0.3], [7.25, -11.5], [-20.9, 3.1]]) * pixel
    chunks = run(source, where)
    measured = frames(chunks).astype(float)
    np.testing.assert_array_equal(np.concatenate([c["position_x"].values for c in chunks]), where[:, 1])
    canvas = Canvas((96, 96), (-48, -48))

    def misfit(off: float) -> float:
        expected = simulate(thing(), source.probe, canvas, where / pixel + off)
        return float(np.mean((measured - expected) ** 2 / (expected + 1)))

    assert misfit(0.0) < 1.1, "what is left is Poisson noise"
    assert misfit(0.2) > 2.0, "a fifth of a pixel shows"


def test_a_position_outside_the_field_is_refused() -> None:
    source = beamline()
    outside = np.array([[0.0, 0.0], [source.field.y1 + source.geometry.object_pixel, 0.0]])
    dwell = np.array([0.5, 1.0]) / source.frame_rate
    np.testing.assert_array_equal(source.apply(ask(outside, stop=True, dwell=dwell)), outside[1:])
    assert len(frames(source.chunks())) == 1
    source = beamline()
    edge = np.array([[source.field.y0, source.field.x1], [source.field.y1, source.field.x0]])
    assert len(frames(run(source, edge))) == 2


def test_a_gap_reads_all_ones_and_is_masked() -> None:
    mask = detector_gap((WINDOW, WINDOW), start=10, width=3) | detector_gap(
        (WINDOW, WINDOW), start=20, width=1, axis="x"
    )
    assert mask.sum() == 3 * WINDOW + WINDOW - 3
    source = beamline(geometry=hard_xray_geometry(WINDOW, mask=mask))
    (chunk,) = run(source, source.candidates[:3])
    assert (chunk["counts"].values[:, mask] == 65535).all()
    assert (chunk["counts"].values[:, ~mask] < 65535).all()
    np.testing.assert_array_equal(chunk_geometry(chunk).mask, mask)
    with pytest.raises(ValueError, match="expected it inside"):
        detector_gap((WINDOW, WINDOW), start=30, width=3)


def test_saturated_pixels_read_all_ones_too() -> None:
    source = beamline(counts=1e9)
    (chunk,) = run(source, np.zeros((1, 2)))
    assert chunk["mask"].values.any()
    assert (chunk["counts"].values[0][chunk["mask"].values] == 65535).all()


def test_stages_follow_one_another_and_drift_keeps_the_scan() -> None:
    other = thing(1)
    stages = [Stage("a", thing(), 6), Stage("drift", thing(), 5, flux=4.0, new_scan=False), Stage("b", other, 7)]
    source = beamline(stages)
    truth = source.truth("a")
    assert truth is not None
    np.testing.assert_array_equal(truth[0], thing())
    source.apply(ask(np.zeros((30, 2))))
    chunks = list(source.chunks())
    assert [(c.attrs["scan"], c.sizes["frame"]) for c in chunks] == [
        ("a", 4),
        ("a", 2),
        ("a", 4),
        ("a", 1),
        ("b", 4),
        ("b", 3),
    ]
    np.testing.assert_array_equal(np.concatenate([c["frame"].values for c in chunks]), np.arange(18))
    light = frames(chunks).sum(axis=(1, 2), dtype=float)
    assert light[6:11].mean() / light[:6].mean() == pytest.approx(4.0, rel=0.02)
    truth = source.truth("b")
    assert truth is not None
    np.testing.assert_array_equal(truth[0], other)
    assert source.truth("drift") is None


def test_truth_follows_a_drift_of_the_sample() -> None:
    source = beamline([Stage("a", thing(), 4), Stage("later", thing(1), 4, new_scan=False)])
    source.apply(ask(np.zeros((8, 2))))
    chunks = source.chunks()
    next(chunks)
    list(chunks)
    truth = source.truth("a")
    assert truth is not None
    np.testing.assert_array_equal(truth[0], thing(1))


def test_a_stop_ends_the_stage_it_was_told_in_only() -> None:
    source = beamline([Stage("a", thing(), 100), Stage("b", thing(1), 5)])
    source.apply(ask(np.zeros((3, 2)), stop=True))
    source.apply(ask(np.zeros((9, 2)), stop=True))  # told in "a" as well, so it does not end "b"
    assert [(c.attrs["scan"], c.sizes["frame"]) for c in source.chunks()] == [("a", 3), ("b", 4), ("b", 1)]


def test_a_stop_that_names_its_scan_ends_no_other_one() -> None:
    """Not one that has begun meanwhile, and not one that has not: there it waits."""
    source = beamline([Stage("a", thing(), 4), Stage("b", thing(1), 6), Stage("c", thing(), 2)])
    decision = ask(np.zeros((5, 2)), stop=True)
    source.apply(replace(decision, scan=0))  # four of them are all of "a"
    source.apply(replace(decision, positions=np.zeros((1, 2)), reasons=("test",), scan=0))
    source.apply(replace(decision, positions=np.zeros((2, 2)), reasons=("test",) * 2, scan=1))
    source.apply(replace(decision, positions=np.zeros((2, 2)), reasons=("test",) * 2, scan=1))
    found = [(c.attrs["scan"], c.sizes["frame"]) for c in source.chunks()]
    assert found == [("a", 4), ("b", 4), ("c", 2)]


def test_dwell_brings_light() -> None:
    source = beamline()
    dwell = np.array([1.0, 3.0]) / source.frame_rate
    light = frames(run(source, np.zeros((2, 2)), dwell=dwell)).sum(axis=(1, 2), dtype=float)
    assert light[1] / light[0] == pytest.approx(3.0, rel=0.03)


def test_a_sample_is_of_one_material() -> None:
    image = np.random.default_rng(0).uniform(3, 9, (40, 60, 3))
    made = sample(image, phase=0.8, absorption=0.2, size=32)
    assert made.shape == (32, 32)
    assert made.dtype == np.complex64
    thickness = (1 - np.abs(made)) / 0.2
    np.testing.assert_allclose(np.angle(made), 0.8 * (thickness - 0.5), atol=1e-5)
    assert thickness.min() == pytest.approx(0, abs=1e-6)
    assert thickness.max() == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="contrast"):
        sample(np.ones((8, 8)), phase=1, absorption=0)


def test_impossible_beamlines_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        beamline([Stage("a", thing(), 5), Stage("b", thing()[:50], 5)])
    with pytest.raises(ValueError, match="starts a scan"):
        beamline([Stage("a", thing(), 5, new_scan=False)])
    with pytest.raises(ValueError, match="each name once"):
        beamline([Stage("a", thing(), 5), Stage("a", thing(), 5)])
    with pytest.raises(ValueError, match="at least the probe's window"):
        beamline([Stage("a", thing()[:20, :20], 5)])
    with pytest.raises(ValueError, match="flux"):
        Stage("a", thing(), 5, flux=0)


# Pacing


def number_chunk(part: int, targets: list[int], seconds: np.ndarray) -> xr.Dataset:
    return xr.Dataset({"target": ("frame", np.array(targets)), "seconds": ("frame", seconds)}, attrs={"part": part})


def test_a_slow_consumer_does_not_hold_the_beamline_back() -> None:
    pacer: Pacer[int] = Pacer([100], frame_rate=1e6, chunk_frames=1, queue_chunks=4)
    measured = threading.Event()

    def measure(part: int, targets: list[int], seconds: np.ndarray) -> xr.Dataset:
        if targets == [99]:
            measured.set()
        return number_chunk(part, targets, seconds)

    pacer.add([0])
    chunks = pacer.run(measure)
    assert next(chunks)["target"].values.tolist() == [0]
    pacer.add(range(1, 100))
    assert measured.wait(timeout=20), "it went on although nobody took a chunk"
    rest = [int(chunk["target"].values[0]) for chunk in chunks]
    assert rest[-4:] == [96, 97, 98, 99], "the oldest were dropped"
    assert pacer.frames_dropped == 99 - len(rest)
    assert pacer.frames_dropped >= 94


def test_frames_never_come_before_they_are_due() -> None:
    pacer: Pacer[int] = Pacer([12], frame_rate=100, chunk_frames=5)
    pacer.add(range(10))
    pacer.add([10, 11], dwell=np.array([0.03, 0.05]))
    start = time.monotonic()
    arrived = [(chunk["seconds"].values, time.monotonic() - start) for chunk in pacer.run(number_chunk)]
    due = np.cumsum([seconds.sum() for seconds, _ in arrived])
    np.testing.assert_allclose(due, [0.05, 0.10, 0.18])
    assert all(when >= end for (_, when), end in zip(arrived, due, strict=True))


def test_a_frame_does_not_wait_for_a_chunk_to_be_full_where_exposures_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "LONGEST_S", 0.05)
    pacer: Pacer[int] = Pacer([9], frame_rate=50, chunk_frames=10)
    pacer.add(range(7))
    pacer.add([7, 8], dwell=np.array([0.2, 0.001]))
    start = time.monotonic()
    chunks = [(chunk["target"].values.tolist(), time.monotonic() - start) for chunk in pacer.run(number_chunk)]
    assert [targets for targets, _ in chunks] == [[0, 1, 2], [3, 4, 5], [6], [7, 8]]
    assert chunks[0][1] < 0.14, "the second chunk had not begun to wait for its last frame"


def test_close_hands_out_what_was_measured_and_no_more() -> None:
    pacer: Pacer[int] = Pacer([100], frame_rate=0.001, chunk_frames=10)
    pacer.add([0], dwell=np.array([1e-4]))
    pacer.add(range(1, 4))
    chunks = pacer.run(number_chunk)
    threading.Timer(0.3, pacer.close).start()
    assert [chunk["target"].values.tolist() for chunk in chunks] == [[0]]


def test_an_error_while_measuring_reaches_the_consumer() -> None:
    pacer: Pacer[int] = Pacer([3], frame_rate=1000, chunk_frames=1)
    pacer.add([1])

    def measure(part: int, targets: list[int], seconds: np.ndarray) -> xr.Dataset:
        raise ValueError("the shutter is stuck")

    with pytest.raises(ValueError, match="shutter"):
        list(pacer.run(measure))


# Replay


def recording(**changes: object) -> Recording:
    grid = np.stack(np.meshgrid(np.arange(4.0), np.arange(5.0), indexing="ij"), axis=-1).reshape(-1, 2)
    counts = np.random.default_rng(0).poisson(50, (20, WINDOW, WINDOW)).astype(np.uint16)
    made = {
        "counts": counts,
        "positions": 10 * grid,
        "probe": zone_plate(WINDOW, 0.0),
        "geometry": Geometry(shape=(WINDOW, WINDOW)),
    }
    return Recording(**{**made, **changes})  # type: ignore[arg-type]


def test_replay_answers_with_the_nearest_frame_and_its_own_position() -> None:
    taken = recording()
    source = Replay(taken, tolerance=6.0, frame_rate=5000, scan="star")
    asked = np.array([[11.0, 19.0], [0.5, 0.5], [10.0, 20.0]])
    (chunk,) = run(source, asked)
    # (1, 2), then (0, 0); the third is nearest to (1, 2) again, which is given: its neighbours are 10 away.
    assert chunk["frame"].values.tolist() == [7, 0]
    np.testing.assert_array_equal(chunk["counts"].values, taken.counts[[7, 0]])
    assert chunk["counts"].dtype == np.uint16
    assert chunk["position_y"].values.tolist() == [10.0, 0.0]
    other = Replay(taken, tolerance=6.0)
    np.testing.assert_array_equal(other.apply(ask(asked)), asked[2:])
    assert chunk.attrs["scan"] == "star"


def test_replay_gives_each_frame_once() -> None:
    source = Replay(recording(), tolerance=100.0, frame_rate=5000)
    refused = [len(source.apply(ask(np.full((9, 2), 15.0)))) for _ in range(3)]
    assert refused == [0, 0, 7]
    ids = np.concatenate([chunk["frame"].values for chunk in source.chunks()])
    assert sorted(ids) == list(range(20))


def test_replay_tells_the_reference_and_scales_the_probe() -> None:
    reference = (thing(), Canvas((96, 96), (0.0, 0.0)))
    source = Replay(recording(), tolerance=1.0, scan="star", reference=reference)
    assert source.truth("star") is reference
    assert source.truth("moon") is None
    light = source.recording.counts.sum(axis=(1, 2)).mean()
    assert (np.abs(source.probe) ** 2).sum() == pytest.approx(light, rel=0.05)
    with pytest.raises(ValueError, match="without a probe"):
        Replay(recording(probe=None), tolerance=1.0)
    with pytest.raises(ValueError, match="tolerance"):
        Replay(recording(), tolerance=-1.0)
