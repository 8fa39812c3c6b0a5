#!/bin/sh
# Set up this machine and train, in one command:
#   sh launch/local.sh                                   digits, in runs/digits
#   sh launch/local.sh --config=configs/ldm_cifar.py:smoke --workdir=runs/cifar
#   EXTRAS=cuda sh launch/local.sh --config=configs/ddpm_cifar.py --workdir=runs/ddpm      on NVIDIA GPUs
set -eu
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then set -- --config=configs/digits.py --workdir=runs/digits; fi
. launch/setup.sh
exec "$VENV/bin/python" -m ldm_jax.main "$@"
