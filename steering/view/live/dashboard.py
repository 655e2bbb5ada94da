"""The page in Dask's own web server, at /steering: for this machine alone and only to look, as that server knows no
tokens.

The scheduler of `steering.local` has it. One of your own gets it by

    dask scheduler --preload steering.view.live.dashboard
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tornado.web import Application, HTTPError, RedirectHandler

from steering.runner.folder import PUBLISHED_FOLDER, RunFolder

if TYPE_CHECKING:
    from steering.view.live.reader import Reader

PATH = "/steering"


def dask_setup(scheduler: Any) -> None:
    """Dask calls it at the scheduler's start."""
    scheduler.http_application.add_application(Mounted(scheduler))


class Mounted(Application):
    """The page's handlers. What they need is imported when somebody asks for the page."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__([(PATH, RedirectHandler, {"url": f"{PATH}/", "permanent": False})])
        self._scheduler = scheduler
        self._reader: Reader | None = None
        self._mounted = False

    def find_handler(self, request: Any, **given: Any) -> Any:
        """Tornado's, with the page mounted by then."""
        if request.path.startswith(f"{PATH}/") and not self._mounted:
            from steering.view.live.server import Site, routes  # noqa: PLC0415

            self.add_handlers(".*$", routes(Site(reader=self.reader, only_here=True), PATH))
            self._mounted = True
        return super().find_handler(request, **given)

    def reader(self) -> Reader:
        """Of the newest run on this cluster. Raises HTTPError where there was none."""
        path = self._scheduler.task_metadata.get(PUBLISHED_FOLDER)
        if path is None:
            raise HTTPError(404, reason="No run has begun on this cluster")
        if self._reader is None or str(self._reader.folder.path) != path:
            from steering.view.live.reader import Reader  # noqa: PLC0415

            self.stop()
            # Who has named the folder can run code in this process already.
            self._reader = Reader(RunFolder(path), insecure=True)
            self._reader.start()
        return self._reader

    def stop(self) -> None:
        """Follow the run no longer; Dask calls it at the scheduler's end."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
