#!/bin/sh
# Run a command, and again while it ends for a reason that a new start may cure: another process of the run is gone (75), or a
# signal that nobody here sent, such as SIGKILL for want of memory (129 and more). Not again after success (0), a mistake of the
# user's (2) or any other error, and not when asked to stop (130, 143). The last code is the exit code.
#   RESTARTS=20 sh launch/restart.sh sh launch/processes.sh 2 --config=... --workdir=...
#   RESTARTS   how many times at most (10)
#   PAUSE      seconds before each (10)
set -u
left="${RESTARTS:-10}"
stop=""
trap 'stop=1; kill -TERM "$pid" 2>/dev/null' INT TERM

while :; do
    "$@" &
    pid=$!
    wait "$pid"
    code=$?
    while kill -0 "$pid" 2>/dev/null; do  # a signal ended the wait, not the command
        wait "$pid"
        code=$?
    done
    case "$code" in
        75|129|13[1-9]|14[0-24-9]|15[0-9]|16[0-9]) ;;
        *) stop=1 ;;
    esac
    if [ -n "$stop" ] || [ "$left" -le 0 ]; then break; fi
    left=$((left - 1))
    echo "[restart] ended with code $code; again in ${PAUSE:-10} s, then $left more times at most" >&2
    sleep "${PAUSE:-10}" &
    pid=$!
    wait "$pid"
    if [ -n "$stop" ]; then break; fi
done
echo "[restart] ended with code $code" >&2
exit "$code"
