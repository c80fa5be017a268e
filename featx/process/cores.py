"""How many cores this process may use, and what they are."""

import math
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def cores_per_process(trainer: Any) -> int:
    """Return how many cores one process of the run may use: affinity and cgroup quota over this machine's processes."""
    return max(1, usable_cores() // max(1, int(trainer.num_devices)))


def usable_cores() -> int:
    """Return how many cores this process may use, at least 1: what affinity and the cgroups' quotas leave of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, quotas())]))


def quotas(own: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> Iterator[float]:
    """Yield how many cores each cgroup that this process is in may use, of those that have a limit.

    Version 2 has one hierarchy and writes ``100000 50000`` or ``max 50000``, version 1 one for cpu, and two files. In a
    container the path may be one of outside, where nothing is; the hierarchy's top is then the container's.

    Args:
        own: Where the kernel says which cgroups these are, a line ``0::/path`` or ``4:cpu,cpuacct:/path`` each.
        root: Where cgroups are mounted.
    """
    try:
        lines = Path(own).read_text().splitlines()
    except OSError:
        return  # another system
    for _, names, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if names and "cpu" not in names.split(","):
            continue
        for folder in (Path(path), *Path(path).parents):
            place = Path(root, "cpu" if names else "", str(folder).lstrip("/"))
            with suppress(OSError, ValueError):
                files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if names else ["cpu.max"]
                quota, period = " ".join((place / file).read_text() for file in files).split()
                if float(quota) > 0:  # version 1 says -1 for none
                    yield float(quota) / float(period)


def device_name(device: torch.device) -> str:
    """Return what computes, as ``AMD EPYC 9R14`` or ``NVIDIA H100``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(line for line in file if line.startswith("model name")).split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or device.type
