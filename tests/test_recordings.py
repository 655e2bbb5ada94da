"""Reading recorded scans: what is read is what was written, and every bad file has its clear error."""

from __future__ import annotations

import bz2
import io
import os
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest

from steering.ptychography import Canvas, simulate, zone_plate
from steering.sources import ORIENTATIONS, Recording, read_recording
from steering.sources.inspection import inspect_lines
from steering.sources.orientation import turn

N = 16
FRAMES = 6
J_PER_EV = 1.602176634e-19


def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(20, (FRAMES, N, N)).astype(np.uint16)


def translation() -> np.ndarray:
    return np.random.default_rng(1).uniform(-1e-6, 1e-6, (FRAMES, 3))


def mask() -> np.ndarray:
    bad = np.zeros((N, N), np.uint32)
    bad[3, 5] = 0x0001
    return bad


def write_cxi(path: Path, *, without: tuple[str, ...] = (), **changes: Any) -> Path:
    """A CXI file; a value None leaves the name out."""
    names = {
        "data": ("entry_1/data_1/data", counts()),
        "translation": ("entry_1/sample_1/geometry_1/translation", translation()),
        "energy": ("entry_1/instrument_1/source_1/energy", 8800 * J_PER_EV),
        "distance": ("entry_1/instrument_1/detector_1/distance", 2.0),
        "x_pixel_size": ("entry_1/instrument_1/detector_1/x_pixel_size", 75e-6),
        "y_pixel_size": ("entry_1/instrument_1/detector_1/y_pixel_size", 75e-6),
        "mask": ("entry_1/instrument_1/detector_1/mask", mask()),
        "probe": ("entry_1/instrument_1/source_1/probe", np.ones((N, N), np.complex64)),
    }
    with h5py.File(path, "w") as file:
        for key, (name, value) in names.items():
            if key not in without:
                file[name] = changes.get(key, value)
    return path


def write_npz(path: Path, **changes: Any) -> Path:
    arrays = {
        "data": counts()[None].astype(np.float32),
        "scan": (translation()[None, :, :2] * 1e7).astype(np.float32),
        "probe": np.ones((1, 1, 1, 1, N, N), np.complex64),
    }
    arrays.update(changes)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def read(path: Path, **more: Any) -> Recording:
    return read_recording(path, **{"zero_frequency": "centre", **more})


def test_cxi_round_trip_in_metres(tmp_path: Path) -> None:
    taken = read(write_cxi(tmp_path / "scan.cxi"))
    np.testing.assert_array_equal(taken.counts, counts())
    assert taken.counts.dtype == np.uint16
    where = translation()[:, [1, 0]]
    np.testing.assert_allclose(taken.positions, where - where.mean(0), atol=1e-18)
    assert taken.geometry.length_unit == "m"
    assert taken.geometry.wavelength == pytest.approx(1.4089e-10, rel=1e-4)
    assert taken.geometry.object_pixel == pytest.approx(1.4089e-10 * 2.0 / (N * 75e-6), rel=1e-4)
    np.testing.assert_array_equal(taken.geometry.mask, mask() != 0)
    assert taken.probe is not None
    assert taken.probe.shape == (1, N, N)


def test_nxcxi_ptycho_prefers_the_beam_energy_and_reads_units_and_rasters(tmp_path: Path) -> None:
    path = tmp_path / "scan.nxs"
    left_out = ("data", "translation", "energy", "probe", "mask", "distance")
    with h5py.File(write_cxi(path, without=left_out), "a") as file:
        detector = file["entry_1/instrument_1/detector_1"]
        detector["data"] = counts().reshape(2, 3, N, N)
        detector["translation"] = translation() * 1e6
        detector["translation"].attrs["units"] = "um"
        detector["distance"] = 2000.0
        detector["distance"].attrs["units"] = "mm"
        file["entry_1/data_1/data"] = h5py.SoftLink("/entry_1/instrument_1/detector_1/data")
        file["entry_1/instrument_1/source_1/energy"] = 3.0e9 * J_PER_EV  # of the machine
        file["entry_1/instrument_1/beam_1/incident_beam_energy"] = 8.8
        file["entry_1/instrument_1/beam_1/incident_beam_energy"].attrs["units"] = "keV"
    taken = read(path)
    reference = read(write_cxi(tmp_path / "scan.cxi"))
    np.testing.assert_array_equal(taken.counts, reference.counts)
    np.testing.assert_allclose(taken.positions, reference.positions, atol=1e-15)
    assert taken.geometry.object_pixel == pytest.approx(reference.geometry.object_pixel, rel=1e-4)
    assert taken.probe is None
    assert taken.geometry.mask is None


def test_detector_compression_and_frames_in_separate_datasets(tmp_path: Path) -> None:
    path = write_cxi(tmp_path / "scan.h5", without=("data",))
    with h5py.File(path, "a") as file:
        for k, frame in enumerate(counts()):
            file.create_dataset(f"entry_1/data_1/data/frame_{k}", data=frame, **hdf5plugin.Bitshuffle())
        for k in range(6, 12):
            file[f"entry_1/data_1/data/frame_{k}"] = counts()[0]
        del file["entry_1/sample_1/geometry_1/translation"]
        file["entry_1/sample_1/geometry_1/translation"] = np.tile(translation(), (2, 1))
    taken = read(path)
    np.testing.assert_array_equal(taken.counts[:6], counts())


def test_inspecting_an_npz_names_frames_and_positions_by_their_arrays(tmp_path: Path) -> None:
    lines = inspect_lines(write_npz(tmp_path / "scan.npz"))
    assert lines[1] == f"frames: data float32 (1, {FRAMES}, {N}, {N})"
    assert lines[2].startswith(f"positions: scan float32 (1, {FRAMES}, 2), {FRAMES} (y, x), y from ")
    assert lines[-1] == f"probe: probe complex64 (1, 1, 1, 1, {N}, {N})"


def test_inspecting_a_folder_says_that_it_is_one(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"found a folder, expected a recorded scan: give a file in it"):
        inspect_lines(tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_round_trip_in_object_pixels(tmp_path: Path, compressed: bool) -> None:
    path = write_npz(tmp_path / "scan.npz")
    if compressed:
        path = tmp_path / "scan.npz.bz2"
        path.write_bytes(bz2.compress((tmp_path / "scan.npz").read_bytes()))
    taken = read(path)
    np.testing.assert_array_equal(taken.counts, counts())
    assert taken.counts.dtype == np.uint8, "whole floats become the smallest unsigned dtype that holds them"
    assert taken.geometry.length_unit == "object pixel"
    np.testing.assert_allclose(taken.positions.mean(0), 0, atol=1e-12)
    where = translation()[:, :2] * 1e7
    np.testing.assert_allclose(taken.positions, where - where.mean(0), rtol=1e-5, atol=1e-5)
    assert taken.probe is not None
    assert taken.probe.shape == (1, N, N)


def test_a_count_of_255_is_no_mask(tmp_path: Path) -> None:
    data = counts().astype(np.float32)
    data[2, 4, 4] = 255
    taken = read(write_npz(tmp_path / "scan.npz", data=data))
    assert taken.counts.dtype == np.uint16
    assert taken.geometry.mask is None
    broken = read(write_npz(tmp_path / "half.npz", data=counts() / 2))
    assert broken.counts.dtype == np.float64, "fractions stay what they are"


def test_detector_marks_join_the_mask(tmp_path: Path) -> None:
    unsigned = counts()
    unsigned[:, 1, 2] = 65535
    taken = read(write_cxi(tmp_path / "a.cxi", data=unsigned))
    assert np.argwhere(taken.geometry.mask).tolist() == [[1, 2], [3, 5]]
    signed = counts().astype(np.int32)
    signed[:, 1, 2] = -1
    taken = read(write_cxi(tmp_path / "b.cxi", data=signed))
    assert np.argwhere(taken.geometry.mask).tolist() == [[1, 2], [3, 5]]
    assert taken.counts.dtype == np.uint8
    under_mask = counts().astype(np.float32)
    under_mask[2, 3, 5] = np.nan
    assert np.isfinite(read(write_cxi(tmp_path / "c.cxi", data=under_mask)).counts).all()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("zero_frequency", ["centre", "corner"])
def test_orientation_undoes_how_a_detector_was_mounted(orientation: str, zero_frequency: str) -> None:
    """A detector that shows the transformed sample's frames is turned back to the frames of the sample itself."""
    rng = np.random.default_rng(0)
    probe = zone_plate(N, 0.0)
    thing = np.exp(1j * rng.uniform(-1, 1, (N, N)))
    canvas = Canvas((N, N), (-(N // 2), -(N // 2)))
    upright = simulate(thing, probe, canvas, np.zeros((1, 2)))
    exchange, flip_y, flip_x = ORIENTATIONS[orientation]
    seen = np.fft.ifftshift(upright, axes=(1, 2))
    for axis, flip in ((1, flip_y), (2, flip_x)):
        seen = np.roll(np.flip(seen, axis), 1, axis) if flip else seen  # of Fourier coefficients, about the zero
    seen = seen.swapaxes(1, 2) if exchange else seen
    seen = np.fft.fftshift(seen, axes=(1, 2)) if zero_frequency == "centre" else seen
    np.testing.assert_array_equal(turn(seen, zero_frequency, orientation), upright)


def test_the_mask_turns_with_the_frames(tmp_path: Path) -> None:
    taken = read(write_cxi(tmp_path / "scan.cxi"), orientation="transpose")
    np.testing.assert_array_equal(taken.counts, counts().swapaxes(1, 2))
    assert np.argwhere(taken.geometry.mask).tolist() == [[5, 3]]


def no_hdf5(tmp_path: Path) -> Path:
    path = tmp_path / "scan.h5"
    path.write_text("# a table\n1 2 3\n")
    return path


def truncated(tmp_path: Path) -> Path:
    path = write_cxi(tmp_path / "scan.cxi")
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def truncated_npz(tmp_path: Path) -> Path:
    path = write_npz(tmp_path / "scan.npz")
    path.write_bytes(path.read_bytes()[:-700])
    return path


def truncated_bz2(tmp_path: Path) -> Path:
    path = tmp_path / "scan.npz.bz2"
    path.write_bytes(bz2.compress(write_npz(tmp_path / "scan.npz").read_bytes())[:-500])
    return path


def empty_file(tmp_path: Path) -> Path:
    path = tmp_path / "scan.cxi"
    path.touch()
    return path


def no_positions(tmp_path: Path) -> Path:
    return write_cxi(tmp_path / "scan.cxi", without=("translation",))


def no_data(tmp_path: Path) -> Path:
    return write_cxi(tmp_path / "scan.cxi", without=("data",))


def no_distance(tmp_path: Path) -> Path:
    return write_cxi(tmp_path / "scan.cxi", without=("distance",))


def machine_energy(tmp_path: Path) -> Path:
    return write_cxi(tmp_path / "scan.cxi", energy=8800.0)


def empty_scan(tmp_path: Path) -> Path:
    return write_cxi(tmp_path / "scan.cxi", data=np.empty((0, N, N), np.uint16), translation=np.empty((0, 3)))


def negative_frames(tmp_path: Path) -> Path:
    data = counts().astype(np.int32)
    data[4, 1, 2] = -3
    return write_cxi(tmp_path / "scan.cxi", data=data)


def complex_frames(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "scan.npz", data=counts().astype(np.complex64))


def changing_datasets(tmp_path: Path) -> Path:
    path = write_cxi(tmp_path / "scan.cxi", without=("data",))
    with h5py.File(path, "a") as file:
        for k, n in enumerate((N, N, N + 2)):
            file[f"entry_1/data_1/data/{k}"] = np.ones((n, n), np.uint16)
    return path


def ragged_dataset(tmp_path: Path) -> Path:
    path = write_cxi(tmp_path / "scan.cxi", without=("data",))
    with h5py.File(path, "a") as file:
        rows = file.create_dataset("entry_1/data_1/data", (FRAMES,), h5py.vlen_dtype(np.uint16))
        for k in range(FRAMES):
            rows[k] = np.ones(N * N + k, np.uint16)
    return path


def ragged_npz(tmp_path: Path) -> Path:
    ragged = np.empty(FRAMES, object)
    ragged[:] = [np.ones((N + k, N)) for k in range(FRAMES)]
    return write_npz(tmp_path / "scan.npz", data=ragged)


def other_count(tmp_path: Path) -> Path:
    return write_cxi(tmp_path / "scan.cxi", translation=translation()[:-1])


def nan_positions(tmp_path: Path) -> Path:
    where = translation()
    where[2] = np.nan
    return write_cxi(tmp_path / "scan.cxi", translation=where)


def npz_without_scan(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "scan.npz", scan=None)


def other_probe(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "scan.npz", probe=np.ones((8, 8), np.complex64))


def lost_raw_file(tmp_path: Path) -> Path:
    path = write_cxi(tmp_path / "scan.cxi", without=("data",))
    layout = h5py.VirtualLayout((FRAMES, N, N), np.uint16)
    layout[:] = h5py.VirtualSource("raw_0001.h5", "data", (FRAMES, N, N))
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset("entry_1/data_1/data", layout)
    return path


BAD = {
    no_hdf5: (OSError, "not HDF5"),
    truncated: (OSError, "truncated or damaged"),
    truncated_npz: (OSError, "truncated or damaged"),
    truncated_bz2: (OSError, "truncated or damaged"),
    empty_file: (OSError, "not HDF5"),
    no_positions: (ValueError, "no positions"),
    no_data: (ValueError, "no frames"),
    no_distance: (ValueError, r"no distance \(entry_1/instrument_1/detector_1/distance"),
    machine_energy: (ValueError, r"photon energy of 8800 J .*it would be in eV"),
    empty_scan: (ValueError, "empty scan"),
    negative_frames: (ValueError, r"found -3 at pixel \(1, 2\) of frame 4"),
    complex_frames: (ValueError, "real counts"),
    changing_datasets: (ValueError, "one shape for all"),
    ragged_dataset: (ValueError, "changing shape"),
    ragged_npz: (ValueError, "nothing is unpickled"),
    other_count: (ValueError, "6 frames and positions of shape"),
    nan_positions: (ValueError, "not finite"),
    npz_without_scan: (ValueError, "no scan"),
    other_probe: (ValueError, "probe of shape"),
    lost_raw_file: (ValueError, "raw_0001.h5"),
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_files_have_clear_errors(make: Any, tmp_path: Path) -> None:
    kind, words = BAD[make]
    path = make(tmp_path)
    with pytest.raises(kind, match=words) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: found ")
    assert "expected" in message or "put it" in message
    assert len(message.splitlines()) == 1


def test_arguments_are_a_closed_set(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "scan.npz")
    with pytest.raises(ValueError, match="'corner' or 'centre'"):
        read(path, zero_frequency="middle")
    with pytest.raises(ValueError, match="transpose"):
        read(path, orientation="upside down")
    with pytest.raises(FileNotFoundError, match="check the path"):
        read(tmp_path / "nothing.cxi")
    given = read(path, probe=np.full((2, N, N), 2, np.complex128))
    assert given.probe is not None
    assert given.probe.shape == (2, N, N)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.savez(file, data=np.array([{"a": 1}], object), scan=np.zeros((1, 2)))
    path = tmp_path / "scan.npz"
    path.write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="nothing is unpickled"):
        read(path)


@pytest.mark.skipif("STEERING_DATA" not in os.environ, reason="STEERING_DATA does not say where recorded data are")
def test_a_real_scan() -> None:
    folder = Path(os.environ["STEERING_DATA"]) / "ptycho-aps-velociprobe-siemens"
    taken = read(folder / "siemens-star-small.npz.bz2", zero_frequency="corner")
    assert taken.counts.shape == (516, 128, 128)
    assert taken.counts.dtype == np.uint16
    assert taken.probe is not None
    assert taken.probe.shape == (1, 128, 128)
    assert taken.geometry.mask is None
    mean = taken.counts.mean(axis=0)
    y, x = (np.indices(mean.shape) * mean).sum(axis=(1, 2)) / mean.sum()
    assert abs(y - 64) < 4
    assert abs(x - 64) < 4
