#!/usr/bin/env bash
# One node's part of a job, started by launch.sh once per node: accelerate's launcher, whose machine rank is this
# node's number in the step. The number is known here only: in the batch script every node would be the first.
# The launcher that ends first leaves its code in EXIT_FILE: Slurm kills the other ones, and reports a mixture.
set -euo pipefail

fail() {
  echo "error: node ${SLURMD_NODENAME:-$SLURM_NODEID}: $*" >&2
  exit 2
}

here=${SLURM_GPUS_ON_NODE:-0}
[[ $here == "$GPUS_PER_NODE" || -n ${DRY_RUN:-} ]] ||
  fail "$here GPUs where the first node has $GPUS_PER_NODE; ask for the same number with --gpus-per-node"

# The ranks answer these two by saving; the launchers above them, which inherit this, must outlive the save.
trap '' USR1 TERM
export PET_SIGNALS_TO_HANDLE=SIGINT # torchrun would otherwise end its ranks at the first SIGTERM

command=("$PYTHON" -m yunque.distributed.launch --machine_rank "$SLURM_NODEID"
  --rdzv_conf "is_host=$((SLURM_NODEID == 0))" --log_dir "$RANK_LOGS/node-$SLURM_NODEID" --tee 3 "$@")
if [[ -n ${DRY_RUN:-} ]]; then
  printf 'node %s:' "$SLURM_NODEID"
  printf ' %q' "${command[@]}"
  echo
  exit
fi
mkdir -p "$RANK_LOGS/node-$SLURM_NODEID"
code=0
"${command[@]}" || code=$?
(
  set -o noclobber
  echo "$code" >"$EXIT_FILE"
) 2>/dev/null || true
exit "$code"
