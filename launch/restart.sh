# Sourced by the launchers: how a command is printed or run, and what to do after an exit code of `moma train`.
# shellcheck shell=bash
#
# A run is summed up by the largest exit code of its processes:
#   0     the training is complete
#   1     the run failed, on all hosts alike, and would fail again
#   2     the input is at fault; one line says what and how to mend it
#   75    the others did not start in time
#   143   all hosts saved at one step and stopped, because one of them was told to by SIGTERM
#   else  a host died (killed: 137, ssh lost: 255) and JAX's runtime aborted the others (134)

dry_run=""  # set by --dry-run
stopping="" # set by a trap: this launcher was told to stop, so nothing is started again
code=0      # the exit code of the last attempt

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

refuse() {
  say "$*"
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || refuse "bash $BASH_VERSION is too old; use 4.4 or newer"

# require TOOL...: refuses where a tool is missing; a dry run needs none.
require() {
  local tool
  [[ $dry_run ]] && return
  for tool in "$@"; do
    command -v "$tool" >/dev/null || refuse "$tool is not on PATH; install it or activate the environment that has it"
  done
}

# whole OPTION VALUE: refuses a value that is no whole number. A leading zero would make it octal, many digits overflow.
whole() {
  [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || refuse "$1: '$2' is not a whole number (at most 9 digits, no leading zero)"
}

# positive OPTION VALUE: refuses a value that is no whole number above 0.
positive() {
  whole "$1" "$2"
  [[ $2 != 0 ]] || refuse "$1: '$2' is not above 0"
}

# given OPTION VALUE: refuses an option that was left out.
given() { [[ $2 ]] || refuse "$1: name it; -h explains"; }

# quoted WORD...: one line that any shell reads back as these words.
quoted() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# run COMMAND...: runs it, or prints it in a dry run.
run() {
  if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# attend COMMAND...: runs it in the background, so that traps act at once, and leaves its exit code in `code`.
attend() {
  local child
  "$@" &
  child=$!
  while true; do
    wait "$child" || true # a trap ends this early
    kill -0 "$child" 2>/dev/null || break
  done
  code=0
  wait "$child" || code=$? # its own code, also where a trap ended the wait above
}

# restart USED MOST: says what `code` means; true where the run should be begun again, for the USED + 1st time.
restart() {
  local what
  case $code in
    0) return 1 ;;
    1) say "the run failed (exit code 1); its own lines above say why" && return 1 ;;
    2) say "the input is at fault (exit code 2); mend it as the line above says" && return 1 ;;
    75) what="not all hosts came in time" ;;
    143) what="stopped by SIGTERM with a checkpoint" ;;
    *) what="a host died" ;;
  esac
  if [[ $stopping ]] || (($1 >= $2)); then
    say "$what (exit code $code); not restarted (limit $2): the same command goes on from the last checkpoint"
    return 1
  fi
  say "$what; restarting from the last checkpoint (exit code $code, restart $(($1 + 1)) of $2)"
}

# with_restarts MOST PAUSE ATTEMPT [BEFORE]: calls ATTEMPT, which leaves `code`, as often as `restart` says; in between
# a pause in seconds, then BEFORE.
with_restarts() {
  local used=0
  "$3"
  while restart "$used" "$1"; do
    sleep "$2" &
    wait $! || true # a signal ends the pause
    if [[ $stopping ]]; then break; fi
    used=$((used + 1))
    "${4:-true}"
    "$3"
  done
}
