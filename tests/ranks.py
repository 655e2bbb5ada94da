"""Real training ranks in processes of their own, for the tests: started together, each runs the same function."""

import contextlib
import queue

import torch.multiprocessing as mp

from steering.learning import MeetingPoint, Rendezvous


def on_ranks(count, work, *arguments):
    """Run work(rank, ranks, rendezvous, *arguments) in `count` spawned processes; what each returned, by rank."""
    point = MeetingPoint()
    context = mp.get_context("spawn")
    answers = context.Queue()
    started = mp.start_processes(
        _one, (count, point.rendezvous, work, arguments, answers), nprocs=count, join=False, start_method="spawn"
    )
    found = {}
    while len(found) < count:
        with contextlib.suppress(queue.Empty):
            found |= dict([answers.get(timeout=0.2)])
        started.join(timeout=0)  # raises what a process died of
    while not started.join():
        pass
    return [found[rank] for rank in range(count)]


def _one(rank: int, ranks: int, where: Rendezvous, work, arguments, answers):
    answers.put((rank, work(rank, ranks, where, *arguments)))
