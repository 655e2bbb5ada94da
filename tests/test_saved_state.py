"""Laws of the saved state: training goes on from it as if it had never stopped, on any number of ranks."""

import json
import time

import numpy as np
import pytest
import torch
from torch import nn

from steering.learning import Classification, Loop, TrainerSettings
from steering.learning.group import Place, leave
from steering.learning.saved_state import INDEX, SavedState
from steering.learning.strategies import DERpp
from tests.ranks import killed_at_the_end, on_ranks

SAMPLE = 3 * 8 * 8 + 8 + 8 + 4 * 5 + 40


def loop_of(*, rank=0, capacity=40, width=4, look=1):
    """A small classifier with DER++, whose buffer holds so many images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, width), nn.ReLU(), nn.Linear(width, 5))
    settings = TrainerSettings(
        batch=6, candidates=4, representatives=5, buffer_bytes=capacity * SAMPLE, look_ahead=look, seed=1
    )
    return Loop(network, DERpp(Classification(mean=[0.5] * 3, std=[0.3] * 3)), settings, rank=rank)


def train(loop, steps, ranks=1):
    """Steps on images that follow from the number of the step alone."""
    label = torch.tensor(0)
    loop.prepare({"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "label": label, "stratum": label})

    def load(n, out):
        rng = np.random.default_rng([loop.steps, loop.rank])
        out["image"][:n] = torch.from_numpy(rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8))
        out["label"][:n] = torch.from_numpy(rng.integers(0, 5, n))
        out["stratum"][:n] = out["label"][:n]

    return loop.run(steps, load)


def weights(loop):
    return torch.cat([p.detach().flatten() for p in loop.network.parameters()])


def stored(loop):
    """The samples in a buffer, as bytes, in no order."""
    fields = loop.buffer.state()
    return sorted(row.tobytes() for row in fields["field.image"].numpy())


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    """Bit for bit: weights, optimiser, buffer, what is drawn and what is kept."""
    one = loop_of()
    one.connect(None)
    train(one, 30)
    SavedState(tmp_path, one, ranks=1).write()
    train(one, 20)
    other = loop_of()
    assert SavedState(tmp_path, other, ranks=1).restore()
    assert other.steps == 30
    other.connect(None)
    tally = train(other, 20)
    assert tally.representatives == 20 * 5
    assert torch.equal(weights(one), weights(other))
    assert stored(one) == stored(other)


def test_without_a_saved_state_nothing_is_restored(tmp_path):
    loop = loop_of()
    assert not SavedState(tmp_path / "new", loop, ranks=1).restore()
    assert loop.steps == 0


def test_a_state_writes_what_has_changed_and_keeps_no_more_than_it_needs(tmp_path):
    """Fifty states of a buffer of 400 of which a few change at a time: files stay below three times the buffer."""
    loop = loop_of(capacity=400)
    loop.connect(None)
    states = SavedState(tmp_path, loop, ranks=1)
    train(loop, 110)
    states.write()
    whole = sum(path.stat().st_size for path in tmp_path.glob("*.rank-0.safetensors"))
    for _ in range(50):
        train(loop, 2)
        states.write()
        newest = tmp_path / f"{loop.steps:08d}.rank-0.safetensors"
        files = list(tmp_path.glob("*.rank-0.safetensors"))
        assert newest.stat().st_size < 0.2 * whole or len(files) == 1
        assert sum(path.stat().st_size for path in files) < 2.2 * whole
        assert len(list(tmp_path.glob("*.weights.safetensors"))) == 1
    other = loop_of(capacity=400)
    assert SavedState(tmp_path, other, ranks=1).restore()
    assert stored(other) == stored(loop)
    assert other.buffer.fills == loop.buffer.fills
    assert not list(tmp_path.glob("*.part"))


def write_on(rank, ranks, where, folder):
    """Train and save twice, so that there are changes too; what this rank stores."""
    loop = loop_of(rank=rank, capacity=30 + 20 * rank)
    loop.connect(Place(rank=rank, ranks=ranks, where=where, deadline=30.0).join(device="cpu"))
    states = SavedState(folder, loop, ranks=ranks)
    for _ in range(2):
        train(loop, 15)
        states.write()
    loop.disconnect()
    leave()
    return stored(loop), loop.buffer.seen


@pytest.mark.slow
def test_a_state_of_two_ranks_goes_on_on_one_two_or_three(tmp_path):
    """Every stored sample is there once, and what was seen is not counted twice."""
    before = on_ranks(2, write_on, tmp_path)
    everything = sorted(sample for samples, _ in before for sample in samples)
    for ranks in (1, 2, 3):
        loops = [loop_of(rank=rank, capacity=200) for rank in range(ranks)]
        for rank, loop in enumerate(loops):
            assert SavedState(tmp_path, loop, ranks=ranks).restore(), rank
            assert loop.steps == 30
        assert sorted(sample for loop in loops for sample in stored(loop)) == everything
        assert sum(loop.buffer.seen for loop in loops) == sum(seen for _, seen in before)
        assert all(torch.equal(weights(loop), weights(loops[0])) for loop in loops)


def write_for_ever(begun, folder):
    loop = loop_of(capacity=300)
    loop.connect(None)
    states = SavedState(folder, loop, ranks=1)
    while True:
        train(loop, 3)
        states.write()
        begun.set()


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_a_whole_state(tmp_path):
    """kill -9 while one state after the other is written; what is there is whole, and training goes on from it."""
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        with killed_at_the_end(write_for_ever, folder):
            time.sleep(0.2 + 0.037 * attempt)
        loop = loop_of(capacity=300)
        assert SavedState(folder, loop, ranks=1).restore()
        assert loop.steps == json.loads((folder / INDEX).read_text())["step"]
        straight = loop_of(capacity=300)
        straight.connect(None)
        train(straight, loop.steps)
        assert stored(straight) == stored(loop)


def test_a_state_of_another_network_is_refused_in_words(tmp_path):
    loop = loop_of()
    loop.connect(None)
    train(loop, 3)
    SavedState(tmp_path, loop, ranks=1).write()
    with pytest.raises(ValueError, match="does not fit this network"):
        SavedState(tmp_path, loop_of(width=7), ranks=1).restore()
