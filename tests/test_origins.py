"""Laws of ranks that begin with samples of runs of another kind: what can be used is used, and the rest is said."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from steering.learning import MeetingPoint, Memory, Origin, stored_names, stratum_of, usable
from steering.learning.strategies import DER, ER, Incremental
from steering.runner import RunFolder
from steering.runner.describe import describe
from steering.runner.earlier_runs import find_start
from tests.test_experiment import experiment
from tests.test_learning import labels, rank_of


def one_rank(strategy, run):
    """A rank of a run, in a group of its own; the meeting point must be kept."""
    me = rank_of(strategy)
    me.run = run
    return me, MeetingPoint()


def train(me, point, counts, *, scan="a"):
    """Some steps on frames with counts of a type; the report."""
    me.join(point.rendezvous, rank=0, ranks=1)
    whole = labels(scan, n=24, stratum=stratum_of(me.run, scan))
    asyncio.run(me.receive(replace(whole, counts=whole.counts.astype(counts))))
    report = me.fit(scan, 8)
    return report


def left_by(folder, strategy, counts, run="x"):
    """What a run of one rank leaves."""
    me, point = one_rank(strategy, run)
    train(me, point, counts)
    me.cut(folder, 1)
    files = asyncio.run(me.written())
    me.close()
    return Origin(folder=folder, run=run, buffers=(files.buffer,), weights=files.weights, samples=(files.samples,))


CASES = [
    (ER, np.uint16, ER, np.uint32, np.uint32),
    (ER, np.uint32, ER, np.uint16, np.uint32),
    (DER, np.uint16, ER, np.float32, np.float32),
    (ER, np.uint16, DER, np.uint32, np.uint32),
    (ER, np.uint16, Incremental, np.uint32, np.uint16),
]


@pytest.mark.parametrize(("before", "stored", "now", "counts", "held"), CASES)
def test_a_run_goes_on_from_one_of_another_strategy_or_another_detector(tmp_path, before, stored, now, counts, held):
    """Samples that lack what the strategy stores are left out; all others are there with the same counts."""
    origin = left_by(tmp_path, before, stored)
    me, point = one_rank(now, "y")
    origin, why = usable(origin, stored_names(me.strategy, me.network))
    lacking = now is DER and before is ER
    assert ("lack stored_amplitude, stored_phase" in why) == lacking == (not origin.buffers)
    started = me.start([origin], rank=0, ranks=1)
    assert (started.samples == 18) != lacking
    report = train(me, point, counts)
    assert np.isfinite(report.loss)
    state = me.buffer.state()
    names = {name for name, _, _ in state.layout.fields} if state.layout is not None else set()
    if now is not Incremental:
        assert names == stored_names(me.strategy, me.network)
        assert len(np.unique(state.key)) == len(state) == (18 if lacking else 36)
    if state.layout is not None:
        found = state.read("counts", np.arange(len(state))).numpy()
        assert found.dtype == held
        expected = labels(n=24).counts[~labels(n=24).held_out].astype(np.int64)
        assert {one.tobytes() for one in found.astype(np.int64)} == {one.tobytes() for one in expected}
    me.cut(tmp_path / "again", 1)
    assert asyncio.run(me.written()).bytes > 0
    me.close()


def test_a_run_says_before_its_first_frame_whose_samples_it_cannot_use(tmp_path):
    origin = left_by(tmp_path, ER, np.uint16)
    memory = Memory(tmp_path / "memory")
    memory.add("x", replace(origin, weights=None), None)
    folder = RunFolder.create(tmp_path / "run")
    parts = experiment(strategy=ER(), start_from=memory.path)
    both = find_start(replace(parts, memory=memory.path), folder)
    both.read.close()
    assert both.events[0].origins == ("memory", "memory")
    assert both.without == ()
    other = find_start(replace(parts, strategy=DER(parts.strategy.objective)), folder)
    other.read.close()
    [begun] = other.events
    assert begun.origins == ()
    assert "without the samples of memory: they are stored samples that lack stored_amplitude" in describe(begun)
    with pytest.raises(ValueError, match=r"a memory whose samples have the fields amplitude.*another folder"):
        find_start(replace(parts, strategy=DER(parts.strategy.objective), memory=memory.path), folder)
