#!/bin/sh
# Set up this machine and run the tests, in one command; arguments go to pytest.
#   sh launch/test.sh -m long     several processes, broken runs, buckets, more pipelines: left out otherwise
#   EXTRAS   more than "test", such as EXTRAS=test,parity to compare with the PyTorch references
set -eu
cd "$(dirname "$0")/.."
EXTRAS="${EXTRAS:-test}"
. launch/setup.sh
exec "$VENV/bin/python" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
