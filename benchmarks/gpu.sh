#!/usr/bin/env bash
# One page of Markdown about this machine's GPU: the tests that need one, every kernel beside its reference, the paper's
# field, and rounds of Stable Diffusion 2.1's size with random weights. Needs no network and no weights.
#
#   bash benchmarks/gpu.sh [--smoke] [--part tests|kernels|field|rounds] [--out FILE]
set -eu
cd "$(dirname "$0")/.."
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" benchmarks/gpu.py "$@"
