#!/usr/bin/env bash
# Run a training script on all nodes of a Slurm job: one launcher per node, one process per GPU; requeue it when the
# time is up. The jobs beside this file call it; submit.sh calls it without a job, to check or to show what would run.
#
#   slurm/launch.sh SCRIPT [--profile NAME] [--dry-run] [--accelerate "OPTIONS"] [SCRIPT'S OPTIONS...]
#
# Exit codes: the script's own: 0 done, 1 failed, 2 bad input, 75 stopped after saving.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/lib.sh
source slurm/lib.sh

read_arguments() {
  mode=${LAUNCH_MODE:-run} profile=$PROFILE accelerate_options=() arguments=()
  while (($#)); do
    case $1 in
      --profile | --accelerate) (($# > 1)) || die "$1: give its value after it" ;;&
      --profile) profile=$2 && shift ;;
      --profile=*) profile=${1#*=} ;;
      --accelerate) read -ra accelerate_options <<<"$2" && shift ;;
      --accelerate=*) read -ra accelerate_options <<<"${1#*=}" ;;
      --dry-run) mode=dry-run ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  (("${#arguments[@]}")) || die "no script named; slurm/launch.sh recipes/finetune.py OPTIONS..."
  script=${arguments[0]} arguments=("${arguments[@]:1}")
}

# A run per task of an array: its number is the seed, its folder lies below --output_dir.
apply_array() {
  local folder seed=${SLURM_ARRAY_TASK_ID:-} kept=()
  [[ -n $seed || -n ${ARRAY_ASKED:-} ]] || return 0
  folder=$(option_value output_dir "${arguments[@]}")
  [[ -n $folder ]] || die "--array: its runs need folders of their own; give --output_dir"
  [[ -z $(option_value seed "${arguments[@]}") ]] || die "--seed: in an array the task's number is the seed; leave it out"
  set -- "${arguments[@]}"
  while (($#)); do
    case $1 in
      --output_dir) shift ;;
      --output_dir=*) ;;
      *) kept+=("$1") ;;
    esac
    shift
  done
  arguments=("${kept[@]}" --seed "${seed:-SEED}" --output_dir "$folder/seed-${seed:-SEED}")
}

job_in_words() {
  local set=("${!SLURM_JOB@}")
  ((${#set[@]})) && echo "but ${set[0]} is, half of a Slurm job" || echo "this is no Slurm job"
}

# Number of nodes, GPUs per node and the meeting point, from Slurm; without a job, for a dry run, from what was asked.
read_job() {
  local name
  if [[ $mode == dry-run && -z ${SLURM_JOB_ID:-} ]]; then
    nodes=${NODES_ASKED:-1} gpus=${GPUS_ASKED:-0} head=HEAD_NODE port=PORT job=JOB
    return
  fi
  for name in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES; do
    [[ -n ${!name:-} ]] || die "$name is not set: $(job_in_words); submit with slurm/submit.sh, or add --dry-run"
  done
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  nodes=$SLURM_JOB_NUM_NODES job=$SLURM_JOB_ID
  [[ ${#hosts[@]} == "$nodes" ]] ||
    die "SLURM_JOB_NUM_NODES is $nodes, but SLURM_JOB_NODELIST ($SLURM_JOB_NODELIST) names ${#hosts[@]} nodes"
  head=${hosts[0]}
  getent hosts "$head" >/dev/null || head=$(scontrol show node "$head" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
  [[ -n $head ]] || die "SLURM_JOB_NODELIST: no address of ${hosts[0]}"
  read_gpus
  port=$((12000 + job % 20000))
  while port_is_taken; do port=$((port + 1)); done # this shell runs on the first node
}

read_gpus() {
  gpus=${SLURM_GPUS_ON_NODE:-}
  if [[ -z $gpus && -n ${SLURM_GPUS_PER_NODE:-} ]]; then # 8 or h100:8
    gpus=${SLURM_GPUS_PER_NODE##*:}
  fi
  gpus=${gpus:-0}
  [[ $gpus =~ ^[0-9]+$ ]] || die "SLURM_GPUS_ON_NODE: '$gpus' is not a number of GPUs"
}

port_is_taken() {
  local host
  for host in 127.0.0.1 "$head"; do
    if (: <"/dev/tcp/$host/$port") 2>/dev/null; then return 0; fi
  done
  return 1
}

# The command after node.sh: accelerate's options, the script and its own.
build_command() {
  local per_node=$gpus
  ((gpus)) || per_node=$PROCESSES_PER_NODE
  if grep -qi '^distributed_type: *"\?no"\?' "launch/$profile.yaml"; then
    ((nodes == 1)) || die "--profile $profile: is one process, the job has $nodes nodes; give --nodes=1 or another profile"
    per_node=1
  fi
  command=(--config_file "launch/$profile.yaml" --num_machines "$nodes" --num_processes $((nodes * per_node))
    --main_process_ip "$head" --main_process_port "$port" --max_restarts "$MAX_RESTARTS")
  # static takes the nodes' numbers from us; only c10d starts the ranks of all nodes again when some die
  if ((MAX_RESTARTS)); then command+=(--rdzv_backend c10d); else command+=(--rdzv_backend static); fi
  command+=("${accelerate_options[@]}")
  ((gpus)) || command+=(-m yunque.distributed.rehearsal) # gloo between CPUs, under the same profile
  command+=("$script" "${arguments[@]}")
  if ((${SLURM_RESTART_COUNT:-0} || MAX_RESTARTS)) && [[ " ${arguments[*]} " != *" --resume "* ]]; then
    command+=(--resume)
  fi
  threads=$((${SLURM_CPUS_PER_TASK:-1} / per_node))
}

export_environment() {
  export PYTHON GPUS_PER_NODE=$gpus
  RANK_LOGS=$LOG_DIR/$(basename "$script" .py)-$job/start-${SLURM_RESTART_COUNT:-0}
  export RANK_LOGS EXIT_FILE=$RANK_LOGS/exit_code
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer takes it from the job (22.05)
  fi
  if ((!gpus)); then # nodes that are one machine meet on loopback; else gloo asks the host name
    local interface=
    [[ $head != 127.* ]] || interface=lo
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME-$interface}
  fi
}

build_step() {
  step=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 --label)
  local mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  case $CONTAINER in
    pyxis) step+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD") ;;
    apptainer)
      step+=(apptainer exec)
      ((!gpus)) || step+=(--nv)
      step+=(--bind "$mounts" --pwd "$PWD" "$CONTAINER_IMAGE")
      ;;
  esac
  step+=(slurm/node.sh "${command[@]}")
}

show() {
  local rank
  echo "# $nodes nodes, $gpus GPUs each, profile $profile; logs per rank in $RANK_LOGS"
  ((!${#MODULES[@]})) || echo "module load ${MODULES[*]}"
  printf '%q ' "${step[@]}"
  echo
  for ((rank = 0; rank < nodes; rank++)); do
    DRY_RUN=1 SLURM_NODEID=$rank slurm/node.sh "${command[@]}"
  done
}

# Ask the ranks to save until they have gone: while they load or evaluate they do not listen.
stop_step() {
  local pid=$1 until=$((SECONDS + STOP_GRACE_S)) again=0
  echo "slurm: the time is up: asking the ranks to save" >&2
  while kill -0 "$pid" 2>/dev/null && ((SECONDS < until)); do
    if ((SECONDS >= again)); then
      scancel --signal=USR1 "$SLURM_JOB_ID" || true
      again=$((SECONDS + 5))
    fi
    sleep 0.5
  done
}

run() {
  local pid code=0
  mkdir -p "$RANK_LOGS"
  rm -f "$EXIT_FILE"
  time_up='' cancelled=''
  trap time_up=yes USR1   # --signal=B:USR1 of the job
  trap cancelled=yes TERM # scancel: a job that its owner ended must not come back
  "${step[@]}" &
  pid=$!
  while true; do
    code=0
    wait "$pid" || code=$?
    kill -0 "$pid" 2>/dev/null || break # it has ended; else a signal came
    if [[ -n $time_up ]]; then
      stop_step "$pid"
      kill -0 "$pid" 2>/dev/null && requeue "the ranks did not stop within $STOP_GRACE_S s"
    fi
  done
  # srun reports a mixture of its tasks' codes, and 0 for a step that Slurm cancelled
  [[ ! -s $EXIT_FILE || $(<"$EXIT_FILE") == 0 ]] || code=$(<"$EXIT_FILE")
  [[ $code != 0 ]] || exit 0
  [[ -z $cancelled ]] || exit "$code"
  case $code in
    2) exit 2 ;;
    75) requeue "the run was stopped after saving" ;;
  esac
  echo "slurm: the run failed (exit code $code); the logs of its ranks are in $RANK_LOGS" >&2
  [[ $REQUEUE_ON_FAILURE == no ]] || requeue "REQUEUE_ON_FAILURE"
  exit "$code"
}

main() {
  read_site
  read_arguments "$@"
  check_profile "$profile"
  check_script "$script" "${arguments[@]}"
  apply_array
  [[ $mode != check ]] || exit 0
  read_job
  build_command
  export_environment
  build_step
  if [[ $mode == dry-run ]]; then
    show
    exit
  fi
  if ((${#MODULES[@]})); then module load "${MODULES[@]}"; fi
  run
}

main "$@"
