"""Laws of a source that goes on elsewhere: wherever it was lost, every frame comes, with its counts, and once."""

import json

import numpy as np
import pytest

from steering.ptychography import zone_plate
from steering.sources import SimulatedBeamline, Source, Stage
from tests.test_source_contract import ask, replay


def staged() -> Source:
    """Three parts: one ends by a stop, one by its frames, one is a drift inside a scan."""
    rng = np.random.default_rng(0)
    things = [np.exp(1j * rng.uniform(-1, 1, (64, 64))) for _ in range(3)]
    stages = [Stage("a", things[0], 11), Stage("b", things[1], 17), Stage("c", things[2], 14, flux=0.5, new_scan=False)]
    return SimulatedBeamline(stages, probe=zone_plate(16, 0.0, counts=1e4), frame_rate=5000, chunk_frames=4)


def decisions(source):
    """The first one ends the first part early, where there are several."""
    where = source.candidates
    yield ask(where[:9], stop=isinstance(source, SimulatedBeamline))
    yield ask(where[9:15])
    yield ask(where[15:29])
    last = ask(where[29:36])
    yield type(last)(positions=last.positions, reasons=last.reasons, dwell=np.linspace(1e-4, 4e-4, 7))
    yield ask(where[36:40])


def frames_of(chunks):
    return {
        int(i): (str(chunk.attrs["scan"]), float(y), float(x), counts)
        for chunk in chunks
        for i, y, x, counts in zip(
            chunk["frame"].values,
            chunk["position_y"].values,
            chunk["position_x"].values,
            chunk["counts"].values,
            strict=True,
        )
    }


def same(one, other):
    assert list(one) == list(other)
    for i, (scan, y, x, counts) in one.items():
        assert (scan, y, x) == other[i][:3]
        np.testing.assert_array_equal(counts, other[i][3])


@pytest.mark.parametrize("kind", [staged, replay])
@pytest.mark.parametrize("known", [1, 2, 5])
@pytest.mark.parametrize("taken", range(0, 11, 2))
def test_wherever_it_is_lost_every_frame_comes_once(kind, known, taken):
    """Of the decisions some are known at the position, of the chunks some are taken after it."""
    whole = kind()
    for decision in decisions(whole):
        whole.apply(decision)
    expected = frames_of(whole.chunks())

    lost = kind()
    every = list(decisions(lost))
    for decision in every[:known]:
        lost.apply(decision)
    position = lost.position()
    chunks, chunk, before, handed = lost.chunks(), None, {}, {}
    for number in range(taken):
        if number == min(taken // 2, 2):
            position = lost.position()
            before = {**before, **handed}
            held = {} if chunk is None else frames_of([chunk])  # it counts as not handed out yet
            handed, before = held, {i: f for i, f in before.items() if i not in held}
            for decision in every[known:]:
                lost.apply(decision)
        chunk = next(chunks, None)
        if chunk is None:
            break
        handed |= frames_of([chunk])
    lost.close()

    other = kind()
    other.resume(json.loads(json.dumps(position)), list(handed))
    for decision in every[known:]:
        other.apply(decision)
    again = frames_of(other.again([*handed, 10**9]))
    same(again, handed)
    rest = frames_of(other.chunks())
    assert not set(rest) & {*before, *handed}
    same({**before, **again, **rest}, expected)
    if taken:
        same(frames_of(lost.again(list(handed))), handed)  # the one that lives can do so too


def test_a_position_of_another_campaign_is_refused():
    source = staged()
    with pytest.raises(ValueError, match="recover a run with the workflow and the arguments that it had"):
        source.resume({**source.position(), "part": 7})
