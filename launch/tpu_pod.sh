#!/bin/sh
# Train on every host of a TPU slice, over ssh from this machine:
#   ZONE=us-central2-b sh launch/tpu_pod.sh start TPU --config=configs/ldm_cifar.py --workdir=gs://BUCKET/cifar
#   ZONE=us-central2-b sh launch/tpu_pod.sh status TPU            what each host does
#   ZONE=us-central2-b sh launch/tpu_pod.sh logs TPU [-f]         the log of host $WORKER (0); what follows goes to tail
#   ZONE=us-central2-b sh launch/tpu_pod.sh stop TPU              SIGTERM to all, then waits until they have saved and ended
# Fill in: the TPU's name, ZONE, and a workdir that all hosts see. `start` copies this checkout, installs it once, and leaves the
# run behind: a lost connection does not end it. On each host launch/restart.sh starts it again when another host's process is gone.
#   PROJECT   the Google Cloud project; gcloud's own setting if not given
#   EXTRAS    what is installed (tpu)           DIR    where on the hosts (ldm_jax)
#   STOP_WAIT seconds that `stop` waits (300)   TPU_KIND   tpu-vm, or queued-resources with the name of the request
# When a TPU was preempted, make one again and give the same `start`; it goes on from the newest checkpoint in the workdir:
#   gcloud compute tpus queued-resources delete TPU --zone=ZONE --force --quiet
#   gcloud compute tpus queued-resources create TPU --node-id=TPU --zone=ZONE --accelerator-type=v5litepod-16 \
#       --runtime-version=v2-alpha-tpuv5-lite --spot
#   gcloud compute tpus queued-resources describe TPU --zone=ZONE --format="value(state.state)"        until it says ACTIVE
set -eu
cd "$(dirname "$0")/.."
usage="sh launch/tpu_pod.sh start|status|logs|stop TPU [flags]"
what="${1:?$usage}"
tpu="${2:?$usage}"
shift 2
dir="${DIR:-ldm_jax}"
kind="${TPU_KIND:-tpu-vm}"

quoted() {  # the arguments as words of a shell line
    for word in "$@"; do
        printf "'%s' " "$(printf %s "$word" | sed "s/'/'\\\\''/g")"
    done
}

tpus() {  # ssh|scp ARGUMENTS
    verb="$1"
    shift
    if [ "$kind" = queued-resources ]; then set -- --node=all "$@"; fi
    gcloud compute tpus "$kind" "$verb" "$@" --zone="${ZONE:?give the zone: ZONE=us-central2-b sh launch/tpu_pod.sh ...}" \
        ${PROJECT:+--project="$PROJECT"}
}

on() {  # WORKER|all LINE
    tpus ssh "$tpu" --worker="$1" --command="dir=$(quoted "$dir"); $2"
}

# Text for the hosts' shell: what is expanded here is only what quoted() gives.
# shellcheck disable=SC2016
begin='mkdir -p "$dir" && cd "$dir" || exit 1
if [ -e pid ] && kill -0 "$(cat pid)" 2>/dev/null; then
    echo "error: a run is under way on $(hostname); stop it first: sh launch/tpu_pod.sh stop" >&2
    exit 2
fi'
# shellcheck disable=SC2016
install='tar -xzf "$HOME/ldm_jax_source.tgz" || exit 1
new_enough="import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"
for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c "$new_enough" 2>/dev/null; then PYTHON="$candidate"; break; fi
done
if [ -z "${PYTHON:-}" ]; then
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y python3.11-venv || exit 1
fi
. launch/setup.sh'
# shellcheck disable=SC2016
detach='nohup setsid sh launch/restart.sh "$VENV/bin/python" -m ldm_jax.main "$@" </dev/null >>log 2>&1 &
echo $! >pid
sleep 1
echo "$(hostname): started, process $(cat pid), log in $dir/log"'
# shellcheck disable=SC2016
report='cd "$dir" || exit 1
if [ -e pid ] && kill -0 "$(cat pid)" 2>/dev/null; then echo "$(hostname): runs"; else echo "$(hostname): $(tail -n 1 log)"; fi'
# shellcheck disable=SC2016
finish='cd "$dir" && [ -e pid ] || { echo "$(hostname): nothing was started"; exit 0; }
kill -TERM "$(cat pid)" 2>/dev/null
for _ in $(seq "$wait"); do
    if ! kill -0 "$(cat pid)" 2>/dev/null; then echo "$(hostname): $(tail -n 1 log)"; exit 0; fi
    sleep 1
done
echo "error: $(hostname): still there after $wait s" >&2
exit 1'

case "$what" in
    start)
        source="$(mktemp -d)"
        trap 'rm -rf "$source"' EXIT
        tar -czf "$source/ldm_jax_source.tgz" --exclude=__pycache__ --exclude='*.egg-info' \
            ldm_jax configs launch setup.cfg pyproject.toml README.md
        on all "$begin"
        tpus scp "$source/ldm_jax_source.tgz" "$tpu:" --worker=all
        on all "$begin
EXTRAS=$(quoted "${EXTRAS-tpu}"); RESTARTS=$(quoted "${RESTARTS:-10}"); LDM_JAX_DISTRIBUTED=1; export RESTARTS LDM_JAX_DISTRIBUTED
$install
set -- $(quoted "$@")
$detach" ;;
    status) on all "$report" ;;
    logs)
        if [ $# -eq 0 ]; then set -- -n 100; fi
        on "${WORKER:-0}" "cd \"\$dir\" && tail $(quoted "$@") log" ;;
    stop) on all "wait=$(quoted "${STOP_WAIT:-300}"); $finish" ;;
    *)
        echo "error: $what is not one of start, status, logs, stop: $usage" >&2
        exit 2 ;;
esac
