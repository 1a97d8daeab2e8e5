"""The whole suite in two processes at once, half the time of one: each waits for launchers, disks and timeouts often.

    python -m tests

Which half a test is in is decided by its folder. Prints one half as it goes and the other after it; ends with the worse
of the two exit codes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

# About as long as everything else together.
FIRST_HALF = ("faults", "ranks")


def main() -> int:
    folder = Path(__file__).parent.relative_to(Path.cwd())
    pytest = [sys.executable, "-m", "pytest"]
    first = [str(folder / name) for name in FIRST_HALF]
    with tempfile.TemporaryFile() as output:
        second = subprocess.Popen(
            [*pytest, *(f"--ignore={name}" for name in first), str(folder)], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            codes = [subprocess.run([*pytest, *first], check=False).returncode, second.wait()]
        finally:
            second.kill()
        output.seek(0)
        sys.stdout.buffer.write(output.read())
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
