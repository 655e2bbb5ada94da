"""A workflow imports what stands beside it: here, in processes that cannot see it, and without a trace afterwards."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch
from distributed.protocol import pickle

import steering
from steering import ModelStore, RunFolder
from steering.loading import loaded
from tests.command_line import ran

HELPER = """
from __future__ import annotations
from dataclasses import dataclass
import random
import pack.inner

@dataclass
class Given:
    number: int
    class Nested:
        value = 3

def doubled(given: Given) -> Given:
    return Given(pack.inner.twice(given.number) + 0 * Given.Nested.value)

DRAWN = random.Random(0).random()
"""
WORKFLOW = """
import helper
from pack import inner

def main(folder, arguments):
    import late
    return helper.doubled, [helper.Given(4)], inner.twice, helper.DRAWN, late.NAME
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A workflow with a module, a package and a random.py beside it, seen from another folder."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "onnx_data").mkdir()
    files = {
        "work.py": WORKFLOW,
        "helper.py": HELPER,
        "late.py": "NAME = __name__",
        "random.py": "raise RuntimeError('this is not the random that was meant')",
        "pack/__init__.py": "from . import inner",
        "pack/inner.py": "def twice(n):\n    return 2 * n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "work.py"


def test_what_stands_beside_a_workflow_is_imported_and_leaves_no_trace(work):
    before, path = set(sys.modules), list(sys.path)
    with loaded(work) as main:
        doubled, [given], twice, drawn, late = main(None, [])
        assert doubled(given).number == twice(4) == 8
        assert 0 <= drawn < 1
        assert late == "late"
        assert importlib.util.find_spec("onnx_data") is None  # a folder is not taken for an installed package
    assert set(sys.modules) - before <= {"random"}
    assert sys.path == path
    assert not cloudpickle.list_registry_pickle_by_value()
    (work.parent / "helper.py").write_text(HELPER.replace("2 * n", "").replace("DRAWN = ", "DRAWN = 7 #"))
    with loaded(work) as main:
        assert main(None, [])[3] == 7


def test_it_travels_to_processes_that_cannot_see_it(work):
    """As Dask sends it, alone and inside other things: functions, the functions they call, classes, instances."""
    with loaded(work) as main:
        doubled, given, twice, *_ = main(None, [])
        sent = pickle.dumps({"call": doubled, "with": given, "twice": twice})
    program = (
        "import pickle, sys; got = pickle.load(sys.stdin.buffer); [given] = got['with']; "
        "assert got['call'](given).number == got['twice'](4) == 8; assert type(given).Nested.value == 3"
    )
    subprocess.run([sys.executable, "-c", program], input=sent, cwd="/", check=True, timeout=60)


def test_what_this_process_has_imported_before_travels_too_and_is_there_again_afterwards(work, monkeypatch):
    """As in a notebook beside the workflow, whose folder Python looks into."""
    monkeypatch.syspath_prepend(work.parent)
    mine = importlib.import_module("helper"), importlib.import_module("pack.inner")
    with loaded(work) as main:
        doubled, given, *_ = main(None, [])
        assert type(given[0]) is not mine[0].Given
        sent = pickle.dumps((doubled, given))
    program = (
        "import pickle, sys; call, [given] = pickle.load(sys.stdin.buffer); assert call(given).number == 8; "
        "assert 'helper' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], input=sent, cwd="/", check=True, timeout=60)
    assert (sys.modules["helper"], sys.modules["pack.inner"]) == mine
    for name in ("helper", "pack", "pack.inner"):
        del sys.modules[name]


def test_this_package_is_never_set_aside(tmp_path):
    """A workflow in the folder of the checkout stands beside it."""
    (tmp_path / "steering").symlink_to(Path(steering.__file__).parent)
    (tmp_path / "work.py").write_text("import steering\ndef main(folder, arguments):\n    return steering\n")
    with loaded(tmp_path / "work.py") as main:
        assert main(None, []) is steering is sys.modules["steering"]


def test_an_error_beside_the_workflow_names_its_file(work):
    (work.parent / "helper.py").write_text("a = = 1")
    with pytest.raises(ValueError, match=r"helper\.py, line 1: found a syntax error"), loaded(work):
        pass
    (work.parent / "helper.py").write_text("import nothing_of_the_kind")
    with pytest.raises(ValueError, match="expected all its imports to be installed or beside it"), loaded(work):
        pass


PLAIN = """
import torch
from torch import nn

from steering import Optics


class Plain(nn.Module):
    # Carries the amplitude back to the sample with the phase of the bare probe, and has nothing but `forward`.
    def __init__(self, *, window: int, patch: int, gain: float = 1.0) -> None:
        super().__init__()
        self.hyperparameters = {"window": window, "patch": patch, "gain": gain}
        self.optics = Optics(window, 1)
        self.layers = nn.Sequential(nn.Conv2d(2, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 2, 5, padding=2))

    def forward(self, counts):
        low = (counts.shape[-1] - self.hyperparameters["patch"]) // 2
        keep = slice(low, low + self.hyperparameters["patch"])
        [probe] = self.optics.modes()
        turn = torch.exp(1j * torch.fft.fft2(probe).angle())
        back = torch.fft.ifft2(torch.fft.ifftshift(self.optics.amplitude(counts), dim=(-2, -1)) * turn, norm="ortho")
        guess = back * probe.conj() / (probe.abs() ** 2).max()
        out = self.layers(torch.view_as_real(guess[:, keep, keep]).movedim(-1, 1)) * self.hyperparameters["gain"]
        return out[:, 0].sigmoid(), out[:, 1]
"""
CAMPAIGN = """
from plain import Plain
from skimage import data

from steering import ER, Experiment, HoldOut, SimulatedBeamline, SpaceFilling, Stage, TrainerSettings
from steering import CampaignSettings, local, run, sample, zone_plate


def main(folder, arguments):
    brick = Stage("brick", sample(data.brick(), phase=-2.0, absorption=0.1, size=96), 80)
    probe = zone_plate(32, 20.0, counts=1e5)
    source = SimulatedBeamline([brick], probe=probe, step=5.0, frame_rate=80.0)
    experiment = Experiment(
        source=source,
        policy=SpaceFilling(source.candidates),
        network=Plain(window=32, patch=16, gain=0.5),
        strategy=ER(),
        trainer=TrainerSettings(batch=8, candidates=4, representatives=8, learning_rate=1e-2),
        campaign=CampaignSettings(steps=30, rounds_after_end=3),
    )
    with local(ranks=1) as client:
        run(experiment, client, folder)
"""


@pytest.mark.slow
def test_a_network_of_ones_own_beside_the_workflow_learns_serves_and_is_loaded(tmp_path):
    """Trained on a rank, published, tried and served by the predictor, judged at the end, loaded by its class."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "plain.py").write_text(PLAIN)
    (tmp_path / "own" / "work.py").write_text(CAMPAIGN)
    ran(tmp_path / "own" / "work.py", tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    figures = folder.summary()
    assert figures["ranks"] == 1
    assert figures["frames_predicted"] == figures["frames_acquired"] == 80
    assert figures["versions_published"] >= 1
    assert set(figures["prediction"]["backends"]) == {"eager_float32", "channels_last_float32"}
    assert 0 < figures["phase_error"]["brick"]["run_end"] < np.pi
    space: dict = {}
    exec(PLAIN, space)
    network = ModelStore(folder.models).load(1, network=space["Plain"])
    assert network.hyperparameters == {"window": 32, "patch": 16, "gain": 0.5}
    assert all(out.shape == (2, 16, 16) for out in network(torch.ones(2, 32, 32)))
    with pytest.raises(ValueError, match="supply its class"):
        ModelStore(folder.models).load(1)
