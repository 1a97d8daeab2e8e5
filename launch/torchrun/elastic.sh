#!/bin/sh
# Between MIN and MAX machines; run the same line on each. When one dies or joins later, all start again from the newest
# checkpoint, with the ranks that are there then.
#
#   DISTVSD_NODES=2:4 DISTVSD_HEAD=HOST:PORT sh launch/torchrun/elastic.sh CONFIG [key=value ...]
#
# DISTVSD_NODES     MIN:MAX
# DISTVSD_HEAD      host:port of one of them, where the machines meet. It must stay alive: without it all end
# DISTVSD_RANKS     processes on this machine (default: one for each of its GPUs; say how many where there is none)
# DISTVSD_JOB       any word of your own, the same on all machines (default distvsd)
# DISTVSD_RESTARTS  how often processes that died are started again (default 3); machines that join do not count
# torchrun waits half a minute for more machines once there are MIN: PET_RDZV_CONF=last_call_timeout=SECONDS.
# A signal to one process ends it with exit code 3. That counts as a death, and it is started again: signal torchrun.
# torchrun ends with 1 whenever a process did not end with 0, also after a clean preemption: read RUN/STATUS.json.
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
