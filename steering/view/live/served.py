"""The page of a run, served by a thread of this process."""

from __future__ import annotations

import asyncio
import html
import socket
import threading
from collections.abc import Iterable
from pathlib import Path

from tornado.httpserver import HTTPServer

from steering.runner.attach import Attached, me
from steering.runner.folder import RunFolder
from steering.view.live.access import Access, Role, Visitor
from steering.view.live.reader import Reader
from steering.view.live.server import Site, listen, port_of

_HERE = ("127.0.0.1", "localhost", "[::1]")
_NOTEBOOKS = "http://localhost:* http://127.0.0.1:*"
"""Pages that may show this one in a frame, once it was asked for in a notebook."""
_START_S = 30.0
_HEIGHT = 900
"""Of the page in a notebook, pixels."""


class LivePage:
    """The live page of a run, on a port of its own, until it is closed; the run goes on.

    As the last line of a notebook's cell it shows the page there, with its controls; `address` opens it in a browser of
    this machine. Where no browser can reach this process, `steering.LivePanel` draws plain pictures.
    """

    def __init__(
        self,
        run: Attached | RunFolder | str | Path,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        hosts: Iterable[str] = (),
        insecure: bool = False,
    ) -> None:
        """run: what `start` or `attach` returned, or the folder of a run, also of one that has ended. address: of the
        interface to serve it on. port: 0 for any that is free. hosts: HOST:PORT of other names by which browsers reach
        it. insecure: as for `attach`. Raises OSError where the port is taken.
        """
        folder = run.folder if isinstance(run, Attached) else run if isinstance(run, RunFolder) else RunFolder(run)
        self._access, self._reader = Access(), Reader(folder, insecure=insecure)
        self._site = Site(reader=lambda: self._reader, access=self._access)
        self._failure: OSError | None = None
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, args=(address, port), name="page server", daemon=True)
        self._thread.start()
        if not self._ready.wait(_START_S) or self._failure is not None:
            raise self._failure or TimeoutError(f"found no page server after {_START_S:.0f} s, expected one")
        self.hosts = [*hosts, *(f"{name}:{self.port}" for name in _names(address))]
        """HOST:PORT under which the page is served."""
        self._site.hosts.update(self.hosts)
        self._reader.start()

    def invite(self, name: str = "", role: Role = "operator") -> str:
        """An address by which somebody may command the run, or with the role "reader" only look at it.

        name: of whoever it is for, as the run's log will have it with each command; this user where that is empty.
        """
        token = self._access.invite(Visitor(name=name or me(), role=role))
        return f"http://{self.hosts[0]}/?token={token}"

    @property
    def address(self) -> str:
        """An address for this user, who may command the run."""
        return self.invite()

    def close(self) -> None:
        """Serve it no longer."""
        if not self._loop.is_closed():
            self._reader.close()  # first: what it sends goes through the loop
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=_START_S)

    def __enter__(self) -> LivePage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repr_html_(self) -> str:
        """The page in a frame, by the name that the notebook itself was reached by: cookies go to no other."""
        self._site.frames = _NOTEBOOKS
        # Jupyter is at localhost unless it is told otherwise, and not every front end runs the script below.
        address = html.escape(self.invite().replace("//127.0.0.1:", "//localhost:"), quote=True)
        return (
            f'<a href="{address}" target="_blank" rel="noopener">The live page in a tab of its own</a>'
            f'<iframe src="{address}" title="Live page of the run" '
            f'style="width: 100%; height: {_HEIGHT}px; border: 1px solid #8888; border-radius: 6px" '
            'onload="if (!this.dataset.named) { this.dataset.named = 1; const at = new URL(this.src); '
            "if (['localhost', '127.0.0.1'].includes(location.hostname) &amp;&amp; at.hostname !== location.hostname) "
            '{ at.hostname = location.hostname; this.src = at; } }"></iframe>'
        )

    def _serve(self, address: str, port: int) -> None:
        asyncio.set_event_loop(self._loop)
        server = None
        try:
            server = self._loop.run_until_complete(self._listen(address, port))
            self.port = port_of(server)
        except OSError as error:
            self._failure = error
        self._ready.set()
        try:
            if server is not None:
                self._loop.run_forever()
                server.stop()
                self._loop.run_until_complete(server.close_all_connections())
        finally:
            self._loop.close()

    async def _listen(self, address: str, port: int) -> HTTPServer:
        return listen(self._site, address, port)


def _names(address: str) -> list[str]:
    if address in ("127.0.0.1", "localhost", "::1"):
        return list(_HERE)
    if address in ("0.0.0.0", "::", ""):  # noqa: S104
        return [socket.getfqdn(), socket.gethostname(), *_HERE]
    return [address]
