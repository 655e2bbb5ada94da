"""The layouts that people have: a file of each kind gives the same scan, and what it lacks is named."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, strategies as st

from steering.cli import main
from steering.files.layouts import LAYOUTS
from steering.files.tables import table_positions
from steering.sources import ReadSettings, read_recording
from steering.sources.correction import add_correction, given_correction

N, FRAMES = 16, 6
KEV, WAVELENGTH, DISTANCE, PIXEL = 8.8, 1.408911e-10, 2.0, 75e-6
OBJECT_PIXEL = WAVELENGTH * DISTANCE / (N * PIXEL)


def counts():
    return np.random.default_rng(0).poisson(20, (FRAMES, N, N)).astype(np.uint32)


def where():
    """(n, 2) of (y, x), metres."""
    return np.random.default_rng(1).uniform(-1e-6, 1e-6, (FRAMES, 2))


def mask():
    bad = np.zeros((N, N), np.uint32)
    bad[3, 5] = 1
    return bad


def probe():
    return np.exp(1j * np.arange(N * N).reshape(N, N)).astype(np.complex64)


def put(file, name, value, unit=None):
    file[name] = value
    if unit is not None:
        file[name].attrs["units"] = unit


def detector(file, group, names=("distance", "x_pixel_size", "y_pixel_size")):
    for name, value in zip(names, (DISTANCE * 1e3, PIXEL * 1e6, PIXEL * 1e6), strict=True):
        put(file, f"{group}/{name}", np.array([value]), "mm" if value == DISTANCE * 1e3 else "um")


def cxi(path):
    with h5py.File(path, "w") as file:
        file["entry_1/data_1/data"] = counts()
        file["entry_1/sample_1/geometry_1/translation"] = np.c_[where()[:, ::-1], np.zeros(FRAMES)]
        put(file, "entry_1/instrument_1/source_1/energy", KEV * 1.602176634e-16, "J")
        detector(file, "entry_1/instrument_1/detector_1")
        file["entry_1/instrument_1/detector_1/mask"] = mask()
        file["entry_1/instrument_1/source_1/probe"] = probe()


def diamond(path):
    with h5py.File(path, "w") as file:
        file["entry_1/instrument_1/detector_1/data"] = counts().reshape(2, 3, N, N)
        file["entry_1/data/data"] = h5py.SoftLink("/entry_1/instrument_1/detector_1/data")
        put(file, "entry_1/data/x", where()[:, 1].reshape(-1, 1, 1) * 1e3, b"mm")
        put(file, "entry_1/data/y", where()[:, 0].reshape(-1, 1, 1) * 1e6, "\u00b5m")
        put(file, "entry_1/instrument_1/source_1/energy", 3.0, "GeV")
        put(file, "entry_1/instrument_1/beam_1/energy", KEV, "keV")
        detector(file, "entry_1/instrument_1/detector_1")
        file["entry_1/instrument_1/detector_1/mask"] = mask()


def eiger_master(path):
    for k in range(2):
        with h5py.File(path.with_name(f"scan_data_{k + 1:06d}.h5"), "w") as raw:
            raw["entry/data/data"] = counts()[3 * k : 3 * k + 3]
    with h5py.File(path, "w") as file:
        for k in range(2):
            file[f"entry/data/data_{k + 1:06d}"] = h5py.ExternalLink(f"scan_data_{k + 1:06d}.h5", "/entry/data/data")
        eiger_metadata(file)


def eiger_metadata(file):
    group = "entry/instrument/detector"
    detector(file, group, ("detector_distance", "x_pixel_size", "y_pixel_size"))
    put(file, f"{group}/detectorSpecific/photon_energy", np.float32(KEV * 1000), "eV")
    file[f"{group}/detectorSpecific/pixel_mask"] = mask()
    put(file, "entry/sample/x", where()[:, 1] * 1e6, "um")
    put(file, "entry/sample/y", where()[:, 0] * 1e6, "um")


def eiger_virtual_with_channels(path):
    with h5py.File(path.with_name("raw.h5"), "w") as raw:
        raw["data"] = np.stack([counts(), counts() * 0], axis=1)
    layout = h5py.VirtualLayout((FRAMES, 2, N, N), np.uint32)
    layout[:] = h5py.VirtualSource("raw.h5", "data", (FRAMES, 2, N, N))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("entry/data/data", layout)
        eiger_metadata(file)


def area_detector(path):
    with h5py.File(path, "w") as file:
        file["entry/data/data"] = counts()
        file["entry/instrument/NDAttributes/NDArrayUniqueId"] = np.arange(FRAMES)
        put(file, "entry/instrument/NDAttributes/SampleX", where()[:, 1] * 1e6, "um")
        put(file, "entry/instrument/NDAttributes/SampleY", where()[:, 0] * 1e6, "um")
        detector(file, "entry/instrument/detector")
        put(file, "entry/instrument/beam/incident_wavelength", WAVELENGTH * 1e10)
        file["entry/instrument/detector/pixel_mask"] = mask()


def ptyd(path):
    with h5py.File(path, "w") as file:
        for k in (0, 1):
            rows = slice(3 * k, 3 * k + 3)
            file[f"chunks/{k}/data"], file[f"chunks/{k}/positions"] = counts()[rows], where()[rows]
            file[f"chunks/{k}/weights"] = np.broadcast_to(1.0 - mask(), (3, N, N))
            file[f"chunks/{k}/indices"] = np.arange(3) + 3 * k
        file["meta/energy"], file["meta/distance"], file["meta/psize"] = KEV, DISTANCE, np.full(2, PIXEL)


def pair(path):
    with h5py.File(path.with_name("scan_para.hdf5"), "w") as file:
        file["probe_position_x_m"], file["probe_position_y_m"] = where()[:, 1], where()[:, 0]
        file["probe_position_indexes"] = np.arange(FRAMES)
        file["object"] = np.ones((64, 64), np.complex64)
        file["probe"] = probe()[None]
        for name in ("object", "probe"):
            file[name].attrs.update(pixel_width_m=OBJECT_PIXEL, pixel_height_m=OBJECT_PIXEL)
    with h5py.File(path, "w") as file:
        file["dp"] = counts()


def hxn(path):
    with h5py.File(path, "w") as file:
        file["diffamp"] = np.sqrt(counts()).astype(np.float32)
        file["points"] = where()[:, ::-1].T * 1e6
        file["lambda_nm"], file["z_m"], file["ccd_pixel_um"] = WAVELENGTH * 1e9, DISTANCE, PIXEL * 1e6
        file["angle"] = 0.0


def nanomax(path):
    with h5py.File(path, "w") as file:
        file["entry/measurement/eiger1m/frames"] = counts()
        file["entry/measurement/pseudo/x"], file["entry/measurement/pseudo/y"] = (
            where()[:, 1] * 1e6,
            where()[:, 0] * 1e6,
        )


def lynx(path):
    """Numbers as attributes of the frames, in keV and metres."""
    with h5py.File(path, "w") as file:
        file["entry/data/eiger_4"] = counts()
        file["entry/data/eiger_4"].attrs.update(
            Photon_energy_kev=np.array([KEV]), Detector_distance_m=DISTANCE, Pixel_size=PIXEL, Center_x_pixel=8
        )
        file["entry/instrument/detector/pixel_mask"] = mask()
        put(file, "entry/sample/x", where()[:, 1] * 1e6, "um")
        put(file, "entry/sample/y", where()[:, 0] * 1e6, "um")


def p45(path):
    """Frames in another file, a raster that was ended early."""
    with h5py.File(path.with_name("raw.h5"), "w") as raw:
        raw["frames"] = np.concatenate([counts(), np.zeros((2, N, N), np.uint32)]).reshape(2, 4, N, N)
    with h5py.File(path, "w") as file:
        file["entry/merlin/data"] = h5py.ExternalLink("raw.h5", "/frames")
        keys = np.r_[np.arange(FRAMES) + 1, 0, 0].reshape(2, 4)
        file.create_dataset("entry/solstice_scan/keys/uniqueKeys", data=keys, maxshape=(None, None))
        for column, name in enumerate(("stage_y", "stage_x")):
            values = np.r_[where()[:, column] * 1e3, 0, 0].reshape(2, 4)
            file.create_dataset(f"entry/merlin/{name}", data=values, maxshape=(None, None))
        eiger_metadata(file)
        del file["entry/sample"]


def velociprobe(path):
    """Positions in a table without names, two rows of each frame, y counted downwards."""
    with h5py.File(path, "w") as file:
        file["entry/data/data"] = counts()
        eiger_metadata(file)
        del file["entry/sample"]
    nm = np.rint(where() * 1e9).astype(int)
    rows = [f"0,{x + wobble},0,0,0,{-y - wobble},0,{k}" for k, (y, x) in enumerate(nm) for wobble in (-1, 1)]
    path.with_name("scan.csv").write_text("# velociprobe\n" + "\n".join(rows))


def lynx_orchestra(path):
    """Positions in a table with a title and names, both signs turned."""
    lynx(path)
    with h5py.File(path, "a") as file:
        del file["entry/sample"]
    rows = [f"{k} {FRAMES} 0 {-1e6 * x!r} 0 0 {-1e6 * y!r} 0" for k, (y, x) in enumerate(where().tolist())]
    names = "DataPoint TotalPoints Target_x Average_x_st_fzp Stdev_x_st_fzp Target_y Average_y_st_fzp Stdev_y_st_fzp"
    path.with_name("scan.dat").write_text(f"LYNX scan 7, done\n{names}\n" + "\n".join(rows) + "\n")


KINDS = {
    cxi: "scan.cxi",
    diamond: "scan.nxs",
    eiger_master: "scan_master.h5",
    eiger_virtual_with_channels: "scan_master.h5",
    area_detector: "scan.h5",
    ptyd: "scan.ptyd",
    pair: "scan_dp.hdf5",
    hxn: "scan.h5",
    nanomax: "scan.h5",
    lynx: "scan.h5",
    p45: "scan.nxs",
    velociprobe: "scan_master.h5",
    lynx_orchestra: "scan.h5",
}
GIVEN = {
    p45: {"positions": ":/entry/merlin/stage_x,/entry/merlin/stage_y[mm]"},
    velociprobe: {"positions": "scan.csv"},
    lynx_orchestra: {"positions": "scan.dat"},
    nanomax: {"energy": KEV * 1000, "distance": DISTANCE, "detector_pixel": PIXEL},
}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_file_of_each_layout_gives_the_same_scan(make, tmp_path, capsys):
    path = tmp_path / KINDS[make]
    make(path)
    taken = read_recording(path, zero_frequency="centre", settings=ReadSettings(**GIVEN.get(make, {})))
    np.testing.assert_array_equal(taken.counts[:, mask() == 0], counts()[:, mask() == 0])
    expected = where() - where().mean(0)
    in_metres = taken.geometry.length_unit == "m"
    assert in_metres == (make is not pair)
    np.testing.assert_allclose(
        taken.positions,
        expected if in_metres else expected / OBJECT_PIXEL,
        rtol=1e-6,
        atol=1e-9 if make is velociprobe else 1e-14,  # whole nanometres
    )
    if in_metres:
        assert taken.geometry.object_pixel == pytest.approx(OBJECT_PIXEL, rel=1e-5)
    if make in (pair, hxn, nanomax):
        assert taken.geometry.mask is None
    else:
        assert np.argwhere(taken.geometry.mask).tolist() == [[3, 5]]
    assert (taken.probe is not None) == (make in (cxi, pair))
    where_else = GIVEN.get(make, {}).get("positions")
    assert main(["inspect", str(path), *([] if where_else is None else ["--positions", where_else])]) == 0
    said = capsys.readouterr().out
    assert "6 (y, x)" in said
    assert "(6, " in said or "(2, 3, " in said or make is p45
    assert ("missing" in said) == (make is nanomax)


@pytest.mark.parametrize("mark", [-1, np.nan])
def test_a_mark_in_amplitudes_is_one_before_they_are_squared(tmp_path, mark):
    """-1 squared is a count."""
    hxn(tmp_path / "a.h5")
    amplitude = np.sqrt(counts()).astype(np.float32)
    amplitude[:, 3, 5], amplitude[2, 8, 8] = mark, mark
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["diffamp"][:] = amplitude
    taken = read_recording(tmp_path / "a.h5", zero_frequency="centre")
    assert np.argwhere(taken.geometry.mask).tolist() == [[3, 5]]
    wanted = counts()
    wanted[2, 8, 8] = round(np.delete(counts()[:, 8, 8], 2).mean())
    np.testing.assert_array_equal(taken.counts[:, mask() == 0], wanted[:, mask() == 0])
    assert taken.counts.dtype == np.uint8


def test_a_mask_of_each_frame_hides_a_pixel_in_these_frames_alone(tmp_path):
    """Elsewhere the pixel has its mean over the others, as where a detector flags it; it had its hot counts."""
    bad = np.zeros((FRAMES, N, N), np.uint32)
    bad[:, 3, 5] = 1
    bad[1:5, 8, 2] = 8
    hot = np.where(bad == 8, 900, counts())
    cxi(tmp_path / "a.cxi")
    ptyd(tmp_path / "a.ptyd")
    with h5py.File(tmp_path / "a.cxi", "a") as file:
        del file["entry_1/data_1/data"], file["entry_1/instrument_1/detector_1/mask"]
        file["entry_1/data_1/data"], file["entry_1/instrument_1/detector_1/mask"] = hot, bad
    with h5py.File(tmp_path / "a.ptyd", "a") as file:
        for k in range(2):
            for name, values in (("data", hot), ("weights", 1.0 - (bad > 0))):
                file[f"chunks/{k}/{name}"][:] = values[3 * k : 3 * k + 3]
    for name in ("a.cxi", "a.ptyd"):
        taken = read_recording(tmp_path / name, zero_frequency="centre")
        assert np.argwhere(taken.geometry.mask).tolist() == [[3, 5]]
        wanted = counts()
        wanted[1:5, 8, 2] = round(counts()[[0, 5], 8, 2].mean())
        seen = mask() == 0
        np.testing.assert_array_equal(taken.counts[:, seen], wanted[:, seen])
    raw = read_recording(tmp_path / "a.cxi", zero_frequency="centre", settings=ReadSettings(mask="none"))
    np.testing.assert_array_equal(raw.counts, hot)


def test_a_dark_in_the_file_is_said_not_to_be_subtracted_and_can_be_given(tmp_path, capsys):
    cxi(tmp_path / "a.cxi")
    with h5py.File(tmp_path / "a.cxi", "a") as file:
        file["entry_1/data_1/data"][:] += 100
        file["entry_1/instrument_1/detector_1/data_dark"] = np.full((5, N, N), 100.0)
    raw = read_recording(tmp_path / "a.cxi", zero_frequency="centre")
    assert raw.counts.mean() > 100
    said = f"data_dark is subtracted only where it is given (--dark {tmp_path / 'a.cxi'})"
    assert any(note.endswith(said) for note in raw.notes)
    assert main(["inspect", str(tmp_path / "a.cxi")]) == 0
    assert said in capsys.readouterr().out
    parser = argparse.ArgumentParser()
    add_correction(parser)
    correction = given_correction(parser.parse_args(["--dark", str(tmp_path / "a.cxi")]))
    taken = read_recording(tmp_path / "a.cxi", zero_frequency="centre", settings=ReadSettings(correction=correction))
    np.testing.assert_array_equal(taken.counts[:, mask() == 0], counts()[:, mask() == 0])


def test_a_mask_of_other_images_than_the_frames_is_said_to_be_taken_for_all(tmp_path):
    cxi(tmp_path / "a.cxi")
    with h5py.File(tmp_path / "a.cxi", "a") as file:
        del file["entry_1/instrument_1/detector_1/mask"]
        file["entry_1/instrument_1/detector_1/mask"] = np.stack([mask(), mask()])
    taken = read_recording(tmp_path / "a.cxi", zero_frequency="centre")
    assert np.argwhere(taken.geometry.mask).tolist() == [[3, 5]]
    np.testing.assert_array_equal(taken.counts, counts())
    assert "the mask has 2 images, and there are 6 frames" in " ".join(taken.notes)


def test_positions_that_say_of_which_frame_they_are(tmp_path, capsys):
    """A pair whose positions are of some frames, in another order: never those of other frames."""
    pair(tmp_path / "scan_dp.hdf5")
    order = np.array([4, 0, 5])

    def say(numbers) -> None:
        with h5py.File(tmp_path / "scan_para.hdf5", "a") as file:
            for name, values in (("x", where()[order, 1]), ("y", where()[order, 0])):
                del file[f"probe_position_{name}_m"]
                file[f"probe_position_{name}_m"] = values
            del file["probe_position_indexes"]
            file["probe_position_indexes"] = numbers

    say(order.astype(float))
    taken = read_recording(tmp_path / "scan_dp.hdf5", zero_frequency="centre")
    np.testing.assert_array_equal(taken.counts, counts()[order])
    np.testing.assert_allclose(taken.positions, (where()[order] - where()[order].mean(0)) / OBJECT_PIXEL, rtol=1e-6)
    assert main(["inspect", str(tmp_path / "scan_dp.hdf5")]) == 0
    assert "of which 3 have positions" in capsys.readouterr().out
    for wrong in ([4, 0, 6], [4, 4, 5], [0.5, 1, 2], [-1, 1, 2]):
        say(wrong)
        with pytest.raises(
            ValueError, match="found numbers of frames in /probe_position_indexes that are not of 0 to 5"
        ):
            read_recording(tmp_path / "scan_dp.hdf5", zero_frequency="centre")


def test_a_pair_is_in_metres_where_its_optics_are_given_and_agree(tmp_path):
    pair(tmp_path / "scan_dp.hdf5")
    optics = {"energy": KEV * 1000, "distance": DISTANCE, "detector_pixel": PIXEL}
    taken = read_recording(tmp_path / "scan_dp.hdf5", zero_frequency="centre", settings=ReadSettings(**optics))
    assert taken.geometry.object_pixel == pytest.approx(OBJECT_PIXEL, rel=1e-5)
    np.testing.assert_allclose(taken.positions, where() - where().mean(0), atol=1e-14)
    wrong = ReadSettings(**optics | {"distance": 1.5})
    with pytest.raises(ValueError, match="m in the file, and of"):
        read_recording(tmp_path / "scan_dp.hdf5", zero_frequency="centre", settings=wrong)


def test_every_layout_has_its_file():
    names = {layout.name for layout in LAYOUTS}
    assert len(names) == len(LAYOUTS) == 9
    assert len(KINDS) >= len(LAYOUTS)


def test_what_is_missing_is_named_with_the_option_that_gives_it(tmp_path, capsys):
    nanomax(tmp_path / "scan.h5")
    with pytest.raises(ValueError, match=r"no wavelength .*give it \(--energy\)"):
        read_recording(tmp_path / "scan.h5", zero_frequency="centre")
    assert main(["inspect", str(tmp_path / "scan.h5")]) == 0
    said = capsys.readouterr().out
    for option in ("--energy", "--distance", "--pixel"):
        assert f"missing: no {'' if option != '--energy' else 'wavelength'}" in said
        assert option in said
    pair(tmp_path / "scan_dp.hdf5")
    (tmp_path / "scan_para.hdf5").unlink()
    with pytest.raises(ValueError, match="a pair NAME_dp"):
        read_recording(tmp_path / "scan_dp.hdf5", zero_frequency="centre")


def test_frames_and_positions_from_files_that_are_named(tmp_path):
    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file["some/where"] = counts()
    with h5py.File(tmp_path / "motors.h5", "w") as file:
        file["x"], file["y"] = where()[:, 1] * 1e9, where()[:, 0] * 1e9
    optics = {"energy": KEV * 1000, "distance": DISTANCE, "detector_pixel": PIXEL}
    settings = ReadSettings(frames=":/some/where", positions="motors.h5:/x,/y[nm]", **optics)
    taken = read_recording(tmp_path / "frames.h5", zero_frequency="centre", settings=settings)
    np.testing.assert_array_equal(taken.counts, counts())
    np.testing.assert_allclose(taken.positions, where() - where().mean(0), atol=1e-14)
    rows = [f"{x * 1e9!r} {y * 1e9!r} 7" for y, x in where().tolist()]
    (tmp_path / "motors.txt").write_text("x y dwell\n" + "\n".join(rows))
    for named in ("motors.txt:/x,/y[nm]", "motors.txt:/0,/1[nm]"):
        settings = ReadSettings(frames=":/some/where", positions=named, **optics)
        taken = read_recording(tmp_path / "frames.h5", zero_frequency="centre", settings=settings)
        np.testing.assert_allclose(taken.positions, where() - where().mean(0), atol=1e-14)
    (tmp_path / "short.txt").write_text("\n".join(rows[:-1]))
    for wrong in (
        "motors.txt",
        "motors.txt:/x,/z[nm]",
        "short.txt:/0,/1[nm]",
        "motors.h5:/z[nm]",
        "nothing.h5:/x,/y",
        "motors.h5:/x,/y[parsec]",
        "x",
    ):
        with pytest.raises(ValueError, match="found"):
            read_recording(
                tmp_path / "frames.h5",
                zero_frequency="centre",
                settings=ReadSettings(frames=":/some/where", positions=wrong, **optics),
            )


LETTERS = "0123456789.,- eE+\n#x_stfzpDaPoint"


@given(content=st.one_of(st.binary(max_size=300), st.text(LETTERS, max_size=300).map(str.encode)))
def test_any_file_as_a_table_of_positions_ends_in_a_clear_error_or_in_positions(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "positions.csv"
        path.write_bytes(content)
        said = "found "
        try:
            assert table_positions(path, 3)[0].shape == (3, 2)
        except ValueError as error:
            said = str(error)
        assert said.startswith("found ")


def test_a_file_with_frames_under_two_layouts_is_read_as_the_one_that_has_positions(tmp_path):
    cxi(tmp_path / "scan.cxi")
    with h5py.File(tmp_path / "scan.cxi", "a") as file:
        file["entry_1/data/data"] = h5py.SoftLink("/entry_1/data_1/data")
    taken = read_recording(tmp_path / "scan.cxi", zero_frequency="centre")
    np.testing.assert_allclose(taken.positions, where() - where().mean(0), atol=1e-18)


def nexus(path, frames, x, y, **numbers):
    """A NeXus file whose numbers say no unit; positions in um."""
    numbers = {"detector_distance": DISTANCE, "x_pixel_size": PIXEL, "y_pixel_size": PIXEL} | numbers
    with h5py.File(path, "w") as file:
        file["entry/data/data"] = frames
        for name, value in numbers.items():
            file[f"entry/instrument/detector/{name}"] = value
        file["entry/instrument/monochromator/energy"] = KEV * 1000
        for name, values in (("x", x), ("y", y)):
            if values is not None:
                put(file, f"entry/data/{name}", values, "um")
    return path


def raster(rows, columns):
    """Frames (rows, columns, y, x), and positions (rows * columns, 2) of (y, x), um."""
    frames = np.random.default_rng(0).poisson(20, (rows, columns, N, N)).astype(np.uint16)
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2) * 0.5
    return frames, grid


@pytest.mark.parametrize("given", [False, True], ids=["in the file", "given"])
@pytest.mark.parametrize("said", ["axes", "each"])
@pytest.mark.parametrize("shape", [(5, 5), (10, 8), (3, 2), (2, 3)])
def test_a_small_raster_is_no_set_of_channels(tmp_path, shape, said, given):
    frames, grid = raster(*shape)
    y, x = (np.unique(grid[:, 0]), np.unique(grid[:, 1])) if said == "axes" else grid.T
    path = nexus(tmp_path / "scan.h5", frames, None if given else x, None if given else y)
    settings = ReadSettings()
    if given:
        with h5py.File(tmp_path / "motors.h5", "w") as file:
            file["x"], file["y"] = x, y
        settings = ReadSettings(positions="motors.h5:/x,/y[um]")
    taken = read_recording(path, zero_frequency="centre", settings=settings)
    np.testing.assert_array_equal(taken.counts, frames.reshape(-1, N, N))
    np.testing.assert_allclose(taken.positions, (grid - grid.mean(0)) * 1e-6, atol=1e-15)
    assert not any("channels" in note for note in taken.notes)


def test_a_raster_whose_slow_axis_is_x(tmp_path):
    frames, grid = raster(4, 3)
    path = nexus(tmp_path / "scan.h5", frames, x=np.arange(4) * 0.5, y=np.arange(3) * 0.5)
    for settings in (ReadSettings(), ReadSettings(frames=":/entry/data/data")):
        taken = read_recording(path, zero_frequency="centre", settings=settings)
        np.testing.assert_array_equal(taken.counts, frames.reshape(-1, N, N))
        np.testing.assert_allclose(taken.positions, (grid - grid.mean(0))[:, ::-1] * 1e-6, atol=1e-15)


def test_channels_are_told_by_the_positions_and_noted(tmp_path, capsys):
    frames, _ = raster(FRAMES, 4)
    y, x = where().T * 1e6
    path = nexus(tmp_path / "scan.h5", frames, x, y)
    taken = read_recording(path, zero_frequency="centre")
    np.testing.assert_array_equal(taken.counts, frames[:, 0])
    np.testing.assert_allclose(taken.positions, where() - where().mean(0), atol=1e-15)
    assert any("they have 4 channels, of which the first is used" in note for note in taken.notes)
    for columns, words in ((3, "taken as 3 channels"), (4, "taken as a raster of 24 frames")):
        nexus(path, raster(FRAMES, columns)[0], None, None)
        assert main(["inspect", str(path)]) == 0
        assert words in capsys.readouterr().out


def test_a_table_tells_a_raster_from_channels(tmp_path):
    frames, grid = raster(5, 3)
    path = nexus(tmp_path / "scan.h5", frames, None, None)
    for named, rows in (("t.txt:/0,/1[um]", "{x!r} {y!r}"), ("t.csv", "0,{nm_x!r},0,0,0,{nm_y!r},0,{k}")):
        lines = [rows.format(x=x, y=y, nm_x=x * 1e3, nm_y=-y * 1e3, k=k) for k, (y, x) in enumerate(grid.tolist())]
        (tmp_path / named.partition(":")[0]).write_text("\n".join(lines))
        taken = read_recording(path, zero_frequency="centre", settings=ReadSettings(positions=named))
        np.testing.assert_array_equal(taken.counts, frames.reshape(-1, N, N))
        np.testing.assert_allclose(taken.positions, (grid - grid.mean(0)) * 1e-6, atol=1e-15)


def test_a_unit_that_is_said_goes_before_that_of_a_known_table(tmp_path):
    lynx_orchestra(tmp_path / "scan.h5")
    table = tmp_path / "scan.dat"
    title, names, *rows = table.read_text().splitlines()
    scaled = [" ".join(repr(1e3 * float(v)) if k in (3, 6) else v for k, v in enumerate(row.split())) for row in rows]
    table.write_text("\n".join([title, names, *scaled]))
    taken = read_recording(
        tmp_path / "scan.h5", zero_frequency="centre", settings=ReadSettings(positions="scan.dat[nm]")
    )
    np.testing.assert_allclose(taken.positions, where() - where().mean(0), atol=1e-14)
    with pytest.raises(ValueError, match="would overlap if they were in nm"):
        read_recording(tmp_path / "scan.h5", zero_frequency="centre", settings=ReadSettings(positions="scan.dat"))


@pytest.mark.parametrize(
    ("where_else", "said"), [("a", "/some/a uint32 (2, 16, 16)"), ("*", "/some/a uint32 (6, 16, 16)")]
)
def test_frames_at_a_group_or_a_pattern_are_all_taken_and_inspected_unread(tmp_path, capsys, where_else, said):
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        for k, name in enumerate("abc"):
            file[f"some/{name}"] = counts()[2 * k : 2 * k + 2]
        file["x"], file["y"] = where()[:, 1], where()[:, 0]
        file["mixed/data"], file["mixed/x"] = counts(), where()[:, 1]
    path = tmp_path / "scan.h5"
    assert main(["inspect", str(path), "--frames", f":/some/{where_else}", "--most-bytes", "1000"]) == 0
    assert f"frames: scan.h5: {said}" in capsys.readouterr().out
    settings = ReadSettings(positions=":/x,/y[m]", energy=KEV * 1000, distance=DISTANCE, detector_pixel=PIXEL)
    if where_else == "*":
        for place in (":/some/*", ":/some", ":/some/a,/some/b,/some/c"):
            taken = read_recording(path, zero_frequency="centre", settings=replace(settings, frames=place))
            np.testing.assert_array_equal(taken.counts, counts())
    with pytest.raises(ValueError, match=r"/mixed/data \(6, 16, 16\), /mixed/x \(6,\) as frames, expected"):
        read_recording(path, zero_frequency="centre", settings=replace(settings, frames=":/mixed"))


def test_energies_of_lynx_are_in_kev_wherever_they_are(tmp_path):
    lynx(tmp_path / "scan.h5")
    with h5py.File(tmp_path / "scan.h5", "a") as file:
        del file["entry/data/eiger_4"].attrs["Photon_energy_kev"]
        file["entry/instrument/monochromator/energy"] = KEV
    taken = read_recording(tmp_path / "scan.h5", zero_frequency="centre")
    assert taken.geometry.wavelength == pytest.approx(WAVELENGTH, rel=1e-5)
    for value in ("closed", KEV + 1j):
        with h5py.File(tmp_path / "scan.h5", "a") as file:
            file["entry/data/eiger_4"].attrs["Photon_energy_kev"] = value
        with pytest.raises(ValueError, match=r"Photon_energy_kev of .*, expected a real number"):
            read_recording(tmp_path / "scan.h5", zero_frequency="centre")


def test_a_relative_path_is_meant_from_where_the_reader_is_called(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        cxi(tmp_path / name / "scan.cxi")
        monkeypatch.chdir(tmp_path / name)
        assert len(read_recording("scan.cxi", zero_frequency="centre").counts) == FRAMES
