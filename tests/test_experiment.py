"""What an experiment derives from its parts, and what it refuses before anything is started."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from steering import (
    DER,
    ER,
    Experiment,
    Optics,
    ProbeFirst,
    PtychoNN,
    Reconstruction,
    RunFolder,
    SimulatedBeamline,
    SpaceFilling,
    Stage,
    TrainerSettings,
    sample,
    zone_plate,
)
from steering.ptychography import patch_weight
from steering.runner.resolved import note_settings

WINDOW, PATCH = 32, 20
PROBE = zone_plate(WINDOW, 20.0, counts=1e5)


def experiment(**changes):
    thing = sample(np.random.default_rng(0).normal(size=(64, 64)), phase=1.0, absorption=0.1)
    stages = [Stage("a", thing, 30), Stage("more light", thing, 10, flux=2.0, new_scan=False), Stage("b", thing, 5)]
    source = SimulatedBeamline(stages, probe=PROBE)
    parts = {
        "source": source,
        "policy": SpaceFilling(source.candidates),
        "network": ProbeFirst(window=WINDOW, patch=PATCH, width=4),
        "strategy": ER(),
    }
    return Experiment(**parts | changes)


def test_what_follows_from_other_parts_need_not_be_said():
    derived = experiment()
    assert (derived.scans, derived.frames, derived.ranks) == (("a", "b"), 45, None)
    weight = torch.from_numpy(patch_weight(PROBE, PATCH))
    assert torch.equal(derived.strategy.objective.weight, weight)
    assert set(derived.truths()) == {"a", "b"}


def test_it_can_be_said_all_the_same():
    strategy = DER(Reconstruction(np.ones((PATCH, PATCH), np.float32)), alpha=0.5)
    said = experiment(strategy=strategy, scans=("a",), frames=7, ranks=3)
    assert said.strategy is strategy
    assert (said.scans, said.frames, said.ranks) == (("a",), 7, 3)


def test_one_strategy_may_stand_in_two_experiments():
    strategy = DER(alpha=0.5)
    first = experiment(strategy=strategy)
    second = experiment(strategy=strategy, network=ProbeFirst(window=WINDOW, patch=8, width=4))
    assert (len(first.strategy.objective.weight), len(second.strategy.objective.weight)) == (PATCH, 8)
    assert first.strategy.alpha == 0.5
    with pytest.raises(RuntimeError, match="the strategy DER without an objective"):
        strategy.objective  # noqa: B018
    with pytest.raises(ValueError, match=r"for patches of \(20, 20\) pixels, expected \(8, 8\)"):
        experiment(strategy=first.strategy, network=second.network)


class Own(torch.nn.Module):
    def __init__(self, *, window=WINDOW, patch=PATCH, width=2, said=True, whole=True):
        super().__init__()
        self.hyperparameters = {"window": window, "patch": patch, **({"width": width} if said else {})}
        self.optics = Optics(window, 1)
        self.layer = torch.nn.Conv2d(1, width, 1)
        self.whole = whole

    def forward(self, counts):
        out = self.layer(self.optics.amplitude(counts)[:, None])[:, 0]
        lo = (self.hyperparameters["window"] - self.hyperparameters["patch"]) // 2
        keep = slice(lo, lo + self.hyperparameters["patch"])
        return (out[:, keep, keep], out[:, keep, keep])[: 1 + self.whole]


class OneOutput(Own):
    def __init__(self, *, window=WINDOW, patch=PATCH, width=2):
        super().__init__(window=window, patch=patch, width=width, whole=False)


class Untold(Own):
    def __init__(self, *, window=WINDOW, patch=PATCH, width=2):
        super().__init__(window=window, patch=patch, width=width, said=False)


def test_a_network_with_forward_alone_will_do():
    assert experiment(network=Own()).network.hyperparameters["width"] == 2


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (torch.nn.Linear(2, 2), "without `optics`"),
        (ProbeFirst(window=64, width=4), r"expected \(mode, y, x\) = \(1, 32, 32\)"),
        (PtychoNN(window=WINDOW, patch=PATCH, width=2, modes=3), "build it with window=32, modes=1"),
        (OneOutput(), "expected amplitude and phase, each float32"),
        (Untold(width=3), "do not build again"),
    ],
)
def test_a_network_that_cannot_be_run_is_refused_at_once(network, says):
    parts, before = vars(experiment()), torch.random.get_rng_state()
    with pytest.raises(ValueError, match=says):
        Experiment(**parts | {"network": network})
    Experiment(**parts)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_setting_is_noted_in_the_run_folder_as_it_was_in_the_end(tmp_path):
    said = experiment(strategy=DER(alpha=0.5), ranks=(1, 3), trainer=TrainerSettings(batch=10), device="cpu")
    folder = RunFolder.create(tmp_path / "run")
    note_settings(said, folder)
    found = json.loads((folder.path / "settings.json").read_text())
    assert set(found) == {each.name for each in fields(Experiment)}
    assert found["trainer"]["batch"] == 10
    assert found["trainer"]["learning_rate"] == TrainerSettings().learning_rate
    assert found["prediction"]["device"] == found["trainer"]["device"] == "cpu"
    assert (found["ranks"], found["scans"], found["frames"]) == ([1, 3], ["a", "b"], 45)
    assert (found["network"]["kind"], found["network"]["window"]) == ("ProbeFirst", WINDOW)
    assert (found["strategy"]["kind"], found["strategy"]["alpha"]) == ("DER", 0.5)
    assert found["campaign"]["limits"]["area"] is not None
    assert found["source"]["kind"] == "SimulatedBeamline"
