"""Laws of the drift test: it alarms by chance as rarely as it says, soon when it must, and lets go again."""

import itertools
import math

import numpy as np
import pytest

from steering.campaign import DriftLowered, DriftRaised, PredictionReady
from steering.campaign.drift import BACK, DriftTest, Window, lowest_u, most_worse, spared
from steering.ptychography import share_as_bad


def told(residual, offset=(), *, scan="a", version=1, m=40, why_not=()):
    """A chunk of predicted frames."""
    return PredictionReady(
        time=0.0,
        scan=scan,
        frame_ids=tuple(range(max(len(residual), len(offset)))),
        version=version,
        residual=0.2,
        trust_by_residual=tuple(residual),
        trust_by_offset=tuple(offset),
        validation_frames=m,
        why_not=tuple(why_not),
    )


@pytest.mark.parametrize(("n", "m"), [(1, 7), (3, 4), (4, 3), (5, 5), (2, 8)])
@pytest.mark.parametrize("chance", [0.01, 0.05, 0.2, 0.4])
def test_the_critical_value_is_that_of_the_exact_law(n, m, chance):
    """Counted over every order of n and m."""
    orders = list(itertools.combinations(range(n + m), n))  # places of the n, the worst frame first
    pairs = [sum(places) - n * (n - 1) // 2 for places in orders]
    u = lowest_u(n, m, chance)
    assert sum(one <= u for one in pairs) <= chance * len(orders)
    assert sum(one <= u + 1 for one in pairs) > chance * len(orders)
    worse = [sum(place == number for number, place in enumerate(places)) for places in orders]
    k = most_worse(n, m, chance)
    assert spared(m) == 0
    assert sum(one >= k for one in worse) <= chance * len(orders)
    assert sum(one >= k - 1 for one in worse) > chance * len(orders)


def test_frames_worse_than_all_but_a_few_validation_frames_are_as_rare_as_said():
    rng = np.random.default_rng(0)
    n, m, chance = 16, 120, 0.02
    draws = rng.normal(size=(20000, n + m))
    bar = np.sort(draws[:, n:], axis=1)[:, -1 - spared(m)]
    share = ((draws[:, :n] > bar[:, None]).sum(1) >= most_worse(n, m, chance)).mean()
    assert chance / 5 < share <= chance


def test_the_critical_value_of_large_samples_is_that_of_the_normal_law():
    n, m = 16, 400
    middle, spread = n * m / 2, math.sqrt(n * m * (n + m + 1) / 12)
    assert lowest_u(n, m, 0.05) == pytest.approx(middle - 1.645 * spread, abs=0.05 * spread)


@pytest.mark.parametrize("m", [5, 12, 40])
@pytest.mark.parametrize("law", ["uniform", "lognormal"])
def test_false_alarms_are_at_most_as_frequent_as_stated(m, law):
    """Over many scans, each with a validation sample of its own; what the frames' law is does not matter."""
    rng = np.random.default_rng(m)
    scans, frames, stated = 150, 60, 5e-3
    alarms = 0
    for _ in range(scans):
        draws = getattr(rng, law)(size=m + frames)
        test = DriftTest(16, stated)
        trust = share_as_bad(draws[m:], draws[:m])
        alarms += any(isinstance(one, DriftRaised) for one in test.take(told(trust, trust[::-1], m=m), expected=None))
    expected = scans * frames * stated
    assert alarms <= expected
    assert alarms > 0 or m == 5


def test_five_validation_frames_are_too_few_for_a_rare_alarm_and_eight_are_enough():
    for m, raised in ((5, False), (8, True)):
        test = DriftTest(16, 1e-5)
        assert bool(test.take(told([1 / (m + 1)] * 200, m=m), expected=None)) == raised


def test_strong_drift_is_raised_within_a_window_and_lowered_when_trust_is_back():
    test = DriftTest(16, 1e-5)
    rng = np.random.default_rng(0)
    assert test.take(told(rng.uniform(size=50)), expected=0.1) == []
    [raised] = test.take(told([1 / 41] * 16), expected=0.1)
    assert isinstance(raised, DriftRaised)
    assert (raised.by, raised.version, raised.scan, raised.expected) == ("residual", 1, "a", 0.1)
    assert raised.trust <= raised.lowest or raised.worse >= raised.most
    assert test.take(told([1 / 41] * 100, version=2), expected=0.1) == []  # raised once
    [lowered] = test.take(told(rng.uniform(size=30), version=3), expected=0.2)
    assert isinstance(lowered, DriftLowered)
    assert (lowered.version, lowered.since, lowered.expected) == (3, 1, 0.2)
    assert test.take(told(rng.uniform(size=30)), expected=0.1) == []
    assert len(test.take(told([1 / 41] * 16), expected=0.1)) == 1


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 20])
def test_frames_worse_than_every_validation_frame_never_bring_trust_back(m):
    """However few validation frames the new version has."""
    test = DriftTest(16, 1e-4)
    assert len(test.take(told([1 / 101] * 16, m=100), expected=None)) == 1
    assert test.take(told([1 / (m + 1)] * 64, version=2, m=m), expected=None) == []


def test_one_validation_frame_cannot_say_that_trust_is_back():
    """Not even of frames that all look better than it, nor while one of them is in the window."""
    test = DriftTest(16, 1e-4)
    test.take(told([1 / 101] * 16, m=100), expected=None)
    assert test.take(told([1.0] * 64, version=2, m=1), expected=None) == []
    assert test.take(told([0.5] * 15, version=3, m=100), expected=None) == []
    assert isinstance(test.take(told([0.5], version=3, m=100), expected=None)[0], DriftLowered)


def test_few_validation_frames_of_one_frame_do_not_excuse_all_others():
    """A window of 15 frames that are worse than most of 100 validation frames, and one that was held against two."""
    trust = (1 + 15) / 101  # below the level that 16 usual frames reach, above that of frames held against two
    window = Window(16, 1e-4)
    for one, m in [(1.0, 2), *[(trust, 100)] * 15]:
        window.add(one, m)
    assert lowest_u(16, 2, BACK) / (16 * 2) < window.level < lowest_u(16, 100, BACK) / (16 * 100)
    assert not window.back


@pytest.mark.parametrize("numbers", [(40,), (4, 16), (16, 28)])
def test_usual_frames_bring_trust_back_at_once_nearly_always(numbers):
    """Also where the window mixes versions with different numbers of validation frames; 95 % are the aim."""
    rng, back, windows = np.random.default_rng(0), 0, 400
    for _ in range(windows):
        window = Window(16, 1e-4)
        validation = [rng.normal(size=m) for m in numbers]
        for k in range(16):
            [own] = share_as_bad(rng.normal(size=1), validation[k * len(numbers) // 16])
            window.add(float(own), numbers[k * len(numbers) // 16])
        back += window.back
    assert back / windows > 0.9


def test_a_sample_that_is_empty_between_its_features_raises_it_too():
    """Half of the frames look as good as ever: on average there is nothing to see."""
    test = DriftTest(16, 5e-5)
    [raised] = test.take(told([0.9, 1 / 41] * 8), expected=None)
    assert raised.trust > raised.lowest
    assert raised.worse >= raised.most


def test_a_few_bad_frames_raise_nothing():
    test = DriftTest(16, 1e-5)
    assert test.take(told([0.5, 0.6, 0.4] * 10 + [1 / 41] * 3 + [0.5, 0.7] * 10), expected=None) == []


def test_offsets_raise_it_where_residuals_see_nothing():
    test = DriftTest(16, 1e-5)
    [raised] = test.take(told([0.5] * 16, [1 / 41] * 16), expected=None)
    assert raised.by == "offset"
    assert test.take(told([0.5] * 30, [math.nan] * 30), expected=None) == []  # nothing says that they are back
    assert isinstance(test.take(told([0.5] * 30, [0.6] * 30), expected=None)[0], DriftLowered)


def test_what_is_no_evidence_never_counts_and_is_told_by_its_reason():
    test = DriftTest(16, 1e-5)
    nothing = told([math.nan, None] * 50, [None] * 100, why_not=["no counts", "saturated"] * 50)
    assert test.take(nothing, expected=None) == []
    assert test.take(told([0.01] * 100, m=0), expected=None) == []  # the untrained network promises nothing
    assert test.unjudged == {"no counts": 50, "saturated": 50}
    with_gaps = [value for _ in range(16) for value in (1 / 41, math.nan)]
    assert len(test.take(told(with_gaps), expected=None)) == 1


def test_a_new_scan_begins_anew():
    """Frames of the old sample do not stand in the way of an alarm for the new one."""
    test = DriftTest(16, 1e-5)
    test.take(told([1.0] * 16), expected=None)
    assert test.take(told([1 / 41] * 3, scan="b"), expected=None) == []  # too few to tell
    assert len(test.take(told([1 / 41] * 3, scan="b"), expected=None)) == 1


def test_the_window_counts_against_the_smallest_validation_sample_in_it():
    window = Window(16, 1e-3)
    for m in (40, 40, 8):
        window.add(0.5, m)
    assert window.lowest(0.3) == lowest_u(3, 8, 0.3) / 24
