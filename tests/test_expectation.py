"""Laws of what is expected of a beamline."""

from __future__ import annotations

import pytest

from steering.sources.expectation import Expectation, refuse_other_samples


def test_a_steered_beamline_that_is_asked_for_nothing_may_be_silent():
    expectation = Expectation(steered=True, give_up_s=10.0, now=0.0)
    assert expectation.silence(1e6, known=0) == 0.0
    expectation.ask(2, now=1e6)
    assert expectation.silence(1e6 + 5, known=0) == 5.0
    expectation.came(1e6 + 6)
    assert expectation.silence(1e6 + 8, known=1) == 2.0
    expectation.came(1e6 + 9)
    assert expectation.silence(2e6, known=2) == 0.0


def test_positions_are_given_up_once_and_asking_again_does_not_hide_the_silence():
    expectation = Expectation(steered=True, give_up_s=10.0, now=0.0)
    for now in range(100):
        if now % 20 == 0:
            expectation.ask(3, float(now))
        expectation.silence(float(now), known=0)
    assert expectation.given_up == 15
    assert expectation.outstanding(0) == 0
    assert expectation.silence(100.0, known=0) == 100.0
    expectation.came(101.0)
    assert expectation.silence(101.5, known=1) == 0.0


def test_refused_positions_are_not_expected():
    expectation = Expectation(steered=True, give_up_s=10.0, now=0.0)
    expectation.ask(3, 0.0)
    expectation.answered(3, refused=3, now=1.0)
    assert expectation.outstanding(0) == 0
    assert expectation.silence(50.0, known=0) == 0.0
    assert expectation.given_up == 0


def test_a_beamline_that_scans_by_itself_is_always_expected_to_send():
    expectation = Expectation(steered=False, give_up_s=10.0, now=0.0)
    assert expectation.silence(30.0, known=0) == 30.0
    expectation.came(31.0)
    assert expectation.silence(35.0, known=1) == 4.0
    assert expectation.given_up == 0


def test_what_is_refused_after_the_end_had_been_asked_for_beyond_it_and_is_not_lost():
    expectation = Expectation(steered=True, give_up_s=10.0, now=0.0)
    expectation.ask(5, 0.0)
    expectation.answered(5, refused=2, now=0.5)  # a motor stood still: others are measured after it
    expectation.ask(10, 1.0)
    expectation.answered(10, refused=4, now=1.5)
    expectation.ask(10, 2.0)
    expectation.answered(10, refused=10, now=2.5)
    assert (expectation.lost(4.4), expectation.lost(4.6)) == (2, 16)  # a beamline may say so a moment later
    expectation.over()
    assert expectation.lost(9.0) == 2
    expectation.ask(3, 3.0)
    expectation.answered(3, refused=3, now=3.5)
    assert expectation.lost(9.0) == 2
    assert expectation.outstanding(known=3 + 6) == 0


def test_late_frames_of_what_was_asked_for_before_a_crash_answer_nothing():
    expectation = Expectation(steered=True, give_up_s=10.0, now=0.0)
    expectation.ask(10, 5.0, known=4)
    assert expectation.outstanding(known=4) == 10
    assert expectation.outstanding(known=4 + 10) == 0
    expectation.ask(10, 6.0, known=4 + 7)
    assert expectation.outstanding(known=4 + 17) == 3
    assert expectation.silence(20.0, known=4 + 17) == 15.0
    assert expectation.given_up == 3
    expectation.ask(2, 30.0, known=4 + 17)
    assert expectation.outstanding(known=4 + 17) == 2


@pytest.mark.parametrize(
    ("said", "real"), [(10, 5), (10, 9), (10, 14), (2, 3), (4, 5), (1, 10), (10, 1), (2, 1), (1, 2)]
)
def test_another_number_of_samples_than_expected_is_refused_with_the_right_one(said, real):
    with pytest.raises(ValueError, match=rf"found {100 * real} samples for 100 frames, .* give samples={real}$"):
        refuse_other_samples(said, 100 * real, 100)


@pytest.mark.parametrize(
    ("said", "samples", "frames"),
    [(10, 1000, 100), (10, 960, 100), (10, 1040, 100), (10, 9, 1), (10, 3, None), (1, 0, 0)],
)
def test_samples_that_are_on_their_way_or_too_few_to_tell_are_not_refused(said, samples, frames):
    refuse_other_samples(said, samples, frames)
