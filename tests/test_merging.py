"""Laws of buffers that are united, given out and thinned: every past sample is equally likely, none is there twice."""

import itertools

import numpy as np
import pytest
import torch

from steering.learning import identities, stratum_of
from steering.learning.buffer import BOOKKEEPING, RehearsalBuffer
from steering.learning.buffer_state import BufferState, ScanName, merge, reshard, thin, without
from steering.learning.identity import WHOLE, keys_of
from steering.learning.training_state import Packed
from tests.test_buffer import improbable

BYTES = 8 + 8 + BOOKKEEPING


def offer(buffer, run, scan, ids, *, batch=7):
    """Frames of a scan of a run, in batches; what is stored of a frame is its id."""
    stratum = stratum_of(run, scan)
    buffer.scans.setdefault(stratum, ScanName(run, scan, 0.0))
    for first in range(0, len(ids), batch):
        part = torch.as_tensor(ids[first : first + batch])
        identity = torch.from_numpy(identities(run, scan, part.numpy()))
        buffer.insert({"id": part}, torch.full((len(part),), stratum), identity)


def held(state):
    return state.read("id", np.arange(len(state))).ravel().tolist() if len(state) else []


def content(state):
    return sorted(zip(state.key.tolist(), state.stratum.tolist(), held(state), strict=True)), state.strata.tolist()


def grown(capacity, run, *, before=None, first=0, count=100, policy="reservoir"):
    """A buffer of a run, from another one's state where there is one."""
    buffer = RehearsalBuffer(capacity * BYTES, policy=policy)
    if before is not None:
        buffer.load(before)
    offer(buffer, run, "a", np.arange(first, first + count))
    return buffer


def ancestors(seed, capacity=30, policy="reservoir"):
    """Two runs that both grew from a third, with one more that did not: frames 0..299 in all."""
    third = grown(capacity, f"{seed} third", policy=policy).state()
    one = grown(capacity, f"{seed} one", before=third, first=100, count=60, policy=policy).state()
    two = grown(capacity, f"{seed} two", before=third, first=160, count=100, policy=policy).state()
    other = grown(capacity, f"{seed} other", first=260, count=40, policy=policy).state()
    return [one, two, other, third]


def test_of_two_runs_that_grew_from_a_third_every_past_sample_is_equally_likely_and_none_is_twice():
    counts = np.zeros(300)
    for seed in range(150):
        found = held(thin(merge(ancestors(seed), "reservoir"), 25))
        assert len(set(found)) == len(found)
        counts[found] += 1
    assert counts.sum() > 0.6 * 25 * 150
    assert improbable(counts, counts.mean()) > 1e-3


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_merging_is_idempotent_and_independent_of_the_order(policy):
    for seed in range(5):
        states = ancestors(seed, policy=policy)
        once = merge(states, policy)
        for order in itertools.permutations(states):
            assert content(merge(order, policy)) == content(once)
        assert content(merge([once, once, *states], policy)) == content(once)
        assert content(merge([merge(states[:2], policy), merge(states[2:], policy)], policy)) == content(once)
        thinned = thin(once, 20)
        assert content(thin(thin(once, 40), 20)) == content(thinned)


def test_balanced_merges_keep_every_stratum_fair():
    counts = np.zeros(300)
    for seed in range(100):
        state = thin(merge(ancestors(seed, policy="balanced"), "balanced"), 24)
        assert sorted(np.unique(state.stratum, return_counts=True)[1].tolist()) == [6, 6, 6, 6]
        counts[held(state)] += 1
    for part in (slice(0, 100), slice(100, 160), slice(160, 260), slice(260, 300)):
        assert improbable(counts[part], counts[part].mean()) > 1e-3


@pytest.mark.parametrize("through", ["the buffer", "a larger buffer", "a merge", "a lost rank"])
def test_a_balanced_buffer_that_begins_with_a_full_reservoir_stores_new_scans(through):
    """How much the reservoir turned away says nothing of scans that it never saw."""
    old = grown(90 if through == "a larger buffer" else 60, "old", count=3000).state()
    if through == "a merge":
        old = merge([old], "balanced")
    buffer = RehearsalBuffer(60 * BYTES, policy="balanced")
    buffer.absorb(old) if through == "a lost rank" else buffer.load(old)
    for scan in "bc":
        offer(buffer, "new", scan, np.arange(200))
    assert sorted(buffer.fills.values()) == [20, 20, 20]


@pytest.mark.parametrize("thinned", [False, True])
def test_with_less_room_than_strata_none_is_forgotten_for_its_age(thinned):
    """Ten scans one after the other, room for five samples: each scan is there in half of the runs."""
    counts = np.zeros(10)
    for seed in range(100):
        buffer = RehearsalBuffer((30 if thinned else 5) * BYTES, policy="balanced")
        for scan in range(10):
            offer(buffer, f"run {seed}", str(scan), 100 * scan + np.arange(30))
        found = held(thin(buffer.state(), 5))
        counts[np.array(found) // 100] += 1
        assert len(set(np.array(found) // 100)) == 5
    assert counts[:5].sum() == pytest.approx(250, abs=40)
    assert counts.min() > 20


def test_what_is_offered_again_is_stored_once_and_counts_once():
    """Three epochs in random orders keep what one keeps, with the newest content."""
    for policy in ("reservoir", "balanced"):
        once = grown(20, "run", policy=policy)
        again = RehearsalBuffer(20 * BYTES, policy=policy)
        for epoch in range(3):
            offer(again, "run", "a", np.random.default_rng(epoch).permutation(100))
        assert sorted(held(again.state())) == sorted(held(once.state()))
        assert len(set(held(again.state()))) == 20


def test_a_restored_buffer_of_another_size_goes_on_as_if_it_had_always_had_it():
    """From 40 slots to 15: the same samples as 15 slots from the start. From 15 to 40: those below the same bound."""
    for seed in range(10):
        large, small = grown(40, str(seed)), grown(15, str(seed))
        shrunk = grown(15, f"{seed} more", before=large.state(), first=100)
        straight = grown(15, f"{seed} more", before=small.state(), first=100)
        assert content(shrunk.state())[0] == content(straight.state())[0]
        roomy = grown(40, f"{seed} more", before=small.state(), first=100, count=5).state()
        keys = keys_of(identities(f"{seed} more", "a", np.arange(100, 105)))
        assert len(roomy) == 15 + (keys < small.state().bound).sum()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_resharding_is_exact(ranks):
    """What other ranks hold together is what those before held below their common bound, each once."""
    counts = np.zeros(120)
    for seed in range(80):
        states = []
        for rank in range(3):
            buffer = RehearsalBuffer(12 * BYTES)
            offer(buffer, str(seed), "a", np.arange(rank, 120, 3))
            states.append(buffer.state())
        parts = [reshard(states, rank, ranks) for rank in range(ranks)]
        found = [one for part in parts for one in held(part)]
        bound = min(state.bound for state in states) if ranks != 3 else WHOLE
        expected = [i for s in states for i, key in zip(held(s), s.key.tolist(), strict=True) if key < bound]
        assert sorted(found) == sorted(expected)
        assert sum(part.seen for part in parts) == 120
        counts[found] += 1
    assert improbable(counts, counts.mean()) > 1e-3


def test_a_sample_that_two_ranks_hold_is_given_out_once():
    """As earlier versions stored them: the newer copy stays."""
    buffers = [RehearsalBuffer(100 * BYTES) for _ in range(3)]
    for rank, buffer in enumerate(buffers):
        offer(buffer, "run", "a", np.arange(20 * rank, 20 * rank + 40))
    parts = [reshard([buffer.state() for buffer in buffers], rank, 2) for rank in range(2)]
    assert sorted(one for part in parts for one in held(part)) == list(range(80))


def test_states_whose_numbers_have_other_types_are_united_in_one_that_has_room_for_both():
    states = []
    for first, dtype in ((0, torch.uint16), (3, torch.uint32), (6, torch.int16)):
        buffer = RehearsalBuffer(10_000)
        ids = torch.arange(first, first + 3)
        buffer.insert({"counts": (ids[:, None] + 1000).expand(3, 2).to(dtype)}, ids % 2, ids)
        states.append(buffer.state())
    for found in (merge(states, "balanced"), reshard(states, 0, 1)):
        counts = found.read("counts", np.arange(9))
        assert counts.dtype == torch.int64
        assert sorted(counts[:, 1].tolist()) == list(range(1000, 1009))
        assert found.layout.row_bytes["counts"] == 16


def test_what_a_lost_rank_held_is_taken_over_by_the_others_as_if_they_had_seen_it():
    """Two of three ranks with full buffers take the lost one's share: what they then hold is what would be theirs."""
    for seed in range(10):
        buffers = [grown(20, f"{seed} {rank}", count=80) for rank in range(3)]
        lost = buffers[2].state()
        for rank, buffer in enumerate(buffers[:2]):
            own = buffer.state()
            share = lost.take(np.arange(len(lost))[rank::2])
            expected = np.sort(np.concatenate([own.key, share.key]))[:20]
            assert len(buffer) == 20
            buffer.absorb(share)
            assert sorted(buffer.state().key.tolist()) == expected.tolist()
            assert buffer.state().bound <= min(own.bound, lost.bound)
        fresh = RehearsalBuffer(40 * BYTES)
        assert fresh.absorb(lost) == 20
        assert fresh.state().bound == lost.bound


def test_a_scan_that_is_taken_out_leaves_what_would_be_there_without_it():
    for seed in range(5):
        both = RehearsalBuffer(200 * BYTES)
        offer(both, str(seed), "a", np.arange(100))
        offer(both, str(seed), "b", np.arange(100, 180))
        left = without(both.state(), {stratum_of(str(seed), "a")})
        alone = RehearsalBuffer(200 * BYTES)
        offer(alone, str(seed), "b", np.arange(100, 180))
        assert content(left)[0] == content(alone.state())[0]
        assert [name.scan for name in left.scans.values()] == ["b"]
        again = BufferState.of(Packed.from_bytes(left.packed().to_bytes()))
        assert content(again) == content(left)


def test_what_cannot_be_united_is_refused_with_its_reason():
    fading = grown(10, "x", policy="replacement").state()
    good = grown(10, "y").state()
    for states, policy in (([fading, good], "reservoir"), ([good], "replacement")):
        with pytest.raises(ValueError, match="fades with its age"):
            merge(states, policy)
    nameless = RehearsalBuffer(10 * BYTES)
    nameless.insert({"id": torch.arange(5)}, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="without an identity"):
        merge([nameless.state(), good], "reservoir")
    with pytest.raises(ValueError, match="give all of them one, or none"):
        nameless.insert({"id": torch.arange(5)}, torch.zeros(5).long(), torch.arange(5))
    other = RehearsalBuffer(10 * 100)
    other.insert({"id": torch.zeros(3)}, torch.zeros(3).long(), torch.arange(3))
    with pytest.raises(ValueError, match="different fields"):
        merge([other.state(), good], "reservoir")


def test_keys_are_uniform_and_identities_differ():
    keys = keys_of(np.arange(100_000))
    assert len(np.unique(keys)) == len(keys)
    assert improbable(np.bincount(keys >> 57, minlength=64), len(keys) / 64) > 1e-3
    every = np.concatenate([identities(r, s, np.arange(50)) for r, s in (("a", "bc"), ("ab", "c"), ("a", "b"))])
    assert len(np.unique(every)) == 150
    assert stratum_of("a", "bc") != stratum_of("ab", "c") >= 0
