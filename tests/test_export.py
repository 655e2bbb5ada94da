"""What a run has left, as other programs read it."""

import json

import h5py
import numpy as np
import pytest
import tifffile
import xarray as xr

from steering import ModelStore, ModelVersion, ProbeFirst, RunFolder
from steering.cli import main
from steering.sources import read_probe

PIXEL, ORIGIN = 5e-8, [3e-3, -5e-3]


@pytest.fixture
def run(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    rng = np.random.default_rng(0)
    names = ("amplitude", "phase", "amplitude_refined", "phase_refined", "trust")
    maps = {name: (("y", "x"), rng.normal(size=(12, 10)).astype(np.float32), {"units": "rad"}) for name in names}
    maps["phase"][1][0] = np.nan
    table = {"position_y": ("frame", rng.normal(size=4)), "position_x": ("frame", rng.normal(size=4)),
             "frame_model_version": ("frame", np.arange(4))}  # fmt: skip
    coords = {"y": np.arange(12) * PIXEL, "x": np.arange(10) * PIXEL - 1e-6, "frame": np.arange(4) + 7}
    folder.write_object("a", xr.Dataset(maps | table, coords=coords, attrs={"length_unit": "m", "origin": ORIGIN}))
    network = ProbeFirst(window=16, patch=8, width=2)
    network.optics.set(np.full((1, 16, 16), 1 + 2j, np.complex64))
    described = ModelVersion(number=0, network="ProbeFirst", hyperparameters=network.hyperparameters)
    ModelStore(folder.models).publish(network, described)
    return folder


def test_a_run_is_exported_in_physical_units(run, capsys):
    image = run.objects()["a"]
    assert main(["export", str(run.path)]) == 0
    place = run.path / "export"
    assert sorted(p.name for p in place.iterdir()) == sorted(
        ["a.cxi", *(f"a-{n}.tif" for n in ("amplitude", "phase", "amplitude_refined", "phase_refined", "trust"))]
    )
    assert len(capsys.readouterr().out.splitlines()) == 6
    with h5py.File(place / "a.cxi") as file:
        entry = file["entry_1"]
        for number, end in ((1, ""), (2, "_refined")):
            expected = image[f"amplitude{end}"] * np.exp(1j * image[f"phase{end}"])
            np.testing.assert_allclose(entry[f"image_{number}/data"], expected, rtol=1e-5, atol=1e-6)
        assert entry["phase"].attrs["NX_class"] == "NXdata"
        assert list(entry["phase"].attrs["axes"]) == ["y", "x"]
        shown = file[file.attrs["default"]]
        shown = shown[shown.attrs["default"]]  # what a viewer of NeXus opens first
        assert (shown.name, shown["title"].asstr()[()], shown.attrs["signal"]) == (
            "/entry_1/phase_refined",
            "phase_refined",
            "data",
        )
        np.testing.assert_array_equal(entry["phase/data"], image["phase"])
        np.testing.assert_allclose(np.diff(entry["phase/y"]), PIXEL)
        assert entry["phase/y"].attrs["units"] == "m"
        moved = entry["sample_1/geometry_1/translation"]
        np.testing.assert_array_equal(moved[:, :2], np.c_[image["position_x"], image["position_y"]])
        assert moved.attrs["origin"].tolist() == [-5e-3, 3e-3, 0.0], "x, y, z of the stage where these are 0"
        np.testing.assert_array_equal(entry["frames/frame_model_version"], np.arange(4))
        np.testing.assert_array_equal(entry["frames/frame_id"], np.arange(4) + 7)
        assert "wavelength" not in entry["instrument_1/source_1"]
    assert (read_probe(place / "a.cxi") == 1 + 2j).all()
    with tifffile.TiffFile(place / "a-phase.tif") as tiff:
        page = tiff.pages[0]
        assert json.loads(page.description)["origin_y"] == 3e-3
        np.testing.assert_array_equal(page.asarray(), image["phase"])
        numerator, denominator = page.tags["XResolution"].value
        assert numerator / denominator == pytest.approx(0.01 / PIXEL, rel=1e-6)


def test_what_the_refined_object_was_made_with_goes_with_it(run):
    image = run.objects()["a"]
    better = np.full((2, 16, 16), 3 - 1j, np.complex64)
    optics = {"wavelength": 1.4089e-10, "distance": 2.4, "detector_pixel": 75e-6}
    moved = {f"position_{axis}_refined": image[f"position_{axis}"] + 1e-8 for axis in "yx"}
    run.write_object(
        "b",
        image.assign(probe_refined=(("mode", "probe_y", "probe_x"), better), **moved).assign_attrs(optics),
    )
    assert main(["export", str(run.path)]) == 0
    assert (read_probe(run.path / "export" / "b.cxi") == better).all()
    with h5py.File(run.path / "export" / "b.cxi") as file:
        entry = file["entry_1"]
        translation = entry["sample_1/geometry_1/translation"]
        np.testing.assert_array_equal(translation[:, 1], image["position_y"] + 1e-8)
        np.testing.assert_array_equal(entry["frames/position_y"], image["position_y"])  # as it was recorded
        energy, wavelength = entry["instrument_1/source_1/energy"], entry["instrument_1/source_1/wavelength"]
        assert energy[()] / 1.602176634e-19 == pytest.approx(8800, rel=1e-3)
        assert (wavelength[()], wavelength.attrs["units"], energy.attrs["units"]) == (1.4089e-10, "m", "J")
        assert entry["instrument_1/detector_1/distance"][()] == 2.4
        assert entry["instrument_1/detector_1/x_pixel_size"][()] == 75e-6
        assert entry["instrument_1/source_1/probe_pixel"][()] == pytest.approx(PIXEL)


def test_a_run_without_images_says_so(tmp_path, capsys):
    run = RunFolder.create(tmp_path / "run")
    assert main(["export", str(run.path)]) == 1
    assert "found no images" in capsys.readouterr().err
