"""What this process may use of the machine: cores and memory, by affinity and by cgroup (v1 and v2).

runner.py asks before Numba is imported. Inside a container with a quota of 2 cores on 64, 64 spinning threads would be
a catastrophe, and so would a cache sized by the host's memory.
"""

import os
import sys
from math import ceil
from pathlib import Path

__all__ = ["available_memory_bytes", "usable_cores"]

CGROUP = Path("/sys/fs/cgroup")
ASSUMED_BYTES = 4 << 30    # where the system does not tell


def usable_cores() -> int:
    """Cores by affinity, at most what the cgroup's quota pays for; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, cores if quota is None else min(cores, ceil(quota)))


def available_memory_bytes() -> int:
    """Memory that can still be taken without swapping, by the system and by the cgroups above this process."""
    limits = [free for free in (_system_available(), *_cgroup_available()) if free is not None]
    return min(limits, default=ASSUMED_BYTES)


def _cpu_quota() -> float | None:
    quotas = []
    for folder in _folders("cpu"):
        quota, period = _words(folder / "cpu.max"), "100000"                                  # v2: "200000 100000"
        if len(quota) == 2:
            quotas.append((quota[0], quota[1]))
        v1_quota, v1_period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if v1_quota:
            quotas.append((v1_quota[0], v1_period[0] if v1_period else period))
    shares = [int(quota) / int(period) for quota, period in quotas if quota.isdigit() and int(period) > 0]
    return min((share for share in shares if share > 0), default=None)


def _cgroup_available() -> list[int]:
    free = []
    for folder in _folders("memory"):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit_words, usage_words = _words(folder / limit), _words(folder / usage)
            if limit_words and usage_words and limit_words[0].isdigit():
                free.append(max(0, int(limit_words[0]) - int(usage_words[0])))
    return free


def _folders(controller: str) -> list[Path]:
    """This process's cgroup folders of a controller, and those above them, whose limits hold too."""
    folders = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP / controllers if controllers else CGROUP
        if not root.is_dir():
            root = CGROUP / controller
        inside = root / path.lstrip("/")
        folders += [inside, *[parent for parent in inside.parents if parent == root or root in parent.parents]]
    return folders


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _system_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    if sys.platform != "win32" and "SC_PHYS_PAGES" in os.sysconf_names:      # macOS: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None
