"""Laws of frames that cannot be used: counted, set aside with the reason, never silently used, and no run ends."""

import asyncio

import numpy as np
import pytest

from steering.campaign import FrameSetAside, PredictionReady
from steering.inference import PredictorSettings
from steering.inference.event_queue import EventQueue
from steering.inference.intake import ArrivedFrames, make_batch, validate
from steering.records import Geometry, make_chunk
from tests.test_inference import CANVAS, GEOMETRY, WINDOW, chunks, predictor

BAD = {
    "saturated": lambda counts: counts.__setitem__((slice(0, 6), slice(0, 8)), 4095),
    "no counts at all": lambda counts: counts.fill(0),
}


def chunk_of(counts, ids, where=None, geometry=GEOMETRY, scan="a"):
    where = np.zeros((len(ids), 2)) if where is None else where
    return make_chunk(counts, ids, where, geometry, scan=scan)


def good(n=1, seed=0):
    return np.random.default_rng(seed).poisson(9, (n, WINDOW, WINDOW)).astype(np.uint16)


def validated(chunk, known=(), mask=None):
    mask = np.zeros((WINDOW, WINDOW), bool) if mask is None else mask
    return validate(ArrivedFrames.of(chunk, 0.0), known=dict.fromkeys(known, 0), mask=mask, canvas=CANVAS)


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_frame_is_set_aside_and_its_neighbours_are_used(reason):
    counts = good(3)
    BAD[reason](counts[1])
    keep, aside = validated(chunk_of(counts, [5, 6, 7]))
    assert keep.tolist() == [True, False, True]
    assert aside == {reason: (6,)}


def test_an_id_counts_once_and_a_position_lies_inside():
    keep, aside = validated(chunk_of(good(3), [5, 6, 7], np.array([[0, 0], [0, 0], [500.0, 0]])), known=(5,))
    assert keep.tolist() == [False, True, False]
    assert aside == {"an id that the scan has already": (5,), "a position outside the field": (7,)}


def test_frames_of_another_size_are_set_aside_whole():
    large = np.ones((2, 64, 64), np.uint16)
    keep, aside = validated(chunk_of(large, [1, 2], geometry=Geometry(shape=(64, 64))))
    assert not keep.any()
    assert aside == {"frames of 64 x 64 pixels, expected 32 x 32": (1, 2)}


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_counts_that_are_none_are_set_aside(value):
    counts = good(2).astype(np.float32)
    chunk = chunk_of(counts, [1, 2])
    chunk["counts"].values[0, 3, 3] = value  # no source makes such a chunk; one from elsewhere may hold it
    assert validated(chunk)[1] == {"counts that are negative or not finite": (1,)}


@pytest.mark.parametrize("seed", range(6))
def test_chunks_that_wait_together_are_validated_as_one_after_the_other(seed):
    """Whatever is wrong with some of them: ids again, bad counts, other masks, other dtypes, positions outside."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        taken = []
        for number in range(rng.integers(1, 5)):
            counts = good(n := int(rng.integers(1, 4)), int(rng.integers(1000)))
            fault = rng.integers(8)
            if fault < 2:
                list(BAD.values())[fault](counts[0])
            mask = np.zeros(counts.shape[1:], bool)
            mask[3, :4] = fault == 2
            ids = np.arange(n) + (0 if fault == 3 else 10 * number)
            where = rng.uniform(-5, 5, (n, 2)) + 500 * (fault == 4)
            geometry = Geometry(shape=GEOMETRY.shape, mask=mask if mask.any() else None)
            taken.append((chunk_of(counts.astype(np.float32) if fault == 5 else counts, ids, where, geometry), number))
        known, mask = {0: 0} if rng.integers(2) else {}, np.zeros((WINDOW, WINDOW), bool)
        batch, masked, aside = make_batch(taken, known=known, mask=mask, canvas=CANVAS)
        rows, refused = [], {}
        for one in taken:
            found, mask, said = make_batch([one], known=known, mask=mask, canvas=CANVAS)
            for reason, frames in said.items():
                refused[reason] = refused.get(reason, ()) + frames
            if found is not None:
                rows.append(found)
                known |= dict.fromkeys(found.frame_id.tolist(), 0)
        assert aside == refused
        np.testing.assert_array_equal(masked, mask)
        assert (batch is None) == (not rows)
        for name in ("frame_id", "counts", "position", "arrived") if rows else ():
            np.testing.assert_array_equal(getattr(batch, name), np.concatenate([getattr(row, name) for row in rows]))


@pytest.mark.parametrize("level", [1, 3, 30])
def test_weak_and_strong_frames_are_not_taken_for_bad(level):
    rng = np.random.default_rng(level)
    keep, _ = validated(chunk_of(rng.poisson(level, (20, WINDOW, WINDOW)).astype(np.uint16), np.arange(20)))
    assert keep.all()


def stream(rng):
    """Good chunks with bad ones among them; the ids that are good."""
    sent = list(chunks(n=40))
    wanted = list(range(40))
    again = sent[2].copy(deep=True)
    dark = chunk_of(np.zeros((1, WINDOW, WINDOW), np.uint16), [40])
    hot = good()
    hot[0, :10] = 65535
    whole = np.stack([good()[0], hot[0]])
    mixed = chunk_of(whole, [41, 42])
    large = chunk_of(np.ones((2, 64, 64), np.uint16), [50, 51], geometry=Geometry(shape=(64, 64)))
    far = chunk_of(good(), [60], np.array([[0.0, 400.0]]))
    order = [*sent[:4], again, dark, mixed, large, far, *sent[:3:-1]]
    return order, [*wanted, 41]


def test_a_run_goes_on_whatever_comes(tmp_path):
    """Good frames are predicted once, bad ones are reported once with the reason, and a frame that was set aside
    changes nothing in the mask."""
    order, wanted = stream(np.random.default_rng(0))

    async def main():
        me = predictor(tmp_path)
        await me.start()
        for chunk in order:
            await me.receive(chunk)
        await me.live()  # asked last, answered when all is predicted
        await me.receive(next(chunks("b", 5, first=100)))
        await me.receive(chunk_of(good(), [70]))  # late, of a scan that is over
        await me.live()
        return await me.events(), await me.figures(), await me.live("a"), me.fast.mask

    events, figures, live, mask = asyncio.run(main())
    predicted = [i for e in events if isinstance(e, PredictionReady) and e.scan == "a" for i in e.frame_ids]
    assert sorted(predicted) == sorted(wanted)
    assert sorted(live["frame"].values) == sorted(wanted)
    aside = {e.reason: e.frame_ids for e in events if isinstance(e, FrameSetAside)}
    assert aside == {
        "an id that the scan has already": (10, 11, 12, 13, 14),
        "no counts at all": (40,),
        "saturated": (42,),
        "frames of 64 x 64 pixels, expected 32 x 32": (50, 51),
        "a position outside the field": (60,),
        "a scan that is over": (70,),
    }
    assert figures["frames_predicted"] == len(wanted) + 5
    assert figures["frames_out_of_order"] > 0
    assert figures["frame_ids_missing"] == len(set(range(71)) - set(range(43)) - {50, 51, 60, 70})
    assert not mask.any()


def test_a_scan_without_one_good_frame_ends_nothing(tmp_path):
    async def main():
        me = predictor(tmp_path)
        await me.start()
        await me.receive(chunk_of(np.zeros((3, WINDOW, WINDOW), np.uint16), [0, 1, 2], scan="dark"))
        await me.install(0, canary=False)
        nothing = (
            await me.live("dark"),
            await me.label_frames("dark", 10),
            await me.evaluate("dark", (0,)),
            await me.versions_of("dark"),
        )
        await me.receive(next(chunks("a", 5)))
        return nothing, await me.live("a")

    nothing, live = asyncio.run(main())
    assert nothing == (None, None, {}, (0, 0))
    assert live.sizes["frame"] == 5


def test_chunks_of_which_another_predictor_had_every_frame_are_no_batch():
    mask = np.zeros((8, 8), bool)
    batch, masked, aside = make_batch([], known=(), mask=mask, canvas=CANVAS)
    assert batch is None
    assert masked is mask
    assert aside == {}


def test_while_nobody_hears_the_predictor_any_more_it_takes_no_further_frames_and_loses_none(tmp_path, monkeypatch):
    """What it is sent before somebody listens for the first time is what its predecessor had, and all of it is taken:
    who would listen waits for that."""
    monkeypatch.setattr(EventQueue.__init__, "__defaults__", (2,))
    parts = list(chunks(n=60))

    async def main():
        me = predictor(tmp_path, settings=PredictorSettings(backlog=1, batch=5, gather_ms=0.0))
        await me.start()
        await send_all(me, parts[:6])
        await me.live()  # all is predicted
        events = await me.events()
        sending = asyncio.ensure_future(send_all(me, parts[6:]))
        while not (await me.figures())["events_waited"]:
            await asyncio.sleep(0.01)
        taken = (await me.figures())["frames_predicted"]
        while sum(len(e.frame_ids) for e in events if isinstance(e, PredictionReady)) < 60:
            events += await me.events()
        await sending
        return taken, events, await me.figures()

    async def send_all(me, parts):
        for chunk in parts:
            await me.receive(chunk)

    taken, events, figures = asyncio.run(main())
    assert 30 < taken < 60
    assert figures["events_waited"] > 0
    assert sorted(i for e in events if isinstance(e, PredictionReady) for i in e.frame_ids) == list(range(60))
