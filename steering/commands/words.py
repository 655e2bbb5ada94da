"""How the command line speaks."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TextIO

from steering.logs import VARIABLE
from steering.view.unheard import give_up

_LONGEST = 400


def message(error: Exception) -> str:
    """The message of an error in a line; with its kind and place, where the message alone would not be a sentence.

    A long one loses its middle: what was found stands first, and what to do last.
    """
    message = " ".join(str(error).split())
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2 - 5]} ... {message[-_LONGEST // 2 :]}"
    if " " in message and isinstance(error, ValueError | OSError | RuntimeError | ImportError):
        return message
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {message} ({short(Path(frame.filename))}, line {frame.lineno})"


def short(path: Path) -> str:
    """The path as a person would type it."""
    path = Path(path).absolute()
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def add_insecure(command: argparse.ArgumentParser) -> None:
    """Add --insecure to a command that connects to a run's cluster."""
    command.add_argument(
        "--insecure",
        action="store_true",
        help="also where the run is another user's, whose cluster can then run code here",
    )


def say(line: str) -> None:
    """A line for who asked for it: standard output."""
    _write(sys.stdout, line)


def complain(line: str) -> None:
    """A line about what went wrong: standard error, or the log where its lines are JSON."""
    if os.environ.get(VARIABLE) == "json":
        logging.getLogger("steering").error(line)
        return
    _write(sys.stderr, f"steering: {line}")


def _write(stream: TextIO | None, line: str) -> None:
    """Where nobody takes it, as after `| head`, that is no failure."""
    if stream is None:  # it was closed before this process began
        return
    try:
        stream.write(line + "\n")
        stream.flush()
    except BrokenPipeError:
        give_up(stream)
