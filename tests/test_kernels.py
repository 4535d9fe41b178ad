"""What XLA:GPU launches, read off a program's text, against closed forms; a slow test compiles."""

import importlib.util
import json
import subprocess
import sys

import pytest

from launch import chips, compile_for, described, kernels
from launch.compiled_text import parse
from palm_jax.base.errors import UserError
from tests.worlds import LinearGenerator, tiny_config

BF16, F32 = 2, 4
# Pictures of 8x8 with 3 channels, a 3x3 kernel to 5 channels, in a loop of four steps.
TEXT = """HloModule jit_call

%fused (param_0: f32[2,8,8,5]) -> f32[2,8,8,5] {
  %param_0 = f32[2,8,8,5]{3,2,1,0} parameter(0)
  ROOT %add.1 = f32[2,8,8,5]{3,2,1,0} add(%param_0, %param_0)
}

%inside (param_1: f32[6,7], param_2: f32[7,9]) -> f32[6,9] {
  %param_1 = f32[6,7]{1,0} parameter(0)
  %param_2 = f32[7,9]{1,0} parameter(1)
  ROOT %dot.1 = f32[6,9]{1,0} dot(%param_1, %param_2), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

%body (state: (s32[], bf16[2,8,8,3])) -> (s32[], bf16[2,8,8,3]) {
  %state = (s32[], bf16[2,8,8,3]{3,2,1,0}) parameter(0)
  %x = bf16[2,8,8,3]{3,2,1,0} get-tuple-element(%state), index=1
  %i = s32[] get-tuple-element(%state), index=0
  %w = bf16[5,3,3,3]{3,2,1,0} constant({...})
  %forward = (bf16[2,8,8,5]{3,2,1,0}, u8[4096]{0}) custom-call(%x, %w), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward", metadata={op_name="jit(f)/jvp(vmap(ResNet))/conv"}
  %y = bf16[2,8,8,5]{3,2,1,0} get-tuple-element(%forward), index=0
  %back = (bf16[2,8,8,3]{3,2,1,0}, u8[0]{0}) custom-call(%y, %w), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardInput", \
metadata={op_name="jit(f)/transpose(jvp(ResNet))/conv"}
  %to_x = bf16[2,8,8,3]{3,2,1,0} get-tuple-element(%back), index=0
  %filter = (bf16[5,3,3,3]{3,2,1,0}, u8[0]{0}) custom-call(%x, %y), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardFilter", \
metadata={op_name="jit(f)/transpose(jvp(ResNet))/conv"}
  ROOT %next = (s32[], bf16[2,8,8,3]{3,2,1,0}) tuple(%i, %to_x)
}

%condition (state.1: (s32[], bf16[2,8,8,3])) -> pred[] {
  %state.1 = (s32[], bf16[2,8,8,3]{3,2,1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (a: f32[6,7], b: f32[7,9], p: f32[2,8,8,5], s: (s32[], bf16[2,8,8,3])) -> f32[6,9] {
  %a = f32[6,7]{1,0} parameter(0)
  %b = f32[7,9]{1,0} parameter(1)
  %p = f32[2,8,8,5]{3,2,1,0} parameter(2)
  %s = (s32[], bf16[2,8,8,3]{3,2,1,0}) parameter(3)
  %loop = (s32[], bf16[2,8,8,3]{3,2,1,0}) while(%s), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
  %added = f32[2,8,8,5]{3,2,1,0} fusion(%p), kind=kLoop, calls=%fused, \
metadata={op_name="jit(f)/threefry2x32"}
  %product = (f32[6,9]{1,0}, s8[64]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %small = f32[6,9]{1,0} fusion(%a, %b), kind=kCustom, calls=%inside, \
backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
}
"""
# Taps that meet a picture of 8 with one zero on each side: 3 * 8 - 2 on an axis.
CONVOLUTION = 2 * 2 * 3 * 5 * (3 * 8 - 2) ** 2
X, Y, W = 2 * 8 * 8 * 3 * BF16, 2 * 8 * 8 * 5 * BF16, 5 * 3 * 3 * 3 * BF16


@pytest.fixture(scope='module')
def launched():
  return {kernel.kind: kernel for kernel in kernels.kernels(parse(TEXT))}


@pytest.mark.parametrize(
  'kind, count, flops, size, wide, part',
  [
    ('__cudnn$convForward', 4, CONVOLUTION, X + W + Y, False, 'encoder, forward'),
    ('__cudnn$convBackwardInput', 4, CONVOLUTION, X + W + Y, False, 'encoder, backward'),
    ('__cudnn$convBackwardFilter', 4, CONVOLUTION, X + W + Y, False, 'encoder, backward'),
    ('__cublas$gemm', 1, 2 * 6 * 7 * 9, (42 + 63 + 54) * F32, True, kernels.REST),
    ('__triton_gemm', 1, 2 * 6 * 7 * 9, (42 + 63 + 54) * F32, True, kernels.REST),
    ('kLoop', 1, 0, 2 * 2 * 8 * 8 * 5 * F32, True, 'random numbers'),
  ],
)
def test_kernels(launched, kind, count, flops, size, wide, part):
  """Loops as often as they run; what a library writes notes on is no traffic."""
  kernel = launched[kind]
  assert (kernel.count, kernel.flops, kernel.bytes) == (count, flops, size)
  assert (kernel.wide, kernel.part) == (wide, part)


def test_a_kernel_takes_its_arithmetic_its_traffic_or_its_launch():
  chip = chips.Chip(flops=1e12, hbm=1e9, ici=1e9, memory=1, launch=1e-6)
  kernel = kernels.Kernel(3, '', '', '', flops=10**9, wide=False, bytes=10)
  assert kernel.seconds(chip) == pytest.approx(3e-3)
  assert kernel._replace(wide=True).seconds(chip) == pytest.approx(6e-3)
  assert kernel._replace(bytes=10**8).seconds(chip) == pytest.approx(0.3)
  assert kernel._replace(flops=0, bytes=0).seconds(chip) == pytest.approx(3e-6)


def test_tables(launched):
  chip = chips.CHIPS['h200']
  table = kernels.table_of_parts(list(launched.values()), chip).splitlines()
  assert table[0].split() == ['part', 'launches', 'GFLOP', 'GB', 'ms']
  assert any(line.startswith('encoder, backward') and ' 8 ' in line for line in table)
  assert '__cudnn$convForward' in kernels.table_of_kernels(list(launched.values()), chip)


@pytest.mark.parametrize('topology', ['h200', 'h200:0', 'h200:2x4', 'b900:1', 'v5e:8'])
def test_unknown_topologies(topology):
  with pytest.raises(UserError, match=f'--topology={topology} is unknown: .*h200:1'):
    chips.parse_topology(topology)


def test_facts_of_every_gpu():
  """The text that XLA reads has the memory that the arithmetic assumes."""
  gpus = [name for name in chips.CHIPS if chips.is_gpu(name)]
  assert sorted(path.stem for path in chips.GPUS.glob('*.txtpb')) == sorted(gpus)
  for name in gpus:
    text = (chips.GPUS / f'{name}.txtpb').read_text()
    assert f'device_memory_size: {chips.CHIPS[name].memory:.0f}' in text
    assert chips.parse_topology(f'{name}:8') == (name, (8,))


def test_a_missing_compiler(monkeypatch):
  monkeypatch.setattr(chips.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"not installed: pip install 'palm_jax\[cuda12\]'"):
    chips.make_mesh('h200:1')


NEEDS_CUDA = pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda12_plugin') is None,
  reason="the compiler for GPUs is not installed ('.[cuda12]')",
)


@NEEDS_CUDA
@pytest.mark.slow
@pytest.mark.parametrize('gpus', [1, 8])
def test_a_tiny_step_compiled_for_gpus(gpus):
  config = tiny_config()
  config.pretrain.dtype = 'bfloat16'
  result = compile_for.study(config, f'h200:{gpus}', LinearGenerator())
  launched = result.pop('kernels')
  json.dumps(result)
  assert result['chips'] == gpus and result['device_kind'] == 'NVIDIA H200'
  assert not result['loops_of_unknown_length']
  # Each acting step has all 20 convolutions of ResNet-18 with their bias and ReLU in one.
  assert result['fused_convolutions'] >= 20 * config.pretrain.rollout_length
  assert sum(k.count for k in launched) == result['launches'] > 100
  assert (result['collectives'].get('all-reduce', {}).get('count', 0) > 0) == (gpus > 1)
  assert f'h200:{gpus}: {gpus} chips' in described.describe(result)


@NEEDS_CUDA
@pytest.mark.slow
def test_the_command():
  command = [sys.executable, '-m', 'launch.compile_for', '--config=configs/cifar.py']
  sizes = dict(num_envs=8, rollout_length=2, batch_size=16, warmup_steps=64, iterations_per_call=2)
  command += [f'--config.pretrain.{key}={value}' for key, value in sizes.items()]
  run = subprocess.run(
    [*command, '--config.replay.capacity=1024', '--topology=h200:1', '--parts'],
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr
  assert 'launches' in run.stdout and 'generator b32 conv1' in run.stdout
