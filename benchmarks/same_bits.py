"""Compares the digests of runs of two versions of this program, which must be equal when code was only moved.

    python -m benchmarks.same_bits [--base 6e3ee3d] [--ranks 1 2 3] [--page FILE]

The base is checked out into a temporary folder. Both versions run with exact numerics and their own configuration
files: all of `configs/smoke.yaml`, and the first 20 rounds of `configs/quickstart.yaml`. Then the base trains the first
half of the smoke run, and this version the second half. The exit code is 1 if a digest differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import machine

HERE = Path(__file__).parents[1]
RUNS = {"smoke": "schedule.rounds=8", "quickstart": "schedule.rounds=20"}


def call(tree: Path, ranks: int, *arguments: str) -> str:
    """Runs a module of that tree and returns its standard output. ranks: their number under torchrun; 0 runs it alone.

    Raises CalledProcessError.
    """
    threads = str(max(1, (os.cpu_count() or 1) // max(ranks, 1)))
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": threads}
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    command = [sys.executable, *(["-m"] if ranks else []), *launcher, "-m", *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    return done.stdout


def train(tree: Path, ranks: int, name: str, run: Path, *changes: str) -> None:
    exact = ("parallel.numerics=exact", f"run.dir={run}", RUNS[name])
    call(tree, ranks, "distvsd.train", f"configs/{name}.yaml", *exact, *changes)


def digest(tree: Path, run: Path) -> str:
    """The digest over all components, from the last line of `distvsd verify --digest`."""
    return call(tree, 0, "distvsd", "verify", str(run), "--digest").splitlines()[-1].split()[-1]


def compare(base: Path, ranks: list[int], folder: Path) -> list[tuple[str, int, str, str]]:
    """Rows of (run, ranks, digest of the base, digest of this version)."""
    rows = []
    for name in RUNS:
        for count in ranks:
            found = []
            for tree in (base, HERE):
                run = folder / f"{name}-{count}-{'base' if tree is base else 'here'}"
                train(tree, count, name, run)
                found.append(digest(HERE, run))
            rows.append((name, count, found[0], found[1]))
            print(*rows[-1], flush=True)
    continued = folder / "continued"
    train(base, 1, "smoke", continued, "schedule.rounds=4")
    train(HERE, 1, "smoke", continued, "--resume", "must")
    whole = next(row[2] for row in rows if row[0] == "smoke")
    rows.append(("smoke, second half by this version", 1, whole, digest(HERE, continued)))
    print(*rows[-1], flush=True)
    return rows


def page(rows: list[tuple[str, int, str, str]], base: str) -> str:
    lines = [
        "# Digests of two versions",
        "",
        f"`python -m benchmarks.same_bits --base {base}`; {machine()}",
        "",
        "| run with exact numerics | ranks | digest of the base | digest of this version | same |",
        "|---|---|---|---|---|",
        *(
            f"| {what} | {n} | {old[:16]} | {new[:16]} | {'yes' if old == new else 'NO'} |"
            for what, n, old, new in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_bits", description=__doc__)
    parser.add_argument("--base", default="6e3ee3d", help="the commit to compare with (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3], help="numbers of ranks (default: 1 2 3)")
    parser.add_argument("--page", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(base), args.base], check=True)
        try:
            rows = compare(base, args.ranks, Path(place))
        finally:
            subprocess.run([*git, "remove", "--force", str(base)], check=True)
    text = page(rows, args.base)
    print(text)
    if args.page is not None:
        args.page.write_text(text, encoding="utf-8")
    return 0 if all(old == new for _, _, old, new in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
