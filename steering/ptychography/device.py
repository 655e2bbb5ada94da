"""Which device torch uses: said once as `auto`, `cpu` or `cuda`, decided in the process that computes."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
from collections.abc import Iterator

import torch

logger = logging.getLogger(__name__)


def find_device(device: str = "auto", *, local_rank: int = 0) -> torch.device:
    """The device to compute on, in this process.

    device: `auto`, a GPU where torch sees one; `cpu`; `cuda`, a GPU; or with its number, as `cuda:1`. local_rank: this
    process's number among those on its host that compute, which share out its GPUs in their order; processes beyond
    the last GPU begin again with the first, and -1 takes the last.

    Raises ValueError for a GPU that is not there. Logs a GPU that is there and not used.
    """
    count = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not count):
        if count:
            logger.warning("found %d GPU(s) that device='cpu' leaves unused, expected device='auto' or 'cuda'", count)
        return torch.device("cpu")
    kind, _, number = device.partition(":")
    if device not in ("auto", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise ValueError(f"found device {device!r}, expected auto, cpu, cuda, or cuda:NUMBER")
    index = int(number) if number else local_rank % count if count else 0
    if index >= count:
        raise ValueError(
            f"found {count} GPU(s) that torch sees, expected one for device={device!r}: use device='cpu', or look at "
            "CUDA_VISIBLE_DEVICES and at the build of torch"
        )
    return torch.device("cuda", index)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch on the CPU meanwhile: on a busy machine the threads of many small transforms wait for one
    another most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def add_device(parser: argparse._ActionsContainer) -> None:
    """Add --device to a workflow's arguments; `find_device` takes what it says, in the processes that compute."""
    parser.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda or cuda:NUMBER (auto)")


def describe_device(device: torch.device) -> str:
    """A device in words, for people and for summaries: which GPU gave a figure."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def place_in_words(device: torch.device) -> str:
    """The same with the host, and the number or UUID of the GPU there, as the process sees it."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    number = seen[device.index or 0] if seen != [""] and (device.index or 0) < len(seen) else str(device.index or 0)
    gpu = f"GPU {number} of " if device.type == "cuda" else ""
    return f"{describe_device(device)} ({gpu}{socket.gethostname()})"
