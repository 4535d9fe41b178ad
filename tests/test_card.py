"""What is read off a GPU's trace, against one made by hand."""

import types

import jax
import jax.numpy as jnp
import pytest

from palm_jax.base import devices
from palm_jax.job import Run
from palm_jax.speed import benchmark, card
from tests.worlds import LinearGenerator, tiny_config


def trace(*kernels):
  """Events of two iterations: a GPU's stream, the same by module, another GPU, the host."""
  name = lambda kind, label, **of: dict(ph='M', name=kind, args=dict(name=label), **of)
  ran = lambda pid, tid, what, start, took: dict(
    ph='X', pid=pid, tid=tid, name=what, ts=start, dur=took
  )
  return [
    name('process_name', '/host:CPU', pid=1),
    name('process_name', '/device:GPU:0', pid=2),
    name('process_name', '/device:GPU:1', pid=3),
    name('thread_name', 'Stream #13(Compute)', pid=2, tid=1),
    name('thread_name', 'Stream #14(MemcpyD2D)', pid=2, tid=2),
    name('thread_name', 'XLA Modules', pid=2, tid=9),
    name('thread_name', 'Stream #13(Compute)', pid=3, tid=1),
    ran(1, 1, 'python', 0, 1000),
    ran(2, 9, 'jit_call', 0, 900),
    ran(3, 1, 'conv', 0, 700),
    *(ran(2, *kernel) for kernel in kernels),
  ]


def test_kernels_of_a_trace():
  events = trace(
    (1, 'conv', 100, 40), (1, 'conv', 200, 60), (1, 'relu', 140, 10), (2, 'copy', 250, 30)
  )
  found = card.kernels_of(events, iterations=2, top=2)
  assert found['kernels'] == 2
  assert found['busy_seconds'] == pytest.approx((50 + 80) * 1e-6 / 2)  # the copy overlaps by 10
  assert found['span_seconds'] == pytest.approx(180e-6 / 2)
  assert found['idle_share'] == pytest.approx(50 / 180)
  assert found['kernel_seconds'] == {
    'conv': (1, pytest.approx(50e-6)),
    'copy': (0.5, pytest.approx(15e-6)),
  }


def test_a_trace_without_gpu_shows_nothing():
  assert card.kernels_of(trace(), 1, 5) == {}
  f = jax.jit(jnp.sin)
  assert card.profile(lambda: f(jnp.ones(3)), 1) == {}


def test_peaks():
  found = card.peaks(jnp.float32)
  assert found.keys() == {'matmul_flops_per_second', 'copy_bytes_per_second', 'launch_seconds'}
  assert all(0 < x < 1e18 for x in found.values())


def test_what_is_known_is_written_and_what_takes_too_long_left_out(tmp_path, monkeypatch):
  config = tiny_config()
  config.jobs = ('pretrain',)
  config.benchmark.minutes = 1.0
  now = iter([0.0, 1.0, 61.0, 62.0])
  monkeypatch.setattr(benchmark, 'time', types.SimpleNamespace(monotonic=lambda: next(now)))
  monkeypatch.setattr(benchmark.plan, 'make_generator', lambda *_: LinearGenerator())
  monkeypatch.setattr(benchmark.workload, 'draw_weights', lambda generator: generator)
  monkeypatch.setattr(benchmark, 'pretraining', lambda *_: dict(efficiency=0.5))
  result = benchmark.run(Run(config, tmp_path, devices.make_mesh(1)))
  assert result['pretrain'] == dict(efficiency=0.5)
  assert result['left_out'] == ['drawing', 'doors']
  assert '"efficiency": 0.5' in (tmp_path / benchmark.PARTS_FILE).read_text()


def test_other_graphs_are_compiled_and_timed():
  """The options are XLA's own; on CPU they change nothing."""
  graphs = card.GRAPHS['graphs with convolutions']
  compiled = jax.jit(jnp.sin).lower(jnp.ones(3))
  assert compiled.compile(compiler_options={'xla_gpu_enable_command_buffer': graphs})(jnp.ones(3))[
    0
  ] == pytest.approx(0.8414709)
