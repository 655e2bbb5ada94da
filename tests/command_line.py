"""The command line within the tests' own process, which has imported what it needs: a campaign costs seconds less."""

import contextlib
import io
import sys
import time
from pathlib import Path

import psutil
import torch

from steering import cli

WORKFLOWS = Path(__file__).parents[1] / "workflows"


def ran(workflow, out, *arguments, code=0):
    """Run a workflow of this repository, or of a path; what was said, and complained of. No process may be left."""
    return said("run", WORKFLOWS / workflow, "--out", out, *arguments, code=code)


def said(*words, code=0):
    """What `steering WORDS` says, and what it complains of. No process of a cluster may be left."""
    out, err, called, there = io.StringIO(), io.StringIO(), sys.argv, forked()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), torch.random.fork_rng(devices=[]):
            found = cli.main([str(word) for word in words])
    finally:
        sys.argv = called
    told = f"{out.getvalue()}\n{err.getvalue()}"
    assert code is None or found == code, f"exit {found}\n{told}"
    for _ in range(150):
        if not forked() - there:
            return out.getvalue(), err.getvalue()
        time.sleep(0.1)
    raise AssertionError(f"processes left behind: {forked() - there}\n{told}")


def forked():
    """Processes that clusters of this process have started: the children of its fork server, which itself stays."""
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= set(child.children(recursive=True))
    return found
