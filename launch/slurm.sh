#!/usr/bin/env bash
# A study as a SLURM array: a task for each chain of runs, then a job that writes the result.
#
#   launch/slurm.sh [--dry_run] --study=size --config=configs/brain.py --workdir=/disk/size [FLAG ...] [-- SBATCH_OPTION ...]
#   launch/slurm.sh --study=size --config=configs/brain.py --workdir=/disk/size -- --gres=gpu:1 --time=4:00:00 --partition=gpu
#
# FLAGs are those of `python -m launch.ablate`. The disk of --workdir must be one that all nodes see, with file locks
# (NFS 4; Lustre mounted with flock). A task that is preempted, or told to stop two minutes before its time is over, saves
# and is queued again. Given again, the command goes on: what is done is skipped. PYTHON names the interpreter.
#
# One run on several nodes needs no script: sbatch --nodes=4 --ntasks-per-node=1 --gres=gpu:8 --wrap='srun python main.py ...'
# has one task a node, which takes all GPUs of the node. A task for each GPU will do too, whether it sees that one alone, as
# with --gpus-per-task=1, or all of its node's.
set -euo pipefail
python=${PYTHON:-python}

if [ "${1:-}" = --task ]; then # inside a task of the array, where this file is a copy in slurmd's own folder
  cd "$SLURM_SUBMIT_DIR"       # the repository: sbatch was called from there
  shift
  code=0
  srun --ntasks=1 "$python" -m launch.ablate "$@" --only="$SLURM_ARRAY_TASK_ID" || code=$?
  if [ "$code" = 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then # told to stop before it was done
    exec scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  fi
  exit "$code"
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry=""
study=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  if [ "$1" = --dry_run ]; then dry=1; else study+=("$1"); fi
  shift
done
[ $# -eq 0 ] || shift

command=(sbatch --parsable --requeue --signal=TERM@120 --open-mode=append --job-name=study "$@")
tasks=$("$python" -m launch.ablate "${study[@]}" --count)
array=("${command[@]}" --array="0-$((tasks - 1))" "$PWD/launch/slurm.sh" --task "${study[@]}")
result=(--wrap="$(printf '%q ' "$python" -m launch.ablate "${study[@]}" --collect)")
if [ "$dry" ]; then
  printf '%q ' "${array[@]}" && echo
  printf '%q ' "${command[@]}" --dependency=afterany:ARRAY "${result[@]}" && echo
  echo "# the array's tasks:"
  exec "$python" -m launch.ablate "${study[@]}" --dry_run
fi
job=$("${array[@]}")
"${command[@]}" --dependency="afterany:${job%%;*}" "${result[@]}" >/dev/null
echo "array $job: $tasks tasks; study.html follows them"
