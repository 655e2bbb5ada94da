"""The watch over the workers that a run depends on: one that is there and silent is treated as lost.

Every Dask worker tells the scheduler twice a second that it lives (less often on clusters of ten workers or more, see
`Silence.limit`). That needs its event loop, and so the interpreter lock: a process that is stopped, cut off, or whose
code holds the lock falls silent, while training, compiling and reading do not disturb it. Silence is measured against
the newest sign of life of any worker, by one clock: where the scheduler or the whole machine stalls, nobody is silent.

A silent worker is taken off the cluster and its process is killed by its nanny. So there is one kind of loss: what
waits for a lost process is freed by its sockets, which the system closes, and one that would go on later does no harm,
for it does not go on. Where no nanny can be reached, the worker is off the cluster all the same: nobody asks it or
hears it, and it closes itself as soon as it reaches the scheduler again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from distributed import Client
from distributed.scheduler import heartbeat_interval

from steering.clusters.roles import Workers, workers_now
from steering.learning.group import OutOfMemory
from steering.runner.actors import ActorHandle

FROZEN_S = 3.0
"""Within so many seconds a frozen worker is noticed, see Experiment.frozen_s."""
LOOK_S = 0.25
"""Between two looks at the cluster."""
_KILL_S = 1.0
"""How long a nanny may take to kill a worker before that is taken off the cluster regardless."""

logger = logging.getLogger(__name__)


class Silence:
    """Tells who is silent, look by look. Pure."""

    def __init__(self, frozen_s: float = FROZEN_S) -> None:
        """frozen_s: within so many seconds a worker that falls silent is named."""
        self.frozen_s = frozen_s
        self._suspected: dict[str, float] = {}
        """When those that were silent at the last look were seen last."""

    def limit(self, workers: int) -> float:
        """Seconds of silence that are too many: two looks and one interval less than the stated time, and never fewer
        than four intervals, which are 0.5 s on clusters of up to ten workers, 1 s below fifty, 2 s below 200."""
        interval = heartbeat_interval(workers)
        return max(self.frozen_s - interval - 2 * LOOK_S, 4 * interval)

    def judge(self, workers: Workers, watched: Iterable[str]) -> list[str]:
        """Addresses of the watched workers that are silent now and were silent at the look before, without a sign of
        life in between."""
        newest = max((worker["last_seen"] for worker in workers.values()), default=0.0)
        limit = self.limit(len(workers))
        now = {
            address: workers[address]["last_seen"]
            for address in watched
            if address in workers and newest - workers[address]["last_seen"] > limit
        }
        found = [address for address, seen in now.items() if self._suspected.get(address) == seen]
        self._suspected = now
        return found


class OneWorker:
    """One worker, watched by whoever looks at the cluster anyhow, as often as that is."""

    def __init__(self, address: str, frozen_s: float) -> None:
        self.address = address
        self._silence = Silence(frozen_s)
        self._looked = 0.0

    def silent(self, workers: Workers) -> bool:
        """Whether it is there and silent, as `Silence` judges; of more looks in a row than the judgement is made for
        only some count."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return False
        self._looked = now
        return bool(self._silence.judge(workers, [self.address]))


class Watch:
    """Looks at the cluster four times a second, takes silent workers off it, and tells others what it sees.

    Whoever starts something that may hold the interpreter lock for long (imports, CUDA, a first compilation) announces
    it by not having the worker watched yet.
    """

    def __init__(
        self,
        client: Client,
        frozen_s: float,
        *,
        watched: Callable[[], Iterable[str]],
        seen: Callable[[Workers, list[str]], None],
    ) -> None:
        """watched: addresses of those that must not be silent, asked at each look. seen: called at each look with the
        workers that are there and not silent, and the addresses of those that were silent now."""
        self._client = client
        self._silence = Silence(frozen_s)
        self._watched = watched
        self._seen = seen

    async def keep(self) -> None:
        """Watch for ever."""
        while True:
            workers = dict(await workers_now(self._client))
            silent = self._silence.judge(workers, set(self._watched()))
            for address in silent:
                logger.warning("the worker %s at %s is silent: treated as lost", workers.pop(address)["name"], address)
            await asyncio.gather(*(fence(self._client, address) for address in silent))
            self._seen(workers, silent)
            await asyncio.sleep(LOOK_S)


async def fence(client: Client, address: str) -> None:
    """Take a worker off the cluster and have its nanny kill its process. Never raises: what is gone needs no fence."""
    killing = asyncio.ensure_future(client.run(_kill, workers=[address], nanny=True, on_error="return"))
    await asyncio.wait({killing}, timeout=_KILL_S)
    killing.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        logger.info("its nanny answered: %s", await killing)
    with contextlib.suppress(Exception):
        await client.scheduler.unregister(address=address, stimulus_id="steering-watch", close=False)


async def given_up(client: Client, members: Sequence[ActorHandle], error: BaseException) -> list[ActorHandle]:
    """The rank among these that an error says to be out of memory, once it is off the cluster; empty for other errors,
    and where nobody else would be left. Its process is ended like any lost one's: only so is its memory free again."""
    if not isinstance(error, OutOfMemory) or not error.rank < len(members) > 1:
        return []
    logger.warning("%s: its worker is treated as lost", error)
    await fence(client, members[error.rank].address)
    return [members[error.rank]]


def fence_now(client: Client, address: str) -> None:
    """The same for a client that blocks."""
    client.sync(fence, client, address)


async def _kill(dask_worker: Any) -> None:
    """Runs in the nanny, whose process is the worker's: killed, not asked to end, for one that is stopped hears
    nothing. The nanny then starts another."""
    await dask_worker.process.process.kill()
