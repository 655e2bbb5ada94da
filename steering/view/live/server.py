"""The page's own server: the document, the messages, and commands of those who may give them."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bokeh.util.paths import bokehjs_path
from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.web import Application, HTTPError, RequestHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from steering.campaign import Limits
from steering.records import Field
from steering.runner.attach import UNREACHED
from steering.view.live.access import Access, Visitor, allowed
from steering.view.live.document import embedded
from steering.view.live.reader import Reader

logger = logging.getLogger(__name__)

_COOKIE = "steering-{port}"
_STATIC = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors {frames}"
)
HERE = ("127.0.0.1", "localhost", "[::1]", "::1")
"""Names of this machine for itself."""
_MOST_BYTES = 4096
"""Of a command."""
_METRICS_S = 8.0
"""How long figures may take: Prometheus waits for 10 s unless it is told otherwise."""

Routes = list[tuple[str, type[RequestHandler], dict[str, Any]]]


@dataclass(kw_only=True, eq=False)
class Site:
    """What the handlers of one page share."""

    reader: Callable[[], Reader]
    access: Access | None = None
    """None: everybody may look, and nobody may command."""
    only_here: bool = False
    """Whether only browsers of this machine may look."""
    hosts: set[str] = field(default_factory=set)
    """Values of the Host header, and hosts of origins, under which the page may be used; empty: any Host, and the
    origin that it names."""
    frames: str = "'none'"
    """Who may show the page in a frame, for its security policy."""


class Page(RequestHandler):
    """What all handlers do first: find out who asks, and refuse strangers."""

    def initialize(self, site: Site) -> None:
        """Tornado calls it with the route's arguments."""
        self.site = site
        self.set_default_headers()  # again: Tornado has called it before this, without the site

    def prepare(self) -> None:
        """Raises HTTPError for who may not look."""
        self.check_place()
        self.visitor = self._known()
        if self.visitor is None:
            raise HTTPError(403, reason="Open the page by the address that steering view has printed")

    def check_place(self) -> None:
        """Raise HTTPError for a browser that is not where the page is for, and for a page of another site: a name that
        leads here is not enough."""
        if self.site.hosts and not allowed(self.request.host, self.site.hosts):
            raise HTTPError(403, reason="The page is not served under this name, see --host of steering view")
        if self.site.only_here and not (
            ipaddress.ip_address(self.request.remote_ip).is_loopback and self.request.host_name in HERE
        ):
            raise HTTPError(403, reason="The page is for this machine alone")

    def _known(self) -> Visitor | None:
        if self.site.access is None:
            return Visitor(name="", role="reader")
        # A program that asks again and again, as Prometheus, has no cookies; it has the token in a header of its own.
        kind, _, token = self.request.headers.get("Authorization", "").partition(" ")
        return self.site.access.visitor(token if kind.lower() == "bearer" else self.get_cookie(self.cookie))

    @property
    def cookie(self) -> str:
        """Name of the cookie: cookies do not know ports, and two pages may be open on one machine."""
        return _COOKIE.format(port=self.request.host.rpartition(":")[2] if ":" in self.request.host else "")

    def set_default_headers(self) -> None:
        """The same for every answer."""
        site = getattr(self, "site", None)
        self.set_header("Content-Security-Policy", _POLICY.format(frames=site.frames if site else "'none'"))
        for name, value in (
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.set_header(name, value)
        self.clear_header("Server")

    def write_error(self, status_code: int, **_given: Any) -> None:
        """In plain words."""
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{status_code}: {self._reason}\n")


class Index(Page):
    """The page itself. With a token in its address the token becomes a cookie, and the address is asked for again
    without it."""

    def prepare(self) -> None:
        """As for all, but who brings a token is let in by it."""
        token = self.get_query_argument("token", None)
        if token is None or self.site.access is None:
            return super().prepare()
        self.check_place()
        if self.site.access.visitor(token) is None:
            raise HTTPError(403, reason="The token is not one of this page's: it may be of an earlier one")
        secure = self.request.protocol == "https"
        self.set_cookie(self.cookie, token, httponly=True, samesite="Strict", secure=secure, path="/")
        # Not a redirection: a browser that comes from another site would not send the new cookie with it.
        self.set_header("Refresh", "0; url=./")
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.finish(
            '<!doctype html><html lang="en"><title>steering</title><link rel="icon" href="data:,">'
            '<a href="./">The page</a></html>'
        )
        return None

    def get(self) -> None:
        """The HTML."""
        self._send(_STATIC / "page.html")

    def _send(self, path: Path) -> None:
        self.set_header("Content-Type", f"{_TYPES[path.suffix]}; charset=utf-8")
        self.finish(path.read_bytes())


class Static(Page):
    """A file that the page loads."""

    def get(self, name: str) -> None:
        """Compressed where the browser takes it."""
        content, zipped = _file(name)
        self.set_header("Content-Type", f"{_TYPES[Path(name).suffix]}; charset=utf-8")
        self.set_header("Cache-Control", "private, max-age=3600" if name.startswith("bokeh") else "no-cache")
        if "gzip" in self.request.headers.get("Accept-Encoding", ""):
            self.set_header("Content-Encoding", "gzip")
            content = zipped
        self.set_header("Vary", "Accept-Encoding")
        self.finish(content)


@cache
def _file(name: str) -> tuple[bytes, bytes]:
    path = Path(bokehjs_path()) / "js" / name if name.startswith("bokeh") else _STATIC / name
    content = path.read_bytes()
    return content, gzip.compress(content, 6)


class Drawings(Page):
    """The Bokeh document."""

    def get(self) -> None:
        """As BokehJS embeds it."""
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(embedded()))


class Me(Page):
    """Who asks."""

    def get(self) -> None:
        """Name and role."""
        assert self.visitor is not None  # noqa: S101
        self.finish({"name": self.visitor.name, "role": self.visitor.role})


class Metrics(Page):
    """The figures of the run for Prometheus: those that Dask's /metrics has."""

    async def get(self) -> None:
        """In its text format; 503 and why where there are none."""
        try:
            found = await asyncio.wait_for(asyncio.to_thread(self.site.reader().metrics), _METRICS_S)
        except (LookupError, ImportError, *UNREACHED) as error:
            self.set_status(503)
            found = f"503: {error if str(error) else 'the run does not answer'}\n".encode()
        self.set_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.finish(found)


class Updates(Page, WebSocketHandler):
    """The messages, to one viewer."""

    def check_origin(self, origin: str) -> bool:
        """Only pages of this server."""
        host = urlsplit(origin).netloc
        return allowed(host, self.site.hosts or {self.request.host})

    def open(self, *_: str) -> None:
        """Begin to watch."""
        self._loop = asyncio.get_running_loop()
        self._busy: Awaitable[None] | None = None
        self._late = False
        self.set_nodelay(True)
        self._send_in_loop: Callable[[bytes], None] = self._from_reader
        self._reader = self.site.reader()
        self._reader.watch(self._send_in_loop)

    def _from_reader(self, data: bytes) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the page with it
            self._loop.call_soon_threadsafe(self._send, data)

    def _send(self, data: bytes) -> None:
        if self._busy is not None and not self._busy.done():  # type: ignore[attr-defined]
            self._late = True  # a slow line: it gets everything once it is free
            return
        try:
            self._busy = asyncio.ensure_future(self._written(data))
        except WebSocketClosedError:
            self.on_close()

    async def _written(self, data: bytes) -> None:
        try:
            await self.write_message(data, binary=True)
        except (WebSocketClosedError, StreamClosedError):
            self.on_close()
            return
        if self._late:
            self._late = False
            self._reader.watch(self._send_in_loop)

    def on_message(self, message: str | bytes) -> None:
        """Nothing is expected of a viewer."""

    def on_close(self) -> None:
        """Send nothing more."""
        if hasattr(self, "_send_in_loop"):
            self._reader.leave(self._send_in_loop)


class Order(Page):
    """A command of an operator."""

    async def post(self) -> None:
        """Give it to the run; the run's log has it with the operator's name."""
        # A form of another site can neither set this header nor this type of content.
        origin = self.request.headers.get("Origin")
        ours = self.site.hosts or {self.request.host}
        if origin is not None and not allowed(urlsplit(origin).netloc, ours):
            raise HTTPError(403, reason="A page of another site asks")
        if self.request.headers.get("X-Steering") != "page" or len(self.request.body) > _MOST_BYTES:
            raise HTTPError(400, reason="Not a command of the page")
        if self.visitor is None or self.visitor.role != "operator":
            raise HTTPError(403, reason="You may look, and give no commands")
        try:
            order = json.loads(self.request.body)
            name, version = str(order["name"]), order.get("version")
            by = f"{self.visitor.name} (page, from {self.request.remote_ip})"
            limits = _limits(order.get("limits"))
            done = await asyncio.to_thread(self.site.reader().command, name, version, by, limits)
            self.finish({"done": done})
        except (ValueError, RuntimeError, OSError, TimeoutError, KeyError, TypeError) as error:
            self.set_status(409)
            self.finish({"error": str(error) or type(error).__name__})


def _limits(given: Mapping[str, Any] | None) -> Limits | None:
    if given is None:
        return None
    edges = [float(given[edge]) for edge in ("y0", "y1", "x0", "x1") if given.get(edge) is not None]
    if len(edges) not in (0, 4):
        raise ValueError(f"found {len(edges)} edges of an area, expected all four or none")
    return Limits(area=Field(*edges) if edges else None, shortest_dwell=given.get("shortest_dwell"))


def routes(site: Site, prefix: str = "") -> Routes:
    """The page's handlers under a prefix of the path."""
    shared = {"site": site}
    return [
        (f"{prefix}/", Index, shared),
        (f"{prefix}/static/(page\\.css|page\\.js|drawings\\.js|bokeh\\.min\\.js)", Static, shared),
        (f"{prefix}/document\\.json", Drawings, shared),
        (f"{prefix}/me", Me, shared),
        (f"{prefix}/metrics", Metrics, shared),
        (f"{prefix}/updates", Updates, shared),
        (f"{prefix}/command", Order, shared),
    ]


def listen(site: Site, address: str, port: int) -> HTTPServer:
    """Serve the page on an address and a port, 0 for any. Called within the event loop. Raises OSError where the port
    is taken."""
    application = Application(list(routes(site)), websocket_max_message_size=_MOST_BYTES)
    application.settings["log_function"] = lambda _handler: None
    server = HTTPServer(application, max_body_size=2**16)
    server.listen(port, address)
    return server


def port_of(server: HTTPServer) -> int:
    """The port that a server listens on."""
    return next(int(listening.getsockname()[1]) for listening in server._sockets.values())
