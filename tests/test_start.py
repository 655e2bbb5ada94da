"""A scan without a probe begins with one from its frames, and refines to the object all the same."""

from dataclasses import replace

import numpy as np
import pytest

from steering.ptychography import Canvas, RefineSettings, phase_correlation, refine
from steering.sources.start import defocused, with_probe
from tests.test_finding import PROBE, SIDE, N, rough, scan


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
