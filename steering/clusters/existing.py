"""A cluster that somebody else started: found by its address or its scheduler file, checked for the roles."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from distributed import Client
from distributed.comm import connect
from distributed.security import Security

from steering.clusters.allocator import give_memory_back, keep_memory
from steering.clusters.credentials import lacks, security_in
from steering.clusters.logs import share_logs
from steering.clusters.roles import missing, refusal, workers_of


@contextmanager
def existing(
    where: str | Path,
    *,
    ranks: int = 2,
    timeout: float = 10.0,
    credentials: str | Path | None = None,
    insecure: bool = False,
) -> Iterator[Client]:
    """Attach to a running cluster; it goes on running when the block is left.

    where: the scheduler's address ("tls://host:8786") or the path of its scheduler file. ranks: trainer ranks that
    must be there. timeout: seconds to wait for the scheduler and for its workers. credentials: for tls://, a folder
    with ca.pem, cert.pem and key.pem; None: those of Dask's configuration. insecure: take tcp:// also beyond this
    machine, where whoever reaches the port can read everything and run code.
    Raises OSError where there is no scheduler, RuntimeError where workers lack the roles, PermissionError for tcp://
    beyond this machine.
    """
    if ranks < 1:
        raise ValueError(f"found ranks={ranks}, expected 1 or more")
    with _connect(str(where), timeout, credentials, insecure) as client:
        _refuse_missing_roles(client, ranks, timeout)
        keep_memory(client)
        share_logs(client)
        try:
            yield client
        finally:
            # The cluster has gone, or another client, that of a detached run say, has given it back already.
            with contextlib.suppress(OSError, RuntimeError, TimeoutError, ValueError):
                give_memory_back(client)


def _connect(where: str, timeout: float, credentials: str | Path | None, insecure: bool) -> Client:
    is_address = re.fullmatch(r"(\w+://.+|[^/]+:\d+)", where) is not None
    if not is_address and not Path(where).is_file():
        raise FileNotFoundError(
            f"found no scheduler file {where}, expected one or an address such as tcp://host:8786: "
            f"start a scheduler with `dask scheduler --scheduler-file {where}`"
        )
    address = where if is_address else _address_in(Path(where))
    if not insecure:
        refuse_open(address)
    security = Security() if credentials is None else security_in(Path(credentials))
    at = where if is_address else f"{where}, which names {address},"
    try:
        _reach(address, timeout, security)
        return Client(address, timeout=timeout, security=security)
    except (OSError, ValueError) as error:
        raise OSError(
            f"found no scheduler that answers at {at} within {timeout:g} s ({error or type(error).__name__}), expected "
            "one: start it with `dask scheduler`, or check the address, tls:// or tcp:// as the scheduler itself says, "
            "and for tls:// the credentials"
        ) from error


def _reach(address: str, timeout: float, security: Security) -> None:
    """Connect once, and let go. Raises OSError, ValueError.

    Dask closes a client that cannot connect after some errors only; one that it leaves open has the next client of
    this process wait for ever.
    """
    arguments = security.get_connection_args("client")
    if lacks(address, security):
        raise OSError("no credentials: say them by credentials=FOLDER, or in Dask's configuration")

    async def once() -> None:
        comm = await connect(address, timeout=timeout, **arguments)
        await comm.close()

    with ThreadPoolExecutor(1) as apart:  # a notebook's own thread has a loop that runs
        apart.submit(asyncio.run, once()).result()


def _address_in(file: Path) -> str:
    try:
        address = json.loads(file.read_text())["address"]
        if not isinstance(address, str) or not re.fullmatch(r"\w+://.+:\d+", address):
            raise ValueError(address)
        return address
    except PermissionError:
        raise PermissionError(
            f"{file}: found no permission to read it, expected that of the user who started the scheduler: ask for it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(
            f"{file}: found no address in it ({type(error).__name__}), expected the file of `dask scheduler "
            "--scheduler-file`: wait until that has written it"
        ) from error


def refuse_open(address: str) -> None:
    """Raise PermissionError for an address without TLS that others can reach."""
    scheme, _, rest = address.rpartition("://")
    if scheme not in ("", "tcp", "ws"):
        return
    host = urlsplit(f"//{rest}").hostname or ""
    try:
        numbers = {end[4][0] for end in socket.getaddrinfo(host, None)}
    except OSError:
        return  # nobody is there: connecting says so
    if not all(ipaddress.ip_address(str(number).split("%")[0]).is_loopback for number in numbers):
        raise PermissionError(
            f"found {address} without TLS beyond this machine, where whoever reaches it can read everything and run "
            "code, expected tls://: start scheduler and workers with --tls-ca-file, --tls-cert and --tls-key, or say "
            "insecure=True (--insecure) on a network where you trust everybody"
        )


def _refuse_missing_roles(client: Client, ranks: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while lacks := missing(workers_of(client), ranks=ranks):
        if time.monotonic() >= deadline:
            raise RuntimeError(refusal(len(workers_of(client)), client.scheduler.address, lacks))
        time.sleep(min(0.1, timeout))
