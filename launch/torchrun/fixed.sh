#!/bin/sh
# A fixed number of machines, one by default; run the same line on each of them.
#
#   sh launch/torchrun/fixed.sh CONFIG [key=value ...]
#
# DISTVSD_RANKS  processes on this machine (default: one for each of its GPUs; say how many where there is none)
# DISTVSD_NODES  machines (default 1). With more than one, also:
# DISTVSD_HEAD   host:port of one of them; the port free on it and reachable from all
# DISTVSD_JOB    any word of your own, the same on all machines (default distvsd)
# DISTVSD_RESTARTS  how often processes that died are started again on one machine (default 0)
# torchrun ends with 1 whenever a process did not end with 0, also after a clean preemption: read RUN/STATUS.json.
# A machine cut off from the others: its ranks end after parallel.timeout_s, its torchrun only when the kernel gives up
# that connection, after a quarter of an hour (100 seconds with sysctl -w net.ipv4.tcp_retries2=8).
set -eu

if [ $# -lt 1 ]; then
    echo "usage: [DISTVSD_NODES=N DISTVSD_HEAD=HOST:PORT] sh launch/torchrun/fixed.sh CONFIG [key=value ...]" >&2
    exit 2
fi
# torchrun passes SIGUSR1 on only if it is told to; otherwise it dies of it and leaves its processes behind. By default
# it kills them 30 seconds after a signal, in the middle of a save.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-300}"

set -- --nproc-per-node "${DISTVSD_RANKS:-gpu}" --max-restarts "${DISTVSD_RESTARTS:-0}" -m distvsd.train "$@"
if [ "${DISTVSD_NODES:-1}" = 1 ]; then
    exec torchrun --standalone "$@" # finds a free port by itself
fi
# No default for the address: machines that each fall back to localhost train alone, all into one folder.
exec torchrun --nnodes "$DISTVSD_NODES" --rdzv-backend c10d \
    --rdzv-endpoint "${DISTVSD_HEAD:?is HOST:PORT of one of the machines}" --rdzv-id "${DISTVSD_JOB:-distvsd}" "$@"
