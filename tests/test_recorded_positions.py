"""Which position belongs to which frame: the axes of rasters, places that are named, tables, stages that are turned."""

import h5py
import numpy as np
import pytest

from steering.sources import ReadSettings, read_recording
from tests.test_layouts import (
    DISTANCE,
    FRAMES,
    KEV,
    OBJECT_PIXEL,
    PIXEL,
    N,
    counts,
    cxi,
    hxn,
    lynx_orchestra,
    nanomax,
    nexus,
    pair,
    probe,
    ptyd,
    put,
    raster,
    velociprobe,
    where,
)

OPTICS = {"energy": KEV * 1000, "distance": DISTANCE, "detector_pixel": PIXEL}


def read(path, **given):
    return read_recording(path, zero_frequency="centre", settings=ReadSettings(**given))


def assert_at(taken, expected, atol=1e-14):
    """expected: (n, 2) of (y, x), metres."""
    np.testing.assert_allclose(taken.positions, expected - expected.mean(0), atol=atol)


def say_axes(path, **attributes):
    with h5py.File(path, "a") as file:
        file["entry/data"].attrs.update(NX_class="NXdata", signal="data", **attributes)


@pytest.mark.parametrize("flat", [False, True], ids=["raster", "flat"])
@pytest.mark.parametrize("shape", [(4, 4), (4, 3)])
@pytest.mark.parametrize(
    "attributes",
    [
        {"axes": ["x", "y", ".", "."]},
        {"axes": np.array([b"x", b"y"])},
        {"x_indices": 0, "y_indices": np.array([1])},
        {"axes": ["y", "x", ".", "."], "x_indices": 0, "y_indices": 1},
    ],
    ids=["axes", "axes as bytes", "indices", "indices before axes"],
)
def test_the_slow_axis_is_the_one_that_the_file_says(tmp_path, attributes, shape, flat):
    """x was taken for the fast axis: a transposed image."""
    frames, _ = raster(*shape)
    x, y = np.arange(shape[0]) * 0.5, np.arange(shape[1]) * 0.3
    path = nexus(tmp_path / "scan.h5", frames.reshape(-1, N, N) if flat else frames, x, y)
    say_axes(path, **attributes)
    taken = read(path)
    np.testing.assert_array_equal(taken.counts, frames.reshape(-1, N, N))
    assert_at(taken, np.array([(b, a) for a in x for b in y]) * 1e-6)
    assert not any("slow" in note for note in taken.notes)
    given = read(path, positions=":/entry/data/x,/entry/data/y[um]", frames=":/entry/data/data")
    np.testing.assert_array_equal(given.positions, taken.positions)


def test_the_axes_of_a_group_that_links_to_the_frames(tmp_path):
    path, (frames, _) = tmp_path / "scan.nxs", raster(4, 4)
    cxi(path)
    with h5py.File(path, "a") as file:
        del file["entry_1/data_1/data"], file["entry_1/sample_1"], file["entry_1/instrument_1/source_1/probe"]
        file["entry_1/instrument_1/detector_1/data"] = frames
        file["entry_1/data/data"] = h5py.SoftLink("/entry_1/instrument_1/detector_1/data")
        put(file, "entry_1/data/x", np.arange(4) * 0.5, "um")
        put(file, "entry_1/data/y", np.arange(4) * 0.3, "um")
        file["entry_1/data"].attrs["axes"] = ["x", "y", ".", "."]
    assert_at(read(path), np.array([(b, a) for a in np.arange(4) * 0.5 for b in np.arange(4) * 0.3]) * 1e-6)


def test_where_nothing_says_which_axis_is_slow_a_note_does(tmp_path):
    frames, grid = raster(4, 4)
    taken = read(nexus(tmp_path / "square.h5", frames, np.arange(4) * 0.5, np.arange(4) * 0.5))
    assert_at(taken, grid * 1e-6)
    assert any("nothing says which axis is the slow one: y is taken" in note for note in taken.notes)
    frames, grid = raster(4, 3)
    path = nexus(tmp_path / "flat.h5", frames.reshape(-1, N, N), np.arange(3) * 0.5, np.arange(4) * 0.5)
    assert any("nothing says which axis is the slow one" in note for note in read(path).notes)
    told = read(nexus(tmp_path / "told.h5", frames, np.arange(3) * 0.5, np.arange(4) * 0.5))
    assert not any("slow" in note for note in told.notes), "the lengths of rows and columns tell"


def test_positions_that_contradict_the_raster_are_refused(tmp_path):
    """They had been paired in the order in which they stand in the file."""
    frames, grid = raster(4, 3)
    y, x = grid.T.reshape(2, 4, 3)
    assert_at(read(nexus(tmp_path / "a.h5", frames, x, y)), grid * 1e-6)
    path = nexus(tmp_path / "b.h5", frames, x.T, y.T)
    with pytest.raises(
        ValueError, match=r"on a grid of \(3, 4\) and frames of \(4, 3, y, x\), expected one grid: give"
    ):
        read(path)
    path = nexus(tmp_path / "c.h5", frames, x[0], y[:, 0])
    say_axes(path, axes=["x", "y", ".", "."])
    with pytest.raises(ValueError, match=r"4 positions in y, 3 in x, x as the slow axis, and frames of \(4, 3, y, x\)"):
        read(path)
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["p"] = np.stack([x.T, y.T], axis=-1)
    with pytest.raises(ValueError, match="expected one grid"):
        read(path, positions="p.h5:/p[um]")


@pytest.mark.parametrize("given", ["", ":/entry/data/x,/entry/data/y[um]", "p.h5:/p[um]"])
def test_frames_that_are_named_have_channels_as_well(tmp_path, given):
    """Frames of (frame, channel, y, x) at the layout's own place had become a raster once they were named."""
    frames = np.stack([counts(), counts() * 0, counts()], axis=1)
    path = nexus(tmp_path / "scan.h5", frames, *where().T[::-1] * 1e6)
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["p"] = np.c_[where()[:, ::-1] * 1e6, np.zeros(FRAMES)]
    settings = {"frames": ":/entry/data/data"} | ({"positions": given} if given else {})
    taken = read(path, **settings)
    np.testing.assert_array_equal(taken.counts, counts())
    assert_at(taken, where())
    assert any("they have 3 channels, of which the first is used" in note for note in taken.notes)


def test_a_grid_that_says_that_its_axes_are_exchanged(tmp_path):
    frames, grid = raster(4, 4)
    y, x = grid.T.reshape(2, 4, 4)
    path = nexus(tmp_path / "scan.h5", frames, x.T, y.T)
    say_axes(path, x_indices=[1, 0], y_indices=[1, 0])
    assert_at(read(path), grid * 1e-6)
    say_axes(path, x_indices=[0, 1], y_indices=[0, 1])
    assert_at(read(path), grid[:, ::-1] * 1e-6)


def test_a_place_of_the_layout_that_is_named_keeps_its_order(tmp_path):
    """The error of a wrong unit names this remedy; it read y as x."""
    ptyd(tmp_path / "scan.ptyd")
    with h5py.File(tmp_path / "scan.ptyd", "a") as file:
        for k in (0, 1):
            file[f"chunks/{k}/positions"][...] = where()[3 * k : 3 * k + 3] * 1e6
    with pytest.raises(ValueError, match=r"they were in um. Say their unit: positions=FILE:/path\[unit\]"):
        read(tmp_path / "scan.ptyd")
    for place in (":/chunks/*/positions[um]", "scan.ptyd:chunks/*/positions[um]"):
        assert_at(read(tmp_path / "scan.ptyd", positions=place), where())
    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file["frames"] = counts()
    elsewhere = {"frames": ":/frames", "positions": "scan.ptyd:/chunks/*/positions[um]"}
    assert_at(read(tmp_path / "frames.h5", **elsewhere, **OPTICS), where())
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["chunks/0/positions"] = where()[:, ::-1] * 1e6
    taken = read(tmp_path / "scan.ptyd", positions="other.h5:/chunks/0/positions[um]")
    assert_at(taken, where())  # of no layout: x first, as of any other place


def test_a_place_of_the_layout_that_is_named_keeps_its_unit(tmp_path):
    hxn(tmp_path / "scan.h5")
    assert_at(read(tmp_path / "scan.h5", positions=":/points"), where())
    nanomax(tmp_path / "b.h5")
    pseudo = ":/entry/measurement/pseudo/x,/entry/measurement/pseudo/y"
    assert_at(read(tmp_path / "b.h5", positions=pseudo, **OPTICS), where())


@pytest.mark.parametrize(
    ("make", "table", "named"),
    [
        (velociprobe, "scan.csv", "scan.csv:/1,/5[nm]"),
        (lynx_orchestra, "scan.dat", "scan.dat:/Average_x_st_fzp,/Average_y_st_fzp[um]"),
    ],
)
def test_the_columns_of_a_known_table_keep_their_signs(tmp_path, make, table, named):
    """The error of a table that does not fit names this remedy; it mirrored the scan."""
    make(tmp_path / "scan_master.h5")
    short = (tmp_path / table).read_text().rstrip().splitlines()[: -2 if make is velociprobe else -1]
    (tmp_path / f"short_{table}").write_text("\n".join(short))
    with pytest.raises(ValueError, match="leave out what has no partner") as caught:
        read(tmp_path / "scan_master.h5", positions=f"short_{table}")
    assert f"give short_{named}" in str(caught.value)
    taken = read(tmp_path / "scan_master.h5", positions=named)
    assert_at(taken, where(), atol=1e-9)
    assert any("its own columns have their signs" in note for note in taken.notes)


def test_other_columns_of_a_known_table_are_taken_as_they_stand_and_named(tmp_path):
    lynx_orchestra(tmp_path / "scan.h5")
    text = (tmp_path / "scan.dat").read_text().replace("Target_x", "Mine")
    (tmp_path / "scan.dat").write_text(
        text.replace("Average_y_st_fzp", "Mine_y").replace("Stdev_y_st_fzp", "Average_y_st_fzp")
    )
    taken = read(tmp_path / "scan.h5", positions="scan.dat:/Average_x_st_fzp,/Mine_y[um]")
    assert_at(taken, where() * (-1, 1))
    assert any("Mine_y, which are others, are taken as they stand" in note for note in taken.notes)


@pytest.mark.parametrize(
    ("angle", "scale"), [(0.0, 1.0), (30.0, 0.8660254), (-45.0, -0.7071068), (60.0, 0.8660254), (-60.0, -0.8660254)]
)
def test_a_stage_of_hxn_that_is_turned(tmp_path, angle, scale):
    """Up to 45 degrees x is foreshortened by the cosine; beyond, the other stage scans. Neither had been done."""
    hxn(tmp_path / "scan.h5")
    with h5py.File(tmp_path / "scan.h5", "a") as file:
        file["angle"][...] = angle
    for given in ({}, {"positions": ":/points[um]"}):
        taken = read(tmp_path / "scan.h5", **given)
        assert_at(taken, where() * (1, scale))
        assert any(f"the stage is turned by {angle:.4g} degrees" in note for note in taken.notes) == (angle != 0)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["p"] = where()[:, ::-1]
    taken = read(tmp_path / "scan.h5", positions="other.h5:/p[m]")
    assert_at(taken, where())
    assert any("given are taken as the beam sees them" in note for note in taken.notes) == (angle != 0)


def test_a_stage_of_velociprobe_that_is_turned(tmp_path):
    velociprobe(tmp_path / "scan_master.h5")
    with h5py.File(tmp_path / "scan_master.h5", "a") as file:
        put(file, "entry/sample/goniometer/chi", np.array([60.0]), b"degree")
    for positions in ("scan.csv", "scan.csv:/1,/5[nm]"):
        taken = read(tmp_path / "scan_master.h5", positions=positions)
        assert_at(taken, where() * (1, 0.5), atol=1e-9)
        assert any("x is 0.5 times what the file has" in note for note in taken.notes)


def test_an_angle_that_cannot_be_read_is_said(tmp_path):
    hxn(tmp_path / "scan.h5")
    with h5py.File(tmp_path / "scan.h5", "a") as file:
        file["angle"].attrs["units"] = "gon"
    assert any(
        "angle cannot be read: found angle in 'gon', expected one of degree" in n
        for n in read(tmp_path / "scan.h5").notes
    )


def test_frames_that_are_given_are_amplitudes_only_at_the_layouts_own_place(tmp_path):
    """Counts that were given beside an HXN file were squared."""
    hxn(tmp_path / "scan.h5")
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        file["entry/data/data"] = counts()
    taken = read(tmp_path / "scan.h5", frames="raw.h5:/entry/data/data")
    np.testing.assert_array_equal(taken.counts, counts())
    assert any("are taken as counts" in note for note in taken.notes)
    np.testing.assert_array_equal(read(tmp_path / "scan.h5", frames=":/diffamp").counts, counts())
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["x"], file["y"] = where()[:, 1], where()[:, 0]
    taken = read(tmp_path / "mine.h5", frames="scan.h5:/diffamp", positions=":/x,/y[m]", **OPTICS)
    np.testing.assert_array_equal(taken.counts, counts())


def test_a_pair_of_frames_that_are_not_square(tmp_path):
    """y had been scaled by the ratio of the sides."""
    height, width = N, N + 8
    y, x = np.indices((height, width))
    frames = np.random.default_rng(0).poisson(
        200 * np.exp(-((y - height // 2) ** 2 + (x - width // 2) ** 2) / 8) + 2, (FRAMES, height, width)
    )
    pair(tmp_path / "scan_dp.hdf5")
    with h5py.File(tmp_path / "scan_dp.hdf5", "w") as file:
        file["dp"] = frames
    in_y, in_x = OBJECT_PIXEL, OBJECT_PIXEL * height / width

    def say(tall, wide):
        with h5py.File(tmp_path / "scan_para.hdf5", "a") as file:
            del file["probe"]
            file["probe"] = np.ones((1, height, width), np.complex64)
            for name in ("object", "probe"):
                file[name].attrs.update(pixel_width_m=wide, pixel_height_m=tall)

    say(in_y, in_x)
    assert_at(read(tmp_path / "scan_dp.hdf5"), where() / OBJECT_PIXEL, atol=1e-9)
    say(in_x, in_x)
    with pytest.raises(ValueError, match=r"found object pixels of .* for frames of 16 by 24 pixels, expected"):
        read(tmp_path / "scan_dp.hdf5")


def test_frames_go_with_the_positions_of_their_numbers_also_where_these_are_named(tmp_path):
    """Naming them, to say their unit, gave every frame the position of another one."""
    order = np.random.default_rng(3).permutation(FRAMES)
    pair(tmp_path / "scan_dp.hdf5")
    with h5py.File(tmp_path / "scan_para.hdf5", "a") as file:
        file["probe_position_x_m"][...], file["probe_position_y_m"][...] = where()[order].T[::-1]
        file["probe_position_indexes"][...] = order
        file["probe"][...] = probe()[None]
    for given in ({}, {"positions": "scan_para.hdf5:/probe_position_x_m,/probe_position_y_m[m]"}):
        taken = read(tmp_path / "scan_dp.hdf5", **given)
        np.testing.assert_array_equal(taken.counts, counts()[order])
        assert_at(taken, where()[order] / OBJECT_PIXEL, atol=1e-9)
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["x"], file["y"] = where()[:, 1], where()[:, 0]
    np.savetxt(tmp_path / "mine.txt", where()[:, ::-1])
    for given in ("mine.h5:/x,/y[m]", "mine.txt:/0,/1[m]"):
        taken = read(tmp_path / "scan_dp.hdf5", positions=given)
        np.testing.assert_array_equal(taken.counts, counts())
        assert_at(taken, where() / OBJECT_PIXEL, atol=1e-9)
        assert any("those that are given are taken in the frames' order" in note for note in taken.notes)
