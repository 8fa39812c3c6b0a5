#!/bin/sh
# First stages that keep more and fewer values, KL and VQ, trained alike and drawn as one curve with JPEG beside them.
#   sh launch/first_stages.sh DIR [flags of ldm_jax.main for every one, such as --config.train.steps=2000]
set -eu
cd "$(dirname "$0")/.."
DIR="${1:?give the directory for the runs}"
shift
EXTRAS="${EXTRAS:-plot}"
. launch/setup.sh

train() {  # NAME [flags]
    name="$1"
    shift
    "$VENV/bin/python" -m ldm_jax.main --config=configs/autoencoder_cifar.py:laptop --workdir="$DIR/$name" "$@"
}

for channels in 2 4 8 16; do
    train "kl_$channels" --config.autoencoder.kl.latent_channels=$channels "$@"
done
train vq_8 --config.autoencoder.name=vq --config.autoencoder.vq.factor=8 "--config.autoencoder.vq.mults=(1,2,4,4)" "$@"
train vq_4 --config.autoencoder.name=vq "$@"
train vq_2 --config.autoencoder.name=vq --config.autoencoder.vq.factor=2 "--config.autoencoder.vq.mults=(1,2)" "$@"
"$VENV/bin/python" -m ldm_jax.evaluation.curve --out="$DIR/first_stages.png" "$DIR"/kl_* "$DIR"/vq_*
