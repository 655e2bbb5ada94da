"""A rank of NCCL that dies or freezes: the others live, learn of it in bounded time, form anew and train on."""

import os
import queue
import signal
import threading
import time

import numpy as np
import pytest
import torch

from steering.learning import Loop, MeetingPoint, Place, TrainerSettings
from steering.learning.group import GroupLost, abandon, leave
from steering.learning.strategies import STRATEGIES
from tests.gpu.test_gpu import as_hosts, pytestmark  # noqa: F401 - needs a GPU too
from tests.ranks import processes
from tests.test_strategies import classification, give

RANKS, STEPS, DEADLINE = 3, 5, 60.0


def trains_on(rank, where, device, how, lost, answers):
    """Train; the last rank then kills or freezes itself amid a step, and the others go on without it."""
    as_hosts(rank)
    objective, network, samples = classification()
    settings = TrainerSettings(batch=3, candidates=2, representatives=4, buffer_bytes=2**14, device=device)
    loop = Loop(network, STRATEGIES["er"](objective), settings, rank=rank, local_rank=0)

    def join(ranks, generation):
        place = Place(rank=rank, ranks=ranks, where=where, deadline=DEADLINE)
        loop.connect(place.join(generation, device=loop.device))
        loop.prepare({key: value[0] for key, value in samples(1).items()})

    def load(n, out):
        if rank == RANKS - 1 and loop.steps == STEPS:
            lost.set()
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        give(samples(n, RANKS * loop.steps + rank), out)

    join(RANKS, 0)
    if how == "frozen" and rank < RANKS - 1:
        threading.Thread(target=give_up, args=(lost,), daemon=True).start()
    begun = time.monotonic()
    with pytest.raises(GroupLost):
        loop.run(1000, load)
    noticed, finite = time.monotonic() - begun, all(bool(p.isfinite().all()) for p in network.parameters())
    loop.disconnect()
    leave()
    stood_at = loop.steps
    join(RANKS - 1, 1)
    loop.run(STEPS, load)
    weights = torch.cat([p.detach().flatten() for p in network.parameters()]).cpu().numpy()
    loop.disconnect()
    leave()
    answers.put((rank, {"noticed": noticed, "finite": finite, "steps": (stood_at, loop.steps), "weights": weights}))


def give_up(lost):
    """What the driver has a rank do when it has heard nothing of another for some seconds."""
    lost.wait()
    time.sleep(2.0)
    abandon()


def survivors(device, how):
    """What each of those that were left says, once the last rank is lost."""
    point, lost, answers, found = MeetingPoint(), processes().Event(), processes().Queue(), {}
    started = [
        processes().Process(target=trains_on, args=(rank, point.rendezvous, device, how, lost, answers))
        for rank in range(RANKS)
    ]
    for process in started:
        process.start()
    try:
        until = time.monotonic() + 2 * DEADLINE
        while len(found) < RANKS - 1:
            assert time.monotonic() < until, f"found word of ranks {sorted(found)} only"
            try:
                rank, said = answers.get(timeout=0.2)
            except queue.Empty:
                assert all(each.exitcode in (None, 0) for each in started[:-1]), [each.exitcode for each in started]
            else:
                found[rank] = said
        return [found[rank] for rank in range(RANKS - 1)]
    finally:
        for process in started:
            process.kill()
            process.join()


def holds(device, how):
    one, two = survivors(device, how)
    for said in (one, two):
        assert said["finite"]
        assert said["noticed"] < DEADLINE
        assert said["steps"][1] == said["steps"][0] + STEPS
        assert np.isfinite(said["weights"]).all()
    assert one["steps"] == two["steps"]
    np.testing.assert_array_equal(one["weights"], two["weights"])


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_the_others_live_and_train_on(how):
    holds("cuda", how)
