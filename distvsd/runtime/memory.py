"""How much memory the processes of this machine may use."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path


def host_memory() -> int:
    """Bytes of the machine, or the limit of the container or shell (`ulimit -v`) if that is lower."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # no such file outside Linux; "max" where there is no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    return min(limits)
