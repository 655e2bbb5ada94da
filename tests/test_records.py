"""What records promise: nothing wrong gets in, nothing right is changed on the way."""

import pickle

import numpy as np
import pytest
from hypothesis import given, strategies as st

from steering.records import (
    Decision,
    Field,
    Geometry,
    ModelVersion,
    Prediction,
    chunk_geometry,
    make_chunk,
    positions_px,
    scan_name,
)

N = 8
KNOWN = {"wavelength": 1.5e-10, "distance": 2.0, "detector_pixel": 75e-6}


def geometry(**changes):
    return Geometry(**{"shape": (N, N), **changes})


def chunk(counts=None, frame_id=None, positions=None, where=None, **more):
    counts = np.ones((3, N, N), np.uint16) if counts is None else counts
    frame_id = np.arange(len(counts)) if frame_id is None else frame_id
    positions = np.zeros((len(counts), 2)) if positions is None else positions
    return make_chunk(counts, frame_id, positions, where or geometry(), **more)


def hidden(*pixels):
    mask = np.zeros((N, N), bool)
    for pixel in pixels:
        mask[pixel] = True
    return mask


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.float32, np.float64])
def test_a_chunk_keeps_counts_ids_and_positions_as_they_came(dtype):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 100, (3, N, N)).astype(dtype)
    positions = rng.normal(size=(3, 2))
    made = chunk(counts, [7, 3, 5], positions, scan="zinc", acquired=12.5)
    assert made["counts"].dims == ("frame", "y", "x")
    assert made["counts"].dtype == dtype
    np.testing.assert_array_equal(made["counts"].values, counts)
    assert made["frame"].values.tolist() == [7, 3, 5]
    np.testing.assert_array_equal(made["position_y"].values, positions[:, 0])
    np.testing.assert_array_equal(made["position_x"].values, positions[:, 1])
    assert (made.attrs["scan"], made.attrs["acquired"]) == ("zinc", 12.5)
    assert not made["mask"].values.any()
    assert made.identical(pickle.loads(pickle.dumps(made)))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"counts": np.ones((N, N), np.uint16), "frame_id": [0], "positions": [[0, 0]]}, r"shape \(8, 8\), expected"),
        ({"counts": np.ones((3, N, N + 2), np.uint16)}, r"\(3, 8, 10\), expected .* \(8, 8\)"),
        ({"counts": np.ones((2, 3, N, N), np.uint16)}, "expected .frame, y, x."),
        ({"counts": np.ones((3, N, N), complex)}, "dtype complex128, expected real counts"),
        ({"counts": np.ones((3, N, N), bool)}, "dtype bool, expected real counts"),
        ({"counts": np.ones((0, N, N), np.uint16)}, "without frames"),
        ({"positions": np.zeros((2, 2))}, r"positions of shape \(2, 2\), expected \(3, 2\)"),
        ({"positions": np.zeros((3, 3))}, r"expected \(3, 2\)"),
        ({"positions": np.zeros(3)}, r"expected \(3, 2\)"),
        ({"positions": [[0, 0], [0, np.nan], [0, 0]]}, "not finite, first at frame id 1"),
        ({"frame_id": [1, 2, 1]}, r"frame ids \[1\] more than once"),
        ({"frame_id": [1, 2]}, "expected 3 integers"),
        ({"frame_id": [1.0, 2.0, 3.0]}, "expected 3 integers"),
    ],
)
def test_what_does_not_fit_together_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        chunk(**wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_impossible_counts_are_refused_unless_the_mask_hides_them(value):
    counts = np.ones((3, N, N), np.float32)
    counts[1, 2, 5] = value
    with pytest.raises(ValueError, match=r"at pixel \(2, 5\) of frame 41 .*expected finite counts of 0 or more"):
        chunk(counts, [40, 41, 42])
    made = chunk(counts, [40, 41, 42], where=geometry(mask=hidden((2, 5))))
    np.testing.assert_array_equal(made["counts"].values, counts)


def test_negative_integers_are_refused_as_well():
    counts = np.ones((3, N, N), np.int32)
    counts[2, 0, 0] = -1
    with pytest.raises(ValueError, match="found -1 at pixel"):
        chunk(counts)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_all_ones_join_the_mask_of_the_chunk_and_of_no_other(dtype):
    where = geometry(mask=hidden((0, 0)))
    counts = np.ones((3, N, N), dtype)
    counts[1, 4, 4] = np.iinfo(dtype).max
    made = chunk(counts, where=where)
    np.testing.assert_array_equal(made["mask"].values, hidden((0, 0), (4, 4)))
    np.testing.assert_array_equal(chunk_geometry(made).mask, made["mask"].values)
    np.testing.assert_array_equal(where.mask, hidden((0, 0)))
    np.testing.assert_array_equal(chunk(where=where)["mask"].values, hidden((0, 0)))


def test_a_chunk_of_which_nothing_counts_is_refused():
    with pytest.raises(ValueError, match="no pixel that counts"):
        chunk(np.full((3, N, N), np.iinfo(np.uint16).max, np.uint16))


def test_lengths_are_metres_where_the_geometry_is_known():
    known = geometry(**KNOWN)
    assert known.object_pixel == pytest.approx(1.5e-10 * 2.0 / (N * 75e-6))
    pixels = np.random.default_rng(1).normal(size=(3, 2))
    made = chunk(positions=pixels * known.object_pixel, where=known)
    np.testing.assert_allclose(positions_px(made), pixels)
    assert made.attrs["length_unit"] == made["position_y"].attrs["units"] == "m"
    back = chunk_geometry(made)
    assert (back.object_pixel, back.length_unit, back.shape) == (known.object_pixel, "m", (N, N))


def test_lengths_are_object_pixels_where_it_is_not():
    positions = np.arange(6.0).reshape(3, 2)
    made = chunk(positions=positions)
    assert made.attrs["length_unit"] == made["position_x"].attrs["units"] == "object pixel"
    np.testing.assert_array_equal(positions_px(made), positions)
    assert chunk_geometry(made).length_unit == "object pixel"
    assert chunk_geometry(made).mask is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"shape": (8, 10)}, "8 x 10 pixels, expected a square"),
        ({"shape": (9, 9)}, "even size"),
        ({"shape": (4, 4)}, "8 or more"),
        ({"wavelength": 1e-10}, "expected all three in metres, or none"),
        ({**KNOWN, "distance": 0.0}, "distance=0.0, expected a positive length"),
        ({**KNOWN, "wavelength": float("nan")}, "expected a positive length"),
        ({"mask": np.zeros((N, N))}, "mask of float64"),
        ({"mask": np.zeros((N, 4), bool)}, r"mask of bool \(8, 4\)"),
        ({"mask": np.ones((N, N), bool)}, "hides every pixel"),
    ],
)
def test_an_impossible_geometry_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        geometry(**wrong)


def test_a_field_scales_and_knows_its_inside():
    field = Field(-1.0, 1.0, -2.0, 2.0)
    inside = field.contains(np.array([[1.0, 2.0], [1.0, 2.1], [-1.1, 0.0]]))
    assert inside.tolist() == [True, False, False]
    assert field.contains(np.array([1.0, 2.1]), tolerance=0.2).all()
    assert field.scaled(3.0) == Field(-3.0, 3.0, -6.0, 6.0)
    for wrong in ((1.0, -1.0, 0.0, 0.0), (0.0, 0.0, 0.0, float("inf"))):
        with pytest.raises(ValueError, match=r"expected low\.\.high"):
            Field(*wrong)


def prediction(n=2, **changes):
    fields = {
        "frame_id": np.arange(n),
        "scan": "zinc",
        "position": np.zeros((n, 2)),
        "amplitude": np.full((n, 4, 4), 0.5, np.float32),
        "phase": np.full((n, 4, 4), np.pi / 2, np.float32),
        "residual": np.zeros(n, np.float32),
        "offset": np.full(n, np.nan, np.float32),
        "model_version": np.zeros(n, np.int64),
    }
    return Prediction(**{**fields, **changes})


def test_a_prediction_is_amplitude_times_phase():
    assert prediction().patches.dtype == np.complex64
    np.testing.assert_allclose(prediction().patches, 0.5j, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"residual": np.zeros(3)}, "3 rows of residual, expected 2"),
        ({"model_version": np.zeros(1, np.int64)}, "1 rows of model_version"),
        ({"position": np.zeros((2, 3))}, r"expected \(2, 2\)"),
        ({"phase": np.zeros((2, 4, 5), np.float32)}, "expected two equal"),
        ({"amplitude": np.zeros((2, 4)), "phase": np.zeros((2, 4))}, "expected two equal"),
    ],
)
def test_a_prediction_whose_rows_do_not_match_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        prediction(**wrong)


def test_a_decision_has_a_reason_for_each_position():
    made = Decision(positions=[[0, 1], [2, 3]], reasons=("here", "there"), dwell=[0.1, 0.2])
    assert made.positions.dtype == made.dwell.dtype == np.float64
    bare = Decision(positions=np.array(()), reasons=("enough",), stop=True)
    assert bare.positions.shape == (0, 2)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"reasons": ("one",)}, "1 reasons for 2 positions"),
        ({"reasons": (), "positions": np.zeros((0, 2)), "stop": True}, "one for a bare stop"),
        ({"reasons": (), "positions": np.zeros((0, 2))}, "without positions that does not stop"),
        ({"positions": [[0, np.inf], [0, 0]]}, "not finite"),
        ({"positions": np.zeros((2, 3))}, r"shape \(2, 3\), expected \(n, 2\)"),
        ({"positions": np.zeros(4)}, r"shape \(4,\), expected \(n, 2\)"),
        ({"dwell": [0.1]}, "expected 2 positive times"),
        ({"dwell": [0.1, 0.0]}, "expected 2 positive times"),
        ({"dwell": [0.1, np.inf]}, "expected 2 positive times"),
    ],
)
def test_an_impossible_decision_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Decision(**{"positions": np.zeros((2, 2)), "reasons": ("a", "b"), **wrong})


def test_model_versions_count_from_zero():
    assert ModelVersion(number=0, network="ProbeFirst", hyperparameters={}).validation_error is None
    with pytest.raises(ValueError, match="found model version -1"):
        ModelVersion(number=-1, network="ProbeFirst", hyperparameters={})
    with pytest.raises(ValueError, match="found noise_share=2"):
        ModelVersion(number=0, network="ProbeFirst", hyperparameters={}, noise_share=2.0)


@given(st.text(max_size=300))
def test_the_name_of_a_scan_is_that_of_a_folder_and_what_is_one_stays(name):
    fit = scan_name(name)
    assert scan_name(fit) == fit
    assert 1 <= len(fit.encode()) <= 100
    assert fit.isprintable()
    assert not fit.startswith(".")
    assert not set("/\\\0") & set(fit)
    assert scan_name(name + "-") != fit


def test_a_name_that_is_made_fit_keeps_what_it_can():
    assert scan_name("2026-11 star [3], \u00b5m") == "2026-11 star [3], \u00b5m"
    assert scan_name("../scan/7\n").startswith("_scan_7_-")
    assert scan_name("") == "scan-e3b0c442"
    assert scan_name("\udcff")  # a byte of a file's name that is no UTF-8
