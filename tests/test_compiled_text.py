"""What is read off a compiled program, against closed forms and XLA's own counts."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from launch import compiled_counts, compiled_text
from palm_jax.base import devices

F32 = 4


@pytest.fixture(scope='module')
def program():
  """Five rounds on 8 devices: three products with a sum over devices, the other collectives, and a
  product now and then."""

  def inner(h, w):
    h = jnp.tanh(h @ w)  # (16, 32)
    return h + jax.lax.psum(h[:4], 'data').mean()

  def outer(h, w):
    h = jax.lax.scan(lambda h, _: (inner(h, w), None), h, length=3)[0]
    part = jax.lax.psum_scatter(jax.lax.all_gather(h, 'data', tiled=True), 'data', tiled=True)
    right = jax.lax.ppermute(h, 'data', [(i, (i + 1) % 8) for i in range(8)])
    swap = jax.lax.all_to_all(h, 'data', 0, 0, tiled=True)
    return jax.lax.cond(
      h[0, 0] > 0, lambda: part + right + swap, lambda: jnp.tanh(part @ w) + right + swap
    )

  call = lambda x, w: jax.lax.scan(lambda h, _: (outer(h, w), None), x, length=5)[0]
  sharded = jax.shard_map(
    call, mesh=devices.make_mesh(), in_specs=(P('data'), P()), out_specs=P('data')
  )
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
  return jax.jit(sharded).lower(shape(8 * 16, 32), shape(32, 32)).compile()


def test_collectives_are_counted_with_their_loops(program):
  total, unknown = compiled_counts.analyse(compiled_text.parse(program.as_text()), 8)
  assert not unknown
  block = 16 * 32 * F32  # a device's h
  expected = {
    'all-reduce': (
      3 * 5,
      4 * 32 * F32 * 2 * 7 / 8,
    ),  # a ring: each eighth goes round twice but for one hop
    'all-gather': (5, block * 7),
    'reduce-scatter': (5, 8 * block * 7 / 8),
    'all-to-all': (5, block * 7 / 8),
    'collective-permute': (5, block),
  }
  counts = {key[0]: n for key, n in total.items() if key[1:] == ('count',)}
  assert counts == {kind: n for kind, (n, _) in expected.items()}
  for kind, (n, size) in expected.items():
    assert total[kind, 'sent'] == n * size, kind


def test_products_are_counted_with_their_loops_and_the_longer_branch(program):
  module = compiled_text.parse(program.as_text())
  product = 2 * 16 * 32 * 32
  assert compiled_counts.analyse(module, 8)[0]['flops'] == 5 * (3 + 1) * product
  assert compiled_counts.analyse(module, 8, once=True)[0]['flops'] == 2 * product


def test_counting_bodies_once_is_what_xla_does(program):
  """The correction of XLA's counts rests on this; it adds to the FLOPs those of sums and tanh."""
  once, _ = compiled_counts.analyse(compiled_text.parse(program.as_text()), 8, once=True)
  cost = program.cost_analysis()
  assert 0 <= cost['flops'] - once['flops'] < 0.05 * cost['flops']
  assert once['bytes'] == pytest.approx(cost['bytes accessed'], rel=0.05)


def test_loop_lengths_without_xlas_note(program):
  """TPU programs have none: the length follows from start, limit and step."""
  text = program.as_text()
  assert 'known_trip_count' in text
  bare = compiled_text.parse(text.replace('known_trip_count', 'forgotten'))
  assert compiled_counts.analyse(bare, 8) == compiled_counts.analyse(compiled_text.parse(text), 8)
  lengths = {
    compiled_text.trip_count(bare, name, loop)
    for name, body in bare.computations.items()
    for loop in body.values()
    if loop.opcode == 'while'
  }
  assert lengths == {3, 5}


def test_loop_lengths_with_a_start_and_a_step():
  call = jax.jit(
    lambda x: jax.lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + 2, c[1] @ c[1]), (3, x))
  )
  lowered = call.lower(jax.ShapeDtypeStruct((8, 8), jnp.float32))
  # With a fusion of the counter alone, which the flags of the tests have not.
  text = lowered.compile().as_text()
  text = text.replace('known_trip_count', 'forgotten')
  copied, times = re.subn(
    r'(  %\S+ = s32\[\] fusion\()(%get-tuple-element\S*),',
    r'  %copied = s32[] copy(\2)\n\1%copied,',
    text,
  )
  assert times == 1  # the counter goes to its sum through a copy, as in TPU programs
  for form in (text, copied):
    total, unknown = compiled_counts.analyse(compiled_text.parse(form), 1)
    assert total['flops'] == 4 * 2 * 8**3 and not unknown  # 3, 5, 7, 9


def test_loops_of_unknown_length_are_named():
  call = jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x))
  text = call.lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()
  total, unknown = compiled_counts.analyse(compiled_text.parse(text), 1)
  assert total['flops'] == 2 * 8**3
  assert len(unknown) == 1 and unknown[0].startswith('while')


@pytest.mark.parametrize(
  'strides, padding, lhs_dilation, rhs_dilation',
  [
    ((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1)),
    ((2, 1), ((1, 2), (0, 1)), (1, 2), (2, 1)),
    ((1, 3), ((0, 0), (4, 4)), (3, 1), (1, 1)),
  ],
)
def test_convolutions_count_no_padding(strides, padding, lhs_dilation, rhs_dilation):
  conv = lambda x, k: jax.lax.conv_general_dilated(
    x, k, strides, padding, lhs_dilation, rhs_dilation, ('NHWC', 'HWIO', 'NHWC')
  )
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
  compiled = jax.jit(conv).lower(shape(2, 9, 7, 3), shape(3, 3, 3, 5)).compile()
  total, _ = compiled_counts.analyse(compiled_text.parse(compiled.as_text()), 1)
  # Ones in place of numbers: the sum of the outputs counts the multiplications that are not with
  # padding.
  hits = conv(jnp.ones((2, 9, 7, 3)), jnp.ones((3, 3, 3, 5))).sum()
  assert total['flops'] == 2 * int(hits) == compiled.cost_analysis()['flops']


def test_updates_in_place_cost_what_they_write():
  """A ring of 1 MB in a loop that writes a row of it at a time."""

  def call(ring, x):
    return jax.lax.fori_loop(
      0, 10, lambda i, ring: jax.lax.dynamic_update_slice(ring, x + i, (i, 0)), ring
    )

  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
  compiled = jax.jit(call, donate_argnums=0).lower(shape(1024, 256), shape(1, 256)).compile()
  total, _ = compiled_counts.analyse(compiled_text.parse(compiled.as_text()), 1)
  row = 256 * F32
  assert 10 * 2 * row <= total['bytes'] < 10 * 6 * row


def test_sizes_of_arrays():
  ring = 'u8[16384,8,32,32,3]{3,2,4,1,0:T(32,128)(4,1)}'  # 32 columns lie in 128 lanes
  (array,) = compiled_text.arrays(ring)
  assert array == ((16384, 8, 32, 32, 3), 16384 * 8 * 3072, 4 * 16384 * 8 * 3072)
  sizes = lambda text: [(array.bytes, array.hbm) for array in compiled_text.arrays(text)]
  assert sizes(
    '(bf16[64,100]{1,0:T(8,128)(2,1)S(1)}, /*index=5*/pred[3], s4[10]{0}, u32[]{:S(2)}, '
    'f32[5]{0:T(128)})'
  ) == [(12800, 0), (3, 3), (5, 5), (4, 0), (20, 512)]


def test_groups_of_devices():
  text = '\n'.join(
    [
      'ENTRY %main (x: f32[8]) -> f32[8] {',
      '  %x = f32[8]{0} parameter(0)',
      '  ROOT %y = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=GROUPS, to_apply=%add',
      '}',
    ]
  )
  for groups, sent in (('{{0,1},{2,3}}', 32), ('[4,4]<=[16]', 48), ('{}', 60)):
    total, _ = compiled_counts.analyse(compiled_text.parse(text.replace('GROUPS', groups)), 16)
    assert total['all-reduce', 'sent'] == sent
