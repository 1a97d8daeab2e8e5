#!/bin/sh
# One trial of a sweep: trains on this machine's ranks, evaluates, and sends the evaluation to the trial's run in wandb.
#
#   sh launch/sweep/trial.sh CONFIG [key=value ...]     called by the agent, see the yaml files in this folder
#
# DISTVSD_LAUNCHER  torchrun (default), accelerate, or the start of another command that takes -m MODULE ARGS, such as
#                   `srun torchrun --nnodes 4 ...`. Every rank gets the same command line; only rank 0 opens wandb
# DISTVSD_RANKS     processes on this machine (default: the number of its GPUs, or 1)
# DISTVSD_SWEEP_DIR folder of the trials (default runs/sweep). A trial that is queued again continues in its own folder
# Exit codes: 0 done; 3 preempted, the same command continues the trial; all others failed.
set -eu

if [ $# -lt 1 ]; then
    echo "usage: sh launch/sweep/trial.sh CONFIG [key=value ...]" >&2
    exit 2
fi
config=$1
shift
run=${DISTVSD_SWEEP_DIR:-runs/sweep}/${WANDB_SWEEP_ID:-alone}/${WANDB_RUN_ID:-trial}
ranks=${DISTVSD_RANKS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}

# By default launchers do not pass SIGUSR1 on, and kill ranks 30 seconds after a SIGTERM, possibly during a save.
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

# The agent signals this script and not its children. A signal also ends `wait`, while the ranks are still saving.
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

# A launcher ends with 1 after a clean preemption too, so the state comes from STATUS.json.
state=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$run/STATUS.json" 2>/dev/null || echo none)
case $state-$told in
done-*) ;;
preempted-* | none-yes) exit 3 ;; # none-yes: the signal came before the run had begun
*) exit $((code > 0 ? code : 1)) ;;
esac
distvsd evaluate "$run"
if [ -f "$run/wandb.json" ]; then
    distvsd log "$run" --wandb online --results-only
fi
