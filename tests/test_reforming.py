"""Laws of a group of ranks that forms anew, between real processes."""

import asyncio
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from steering.learning import NoSamples, Place, identities
from steering.learning.buffer import BOOKKEEPING, RehearsalBuffer
from steering.learning.group import abandon, is_of_group, leave
from steering.learning.identity import keys_of
from steering.learning.loop import most_advanced
from steering.learning.redistribution import missing, not_to_offer
from steering.learning.samples import owner_of
from steering.learning.strategies import DERpp
from steering.records import ModelVersion
from tests.ranks import on_ranks
from tests.test_buffer import improbable
from tests.test_learning import labels, rank_of


def receive(me, found, rank, ranks, generation=0):
    asyncio.run(me.receive(found.share(rank, ranks, generation)))


def state(me):
    """What must be alike on all ranks, and what each holds."""
    scan = me.samples.scans["a"]
    return {
        "digest": asyncio.run(me.digest()),
        "served": torch.cat([p.flatten() for p in me.served.parameters()]).sum().item(),
        "probe": me.network.optics.probe.sum().item(),
        "train": sorted(scan.train),
        "given": sorted(scan.residual),
        "held_out": sorted(scan.held_out),
        "stored": me.buffer.state().key.tolist(),
    }


class Faulty(DERpp):
    """DER++ whose objective fails as user code does, once `at` is set and reached."""

    at = None

    def loss(self, network, minibatch):
        if self.at == 0:
            raise RuntimeError("the user's own error")
        self.at = None if self.at is None else self.at - 1
        return super().loss(network, minibatch)


def lose_and_join(rank, ranks, where, folder):
    """Four members: three train, the first leaves amid a round by an error of its own, then the fourth joins fresh."""
    me = rank_of(Faulty, deadline=60.0)
    found = []
    if rank < 3:
        me.join(where, rank=rank, ranks=3)
        receive(me, labels(n=40), rank, 3)
        me.fit("a", 5)
        if rank == 0:
            me.publish(folder, ModelVersion(number=1, network="ProbeFirst", hyperparameters=me.network.hyperparameters))
        me.strategy.at = 3 if rank == 0 else None
        begun = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            me.fit("a", 20)
        found.append((type(caught.value).__name__, str(caught.value), time.monotonic() - begun))
        found.append([entry.name for entry in caught.traceback])
    if rank == 0:
        return found
    # Ranks 1 and 2 go on as 0 and 1; the fresh one comes as the lowest, and must not be the source.
    number = {1: 1, 2: 2, 3: 0}[rank]
    me.join(where, rank=number, ranks=3, generation=1)
    me.serve(folder, 1)
    found.append(state(me))
    me.samples.end("b")  # ranks without a frame of a scan do not train on it, any of them
    with pytest.raises(NoSamples, match="on rank 0, 1, 2"):
        me.fit("b", 10)
    receive(me, labels(n=40), number, 3, 1)
    report = me.fit("a", 10)
    found.append((state(me), report.steps, report.error))
    me.go_back(folder, 1)
    me.go_back(folder, 1)
    me.fit("a", 2)
    found.append(state(me))
    me.close()
    return found


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    return on_ranks(4, lose_and_join, tmp_path_factory.mktemp("models"))


@pytest.mark.slow
def test_an_error_of_user_code_keeps_type_and_traceback_and_its_peers_lose_the_group_at_once(members):
    kind, text, _ = members[0][0]
    assert (kind, text) == ("RuntimeError", "the user's own error")
    assert members[0][1][-1] == "loss"
    for name, text, seconds in (members[1][0], members[2][0]):
        assert name == "GroupLost"
        assert "at step 8" in text
        assert seconds < 50  # not the deadline of 60


@pytest.mark.slow
def test_ranks_that_were_kept_and_joined_are_alike_after_joining_and_after_more_steps(members):
    for moment in (-3, -1):
        first, *others = [member[moment] for member in members[1:]]
        for other in others:
            assert all(other[name] == first[name] for name in ("digest", "served", "probe"))
    trained = [member[-2] for member in members[1:]]
    assert len({one[0]["digest"] for one in trained}) == 1
    assert [one[1] for one in trained] == [18] * 3
    assert trained[2][2] is not None  # the fresh one is rank 0 now, and judges


@pytest.mark.slow
def test_samples_belong_to_the_ranks_that_their_frames_name_and_all_keep_what_is_held_out(members):
    whole = labels(n=40)
    held_out = whole.frame_id[whole.held_out].tolist()
    to_train_on = whole.frame_id[~whole.held_out]
    before, after = owner_of(to_train_on, 3), owner_of(to_train_on, 3, 1)
    for number, member in {1: members[1], 2: members[2], 0: members[3]}.items():
        kept = member[-3]
        assert kept["held_out"] == held_out
        assert kept["train"] == kept["given"] == to_train_on[(before != 0) & (after == number)].tolist()


@pytest.mark.slow
def test_a_sample_is_stored_once_however_often_ranks_come_and_go(members):
    """The frames that another rank trains on now stay in the buffer where they are; those of a lost rank are new."""
    whole = labels(n=40)
    every = set(keys_of(identities("", "a", whole.frame_id[~whole.held_out])).tolist())
    for moment in (-3, -2, -1):
        found = [member[moment][0] if moment == -2 else member[moment] for member in members[1:]]
        stored = [key for one in found for key in one["stored"]]
        assert len(set(stored)) == len(stored)
        assert set(stored) <= every
    assert len(stored) > 25


def test_a_new_rank_stores_of_what_was_measured_before_no_more_than_others():
    """Two ranks keep 12 of 60 frames each; a third comes, and all go on with the same frames, dealt anew."""
    counts = np.zeros(120)
    for seed in range(150):
        keys = keys_of(identities(str(seed), "a", np.arange(120)))
        buffers = [RehearsalBuffer(12 * (16 + BOOKKEEPING), seed=rank) for rank in range(3)]

        def offer(rank, frames, run=str(seed), buffers=buffers):
            own = torch.from_numpy(identities(run, "a", frames))
            buffers[rank].insert({"id": torch.from_numpy(frames)}, torch.zeros(len(frames), dtype=torch.int64), own)

        for rank in range(2):
            offer(rank, np.flatnonzero(owner_of(np.arange(120), 2) == rank))
        states = [buffer.state() for buffer in buffers]
        strata = [state.strata[state.strata[:, 1] > 0] for state in states]
        for rank in range(3):
            mine = np.flatnonzero(owner_of(np.arange(120), 3, 1) == rank)
            left_out = not_to_offer(rank, [state.key for state in states], strata, {0: keys[mine]})
            offer(rank, mine[~np.isin(keys[mine], left_out)])
        stored = np.concatenate([b.state().read("id", np.arange(len(b))).numpy() for b in buffers]).astype(int)
        assert len(np.unique(stored)) == len(stored)
        counts[stored] += 1
    assert improbable(counts, counts.mean()) > 1e-3
    new = owner_of(np.arange(120), 3, 1) == 2
    assert counts[new].mean() == pytest.approx(counts[~new].mean(), rel=0.1)


def test_labels_that_were_shared_out_before_the_group_changed_are_left_out():
    me = rank_of(DERpp)
    me.prepare(0)
    me.generation = 2
    found = labels(n=40)
    assert asyncio.run(me.receive(found.share(0, 3, 1))) == 0
    share = found.share(0, 3, 2)
    assert asyncio.run(me.receive(share)) == (~share.held_out).sum() > 5


def wait_for_one_that_never_comes(rank, ranks, where):
    """The second of two ranks does not enter a collective; how long the first waits once it abandons the group."""
    Place(rank=rank, ranks=ranks, where=where, deadline=60.0).join(device="cpu")
    found = None
    if rank == 0:
        threading.Timer(0.5, abandon).start()
        begun = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            dist.all_reduce(torch.zeros(3))
        assert is_of_group(caught.value)
        found = time.monotonic() - begun
    time.sleep(0.0 if rank == 0 else 3.0)
    leave()
    return found


@pytest.mark.slow
def test_a_rank_that_waits_for_a_lost_one_is_freed_before_the_deadline():
    waited, _ = on_ranks(2, wait_for_one_that_never_comes)
    assert waited < 30


def test_the_source_is_the_lowest_of_the_most_advanced_and_never_a_fresh_one_beside_others():
    assert most_advanced([(False, 0), (True, 0), (True, 0)]) == 1
    assert most_advanced([(True, 7), (True, 8), (True, 8)]) == 1
    assert most_advanced([(False, 9), (True, 2)]) == 1
    assert most_advanced([(False, 0), (False, 0)]) == 0


def test_a_held_out_frame_is_sent_once_to_each_rank_that_lacks_it():
    held = [{("a", 1), ("a", 2)}, {("a", 2), ("b", 3)}, set()]
    sent = [missing(held, rank) for rank in range(3)]
    everything = set().union(*held)
    for to in range(3):
        arrived = [frame for rank in range(3) for frame in sent[rank][to]]
        assert len(arrived) == len(set(arrived))
        assert set(arrived) == everything - held[to]
