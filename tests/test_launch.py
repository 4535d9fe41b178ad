"""The launchers, with stand-ins for what they start: a palm_jax.main of ten lines, sbatch, srun,
scontrol, gcloud."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from launch.local import copy_output

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'

# Says how it was called; stops on SIGTERM and SIGHUP with code 0 as the real one, unless its
# behaviour is another.
MAIN = """
import json, os, signal, sys, time
given = [a.partition('=')[2] for a in sys.argv if a.startswith('--process_id=')]
number = given[0] if given else os.environ.get('SLURM_PROCID')
say = lambda line: os.write(1, f'{line}\\n'.encode())  # in one piece
number, behaviour = int(number), os.environ.get('BEHAVIOUR', 'complete')
devices = os.environ.get('JAX_NUM_CPU_DEVICES')
with open(f'called.{number}', 'w') as f:
  json.dump(dict(argv=sys.argv[1:], pid=os.getpid(), devices=devices), f)
for sent in (signal.SIGTERM, signal.SIGHUP):
  signal.signal(sent, lambda *_: (say('saved'), sys.exit(0)))
say('one line')
if behaviour == 'fail' and number == 1:
  sys.exit(3)
if behaviour == 'bad exit after SIGTERM':
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
if behaviour == 'ends by SIGTERM':
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
if behaviour != 'complete':
  open(f'waits.{number}', 'w').close()
  for _ in range(3000):  # a signal just before a sleep is handled after it
    time.sleep(0.1)
"""

COMMANDS = dict(
  # As the real ones where it matters: srun sets a task's variables, kills all tasks on SIGTERM and
  # gives the worst exit code; scancel knows no step before srun has made it.
  srun="""#!/usr/bin/env bash
printf '%s\\n' "$@" >srun.called
while [[ $1 == --* ]]; do shift; done
pids=()
trap 'kill -KILL "${pids[@]}"' TERM
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i "$@" & pids+=($!); done
echo "${pids[@]}" >step.pids
worst=0
for pid in "${pids[@]}"; do
  while :; do
    wait "$pid"; code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  wait "$pid"; code=$?
  if ((code > worst)); then worst=$code; fi
done
exit "$worst"
""",
  scancel="""#!/usr/bin/env bash
if [[ ! -e scancel.called ]]; then touch scancel.called; exit 1; fi
if [[ $* != '--signal=TERM 17.0' ]]; then exit 2; fi
kill -TERM $(<step.pids)
""",
  sbatch="""#!/usr/bin/env bash
printf '%s\\n' "$@" >sbatch.called
""",
  scontrol="""#!/usr/bin/env bash
echo "$@" >>scontrol.called
if [[ -n ${REFUSES:-} ]]; then exit 1; fi
if [[ $1 == show ]]; then
  echo "   JobState=${STATE:-RUNNING} Reason=None"
  echo "   StartTime=2026-05-01T10:00:00 EndTime=2026-05-02T10:00:00 Deadline=N/A"
  echo "   PreemptEligibleTime=2026-05-01T10:00:00 PreemptTime=${PREEMPTED:-None}"
fi
""",
  gcloud="""#!/usr/bin/env bash
printf '%s\\0' gcloud "$@" >>commands.called
echo >>commands.called
if [[ -n ${SLOW:-} && "$*" == *"queued-resources create"* ]]; then touch asks; sleep 1; fi
if [[ "$*" == *"queued-resources describe"* ]]; then
  if [[ -e asked ]]; then echo "${STATE:-ACTIVE}"; else touch asked; echo WAITING_FOR_RESOURCES; fi
fi
""",
)


@pytest.fixture
def place(tmp_path):
  """A working folder with the stand-ins -> (folder, environment), which SIGHUP ends."""
  (tmp_path / 'palm_jax').mkdir()
  (tmp_path / 'palm_jax' / 'main.py').write_text(MAIN)
  (tmp_path / 'bin').mkdir()
  for name, text in COMMANDS.items():
    (tmp_path / 'bin' / name).write_text(text)
    (tmp_path / 'bin' / name).chmod(0o755)
  (tmp_path / 'bin' / 'python').symlink_to(sys.executable)
  env = {
    name: value for name, value in os.environ.items() if not name.startswith(('SLURM_', 'JAX_'))
  }
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
  yield tmp_path, dict(env, PATH=f'{tmp_path / "bin"}:{env["PATH"]}', PYTHONPATH='')
  signal.signal(signal.SIGHUP, before)


def wait_for(*paths):
  deadline = time.monotonic() + 60
  while not all(path.exists() for path in paths):
    assert time.monotonic() < deadline, paths
    time.sleep(0.02)


def running(pid):
  stat = pathlib.Path(f'/proc/{pid}/stat')
  return stat.exists() and stat.read_text().rpartition(')')[2].split()[0] != 'Z'


def local(place, *arguments, **environment):
  folder, env = place
  quick = (
    f'import sys; sys.path.insert(0, {str(LAUNCH)!r}); import local; '
    'local.GRACE_SECONDS = 0.5; sys.exit(local.main(sys.argv[1:]))'
  )
  return subprocess.Popen(
    [sys.executable, '-c', quick, '--processes=3', '--devices=2', '--', *arguments],
    cwd=folder,
    env=dict(env, **environment),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def called(folder, number):
  return json.loads((folder / f'called.{number}').read_text())


def test_local_starts_processes_that_can_find_each_other(place):
  process = local(place, '--config=a b.py')
  output = process.communicate(timeout=60)[0]
  assert process.returncode == 0
  assert sorted(output.splitlines()) == ['[0] one line', '[1] one line', '[2] one line']
  calls = [called(place[0], i) for i in range(3)]
  assert {call['devices'] for call in calls} == {'2'}
  addresses = {call['argv'][1] for call in calls}
  assert len(addresses) == 1 and addresses.pop().startswith('--coordinator_address=127.0.0.1:')
  assert [call['argv'][2:] for call in calls] == [
    ['--num_processes=3', f'--process_id={i}'] for i in range(3)
  ]
  assert {call['argv'][0] for call in calls} == {'--config=a b.py'}


def test_local_takes_all_output_when_nobody_reads_its_own(monkeypatch):
  """A process whose output is not taken waits, and so do all others."""

  class Ended:
    def write(self, text):
      raise BrokenPipeError

  monkeypatch.setattr(sys, 'stdout', Ended())
  lines = iter([b'one\n', b'two\n'])
  copy_output(0, lines)
  assert next(lines, None) is None


def test_local_ends_all_when_one_fails(place):
  process = local(place, BEHAVIOUR='fail')
  process.communicate(timeout=60)
  assert process.returncode == 3  # not that of those it killed
  assert not any(running(called(place[0], i)['pid']) for i in range(3))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_local_passes_signals_on(place, number):
  process = local(place, BEHAVIOUR='wait')
  wait_for(*(place[0] / f'waits.{i}' for i in range(3)))
  process.send_signal(number)
  output = process.communicate(timeout=60)[0]
  assert process.returncode == 0 and output.count('saved') == 3


@pytest.mark.skipif(
  sys.platform != 'linux', reason='processes that die with their parent are a matter of Linux'
)
def test_local_leaves_no_orphans_when_it_is_killed(place):
  process = local(place, BEHAVIOUR='wait')
  wait_for(*(place[0] / f'waits.{i}' for i in range(3)))
  process.kill()
  process.communicate(timeout=60)
  deadline = time.monotonic() + 30
  while any(running(called(place[0], i)['pid']) for i in range(3)):
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.mark.parametrize('argument', ['--processes=0', '--devices=two', '--unknown=1'])
def test_local_refuses(place, argument):
  done = subprocess.run(
    [sys.executable, LAUNCH / 'local.py', argument],
    cwd=place[0],
    env=place[1],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and argument.partition('=')[0] in done.stderr.splitlines()[-1]


def slurm(place, **environment):
  folder, env = place
  return subprocess.Popen(
    [LAUNCH / 'slurm.sh', '--config=configs/cifar.py', '--config.data.name=my data.npz'],
    cwd=folder,
    env=dict(env, WORKDIR=str(folder / 'run a'), **environment),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


IN_A_JOB = dict(SLURM_JOB_ID='17', SLURM_NTASKS='2')


def requeues(folder):
  path = folder / 'scontrol.called'
  return path.read_text().count('requeue 17') if path.exists() else 0


@pytest.mark.parametrize(('gpus', 'tasks'), [('4', '4'), ('0', '1')])
def test_slurm_submits_itself(place, gpus, tasks):
  process = slurm(place, NODES='3', GPUS=gpus, CPUS='6', HOURS='2')
  assert process.communicate(timeout=60)[0] == '' and process.returncode == 0
  got = (place[0] / 'sbatch.called').read_text().splitlines()
  assert {
    '--nodes=3',
    f'--ntasks-per-node={tasks}',
    '--cpus-per-task=6',
    '--time=2:00:00',
    '--requeue',
  } < set(got)
  assert (f'--gpus-per-node={gpus}' in got) == (gpus != '0')
  assert [arg for arg in got if arg.startswith('--signal')] == [
    '--signal=B:USR1@300'
  ]  # B: to the script
  assert got[-3:] == [
    str(LAUNCH / 'slurm.sh'),
    '--config=configs/cifar.py',
    '--config.data.name=my data.npz',
  ]


def test_slurm_runs_to_the_end(place):
  process = slurm(place, **IN_A_JOB)
  output = process.communicate(timeout=60)[0]
  assert process.returncode == 0 and output.count('one line') == 2 and not requeues(place[0])
  assert called(place[0], 1)['argv'] == [
    f'--workdir={place[0] / "run a"}',
    '--config=configs/cifar.py',
    '--config.data.name=my data.npz',
  ]
  assert '--kill-on-bad-exit=1' in (place[0] / 'srun.called').read_text()


@pytest.mark.parametrize(
  ('behaviour', 'number', 'state', 'times'),
  [
    ('wait', signal.SIGUSR1, 'RUNNING', 1),  # before the time limit
    ('wait', signal.SIGTERM, 'RUNNING', 1),  # preempted
    ('wait', signal.SIGTERM, 'CANCELLED', 0),  # scancel
    (
      'ends by SIGTERM',
      signal.SIGUSR1,
      'RUNNING',
      1,
    ),  # between two jobs, where nothing is to be saved
  ],
)
def test_slurm_saves_and_queues_again(place, behaviour, number, state, times):
  process = slurm(place, BEHAVIOUR=behaviour, STATE=state, **IN_A_JOB)
  wait_for(*(place[0] / f'waits.{i}' for i in range(2)))
  process.send_signal(number)
  output = process.communicate(timeout=60)[0]
  assert (
    process.returncode == 0
    and output.count('saved\n') == 2 * (behaviour == 'wait')
    and requeues(place[0]) == times
  )


@pytest.mark.parametrize(
  ('about', 'times'),
  [
    (dict(PREEMPTED='2026-05-01T12:00:00'), 1),
    (dict(PREEMPTED='2026-04-30T12:00:00'), 0),  # of the start before this one
    (dict(PREEMPTED='2026-05-01T12:00:00', STATE='CANCELLED'), 0),
    (dict(PREEMPTED='Unknown'), 0),
    (dict(), 0),
    (dict(REFUSES='yes'), 0),
  ],
)
@pytest.mark.parametrize('behaviour', ['wait', 'ends by SIGTERM'])
def test_slurm_queues_again_what_is_preempted_with_a_grace_time(place, behaviour, about, times):
  """Its SIGTERM comes to the processes alone."""
  process = slurm(place, BEHAVIOUR=behaviour, **about, **IN_A_JOB)
  wait_for(*(place[0] / f'waits.{i}' for i in range(2)))
  for i in range(2):
    os.kill(called(place[0], i)['pid'], signal.SIGTERM)
  process.communicate(timeout=60)
  ended_by_it = behaviour == 'ends by SIGTERM' and 'STATE' not in about and not times
  assert process.returncode == (143 if ended_by_it else 0) and requeues(place[0]) == times


@pytest.mark.parametrize(('behaviour', 'code'), [('bad exit after SIGTERM', 5), ('fail', 3)])
def test_slurm_does_not_queue_a_failure_again(place, behaviour, code):
  process = slurm(place, BEHAVIOUR=behaviour, **IN_A_JOB)
  wait_for(place[0] / 'waits.0')
  if behaviour == 'fail':  # srun --kill-on-bad-exit ends the others
    os.kill(called(place[0], 0)['pid'], signal.SIGTERM)
  else:
    wait_for(place[0] / 'waits.1')
    process.send_signal(signal.SIGUSR1)
  process.communicate(timeout=60)
  assert process.returncode == code and not requeues(place[0])


def test_slurm_needs_a_workdir(place):
  done = subprocess.run(
    [LAUNCH / 'slurm.sh'], cwd=place[0], env=place[1], capture_output=True, text=True
  )
  assert done.returncode and 'WORKDIR' in done.stderr and not (place[0] / 'sbatch.called').exists()


SLICE = [
  '--name=palm',
  '--zone=us-west4-a',
  '--accelerator=v5litepod-16',
  '--runtime=v2-alpha-tpuv5-lite',
  '--nfs=10.0.0.2:/a share',
  '--workdir=runs/my run',
  '--fetch=got',
  '--project=p',
  '--spot',
]
ARGUMENTS = [
  '--config=configs/cifar.py',
  "--config.data.name=my data's.npz",
  '--config.sac.hidden=(16, $HOME)',
]


def tpu_vm(place, *arguments, **environment):
  folder, env = place
  if not (folder / '.git').exists():
    for command in (
      ['init', '-q'],
      ['-c', 'user.name=n', '-c', 'user.email=e', 'commit', '-q', '--allow-empty', '-m', 'm'],
    ):
      subprocess.run(['git', *command], cwd=folder, check=True)
  return subprocess.run(
    [LAUNCH / 'tpu_vm.sh', *arguments],
    cwd=folder,
    env=dict(env, POLL_SECONDS='0', **environment),
    capture_output=True,
    text=True,
    timeout=60,
  )


def gcloud_calls(folder):
  return [line.split('\0')[:-1] for line in (folder / 'commands.called').read_text().splitlines()]


def verbs(commands):
  return [
    ' '.join(word for word in command[2:6] if not word.startswith(('--', '/')))
    for command in commands
  ]


def test_tpu_vm_goes_through_a_slices_life(place):
  done = tpu_vm(place, *SLICE, '--', *ARGUMENTS)
  assert done.returncode == 0, done.stderr
  calls = gcloud_calls(place[0])
  assert verbs(calls) == [
    'tpus queued-resources create palm',
    'tpus queued-resources describe palm',
    'tpus queued-resources describe palm',
    'tpus tpu-vm scp',
    'tpus tpu-vm ssh palm',
    'tpus tpu-vm ssh palm',
    'tpus tpu-vm ssh palm',
    'tpus tpu-vm scp',
    'tpus queued-resources delete palm',
  ]
  assert all('--zone=us-west4-a' in call and '--project=p' in call for call in calls)
  assert '--spot' in calls[0] and '--accelerator-type=v5litepod-16' in calls[0]
  assert all('--worker=all' in call for call in calls[3:6]) and '--force' in calls[-1]
  setup, command = (
    next(arg for arg in call if arg.startswith('--command=')).removeprefix('--command=')
    for call in calls[4:6]
  )
  assert 'mount -t nfs 10.0.0.2:/a\\ share' in setup
  # What the workers' shell makes of it.
  words = shlex.split(command)
  start = words.index('palm_jax.main')
  assert words[start + 1 :] == ['--workdir=/mnt/palm/runs/my run', *ARGUMENTS]
  copy = next(arg for arg in calls[6] if arg.startswith('--command=')).removeprefix('--command=')
  results, figure = copy.split(' && {')
  assert shlex.split(results)[-2:] == ['/mnt/palm/runs/my run/results', 'palm_fetched/']
  assert shlex.split(figure)[1:3] == ['/mnt/palm/runs/my run/figure.png', 'palm_fetched/results/']
  assert 'palm:palm_fetched/results' in calls[7] and 'got' in calls[7]
  assert (place[0] / 'got').is_dir()
  subprocess.run(['bash', '-n', '-c', f'{setup}\n{command}\n{copy}'], check=True)


def test_tpu_vm_dry_run_prints_the_same_and_runs_nothing(place):
  tpu_vm(place, *SLICE, '--', *ARGUMENTS)
  calls = gcloud_calls(place[0])
  (place[0] / 'commands.called').unlink()
  done = tpu_vm(place, *SLICE, '--dry_run', '--', *ARGUMENTS)
  assert done.returncode == 0 and not (place[0] / 'commands.called').exists()
  printed = [shlex.split(line) for line in done.stdout.splitlines()]
  assert [command for command in printed if command[0] == 'git' and command[1] == 'archive']
  printed = [command for command in printed if command[0] == 'gcloud']
  calls = [
    call for i, call in enumerate(calls) if call not in calls[:i]
  ]  # `describe` was asked twice
  without_archive = lambda commands: [
    [word for word in command if not word.endswith('.tar.gz')] for command in commands
  ]
  assert without_archive(printed) == without_archive(calls)


def test_tpu_vm_says_what_may_be_left_when_it_is_interrupted_while_asking(place):
  folder, env = place
  process = subprocess.Popen(
    [LAUNCH / 'tpu_vm.sh', *SLICE, '--', *ARGUMENTS],
    cwd=folder,
    env=dict(env, SLOW='yes', TMPDIR=str(folder)),
    stderr=subprocess.PIPE,
    text=True,
  )
  wait_for(folder / 'asks')
  process.send_signal(signal.SIGTERM)
  said = process.communicate(timeout=60)[1]
  assert process.returncode == 130 and 'see whether it is there, and give it back' in said
  assert verbs(gcloud_calls(folder)) == ['tpus queued-resources create palm']
  assert not list(folder.glob('*.tar.gz'))


@pytest.mark.parametrize('state', ['FAILED', 'SUSPENDED'])
def test_tpu_vm_gives_back_what_it_cannot_use(place, state):
  done = tpu_vm(place, *SLICE, '--', *ARGUMENTS, STATE=state)
  assert done.returncode == 2 and state in done.stderr.splitlines()[-1]
  assert verbs(gcloud_calls(place[0]))[-1] == 'tpus queued-resources delete palm'


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [(SLICE[1:], '--name is missing'), ([*SLICE, '--zones=a'], '--zones=a is unknown')],
)
def test_tpu_vm_refuses(place, arguments, message):
  done = tpu_vm(place, *arguments)
  assert (
    done.returncode == 2 and message in done.stderr and not (place[0] / 'commands.called').exists()
  )


# Says how it was called, and leaves a result unless it is asked to stop.
ATARI_MAIN = """
import os, pathlib, sys
with open('calls', 'a') as f:
  print(*sys.argv[1:], sep='|', file=f)
folder = pathlib.Path(sys.argv[1].removeprefix('--workdir=')) / 'results'
if str(folder) != os.environ.get('STOPS_IN'):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'scores.json').touch()
"""


def test_atari_plays_every_game_once_and_goes_on(place):
  folder, env = place
  (folder / 'palm_jax' / 'main.py').write_text(ATARI_MAIN)
  (folder / 'palm_jax' / 'atari').mkdir()
  (folder / 'palm_jax' / 'atari' / 'environment.py').write_text("GAMES = 'Alien', 'Pong', 'Krull'")

  def calls(*arguments, code=0, **environment):
    done = subprocess.run(
      [LAUNCH / 'atari.sh', 'my runs', *arguments], cwd=folder, env=env | environment
    )
    assert done.returncode == code
    lines = (folder / 'calls').read_text().splitlines()
    (folder / 'calls').unlink()
    return [line.split('|') for line in lines]

  scores = [
    '--workdir=my runs/all',
    '--config=configs/atari.py:Assault',
    '--job=scores',
    "--config.scores.runs=('my runs/**',)",
  ]
  run = lambda game, seed, variant='', *more: [
    f'--workdir=my runs/{game}/{seed}',
    f'--config=configs/atari.py:{game}{variant}',
    f'--config.seed={seed}',
    *more,
  ]
  assert calls(STOPS_IN='my runs/Pong/0/results', code=1) == [run('Alien', 0), run('Pong', 0)]
  # What is complete is for the command to tell, which also sees other settings.
  assert calls() == [run('Alien', 0), run('Pong', 0), run('Krull', 0), scores]
  assert calls('--config.x=1', GAMES='Krull', SEEDS='0 3', VARIANT=',laptop') == [
    run('Krull', 0, ',laptop', '--config.x=1'),
    run('Krull', 3, ',laptop', '--config.x=1'),
    scores,
  ]
  assert calls(SCORES='1', SEEDS='0 7') == [scores]
  done = subprocess.run(
    [LAUNCH / 'atari.sh', 'my runs', '--job=finetune'],
    cwd=folder,
    env=env,
    capture_output=True,
    text=True,
  )
  assert (
    done.returncode == 2
    and "--config.jobs=\"('finetune', 'scores')\"" in done.stderr
    and not (folder / 'calls').exists()
  )


@pytest.mark.parametrize('script', ['atari.sh', 'slurm.sh', 'tpu_vm.sh'])
def test_shell_scripts_are_well_formed(script):
  subprocess.run(['bash', '-n', LAUNCH / script], check=True)
  if shutil.which('shellcheck'):
    subprocess.run(['shellcheck', LAUNCH / script], check=True)


@pytest.mark.slow
def test_skypilot_reads_its_file():
  sky = pytest.importorskip('sky', reason='skypilot is not installed')
  text = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())
  task = sky.Task.from_yaml_config(text, env_overrides=[('BUCKET', 'runs'), ('RUN', 'a')])
  kinds = {name for resources in task.resources for name in resources.accelerators}
  assert {'H100', 'tpu-v6e-8'} < kinds and all(resources.use_spot for resources in task.resources)
  assert list(task.storage_mounts) == ['/runs']
  for script in (task.setup, task.run):
    subprocess.run(['bash', '-n', '-c', script], check=True)
