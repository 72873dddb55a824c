#!/usr/bin/env bash
# A run of main.py on a TPU slice, one host or many, by gcloud.
#
#   launch/tpu_pod.sh [--dry_run] create|copy|collect|delete|watch
#   launch/tpu_pod.sh [--dry_run] run --config=configs/xray.py:paper --mode=train,sample,audit --workdir=/disk/paper
#   launch/tpu_pod.sh [--dry_run] all --config=... --mode=... --workdir=/disk/...     (create, copy, run, collect, delete)
#
# The slice: NAME, ZONE, TYPE (v5litepod-16, v4-32, v6e-16), VERSION (its software: tpu-ubuntu2204-base, v2-alpha-tpuv6e),
# SPOT=1. More than one host needs a disk that all of them see: NFS=SERVER:/SHARE is mounted as /disk. RESULTS is the
# folder here that `collect` copies /disk into. All hosts start the same command and find each other by the TPU's own
# metadata; a maintenance event saves and ends them with code 0, and the same command goes on, on another slice too.
# A study on slices: python -m launch.ablate --main='launch/tpu_pod.sh run' ... where /disk is mounted here as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${NAME:=facsimile}" "${ZONE:=us-central2-b}" "${TYPE:=v4-8}" "${VERSION:=tpu-ubuntu2204-base}" "${RESULTS:=runs}"

dry=""
if [ "${1:-}" = --dry_run ]; then dry=1 && shift; fi
[ $# -gt 0 ] || { sed -n '2,16s/^# \{0,1\}//p' "launch/tpu_pod.sh" >&2 && exit 2; }

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
run() {
  on_all "cd facsimile && FACSIMILE_METADATA=http://metadata.google.internal .venv/bin/python main.py $(printf '%q ' "$@")"
}
collect() {
  execute mkdir -p "$RESULTS"
  execute gcloud compute tpus tpu-vm scp --recurse "$NAME:/disk/*" "$RESULTS" --zone="$ZONE" --worker=0
}
delete() { execute gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet; }
watch() { execute gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" --format="value(state,health)"; }

what=$1 && shift
case $what in
  create | copy | collect | delete | watch) "$what" ;;
  run) run "$@" ;;
  all)
    create && copy && run "$@"
    collect && delete
    ;;
  *) echo "error: $what: use create, copy, run, collect, delete, watch or all" >&2 && exit 2 ;;
esac
