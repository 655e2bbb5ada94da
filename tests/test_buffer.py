"""Laws of the local rehearsal buffer: what it keeps, what it holds, how it survives."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from steering.learning.buffer import BOOKKEEPING, RehearsalBuffer
from steering.learning.buffer_file import read_buffer, write_cut, write_state
from steering.learning.buffer_state import reshard
from steering.learning.identity import WHOLE

POLICIES = ("reservoir", "replacement", "balanced")
BYTES = 8 + BOOKKEEPING + 8  # an int64 identifier, the stratum and its bookkeeping


def offer(buffer, ids, stratum=0):
    ids = torch.as_tensor(ids, dtype=torch.int64)
    strata = torch.as_tensor(stratum, dtype=torch.int64).expand(len(ids))
    return buffer.insert({"id": ids}, strata)


def stored(buffer):
    out = {"id": torch.empty(len(buffer), dtype=torch.int64), "stratum": torch.empty(len(buffer), dtype=torch.int64)}
    buffer.gather(np.arange(len(buffer)), out)
    return out["id"].tolist(), out["stratum"].tolist()


def reread(buffer, folder, into):
    """The other buffer, filled from what this one has written."""
    write_state(buffer.state(), folder / "buffer")
    with ExitStack() as stack:
        into.load(read_buffer([folder / "buffer"], stack))
    return into


def improbable(found, expected):
    """Probability of counts at least as far from those expected (chi-square, one constraint)."""
    found, expected = np.asarray(found, float), np.broadcast_to(np.asarray(expected, float), np.shape(found))
    return chi2.sf(((found - expected) ** 2 / expected).sum(), len(found) - 1)


def stream(buffer, total, batch, stratum=lambda ids: 0):
    for first in range(0, total, batch):
        ids = torch.arange(first, min(first + batch, total))
        offer(buffer, ids, stratum(ids))


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_reservoir_stores_every_sample_of_the_past_equally_often(batch):
    counts = np.zeros(60)
    for seed in range(250 if batch > 1 else 120):
        buffer = RehearsalBuffer(10 * BYTES, seed=seed)
        stream(buffer, 60, batch)
        counts[stored(buffer)[0]] += 1
    assert counts.sum() == 10 * (250 if batch > 1 else 120)
    assert improbable(counts, counts.sum() / 60) > 1e-3


def test_two_ranks_with_half_the_stream_each_store_what_one_with_all_of_it_does():
    one, two = np.zeros(80), np.zeros(80)
    for seed in range(200):
        whole = RehearsalBuffer(16 * BYTES, seed=seed)
        stream(whole, 80, 8)
        one[stored(whole)[0]] += 1
        for rank in range(2):
            half = RehearsalBuffer(8 * BYTES, seed=2 * seed + rank)
            for first in range(0, 80, 8):
                offer(half, torch.arange(first + rank, first + 8, 2))
            two[stored(half)[0]] += 1
    expected = 200 * 16 / 80
    assert one.sum() == two.sum() == expected * 80
    assert improbable(one, expected) > 1e-3
    assert improbable(two, expected) > 1e-3


def test_replacement_forgets_the_old_exponentially_and_keeps_the_shares_of_strata():
    ages = []
    for seed in range(60):
        buffer = RehearsalBuffer(20 * BYTES, policy="replacement", seed=seed)
        stream(buffer, 400, 4, lambda ids: ids % 2)
        assert buffer.fills == {0: 10, 1: 10}
        ages.extend(399 - i for i in stored(buffer)[0])
    # A sample survives each later one of its stratum with probability 9/10.
    assert np.mean(ages) == pytest.approx(2 * 9.5, rel=0.1)


def test_balanced_keeps_rare_strata_whole_and_is_fair_within_a_stratum():
    counts = np.zeros(400)
    for seed in range(60):
        buffer = RehearsalBuffer(30 * BYTES, policy="balanced", seed=seed)
        stream(buffer, 400, 5, lambda ids: torch.where(ids % 80 == 7, 2, torch.where(ids % 10 == 3, 1, 0)))
        assert buffer.fills[2] == 5
        assert abs(buffer.fills[0] - buffer.fills[1]) <= 1
        counts[stored(buffer)[0]] += 1
    for members in (np.arange(400) % 10 == 3, ~np.isin(np.arange(400) % 10, [3]) & (np.arange(400) % 80 != 7)):
        assert improbable(counts[members], counts[members].mean()) > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
def test_fills_are_what_is_stored_whatever_arrives(policy):
    rng = np.random.default_rng(3)
    buffer = RehearsalBuffer(50 * BYTES, policy=policy)
    for step in range(200):
        ids = torch.arange(step * 20, step * 20 + int(rng.integers(0, 20)))
        key = torch.from_numpy(rng.integers(-2, 3 + step // 40, len(ids)))
        offer(buffer, ids, key * 10**12)
        held, strata = stored(buffer)
        assert len(set(held)) == len(held) <= buffer.capacity
        assert buffer.fills == {key: strata.count(key) for key in set(strata)}
        for key, fill in buffer.fills.items():
            assert sorted(buffer.locate([key] * fill, list(range(fill)))) == [
                slot for slot, of in enumerate(strata) if of == key
            ]
        assert (buffer.ages >= 0).all()
    assert buffer.seen == sum(buffer.strata.seen)
    assert len(buffer) == 50


def test_composition_tells_how_much_of_each_stratum_is_stored_and_how_old_it_is():
    """A hundred samples of stratum 3, then fifty of stratum -1, one by one into a buffer that holds them all."""
    buffer = RehearsalBuffer(200 * (8 + 8 + BOOKKEEPING))
    assert buffer.composition() == {}
    for key, count in ((3, 100), (-1, 50)):
        for _ in range(count):
            buffer.insert({"value": torch.zeros(1, dtype=torch.int64)}, torch.tensor([key]))
    found = buffer.composition()
    assert {key: part["count"] for key, part in found.items()} == {3: 100, -1: 50}
    assert found[3]["age_p50"] == 50 + 49.5
    assert found[-1]["age_p50"] == 24.5
    assert found[3]["age_p10"] < found[3]["age_p50"] < found[3]["age_p90"] < 150


@pytest.mark.parametrize("policy", POLICIES)
def test_a_new_stratum_may_appear_mid_stream(policy):
    buffer = RehearsalBuffer(40 * BYTES, policy=policy)
    stream(buffer, 400, 8)
    for first in range(400, 800, 8):
        offer(buffer, torch.arange(first, first + 8), -7)
    assert set(buffer.fills) == {0, -7}
    assert buffer.fills[-7] >= 8


def test_budget_is_never_exceeded_and_storage_never_moves():
    sample = {"counts": torch.zeros(5, 64, 64, dtype=torch.uint16), "phase": torch.zeros(5, 64, 64)}
    buffer = RehearsalBuffer(1_000_000)
    assert buffer.capacity == 0
    places = set()
    for step in range(30):
        buffer.insert(sample, torch.full((5,), step))
        assert buffer.nbytes <= 1_000_000
        places.add(tuple(rows.tensor.data_ptr() for rows in buffer.rows.values()))
    assert len(places) == 1
    assert len(buffer) == buffer.capacity == 1_000_000 // (64 * 64 * 6 + 8 + BOOKKEEPING)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.uint16, torch.uint32, torch.int64, torch.bool, torch.bfloat16, torch.float64, torch.complex64],
    ids=str,
)
@pytest.mark.parametrize("width", [1, 3, 3000])
def test_every_dtype_survives_bit_for_bit(dtype, width):
    torch.manual_seed(0)
    content = torch.randint(0, 2 if dtype == torch.bool else 256, (40, width * dtype.itemsize), dtype=torch.uint8)
    samples = content.view(dtype)
    buffer = RehearsalBuffer(30 * (width * dtype.itemsize + 8 + 8 + BOOKKEEPING))
    ids = torch.arange(40)
    for part in (slice(0, 25), slice(25, 40)):
        buffer.insert({"x": samples[part], "id": ids[part]}, ids[part] % 3)
    out = {"x": torch.zeros(30, width, dtype=dtype), "id": torch.zeros(30, dtype=torch.int64)}
    slots = torch.randperm(30)
    buffer.gather(slots.numpy(), out)
    assert torch.equal(out["x"].view(torch.uint8), content[out["id"]])


def test_gather_writes_its_rows_and_no_others():
    buffer = RehearsalBuffer(10 * BYTES)
    offer(buffer, torch.arange(100, 110))
    out = {"id": torch.full((6,), -1), "other": torch.full((6,), -1)}
    buffer.gather(np.array([3, 3, 0]), out, 2)
    assert out["id"].tolist() == [-1, -1, 103, 103, 100, -1]
    assert out["other"].tolist() == [-1] * 6


def test_samples_that_are_strided_or_need_gradients_are_taken_as_they_are():
    buffer = RehearsalBuffer(10_000)
    x = torch.arange(24.0).view(4, 6).requires_grad_()
    buffer.insert({"x": x.T}, torch.arange(6))
    out = {"x": torch.zeros(6, 4)}
    buffer.gather(np.arange(6), out)
    assert torch.equal(out["x"], x.T)


def test_wrong_samples_are_refused_and_leave_the_buffer_as_it_was():
    with pytest.raises(ValueError, match="larger than the budget"):
        RehearsalBuffer(1000).insert({"x": torch.zeros(1, 1000)}, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected a positive"):
        RehearsalBuffer(0)
    with pytest.raises(ValueError, match="policy 'fifo'"):
        RehearsalBuffer(10, policy="fifo")
    buffer = RehearsalBuffer(10_000)
    key = torch.zeros(2, dtype=torch.int64)
    buffer.insert({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, key)
    wrong = {
        "samples torch.float64": {"x": torch.zeros(2, 3, dtype=torch.float64), "y": torch.zeros(2)},
        r"torch.float32 \(4,\)": {"x": torch.zeros(2, 4), "y": torch.zeros(2)},
        "no field 'y'": {"x": torch.zeros(2, 3)},
        "buffer stores": {"x": torch.zeros(2, 3), "y": torch.zeros(2), "z": torch.zeros(2)},
        "expected 2 samples": {"x": torch.zeros(2, 3), "y": torch.zeros(3)},
        "none called 'stratum'": {"x": torch.zeros(2, 3), "y": torch.zeros(2), "stratum": key},
    }
    for message, samples in wrong.items():
        with pytest.raises(ValueError, match=message):
            buffer.insert(samples, key)
    with pytest.raises(ValueError, match="expected int64"):
        buffer.insert({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, key.int())
    with pytest.raises(ValueError, match="expected 3 or more"):
        buffer.gather(np.array([1]), {"x": torch.zeros(2, 3), "y": torch.zeros(2)}, 2)
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        buffer.gather(np.array([1]), {"x": torch.zeros(2, 3).half(), "y": torch.zeros(2)})
    assert (len(buffer), buffer.seen, buffer.fills) == (2, 2, {0: 2})


@pytest.mark.parametrize("policy", POLICIES)
def test_a_restored_buffer_goes_on_as_if_it_had_never_stopped(policy, tmp_path):
    first = RehearsalBuffer(20 * BYTES, policy=policy, seed=5)
    stream(first, 100, 7, lambda ids: ids % 3)
    second = reread(first, tmp_path, RehearsalBuffer(20 * BYTES, policy=policy, seed=99))
    for buffer in (first, second):
        offer(buffer, torch.arange(100, 150), torch.arange(50) % 5)
    # Where draws are from the members of a stratum these stand in another order.
    assert (
        sorted(zip(*stored(first), strict=True)) == sorted(zip(*stored(second), strict=True)) or policy == "replacement"
    )
    assert first.fills == second.fills
    assert (first.seen, list(first.strata.seen)) == (second.seen, list(second.strata.seen))


def test_files_of_changes_bring_a_whole_one_forward(tmp_path):
    buffer = RehearsalBuffer(50 * BYTES)
    stream(buffer, 40, 8)
    clock = 0
    for number in range(4):
        cut = buffer.cut(clock)
        write_cut(cut, tmp_path / str(number))
        cut.close()
        clock = cut.counters["clock"]
        offer(buffer, torch.arange(40 + 30 * number, 70 + 30 * number), 4)
        assert number == 0 or 0 < len(cut.slots) < 50
    last = RehearsalBuffer(50 * BYTES)
    stream(last, 40, 8)
    offer(last, torch.arange(40, 130), 4)
    with ExitStack() as stack:
        restored = RehearsalBuffer(50 * BYTES)
        restored.load(read_buffer([tmp_path / str(number) for number in range(4)], stack))
        assert restored.fills == last.fills
        assert sorted(stored(restored)[0]) == sorted(stored(last)[0])
        with pytest.raises(ValueError, match="since clock 70, expected since 40"):
            read_buffer([tmp_path / "0", tmp_path / "2"], stack)


def four_ranks():
    buffers = [RehearsalBuffer(30 * BYTES, seed=rank) for rank in range(4)]
    for rank, buffer in enumerate(buffers[:3]):  # the last has never been offered anything
        stream(buffer, 60 + 20 * rank, 10, lambda ids, rank=rank: ids % (rank + 2))
    return buffers


@pytest.mark.parametrize("ranks", [1, 3, 4, 5, 200])
def test_saved_on_four_ranks_and_restored_on_others_holds_all_samples_below_the_common_bound(ranks):
    saved = four_ranks()
    states = [buffer.state() for buffer in saved]
    restored = [RehearsalBuffer(120 * BYTES, seed=rank) for rank in range(ranks)]
    for rank, buffer in enumerate(restored):
        buffer.load(reshard(states, rank, ranks))
    bound = min(state.bound for state in states) if ranks != 4 else WHOLE
    before = sorted(
        pair
        for buffer, state in zip(saved, states, strict=True)
        if len(buffer)
        for pair, key in zip(zip(*stored(buffer), strict=True), state.key.tolist(), strict=True)
        if key < bound
    )
    after = sorted(pair for buffer in restored if len(buffer) for pair in zip(*stored(buffer), strict=True))
    assert before == after
    assert sum(buffer.seen for buffer in restored) == sum(buffer.seen for buffer in saved)
    if ranks != 4:
        fills = [len(buffer) for buffer in restored]
        assert max(fills) - min(fills) <= 1
    for buffer in restored:
        offer(buffer, torch.arange(1000, 1005))


def test_keys_that_ranks_made_before_are_not_made_again_after_their_number_has_changed():
    saved = four_ranks()
    keys = {key for buffer in saved for key in buffer.state().key.tolist()}
    for rank in range(3):
        buffer = RehearsalBuffer(300 * BYTES, seed=rank)
        buffer.load(reshard([other.state() for other in saved], rank, 3))
        before = set(buffer.state().key.tolist())
        stream(buffer, 300, 10)
        assert not keys & (set(buffer.state().key.tolist()) - before)


def test_a_buffer_that_is_widened_holds_the_same_and_goes_on():
    narrow = RehearsalBuffer(40 * (2 * 6 + 8 + BOOKKEEPING))
    fields = {"counts": torch.arange(180).to(torch.uint16).view(60, 3)}
    ids = torch.arange(60)
    narrow.insert(fields, ids % 4, ids)
    before = narrow.state()
    kept = dict(zip(before.key.tolist(), before.read("counts", np.arange(len(before))).tolist(), strict=True))
    narrow.widen({"counts": torch.uint32, "other": torch.float64})
    state = narrow.state()
    found = dict(zip(state.key.tolist(), state.read("counts", np.arange(len(state))).tolist(), strict=True))
    assert narrow.nbytes <= narrow.budget_bytes
    assert 0 < len(found) < len(kept)
    assert found == {key: kept[key] for key in sorted(kept)[: len(found)]}
    assert (narrow.seen, sum(state.strata[:, 1])) == (60, 60)
    narrow.insert({"counts": torch.full((1, 3), 70_000).to(torch.uint32)}, torch.tensor([9]), torch.tensor([100]))
    place = narrow.rows["counts"].tensor.data_ptr()
    narrow.widen({"counts": torch.uint16})
    assert narrow.rows["counts"].tensor.data_ptr() == place


def test_a_state_larger_than_the_budget_is_thinned_at_random():
    counts = np.zeros(40)
    for seed in range(400):
        source = RehearsalBuffer(40 * BYTES, seed=seed)
        stream(source, 40, 10)
        small = RehearsalBuffer(10 * BYTES, seed=seed)
        small.load(source.state())
        offer(small, torch.arange(40, 80))
        assert len(small) == 10
        held = [i for i in stored(small)[0] if i < 40]
        counts[held] += 1
    assert improbable(counts, counts.mean()) > 1e-3
    assert counts.sum() == pytest.approx(400 * 5, rel=0.05)


def test_restored_with_room_to_spare_old_and_new_are_stored_equally_often():
    counts = np.zeros(200)
    for seed in range(250):
        full = RehearsalBuffer(10 * BYTES, seed=seed)
        stream(full, 40, 10)
        roomy = RehearsalBuffer(40 * BYTES)
        roomy.load(full.state())
        for first in range(40, 200, 10):
            offer(roomy, torch.arange(first, first + 10))
        counts[stored(roomy)[0]] += 1
    old, new = counts[:40].mean(), counts[40:].mean()
    assert new == pytest.approx(old, rel=0.1)


def test_states_that_do_not_fit_together_are_refused():
    buffer, other = RehearsalBuffer(10 * BYTES), RehearsalBuffer(10_000)
    offer(buffer, [1, 2, 3])
    other.insert({"x": torch.zeros(2)}, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="different fields"):
        reshard([buffer.state(), other.state()], 0, 3)


def test_uint16_and_complex_fields_survive_the_disk(tmp_path):
    buffer = RehearsalBuffer(100_000)
    fields = {
        "counts": torch.arange(60_000, 60_012).to(torch.uint16).view(4, 3),
        "wave": torch.randn(4, 5, dtype=torch.complex64),
    }
    buffer.insert(fields, torch.arange(4))
    restored = reread(buffer, tmp_path, RehearsalBuffer(100_000))
    out = {name: torch.zeros_like(value) for name, value in fields.items()}
    restored.gather(np.arange(4), out)
    assert all(torch.equal(out[name], fields[name]) for name in fields)
