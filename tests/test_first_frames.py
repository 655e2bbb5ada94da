"""A live scan that has no probe begins one from its first frames."""

from __future__ import annotations

import numpy as np
import pytest

from steering.ptychography import beam_diameter
from steering.sources.first_frames import begun, raster_block
from tests.serving import beamline, live, served


def test_the_first_frames_are_a_block_in_the_middle_row_by_row():
    axis = np.linspace(-1, 1, 11)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    block = raster_block(grid, 9)
    np.testing.assert_allclose(block, [[y, x] for y in axis[4:7] for x in axis[4:7]])
    assert len(raster_block(grid, 500)) == 121


@pytest.mark.slow
def test_a_probe_is_begun_from_the_first_frames_of_a_live_scan(tmp_path):
    """Some frames are lost, and not waited for; what is begun is about the beam that is there. They also
    say how they are turned."""
    here = beamline(60)
    arguments = ("--protocol", "dectris", "--samples", "1", "--frames", "200", "--frame-rate", "200", "--drop", "0.05")
    with served(tmp_path, *arguments) as addresses:
        source = live(addresses, here, join={"wait_s": 0.5})
        recording, _ = begun(source, frames=40)
        assert source.began.name == "gravel"
        turned = live(
            addresses, here, join={"wait_s": 0.5}, orientation="rot90", going_on=source.began
        )  # as another detector is mounted
        _, orientation = begun(turned, probe=here.probe, orientation="auto", frames=40)
    assert orientation == "rot270"
    assert turned.began.name == "gravel"  # which stream2 says once only
    assert 32 <= len(recording.counts) <= 40
    assert "begun with a beam of" in recording.notes[-1]
    assert recording.probe.shape == here.probe.shape
    # mean amplitude of the frames, and the size of the beam on the sample, as of the true probe
    power = np.sum(np.abs(recording.probe) ** 2) / np.sum(np.abs(here.probe) ** 2)
    assert 0.7 < power < 1.3
    assert 0.6 < beam_diameter(recording.probe) / beam_diameter(here.probe) < 1.7
