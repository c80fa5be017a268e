"""The number of cores that this process may use, and the name of the processor."""

import math
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def cores_per_process(trainer: Any) -> int:
    """Return the number of cores for each process of the run: this machine's usable cores over its processes."""
    return max(1, usable_cores() // max(1, int(trainer.num_devices)))


def usable_cores() -> int:
    """Return the number of cores that affinity and cgroup quotas leave to this process, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, quotas())]))


def quotas(own: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> Iterator[float]:
    """Yield the quota, in cores, of each of this process's cgroups that has one.

    Version 2 has one hierarchy with a file ``cpu.max`` (``100000 50000`` or ``max 50000``); version 1 has a hierarchy
    for cpu with two files. In a container the path may exist only outside of it; the container's own cgroup is then the
    top of the hierarchy.

    Args:
        own: Lists this process's cgroups, one per line: ``0::/path`` or ``4:cpu,cpuacct:/path``.
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
                if float(quota) > 0:  # -1 means none in version 1
                    yield float(quota) / float(period)


def device_name(device: torch.device) -> str:
    """Return the processor's name, such as ``AMD EPYC 9R14`` or ``NVIDIA H100``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(line for line in file if line.startswith("model name")).split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or device.type
