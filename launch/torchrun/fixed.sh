#!/bin/sh
# Trains on a fixed number of machines, one by default. Run the same line on each of them.
#
#   sh launch/torchrun/fixed.sh CONFIG [key=value ...]
#
# DISTVSD_RANKS  processes on this machine (default: one per GPU; required without GPUs)
# DISTVSD_NODES  machines (default 1). With more than one, also:
# DISTVSD_HEAD   host:port of one of them. The port must be free there and reachable from all
# DISTVSD_JOB    any word of your own, the same on all machines (default distvsd)
# DISTVSD_RESTARTS  how often dead processes are restarted on one machine (default 0)
# torchrun ends with 1 if any process did not end with 0, also after a clean preemption. RUN/STATUS.json has the state.
# If a machine loses its connection to the others, its ranks end after parallel.timeout_s. Its torchrun ends only when the
# kernel gives the connection up, after a quarter of an hour (100 seconds with sysctl -w net.ipv4.tcp_retries2=8).
set -eu

if [ $# -lt 1 ]; then
    echo "usage: [DISTVSD_NODES=N DISTVSD_HEAD=HOST:PORT] sh launch/torchrun/fixed.sh CONFIG [key=value ...]" >&2
    exit 2
fi
# By default SIGUSR1 kills torchrun and leaves its processes running, and torchrun kills its processes 30 seconds after a
# signal, possibly during a save.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-300}"

set -- --nproc-per-node "${DISTVSD_RANKS:-gpu}" --max-restarts "${DISTVSD_RESTARTS:-0}" -m distvsd.train "$@"
if [ "${DISTVSD_NODES:-1}" = 1 ]; then
    exec torchrun --standalone "$@" # finds a free port by itself
fi
# The address has no default: with localhost each machine would train alone, and all would write into one folder.
exec torchrun --nnodes "$DISTVSD_NODES" --rdzv-backend c10d \
    --rdzv-endpoint "${DISTVSD_HEAD:?is HOST:PORT of one of the machines}" --rdzv-id "${DISTVSD_JOB:-distvsd}" "$@"
