"""A run whose disk is full for good still ends when a person stops it."""

import subprocess
import time

import pytest

from steering.clusters import local
from steering.runner import RunFolder, start
from tests.test_folder import fill, mounted
from tests.test_runner import experiment, wait_for


@pytest.mark.slow
@pytest.mark.long
def test_a_run_whose_disk_is_full_ends_when_it_is_stopped(tmp_path):
    """The version that finds no room is given up. It takes a minute: the log waits for room at the end."""
    disk = mounted(tmp_path / "disk", "size=16m")
    try:
        folder = RunFolder.create(disk / "run")
        with local(ranks=1) as client:
            run = start(experiment(frames=5000, gain=0.0), client, folder)
            wait_for(folder, "ModelPublished", run)
            fill(disk)
            limit = time.monotonic() + 60
            while "writing a version" not in str(run.snapshot()):
                assert time.monotonic() < limit
                time.sleep(0.5)
            run.command("stop")
            with pytest.raises(OSError, match="found events that could not be written"):
                run.result()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
