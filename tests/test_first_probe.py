"""A scan without a probe begins with one from its frames, and refines to the object all the same."""

from dataclasses import replace

import numpy as np
import pytest

from steering.ptychography import Canvas, RefineSettings, phase_correlation, refine
from steering.sources.finding import turned
from steering.sources.first_probe import BegunProbe, begun_and_oriented, defocused, is_twin, with_probe
from tests.test_finding import PROBE, SIDE, N, rough, scan

FOCUS = "behind"


def test_the_far_field_of_a_start_has_the_frames_mean_amplitude():
    recording = scan(rough())
    probe = defocused(recording, 10.0)
    far = np.abs(np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(probe[0]), norm="ortho")))
    mean = np.sqrt(recording.counts.mean(0))
    assert np.corrcoef(far.ravel(), mean.ravel())[0, 1] > 0.999
    assert (np.abs(probe) ** 2).sum() == pytest.approx(np.quantile(recording.counts.sum((1, 2)), 0.9), rel=1e-3)


@pytest.mark.slow
def test_an_object_is_found_without_a_probe():
    thing = rough()
    hidden = replace(scan(thing), probe=None)
    begun = with_probe(hidden, tried=9)
    assert "begun with a beam of" in begun.notes[-1]
    assert with_probe(scan(thing)).probe is PROBE
    canvas = Canvas((SIDE, SIDE), (-SIDE // 2, -SIDE // 2))
    settings = RefineSettings(passes=40, probe_from_pass=1)
    found = refine(begun.counts, hidden.positions, begun.fitted_probe(), canvas, settings=settings)
    weight = found.covered * 1.0
    weight[: N // 2], weight[-N // 2 :], weight[:, : N // 2], weight[:, -N // 2 :] = 0, 0, 0, 0
    assert phase_correlation(found.object, thing, weight=weight) > 0.8


@pytest.mark.slow
def test_the_turn_is_found_without_a_probe_and_the_twin_is_chosen_by_what_the_user_knows():
    """The probe of these scans lies behind its focus, and the phase is what says nothing of absorption."""
    hidden = replace(scan(rough()), probe=None)
    seen = turned(hidden, "flip_x")  # by a detector that turns its frames so
    begun = begun_and_oriented(seen, focus=FOCUS, frames=40, tried=5)
    np.testing.assert_array_equal(begun.counts, hidden.counts)
    assert begun.probe is not None
    said = begun.notes[-2]
    assert f"flip_x is taken, its twin flip_y explains the frames as well: the sample is {FOCUS} the focus" in said
    assert "begun with a beam of" in begun.notes[-1]


def test_which_of_two_twins_is_meant():
    rng = np.random.default_rng(0)
    thickness = rng.random((20, 20))
    object_ = np.exp(-0.2 * thickness - 1j * thickness)  # a negative phase where it absorbs more
    found = BegunProbe(0.01, 12.0, np.ones((1, 8, 8), np.complex64), object_)
    assert is_twin(found, "behind", None)[0] is False
    assert is_twin(found, "before", "negative")[0] is True  # the focus goes first
    assert is_twin(found, None, "negative")[0] is False
    assert is_twin(found, None, "positive")[0] is True
    assert is_twin(found, None, None) == (False, "--focus or --phase says which")
    noise = BegunProbe(*found[:3], np.exp(-0.2 * thickness + 1j * rng.random((20, 20))))
    with pytest.raises(ValueError, match="a phase that does not follow the absorption"):
        is_twin(noise, None, "positive")
    with pytest.raises(ValueError, match="expected before or behind"):
        is_twin(found, "beside", None)
