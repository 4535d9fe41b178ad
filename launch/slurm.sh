#!/usr/bin/env bash
# palm_jax under SLURM, from the repository's root on a login node; submits itself, and resumes after preemption and time limits:
#
#   WORKDIR=/shared/runs/a NODES=2 GPUS=8 launch/slurm.sh --config=configs/cifar.py --config.replay.num_shards=16 --download
#
# Arguments go to palm_jax.main. WORKDIR must be on a folder that all nodes share; the checkpoints, the compilation cache
# and the log are in it. CPUS are those of each process; GPUS=0 runs on the nodes' processors. SBATCH_PARTITION,
# SBATCH_ACCOUNT and the like are read by sbatch itself. With `python` of the environment that is active on submission.
set -euo pipefail

: "${WORKDIR:?is not set: name a folder that all nodes share}"
nodes=${NODES:-1} gpus=${GPUS:-8} cpus=${CPUS:-8} hours=${HOURS:-24}
number() { # NAME VALUE LEAST
  if [[ ! $2 =~ ^[0-9]{1,5}$ ]] || ((10#$2 < $3)); then
    echo "slurm.sh: $1=$2 is no number of at least $3: set it to one" >&2
    exit 2
  fi
}
number NODES "$nodes" 1
number GPUS "$gpus" 0
number CPUS "$cpus" 1
number HOURS "$hours" 1

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  mkdir -p "$WORKDIR"
  # A process a GPU, which is what JAX expects under SLURM. USR1 comes in time to save before the limit, and before a
  # preemption where the cluster has PreemptParameters=send_user_signal.
  options=(--job-name=palm --nodes="$nodes" --ntasks-per-node="$((gpus > 0 ? gpus : 1))" --cpus-per-task="$cpus"
    --time="$hours:00:00" --signal=B:USR1@300 --requeue --open-mode=append --output="$WORKDIR/slurm-%j.log")
  if ((gpus > 0)); then options+=(--gpus-per-node="$gpus"); fi
  exec sbatch "${options[@]}" "$0" "$@"
fi

if ((gpus == 0)); then export JAX_PLATFORMS=cpu; fi
step='' reason='' again=''
# The processes save together and leave. srun itself would kill them on SIGTERM; scancel passes the signal on.
stop() {
  reason=$1 again=yes
  if [[ -z $step ]]; then return; fi
  until scancel --signal=TERM "$SLURM_JOB_ID.0"; do # .0: the first step of this start
    if ! kill -0 "$step" 2>/dev/null; then break; fi
    sleep 1 # it is not there yet
  done
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM
srun --cpus-per-task="$cpus" --kill-on-bad-exit=1 python -m palm_jax.main --workdir="$WORKDIR" "$@" &
step=$!
if [[ -n $reason ]]; then stop "$reason"; fi # it came just before
while :; do
  again='' code=0
  wait "$step" || code=$?
  [[ -n $again ]] || break # a signal ends `wait` early
done

if ((code != 0 && code != 143)); then exit "$code"; fi # 143: ended by SIGTERM between two jobs
about=$(SLURM_TIME_FORMAT=standard scontrol show job "$SLURM_JOB_ID") || about=''
# A preemption with a GraceTime sends SIGTERM to the processes alone: they save and leave as if all were done.
if [[ -z $reason && $about =~ PreemptTime=([0-9][0-9T:-]*) ]]; then
  preempted=${BASH_REMATCH[1]} started=''
  if [[ $about =~ [[:space:]]StartTime=([0-9][0-9T:-]*) ]]; then started=${BASH_REMATCH[1]}; fi
  if [[ ! $preempted < $started ]]; then reason=preemption; fi # an earlier one is of an earlier start
fi
if [[ -z $reason ]]; then exit "$code"; fi
# scancel sends SIGTERM too, and means it.
if [[ $reason != USR1 && $about == *JobState=CANCELLED* ]]; then exit 0; fi
echo "stopped by $reason and saved; resumes when SLURM has room"
scontrol requeue "$SLURM_JOB_ID" || true # refused where SLURM has done so itself
