"""Laws of the ranks' part of a checkpoint: training goes on from it as if it had never stopped, on any ranks."""

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from steering.cli import main
from steering.learning import Classification, Loop, TrainerSettings
from steering.learning.buffer import BOOKKEEPING, RehearsalBuffer
from steering.learning.buffer_cut import Overrun
from steering.learning.buffer_file import read_buffer, write_cut, write_state
from steering.learning.buffer_state import BufferState
from steering.learning.checkpoint import FOLDER, RanksPart, Recorder, joined, prune
from steering.learning.group import Place, leave
from steering.learning.restore import OtherNetwork, read_training, restore_buffer, restore_training
from steering.learning.samples_file import read_samples
from steering.learning.strategies import DERpp
from steering.learning.training_state import Packed
from steering.runner import RunFolder
from tests.ranks import on_ranks

SAMPLE = 3 * 8 * 8 + 8 + 8 + 4 * 5 + BOOKKEEPING


def loop_of(*, rank=0, capacity=40, width=4, look=1):
    """A small classifier with DER++, whose buffer holds so many images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, width), nn.ReLU(), nn.Linear(width, 5))
    how = TrainerSettings(
        batch=6, candidates=4, representatives=5, buffer_bytes=capacity * SAMPLE, look_ahead=look, seed=1
    )
    return Loop(network, DERpp(Classification(mean=[0.5] * 3, std=[0.3] * 3)), how, rank=rank)


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
    state = loop.buffer.state()
    return sorted(row.tobytes() for row in state.read("image", np.arange(len(state))).numpy())


def written(folder, recorder, number):
    """The part of a single rank, on the disk."""
    recorder.cut(folder, number)
    return joined(number, [recorder.written.result(30)])


def restored(folder, part, *, rank=0, ranks=1, **sizes):
    loop = loop_of(rank=rank, **sizes)
    restore_training(read_training(folder / part.weights, loop.network, {}), loop, {})
    restore_buffer(folder, part, loop, rank=rank, ranks=ranks)
    return loop


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    """Bit for bit: weights, optimiser, buffer, what is drawn and what is kept."""
    one = loop_of()
    one.connect(None)
    train(one, 30)
    part = written(tmp_path, Recorder(one), 0)
    train(one, 20)
    other = restored(tmp_path, RanksPart.from_json(json.loads(json.dumps(part.to_json()))))
    assert other.steps == 30
    other.connect(None)
    tally = train(other, 20)
    assert tally.representatives == 20 * 5
    assert torch.equal(weights(one), weights(other))
    assert stored(one) == stored(other)


def test_random_numbers_go_on_on_the_first_rank_and_are_each_rank_s_own(tmp_path):
    one = loop_of()
    one.connect(None)
    train(one, 3)
    torch.rand(7)
    part, state = written(tmp_path, Recorder(one), 0), torch.get_rng_state()
    restored(tmp_path, part)
    assert torch.equal(torch.get_rng_state(), state)
    restored(tmp_path, part, rank=1, ranks=2)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_writes_what_has_changed_and_keeps_no_more_than_it_needs(tmp_path):
    """Fifty checkpoints of a buffer of 400 of which a few change at a time: files stay below three times the buffer."""
    loop = loop_of(capacity=400)
    loop.connect(None)
    recorder = Recorder(loop)
    train(loop, 110)
    part = written(tmp_path, recorder, 0)
    whole = part.bytes
    for number in range(1, 50):
        train(loop, 2)
        part = written(tmp_path, recorder, number)
        prune(tmp_path, [part])
        files = list((tmp_path / FOLDER).iterdir())
        assert {f"{FOLDER}/{path.name}" for path in files} == part.files
        newest = (tmp_path / part.buffers[0][-1]).stat().st_size
        assert newest < 0.3 * whole or len(part.buffers[0]) == 1
        assert sum(path.stat().st_size for path in files) < 2.5 * whole
    other = restored(tmp_path, part, capacity=400)
    assert stored(other) == stored(loop)
    assert other.buffer.fills == loop.buffer.fills


@pytest.mark.parametrize("policy", ["reservoir", "replacement", "balanced"])
def test_a_cut_is_the_buffer_as_it_was_whatever_is_inserted_while_it_is_read(policy):
    """Blocks of a sample or two, and inserts before, between and after them."""
    rng = np.random.default_rng(1)
    for attempt in range(8):
        buffer = RehearsalBuffer(30 * (8 + 8 + 4 * 150_000 + BOOKKEEPING), policy=policy, seed=attempt)
        first = 0

        def insert(count, buffer=buffer):
            nonlocal first
            ids = torch.arange(first, first + count)
            buffer.insert({"id": ids, "x": ids[:, None].float().expand(-1, 150_000)}, ids % 3, ids)
            first += count

        insert(int(rng.integers(1, 80)))
        since = buffer.state().clock if attempt % 2 else 0
        insert(int(rng.integers(1, 80)))
        before = buffer.state()
        slots = np.flatnonzero(before.inserted_at > since)
        expected = before.read("id", slots).tolist()
        cut = buffer.cut(since, aside=10.0)
        insert(int(rng.integers(1, 8)))
        found, order = [], []
        for at, block in cut.blocks():
            assert (block["x"].view(np.float32) == block["id"].view(np.int64)).all()
            found += block["id"].view(np.int64).ravel().tolist()
            order.append(at)
            insert(int(rng.integers(1, 8)))
        cut.close()
        insert(3)
        assert found == expected
        assert len(order) > len(expected) / 3
        assert cut.key.tolist() == before.key[slots].tolist()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    policy=st.sampled_from(["reservoir", "replacement", "balanced"]),
    before=st.integers(1, 700),
    between=st.integers(0, 700),
    whole=st.booleans(),
    batch=st.integers(1, 40),
)
def test_whatever_a_thread_inserts_meanwhile_the_file_is_the_buffer_at_the_cut(
    tmp_path, policy, before, between, whole, batch
):
    """Two megabytes, written while another thread inserts without a pause."""
    buffer = RehearsalBuffer(500 * (8 + 8 + 4000 + BOOKKEEPING), policy=policy)
    first, stop = 0, threading.Event()

    def insert(count):
        nonlocal first
        ids = torch.arange(first, first + count)
        buffer.insert({"id": ids, "x": ids[:, None].int().expand(-1, 1000)}, ids % 3, ids)
        first += count

    def inserting():
        while not stop.is_set():
            insert(batch)

    insert(before)
    earlier = buffer.cut()
    write_cut(earlier, tmp_path / "whole")
    earlier.close()
    insert(between)
    expected = buffer.state().packed()
    cut = buffer.cut(0 if whole else earlier.counters["clock"], aside=10.0)
    other = threading.Thread(target=inserting)
    other.start()
    try:
        write_cut(cut, tmp_path / "cut")
    finally:
        stop.set()
        other.join()
        cut.close()
    with ExitStack() as stack:
        paths = [tmp_path / "cut"] if whole else [tmp_path / "whole", tmp_path / "cut"]
        found = read_buffer(paths, stack).packed()
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())
    assert (found.tensors["field.x"] == found.tensors["field.id"][:, None]).all()


def test_a_disk_slower_than_the_inserts_costs_the_checkpoint_and_nothing_else():
    buffer = RehearsalBuffer(100 * (8 + 8 + BOOKKEEPING))
    for first in range(0, 200, 20):
        ids = torch.arange(first, first + 20)
        buffer.insert({"id": ids}, ids * 0, ids)
    cut = buffer.cut(aside=0.01)
    for first in range(200, 2000, 20):
        ids = torch.arange(first, first + 20)
        buffer.insert({"id": ids}, ids * 0, ids)
    with pytest.raises(Overrun, match="faster disk"):
        list(cut.blocks())
    with pytest.raises(RuntimeError, match="still being read"):
        buffer.cut()
    cut.close()
    assert sum(len(block["id"]) for _, block in buffer.cut().blocks()) == 100


@pytest.mark.slow
def test_the_benchmark_runs_and_keeps_its_keys(tmp_path):
    quick = ["--mib", "1", "2", "--checkpoints", "2", "--steps", "2"]
    assert main(["run", "workflows/bench_checkpoint.py", "--out", str(tmp_path / "run"), *quick]) == 0
    figures = RunFolder(tmp_path / "run").summary()["checkpoint"]
    assert figures["stall_ms"]["p50"] <= figures["stall_ms"]["p99"]
    assert 0 < figures["share"] < 1
    assert figures["mib_2"]["whole_mib"] > figures["mib_1"]["whole_mib"] > 1
    assert (tmp_path / "run" / "picture.png").is_file()


def write_on(rank, ranks, where, folder):
    """Train and write twice, so that there are changes too; what this rank stores and has written."""
    loop = loop_of(rank=rank, capacity=30 + 20 * rank)
    loop.connect(Place(rank=rank, ranks=ranks, where=where, deadline=30.0).join(device="cpu"))
    recorder = Recorder(loop)
    for number in range(2):
        train(loop, 15)
        recorder.cut(folder, number)
        files = recorder.written.result(30)
    loop.disconnect()
    leave()
    return loop.buffer.state().packed().to_bytes(), files


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_on_one_two_or_three(tmp_path):
    """Every sample below the bound that both have is there once, and what was seen is not counted twice."""
    answers = on_ranks(2, write_on, tmp_path)
    states = [BufferState.of(Packed.from_bytes(data)) for data, _ in answers]
    part = joined(1, [files for _, files in answers])
    bound = min(state.bound for state in states)
    for ranks in (1, 2, 3):
        loops = [restored(tmp_path, part, rank=rank, ranks=ranks, capacity=200) for rank in range(ranks)]
        assert {loop.steps for loop in loops} == {30}
        found = sorted(key for loop in loops for key in loop.buffer.state().key.tolist())
        every = sorted(key for state in states for key in state.key.tolist())
        assert found == [key for key in every if ranks == 2 or key < bound]
        assert sum(loop.buffer.seen for loop in loops) == sum(state.seen for state in states)
        assert all(torch.equal(weights(loop), weights(loops[0])) for loop in loops)


WRITER = """
import json, sys
from pathlib import Path
from tests.test_checkpoint import Recorder, loop_of, train, written

folder = Path(sys.argv[1])
loop = loop_of(capacity=300)
loop.connect(None)
recorder = Recorder(loop)
for number in range(10**6):
    train(loop, 3)
    part = written(folder, recorder, number)
    (folder / "draft.json").write_text(json.dumps(part.to_json()))
    (folder / "draft.json").replace(folder / "part.json")
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_a_whole_state(tmp_path):
    """kill -9 while one checkpoint after the other is written; what is there is whole, and training goes on from it."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=Path(__file__).parents[1])
    while not (tmp_path / "part.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.237)
    process.send_signal(signal.SIGKILL)
    process.wait()
    part = RanksPart.from_json(json.loads((tmp_path / "part.json").read_text()))
    loop = restored(tmp_path, part, capacity=300)
    assert loop.steps == part.step
    straight = loop_of(capacity=300)
    straight.connect(None)
    train(straight, loop.steps)
    assert stored(straight) == stored(loop)


def test_a_state_of_another_network_is_refused_in_words(tmp_path):
    loop = loop_of()
    loop.connect(None)
    train(loop, 3)
    part = written(tmp_path, Recorder(loop), 0)
    with pytest.raises(OtherNetwork, match="does not fit this network"):
        restored(tmp_path, part, width=7)


def test_what_cannot_be_written_is_said_and_the_next_checkpoint_is_whole(tmp_path):
    """A folder that is a file, as a disk that is gone: training goes on, and so do later checkpoints."""
    loop = loop_of()
    loop.connect(None)
    train(loop, 10)
    recorder = Recorder(loop)
    (tmp_path / "gone").write_text("")
    with pytest.raises(OSError, match="gone"):
        written(tmp_path / "gone", recorder, 0)
    train(loop, 5)
    part = written(tmp_path, recorder, 1)
    with pytest.raises(ValueError, match="numbers that rise"):
        recorder.cut(tmp_path, 1)
    assert stored(restored(tmp_path, part)) == stored(loop)


def test_a_file_that_is_gone_and_samples_of_no_known_stratum_are_refused_in_words(tmp_path):
    """Found by fuzzing: the system's own words, and a KeyError."""
    loop = loop_of()
    loop.connect(None)
    train(loop, 10)
    part = written(tmp_path, Recorder(loop), 0)
    [path] = [tmp_path / name for name in part.buffers[0]]
    state = loop.buffer.state()
    write_state(replace(state, strata=state.strata[1:]), path)
    with pytest.raises(ValueError, match="stratum that the table"), ExitStack() as stack:
        read_buffer([path], stack)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"found no .*expected it"), ExitStack() as stack:
        read_buffer([path], stack)
    with pytest.raises(FileNotFoundError, match=r"found no .*expected it"):
        read_samples(path)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "../secret"},
        {"buffers": [["/etc/passwd"]]},
        {"buffers": []},
        {"ranks": 10**9},
        {"step": -1},
        {"samples": ["ranks/00000000.rank-0.samples.safetensors"] * 2},
        {"buffers": None},
    ],
    ids=str,
)
def test_a_part_that_names_other_files_is_refused(change):
    name = "ranks/00000000.rank-0.buffer.safetensors"
    good = {
        "number": 0,
        "step": 3,
        "ranks": 1,
        "weights": "ranks/00000000.weights.safetensors",
        "buffers": [[name]],
        "samples": [],
        "bytes": 5,
    }
    assert RanksPart.from_json(good).files == {name, good["weights"]}
    with pytest.raises(ValueError, match="found"):
        RanksPart.from_json(good | change)
