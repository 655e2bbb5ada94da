"""`steering view`: the live page of a run, on a port of its own."""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

from steering.commands.words import add_insecure, say, short


def add_commands(commands: Any) -> None:
    """Add it to the parser's commands."""
    view = commands.add_parser(
        "view",
        help="serve the live page of a run, running or ended",
        description="Serve the page of a run, running or ended, until Ctrl-C; the run goes on. The address that is "
        "printed carries a token: whoever has it may command the run.",
    )
    view.add_argument("folder", metavar="DIR", help="folder of a run")
    view.add_argument("--port", type=int, default=0, help="to serve the page on (any that is free)")
    view.add_argument(
        "--address", default="127.0.0.1", help="of the interface to serve it on (127.0.0.1: this machine alone)"
    )
    view.add_argument(
        "--host", action="append", default=[], metavar="HOST:PORT", help="a name by which browsers reach the page"
    )
    view.add_argument(
        "--reader", action="append", default=[], metavar="NAME", help="print an address by which NAME may only look"
    )
    view.add_argument(
        "--operator", action="append", default=[], metavar="NAME", help="print one by which NAME may command the run"
    )
    add_insecure(view)
    view.set_defaults(command=_view)


def _view(chosen: argparse.Namespace) -> int:
    from steering.runner.folder import RunFolder  # noqa: PLC0415
    from steering.view.live.served import LivePage  # noqa: PLC0415

    # The cluster of a run that ends goes away under this client.
    for name in ("distributed", "distributed.client", "distributed.core"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    folder = RunFolder(chosen.folder)
    where = {"address": chosen.address, "port": chosen.port, "hosts": chosen.host}
    with LivePage(folder, **where, insecure=chosen.insecure) as page:
        say(f"{short(folder.path)}: the page is served until Ctrl-C")
        for name in chosen.operator or [""]:
            say(f"  {name or 'you'} may command the run: {page.invite(name)}")
        for name in chosen.reader:
            say(f"  {name} may look: {page.invite(name, 'reader')}")
        if chosen.address not in ("127.0.0.1", "localhost", "::1"):
            say("  it is not encrypted: whoever listens on the network can take part; an SSH tunnel is safer")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            say("the page is closed; the run is as it was")
    return 0
