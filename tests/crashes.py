"""Readers that go wrong in the ways that C libraries do."""

import os
import signal
import time


def crash(path, memory, bounds):
    os.kill(os.getpid(), signal.SIGSEGV)


def memory(path, memory, bounds):
    return {"size": len(bytearray(2**32))}


def hang(path, memory, bounds):
    time.sleep(60)
