"""`steering demo`, `doctor` and `completion`: what somebody needs who has just installed it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steering.commands.words import say

SHELLS = ("bash", "zsh", "tcsh")
_FOLDERS, _FILES = ("DIR", "RUN"), ("FILE", "WORKFLOW.py", "SCAN")


def add_commands(commands: Any, parser: argparse.ArgumentParser) -> None:
    """Add all three to the commands of the parser."""
    commands.add_parser(
        "demo",
        help="run the loop on three simulated samples; arguments and --out DIR as for `run`",
    )
    doctor = commands.add_parser(
        "doctor",
        help="say what this machine has, and what would stop a run",
        description="Print what this machine has for runs in DIR, and what would stop one: the exit code is then 1.",
    )
    doctor.add_argument("folder", metavar="DIR", nargs="?", default="runs", help="where runs are to go (runs)")
    doctor.set_defaults(command=_doctor)
    completion = commands.add_parser(
        "completion",
        help="print a script by which a shell completes commands and options",
        description="Print a completion script (extra completion).",
        epilog="For bash: steering completion bash > ~/.local/share/bash-completion/completions/steering",
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(command=lambda chosen: _completion(parser, chosen.shell))


def spelt_out(words: Sequence[str]) -> list[str]:
    """`demo ...` as the `run WORKFLOW ...` that it stands for; other words as they are."""
    first = 0
    while words[first : first + 1] and words[first].startswith("--"):  # --log KIND or --log=KIND
        first += 1 if "=" in words[first] else 2
    if list(words[first : first + 1]) != ["demo"]:
        return list(words)
    from steering.loading import shipped  # noqa: PLC0415

    return [*words[:first], "run", str(shipped() / "simulated_drift.py"), *words[first + 1 :]]


def _doctor(chosen: argparse.Namespace) -> int:
    from steering.runner.doctor import examine, findings  # noqa: PLC0415

    found = findings(examine(Path(chosen.folder)))
    for one in found:
        say(f"{one.kind:5}  {one.sentence}")
    stops = sum(one.stops for one in found)
    say(f"{stops} of these would stop a run" if stops else "nothing here would stop a run")
    return 1 if stops else 0


def _completion(parser: argparse.ArgumentParser, shell: str) -> int:
    try:
        import shtab  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("found no shtab, expected it for completion: pip install 'steering[completion]'") from error
    _name_paths(parser, shtab.DIRECTORY, shtab.FILE)
    say(shtab.complete(parser, shell=shell))
    return 0


def _name_paths(parser: argparse.ArgumentParser, folder: Any, file: Any) -> None:
    """Say which arguments are folders and which are files, by what their help calls them."""
    for action in parser._actions:
        for one in (action.choices or {}).values() if isinstance(action, argparse._SubParsersAction) else ():
            _name_paths(one, folder, file)
        if action.metavar in _FOLDERS:
            action.complete = folder  # type: ignore[attr-defined]
        elif action.metavar in _FILES:
            action.complete = file  # type: ignore[attr-defined]
