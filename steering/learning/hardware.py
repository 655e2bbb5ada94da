"""What this machine computes with, as torch and the operating system see it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Cores, memory and GPUs, and what joins them."""

    cores: int
    """That this process may use."""
    memory_bytes: int
    """That is free."""
    torch: str
    """Its version."""
    cuda: str | None
    """Version of CUDA that torch was built for; None: for CPUs only."""
    gpus: tuple[str, ...] = ()
    """Names of those that torch sees."""
    devices: int = 0
    """GPUs of which the driver has made a device file."""
    nccl: str | None = None
    """Its version, as torch has it."""
    bfloat16: bool = False
    """The processor computes in it: without, training in bfloat16 on the CPU is many times slower."""
    interfaces: tuple[tuple[str, str], ...] = ()
    """Name and IPv4 address of each network interface that is up."""


def find_hardware() -> Hardware:
    """Look at this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return Hardware(
        cores=cores,
        memory_bytes=psutil.virtual_memory().available,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        gpus=tuple(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())),
        devices=sum(path.name[6:].isdecimal() for path in Path("/dev").glob("nvidia*")),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda and dist.is_nccl_available() else None,
        bfloat16=_has_bfloat16(),
        interfaces=tuple(
            (name, one.address)
            for name, addresses in sorted(psutil.net_if_addrs().items())
            for one in addresses
            if name in up and one.family.name == "AF_INET"
        ),
    )


def _has_bfloat16() -> bool:
    try:
        words = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in words or "amx_bf16" in words or " bf16" in words
