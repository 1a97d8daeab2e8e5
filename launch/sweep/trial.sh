#!/bin/sh
# One trial of a sweep: trains on this machine's ranks, evaluates, and sends the evaluation to the trial's run in wandb.
#
#   sh launch/sweep/trial.sh CONFIG [key=value ...]     the agent calls it, see the yaml files beside it
#
# DISTVSD_LAUNCHER  torchrun (default), accelerate, or the beginning of a command of your own that takes -m MODULE ARGS,
#                   such as `srun torchrun --nnodes 4 ...`: every rank gets the same command line, only rank 0 opens wandb
# DISTVSD_RANKS     processes on this machine; default: its GPUs, or 1
# DISTVSD_SWEEP_DIR where trials are kept (default runs/sweep): a trial that is queued again goes on in its own folder
# Ends with 0: done; 3: preempted, the same command goes on; anything else: failed.
set -eu

if [ $# -lt 1 ]; then
    echo "usage: sh launch/sweep/trial.sh CONFIG [key=value ...]" >&2
    exit 2
fi
config=$1
shift
run=${DISTVSD_SWEEP_DIR:-runs/sweep}/${WANDB_SWEEP_ID:-alone}/${WANDB_RUN_ID:-trial}
ranks=${DISTVSD_RANKS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}

# Launchers pass SIGUSR1 on only if they are told, and kill ranks 30 seconds after a SIGTERM, in the middle of a save.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGUSR1}"
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-300}"

set -- -m distvsd.train "$config" "$@" "run.dir=$run"
case ${DISTVSD_LAUNCHER:-torchrun} in
torchrun) torchrun --standalone --nproc-per-node "$ranks" "$@" & ;;
accelerate)
    several=
    if [ "$ranks" -gt 1 ]; then several=--multi_gpu; fi
    # shellcheck disable=SC2086
    accelerate launch $several --num_processes "$ranks" --main_process_port 0 "$@" &
    ;;
*)
    # shellcheck disable=SC2086
    $DISTVSD_LAUNCHER "$@" &
    ;;
esac
launcher=$!

# The agent signals this script, not its children. A signal also ends the first wait, while the ranks are still saving.
told=
trap 'told=yes; kill -TERM "$launcher" 2>/dev/null || true' TERM INT HUP
trap 'told=yes; kill -USR1 "$launcher" 2>/dev/null || true' USR1
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do
    code=0
    wait "$launcher" || code=$?
done
trap - TERM INT HUP USR1

# A launcher ends with 1 after a clean preemption too; the run itself says how it stands.
state=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$run/STATUS.json" 2>/dev/null || echo none)
case $state-$told in
done-*) ;;
preempted-* | none-yes) exit 3 ;; # none: it was told to stop before it had begun
*) exit $((code > 0 ? code : 1)) ;;
esac
distvsd evaluate "$run"
if [ -f "$run/wandb.json" ]; then
    distvsd log "$run" --wandb online --results-only
fi
