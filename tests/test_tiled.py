"""Images of a run on a real Tiled server."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import xarray as xr

from steering.cli import main
from steering.runner.folder import RunFolder
from steering.view import tiled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("tiled"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # of Tiled's client, see below
]
pytest.importorskip("tiled.client")
pytest.importorskip("tiled.server.app")

from tiled.client import from_uri  # noqa: E402


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiled")
    command = [sys.executable, "-m", "tiled", "serve", "catalog", "--temp", "--api-key", "secret", "--port", "0"]
    environment = os.environ | {"TMPDIR": str(place)}
    log = place / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + 120
        while "Uvicorn running on" not in log.read_text():
            assert time.monotonic() < end, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        [port] = re.findall(r"Uvicorn running on .*?http://127\.0\.0\.1:(\d+)", log.read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        with warnings.catch_warnings():  # Tiled's client leaves sockets open
            warnings.simplefilter("ignore")
            gc.collect()


def image(side: int, level: float) -> xr.Dataset:
    maps = {name: (("y", "x"), np.full((side, side + 1), level, np.float32)) for name in ("phase", "trust")}
    maps["model_version"] = (("y", "x"), np.full((side, side + 1), 3, np.int32))
    frames = {
        "frame": ("frame", np.arange(2)),
        "position_y": ("frame", np.zeros(2)),
        "position_x": ("frame", np.zeros(2)),
    }
    axes = {"y": 1e-9 * np.arange(side), "x": 1e-9 * np.arange(side + 1)}
    return xr.Dataset(maps | frames, coords=axes)


def test_images_of_a_run_are_arrays_with_the_uid_of_its_bluesky_run(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TILED_API_KEY", "secret")
    folder = RunFolder.create(tmp_path / "today")
    folder.write_object("gravel", image(8, 1.0))
    folder.write_summary({"scans": ["gravel"], "streams": {"frames": {"runs": {"gravel": "uid-of-bluesky"}}}})
    folder.end("finished")
    assert main(["export", str(folder.path), "--tiled", server]) == 0
    assert capsys.readouterr().out == f"{server}: today with the images of 1 scans\n"
    scan = from_uri(server)["today"]["gravel"]
    assert sorted(scan) == ["model_version", "phase", "trust", "x", "y"]
    assert scan.metadata["run_uid"] == "uid-of-bluesky"
    np.testing.assert_array_equal(scan["phase"][:], np.ones((8, 9), np.float32))
    assert scan["model_version"][:].dtype == np.int32
    folder.write_object("gravel", image(10, 2.0))  # it has grown
    assert main(["export", str(folder.path), "--tiled", server]) == 0
    np.testing.assert_array_equal(from_uri(server)["today"]["gravel"]["trust"][:], np.full((10, 11), 2, np.float32))


class Answers:
    """A run with one runner: its live image has this level, and it is lost, or ends the run, after the first."""

    def __init__(self, folder, level, *, lost):
        self.folder, self.level, self.lost, self.asked = folder, level, lost, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def done(self):
        if self.asked and not self.lost:
            self.folder.end("finished")
        return self.folder.summary()["status"] != "running"

    def snapshot(self):
        if self.asked and self.lost:
            raise OSError("its worker is gone")
        return {"scan": "gravel"}

    def live(self):
        self.asked += 1
        return image(8, self.level)


def test_an_export_follows_a_run_to_its_next_runner(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TILED_API_KEY", "secret")
    folder = RunFolder.create(tmp_path / "followed")
    waits = RuntimeError("found no scheduler.json")
    runners = [Answers(folder, 1.0, lost=True), waits, waits, Answers(folder, 2.0, lost=False)]

    def attach(_folder, *, insecure):
        runner = runners.pop(0)
        if isinstance(runner, Exception):
            raise runner
        return runner

    monkeypatch.setattr(tiled, "attach", attach)
    assert tiled.publish(folder, server, every_s=0.01) == 0  # it has left none in its folder
    assert runners == []
    assert caplog.text.count("the run is not reached, and is tried again: found no scheduler.json") == 1
    np.testing.assert_array_equal(from_uri(server)["followed"]["gravel"]["phase"][:], np.full((8, 9), 2, np.float32))


def test_a_server_that_does_not_let_us_in_is_named(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TILED_API_KEY", "wrong")
    folder = RunFolder.create(tmp_path / "today")
    folder.end("finished")
    assert main(["export", str(folder.path), "--tiled", server]) == 1
    assert f"{server}: found no Tiled server that lets us in (" in capsys.readouterr().err
