"""The turn of a detector's frames is found where the frames tell it, and is not guessed where they do not."""

import numpy as np
import pytest

from steering.ptychography import Canvas, Refined, simulate, zone_plate
from steering.records import Geometry
from steering.runner import RunFolder
from steering.sources import Recording
from steering.sources.finding import find_orientation, lit_residual, oriented, turned
from workflows import bench_recorded

N, SIDE = 32, 96
PROBE = zone_plate(N, 24.0, aperture=0.5, counts=1e5)


def scan(thing, step=5.0, shift=(0, 0), mask=None):
    """60 frames, the beam's centre off by `shift` pixels on the detector."""
    rng = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(np.arange(6), np.arange(10), indexing="ij"), -1).reshape(-1, 2) * step
    where = grid - grid.mean(0) + rng.uniform(-1, 1, (60, 2))
    canvas = Canvas((SIDE, SIDE), (-SIDE // 2, -SIDE // 2))
    counts = rng.poisson(simulate(thing, PROBE, canvas, where)).astype(np.uint16)
    counts = np.roll(counts, shift, (1, 2))
    return Recording(counts=counts, positions=where, probe=PROBE, geometry=Geometry(shape=(N, N), mask=mask))


def rough(seed=0):
    rng = np.random.default_rng(seed)
    f = np.fft.fftfreq(SIDE)
    low = np.exp(-(f[:, None] ** 2 + f**2) / (2 * 0.06**2))
    smooth = np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIDE, SIDE))) * low).real
    return np.exp(0.8j * smooth / smooth.std()).astype(np.complex64)


UNDO = {"rot90": "rot270", "rot270": "rot90"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shift"), [("none", (0, 0)), ("rot90", (0, 0)), ("flip_y", (2, -1)), ("antitranspose", (0, 3))]
)
def test_a_turned_scan_is_turned_back(name, shift):
    mask = np.zeros((N, N), bool)
    mask[3, 5] = True
    right = scan(rough(), shift=shift, mask=mask)
    found = find_orientation(turned(right, name))
    assert found.sure, str(found)
    assert found.orientation == UNDO.get(name, name)
    again = oriented(turned(right, name))
    assert np.array_equal(again.counts, right.counts)
    assert np.array_equal(again.geometry.mask, mask)
    assert f"orientation {found.orientation}" in again.notes[-1]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["flat", "no overlap"])
def test_nothing_is_guessed_where_the_frames_do_not_tell(what):
    recording = far_apart() if what == "no overlap" else scan(np.ones((SIDE, SIDE), np.complex64))
    found = find_orientation(recording)
    assert not found.sure, str(found)
    with pytest.raises(ValueError, match=r"expected one at 0\.9"):
        oriented(recording)


def far_apart():
    """Frames at places that share no light."""
    thing = np.pad(rough(), ((0, 480 - SIDE), (0, 480 - SIDE)), mode="wrap")
    where = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), -1).reshape(-1, 2) * 40.0 - 140
    canvas = Canvas(thing.shape, (-240, -240))
    counts = np.random.default_rng(0).poisson(simulate(thing, PROBE, canvas, where)).astype(np.uint16)
    return Recording(counts=counts, positions=where, probe=PROBE, geometry=Geometry(shape=(N, N)))


def test_frames_without_light_do_not_count_in_a_search():
    """They are never refined, and stand at 1: more than half of such would make every try equal."""
    mask = np.zeros((N, N), bool)
    mask[3, 5] = True
    part = scan(rough(), mask=mask)
    part.counts[20:] = 0
    part.counts[20:, 3, 5] = 7  # a bad pixel is no light
    residual = np.where(np.arange(60) < 20, 0.25, 1.0).astype(np.float32)
    found = Refined(object=rough(), probe=PROBE, residual=residual, covered=np.ones((SIDE, SIDE), bool))
    assert lit_residual(found, part) == 0.25
    part.counts[:] = 0
    assert lit_residual(found, part) == 1.0


@pytest.mark.slow
def test_the_benchmark_at_its_smallest(tmp_path, monkeypatch):
    monkeypatch.delenv("STEERING_DATA", raising=False)
    folder = RunFolder.create(tmp_path / "run")
    bench_recorded.main(folder, ["--turns", "1", "--shifts", "1", "--undecidable", "1"])
    figures = folder.summary()
    assert figures["orientation"]["right"] == figures["orientation"]["tried"] == 2
    assert figures["undecidable"]["refused"] == 1
