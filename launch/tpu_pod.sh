#!/usr/bin/env bash
# A Cloud TPU pod slice, or several slices: request it, install moma_jax on all its hosts, train, begin again after a
# preemption, delete it. Run it where it can stay: in tmux on a small VM rather than on a laptop.
# shellcheck disable=SC2317,SC2329 # functions are called by name and by traps, too
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck source=launch/restart.sh
source "$here/restart.sh"

usage() {
  cat <<'HELP'
usage: launch/tpu_pod.sh [options] train CONFIG --run.dir gs://BUCKET/RUN [overrides of moma train]
       launch/tpu_pod.sh [options] create | install | stop | delete

  create    request the slice as a queued resource and wait until it is active
  install   copy the code to all hosts and install it there
  train     create where there is no active slice, install, train on all hosts; begin again after exit code 75 or 143,
            a dead host or a preemption, with a new slice where the old one is gone
  stop      SIGTERM to moma on all hosts: they save and end. A `train` that still runs would begin again: end that one
            itself, by Ctrl-C or SIGTERM, and it does the same
  delete    give the slice back

  --name NAME              name of the queued resource
  --zone ZONE              such as us-east5-a
  --project PROJECT        gcloud's own where left out
  --type TYPE              accelerator type, such as v5p-128
  --runtime VERSION        image of the hosts, such as v2-alpha-tpuv5
  --slices N               slices of that type, joined by the data-centre network (1)
  --spot                   spot capacity: cheaper, may be preempted at any time
  --create-option OPTION   one more option for `gcloud ... create`; may be repeated
  --git URL                clone this instead of copying this working tree
  --ref REF                branch or tag of it (main)
  --restarts R             how often training is begun again (20)
  --pause S                seconds before that, and between two looks at the request (60)
  --delete-after           delete the slice when training has ended, however it did, unless it was told to stop
  --dry-run                print the commands and run nothing
  -h, --help               this text

Needs gcloud (signed in) and tar. CONFIG is a path inside the repository. Exit code: the largest one of the hosts.
HELP
}

name="" zone="" project="" type="" runtime="" slices=1 spot="" git="" ref=main restarts=20 pause=60 delete_after=""
create_options=()
while [[ ${1:-} == -* ]]; do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run | --spot | --delete-after) option=${1#--} && declare "${option//-/_}=1" && shift && continue ;;
    --create-option) given "$1" "${2:-}" && create_options+=("$2") && shift 2 && continue ;;
    --name | --zone | --project | --type | --runtime | --git | --ref) given "$1" "${2:-}" ;;
    --slices) positive "$1" "${2:-}" ;;
    --restarts | --pause) whole "$1" "${2:-}" ;;
    *) refuse "$1: no such option; -h lists them" ;;
  esac
  declare "${1#--}=$2"
  shift 2
done
action=${1:-}
actions="create|install|train|stop|delete"
[[ $action =~ ^($actions)$ ]] || refuse "'$action': name what to do: ${actions//|/, }"
shift
given --name "$name"
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || refuse "--name: '$name' is not made of a-z, 0-9 and -"
given --zone "$zone"
if [[ $action == create || $action == train ]]; then
  given --type "$type"
  given --runtime "$runtime"
fi
if [[ $action == train ]]; then given CONFIG "${1:-}"; fi
if [[ $action != train && $# -gt 0 ]]; then refuse "$1: only train takes arguments"; fi
require gcloud tar awk

place=(--zone "$zone" ${project:+--project "$project"})
tpus=(gcloud compute tpus)
state_command=("${tpus[@]}" queued-resources list "${place[@]}" --filter "name ~ (^|/)$name\$"
  --format "value(state.state)")
nodes=("$name") # of TPU VMs, one to a slice; those of several slices are numbered by gcloud
if ((slices > 1)); then
  nodes=()
  for ((k = 0; k < slices; k++)); do nodes+=("$name-$k"); done
fi
root=$(dirname "$here")
archive="${TMPDIR:-/tmp}/moma_jax-$name.tar"
# What is left of an earlier moma would hold the TPU; gcloud, too, runs the line again on a host that it had lost. Every
# host prints how moma ended, and awk, which passes everything on, ends with the largest code. gcloud's own code then
# tells of one thing alone: a host that it lost for good or never reached.
train_command="pkill -KILL -x moma; cd moma_jax; ../moma_env/bin/moma train $(quoted "$@"); "
train_command+="printf '\nmoma ended: %d\n' \$?"
# shellcheck disable=SC2016 # awk's own dollars
largest='{ print; fflush() } /^moma ended: / { seen = 1; if ($3 > most) most = $3 } END { exit seen ? most : 255 }'

# on_all_hosts COMMAND: a line of shell on every host of every slice at once; false where one failed. By `tpu-vm ssh`:
# `queued-resources ssh` goes to 64 hosts, and to the next only when those are done, and passes over lost slices.
on_all_hosts() {
  local node child children=() failed=0
  for node in "${nodes[@]}"; do
    run "${tpus[@]}" tpu-vm ssh "$node" "${place[@]}" --worker all --command "$1" &
    children+=($!)
    if [[ $dry_run ]]; then wait $!; fi # in order
  done
  for child in "${children[@]}"; do wait "$child" || failed=1; done
  return "$failed"
}

create() {
  local shape=(--node-id "$name")
  if ((slices > 1)); then shape=(--node-count "$slices" --node-prefix "$name"); fi
  run "${tpus[@]}" queued-resources create "$name" "${place[@]}" --accelerator-type "$type" \
    --runtime-version "$runtime" "${shape[@]}" ${spot:+--spot} "${create_options[@]}" && await_active
}

await_active() {
  local state
  if [[ $dry_run ]]; then
    # shellcheck disable=SC2016 # printed, not run
    printf 'until [ "$(%s)" = ACTIVE ]; do sleep %s; done\n' "$(quoted "${state_command[@]}")" "$pause"
    return
  fi
  while state=$("${state_command[@]}"); do
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) say "the request for $name ended as $state" && return 1 ;;
    esac
    say "$name: ${state:-requested}"
    sleep "$pause"
  done
  say "$name: gcloud could not tell its state"
  return 1
}

delete() { run "${tpus[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet; }

# An active slice: the one that is there or on its way, or a new one in place of one that is lost.
ensure_active() {
  local state=""
  if [[ ! $dry_run ]]; then state=$("${state_command[@]}") || return; fi
  case $state in
    ACTIVE) ;;
    "") create ;;
    FAILED | SUSPENDING | SUSPENDED) say "$name is $state; requesting it anew" && delete && create ;;
    *) await_active ;;
  esac
}

# What the hosts will run, taken once, so that a restart runs the same code.
pack() {
  if [[ ! $git ]]; then
    run tar -cf "$archive" --exclude __pycache__ -C "$root" pyproject.toml README.md moma_jax configs
  fi
}

# uv brings a Python of its own: that of the images may be too old. Orbax and JAX's cache reach gs:// by etils' extra.
spread() {
  local node unpack="mkdir moma_jax && tar -xf moma_jax.tar -C moma_jax"
  if [[ $git ]]; then
    unpack="git clone --quiet --depth 1 --branch $(quoted "$ref" "$git") moma_jax"
  else
    for node in "${nodes[@]}"; do
      run "${tpus[@]}" tpu-vm scp "$archive" "$node:moma_jax.tar" "${place[@]}" --worker all || return
    done
  fi
  on_all_hosts "set -e; rm -rf moma_jax moma_env; $unpack; \
curl -LsSf https://astral.sh/uv/install.sh | sh; ~/.local/bin/uv venv --quiet --python 3.12 moma_env; \
~/.local/bin/uv pip install --quiet --python moma_env/bin/python -e './moma_jax[tpu]' 'etils[epath-gcs]'"
}

install() { pack && spread; }

stop() { on_all_hosts "pkill -TERM -x moma || true"; }

# Ends with the largest exit code of the hosts, or 255 where one was lost.
train_everywhere() {
  local codes=(0 0)
  on_all_hosts "$train_command" | awk "$largest" || codes=("${PIPESTATUS[@]}")
  return $((codes[0] ? 255 : codes[1]))
}

attempt() {
  trap 'stopping=1; say "stopping: telling all hosts to save"; stop || say "no host could be told"' TERM INT
  attend train_everywhere
  trap - TERM INT
}

again() { { ensure_active && spread; } || say "$name could not be made ready; trying all the same"; }

train() {
  ensure_active && install || exit
  if [[ $dry_run ]]; then
    if ((slices > 1)); then echo "# on all slices at once:"; fi
    on_all_hosts "$train_command"
    echo "# after exit code 75, 143 or a dead host, at most $restarts times, $pause s later: all but tar again, and"
    echo "# create only where the slice is lost, after"
    delete
    return
  fi
  with_restarts "$restarts" "$pause" attempt again
  if [[ $delete_after && ! $stopping ]]; then delete; fi
}

"$action"
exit "$code"
