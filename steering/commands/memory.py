"""`steering memory`: what a memory holds, and how something is taken out of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from steering.commands.words import say


def add_commands(commands: Any) -> None:
    """Add it to the parser's commands."""
    memory = commands.add_parser("memory", help="say what a memory holds, or take something out of it")
    verbs = memory.add_subparsers(required=True, metavar="VERB")
    listed = verbs.add_parser("list", help="one line for each memory in these folders")
    listed.add_argument("folders", metavar="DIR", nargs="+", help="a memory, or a folder of memories")
    listed.set_defaults(command=_list)
    show = verbs.add_parser("show", help="the samples of a memory by scan, and its model")
    show.add_argument("folder", metavar="DIR", help="a memory")
    show.set_defaults(command=_show)
    prune = verbs.add_parser("prune", help="take scans out with every sample, or keep fewer samples")
    prune.add_argument("folder", metavar="DIR", help="a memory")
    prune.add_argument("--scan", metavar="RUN/SCAN", action="append", default=[], help="a scan, as `show` names it")
    prune.add_argument("--keep", metavar="SIZE", help="samples to keep from now on at most, such as 2GiB")
    prune.set_defaults(command=_prune)


def _list(chosen: argparse.Namespace) -> int:
    from steering.view.memories import memory_line  # noqa: PLC0415

    lines = memory_line([Path(folder) for folder in chosen.folders])
    for line in lines:
        say(line)
    return 0


def _show(chosen: argparse.Namespace) -> int:
    from steering.view.memories import memory_lines  # noqa: PLC0415

    for line in memory_lines(Path(chosen.folder)):
        say(line)
    return 0


def _prune(chosen: argparse.Namespace) -> int:
    from steering.learning import Memory, bytes_of  # noqa: PLC0415

    if not chosen.scan and chosen.keep is None:
        raise ValueError("found nothing to prune, expected --scan RUN/SCAN or --keep SIZE")
    memory = Memory(Path(chosen.folder))
    for scan in chosen.scan:
        say(f"{scan}: {memory.remove(scan)} samples taken out; models that learnt from them stay as they are")
    if chosen.keep is not None:
        say(f"{memory.keep(bytes_of(chosen.keep))} samples left")
    return 0
