"""Sections with the scalars of a training as small charts, the runs over each other."""

from palm_jax.report import charts, page
from palm_jax.report.read import STEPS, Report, is_finite

UNITS = {'pretrain': 'env steps', 'generator': 'images'}
# Charts in this order; all other scalars are hidden until asked for.
TITLES = {
  'pretrain': {
    'loss': 'SimSiam loss',
    'h_effective_rank': 'Effective rank of h',
    'z_effective_rank': 'Effective rank of z',
    'z_std_ratio': 'Spread of z (1: sphere)',
    'h_cosine': 'Cosine of consecutive h',
    'knn_accuracy': 'Accuracy of kNN',
    'reward': 'Reward',
    'entropy_per_dim': 'Policy entropy a dimension',
    'alpha_logp': 'alpha log pi',
    'alpha': 'Temperature alpha',
    'q': 'Q of the critics',
    'critic_loss': 'Critic loss',
  },
  'generator': {
    'loss_g': 'Generator loss',
    'loss_d': 'Discriminator loss',
    'logits_real': 'Logits, real pictures',
    'logits_fake': 'Logits, generated pictures',
    'sign_real': 'Mean sign of D, real',
    'r1': 'R1 penalty',
    'augment_p': 'Augmentation p',
  },
}


def section(job: str, report: Report) -> str:
  """The curves of a job's metrics; '' where no run has those that matter."""
  titles = TITLES[job]
  runs = [(i, run) for i, run in enumerate(report.runs) if run.metrics.get(job)]
  names = list(dict.fromkeys(name for _, run in runs for line in run.metrics[job] for name in line))
  names = [name for name in names if name not in (STEPS[job], 'step')]
  main = _charts(job, runs, [name for name in titles if name in names])
  if not main:
    return ''
  legend = ''
  if len(report.runs) > 1:
    legend = charts.legend([(i, run.name) for i, run in runs])
  out = f'<p class="soft">From {job}/metrics.jsonl, against {UNITS[job]}.</p>{legend}{main}'
  others = [name for name in names if name not in titles]
  if others:
    out += page.details(f'{len(others)} other scalars', _charts(job, runs, others))
  return out


def _charts(job, runs, names):
  content = ''.join(_chart(job, runs, name) for name in names)
  return f'<div class="charts">{content}</div>' if content else ''


def _chart(job: str, runs, name: str):
  series = []
  for i, run in runs:
    lines = [line for line in run.metrics[job] if name in line]
    xs = [line[STEPS[job]] for line in lines]
    ys = [line[name] if is_finite(line[name]) else None for line in lines]
    series.append((i, run.name, xs, ys))
  return charts.chart(TITLES[job].get(name, name), series, UNITS[job])
