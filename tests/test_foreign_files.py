"""A recorded scan from a stranger: it reads no other file, takes no memory beyond a bound, cannot end this process."""

from __future__ import annotations

import bz2
import io
import os
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import scipy.io

from steering.files import Bounds, Memory, isolated, isolated_array, read_npz
from steering.files.arrays import DAMAGED
from steering.sources import read_recording
from steering.sources.correction import Correction
from steering.sources.probe_file import read_probe
from steering.sources.recordings import ReadSettings
from tests.test_recordings import FRAMES, N, counts, read, write_cxi, write_npz

DATA = "entry_1/data_1/data"
SMALL = ReadSettings(bounds=Bounds(bytes=2**24, seconds=20))


@pytest.fixture
def secret(tmp_path):
    """A file that is none of the scan's: raw bytes, and the same as HDF5."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.bin").write_bytes(bytes(N) + counts().tobytes())
    with h5py.File(outside / "secret.h5", "w") as file:
        file["data"], file["one"] = counts(), counts()[0]
    return outside


@pytest.fixture
def scan(tmp_path):
    """A scan's own folder, with all but the frames."""
    (tmp_path / "scan").mkdir()
    return write_cxi(tmp_path / "scan" / "scan.cxi", without=("data",))


def by_external_storage(file, secret):
    file.create_dataset(DATA, counts().shape, np.uint16, external=[(str(secret / "secret.bin"), 0, h5py.h5f.UNLIMITED)])


def by_external_storage_upwards(file, secret):
    external = [("../outside/secret.bin", 0, h5py.h5f.UNLIMITED)]
    file.create_dataset(DATA, counts().shape, np.uint16, external=external)


def by_external_link(file, secret):
    file[DATA] = h5py.ExternalLink(str(secret / "secret.h5"), "/data")


def by_relative_link(file, secret):
    file[DATA] = h5py.ExternalLink("../outside/secret.h5", "/data")


def by_a_link_in_the_middle(file, secret):
    file["entry_1/data_1"] = h5py.ExternalLink(str(secret / "secret.h5"), "/")


def by_soft_then_external_link(file, secret):
    file["elsewhere"] = h5py.ExternalLink(str(secret / "secret.h5"), "/")
    file[DATA] = h5py.SoftLink("/elsewhere/data")


def by_virtual_source(file, secret):
    layout = h5py.VirtualLayout(counts().shape, np.uint16)
    layout[:] = h5py.VirtualSource(str(secret / "secret.h5"), "data", counts().shape)
    file.create_virtual_dataset(DATA, layout)


def by_symbolic_link(file, secret):
    (Path(file.filename).parent / "raw.h5").symlink_to(secret / "secret.h5")
    file[DATA] = h5py.ExternalLink("raw.h5", "/data")


def by_a_virtual_source_that_links(file, secret):
    with h5py.File(Path(file.filename).parent / "raw.h5", "w") as raw:
        raw["data"] = h5py.ExternalLink(str(secret / "secret.h5"), "/data")
    layout = h5py.VirtualLayout(counts().shape, np.uint16)
    layout[:] = h5py.VirtualSource("raw.h5", "data", counts().shape)
    file.create_virtual_dataset(DATA, layout)


def by_a_virtual_source_in_external_storage(file, secret):
    with h5py.File(Path(file.filename).parent / "raw.h5", "w") as raw:
        external = [(str(secret / "secret.bin"), 0, h5py.h5f.UNLIMITED)]
        raw.create_dataset("data", counts().shape, np.uint16, external=external)
    layout = h5py.VirtualLayout(counts().shape, np.uint16)
    layout[:] = h5py.VirtualSource("raw.h5", "data", counts().shape)
    file.create_virtual_dataset(DATA, layout)


def by_a_frame_among_others(file, secret):
    for k, frame in enumerate(counts()[1:]):
        file[f"{DATA}/{k}"] = frame
    file[f"{DATA}/99"] = h5py.ExternalLink(str(secret / "secret.h5"), "/one")


def by_the_mask(file, secret):
    file[DATA] = counts()
    del file["entry_1/instrument_1/detector_1/mask"]
    (secret / "mask.bin").write_bytes(bytes(N * N))
    external = [(str(secret / "mask.bin"), 0, h5py.h5f.UNLIMITED)]
    file.create_dataset("entry_1/instrument_1/detector_1/mask", (N, N), np.uint8, external=external)


WAYS_OUT = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("way", WAYS_OUT, ids=lambda way: way.__name__)
def test_nothing_outside_the_scans_folder_is_read_unless_it_is_allowed(way, scan, secret):
    with h5py.File(scan, "a") as file:
        way(file, secret)
    with pytest.raises(ValueError, match="outside") as caught:
        read(scan)
    assert "allow that folder" in str(caught.value)
    allowed = read(scan, settings=ReadSettings(bounds=Bounds(folders=(str(secret),))))
    assert len(allowed.counts) == FRAMES


def test_links_inside_the_folder_are_followed(scan):
    inside = scan.parent / "raw"
    inside.mkdir()
    with h5py.File(inside / "raw.h5", "w") as raw:
        raw["data"] = counts()
    with h5py.File(scan, "a") as file:
        file["entry_1/data_1"] = h5py.ExternalLink("./raw/raw.h5", "/")
    np.testing.assert_array_equal(read(scan).counts, counts())


def test_links_in_a_circle_end(scan):
    with h5py.File(scan, "a") as file:
        file[DATA] = h5py.SoftLink("/entry_1/data_1/other")
        file["entry_1/data_1/other"] = h5py.SoftLink(f"/{DATA}")
    with pytest.raises(ValueError, match="circle"):
        read(scan)


def test_declared_sizes_are_not_believed(scan):
    with h5py.File(scan, "a") as file:
        file.create_dataset(DATA, (2**18, 2**13, 2**13), np.uint16, chunks=(1, 64, 64))
    assert scan.stat().st_size < 2**16
    with pytest.raises(ValueError, match=r"35,184,372,088,832 bytes, expected at most"):
        read(scan)


def test_positions_and_masks_count_too(tmp_path):
    path = write_cxi(tmp_path / "scan.cxi", without=("translation",))
    with h5py.File(path, "a") as file:
        file.create_dataset("entry_1/data_1/translation", (2**40, 3), np.float64, chunks=(64, 3))
    with pytest.raises(ValueError, match="expected at most"):
        read(path)


def test_a_chunk_that_unpacks_to_more_than_it_says_is_stopped(scan):
    """A deflate bomb: 320 MiB of zeros in the place of a frame of half a kilobyte."""
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(320)) + packer.flush()
    with h5py.File(scan, "a") as file:
        frames = file.create_dataset(DATA, counts().shape, np.uint16, chunks=(1, N, N), compression="gzip")
        for k in range(FRAMES):
            frames.id.write_direct_chunk((k, 0, 0), bomb)
    with pytest.raises(OSError, match="damaged"):
        read(scan, settings=SMALL)


def test_unpacking_ends_at_the_bound(tmp_path):
    path = tmp_path / "bomb.npz.bz2"
    packer = bz2.BZ2Compressor()
    path.write_bytes(b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush())
    with pytest.raises(ValueError, match="when unpacked"):
        read(path, settings=SMALL)
    zeros = write_npz(tmp_path / "zeros.npz")
    with zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, shape in (("data", (2**11, 2**7, 2**7)), ("scan", (2**11, 2))):
            content = io.BytesIO()
            np.save(content, np.zeros(shape, np.uint8))
            packed.writestr(f"{name}.npy", content.getvalue())
    assert zeros.stat().st_size < 2**16
    with pytest.raises(ValueError, match="expected at most 16,777,216"):
        read(zeros, settings=SMALL)


def header(shape, dtype="<f8"):
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(-1,)", "(2**40,)", "[[[[", "(3.5,)"])
def test_headers_of_arrays_are_checked_against_the_file(tmp_path, shape):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("data.npy", header(shape) + bytes(80))
    with pytest.raises((ValueError, OSError)):
        read_npz(path, Memory(2**20))


@pytest.mark.parametrize("order", "<>")
def test_text_that_is_none_is_refused(tmp_path, order):
    """Found by fuzzing: an error of the interpreter, which nobody expects, when the text was used."""
    path = tmp_path / "a.npz"
    for text, name in (("abc", "scan.npy"), ("ab\U0010ffff", "scan.npy"), (None, "scan.npy"), ("abc", "sc\u00e4n.npy")):
        content = bytes([255] * 12) if text is None else np.array(text, f"{order}U3").tobytes()
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr(name, header("()", f"{order}U3") + content)
        path.write_bytes(path.read_bytes().replace("\u00e4".encode(), b"\xff\xff"))
        if text is None or name != "scan.npy":
            with pytest.raises(DAMAGED, match=r"characters that there are not|can't decode byte"):
                read_npz(path, Memory(2**20))
        else:
            assert read_npz(path, Memory(2**20))[0]["scan"].item() == text


@pytest.mark.parametrize("dtype", ["NUMPY:O", "NUMPY:O8"])
def test_no_type_of_a_file_becomes_a_python_object(scan, dtype):
    """h5py makes a numpy dtype of an opaque type's tag: `O` would take the file's bytes for addresses."""
    with h5py.File(scan, "a") as file:
        kind = h5py.h5t.create(h5py.h5t.OPAQUE, 8)
        kind.set_tag(dtype.encode())
        group = file.require_group("entry_1/data_1")
        h5py.h5d.create(group.id, b"data", kind, h5py.h5s.create_simple((FRAMES, N, N)))
    with pytest.raises(ValueError, match="plain numbers"):
        read(scan)


def test_a_crash_of_the_library_is_an_error_of_the_file(tmp_path):
    path = write_npz(tmp_path / "scan.npz")
    for name, words in (("crash", "SIGSEGV"), ("memory", "needs more memory"), ("hang", "not read within")):
        with pytest.raises(OSError, match=words):
            isolated(f"tests.crashes:{name}", path, Bounds(bytes=2**24, seconds=0.5))
        assert len(read(path).counts) == FRAMES, "the next file is read as ever"


def words(child):
    """Of its command line; none of a child that another test has left ended, and nobody has waited for."""
    return () if child.status() == psutil.STATUS_ZOMBIE else child.cmdline()


def test_the_reading_process_comes_back_after_it_was_killed(tmp_path):
    path = write_npz(tmp_path / "scan.npz")
    read(path)
    [server] = [
        child for child in psutil.Process().children() if any("steering.files.child" in w for w in words(child))
    ]
    server.kill()
    assert len(read(path).counts) == FRAMES


def test_what_was_read_is_writable_and_outlives_the_next_file(tmp_path):
    first = read(write_npz(tmp_path / "a.npz"))
    before = first.counts.copy()
    read(write_npz(tmp_path / "b.npz", data=counts()[::-1]))
    np.testing.assert_array_equal(first.counts, before)
    first.counts[0] = 1


@pytest.mark.parametrize("kind", ["npy", "npz", "mat", "h5"])
def test_a_probe_of_its_own_file(tmp_path, kind):
    probe = (np.arange(2 * N * N).reshape(2, N, N) * (1 + 2j)).astype(np.complex64)
    path = tmp_path / f"probe.{kind}"
    if kind == "npy":
        np.save(path, probe)
    elif kind == "npz":
        np.savez(path, probe=probe, other=np.zeros(3))
    elif kind == "mat":
        scipy.io.savemat(path, {"probe": probe})
    else:
        with h5py.File(path, "w") as file:
            file["probe"] = probe
    np.testing.assert_array_equal(read_probe(path), probe)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:300])
    with pytest.raises((ValueError, OSError), match="cut: found"):
        read_probe(tmp_path / "cut")


def matlab_probe():
    """(mode, y, x), and (y, x, mode), as somebody sees it in MATLAB."""
    rng = np.random.default_rng(0)
    probe = (rng.normal(size=(3, N, N)) + 1j * rng.normal(size=(3, N, N))).astype(np.complex64)
    return probe, np.moveaxis(probe, 0, -1)


@pytest.mark.parametrize("part", ["<f8", "<f4", ">f4"])
def test_a_probe_of_matlab_in_hdf5(tmp_path, part):
    """Version 7.3, with the axes reversed and complex numbers of its own."""
    probe, kept = matlab_probe()
    records = np.empty(kept.T.shape, [("real", part), ("imag", part)])
    records["real"], records["imag"] = kept.T.real, kept.T.imag
    with h5py.File(tmp_path / "new.mat", "w", userblock_size=512) as file:
        file["outputs/probes"] = file["mine"] = records
        for name in ("outputs/probes", "mine"):
            file[name].attrs["MATLAB_class"] = np.bytes_("single")
    for place in ("new.mat:/outputs/probes", "new.mat:mine", "new.mat"):
        np.testing.assert_array_equal(read_probe(tmp_path / place), probe)
    with pytest.raises(ValueError, match=r"new\.mat:/outputs: found \['mine', 'outputs'\], expected one of outputs"):
        read_probe(tmp_path / "new.mat:/outputs")


def test_frames_of_matlab_are_turned_as_its_detector_images_are(tmp_path):
    """It keeps the first axis last: (y, x, frame) stand in the file as (frame, x, y), a dark (y, x) as (x, y)."""
    frames = np.random.default_rng(0).poisson(30, (16, N, N)).astype(np.uint16)
    dark = np.zeros((N, N), np.float32)
    dark[2, 5], frames[:, 2, 5] = 1000, 1030
    where = 1e-6 * np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij"), -1).reshape(-1, 2)
    for name, array in {"scan.mat": frames, "dark.mat": dark}.items():
        with h5py.File(tmp_path / name, "w", userblock_size=512) as file:
            file["taken"] = np.moveaxis(array, 0, -1).T if array.ndim == 3 else array.T
            file["taken"].attrs["MATLAB_class"] = np.bytes_("uint16")
    with h5py.File(tmp_path / "where.h5", "w") as file:
        file["p"] = where
    settings = ReadSettings(
        frames=f"{tmp_path}/scan.mat:/taken",
        positions=f"{tmp_path}/where.h5:/p[m]",
        energy=8800.0,
        distance=2.4,
        detector_pixel=75e-6,
        correction=Correction(dark=isolated_array(f"{tmp_path}/dark.mat", ("taken",))),
    )
    taken = read_recording(tmp_path / "scan.mat", zero_frequency="centre", settings=settings)
    np.testing.assert_array_equal(taken.counts, np.where(dark > 0, 30, frames))


def test_a_probe_of_an_older_matlab(tmp_path):
    probe, kept = matlab_probe()
    scipy.io.savemat(tmp_path / "old.mat", {"p": kept, "other": np.zeros(3)})
    np.testing.assert_array_equal(read_probe(tmp_path / "old.mat:/p"), probe)
    with pytest.raises(ValueError, match=r"found arrays \['other', 'p'\], expected one of q"):
        read_probe(tmp_path / "old.mat:q")


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "scan.cxi")
    with pytest.raises(FileNotFoundError):
        read_recording(tmp_path / "scan.cxi", zero_frequency="centre")
