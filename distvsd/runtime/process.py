"""Processes by a name that other processes, containers and machines can judge: does that one still run?"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import Path
from typing import Final

_NAME: Final = re.compile(r"(.+?):(\d{1,9})(?::(\d*))?(?::([\w.-]+))?", re.ASCII)


def process_name() -> str:
    """This process as host:pid:start:system. start: when it began, in ticks since boot. system: see `system_id`."""
    return f"{socket.gethostname()}:{os.getpid()}:{process_state(os.getpid())[1]}:{system_id()}".rstrip(":")


def system_id() -> str:
    """The boot and the PID namespace in which pids mean what they mean here; empty where the system does not tell.

    Containers of one image, and machines made from one, often share a host name; a pid of one says nothing in another.
    """
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink())))
    return ".".join(parts)


def is_from_here(name: str) -> bool:
    """Whether that process, if it runs, can be seen from here: the same host, boot and PID namespace as far as told."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] != socket.gethostname():
        return False
    here = system_id()
    return not match[4] or not here or match[4] == here


def may_live(name: str) -> bool:
    """Whether a process of that name (host:pid, and what else `process_name` adds) may still run; whoever cannot be
    judged may."""
    match = _NAME.fullmatch(name)
    if match is None or not is_from_here(name):
        return True
    pid, then = int(match[2]), match[3]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state, now = process_state(pid)
    return state not in "ZX" and (now == then or not now or not then)


def process_state(pid: int) -> tuple[str, str]:
    """State letter of a process and its start in clock ticks since boot; empty where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "?", ""
    # The name in parentheses may hold anything; the state follows it, and the start is the 19th after that.
    fields = stat.rpartition(")")[2].split()
    return fields[0], fields[19]
