# shellcheck shell=bash
# Shared by submit.sh and launch.sh: the site's settings, and checks that need no allocation.

die() {
  echo "error: $*" >&2
  exit 2
}

# Names of the files FOLDER/*.SUFFIX without the suffix, for messages.
names_in() {
  local file names=()
  for file in "$1"/*."$2"; do
    [[ -f $file ]] && names+=("$(basename "$file" ".$2")")
  done
  ((${#names[@]})) || names=(none)
  printf '%s, ' "${names[@]}" | sed 's/, $//'
}

whole_number() { # NAME LEAST
  [[ ${!1} =~ ^[0-9]+$ && ${!1} -ge $2 ]] || die "$SITE_ENV: $1=${!1} is not a whole number of at least $2"
}

read_site() {
  SITE_ENV=${SITE_ENV:-slurm/site.env}
  [[ -f $SITE_ENV ]] || die "SITE_ENV: $SITE_ENV: no such file; copy slurm/site.env and edit it"
  # shellcheck source=slurm/site.env
  source "$SITE_ENV" || die "$SITE_ENV: bash cannot read it"
  whole_number PROCESSES_PER_NODE 1
  whole_number STOP_GRACE_S 1
  whole_number MAX_REQUEUES 0
  whole_number MAX_RESTARTS 0
  [[ $REQUEUE_ON_FAILURE == yes || $REQUEUE_ON_FAILURE == no ]] ||
    die "$SITE_ENV: REQUEUE_ON_FAILURE=$REQUEUE_ON_FAILURE is neither yes nor no"
  [[ -n $LOG_DIR ]] || die "$SITE_ENV: LOG_DIR is empty; name a folder that all nodes share"
  case $CONTAINER in
    '') ;;
    apptainer | pyxis) [[ -n $CONTAINER_IMAGE ]] || die "$SITE_ENV: CONTAINER=$CONTAINER needs a CONTAINER_IMAGE" ;;
    *) die "$SITE_ENV: CONTAINER=$CONTAINER: no such way; give apptainer, pyxis or nothing" ;;
  esac
  if [[ -z $PYTHON ]]; then
    [[ -x .venv/bin/python ]] && PYTHON=$PWD/.venv/bin/python || PYTHON=python3
  fi
}

# Value of the last `--NAME VALUE` or `--NAME=VALUE` among the arguments after NAME; nothing when it is not there.
option_value() {
  local name=$1 value=
  shift
  while (($#)); do
    case $1 in
      "--$name") value=${2:-} ;;
      "--$name="*) value=${1#*=} ;;
    esac
    shift
  done
  echo "$value"
}

check_profile() {
  [[ -f launch/$1.yaml ]] || die "--profile $1: no such profile; give one of $(names_in launch yaml)"
}

check_script() { # FILE, ARGUMENTS...
  local script=$1 config
  shift
  [[ -f $script ]] || die "$script: no such script; $(dirname "$script")/ holds $(names_in "$(dirname "$script")" py)"
  config=$(option_value config "$@")
  [[ -z $config || -f $config ]] || die "--config $config: no such file in $PWD"
}

# Leave with 75 and let Slurm start this job again, unless whoever called this script will see to it.
requeue() { # WHY
  [[ -z ${CALLER_REQUEUES:-} ]] || exit 75
  if ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
    echo "slurm: $1; not requeued again after $MAX_REQUEUES times (MAX_REQUEUES): submit it with --resume" >&2
    exit 75
  fi
  echo "slurm: $1; requeued, to go on from the last checkpoint" >&2
  scontrol requeue "$SLURM_JOB_ID" || echo "slurm: scontrol requeue failed: submit it again with --resume" >&2
  exit 75
}
