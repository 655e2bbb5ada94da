"""Has workers keep what they have: freed memory, for as Dask starts them each large array is made of new pages; and
what they have imported, without a look at all of it in every full garbage collection."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from typing import Any

from distributed import Client, WorkerPlugin

_NAME = "steering-memory"
_VARIABLE, _DASK = "MALLOC_TRIM_THRESHOLD_", "65536"
"""What Dask's nannies start workers with: `distributed.nanny.pre-spawn-environ`."""
_TRIM, _MMAP = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h."""
_KEPT_BYTES, _MAPPED_BYTES = 2**26, 2**25
"""Where glibc's own adaptation of the two ends, which that variable switches off."""


class KeepMemory(WorkerPlugin):
    """Has the allocator of a worker keep up to 64 MiB of what was freed, where Dask has it keep 64 KiB.

    With Dask's setting every array of 128 KiB or more is made of new pages each time: refining 1100 frames took 3.2
    times as much CPU time, most of it in the kernel. Another value of the variable is left alone. Linux with glibc.

    A full collection looks through all that was imported, 400,000 objects, and holds the interpreter lock for 0.3 s. On
    a busy machine that became 2 s, and a process that is silent so long is taken for frozen. What belongs to a run must
    not be kept so: nothing is where one is going on.
    """

    name = _NAME

    def setup(self, worker: Any) -> None:
        """Set allocator and collector, when the worker starts or is there already."""
        _set(_KEPT_BYTES, _MAPPED_BYTES)
        if not worker.state.actors and not gc.get_freeze_count():
            gc.collect()
            gc.freeze()

    def teardown(self, worker: Any) -> None:
        """Set both back, and return free memory to the system."""
        gc.unfreeze()
        _set(int(_DASK), 2 * int(_DASK))


def keep_memory(client: Client) -> None:
    """Have all workers of a cluster, those to come too, keep their memory."""
    client.register_plugin(KeepMemory())


def give_memory_back(client: Client) -> None:
    """Take `keep_memory` back."""
    client.unregister_worker_plugin(_NAME)


def _set(kept: int, mapped: int) -> None:
    if sys.platform != "linux" or os.environ.get(_VARIABLE) != _DASK:
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):  # else it is not glibc
        library.mallopt(_TRIM, ctypes.c_int(kept))
        library.mallopt(_MMAP, ctypes.c_int(mapped))
        library.malloc_trim(ctypes.c_size_t(0))
