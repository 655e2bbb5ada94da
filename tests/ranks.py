"""Real training ranks in processes of their own, for the tests: started together, each runs the same function."""

import torch.multiprocessing as mp

from steering.learning import MeetingPoint, Rendezvous


def on_ranks(count, work, *arguments):
    """Run work(rank, ranks, rendezvous, *arguments) in `count` spawned processes; what each returned, by rank."""
    point = MeetingPoint()
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    started = mp.start_processes(
        _one, (count, point.rendezvous, work, arguments, answers), nprocs=count, join=False, start_method="spawn"
    )
    found = dict(answers.get() for _ in range(count) if started is not None)
    while not started.join():
        pass
    return [found[rank] for rank in range(count)]


def _one(rank: int, ranks: int, where: Rendezvous, work, arguments, answers):
    answers.put((rank, work(rank, ranks, where, *arguments)))
