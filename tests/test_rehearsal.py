"""Laws of rehearsal in a training loop of the user's own, in one process and between real ones."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.algorithms.join import Join
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from steering.learning import Classification, GroupLost, Place, Rehearsal
from steering.learning.group import leave
from steering.learning.identity import ELSEWHERE, keys_of
from steering.learning.rehearsal import bytes_of
from steering.learning.strategies import DER, DERpp
from tests.ranks import on_ranks

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorials" / "own-network.md"


def samples(n=6, seed=0):
    """Images of five classes."""
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.integers(0, 256, (n, 3, 4, 4), dtype=np.uint8))
    return {"image": image, "label": torch.from_numpy(rng.integers(0, 5, n))}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5))


def test_new_samples_come_first_and_stored_ones_with_their_outputs_behind_them():
    rehearsal = Rehearsal(r=4, candidates=2, budget="1MB", strata="label")
    offered = {}
    for step in range(6):
        new = samples(seed=step)
        batch = rehearsal.augment(new)
        assert batch.new == 6
        assert len(batch["label"]) == 6 + min(4, 2 * max(0, step - 1))  # what was offered two steps ago is known
        assert all(torch.equal(batch.batch[name], new[name]) for name in new)
        for image, logits in zip(batch["image"][6:], batch.fields.get("stored_logits", ())[6:], strict=True):
            assert torch.equal(offered[image.numpy().tobytes()], logits)
        logits = torch.randn(len(batch["label"]), 5).to(torch.bfloat16)  # as autocast gives them
        assert rehearsal.offer(batch, {"logits": logits}) == 2
        offered |= {image.numpy().tobytes(): row for image, row in zip(new["image"][:2], logits[:2], strict=True)}
    assert set(rehearsal.buffer.fills) <= set(range(5))
    assert sum(rehearsal.buffer.fills.values()) == 12


def test_samples_that_are_elsewhere_or_whose_outputs_are_not_finite_are_not_offered():
    rehearsal = Rehearsal(r=4, candidates=5, budget="1MB", strata="label")
    fields = samples() | {
        "identity": torch.tensor([1, ELSEWHERE, 3, 4, 5, 6]),
        "wide": torch.arange(6).to(torch.uint16),
    }
    logits = torch.randn(6, 5)
    logits[3, 2], logits[4, 0] = float("nan"), float("inf")
    assert rehearsal.offer(fields, {"logits": logits}) == 2
    state = rehearsal.buffer.state()
    assert sorted(state.key.tolist()) == sorted(keys_of(np.array([1, 3])).tolist())
    assert sorted(state.read("wide", np.arange(2)).tolist()) == [0, 2]
    for row, wide in zip(state.read("image", np.arange(2)), state.read("wide", np.arange(2)).tolist(), strict=True):
        assert torch.equal(row, fields["image"][wide])
    assert rehearsal.buffer.seen == 2


def test_a_data_loader_whose_last_minibatch_is_short_and_tensors_that_are_strided():
    rehearsal = Rehearsal(r=3, candidates=None, budget=10**6)
    data = TensorDataset(torch.randn(20, 2, 4).mT, torch.arange(20))
    sizes = []
    for _ in range(2):
        for x, label in DataLoader(data, batch_size=8):
            batch = rehearsal.augment({"x": x, "label": label})
            assert torch.equal(batch["x"][: batch.new], x)
            sizes.append((batch.new, len(batch["x"])))
            rehearsal.offer(batch)
    assert sizes == [(8, 8), (8, 8), (4, 7), (8, 11), (8, 11), (4, 7)]


def test_torch_compile_compiles_for_the_first_number_of_rows_and_for_any_other():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    rehearsal = Rehearsal(r=6, candidates=1, budget=10**6)
    step = torch.compile(lambda x: (x * x).sum(), backend=counter)
    rows = set()
    for number in range(12):
        batch = rehearsal.augment({"x": torch.full((4, 3), float(number))})
        step(batch["x"])
        rows.add(len(batch["x"]))
        rehearsal.offer(batch)
    assert rows == set(range(4, 11))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": -1}, "r=-1"),
        ({"candidates": -1}, "candidates=-1"),
        ({"look_ahead": 0}, "look_ahead=0"),
        ({"budget": "much"}, "'much'"),
        ({"insertion": "fair"}, "'fair'"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Rehearsal(**{"r": 1, "candidates": 1, "budget": 1000} | settings)


def test_budgets_are_read_as_written():
    assert [bytes_of(text) for text in (7, "7B", "2 kB", "1.5MB", "2GiB")] == [7, 7, 2000, 1_500_000, 2 * 2**30]


def test_wrong_minibatches_are_refused_in_words():
    rehearsal = Rehearsal(r=1, candidates=1, budget=1000)
    with pytest.raises(ValueError, match='"x": "list"'):
        rehearsal.augment({"x": [1, 2]})
    with pytest.raises(ValueError, match="one n for all"):
        rehearsal.augment({"x": torch.zeros(3), "y": torch.zeros(2)})


def test_state_goes_on_bit_for_bit():
    one, other = (Rehearsal(r=4, candidates=6, budget=20 * (48 + 8 + 56)) for _ in range(2))
    for step in range(10):
        one.offer(one.augment(samples(seed=step)))
    other.load_state_dict(one.state_dict())
    assert (other.step, other.buffer.seen) == (10, 60)
    one.connect(None, step=one.step, device=torch.device("cpu"))  # what is under way is no part of a state
    for step in range(10, 20):
        batches = [rehearsal.augment(samples(seed=step)) for rehearsal in (one, other)]
        assert torch.equal(batches[0]["image"], batches[1]["image"])
        for rehearsal, batch in zip((one, other), batches, strict=True):
            rehearsal.offer(batch)


# ---------------------------------------------------------------------------------------------- between processes

STEPS = 6


def dark(kind, rank, ranks):
    """DER or DER++ on this rank's part of every minibatch, with all that was offered before drawn in every step."""
    module = network()
    model = DistributedDataParallel(module) if ranks > 1 else module
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    strategy = kind(Classification(mean=[0.5] * 3, std=[0.3] * 3))
    rehearsal = Rehearsal(r=24, candidates=None, budget=10**6)

    def part(step):
        return {name: value[rank::ranks] for name, value in samples(8, seed=step).items()}

    for step in range(3):
        batch = rehearsal.augment(part(step))
        with torch.no_grad():
            rehearsal.offer(batch, {"logits": strategy.objective.outputs(module, batch.fields)[0]})
    while len(batch["label"]) - batch.new < 24:
        batch = rehearsal.augment(part(0))
    for step in range(3, 3 + STEPS):
        optimiser.zero_grad()
        strategy.gradient(model, rehearsal.augment(part(step)))
        optimiser.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def accumulated(model, rehearsal, steps, rank):
    """Steps of two micro-batches each, in mixed precision, of which only the second meets the other ranks."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        optimiser.zero_grad()
        for micro in range(2):
            batch = rehearsal.augment(samples(seed=100 * step + 10 * micro + rank))
            with model.no_sync() if micro == 0 else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(batch["image"] / 255)
                cross_entropy(logits.float(), batch["label"]).backward()
            rehearsal.offer(batch, {"logits": logits})
        optimiser.step()
    return len(batch["label"]) - batch.new


def unequal(model, rehearsal, steps, rank):
    """As many steps as this rank has minibatches."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        batch = rehearsal.augment(samples(seed=1000 * rank + step))
        optimiser.zero_grad()
        cross_entropy(model(batch["image"] / 255), batch["label"]).backward()
        optimiser.step()
        rehearsal.offer(batch)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


def on_two(rank, ranks, where, folder):
    """Everything that takes two ranks, one after the other, in one group."""
    Place(rank=rank, ranks=ranks, where=where, deadline=60.0).join(device="cpu")
    found = {kind.__name__: dark(kind, rank, ranks).numpy() for kind in (DER, DERpp)}
    model = DistributedDataParallel(network())
    found["accumulated"] = accumulated(model, Rehearsal(r=5, candidates=2, budget=10**5), 5, rank), weights(model)

    rehearsal = Rehearsal(r=5, candidates=2, budget=10**5)
    for epoch in range(2):  # the ranks end at different times, each once the first
        with Join([model, rehearsal]):
            unequal(model, rehearsal, 4 + 5 * ((rank + epoch) % 2), rank)
    found["unequal"] = rehearsal.step, weights(model), rehearsal.delivered.remote

    checkpoint.save({"rehearsal": rehearsal.state_dict()}, checkpoint_id=folder)
    other = Rehearsal(r=5, candidates=2, budget=10**5)
    state = {"rehearsal": other.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    other.load_state_dict(state["rehearsal"])
    found["restored"] = (other.step, sorted(stored(other))) == (rehearsal.step, sorted(stored(rehearsal)))
    found["stored"] = stored(other)

    alone = Rehearsal(r=1, candidates=1, budget=10**5, deadline=2.0)
    alone.augment(samples())
    alone.offer(samples())
    if rank == 0:  # the other does not come to the next one
        alone.augment(samples())
        with pytest.raises(GroupLost, match="exchange") as caught:
            alone.augment(samples())
        found["said"] = str(caught.value)
    dist.barrier()
    del model, rehearsal, other, alone
    leave()
    return found


def stored(rehearsal):
    state = rehearsal.buffer.state()
    return [row.tobytes() for row in state.read("image", np.arange(len(state))).numpy()]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return [*on_ranks(2, on_two, folder), folder]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DER, DERpp])
def test_two_ranks_equal_one_rank(two, kind):
    alone = dark(kind, 0, 1).numpy()
    start = weights(network())
    assert np.abs(alone - start).max() > 1e-2
    for rank in range(2):
        np.testing.assert_allclose(two[rank][kind.__name__], alone, atol=2e-6)


@pytest.mark.slow
def test_gradients_may_be_accumulated_in_mixed_precision(two):
    assert [two[rank]["accumulated"][0] for rank in range(2)] == [5, 5]
    np.testing.assert_array_equal(two[0]["accumulated"][1], two[1]["accumulated"][1])


@pytest.mark.slow
def test_ranks_that_have_ended_answer_those_that_have_not(two):
    assert [two[rank]["unequal"][0] for rank in range(2)] == [18, 18]
    np.testing.assert_array_equal(two[0]["unequal"][1], two[1]["unequal"][1])


@pytest.mark.slow
def test_a_rank_that_ends_without_a_word_is_an_error_at_the_deadline(two):
    assert "Timed out" in two[0]["said"]


@pytest.mark.slow
def test_a_distributed_checkpoint_carries_it_to_as_many_ranks_and_to_one(two):
    assert two[0]["restored"]
    assert two[1]["restored"]
    alone = Rehearsal(r=5, candidates=2, budget=10**5)
    state = {"rehearsal": {"step": 0, "ranks": 0, "rank-0": b"", "rank-1": b""}}
    with pytest.warns(UserWarning, match="single process"):
        checkpoint.load(state, checkpoint_id=two[2])
    with pytest.raises(ValueError, match="no rank-1"):
        alone.load_state_dict({name: value for name, value in state["rehearsal"].items() if name != "rank-1"})
    alone.load_state_dict(state["rehearsal"])
    assert sorted(stored(alone)) == sorted(two[0]["stored"] + two[1]["stored"])


@pytest.mark.slow
def test_the_example_of_the_tutorial_runs_as_it_stands(tmp_path):
    [example] = re.findall(r'^```python title="train.py"\n(.*?)^```$', TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    assert len(example.splitlines()) <= 25
    (tmp_path / "train.py").write_text(example)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    stores = re.findall(r"rank (\d) stores \{([^}]*)\}", done.stdout)  # two processes write, also into one line
    assert sorted(rank for rank, _ in stores) == ["0", "1"]
    for _, fills in stores:  # five classes of the first task are still there, though it was over long ago
        assert len(fills.split(",")) == 10
