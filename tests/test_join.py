"""Laws of the joiner: whatever the order, the losses and the repeats, the same frames join and the figures add up."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from steering.sources.join import REPEAT, Joiner
from steering.sources.numbers import Numbers
from steering.sources.streams import FRAMES, WHEN_SLOW, Companion, JoinSettings

POSITIONS = Companion(name="positions", width=2, samples=2, gap=2)
MONITOR = Companion(name="monitor", width=1, gap=0)


def add_up(joiner: Joiner) -> None:
    for name, counters in joiner.counters.items():
        assert counters.received == counters.joined + counters.dropped.total() + joiner.waiting(name), name


def deliver(joiner: Joiner, message: tuple, now: float = 0.0) -> None:
    kind, scan, number, sample = message
    if kind == FRAMES:
        joiner.frame(scan, number, f"frame {scan}.{number}", now)
    else:
        row = (number + 0.25 * sample, -number) if kind == "positions" else (7 * number,)
        joiner.sample(kind, scan, number, row, now, sample=sample)


messages = st.one_of(
    st.tuples(st.just(FRAMES), st.integers(0, 1), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("positions"), st.integers(0, 1), st.integers(0, 9), st.integers(0, 1)),
    st.tuples(st.just("monitor"), st.integers(0, 1), st.integers(0, 9), st.just(0)),
)


def joined(order: list[tuple], companions: tuple[Companion, ...]) -> dict:
    joiner = Joiner(companions)
    taken = []
    for message in order:
        deliver(joiner, message)
        add_up(joiner)
        taken += joiner.take(2)
        add_up(joiner)
    joiner.finish()
    taken += joiner.take(1000)
    add_up(joiner)
    assert all(joiner.waiting(name) == 0 for name in joiner.counters)
    found = {(one.scan, one.number): (one.frame, {k: tuple(v) for k, v in one.values.items()}) for one in taken}
    assert len(found) == len(taken)  # none twice
    return found


@given(st.lists(messages, max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_any_interleaving_with_losses_and_repeats_joins_the_same_frames(came, random):
    kinds = {kind for kind, *_ in came}
    companions = tuple(c for c in (POSITIONS, MONITOR) if c.name in kinds)
    came = [message for message in came if message[0] in {FRAMES, *(c.name for c in companions)}]
    again = came + came[::3]
    random.shuffle(again)
    # What comes again after the scan is settled is late; what is joined does not change.
    assert joined(came, companions) == joined(again, companions)


@given(
    st.lists(st.tuples(messages, st.floats(0, 3), st.integers(0, 4)), max_size=80),
    st.sampled_from(WHEN_SLOW),
    st.integers(2, 6),
)
@settings(max_examples=80, deadline=None)
def test_figures_add_up_with_deadlines_small_buffers_and_ends(came, when_slow, capacity):
    limits = {"wait_s": 2.0, "oldest_s": 2.5, "capacity": capacity, "when_slow": when_slow}
    joiner = Joiner((POSITIONS,), JoinSettings(**limits))
    now, taken = 0.0, []
    for message, passed, action in came:
        if message[0] == "monitor":
            continue
        now += passed
        deliver(joiner, message, now)
        assert joiner.waiting(FRAMES) <= capacity
        if action == 1:
            taken += joiner.take(3)
        elif action == 2:
            joiner.expire(now)
        elif action == 3:
            joiner.end(message[0], message[1], now)
        add_up(joiner)
    joiner.finish()
    taken += joiner.take(1000)
    add_up(joiner)
    assert joiner.counters[FRAMES].joined == len(taken) == len({(one.scan, one.number) for one in taken})


def test_a_gap_is_interpolated_and_nothing_is_extrapolated():
    joiner = Joiner((Companion(name="positions", width=2, gap=2),))
    for number in range(12):
        joiner.frame(0, number, None, 0.0)
    for number in (2, 5, 9):  # 3, 4 between; 6, 7, 8 too many; 0, 1, 10, 11 outside
        joiner.sample("positions", 0, number, (10.0 * number, -number), 0.0)
    joiner.expire(4.9)
    assert [one.number for one in joiner.take(99)] == [2, 5, 9]
    joiner.expire(5.0)
    found = {one.number: one for one in joiner.take(99)}
    assert sorted(found) == [3, 4]
    np.testing.assert_allclose(found[4].values["positions"], (40.0, -4.0))
    assert found[4].rows == {"positions": 0}
    dropped = joiner.counters[FRAMES].dropped
    assert dropped == Counter(
        {
            "no positions within 5 s, outside the range of numbers": 4,
            "no positions within 5 s, in a gap too wide to interpolate": 3,
        }
    )
    add_up(joiner)


def test_the_samples_of_a_frame_are_averaged_and_those_that_are_late_are_counted():
    joiner = Joiner((Companion(name="positions", width=1, samples=3),))
    joiner.frame(0, 0, "a", 0.0)
    for sample in (0, 1, 1):
        joiner.sample("positions", 0, 0, (float(sample),), 0.0, sample=sample)
    assert not joiner.ready
    joiner.expire(5.0)
    [one] = joiner.take(9)
    assert one.values["positions"] == 0.5
    joiner.sample("positions", 0, 0, (2.0,), 6.0, sample=2)
    assert joiner.counters["positions"].dropped.total() == 2
    add_up(joiner)


def test_a_neighbour_that_was_interpolated_by_still_takes_its_other_samples():
    joiner = Joiner((Companion(name="positions", width=1, samples=2),))
    joiner.frame(0, 1, None, 0.0)
    for number, sample in ((0, 0), (0, 1), (2, 0)):
        joiner.sample("positions", 0, number, (10.0 * number,), 4.0, sample=sample)
    joiner.expire(5.0)
    [between] = joiner.take(9)
    assert between.values["positions"] == 10.0
    joiner.sample("positions", 0, 2, (30.0,), 5.0, sample=1)
    joiner.frame(0, 2, None, 5.0)
    [whole] = joiner.take(9)
    assert whole.values["positions"] == 25.0
    assert joiner.counters["positions"].interpolated == 1
    add_up(joiner)


def test_numbers_that_never_come_are_lost_after_the_deadline_and_trailing_ones_at_the_end():
    joiner = Joiner(())
    joiner.begin("a")
    for number in (1, 2, 5):
        joiner.frame("a", number, None, 1.0)
    joiner.expire(2.0)
    assert joiner.counters[FRAMES].lost == 0
    joiner.expire(6.0)
    assert joiner.counters[FRAMES].lost == 3  # 0, 3, 4
    joiner.frame("a", 3, None, 7.0)
    assert joiner.counters[FRAMES].dropped.total() == 1  # it was given up
    joiner.end(FRAMES, "a", 7.0, frames=8)
    assert joiner.counters[FRAMES].lost == 5
    assert joiner.over("a")
    add_up(joiner)


def test_leading_losses_are_known_also_where_the_positions_came_first():
    joiner = Joiner((Companion(name="positions", width=1),))
    joiner.sample("positions", "a", 0, (1.0,), 0.0)
    joiner.begin("a")
    joiner.frame("a", 2, None, 1.0)
    joiner.expire(9.0)
    assert joiner.counters[FRAMES].lost == 2


def taken_by(consumer: list[int], *, capacity: int, most: int = 10) -> tuple[list[int], list[int], Joiner]:
    """Numbers that are taken by a consumer, and their ages, in frames that came later. consumer: how many frames come
    between two of its takings."""
    joiner = Joiner((), JoinSettings(capacity=capacity, when_slow="thin"))
    came, numbers, ages = 0, [], []
    for coming in consumer:
        for _ in range(coming):
            joiner.frame(0, came, None, 0.0)
            came += 1
        taken = [one.number for one in joiner.take(most)]
        numbers += taken
        ages += [came - 1 - number for number in taken]
        add_up(joiner)
        assert joiner.waiting(FRAMES) <= capacity
    return numbers, ages, joiner


@pytest.mark.parametrize("coming", [11, 20, 43, 160])
def test_thinned_frames_are_even_and_the_newest(coming):
    """A consumer of a tenth to nine tenths of the frames: it had got frames that were older than the buffer is long."""
    capacity, most = 500, 10
    numbers, ages, joiner = taken_by([coming] * 800, capacity=capacity, most=most)
    assert max(ages) < capacity
    thinned = 800 * coming - len(numbers) - joiner.ready
    assert thinned > 0
    assert joiner.counters[FRAMES].dropped == {"thinned: the consumer is slower": thinned}
    assert len(numbers) == 800 * most
    gaps = np.diff(numbers)
    assert gaps.min() >= 1
    assert gaps.max() <= 2 * coming / most + 1  # twice the usual while it catches up
    if coming > 11:  # that one waits for the buffer to fill again and again
        assert max(ages[len(ages) // 2 :]) < coming
        assert set(gaps[len(gaps) // 2 :]) <= {coming // most, coming // most + 1}


def test_a_consumer_that_was_busy_once_gets_all_that_the_buffer_holds():
    numbers, ages, joiner = taken_by([5] * 20 + [650] + [5] * 200, capacity=500)
    lost = joiner.counters[FRAMES].dropped.total()
    assert lost == 650 - 500
    assert numbers == [*range(100), *range(250, 250 + len(numbers) - 100)]
    assert max(ages) < 500


def test_a_blocked_stream_says_so():
    block = Joiner((Companion(name="positions", width=1, capacity=3, when_slow="block"),), JoinSettings(capacity=4))
    for number in range(4):
        assert not block.full(FRAMES)
        block.frame(0, number, None, 0.0)
    assert block.full(FRAMES)
    for number in range(4, 7):
        assert not block.full("positions")
        block.sample("positions", 0, number, (0.0,), 0.0)
    assert block.full("positions")
    block.sample("positions", 0, 0, (0.0,), 0.0)
    block.take(1)
    assert not block.full(FRAMES)
    block.expire(5.0)  # the deadline makes room where no frame comes
    assert not block.full("positions")
    add_up(block)


@given(st.lists(st.integers(0, 30), max_size=60), st.sampled_from(["block", "drop oldest"]), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_samples_that_run_ahead_are_dropped_oldest_first_or_held_back(came, when_slow, capacity):
    joiner = Joiner((Companion(name="positions", width=1, gap=0, capacity=capacity, when_slow=when_slow),))
    held = []
    for number in came:
        if joiner.full("positions"):
            continue
        joiner.sample("positions", 0, number, (1.0 * number,), 0.0)
        held = [*held, number] if number not in held else held
        held = held[-capacity:]
        assert joiner.waiting("positions") == len(held)
        add_up(joiner)
    for number in range(31):
        joiner.frame(0, number, None, 0.0)
    assert sorted(one.number for one in joiner.take(99)) == sorted(held)
    assert joiner.counters["positions"].joined == len(held)
    add_up(joiner)


def test_samples_are_not_thinned():
    with pytest.raises(ValueError, match="positions: found when_slow='thin', expected block or drop oldest"):
        Companion(name="positions", width=2, when_slow="thin")


def test_a_first_frame_in_the_middle_of_a_scan_loses_nothing_before_it():
    joiner = Joiner(())
    for number in (500, 499, 502):
        joiner.frame(0, number, None, 0.0)
    joiner.expire(9.0)
    assert joiner.counters[FRAMES].lost == 1
    assert len(joiner.take(9)) == 3


def test_what_is_remembered_is_bounded():
    joiner = Joiner((Companion(name="positions", width=1, capacity=64),), JoinSettings(capacity=64))
    for number in range(20_000):
        joiner.frame(0, number, None, 0.0)
        joiner.sample("positions", 0, number, (0.0,), 0.0)
        joiner.take(1)
    assert joiner.remembered <= 2 * 64 + 1
    numbers = Numbers(0)
    numbers.add(10**12, 0.0)  # a torn number must not cost memory
    assert numbers.give_up(1.0) == 10**12
    assert len(numbers.lost) <= 65536


@pytest.mark.parametrize("wrong", [{"wait_s": -1.0}, {"oldest_s": 1.0}, {"capacity": 1}, {"when_slow": "sleep"}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        JoinSettings(**wrong)


@pytest.mark.parametrize("when_slow", WHEN_SLOW)
def test_what_nobody_takes_is_never_older_than_said(when_slow):
    joiner = Joiner((), JoinSettings(wait_s=0.5, oldest_s=1.0, when_slow=when_slow))
    for number in range(40):
        joiner.frame(0, number, None, 0.1 * number)
    joiner.expire(4.0)
    kept = [one.number for one in joiner.take(99)]
    assert kept == (list(range(40)) if when_slow == "block" else list(range(30, 40)))
    assert joiner.counters[FRAMES].dropped.total() == 40 - len(kept)
    add_up(joiner)


def test_samples_that_waited_in_vain_give_way_to_newer_ones():
    """As the rows of an earlier scan, which a server sends to whoever connects: they count as dropped by then."""
    joiner = Joiner((Companion(name="positions", width=1),), JoinSettings(wait_s=1.0))
    for number in (3, 4):
        joiner.sample("positions", 0, number, (-99.0,), 0.0)
    joiner.expire(1.0)
    joiner.frame(0, 3, None, 2.0)
    joiner.frame(0, 4, None, 2.0)
    assert joiner.ready == 0
    joiner.sample("positions", 0, 3, (3.0,), 2.5)
    assert [one.values["positions"].tolist() for one in joiner.take(9)] == [[3.0]]
    joiner.expire(3.0)  # nothing newer came: a frame that was late is joined with what there is
    assert [one.values["positions"].tolist() for one in joiner.take(9)] == [[-99.0]]
    joiner.sample("positions", 0, 4, (4.0,), 3.5)
    assert joiner.counters["positions"].dropped == Counter({"no frame came": 2, REPEAT: 1})
    add_up(joiner)


def test_what_is_withdrawn_is_as_if_it_had_never_come():
    joiner = Joiner((Companion(name="positions", width=1, gap=3),), JoinSettings(wait_s=1.0))
    joiner.begin(0)
    for number in range(40):
        joiner.sample("positions", 0, number, (-99.0,), 0.0)
    joiner.end("positions", 0, 0.0, 40)
    joiner.expire(2.0)
    assert joiner.counters[FRAMES].lost == 40
    joiner.withdraw("positions", 0, "why")
    joiner.withdraw("positions", 7, "why")
    assert joiner.counters[FRAMES].lost == 0
    for number in range(5):
        joiner.frame(0, number, None, 3.0)
    joiner.sample("positions", 0, 2, (2.0,), 3.0)
    joiner.end("positions", 0, 3.0)
    joiner.end(FRAMES, 0, 3.0, 6)
    joiner.expire(9.0)
    assert [one.number for one in joiner.take(9)] == [2]
    assert joiner.counters[FRAMES].lost == 1
    assert joiner.over(0)
    add_up(joiner)


def test_frames_that_are_not_read_yet_are_not_lost():
    """As where prediction is behind, and the detector holds them back: their age counts once all that came is read."""
    joiner = Joiner((Companion(name="positions", width=1, gap=0),), JoinSettings(wait_s=1.0))
    joiner.begin(0)
    for number in range(6):
        joiner.sample("positions", 0, number, [number], 0.0)
    joiner.end("positions", 0, 0.0, 6)
    joiner.frame(0, 0, None, 0.0)
    joiner.frame(0, 2, None, 0.0)  # 1 is missing whatever is unread
    frames, samples = joiner.counters[FRAMES], joiner.counters["positions"]
    joiner.expire(10.0, np.inf)
    assert (frames.lost, samples.dropped) == (1, {"no frame came": 1})
    joiner.expire(20.0, 19.5)  # quiet, but not for long
    assert frames.lost == 1
    joiner.frame(0, 3, None, 20.0)
    joiner.expire(30.0, 29.0)
    assert (frames.lost, samples.dropped) == (3, {"no frame came": 3})
    assert [one.number for one in joiner.take(9)] == [0, 2, 3]
    joiner.end(FRAMES, 0, 30.0)
    assert joiner.over(0)
    add_up(joiner)
