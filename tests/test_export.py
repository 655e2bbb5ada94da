"""What a run has left, as other programs read it."""

import h5py
import numpy as np
import pytest
import tifffile
import xarray as xr

from steering import ModelStore, ModelVersion, ProbeFirst, RunFolder
from steering.cli import main
from steering.sources import read_probe

PIXEL = 5e-8


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
    folder.write_object("a", xr.Dataset(maps | table, coords=coords, attrs={"length_unit": "m"}))
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
        np.testing.assert_array_equal(entry["frames/frame_model_version"], np.arange(4))
        np.testing.assert_array_equal(entry["frames/frame_id"], np.arange(4) + 7)
    assert (read_probe(place / "a.cxi") == 1 + 2j).all()
    with tifffile.TiffFile(place / "a-phase.tif") as tiff:
        page = tiff.pages[0]
        np.testing.assert_array_equal(page.asarray(), image["phase"])
        numerator, denominator = page.tags["XResolution"].value
        assert numerator / denominator == pytest.approx(0.01 / PIXEL, rel=1e-6)


def test_a_run_without_images_says_so(tmp_path, capsys):
    run = RunFolder.create(tmp_path / "run")
    assert main(["export", str(run.path)]) == 1
    assert "found no images" in capsys.readouterr().err
