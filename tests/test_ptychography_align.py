"""Laws of the gauge-free comparison."""

import numpy as np
import pytest
import skimage.data
from skimage.transform import resize

from steering.ptychography import align, phase_correlation, phase_error

SIZE = 128


def _picture(name, contrast=1.0):
    grey = resize(getattr(skimage.data, name)().astype(float), (2 * SIZE, 2 * SIZE), anti_aliasing=True)
    grey = (grey - grey.min()) / np.ptp(grey)
    return np.exp(1j * contrast * grey)


def _shifted(image, dy, dx):
    """By Fourier transform, of a picture larger than what is compared, so that its wrapped border stays out."""
    fy, fx = (np.fft.fftfreq(n) for n in image.shape)
    return np.fft.ifft2(np.fft.fft2(image) * np.exp(-2j * np.pi * (fy[:, None] * dy + fx * dx)))


def _middle(image):
    return image[SIZE // 2 : -SIZE // 2, SIZE // 2 : -SIZE // 2]


def _ramp(y, x, phase):
    a = np.arange(SIZE)
    return np.exp(1j * (y * a[:, None] + x * a + phase))


@pytest.mark.parametrize("contrast", [0.5, 3.0])
@pytest.mark.parametrize(("dy", "dx"), [(0.0, 0.0), (2.3, -4.6), (-3.0, 0.45)])
def test_planted_shift_phase_and_ramp_are_removed(contrast, dy, dx):
    reference = _middle(_picture("camera", contrast))
    image = 1.3 * _middle(_shifted(_picture("camera", contrast), dy, dx)) * _ramp(0.05, -0.11, 2.0)
    assert phase_error(image, reference) < 0.01 + 0.03 * contrast
    assert phase_correlation(image, reference) > 0.99
    aligned = align(image, reference)
    assert aligned.dtype == np.complex64
    inner = (slice(6, -6), slice(6, -6))
    np.testing.assert_allclose(np.abs(aligned[inner]).mean(), 1.3, rtol=0.01)


def test_alignment_survives_noise():
    rng = np.random.default_rng(0)
    reference = _middle(_picture("camera"))
    noise = 0.2 * (rng.standard_normal((SIZE, SIZE)) + 1j * rng.standard_normal((SIZE, SIZE)))
    image = (_middle(_shifted(_picture("camera"), 1.5, -2.25)) + noise) * _ramp(0.02, 0.03, -1.0)
    assert phase_error(image, reference) < 0.23
    assert phase_correlation(image, reference) > 0.75


def test_no_agreement_is_invented_for_an_unrelated_image():
    reference = _middle(_picture("camera"))
    for name in ("coins", "brick", "moon"):
        assert abs(phase_correlation(_middle(_picture(name)), reference)) < 0.35
    tilted = reference * _ramp(0.1, -0.05, 0.0)
    assert abs(phase_correlation(_middle(_picture("brick")), tilted)) < 0.35


def test_a_shift_beyond_the_limit_is_not_removed():
    reference = _middle(_picture("camera"))
    image = _middle(_shifted(_picture("camera"), 9.0, 0.0))
    assert phase_error(image, reference, max_shift=5) > 5 * phase_error(image, reference, max_shift=10)


def test_without_a_shift_only_phase_and_ramp_are_removed():
    reference = _middle(_picture("camera"))
    aligned = align(reference * _ramp(-0.2, 0.1, 1.0), reference, max_shift=0)
    np.testing.assert_allclose(aligned, reference, atol=1e-4)


def test_pixels_without_weight_or_value_do_not_count():
    reference = _middle(_picture("camera"))
    image = reference * _ramp(0.02, 0.0, 1.0)
    image[:40] = 0
    image[60:70, 60:70] = np.nan
    weight = np.ones((SIZE, SIZE))
    weight[:, 100:] = 0
    image[:, 100:] = np.exp(1j * np.random.default_rng(0).uniform(0, 6, (SIZE, 28)))
    assert phase_error(image, reference, weight=weight) < 0.02
    assert phase_error(image, reference) > 0.3


def test_nothing_to_compare_is_nan_and_shapes_must_match():
    reference = _middle(_picture("camera"))
    assert np.isnan(phase_error(np.zeros((SIZE, SIZE), complex), reference))
    assert np.isnan(phase_correlation(reference, reference, weight=np.zeros((SIZE, SIZE))))
    assert not abs(phase_correlation(np.ones((SIZE, SIZE), complex), reference)) > 0.01
    with pytest.raises(ValueError, match=r"expected one common \(y, x\)"):
        align(reference[1:], reference)
