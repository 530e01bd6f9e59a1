#!/usr/bin/env bash
# One step of a pipeline, as slurm/pipeline.sh submits it; requeued when its time is up.
#
#SBATCH --job-name=pipeline
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f slurm/lib.sh ]] || { echo "error: $PWD is not the repository: submit from its root, with slurm/pipeline.sh" >&2; exit 2; }
# shellcheck source=slurm/lib.sh
source slurm/lib.sh

read_site
if ((${#MODULES[@]})); then module load "${MODULES[@]}"; fi
CALLER_REQUEUES=yes "$PYTHON" compress/pipeline.py "$@" &
pid=$!
cancelled=''
trap 'kill -USR1 "$pid" 2>/dev/null || true' USR1 # --signal=B:USR1 of the job: its time is up
trap 'cancelled=yes; kill -TERM "$pid" 2>/dev/null || true' TERM
code=0
while kill -0 "$pid" 2>/dev/null; do
  code=0
  wait "$pid" || code=$?
done
[[ $code != 75 || -n $cancelled ]] || requeue "the step was stopped after saving"
[[ $code != 1 || $REQUEUE_ON_FAILURE == no ]] || requeue "REQUEUE_ON_FAILURE"
exit "$code"
