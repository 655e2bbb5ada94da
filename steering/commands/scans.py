"""`steering record`, `inspect` and `export`: scans that come from elsewhere, and images for other programs."""

from __future__ import annotations

import argparse
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from steering.commands.words import add_insecure, say, short


def add_commands(commands: Any) -> None:
    """Add all three to the parser's commands."""
    record = commands.add_parser(
        "record",
        help="record live streams with their timing into a file",
        description="Record frames and positions as they come, messages undecoded; play:FILE plays them again. Ctrl-C "
        "ends it.",
    )
    record.add_argument("source", metavar="SOURCE", help="address of the frames, as dectris://HOST or pva://PV")
    record.add_argument("--positions", help="address of the positions")
    record.add_argument("--monitor", help="address of the incident intensity, beside positions")
    record.add_argument("--out", metavar="FILE", required=True, help="file to be written, which must not exist")
    record.add_argument("--seconds", type=float, help="end after so many seconds (at Ctrl-C)")
    record.set_defaults(command=_record)
    export = commands.add_parser(
        "export",
        help="write the images of a run for other programs: CXI/NeXus and TIFF, or a Tiled server",
        description="Write live and refined object, trust, positions and probe of each scan as CXI/NeXus and TIFF.",
    )
    export.add_argument("folder", metavar="DIR", help="folder of a run")
    export.add_argument("--out", metavar="DIR", help="where to (DIR/export)")
    export.add_argument(
        "--tiled", metavar="URL", help="to a container of a Tiled server instead; follows a run that goes on"
    )
    add_insecure(export)
    export.set_defaults(command=_export)
    inspect = commands.add_parser(
        "inspect",
        help="say what a recorded scan is read as, or what a live stream sends",
        description="Print what is recognised in a recorded scan, with units and shapes, and what is missing; or what "
        "a live stream at an address (as of workflows/live_scan.py) sends.",
    )
    inspect.add_argument("file", metavar="FILE", help="a recorded scan, or an address of frames")
    inspect.add_argument(
        "--listen", type=float, default=5.0, metavar="SECONDS", help="how long to listen to a live stream (5)"
    )
    inspect.add_argument("--frames", metavar="FILE:/path", help="where the frames are")
    inspect.add_argument(
        "--positions",
        metavar="FILE:/path[unit]",
        help="where the positions are, x in the first column (but at the layout's own place), or FILE:/x,/y[unit], or "
        "an address",
    )
    inspect.add_argument("--monitor", help="address of the incident intensity, beside an address of positions")
    inspect.add_argument(
        "--allow-folder", metavar="DIR", action="append", default=[], help="folder that links in the file may lead to"
    )
    inspect.add_argument("--most-bytes", type=int, help="most bytes of all arrays (half of the machine's memory)")
    inspect.set_defaults(command=_inspect)


def _record(chosen: argparse.Namespace) -> int:
    from steering.sources.addresses import named_at  # noqa: PLC0415
    from steering.sources.tape import record  # noqa: PLC0415

    addresses = _addresses(chosen, chosen.source)
    following = named_at(addresses)
    stopped = threading.Event()
    if chosen.seconds is not None:
        timer = threading.Timer(chosen.seconds, stopped.set)
        timer.daemon = True
        timer.start()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        counts = record(following, Path(chosen.out), stopped, addresses)
    finally:
        signal.signal(signal.SIGINT, before)
    if not any(counts.values()):
        Path(chosen.out).unlink()
        raise RuntimeError(
            f"found {' and '.join(counts)} silent, expected them to send: nothing was recorded, and no file is left. "
            "Check the addresses, and whether the beamline is armed (`steering inspect` listens too)"
        )
    say(f"{chosen.out}: {', '.join(f'{count} records of {name}' for name, count in counts.items())}")
    return 0


def _addresses(chosen: argparse.Namespace, frames: str) -> dict[str, str]:
    given = {"frames": frames, "positions": chosen.positions, "monitor": chosen.monitor}
    return {name: text for name, text in given.items() if text is not None}


def _export(chosen: argparse.Namespace) -> int:
    from steering.runner.folder import RunFolder  # noqa: PLC0415
    from steering.view.export import export_run  # noqa: PLC0415

    folder = RunFolder(chosen.folder)
    if chosen.tiled:
        from steering.view.tiled import publish  # noqa: PLC0415

        count = publish(folder, chosen.tiled, insecure=chosen.insecure)
        say(f"{chosen.tiled}: {folder.path.name} with the images of {count} scans")
        return 0
    for path in export_run(folder, Path(chosen.out or folder.path / "export")):
        say(short(path))
    return 0


def _inspect(chosen: argparse.Namespace) -> int:
    from steering.files import Bounds  # noqa: PLC0415
    from steering.sources import ReadSettings, inspect_lines  # noqa: PLC0415
    from steering.sources.address_text import is_live  # noqa: PLC0415
    from steering.sources.addresses import named_at  # noqa: PLC0415
    from steering.sources.listening import listen  # noqa: PLC0415

    if is_live(chosen.file):
        for name, seen in listen(named_at(_addresses(chosen, chosen.file)), chosen.listen).items():
            say(f"{name}: {seen.line()}")
        return 0

    bounds = Bounds(folders=tuple(chosen.allow_folder))
    bounds = bounds if chosen.most_bytes is None else replace(bounds, bytes=chosen.most_bytes)
    for line in inspect_lines(
        chosen.file, ReadSettings(frames=chosen.frames, positions=chosen.positions, bounds=bounds)
    ):
        say(line)
    return 0
