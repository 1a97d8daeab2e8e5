#!/bin/sh
# Trains on MIN to MAX machines. Run the same line on each. When a machine dies or joins, all processes restart from the
# newest checkpoint, with the machines that are then available.
#
#   DISTVSD_NODES=2:4 DISTVSD_HEAD=HOST:PORT sh launch/torchrun/elastic.sh CONFIG [key=value ...]
#
# DISTVSD_NODES     MIN:MAX
# DISTVSD_HEAD      host:port of one of them, for the rendezvous. If this machine dies, all end
# DISTVSD_RANKS     processes on this machine (default: one per GPU; required without GPUs)
# DISTVSD_JOB       any word of your own, the same on all machines (default distvsd)
# DISTVSD_RESTARTS  how often dead processes are restarted (default 3). Restarts for joining machines do not count
# When there are MIN machines, torchrun waits half a minute for more; PET_RDZV_CONF=last_call_timeout=SECONDS changes that.
# To stop the run send the signal to torchrun. A signal to one process ends it with exit code 3, and torchrun restarts it.
# torchrun ends with 1 if any process did not end with 0, also after a clean preemption. RUN/STATUS.json has the state.
set -eu

case ${DISTVSD_NODES:-} in
*[!0-9:]* | *:*:* | :* | *: | '') nodes= ;;
*:*) nodes=$DISTVSD_NODES ;;
*) nodes= ;;
esac
if [ $# -lt 1 ] || [ -z "$nodes" ]; then
    echo "usage: DISTVSD_NODES=MIN:MAX DISTVSD_HEAD=HOST:PORT sh launch/torchrun/elastic.sh CONFIG [key=value ...]" >&2
    exit 2
fi
# See fixed.sh.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-300}"

exec torchrun --nnodes "$nodes" --nproc-per-node "${DISTVSD_RANKS:-gpu}" --max-restarts "${DISTVSD_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${DISTVSD_HEAD:?is HOST:PORT of one of the machines}" \
    --rdzv-id "${DISTVSD_JOB:-distvsd}" -m distvsd.train "$@"
