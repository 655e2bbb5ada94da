"""What all tests share."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Before anything imports torch or numpy, and for every process that a test starts: small arrays gain nothing from
# threads, and threads of many processes on few cores wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONG = pytest.mark.skip(reason="it waits for minutes, and runs where STEERING_LONG=1 make test asks for it")

SESSION = "STEERING_TEST_SESSION"
REAPER = """
import os, signal, sys
from pathlib import Path

sys.stdin.read()
for process in Path("/proc").glob("[0-9]*"):
    try:
        words, named = ((process / name).read_bytes().split(bytes(1)) for name in ("cmdline", "environ"))
        if b"--adopt" in words and sys.argv[1].encode() in named:
            os.kill(int(process.name), signal.SIGKILL)
    except OSError:  # it has ended
        pass
"""
"""Waits for the end of the tests, however they end, and kills what they have left detached."""


def pytest_configure(config):
    """A detached run outlives whoever started it: of tests that were killed it would go on for ever, paused perhaps."""
    if SESSION not in os.environ:  # else a worker of this session
        os.environ[SESSION] = str(os.getpid())
        command = [sys.executable, "-c", REAPER, f"{SESSION}={os.getpid()}"]
        config.reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def pytest_unconfigure(config):
    """What is still detached ends now."""
    if reaper := getattr(config, "reaper", None):
        reaper.stdin.close()
        reaper.wait()


def pytest_collection_modifyitems(items):
    """Slow modules first in each of the equal parts that the workers begin with, so that at the end only short tests
    are left to share. Long tests are skipped unless they are asked for."""
    for item in items:
        if item.get_closest_marker("long") and not os.environ.get("STEERING_LONG"):
            item.add_marker(LONG)
    modules = {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    slow, rest = [], []
    for path, tests in modules.items():
        long = path.suffix == ".ipynb" or any(test.get_closest_marker("slow") for test in tests)
        (slow if long else rest).append(tests)
    short = [test for tests in rest for test in tests]
    workers, total = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), len(items)
    items.clear()
    for worker in range(workers):
        items += [test for tests in slow[worker::workers] for test in tests]
        room = max(0, total * (worker + 1) // workers - len(items))
        items += short[:room]
        del short[:room]


def pytest_collection_finish(session):
    """A predictor in the tests' own process runs its network in float32, as it is trained: which backend is the fastest
    one differs from machine to machine and from start to start, and in bfloat16 a policy may choose other positions.
    The others are tried in test_engine, and in the runs that tests start."""
    if serving := sys.modules.get("steering.inference.serving"):
        serving.Engine = functools.partial(serving.Engine, backends=[serving.REFERENCE], measure_s=0.0)


@pytest.fixture(scope="session")
def data():
    """The folder of recorded data that STEERING_DATA names."""
    named = os.environ.get("STEERING_DATA")
    if not named:
        pytest.skip("STEERING_DATA does not say where recorded data are")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"STEERING_DATA={named}: found no such folder, expected the folder of recorded data, or nothing")
    return folder
