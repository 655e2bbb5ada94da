"""What all tests share."""

import os
from pathlib import Path

import pytest

# Before anything imports torch or numpy, and for every process that a test starts: small arrays gain nothing from
# threads, and threads of many processes on few cores wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
