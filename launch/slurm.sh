#!/usr/bin/env bash
# GPU nodes under Slurm: submits a batch job that trains with one process per GPU and puts itself back into the queue
# when it was stopped or a process died. Slurm itself does so when a node fails or the job is preempted (--requeue).
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck source=launch/restart.sh
source "$here/restart.sh"

usage() {
  cat <<'HELP'
usage: launch/slurm.sh [options] CONFIG --run.dir /shared/RUN [overrides of moma train]

  --nodes N         nodes (1)
  --gpus G          GPUs of each node, and processes (8)
  --cpus C          CPU cores of each process (8)
  --time T          time limit of one stay in the nodes, as sbatch has it (24:00:00)
  --name NAME       of the job (moma)
  --notice S        seconds before the time limit at which all processes are told to save (300)
  --restarts R      how often the job puts itself back into the queue (20)
  --sbatch OPTION   one more option for sbatch, such as --partition=gpu; may be repeated
  --dry-run         print the commands and run nothing
  -h, --help        this text

Needs sbatch, and on the nodes srun, scontrol and moma on PATH: activate its environment before you submit.
This folder, CONFIG and the run's directory must be on a file system that all nodes see. To end a job: scancel JOB.
HELP
}

nodes=1 gpus=8 cpus=8 time=24:00:00 name=moma notice=300 restarts=20 inside="" sbatch_options=()
while [[ ${1:-} == -* ]]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=1 && shift && continue ;;
    --inside) inside=1 && shift && continue ;; # the job itself
    --sbatch) given "$1" "${2:-}" && sbatch_options+=("$2") && shift 2 && continue ;;
    --nodes | --gpus | --cpus | --notice) positive "$1" "${2:-}" ;;
    --time | --name) given "$1" "${2:-}" ;;
    --restarts) whole "$1" "${2:-}" ;;
    *) refuse "$1: no such option; -h lists them" ;;
  esac
  declare "${1#--}=$2"
  shift 2
done
given CONFIG "${1:-}"

# JAX finds the processes by Slurm's variables and gives each the GPU of its local number, so all must see all GPUs of
# their node (no --gpu-bind) and those of a node have neighbouring numbers (block). A process that ends does not take
# the others along at once, as they may be saving; where one died, JAX's heartbeat ends them, else Slurm after --wait
# seconds.
train=(srun --distribution=block --gpu-bind=none --cpus-per-task "$cpus" --kill-on-bad-exit=0 --wait="$notice"
  moma train "$@")

submit() {
  local job=("$here/slurm.sh" --inside --cpus "$cpus" --notice "$notice" --restarts "$restarts" "$@")
  require sbatch
  # Without B: the signal goes to srun's processes and not to this script, which could not pass it on to srun: that
  # kills its processes when it gets one.
  run sbatch --job-name "$name" --nodes "$nodes" --ntasks-per-node "$gpus" --gpus-per-node "$gpus" \
    --cpus-per-task "$cpus" --time "$time" --signal "TERM@$notice" --requeue --open-mode append \
    "${sbatch_options[@]}" --wrap "$(quoted "${job[@]}")"
  if [[ $dry_run ]]; then
    echo "# in the job:"
    quoted "${train[@]}"
    echo "# there after exit code 75, 143 or a dead process, at most $restarts times:"
    # shellcheck disable=SC2016 # printed, not run
    echo 'scontrol requeue "$SLURM_JOB_ID"'
  fi
}

train_in_job() {
  [[ ${SLURM_JOB_ID:-} ]] || refuse "--inside: only the job itself uses it"
  require srun scontrol moma
  "${train[@]}" || code=$?
  if restart "${SLURM_RESTART_COUNT:-0}" "$restarts"; then
    scontrol requeue "$SLURM_JOB_ID" # which ends this script
  fi
  exit "$code"
}

if [[ $inside ]]; then train_in_job; else submit "$@"; fi
