#!/usr/bin/env bash
# Submit the steps of a pipeline file that are not done as a chain of jobs: each starts when those it needs have ended
# well, with the sbatch options of its own `slurm:` list, and goes away when one of them failed.
#
#   slurm/pipeline.sh [--dry-run] [SBATCH'S OPTIONS...] -- --config compress/configs/pipeline_embedded.yaml [--set NAME=VALUE]
#
# What follows -- goes to compress/pipeline.py. --dry-run shows the jobs instead. Prints a line per job: number and step.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/lib.sh
source slurm/lib.sh

read_site
dry_run='' options=()
while (($#)) && [[ $1 != -- ]]; do
  if [[ $1 == --dry-run ]]; then dry_run=yes; else options+=("$1"); fi
  shift
done
(($#)) || die "no pipeline named; slurm/pipeline.sh -- --config FILE"
shift
steps=$("$PYTHON" compress/pipeline.py "$@" --slurm_steps)
[[ -n $steps ]] || { echo "nothing to submit: every step is done"; exit; }
[[ -n $dry_run ]] || command -v sbatch >/dev/null || die "sbatch: not found; submit on a login node, or add --dry-run"
mkdir -p "$LOG_DIR"

declare -A jobs=()
while IFS=$'\t' read -r step needs own; do
  after=()
  for need in ${needs/#-/}; do
    after+=("${jobs[$need]}")
  done
  command=(sbatch --parsable "${SBATCH_OPTIONS[@]}" "${options[@]}")
  eval "command+=($own)" # quoted by compress/pipeline.py
  command+=(--job-name="$step" --chdir="$PWD" --output="$LOG_DIR/%x-%j.out")
  ((!${#after[@]})) || command+=("--dependency=afterok$(printf ':%s' "${after[@]}")" --kill-on-invalid-dep=yes)
  command+=(slurm/pipeline_step.sh "$@" --step "$step")
  if [[ -n $dry_run ]]; then
    jobs[$step]=JOB_OF_$step
    printf '%q ' "${command[@]}"
    echo
  else
    jobs[$step]=$("${command[@]}")
    jobs[$step]=${jobs[$step]%%;*} # JOB;CLUSTER where clusters are federated
    echo "${jobs[$step]} $step"
  fi
done <<<"$steps"
