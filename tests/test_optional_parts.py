"""Parts of a recorded scan that can be given, or done without: none of them keeps a scan from being read."""

import h5py
import numpy as np
import pytest

from steering.cli import main
from steering.sources import read_recording
from tests.test_layouts import (
    DISTANCE,
    FRAMES,
    KEV,
    PIXEL,
    WAVELENGTH,
    N,
    counts,
    cxi,
    eiger_master,
    nexus,
    pair,
    ptyd,
    put,
    velociprobe,
    where,
)
from tests.test_recorded_positions import OPTICS, assert_at, read


def replace(path, name, value, unit=None):
    with h5py.File(path, "a") as file:
        if name in file:
            del file[name]
        put(file, name, value, unit)


def inspected(path, capsys, *more):
    assert main(["inspect", str(path), *more]) == 0
    return capsys.readouterr().out


DETECTOR = "entry_1/instrument_1/detector_1"
ENERGY = "entry_1/instrument_1/source_1/energy"
LINK = h5py.ExternalLink("lost.h5", "/x")


@pytest.mark.parametrize(
    ("name", "value", "unit", "words", "given"),
    [
        (ENERGY, 3.0, "GeV", "no wavelength that can be read .*'GeV'", {"energy": KEV * 1000}),
        (ENERGY, "8.8 keV", None, "no wavelength that can be read .*another type", {"energy": KEV * 1000}),
        (ENERGY, LINK, None, "no wavelength that can be read .*lost.h5", {"energy": KEV * 1000}),
        (f"{DETECTOR}/distance", b"2.0", None, "no distance that can be read .*another type", {"distance": DISTANCE}),
        (f"{DETECTOR}/distance", 2.0, "a.u.", "no distance that can be read .*'a.u.'", {"distance": DISTANCE}),
        (f"{DETECTOR}/x_pixel_size", LINK, None, "no detector pixel that can be read", {"detector_pixel": PIXEL}),
    ],
)
def test_optics_that_cannot_be_read_are_missing_until_they_are_given(tmp_path, capsys, name, value, unit, words, given):
    """They had ended everything: no option went round them, and inspect failed too."""
    path = tmp_path / "scan.cxi"
    cxi(path)
    replace(path, name, value, unit)
    with pytest.raises(ValueError, match=words) as caught:
        read(path)
    option = {"energy": "--energy", "distance": "--distance", "detector_pixel": "--pixel"}[next(iter(given))]
    assert f"give it ({option})" in str(caught.value)
    taken = read(path, **given)
    assert_at(taken, where())
    assert taken.geometry.wavelength == pytest.approx(WAVELENGTH, rel=1e-5)
    said = inspected(path, capsys)
    assert "missing: no " in said
    assert "that can be read" in said


def test_a_mask_that_cannot_be_read_may_be_left_out(tmp_path, capsys):
    eiger_master(tmp_path / "scan_master.h5")
    replace(tmp_path / "scan_master.h5", "entry/instrument/detector/detectorSpecific/pixel_mask", LINK)
    with pytest.raises(ValueError, match=r"lost.h5, which is not there.* leave the mask out \(--mask none\)"):
        read(tmp_path / "scan_master.h5")
    assert_at(read(tmp_path / "scan_master.h5", mask="none"), where())
    assert "doubtful: found the link" in inspected(tmp_path / "scan_master.h5", capsys)


def test_a_damaged_mask_may_be_left_out(tmp_path):
    """Found by fuzzing."""
    cxi(tmp_path / "scan.cxi")
    with h5py.File(tmp_path / "scan.cxi", "a") as file:
        del file[f"{DETECTOR}/mask"]
        damaged = file.create_dataset(f"{DETECTOR}/mask", (N, N), np.uint8, chunks=(N, N), compression="gzip")
        damaged.id.write_direct_chunk((0, 0), b"no deflate")
    with pytest.raises(ValueError, match=r"found a mask that cannot be read \(.*filter.*\(--mask none\)"):
        read(tmp_path / "scan.cxi")
    assert_at(read(tmp_path / "scan.cxi", mask="none"), where())


@pytest.mark.parametrize("weights", [None, np.zeros(0)], ids=["no weights", "empty weights"])
@pytest.mark.parametrize("place", ["meta/weight2d", "info/weight2d", "common/weight2d", None])
def test_the_mask_of_ptypy_where_chunks_have_none(tmp_path, weights, place):
    """Empty weights were refused, also with --mask none, and meta/weight2d was not looked for."""
    path = tmp_path / "scan.ptyd"
    ptyd(path)
    good = np.ones((N, N))
    good[3, 5] = 0
    with h5py.File(path, "a") as file:
        for k in (0, 1):
            del file[f"chunks/{k}/weights"]
            if weights is not None:
                file[f"chunks/{k}/weights"] = weights
        if place is not None:
            file[place] = good
    taken = read(path)
    assert_at(taken, where())
    assert (np.argwhere(taken.geometry.mask).tolist() if place else taken.geometry.mask) == (
        [[3, 5]] if place else None
    )
    assert read(path, mask="none").geometry.mask is None


def test_frames_without_their_pair_are_read_where_all_else_is_given(tmp_path, capsys):
    pair(tmp_path / "scan_dp.hdf5")
    (tmp_path / "scan_para.hdf5").unlink()
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["x"], file["y"] = where()[:, 1], where()[:, 0]
    assert_at(read(tmp_path / "scan_dp.hdf5", positions="mine.h5:/x,/y[m]", **OPTICS), where())
    with pytest.raises(ValueError, match=r"found no wavelength .*\(--energy\)"):
        read(tmp_path / "scan_dp.hdf5", positions="mine.h5:/x,/y[m]")
    with pytest.raises(ValueError, match=r"found no scan_para.hdf5, expected a pair .*or give positions and optics"):
        read(tmp_path / "scan_dp.hdf5")
    assert "missing: no scan_para.hdf5" in inspected(tmp_path / "scan_dp.hdf5", capsys)


def test_positions_and_frames_that_are_given_go_before_broken_links(tmp_path):
    path = nexus(tmp_path / "scan.h5", LINK, None, None)
    for name in "xy":
        replace(path, f"entry/data/{name}", LINK)
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["frames"], file["x"], file["y"] = counts(), where()[:, 1], where()[:, 0]
    assert_at(read(path, frames="mine.h5:/frames", positions="mine.h5:/x,/y[m]"), where())
    with pytest.raises(ValueError, match=r"lost.h5, which is not there"):
        read(path, positions="mine.h5:/x,/y[m]")


def test_detector_pixels_that_are_not_square_may_be_given(tmp_path, capsys):
    cxi(tmp_path / "scan.cxi")
    replace(tmp_path / "scan.cxi", f"{DETECTOR}/y_pixel_size", 2 * PIXEL, "m")
    with pytest.raises(ValueError, match=r"found detector pixels of .*, expected square ones: rebin"):
        read(tmp_path / "scan.cxi")
    assert "doubtful: found detector pixels" in inspected(tmp_path / "scan.cxi", capsys)
    assert_at(read(tmp_path / "scan.cxi", detector_pixel=PIXEL), where())


def test_numbers_of_written_frames_that_cannot_be_read_are_said(tmp_path):
    eiger_master(tmp_path / "scan_master.h5")
    replace(tmp_path / "scan_master.h5", "entry/uniqueKeys", LINK)
    taken = read(tmp_path / "scan_master.h5")
    assert_at(taken, where())
    assert any("which frames were written cannot be read, all are taken: found the link" in n for n in taken.notes)


def test_a_probe_that_cannot_be_read_is_done_without(tmp_path):
    cxi(tmp_path / "scan.cxi")
    replace(tmp_path / "scan.cxi", "entry_1/instrument_1/source_1/probe", LINK)
    taken = read(tmp_path / "scan.cxi")
    assert taken.probe is None
    assert any("the file's probe cannot be read: found the link" in note for note in taken.notes)
    given = read_recording(tmp_path / "scan.cxi", zero_frequency="centre", probe=np.ones((N, N), np.complex64))
    assert given.probe is not None


def test_where_a_motor_stood_is_no_position_of_each_frame(tmp_path):
    path = nexus(tmp_path / "scan.h5", counts(), where()[:, 1] * 1e6, where()[:, 0] * 1e6)
    for name in "xy":
        replace(path, f"entry/sample/{name}", 0.5, "mm")
    assert_at(read(path), where())
    line = nexus(tmp_path / "line.h5", counts(), None, where()[:, 0] * 1e6)
    replace(line, "entry/sample/x", 0.5, "mm")
    assert_at(read(line), where() * (1, 0))


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked as UTF-8"])
@pytest.mark.parametrize(
    ("head", "between", "named"),
    [("x,y\n", ",", "t.txt:/x,/y[um]"), ("", ",", "t.txt:/0,/1[um]"), ("# x y\n", " ", "t.txt:/x,/y[um]"),
     ("# made today\n#x\ty\n", "\t", "t.txt:/x,/y[um]"), ("# 3 4\n", " ", "t.txt:/0,/1[um]")],
)  # fmt: skip
def test_tables_as_spreadsheets_and_numpy_write_them(tmp_path, head, between, named, marked):
    """A mark of UTF-8 made the first name, or the first row, unreadable; names in a comment were not seen."""
    rows = "\n".join(f"{x * 1e6!r}{between}{y * 1e6!r}" for y, x in where().tolist())
    (tmp_path / "t.txt").write_text(head + rows, encoding="utf-8-sig" if marked else "utf-8")
    path = nexus(tmp_path / "scan.h5", counts(), None, None)
    assert_at(read(path, positions=named), where())


@pytest.mark.parametrize("comment", ["velociprobe", "a b c d e f g h i"])
def test_a_table_of_velociprobe_may_have_more_columns(tmp_path, comment):
    velociprobe(tmp_path / "scan_master.h5")
    rows = (tmp_path / "scan.csv").read_text().splitlines()[1:]
    (tmp_path / "scan.csv").write_text("\n".join([f"# {comment.replace(' ', ',')}", *(f"{row},0" for row in rows)]))
    assert_at(read(tmp_path / "scan_master.h5", positions="scan.csv"), where(), atol=1e-9)


def test_arrays_that_differ_in_number_are_cut_in_their_file(tmp_path):
    np.savez(tmp_path / "scan.npz", data=counts(), scan=np.zeros((FRAMES - 1, 2)))
    with pytest.raises(
        ValueError, match=r"if the first 5 belong together.*, keep these of both arrays, data and scan"
    ) as caught:
        read(tmp_path / "scan.npz")
    assert "--positions" not in str(caught.value)


@pytest.mark.parametrize(("frames", "positions"), [(FRAMES, FRAMES - 1), (FRAMES - 2, FRAMES)])
def test_frames_and_positions_that_differ_in_number_are_said_with_a_way_out(tmp_path, capsys, frames, positions):
    y, x = where()[:positions].T * 1e6
    path = nexus(tmp_path / "scan.h5", counts()[:frames], x, y)
    few = min(frames, positions)
    words = rf"found {frames} frames and positions of shape \({positions}, 2\).*if the first {few} belong together"
    with pytest.raises(ValueError, match=words) as caught:
        read(path)
    assert "doubtful: found" in inspected(path, capsys)
    if few < positions:
        assert "(--positions FILE:/0,/1[unit])" in str(caught.value)
        np.savetxt(tmp_path / "cut.txt", np.c_[x, y][:few])
        taken = read(path, positions="cut.txt:/0,/1[um]")
    else:
        assert "(--frames FILE:/path)" in str(caught.value)
        with h5py.File(tmp_path / "cut.h5", "w") as file:
            file["frames"] = counts()[:few]
        taken = read(path, frames="cut.h5:/frames")
    assert_at(taken, where()[:few])
    np.testing.assert_array_equal(taken.counts, counts()[:few])
