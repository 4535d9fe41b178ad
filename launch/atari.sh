#!/usr/bin/env bash
# Atari-100k, from the repository's root: every job of every game and seed in ROOT/<game>/<seed>, then all scores together.
#
#   launch/atari.sh runs/atari                                              the 26 games here, one after another
#   GAMES='Assault Krull' SEEDS='0 1 2' VARIANT=,laptop launch/atari.sh runs/atari --config.collect.frames=400000
#   SLURM=1 launch/atari.sh /shared/runs/atari                              a job of one GPU for each
#
#   SCORES=1 launch/atari.sh /shared/runs/atari                             only the scores, of all that is complete
#
# The same command resumes where it was stopped and skips what is complete. Arguments behind the folder go to palm_jax.main.
set -euo pipefail

root=${1:?is not set: name the folder for the runs}
shift
for argument; do
  if [[ $argument == --job* ]]; then
    echo "launch/atari.sh: $argument would end before the scores: give --config.jobs=\"('finetune', 'scores')\" instead" >&2
    exit 2
  fi
done
seeds=${SEEDS:-0}
if [[ -n ${SCORES:-} ]]; then seeds=''; fi
games=${GAMES:-$(python -c 'from palm_jax.atari.environment import GAMES; print(*GAMES)')}
for seed in $seeds; do
  for game in $games; do
    workdir=$root/$game/$seed arguments=(--config="configs/atari.py:$game${VARIANT:-}" --config.seed="$seed" "$@")
    if [[ -n ${SLURM:-} ]]; then
      if [[ -e $workdir/results/scores.json ]]; then continue; fi # else the command itself skips, and judges, what is there
      WORKDIR=$workdir NODES=1 GPUS=1 launch/slurm.sh "${arguments[@]}"
    else
      python -m palm_jax.main --workdir="$workdir" "${arguments[@]}"
      if [[ ! -e $workdir/results/scores.json ]]; then
        echo "launch/atari.sh: $workdir was asked to stop, or has no job scores; the same command resumes it" >&2
        exit 1
      fi
    fi
  done
done
if [[ -z ${SLURM:-} || -n ${SCORES:-} ]]; then
  python -m palm_jax.main --workdir="$root/all" --config=configs/atari.py:Assault --job=scores --config.scores.runs="('$root/**',)"
fi
