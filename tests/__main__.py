"""The whole suite, two processes at once: tests often wait for launchers, disks and timeouts.

    python -m tests

The suite is cut into parts, longest first, and whichever process is free takes the next. Prints each part when it is
done; ends with the worst exit code.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).parent.relative_to(Path.cwd())
# Folders below tests/; what is named nowhere is the last part.
PARTS = (("faults", "ranks"), ("launchers",), ("unit/run", "unit/networks", "unit/shapes", "fuzz"))


def commands() -> list[list[str]]:
    """One pytest call a part; together they run every test once."""
    pytest = [sys.executable, "-m", "pytest"]
    parts = [[str(HERE / name) for name in part] for part in PARTS]
    rest = [f"--ignore={name}" for part in parts for name in part]
    return [*([*pytest, *part] for part in parts), [*pytest, *rest, str(HERE)]]


def main() -> int:
    worst = 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = [
            pool.submit(subprocess.run, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
            for command in commands()
        ]
        for run in as_completed(runs):
            sys.stdout.buffer.write(run.result().stdout)
            sys.stdout.flush()
            worst = max(worst, abs(run.result().returncode))
    return worst


if __name__ == "__main__":
    sys.exit(main())
