#!/bin/sh
# Set up this machine and train with several processes of one run on it:
#   sh launch/processes.sh 2                                    digits, in runs/digits
#   DEVICES=4 sh launch/processes.sh 2 --config=... --workdir=...
#   EXTRAS=cuda DEVICES=1 sh launch/processes.sh 8 --config=... --workdir=...     one for each of 8 GPUs
#   DEVICES   devices for each process (1): as many virtual ones on a CPU; on GPUs, process i takes those from i * DEVICES on
#   GRACE     seconds that the others have to end by themselves, once one has failed (150); more than --process_timeout
# The exit code is that of the process that failed first; see launch/processes.py.
set -eu
cd "$(dirname "$0")/.."
N="${1:?give the number of processes}"
shift
if [ $# -eq 0 ]; then set -- --config=configs/digits.py --workdir=runs/digits; fi
. launch/setup.sh
exec "$VENV/bin/python" launch/processes.py "$N" "$VENV/bin/python" -m ldm_jax.main "$@"
