"""What a GPU does, beside the times of whole calls: its peaks, its kernels, its idle time."""

import collections
import gzip
import json
import math
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from palm_jax.speed import timing

COPIED = 2**31  # bytes
LAUNCHES = 2000
# XLA:GPU's CUDA graphs: which operations may stand in one. Convolutions are not in its default.
DEFAULT_GRAPHS = 'FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION'
GRAPHS = {
  'without graphs': '',
  'graphs with convolutions': f'{DEFAULT_GRAPHS},CONVOLUTION',
}


def peaks(dtype: Any) -> dict[str, float]:
  """What arithmetic assumes of one device, measured.

  Args:
    dtype: of the matrix product.

  Returns:
    matmul_flops_per_second; copy_bytes_per_second, read and written; launch_seconds, of a kernel
    that does nothing, in a loop.
  """
  size = COPIED if jax.default_backend() != 'cpu' else COPIED // 32
  x = jnp.zeros(size // 4, jnp.float32)
  copy = jax.jit(lambda x: x + 1).lower(x).compile()
  small = jnp.zeros(64)
  turn = lambda x, _: (lax.optimization_barrier(jnp.sin(x)), None)
  loop = jax.jit(lambda x: lax.scan(turn, x, length=LAUNCHES)[0]).lower(small).compile()
  fastest = lambda call: min(timing.seconds(call)[0] for _ in range(1 + timing.REPEATS))
  return dict(
    matmul_flops_per_second=timing.matmul_flops(dtype),
    copy_bytes_per_second=2 * x.nbytes / fastest(lambda: copy(x)),
    launch_seconds=fastest(lambda: loop(small)) / LAUNCHES,
  )


def profile(call: Callable[[], Any], iterations: int, top: int = 40) -> dict[str, Any]:
  """One call as the profiler sees it: see `kernels_of`."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(call())
    files = sorted(pathlib.Path(folder).rglob('*.trace.json.gz'))
    events = json.loads(gzip.decompress(files[-1].read_bytes()))['traceEvents'] if files else []
  return kernels_of(events, iterations, top)


def kernels_of(events: list[dict[str, Any]], iterations: int, top: int) -> dict[str, Any]:
  """What ran on the first GPU of a trace.

  Args:
    events: 'traceEvents' in the format of Chrome's tracing, times in microseconds.
    iterations: that the trace covers.
    top: how many kernels to name.

  Returns:
    an iteration's kernels, busy_seconds, span_seconds from the first kernel's start to the last
    one's end, and idle_share of the span; kernel_seconds {name: (launches, seconds)} of the
    longest. Empty where the trace shows no GPU.
  """
  names = {
    e['pid']: str(e.get('args', {}).get('name', ''))
    for e in events
    if e.get('name') == 'process_name'
  }
  gpus = sorted(pid for pid, name in names.items() if re.search(r'/device:GPU:\d+', name))
  threads = {
    (e['pid'], e['tid']): str(e.get('args', {}).get('name', ''))
    for e in events
    if e.get('name') == 'thread_name'
  }
  # A stream's thread has what ran; others repeat it by module, operation and source.
  ran = [
    e
    for e in events
    if e.get('ph') == 'X'
    and gpus
    and e['pid'] == gpus[0]
    and threads.get((e['pid'], e['tid']), '').startswith('Stream')
  ]
  if not ran:
    return {}
  by_name = collections.defaultdict(lambda: [0, 0.0])
  for event in ran:
    by_name[event['name']][0] += 1
    by_name[event['name']][1] += event['dur']
  busy, end = 0.0, -math.inf
  for event in sorted(ran, key=lambda e: e['ts']):  # streams overlap
    stop = event['ts'] + event['dur']
    busy += max(0.0, stop - max(end, event['ts']))
    end = max(end, stop)
  span = end - min(e['ts'] for e in ran)
  each = 1e-6 / iterations
  longest = sorted(by_name.items(), key=lambda item: -item[1][1])[:top]
  return dict(
    kernels=len(ran) / iterations,
    busy_seconds=busy * each,
    span_seconds=span * each,
    idle_share=1 - busy / span,
    kernel_seconds={name: (n / iterations, took * each) for name, (n, took) in longest},
  )
