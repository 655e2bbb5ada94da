"""Actors on the workers of a cluster: placing them, calling them, and noticing that they are lost."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from distributed import Client, Status, Worker, get_worker
from distributed.protocol import pickle
from distributed.utils import sync

from steering.campaign import GroupChanged
from steering.clusters.roles import workers_now
from steering.learning import GroupLost
from steering.runner.source_events import TakenOver

LOOK_S = 0.25
"""Between two looks whether the workers of those who are asked are still there."""
_NOTICED_S = 5.0
"""How long the scheduler may take to notice that a worker is gone."""

_PATIENCE_S = 2.0
"""Between two looks of a task whether the worker of the actor that it asks is still there."""
_CLOSE_S = 5.0
"""How long an actor may take to close."""
_FREED_S = 2.0
"""How long ranks may take to hear that another is lost."""
_UNPUBLISH_S = 30.0
"""How long a scheduler may take to forget a name."""
_FORGOTTEN_S = 1.0
"""Between two looks whether somebody holds an actor."""
_PLACING_S = 0.05
"""Between two looks whether it is known to its worker: it may be held for a short time only."""
_PLACED_S = 60.0
"""Within so long an actor that was made is known to its worker, or never."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class LostForGood(RuntimeError):
    """Actors are lost, and nothing can take their place: the run cannot go on."""


class CallsFailed(Exception):
    """Of calls that were made together, at least one has raised; the others may still go on."""

    def __init__(self, calls: Sequence[asyncio.Future]) -> None:
        super().__init__("a call failed")
        self._calls = calls

    @property
    def first(self) -> BaseException | None:
        """The error of a call that is over; others may still go on."""
        over = (one for one in self._calls if one.done() and not one.cancelled())
        return next((error for one in over if (error := one.exception()) is not None), None)

    async def cause(self) -> BaseException:
        """The error to tell of, once all calls are over. What ranks say of one another (GroupLost) is a consequence."""
        await asyncio.wait(self._calls)
        errors = [error for one in self._calls if (error := one.exception()) is not None]
        return next((error for error in errors if not isinstance(error, GroupLost)), errors[0])


@dataclass(frozen=True, eq=False)
class ActorHandle:
    """An actor and where it is. It lives as long as the handle is held."""

    actor: Any
    future: Any
    address: str
    """Of its worker."""

    def lost(self, addresses: Iterable[str]) -> bool:
        """Whether it is gone, of these workers that are there. Where another worker was started at the same address,
        the future tells."""
        return self.address not in addresses or self.future.status not in ("pending", "finished")


async def place(client: Client, thing: Any, *, worker: str) -> ActorHandle:
    """Make `thing` an actor on a worker. What it weighs goes there directly, past the scheduler.

    Raises OSError where the worker is lost meanwhile: what is asked of one that dies before the actor is there is never
    answered.
    """
    [there] = await client.scatter([thing], workers=[worker], hash=False, direct=True)
    options = {"actor": True, "workers": [worker], "pure": False, "allow_other_workers": False}
    future = client.submit(_own, there, _process(), **options)
    return ActorHandle(await while_there(client, worker, future), future, worker)


async def release(client: Client, handle: ActorHandle, method: str, *arguments: Any) -> bool:
    """Call an actor's last method and let its worker forget it, whoever still holds a handle. Never raises: what is
    gone already needs no closing. False, and nothing is forgotten, where the actor is another runner's by now."""
    try:
        await asyncio.wait_for(call(handle.actor, method, *arguments), _CLOSE_S)
    except TakenOver:
        return False
    except Exception as error:
        logger.info("an actor at %s did not close: %s", handle.address, error)
    try:
        await asyncio.wait_for(client.cancel([handle.future], force=True), _CLOSE_S)
    except Exception as error:
        logger.info("an actor at %s was not released: %s", handle.address, error)
    return True


async def unpublish(client: Client, name: str) -> None:
    """Have the scheduler forget a name. A scheduler was seen never to answer: after half a minute the rest goes on."""
    try:
        await asyncio.wait_for(client.unpublish_dataset(name), _UNPUBLISH_S)
    except TimeoutError:
        logger.warning("the scheduler did not forget %s within %.0f s", name, _UNPUBLISH_S)


async def while_there(client: Client, worker: str, answer: Awaitable[T]) -> T:
    """An answer from a worker. Raises OSError where it is lost before it has answered."""
    job = asyncio.ensure_future(answer)
    try:
        while not job.done():
            await asyncio.wait({job}, timeout=LOOK_S)
            if not job.done() and worker not in await workers_now(client):
                raise OSError(f"found the worker at {worker} gone, expected its answer")
        return job.result()
    finally:
        job.cancel()


async def while_all_there(client: Client, handles: Sequence[ActorHandle], answers: Awaitable[T]) -> T:
    """What these actors answer together. Raises OSError where one is lost before all have answered."""
    job = asyncio.ensure_future(answers)
    job.add_done_callback(retrieved)
    try:
        while not job.done():
            await asyncio.wait({job}, timeout=LOOK_S)
            if not job.done() and await gone(client, handles):
                raise OSError("found a rank lost while its answer was waited for, expected that of all")
        return job.result()
    finally:
        job.cancel()


class Reached:
    """An actor as a task on a worker asks it: where the actor or its worker is gone, the answer is an OSError.

    Dask's own answer may never come there, also where nobody holds the actor any more because its runner was lost: and
    with it waits the task, and all that wait for the worker of the task.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Callable[..., _Answer]:
        if method.startswith("_"):
            raise AttributeError(method)
        ask = getattr(self._actor, method)
        return lambda *arguments, **named: _Answer(ask(*arguments, **named), self._actor._address, self._actor.key)


@dataclass(frozen=True)
class _Answer:
    future: Any
    address: str
    key: str
    """Of the actor, by which the scheduler knows it."""

    def result(self) -> Any:
        """Wait for the answer. Raises what the actor raised."""
        while True:
            try:
                return self.future.result(timeout=_PATIENCE_S)
            except TimeoutError:
                if self.future.done():
                    raise  # the actor's own
                if not self._there():
                    raise OSError(f"found an actor at {self.address} gone, expected its answer") from None

    def _there(self) -> bool:
        """Whether the actor is there, or nobody knows. By the worker's own line to the scheduler: a client that a task
        makes may read more than the greeting that it expects, where the machine is busy, and never answer."""
        worker = get_worker()

        async def asked() -> bool:
            holders = await worker.scheduler.who_has(keys=[self.key])
            known = await worker.scheduler.identity(n_workers=-1)
            return self.address in known["workers"] and bool(holders.get(self.key))

        try:
            return bool(sync(worker.loop, asked, callback_timeout=_PATIENCE_S))
        except TimeoutError:
            return True


async def call(actor: Any, method: str, *arguments: Any, **named: Any) -> Any:
    """The answer of an actor. Where its worker is known to be gone, already the name of the method raises: here that
    is an answer like any other. Raises OSError where the call is cancelled, and not by who waits for it: Dask does so
    with what waits for a connection to a worker that is lost."""
    try:
        return await getattr(actor, method)(*arguments, **named)
    except asyncio.CancelledError:
        waiting = asyncio.current_task()
        if waiting is None or waiting.cancelling():
            raise
        raise OSError(f"found the call of {method} cancelled, expected its answer: its worker may be lost") from None


async def every(calls: Iterable[Awaitable[T]]) -> list[T]:
    """All answers, in the order of the calls. Raises CallsFailed as soon as one of them has raised."""
    jobs = [asyncio.ensure_future(one) for one in calls]
    for job in jobs:
        job.add_done_callback(retrieved)
    if jobs:
        await asyncio.wait(jobs, return_when=asyncio.FIRST_EXCEPTION)
    if not all(job.done() and job.exception() is None for job in jobs):
        raise CallsFailed(jobs)
    return [job.result() for job in jobs]


async def set_free(ranks: Iterable[Any]) -> None:
    """Have these ranks wait no more for a lost one, whose end of the connections may still be open."""
    calls = [asyncio.ensure_future(call(rank, "abandon")) for rank in ranks]
    for one in calls:
        one.add_done_callback(retrieved)
    await asyncio.wait(calls, timeout=_FREED_S)


async def gone(client: Client, handles: Iterable[ActorHandle]) -> list[ActorHandle]:
    """Those of the actors whose workers are gone now."""
    workers = await workers_now(client)
    return [handle for handle in handles if handle.lost(workers)]


async def losses(client: Client, handles: Sequence[ActorHandle]) -> list[ActorHandle]:
    """Those of the actors that are lost, all of them: waits until a first loss is noticed, some seconds at most, and
    then until each of the others has given a sign of life since: the workers of a node are lost one by one, and of two
    that freeze together one is noticed first."""
    loop = asyncio.get_running_loop()
    found: list[ActorHandle] = []
    until, noticed = loop.time() + _NOTICED_S, 0.0
    while loop.time() < until and len(found) < len(handles):
        workers = await workers_now(client)
        now = [handle for handle in handles if handle.lost(workers)]
        seen = {handle: workers[handle.address]["last_seen"] for handle in handles if handle not in now}
        if len(now) > len(found):
            found, until = now, loop.time() + _NOTICED_S
            # By the scheduler's own clock.
            noticed = max((worker["last_seen"] for worker in workers.values()), default=0.0)
        elif found and all(when > noticed for when in seen.values()):
            break
        await asyncio.sleep(0.1)
    return found


async def answered(verb: Callable[[], Awaitable[T | GroupChanged]]) -> T:
    """The ranks' answer; the verb is repeated for as long as the group changes meanwhile."""
    while isinstance(answer := await verb(), GroupChanged):
        pass
    return answer


def retrieved(job: asyncio.Future) -> None:
    """Retrieve the exception of a call that nobody waits for any more, so that asyncio does not log it."""
    if not job.cancelled():
        job.exception()


def _own(thing: Any, sender: tuple[str, int]) -> Any:
    """What was sent, as the worker's own. Within one process Dask hands over the very object, which its sender goes on
    using, and may send elsewhere while the actor changes it."""
    own = pickle.loads(pickle.dumps(thing)) if sender == _process() else thing
    if hasattr(own, "forgotten"):
        worker = get_worker()
        worker.loop.add_callback(_tell_when_forgotten, worker, own)
    return own


async def _tell_when_forgotten(worker: Worker, actor: Any) -> None:
    """Tell an actor once nobody holds it any more: calls that a lost runner has left open would keep it for ever, with
    all its memory."""
    known, until = False, time.monotonic() + _PLACED_S
    while worker.status != Status.closed and (known or time.monotonic() < until):
        there = any(one is actor for one in worker.state.actors.values())
        if known and not there:
            await actor.forgotten()
            return
        known = known or there
        await asyncio.sleep(_FORGOTTEN_S if known else _PLACING_S)


def _process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()
