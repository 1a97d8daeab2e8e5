"""The whole suite, two processes at once: tests often wait for launchers, disks and timeouts.

    python -m tests [--guarantees FOLDER]

The suite is cut into parts, longest first, and whichever process is free takes the next. Prints each part when it is
done; ends with the worst exit code. FOLDER gets one file a part for `python -m tests.guarantees FOLDER/*`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).parent.relative_to(Path.cwd())
# Folders below tests/; what is named nowhere is the last part.
PARTS = (("faults", "ranks"), ("launchers",), ("unit/run", "unit/networks", "unit/shapes", "fuzz"))


def commands(guarantees: Path | None) -> list[list[str]]:
    """One pytest call a part; together they run every test once."""
    parts = [[str(HERE / name) for name in part] for part in PARTS]
    rest = [f"--ignore={name}" for part in parts for name in part]
    calls = [*parts, [*rest, str(HERE)]]
    written = [[] if guarantees is None else [f"--guarantees={guarantees}/{part}.json"] for part in range(len(calls))]
    return [[sys.executable, "-m", "pytest", *call, *file] for call, file in zip(calls, written, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests", description="Runs the whole suite in two processes.")
    parser.add_argument("--guarantees", type=Path, metavar="FOLDER", help="write which guarantees were proved there")
    guarantees = parser.parse_args().guarantees
    if guarantees is not None:
        guarantees.mkdir(parents=True, exist_ok=True)
    worst = 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = [
            pool.submit(subprocess.run, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
            for command in commands(guarantees)
        ]
        for run in as_completed(runs):
            sys.stdout.buffer.write(run.result().stdout)
            sys.stdout.flush()
            worst = max(worst, abs(run.result().returncode))
    return worst


if __name__ == "__main__":
    sys.exit(main())
