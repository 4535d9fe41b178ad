"""What compile_for found, in words."""

from typing import Any

from launch.chips import CHIPS, parse_topology


def gigabytes(n: float) -> str:
  """A number of bytes as text."""
  return f'{n / 2**30:.2f} GiB'


def _floor_of_gpu(s, chip):
  seconds = {name: 1e3 * x for name, x in s['seconds'].items()}
  return [
    f'time            {seconds["iteration"]:.2f} ms = kernels {seconds["kernels"]:.2f} (arithmetic '
    f'alone {seconds["compute"]:.2f}, traffic alone {seconds["memory"]:.2f}) + network '
    f'{seconds["network"]:.2f}',
    f'{s["env_steps"] / 1e6:.4g}M steps  {s["hours"]:.3g} hours: a floor, not a forecast',
    f'assumed         {chip.flops / 1e12:.0f} TFLOP/s bf16 (half in float32), '
    f'{chip.hbm / 1e12:.1f} TB/s, {1e6 * chip.launch:.1f} us a kernel at least, '
    f'{chip.ici / 1e9:.0f} GB/s sent over NVLink',
  ]


def _floor_of_tpu(s, chip):
  seconds = {name: 1e3 * x for name, x in s['seconds'].items()}
  return [
    f'time            {seconds["iteration"]:.2f} ms = max(compute {seconds["compute"]:.2f}, HBM '
    f'{seconds["memory"]:.2f}) + network {seconds["network"]:.2f}',
    f'{s["env_steps"] / 1e6:.4g}M steps  {s["hours"]:.3g} hours: a floor, not a forecast; the '
    f'compiler itself reckons with {s["cycles"] / 1e6:.1f}M cycles an iteration without the '
    'network',
    f'assumed         {chip.flops / 1e12:.0f} TFLOP/s bf16, HBM {chip.hbm / 1e9:.0f} GB/s, '
    f'{chip.ici / 1e9:.0f} GB/s sent over all links (docs.cloud.google.com/tpu/docs),',
    f'                {1e6 * chip.hop:.0f} us a hop; every chip one mesh position, no host in '
    'between',
  ]


def describe(s: dict[str, Any]) -> str:
  """The numbers of `study` in words."""
  memory = s['memory']
  chip = CHIPS[parse_topology(s['topology'])[0]]
  percent = lambda part: f'{100 * part / memory["total"]:.0f}%'
  lines = [
    f'{s["topology"]}: {s["chips"]} chips ({s["device_kind"]}), config {s["config"]}, '
    f'{s["dtype"]}; lowered in {s["lower_seconds"]:.0f} s, compiled in '
    f'{s["compile_seconds"]:.0f} s',
    'sizes           ' + ' '.join(f'--config.{name}={value}' for name, value in s['sizes'].items()),
    '',
    'On each chip:',
    f'memory          {gigabytes(memory["total"])} of {gigabytes(memory["chip"])}: '
    + ', '.join(
      f'{name.replace("_", " ")} {gigabytes(n)} ({percent(n)})'
      for name, n in memory.items()
      if name not in ('total', 'chip')
    ),
    f'arithmetic      {s["flops"] / 1e9:.1f} GFLOP an iteration, in products and convolutions',
  ]
  if 'counted_once' in s:
    lines.append(
      f"                (each loop's body counted once: {s['counted_once']['flops'] / 1e9:.1f}, "
      f'and {s["counted_once"]["xla_flops"] / 1e9:.1f} by XLA, which counts so and adds what is '
      'elementwise)'
    )
  lines.append(f'HBM traffic     {s["hbm_bytes"] / 1e9:.2f} GB an iteration')
  if 'launches' in s:
    lines.append(
      f'launches        {s["launches"]:.0f} an iteration; {s["fused_convolutions"]:.0f} '
      'convolutions with bias and ReLU in one'
    )
  for kind, c in s['collectives'].items():
    lines.append(f'{kind:15s} {c["sent"] / 1e6:.2f} MB sent an iteration, in {c["count"]:.4g}')
  if s['loops_of_unknown_length']:
    lines.append(
      f'counted once, because their length is unknown: {", ".join(s["loops_of_unknown_length"])}'
    )
  lines += [
    '',
    f'An iteration of {s["env_steps_per_iteration"]} env steps, at the peaks of the chip:',
    *(_floor_of_gpu(s, chip) if 'launches' in s else _floor_of_tpu(s, chip)),
  ]
  return '\n'.join(lines)
