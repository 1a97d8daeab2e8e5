# shellcheck shell=sh
# Functions that the jobs of this folder share. They read it with `.` from the folder in which sbatch was called, because
# Slurm runs a copy of the job's own file in another place.
#
# DISTVSD_RANKS         processes on each node (default: its GPUs)
# DISTVSD_MAX_REQUEUES  how often in a row a job is queued again without a later round being saved (default 3)

# stop TEXT: ends the job with an error that a person must fix. The job is not requeued.
stop() {
    echo "$(date '+%F %T') $1" >&2
    exit 1
}

say() {
    echo "$(date '+%F %T') $1"
}

# job_name: the id of this job for scontrol. For an array task SLURM_JOB_ID may be the id of the whole array.
job_name() {
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# find_run ARGUMENTS: sets `run` to the last run.dir in the arguments, as the program does.
find_run() {
    run=
    for argument in "$@"; do
        case $argument in run.dir=*) run=${argument#run.dir=} ;; esac
    done
    [ -n "$run" ] || stop "give run.dir=DIR: its STATUS.json decides whether the job is requeued"
}

# prepare: sets `ranks`, the number of processes on each node, and the environment of the launchers.
prepare() {
    ranks=${DISTVSD_RANKS:-${SLURM_GPUS_ON_NODE:-}}
    case $ranks in
    '' | 0 | *[!0-9]*) stop "no GPUs were given to this job (SLURM_GPUS_ON_NODE): set DISTVSD_RANKS" ;;
    esac
    export DISTVSD_RANKS="$ranks"
    # By default torchrun and accelerate do not pass SIGUSR1 on, and kill ranks 30 seconds after a signal. Slurm sends its
    # signal 300 seconds before the end: 280 for the save, 20 to requeue.
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=280
    if [ -z "${OMP_NUM_THREADS:-}" ]; then
        cores=${SLURM_CPUS_PER_TASK:-$ranks}
        OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
    fi
    export OMP_NUM_THREADS
    # Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch, and gives a task one core.
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
        export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
    fi
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" PYTHONFAULTHANDLER=1
}

# find_head: sets `head` to the first node, which hosts the rendezvous, and `port` to a port that differs between jobs.
find_head() {
    # No fallback to the name of the node itself: with it each node would train alone.
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) || head=
    [ -n "$head" ] || stop "scontrol show hostnames '$SLURM_JOB_NODELIST' named no node"
    # Below the ephemeral ports of Linux.
    # shellcheck disable=SC2034
    port=$((10000 + SLURM_JOB_ID % 20000))
}

# status_field NAME: a field of STATUS.json, empty without the file. The program writes one field per line.
status_field() {
    sed -n 's/^ *"'"$1"'": "\{0,1\}\([a-z0-9]*\).*/\1/p' "$run/STATUS.json" 2>/dev/null || true
}

# failed_with: the class of the error that ended a failed run, such as PriorError; empty if the program did not raise it.
failed_with() {
    sed -n 's/^ *"message": "\([A-Za-z]*\): .*/\1/p' "$run/STATUS.json" 2>/dev/null || true
}

# supervise COMMAND: runs the ranks and passes signals on to them. Returns if the run is done. Otherwise `settle` decides
# whether to requeue the job, and this shell ends.
supervise() {
    before=$(cat "$run/STATUS.json" 2>/dev/null) || before=
    child=
    early=
    stopping=
    trap 'say SIGUSR1; pass_on' USR1
    trap 'say SIGTERM; stopping=yes; pass_on' TERM INT
    say "starting${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}: $*"
    "$@" &
    child=$!
    [ -z "$early" ] || pass_on
    code=0
    wait "$child" || code=$?
    # A signal ends `wait` while the ranks are still saving.
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    trap '' USR1 TERM INT
    if [ "$code" -ne 0 ]; then
        settle
    fi
    trap - USR1 TERM INT
    say "the run in $run is done"
}

# pass_on: passes every signal on as SIGUSR1, on which the ranks save and end. On SIGTERM srun kills them (seen with Slurm
# 22.05).
pass_on() {
    early=yes
    [ -z "$child" ] || kill -s USR1 "$child" 2>/dev/null || true
}

# settle: decides from STATUS.json what to do after an exit code other than 0, and always ends this shell. The exit code
# itself is not enough, because launchers end with 1 for preempted, failed and refused runs alike.
settle() {
    state=$(status_field state)
    round=$(status_field round)
    round=${round:-0}
    is_new=yes
    if [ "$(cat "$run/STATUS.json" 2>/dev/null)" = "$before" ]; then is_new=no; fi
    case $is_new-$state in
    no- | no-done)
        [ -n "$early" ] && [ -z "$state" ] ||
            stop "nothing was begun in $run (exit code $code): the lines above say why; not requeued"
        # The signal came before the run had begun. This counts as a failure, because a job whose time limit is shorter
        # than the lead of the signal always ends like this.
        mkdir -p "$run" || stop "$run cannot be made; not requeued"
        state=unbegun
        ;;
    no-*) state=unchanged ;; # this start wrote nothing, so the file describes an earlier start
    yes-done)
        say "the run in $run is done, though its launcher ended with $code"
        exit 0
        ;;
    esac
    # These errors (exit code 2) would occur again on every start.
    case $is_new-$state-$(failed_with) in
    yes-failed-ConfigError | yes-failed-UsageError | yes-failed-PriorError)
        stop "refused: $run/STATUS.json says why; the same line would fail again, not requeued"
        ;;
    esac
    # Failures are counted only as long as no later round is saved, because in a long run nodes die from time to time.
    failures=0
    furthest=0
    if [ -f "$run/slurm-failures" ]; then
        read -r failures furthest <"$run/slurm-failures" || stop "$run/slurm-failures is incomplete; remove it"
    fi
    if [ "$round" -gt "$furthest" ]; then
        failures=0
        if [ "$state" != preempted ]; then failures=1; fi
    else
        failures=$((failures + 1))
    fi
    if [ "$round" -gt "$furthest" ]; then furthest=$round; fi
    echo "$failures $furthest" >"$run/slurm-failures" || stop "$run cannot be written to; not requeued"
    limit=${DISTVSD_MAX_REQUEUES:-3}
    say "STATUS.json: $state, $round rounds saved; exit code $code; failures in a row: $failures, allowed: $limit"
    if [ "$failures" -gt "$limit" ]; then
        stop "given up: fix the cause, remove $run/slurm-failures, and submit the same line again"
    fi
    requeue
}

requeue() {
    if [ -n "$stopping" ]; then
        say "not requeued: SIGTERM asked for an end; the same sbatch line continues the run"
        exit 3
    fi
    job=$(job_name)
    now=$(scontrol show job -o "$job" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p') || now=
    case $now in
    RUNNING | '') ;;
    # CANCELLED: requeueing would restart a job that was cancelled. PREEMPTED: Slurm requeues the job itself.
    *) stop "the job is $now; not requeued, the same sbatch line continues the run" ;;
    esac
    scontrol requeue "$job" || stop "scontrol requeue $job failed; the same sbatch line continues the run"
    say "requeued $job"
    exit 0
}
