"""Live sources against the simulated beamline in another process, behind real protocols."""

from __future__ import annotations

import numpy as np
import pytest

from steering.records import Decision
from tests.serving import beamline, gathered, live, served

FRAMES = 60
PROTOCOLS = {"dectris": ()}


def asked(positions: np.ndarray, *, stop: bool = False) -> Decision:
    return Decision(positions=positions, reasons=("test",) * len(positions), stop=stop)


def adds_up(source) -> None:
    for name, stream in source.streams.items():
        waiting = stream["waiting"]
        assert stream["received"] == stream["joined"] + sum(stream["dropped"].values()) + waiting, name


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_measured_is_what_was_decided(protocol, tmp_path):
    here = beamline(FRAMES)
    wanted = here.candidates[7 : 7 + FRAMES]
    here.apply(asked(wanted))
    expected = {int(i): c for chunk in here.chunks() for i, c in zip(chunk["frame"], chunk["counts"], strict=True)}
    arguments = ("--protocol", protocol, "--samples", "1", "--frames", str(FRAMES), "--frame-rate", "200")
    with served(tmp_path, *arguments, *PROTOCOLS[protocol]) as addresses:
        source = live(addresses, here, scans=None)
        source.apply(asked(wanted))
        chunks = list(source.chunks())
    ids = gathered(chunks, "frame")
    assert sorted(ids.tolist()) == list(range(FRAMES))
    measured = np.stack([gathered(chunks, "position_y"), gathered(chunks, "position_x")], axis=1)
    np.testing.assert_allclose(measured, wanted[ids], atol=1e-12)
    for number, counts in zip(ids, gathered(chunks, "counts"), strict=True):
        np.testing.assert_array_equal(counts, expected[int(number)])
    assert {chunk.attrs["scan"] for chunk in chunks} == {"gravel"}
    assert source.frames_dropped == 0
    assert source.streams["frames"]["joined"] == FRAMES
    adds_up(source)
