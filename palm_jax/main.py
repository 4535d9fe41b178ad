"""python -m palm_jax.main --config=configs/digits.py [--job=...] [--workdir=...]

Any key of the config is a flag: --config.KEY=VALUE.
"""

import json

from absl import flags

from palm_jax import runner
from palm_jax.base import checks, command, metrics, processes

DEFAULT_CONFIG = 'configs/digits.py'


def parse_flags(argv: list[str]) -> list[str]:
  """Defines the flags and reads them; returns what absl leaves of argv. Raises UserError."""
  flags.DEFINE_string(
    'job', 'all', f'{", ".join(runner.JOBS)}, or all: those of config.jobs, in order.'
  )
  flags.DEFINE_string('workdir', None, 'Where everything is written; default runs/<config.name>.')
  flags.DEFINE_bool('download', False, 'Allow published data to be fetched.')
  flags.DEFINE_string('wandb', '', 'Project of Weights & Biases to which metrics go, too.')
  flags.DEFINE_string(
    'coordinator_address',
    None,
    'HOST:PORT of process 0, where JAX cannot find the processes itself.',
  )
  flags.DEFINE_integer('num_processes', None, 'How many there are; with --coordinator_address.')
  flags.DEFINE_integer(
    'process_id', None, 'Which of them this is, from 0; with --coordinator_address.'
  )
  return command.parse_config_flags(argv, DEFAULT_CONFIG)


def main(argv: list[str]) -> None:
  """Joins the processes of the run and runs the jobs."""
  command.no_arguments(argv)
  command.start()
  f = flags.FLAGS
  processes.initialize_distributed(f.coordinator_address, f.num_processes, f.process_id)
  settings = checks.flatten(json.loads(f.config.to_json_best_effort()))
  given = {'--job': f.job, '--workdir': f.workdir, '--download': f.download}
  processes.agree(given | settings)
  metrics.log_to_wandb(f.wandb)
  runner.run(f.config, f.job, f.workdir, f.download)
  processes.wait_for_all()


if __name__ == '__main__':
  command.run(main, parse_flags)
