"""Real training ranks in processes of their own, for the tests: started together, each runs the same function."""

import contextlib
import queue

import torch.multiprocessing as mp

from steering.clusters.local import PRELOAD
from steering.learning import MeetingPoint, Rendezvous


def processes():
    """Makes processes that do not import torch anew: they are forked from the server that clusters use as well."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def on_ranks(count, work, *arguments):
    """Run work(rank, ranks, rendezvous, *arguments) in `count` processes; what each returned, by rank."""
    point = MeetingPoint()
    answers = processes().Queue()
    started = mp.start_processes(
        _one, (count, point.rendezvous, work, arguments, answers), nprocs=count, join=False, start_method="forkserver"
    )
    found = {}
    while len(found) < count:
        with contextlib.suppress(queue.Empty):
            found |= dict([answers.get(timeout=0.2)])
        started.join(timeout=0)  # raises what a process died of
    while not started.join():
        pass
    return [found[rank] for rank in range(count)]


@contextlib.contextmanager
def killed_at_the_end(work, *arguments):
    """A process that runs work(begun, *arguments): it is there from begun.set() on, and killed outright at the end."""
    begun = processes().Event()
    process = processes().Process(target=work, args=(begun, *arguments))
    process.start()
    try:
        while not begun.wait(0.1):
            assert process.is_alive(), f"it ended before it had begun: exit {process.exitcode}"
        yield
        assert process.is_alive()
    finally:
        process.kill()
        process.join()


def _one(rank: int, ranks: int, where: Rendezvous, work, arguments, answers):
    answers.put((rank, work(rank, ranks, where, *arguments)))
