#!/usr/bin/env bash
# N processes of one run on this machine, joined over loopback: several hosts in small, on the CPU.
# shellcheck disable=SC2317,SC2329 # functions are called by name and by traps, too
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck source=launch/restart.sh
source "$here/restart.sh"

usage() {
  cat <<'HELP'
usage: launch/local.sh [options] CONFIG [overrides of moma train]

  --processes N   processes (2)
  --devices D     CPU devices of each process (1)
  --port P        port of process 0 (8476)
  --restarts R    how often the run is begun again after exit code 75, 143 or a dead process (0)
  --grace S       seconds that the others have to end by themselves after the first one did (60)
  --dry-run       print the commands and run nothing
  -h, --help      this text

Needs moma on PATH. Exit code: the largest one of the processes.
Example: launch/local.sh --devices 2 quickstart --data.group-rows 1 --mesh.expert 2 --run.dir runs/two
HELP
}

processes=2 devices=1 port=8476 restarts=0 grace=60
while [[ ${1:-} == -* ]]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run) dry_run=1 && shift && continue ;;
    --processes | --devices | --port) positive "$1" "${2:-}" ;;
    --restarts | --grace) whole "$1" "${2:-}" ;;
    *) refuse "$1: no such option; -h lists them" ;;
  esac
  declare "${1#--}=$2"
  shift 2
done
((port <= 65535)) || refuse "--port: $port is above 65535"
given CONFIG "${1:-}"
require moma

# command_of K: puts the command of process K into `words`.
command_of() {
  words=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" moma train "${arguments[@]}"
    --hosts.start on --hosts.coordinator "127.0.0.1:$port" --hosts.count "$processes" --hosts.index "$1")
}
arguments=("$@") words=() pids=()

if [[ $dry_run ]]; then
  for ((k = 0; k < processes; k++)); do
    command_of "$k"
    printf '%s &\n' "$(quoted "${words[@]}")"
  done
  echo wait
  echo "# after exit code 75, 143 or a dead process: the same again, at most $restarts times"
  exit 0
fi

signal_all() { kill "-$1" "${pids[@]}" 2>/dev/null || true; } # those that are gone are no fault

# Starts all processes, waits for all of them and leaves the largest exit code in `code`.
attempt() {
  local k ended deadline="" told=""
  code=0 pids=()
  for ((k = 0; k < processes; k++)); do
    command_of "$k"
    "${words[@]}" &
    pids[k]=$!
  done
  while ((${#pids[@]})); do
    sleep 0.2 || true # Ctrl-C ends it, too
    for k in "${!pids[@]}"; do
      if kill -0 "${pids[k]}" 2>/dev/null; then continue; fi
      ended=0
      wait "${pids[k]}" || ended=$?
      unset "pids[k]"
      if ((ended && !code)) && [[ ! $stopping ]]; then
        say "process $k ended with exit code $ended; the others have $grace s to end by themselves"
        deadline=$((SECONDS + grace))
      fi
      code=$((ended > code ? ended : code))
    done
    if [[ $deadline ]] && ((SECONDS >= deadline && ${#pids[@]})); then end_others; fi
  done
}

# Part of `attempt`: after a SIGTERM on one process all should have saved and ended; those that did not are told, too.
# Those that neither end then, nor after the death of one, are killed, and their exit codes do not count.
end_others() {
  if ((code == 143)) && [[ ! $told ]]; then
    say "${#pids[@]} of $processes processes still run; telling them to save, too"
    told=1 deadline=$((SECONDS + grace))
    signal_all TERM
  else
    say "${#pids[@]} of $processes processes still run; killing them"
    signal_all KILL
    wait
    pids=()
  fi
}

trap 'stopping=1; say "stopping: telling all processes to save"; signal_all TERM' TERM INT
with_restarts "$restarts" 1 attempt
exit "$code"
