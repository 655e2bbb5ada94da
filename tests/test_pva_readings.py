"""Laws of scalar PVs that are read at the times of frames: what held then, whatever came in which order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from steering.sources.addresses import monitor_at, streams_at
from steering.sources.pva_readings import Held, PvaReadings, scalar
from steering.sources.pva_scans import stamp

TIMES = st.integers(0, 30).map(float)
STAMP = {"secondsPastEpoch": 100, "nanoseconds": 500_000_000, "userTag": 0}


@given(st.lists(st.tuples(st.integers(0, 1), TIMES), max_size=40, unique=True), TIMES, st.randoms())
def test_the_value_of_a_time_is_the_newest_that_is_not_after_it(updates, when, random):
    expected = [max((at for column, at in updates if column == c and at <= when), default=None) for c in (0, 1)]
    random.shuffle(updates)
    held = Held(2)
    for column, at in updates:
        held.take(column, at, 10 * at + column)
    row = held.at(when)
    if None in expected:
        assert row is None
    else:
        assert row.tolist() == [10 * at + column for column, at in enumerate(expected)]
    assert held.later(when) == all(any(c == column and at > when for column, at in updates) for c in (0, 1))


def test_a_scalar_is_a_number_with_a_time():
    fields = {"value": 3, "timeStamp": STAMP, "alarm": {"severity": 2, "status": 0, "message": ""}}
    assert scalar(fields) == (100.5, 3.0)
    assert np.isnan(scalar({**fields, "alarm": {"severity": 3}})[1])
    assert stamp(None) == 0.0
    never = {"secondsPastEpoch": 0, "nanoseconds": 0}
    for wrong in ({"value": "a"}, {"value": None}, {"timeStamp": None}, {"timeStamp": never}, {"timeStamp": 3}):
        with pytest.raises(ValueError, match=r"no number|no time stamp"):
            scalar({**fields, **wrong})


def test_addresses_of_scalar_pvs():
    streams = streams_at("pva://DET:image?server=h:1", "pva://M:Y.RBV,M:X.RBV?unit=um&flip=y", None, "pva://I0")
    assert streams.positions == PvaReadings(pvs=("M:Y.RBV", "M:X.RBV"), scale=(-1e-6, 1e-6), frames=streams.frames)
    [(what, monitor)] = streams.monitors
    assert (what.name, what.width) == ("monitor", 1)
    assert monitor == PvaReadings(pvs=("I0",), scale=(1.0,), frames=streams.frames)
    assert monitor_at("pva://T?value=I0")[1].columns == ("I0",)
    with pytest.raises(ValueError, match=r"found 1 PVs, expected 2, or .y=COLUMN&x=COLUMN"):
        streams_at("pva://DET:image", "pva://M:Y")
    with pytest.raises(ValueError, match="beside frames that are not of pva"):
        streams_at("dectris://det", "pva://M:Y,M:X")
