#!/usr/bin/env bash
# GKE: a JobSet that trains on TPU slices or on GPU nodes, one pod per host. The JobSet controller begins it again.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck source=launch/restart.sh
source "$here/restart.sh"

usage() {
  cat <<'HELP'
usage: launch/gke_jobset.sh [options] apply CONFIG --run.dir gs://BUCKET/RUN [overrides of moma train]
       launch/gke_jobset.sh [options] render CONFIG ...
       launch/gke_jobset.sh --name NAME delete

  apply    make the JobSet from gke_jobset.yaml.template and hand it to the cluster
  render   print the YAML
  delete   remove the JobSet and its pods: they get SIGTERM and save

  --name NAME               of the JobSet: about 45 letters at most, as the names of its pods begin with it
  --image IMAGE             a container image with moma_jax[tpu] or moma_jax[cuda12] and the recipes
  --tpu TYPE --topology T   such as tpu-v5p-slice and 4x4x4
  --gpu TYPE                instead: such as nvidia-h100-80gb
  --hosts N                 hosts of a slice, or GPU nodes: 4x4x4 has 64 chips, 4 to a host, so 16 hosts
  --chips N                 chips or GPUs of each host (TPU 4, GPU 8)
  --slices N                TPU slices (1)
  --spot                    on spot nodes
  --service-account NAME    Kubernetes account that may write to the bucket (default)
  --notice S                seconds to save in, between SIGTERM and SIGKILL (300)
  --restarts R              how often the JobSet begins again (20)
  --dry-run                 print the commands and run nothing
  -h, --help                this text

Needs kubectl, pointed at the cluster. CONFIG is a path inside the image.
HELP
}

name="" image="" tpu="" topology="" gpu="" hosts="" chips="" slices=1 spot="" service_account=default notice=300
restarts=20
while [[ ${1:-} == -* ]]; do
  option=${1#--}
  case $1 in
    -h | --help) usage && exit 0 ;;
    --dry-run | --spot) declare "${option//-/_}=1" && shift && continue ;;
    --name | --image | --tpu | --topology | --gpu | --service-account) given "$1" "${2:-}" ;;
    --hosts | --chips | --slices) positive "$1" "${2:-}" ;;
    --notice | --restarts) whole "$1" "${2:-}" ;;
    *) refuse "$1: no such option; -h lists them" ;;
  esac
  declare "${option//-/_}=$2"
  shift 2
done
action=${1:-}
[[ $action =~ ^(apply|render|delete)$ ]] || refuse "'$action': name what to do: apply, render, delete"
shift
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || refuse "--name: '$name' is not made of a-z, 0-9 and - between them"

# yaml WORD: a YAML string.
yaml() {
  local word=${1//\\/\\\\}
  printf '"%s"' "${word//\"/\\\"}"
}

# yaml_arguments WORD...: a YAML list. In arguments Kubernetes puts variables in for $(NAME) and reads $$ as one dollar.
yaml_arguments() {
  local word list=""
  for word in "$@"; do list+="${list:+, }$(yaml "${word//\$/\$\$}")"; done
  printf '[%s]' "$list"
}

# fill PLACE VALUE: puts VALUE in the place of @PLACE@ in `text`.
fill() { text=${text//"@$1@"/"$2"}; }

# jobset CONFIG ...: the YAML, in `text`.
jobset() {
  local annotations="{}" nodes arguments
  [[ $* != *$'\n'* ]] || refuse "an argument has a line break; leave it out"
  text=$(<"$here/gke_jobset.yaml.template")
  arguments=$(yaml_arguments "$@")
  if [[ $tpu ]]; then
    # A slice is a node pool of its own. GKE tells moma through TPU_WORKER_HOSTNAMES who the hosts are.
    annotations='{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}'
    nodes="cloud.google.com/gke-tpu-accelerator: $(yaml "$tpu")"
    nodes+=", cloud.google.com/gke-tpu-topology: $(yaml "$topology")"
    fill CHIPS "{google.com/tpu: ${chips:-4}}"
  else
    # The name of the first pod is known beforehand; its number a pod learns from the controller.
    arguments="${arguments%]}, --hosts.start, \"on\", --hosts.coordinator, $name-hosts-0-0.$name:8476"
    arguments+=", --hosts.count, \"$hosts\", --hosts.index, \$(JOB_COMPLETION_INDEX)]"
    nodes="cloud.google.com/gke-accelerator: $(yaml "$gpu")"
    fill CHIPS "{nvidia.com/gpu: ${chips:-8}}"
  fi
  fill ANNOTATIONS "$annotations"
  fill NODES "{$nodes${spot:+, cloud.google.com/gke-spot: \"true\"}}"
  fill NAME "$name"
  fill IMAGE "$(yaml "$image")"
  fill SERVICE_ACCOUNT "$(yaml "$service_account")"
  fill RESTARTS "$restarts"
  fill NOTICE "$notice"
  fill SLICES "$slices"
  fill HOSTS "$hosts"
  fill ARGUMENTS "$arguments" # last: what a user wrote may look like a place
}

if [[ $action == delete ]]; then
  require kubectl
  run kubectl delete jobset "$name"
  exit
fi
given CONFIG "${1:-}"
given --image "$image"
given --hosts "$hosts"
[[ ($tpu && $topology && ! $gpu) || ($gpu && ! $tpu$topology) ]] ||
  refuse "--tpu with --topology, or --gpu: name one of them"
if [[ $tpu ]]; then
  [[ $topology =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] || refuse "--topology: '$topology' is not like 4x4x4"
  ((hosts * ${chips:-4} == ${topology//x/*})) ||
    refuse "--hosts: $hosts hosts of ${chips:-4} chips do not make up $topology; give other --hosts or --chips"
else
  ((slices == 1)) || refuse "--slices: only TPUs have slices; give --hosts"
fi
longest=$name-hosts-$((slices - 1))-$((hosts - 1))-abcde # the last pod; Kubernetes ends its name with 5 random letters
((${#longest} <= 63)) || refuse "--name: too long by $((${#longest} - 63)), as the names of the pods begin with it"
jobset "$@"
if [[ $action == render ]]; then
  printf '%s\n' "$text"
elif [[ $dry_run ]]; then
  printf "kubectl apply -f - <<'JOBSET'\n%s\nJOBSET\n" "$text"
else
  require kubectl
  kubectl apply -f - <<<"$text"
  say "watch it: kubectl get jobset $name; kubectl logs -f job/$name-hosts-0"
fi
