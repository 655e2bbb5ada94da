"""A cluster that somebody else started: found by its address or its scheduler file, checked for the roles."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed import Client

from steering.clusters.memory import give_memory_back, keep_memory
from steering.clusters.roles import missing, refusal, workers_of


@contextmanager
def existing(where: str, *, ranks: int = 2, timeout: float = 10.0) -> Iterator[Client]:
    """Attach to a running cluster; it goes on running when the block is left.

    where: the scheduler's address ("tcp://host:8786") or the path of its scheduler file. ranks: trainer ranks that
    must be there. timeout: seconds to wait for the scheduler and for its workers.
    Raises OSError where there is no scheduler, RuntimeError where workers lack the roles.
    """
    if ranks < 1:
        raise ValueError(f"found ranks={ranks}, expected 1 or more")
    with _connect(where, timeout) as client:
        _refuse_missing_roles(client, ranks, timeout)
        keep_memory(client)
        yield client
        give_memory_back(client)


def _connect(where: str, timeout: float) -> Client:
    is_address = re.fullmatch(r"(\w+://.+|[^/]+:\d+)", where) is not None
    if not is_address and not Path(where).is_file():
        raise FileNotFoundError(
            f"found no scheduler file {where}, expected one or an address such as tcp://host:8786: "
            f"start a scheduler with `dask scheduler --scheduler-file {where}`"
        )
    try:
        return Client(where, timeout=timeout) if is_address else Client(scheduler_file=where, timeout=timeout)
    except (OSError, ValueError) as error:
        raise OSError(
            f"found no scheduler that answers at {where} within {timeout:g} s ({error}), expected one: "
            "start it with `dask scheduler`, or check the address"
        ) from error


def _refuse_missing_roles(client: Client, ranks: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while lacks := missing(workers_of(client), ranks=ranks):
        if time.monotonic() >= deadline:
            raise RuntimeError(refusal(len(workers_of(client)), client.scheduler.address, lacks))
        time.sleep(min(0.1, timeout))
