#!/usr/bin/env bash
# On a Kubernetes cluster: a study as an indexed job, a pod for each chain of runs; or one run on TPU slices by xpk.
#
#   launch/gke.sh [--dry_run] study --study=size --config=configs/brain.py --workdir=/disk/size [FLAG ...]
#   launch/gke.sh [--dry_run] run --config=configs/xray.py:paper --mode=train,sample,audit --workdir=/disk/paper
#
# IMAGE: a container with this repository in /facsimile and its requirements installed, and jax[cuda13] for GPUs (jax[cuda12]
# with an older driver), jax[tpu] for TPUs. CLAIM: a ReadWriteMany volume claim with file locks (Filestore), mounted as /disk.
# NAME: of the job. study: GPUS a pod (0: none), PODS at a time. run: CLUSTER, TPU (v5litepod-16, v6e-16) and SLICES of xpk;
# STORAGE: xpk's name of the disk. What is told to stop saves, ends with code 75 and is started again, at most 50 times.
# `study` given again deletes its job, waits until the job's pods have saved, and makes the job anew, which goes on with what
# is not done. `python -m launch.ablate ... --collect` writes the result. Of `run` the verdict is in audit.json: to Kubernetes
# a run that is done is no failure, whatever it found.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${NAME:=facsimile}" "${CLAIM:=disk}" "${GPUS:=1}" "${PODS:=8}" "${SLICES:=1}"

dry=""
if [ "${1:-}" = --dry_run ]; then dry=1 && shift; fi
[ $# -gt 0 ] || { sed -n '2,14s/^# \{0,1\}//p' launch/gke.sh >&2 && exit 2; }
what=$1 && shift
case $what in
  study)
    : "${IMAGE:?set IMAGE to the container}"
    runs=$("${PYTHON:-python}" -m launch.ablate "$@" --count)
    flags=$(printf '%q ' "$@")
    flags=${flags//\'/\'\'} # as single-quoted YAML has it
    manifest=$(sed -e "s|NAME|$NAME|; s|IMAGE|$IMAGE|; s|CLAIM|$CLAIM|; s|GPUS|$GPUS|; s|PODS|$PODS|; s|RUNS|$runs|" launch/gke.yaml)
    manifest=${manifest/FLAGS/"$flags"}
    delete=(kubectl delete job "$NAME" --ignore-not-found --cascade=foreground)
    if [ "$dry" ]; then
      printf '%q ' "${delete[@]}" && echo
      echo "kubectl apply -f -" && echo "$manifest"
    else
      "${delete[@]}" # a job cannot be changed, and one that is over would not start again
      kubectl apply -f - <<<"$manifest"
    fi
    ;;
  run)
    command=(xpk workload create --workload="$NAME" --cluster="${CLUSTER:?set CLUSTER}" --tpu-type="${TPU:?set TPU}"
      --num-slices="$SLICES" --docker-image="${IMAGE:?set IMAGE to the container}" --max-restarts=50 ${STORAGE:+--storage="$STORAGE"}
      --command="cd /facsimile; export FACSIMILE_METADATA=http://metadata.google.internal FACSIMILE_STOPPED_CODE=75; \
code=0; python main.py $(printf '%q ' "$@") || code=\$?; case \$code in 3 | 4) exit 0 ;; *) exit \$code ;; esac")
    printf '%q ' "${command[@]}" && echo
    [ "$dry" ] || "${command[@]}"
    ;;
  *) echo "error: '$what': use study or run" >&2 && exit 2 ;;
esac
