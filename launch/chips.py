"""Accelerators that a program can be compiled for without having one: their peaks, and a mesh."""

import importlib.util
import math
import os
import pathlib
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from palm_jax.base.devices import mesh_of
from palm_jax.base.errors import UserError

GPUS = pathlib.Path(__file__).parent / 'gpus'
# Without these libtpu looks for the machine's own TPUs, and lets only one process in.
ENVIRONMENT = dict(
  TPU_SKIP_MDS_QUERY='1',
  TPU_ACCELERATOR_TYPE='v5litepod-8',
  TPU_WORKER_HOSTNAMES='localhost',
  TPU_WORKER_ID='0',
  ALLOW_MULTIPLE_LIBTPU_LOAD='1',
  TF_CPP_MIN_LOG_LEVEL='2',
)


class Chip(NamedTuple):
  """What arithmetic assumes of one chip.

  Of a TPU these are its documented peaks. Of a GPU they are what large products and copies reach:
  0.8 of the documented arithmetic, 0.9 of the bandwidth.
  """

  flops: float  # bf16 FLOP/s
  hbm: float  # bytes/s
  ici: float  # bytes/s sent over all links; half of what is documented as bidirectional
  memory: float  # bytes
  hop: float = 1e-6  # seconds; jax-ml.github.io/scaling-book, chapter 3: about a microsecond a hop
  launch: float = 0.0  # seconds that a kernel takes at least


CHIPS = {
  # docs.cloud.google.com/tpu/docs/v5e, v5p, v6e
  'v5e': Chip(197e12, 819e9, 200e9, 16 * 2**30),
  'v5p': Chip(459e12, 2765e9, 600e9, 95 * 2**30),
  'v6e': Chip(918e12, 1600e9, 400e9, 32 * 2**30),
  # NVIDIA's data sheets: 989 TFLOP/s, 4.8 and 3.35 TB/s, NVLink 900 GB/s in both directions; GB200:
  # 2,500 TFLOP/s, 8 TB/s, 1,800 GB/s
  'h200': Chip(790e12, 4.3e12, 360e9, 151397597184, hop=5e-6, launch=2.5e-6),
  'h100': Chip(790e12, 3.0e12, 360e9, 85029158912, hop=5e-6, launch=2.5e-6),
  'gb200': Chip(2000e12, 7.2e12, 720e9, 197897748480, hop=5e-6, launch=2.5e-6),
}
SLICES = 'v5e:2x4, v5e:16x16, v6e:16x16, v5p:4x4x4'


def is_gpu(kind: str) -> bool:
  """Whether a key of CHIPS is a GPU."""
  return CHIPS[kind].launch > 0


def parse_topology(topology: str) -> tuple[str, tuple[int, ...]]:
  """'v5e:16x16' -> ('v5e', (16, 16)), 'h200:8' -> ('h200', (8,)).

  Raises:
    UserError: a kind that is not in CHIPS, or no layout.
  """
  kind, _, layout = topology.partition(':')
  pattern = r'[1-9]\d*' if kind in CHIPS and is_gpu(kind) else r'\d+(x\d+)+'
  if kind not in CHIPS or not re.fullmatch(pattern, layout):
    raise UserError(
      f'--topology={topology} is unknown: expected a kind ({", ".join(CHIPS)}) and a layout, such '
      f'as {SLICES}, h200:1 or h200:8'
    )
  return kind, tuple(map(int, layout.split('x')))


def make_mesh(topology: str) -> Mesh:
  """The mesh of chips that need not exist.

  Raises:
    UserError: an unknown kind, no compiler for it, or a layout that the compiler refuses.
  """
  kind, layout = parse_topology(topology)
  found = _gpus(topology, kind, layout) if is_gpu(kind) else _tpus(topology)
  return mesh_of(found.devices)


def _gpus(topology, kind, layout):
  if not importlib.util.find_spec('jax_cuda12_plugin'):
    raise UserError(
      "the compiler for NVIDIA's GPUs is not installed: pip install 'palm_jax[cuda12]'"
    )
  # None of the machine's own, if it has some.
  os.environ.setdefault('CUDA_VISIBLE_DEVICES', '-1')
  facts = (GPUS / f'{kind}.txtpb').read_text()
  options = dict(topology=f'1x1x{math.prod(layout)}', target_config=facts)
  return topologies.get_topology_desc(platform='cuda', topology_name=topology, **options)


def _tpus(topology):
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      "libtpu is not installed, and it is the compiler for TPUs: pip install 'palm_jax[tpu]'"
    )
  for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology)
  except jax.errors.JaxRuntimeError as e:
    raise UserError(
      f'--topology={topology} is refused by libtpu ({str(e).splitlines()[0]}): if it is the '
      f'layout, choose one that Google Cloud offers, such as {SLICES}'
    ) from e
