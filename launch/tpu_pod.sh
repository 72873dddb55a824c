#!/usr/bin/env bash
# A run of main.py on a TPU slice, one host or many, by gcloud.
#
#   launch/tpu_pod.sh [--dry_run] create|copy|follow|stop|collect|delete|watch
#   launch/tpu_pod.sh [--dry_run] run --config=configs/xray.py:paper --mode=train,sample,audit --workdir=/disk/paper
#   launch/tpu_pod.sh [--dry_run] all --config=... --mode=... --workdir=/disk/...     (create, copy, run, collect, delete)
#
# The slice: NAME, ZONE, TYPE (v5litepod-16, v4-32, v6e-16), VERSION (its software: tpu-ubuntu2204-base, v2-alpha-tpuv6e),
# SPOT=1. More than one host needs a disk that all of them see: NFS=SERVER:/SHARE is mounted as /disk. RESULTS is the
# folder here that `collect` copies /disk into. All hosts start the same command and find each other by the TPU's own
# metadata. `run` starts it detached and follows it: where the connection breaks it runs on, and `follow` looks again;
# `stop`, or SIGTERM here, has it save and end. A maintenance event does too, with code 75, and then `run` starts it again;
# where the slice itself was taken, create another: the same command goes on. `all` fails where NAME exists, and deletes
# the slice only once the run is done and its results are here; code 3 or 4 is the verdict of a run that is done.
# A study on slices: python -m launch.ablate --main='launch/tpu_pod.sh run' ... where /disk is mounted here as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${NAME:=facsimile}" "${ZONE:=us-central2-b}" "${TYPE:=v4-8}" "${VERSION:=tpu-ubuntu2204-base}" "${RESULTS:=runs}"

dry=""
if [ "${1:-}" = --dry_run ]; then dry=1 && shift; fi
[ $# -gt 0 ] || { sed -n '2,17s/^# \{0,1\}//p' "launch/tpu_pod.sh" >&2 && exit 2; }

execute() { # prints a command, and runs it unless --dry_run
  printf '%q ' "$@" && echo
  [ "$dry" ] || "$@"
}
on_all() { execute gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

create() {
  execute gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$VERSION" \
    ${SPOT:+--spot}
}
copy() {
  execute git archive --format=tar.gz --output=/tmp/facsimile.tar.gz HEAD
  execute gcloud compute tpus tpu-vm scp /tmp/facsimile.tar.gz "$NAME:" --zone="$ZONE" --worker=all
  on_all "set -e; mkdir -p facsimile; tar -xzf facsimile.tar.gz -C facsimile; cd facsimile
    curl -LsSf https://astral.sh/uv/install.sh | sh; export PATH=\$HOME/.local/bin:\$PATH
    [ -d .venv ] || uv venv -q --python 3.12; uv pip install -q -r requirements.txt; uv pip install -q 'jax[tpu]'
    sudo mkdir -p /disk; ${NFS:+sudo apt-get install -qq -y nfs-common; mountpoint -q /disk || sudo mount -t nfs $NFS /disk;}
    sudo chown \$(id -u) /disk"
}

# On each host: run.pid is main.py's, run.log what it says, run.code its exit code once it has ended, run.stop there if it
# was told to stop by hand.
start() {
  # shellcheck disable=SC2016 # the hosts' shells expand it
  local detached='"$@" & echo $! >run.pid; wait $!; echo $? >run.code'
  on_all "cd facsimile; kill -0 \$(cat run.pid 2>/dev/null) 2>/dev/null && { echo 'a run is there already: follow or stop it' >&2; exit 1; }
    rm -f run.code run.stop run.pid; export FACSIMILE_METADATA=http://metadata.google.internal FACSIMILE_STOPPED_CODE=75
    setsid nohup bash -c '$detached' run >run.log 2>&1 </dev/null .venv/bin/python main.py $(printf '%q ' "$@") &
    until [ -e run.pid ]; do sleep 0.1; done"
}
follow() {
  on_all "cd facsimile; tail -n +1 -f --pid=\$(cat run.pid) run.log; until [ -e run.code ]; do sleep 0.1; done
    [ ! -e run.stop ] || { echo 'stopped by hand; the same command goes on' >&2; exit 130; }; exit \$(cat run.code)"
}
stop() {
  on_all "cd facsimile; touch run.stop; kill -TERM \$(cat run.pid); tail -f --pid=\$(cat run.pid) /dev/null"
}
run() { # its exit code is main.py's
  trap 'stop; exit 75' TERM
  for _ in {1..50}; do
    start "$@"
    code=0
    set -m # a process group of its own, which ends with this script
    follow </dev/null & # in the background: SIGTERM waits for the end of what runs in the foreground
    set +m
    following=$!
    trap 'kill -- "-$following" || true' EXIT
    wait "$following" || code=$?
    trap - EXIT
    [ "$code" = 75 ] || break
  done
  case $code in 0 | 3 | 4) ;; *) exit "$code" ;; esac
}
collect() {
  execute mkdir -p "$RESULTS"
  execute gcloud compute tpus tpu-vm scp --recurse "$NAME:/disk/*" "$RESULTS" --zone="$ZONE" --worker=0
}
delete() { execute gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet; }
watch() { execute gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format="value(state,health)"; }

code=0
what=$1 && shift
case $what in
  create) create ;;
  copy) copy ;;
  run) run "$@" ;;
  follow) follow ;;
  stop) stop ;;
  collect) collect ;;
  delete) delete ;;
  watch) watch ;;
  all) # a step that fails ends it, and what is there stays
    create
    copy
    run "$@"
    collect
    delete
    ;;
  *) echo "error: $what: use create, copy, run, follow, stop, collect, delete, watch or all" >&2 && exit 2 ;;
esac
exit "$code"
