#!/usr/bin/env bash
# palm_jax on a Cloud TPU slice of any size: asks for it, waits, sets it up, runs on all workers, fetches the results,
# gives it back. From the repository's root, with gcloud logged in; the commit that is checked out is what runs.
#
#   launch/tpu_vm.sh --name=palm --zone=us-west4-a --accelerator=v5litepod-16 --runtime=v2-alpha-tpuv5-lite \
#     --nfs=10.0.0.2:/share --workdir=runs/a --spot -- --config=configs/cifar.py --config.replay.num_shards=16 --download
#
# --nfs is a share that the workers reach (Filestore, for example), --workdir a folder in it: what is saved there outlasts
# the slice, so after a preemption the same command resumes. --fetch is where results/ is copied to here (default: fetched).
# --project as gcloud's. --dry_run prints the commands and runs none.
set -euo pipefail

name='' zone='' accelerator='' runtime='' nfs='' workdir='' fetch=fetched project='' spot='' dry_run=''
fail() { echo "tpu_vm.sh: $1" >&2; exit 2; }

while (($#)); do
  case $1 in
    --name=* | --zone=* | --accelerator=* | --runtime=* | --nfs=* | --workdir=* | --fetch=* | --project=*)
      key=${1%%=*}
      printf -v "${key#--}" %s "${1#*=}" ;;
    --spot) spot=yes ;;
    --dry_run) dry_run=yes ;;
    --) shift; break ;;
    *) fail "$1 is unknown: see the first lines of this file; what palm_jax.main shall get goes behind --" ;;
  esac
  shift
done
for key in name zone accelerator runtime nfs workdir; do
  [[ -n ${!key} ]] || fail "--$key is missing: see the first lines of this file"
done

where=(--zone="$zone")
if [[ -n $project ]]; then where+=(--project="$project"); fi
mount=/mnt/palm

run() { # a command, printed instead of run where it is only asked what would be
  if [[ -n $dry_run ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
queued() { local verb=$1; shift; run gcloud compute tpus queued-resources "$verb" "$name" "$@" "${where[@]}"; }
everywhere() { run gcloud compute tpus tpu-vm ssh "$name" --worker=all --command="$1" "${where[@]}"; }
quoted() { printf '%q ' "$@"; }

create() {
  local options=(--node-id="$name" --accelerator-type="$accelerator" --runtime-version="$runtime")
  if [[ -n $spot ]]; then options+=(--spot); fi
  queued create "${options[@]}"
}

wait_until_active() {
  local state failed=0
  while :; do
    # Asking can fail now and then; leaving would give the place in the queue away.
    if state=$(queued describe --format='value(state.state)'); then failed=0; else state=unknown failed=$((failed + 1)); fi
    if ((failed >= 10)); then fail "gcloud cannot describe the request: see above"; fi
    if [[ -n $dry_run ]]; then echo "$state"; return; fi
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) fail "the request for $accelerator in $zone is $state: ask again or elsewhere" ;;
    esac
    echo "waiting for $accelerator: $state"
    sleep "${POLL_SECONDS:-30}"
  done
}

setup() {
  run git archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:palm_jax.tar.gz" --worker=all "${where[@]}"
  # uv brings the Python that the images lack.
  everywhere "set -e; mkdir -p palm_jax; tar xzf palm_jax.tar.gz -C palm_jax; python3 -m pip install -q --user uv; \
~/.local/bin/uv venv -q --allow-existing --python 3.11 palm_venv; \
~/.local/bin/uv pip install -q --python palm_venv/bin/python -r palm_jax/requirements.txt -e './palm_jax[tpu,figures]'; \
sudo apt-get install -qq -y nfs-common; sudo mkdir -p $mount; \
mountpoint -q $mount || sudo mount -t nfs $(quoted "$nfs") $mount; \
sudo install -d -m 755 -o \"\$(id -u)\" -g \"\$(id -g)\" $(quoted "$mount/$workdir")"
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
# Not deleted then: a slice of that name may be another's.
trap 'echo "tpu_vm.sh: interrupted while asking for $name: see whether it is there, and give it back" >&2; exit 130' INT TERM HUP
create
trap 'rm -f "$archive"; queued delete --force --quiet' EXIT # whatever comes: a forgotten slice costs by the hour
trap - INT TERM HUP
wait_until_active
setup
everywhere "cd palm_jax && exec ../palm_venv/bin/python -m palm_jax.main $(quoted --workdir="$mount/$workdir" "$@")"
run mkdir -p "$fetch"
# By a name without blanks: whether scp's remote side reads quotes depends on its version.
run gcloud compute tpus tpu-vm ssh "$name" --worker=0 "${where[@]}" \
  --command="mkdir -p palm_fetched && rm -rf palm_fetched/results && cp -r $(quoted "$mount/$workdir/results") palm_fetched/ && \
{ cp $(quoted "$mount/$workdir/figure.png") palm_fetched/results/ 2> /dev/null || true; }"
run gcloud compute tpus tpu-vm scp --recurse "$name:palm_fetched/results" "$fetch" --worker=0 "${where[@]}"
