"""Ids that are kept as ranges are the set that they would be one by one."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from steering.records import Ids


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=8))
def test_it_holds_what_a_set_holds(parts):
    ids, other, every = Ids(), Ids(), set()
    for number, part in enumerate(parts):
        (ids if number % 2 else other).add(part)
        every |= set(part)
    ids.update(other)
    assert {i for i in range(-2, 44) if i in ids} == every
    assert {i for i in np.arange(44) if i in ids} == every
    assert (ids.count, bool(ids)) == (len(every), bool(every))
    assert all(first <= last for first, last in ids.ranges)
    assert all(one[1] + 1 < two[0] for one, two in zip(ids.ranges, ids.ranges[1:], strict=False)), (
        "none touches another"
    )
    assert Ids.of(ids.ranges) == ids


@pytest.mark.parametrize("wrong", [[[3, 1]], [[1]], [1], [["a", "b"]], [None], [[0, float("inf")]], None])
def test_what_is_no_list_of_ranges_is_refused(wrong):
    with pytest.raises(ValueError, match="found no ranges of ids"):
        Ids.of(wrong)
