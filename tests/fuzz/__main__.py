"""`python -m tests.fuzz KIND [--count N] [--seed S] [--first I]`: runs one campaign; the exit code is 1 with
findings."""

from __future__ import annotations

import argparse
import importlib
import time

from tests.fuzz.harness import campaign

KINDS = ("configurations", "overrides", "prior_folders", "checkpoints")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=1000, help="number of cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all cases (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    args = parser.parse_args()
    began = time.monotonic()
    attempt = importlib.import_module(f"tests.fuzz.{args.kind}").attempt
    tally = campaign(attempt, args.first, args.first + args.count, args.seed)
    for finding in tally.findings:
        print(finding)
    print(f"{args.kind}, seed {args.seed}: {tally}, {time.monotonic() - began:.0f} s")
    return 1 if tally.findings else 0


raise SystemExit(main())
