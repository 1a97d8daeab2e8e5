"""Two simulated hosts on one machine, with separate processes, names and networks, and a virtual cable between them.

A host is the first process of new namespaces (pid, net, uts, mnt). Killing it ends all its processes at once, as a
power failure does, and removes its network and its end of the cable. Disks are shared. Requires Linux and root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("one", "two")
CABLE = "cable0"
NAMESPACES = ("--net", "--uts", "--pid", "--mount")
PROGRAMS = ("ip", "mount", "nsenter", "unshare")


def missing() -> str:
    """What this machine lacks for two hosts; empty if it lacks nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent or os.geteuid() != 0:
        return f"two hosts need root and the programs {', '.join(PROGRAMS)}; here: user {os.geteuid()}, no {absent}"
    probe = ["unshare", *NAMESPACES, "--fork", "ip", "link", "add", CABLE, "type", "veth"]
    done = subprocess.run(probe, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"network namespaces cannot be created here: {done.stderr.strip()}"


class Host:
    """A running host. `start` runs shell lines on it."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        # The sleep limits the lifetime of the host if the test is killed.
        script = 'hostname "$1" && mount --bind "$2" /etc/hosts && ip link set lo up && echo up && exec sleep 1800'
        shell = ["sh", "-c", script, "sh", name, str(folder / "hosts")]
        self._unshare = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", *shell],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._unshare.stdout is not None
        with self._unshare.stdout as said:
            assert said.readline() == "up\n", f"host {name} does not start"
        parent = self._unshare.pid
        self.pid = int(Path(f"/proc/{parent}/task/{parent}/children").read_text())
        self._address = address

    def plug_in(self, other: Host) -> None:
        """Routes to the other host through this host's end of the cable. The address is on `lo`, so it remains if the
        cable is cut."""
        self.run("ip", "address", "add", self._address, "dev", "lo")
        self.run("ip", "link", "set", CABLE, "up")
        self.run("ip", "route", "add", other._address, "dev", CABLE, "src", self._address)

    def run(self, *command: str) -> None:
        subprocess.run([*self._entering(), *command], check=True, capture_output=True, text=True)

    def start(self, line: str, **environment: str) -> subprocess.Popen[bytes]:
        """Runs a shell line in the project folder, with the environment of a user's shell. `log` holds its output."""
        launchers_own = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "PET_", "DISTVSD_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(launchers_own)}
        own = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")]),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # Empty, so that the user's accelerate configuration does not affect the test.
            "HF_HOME": str(self._folder / "hf"),
            "ACCELERATE_USE_CPU": "true",
        }
        with self._log.open("a") as stream:
            return subprocess.Popen(
                [*self._entering(), "sh", "-c", f"cd '{ROOT}' && {line}"],
                env=inherited | own | environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def _log(self) -> Path:
        return self._folder / f"{self.name}.log"

    def die(self) -> None:
        """Kills the host and all its processes at once."""
        self._unshare.kill()
        self._unshare.wait()

    def _entering(self) -> list[str]:
        return ["nsenter", "--target", str(self.pid), *NAMESPACES]


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that find each other by the names `one` and `two`. Both are killed at the end."""
    addresses = [f"10.231.7.{number}" for number in (1, 2)]
    entries = ["127.0.0.1 localhost", *map(" ".join, zip(addresses, NAMES, strict=True))]
    (folder / "hosts").write_text("".join(f"{entry}\n" for entry in entries))
    hosts: list[Host] = []
    try:
        for name, address in zip(NAMES, addresses, strict=True):
            hosts.append(Host(name, address, folder))
        one, two = hosts
        ends = ["name", CABLE, "netns", str(one.pid), "type", "veth", "peer", "name", CABLE, "netns", str(two.pid)]
        subprocess.run(["ip", "link", "add", *ends], check=True, capture_output=True, text=True)
        one.plug_in(two)
        two.plug_in(one)
        yield one, two
    finally:
        for host in hosts:
            host.die()
