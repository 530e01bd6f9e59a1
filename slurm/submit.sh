#!/usr/bin/env bash
# Check a job on the login node, then submit it; --dry-run shows what would run instead.
#
#   slurm/submit.sh [--dry-run] [SBATCH'S OPTIONS...] JOB [--profile NAME] [SCRIPT'S OPTIONS...]
#   slurm/submit.sh --nodes=2 --gpus-per-node=8 finetune --profile fsdp2 --config recipes/configs/finetune_flan_t5_base.yaml
#   slurm/submit.sh --array=0-4 ppo_detox --output_dir outputs/detox    # a run per seed
#
# JOB is a file of slurm/ without .sbatch. A mistake ends in one line and exit code 2 before anything is submitted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/lib.sh
source slurm/lib.sh

read_site
LAUNCH_MODE=check options=() job='' former=''
while (($#)) && [[ -z $job ]]; do
  case $1 in
    --dry-run) LAUNCH_MODE=dry-run ;;
    -*) options+=("$1") ;;
    *)
      if [[ -f slurm/$1.sbatch ]]; then
        job=slurm/$1.sbatch
      elif [[ $former == -* && $former != *=* ]]; then # the value of the option before it
        options+=("$1")
      else
        die "$1: no such job; give one of $(names_in slurm sbatch)"
      fi
      ;;
  esac
  former=$1
  shift
done
[[ -n $job ]] || die "no job named; give one of $(names_in slurm sbatch)"
for argument in "$@"; do
  [[ $argument != --dry-run ]] || LAUNCH_MODE=dry-run
done

# What sbatch will be asked for, as far as the checks and the dry run need it.
all=("${SBATCH_OPTIONS[@]}" "${options[@]}")
for ((i = 0; i < ${#all[@]}; i++)); do
  case ${all[i]} in
    --array* | -a*) export ARRAY_ASKED=yes ;;
    --nodes=* | --gpus-per-node=*) value=${all[i]#*=} ;;&
    -N | --nodes | --gpus-per-node) value=${all[i + 1]:-} ;;&
    --nodes* | -N) export NODES_ASKED=${value##*-} ;;
    --gpus-per-node*) export GPUS_ASKED=${value##*:} ;;
  esac
done
[[ ${NODES_ASKED:-1} =~ ^[1-9][0-9]*$ ]] || die "--nodes: '$NODES_ASKED' is not a number of nodes"
[[ ${GPUS_ASKED:-1} =~ ^[0-9]+$ ]] || die "--gpus-per-node: '$GPUS_ASKED' is not a number of GPUs"

command=(sbatch "${all[@]}" --chdir="$PWD" --output="$LOG_DIR/%x-%j.out" "$job" "$@")
shown=$(
  unset "${!SLURM_@}" # in a shell of an allocation this is still another job
  SLURM_SUBMIT_DIR=$PWD LAUNCH_MODE=$LAUNCH_MODE bash "$job" "$@"
)
if [[ $LAUNCH_MODE == dry-run ]]; then
  printf '%q ' "${command[@]}"
  printf '\n%s\n' "$shown"
  exit
fi
command -v sbatch >/dev/null || die "sbatch: not found; submit on a login node of the cluster, or add --dry-run"
mkdir -p "$LOG_DIR"
unset LAUNCH_MODE ARRAY_ASKED NODES_ASKED GPUS_ASKED
exec "${command[@]}"
