"""Names of processes by which other processes, containers and machines can tell whether one still runs."""

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
    """The boot id and the PID namespace: pids are comparable only within both. Empty if the system does not say.

    Containers and machines made from one image often share a host name, and a pid of one means nothing in another.
    """
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        parts.append(re.sub(r"\D", "", str(Path("/proc/self/ns/pid").readlink())))
    return ".".join(parts)


def is_from_here(name: str) -> bool:
    """Whether that process could be seen from here: the same host, boot and PID namespace, as far as they are known."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] != socket.gethostname():
        return False
    here = system_id()
    return not match[4] or not here or match[4] == here


def may_live(name: str) -> bool:
    """Whether the process of that name (see `process_name`) may still run; True if that cannot be known."""
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
    """State letter of a process and its start in clock ticks since boot; "?" and "" if the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "?", ""
    # The name in parentheses may hold anything; the state follows it, and the start is the 19th after that.
    fields = stat.rpartition(")")[2].split()
    return fields[0], fields[19]
