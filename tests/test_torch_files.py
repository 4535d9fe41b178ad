"""The reader of PyTorch's files: truths of torch itself, hostile files, and damage of every
kind."""

import base64
import builtins
import io
import math
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from palm_jax.formats import torch_files
from palm_jax.formats.kinds import SnapshotError
from palm_jax.formats.pickle_values import Inert
from palm_jax.formats.torch_files import modules, read, state_dict
from palm_jax.generator import load_generator
from tests import snapshot_files as files

# Files that torch 2.15 wrote of a Linear and a BatchNorm1d (of torch.jit.save's, the entries that
# are not compressed).
REAL = {  # zlib, base85
  'legacy': (
    'c-nQ7$!^p@5Qc4!CqoP&VGD#c>>ifE<IKvI03jE%noD1h<?%FQgJY-cau7%(<w68J0}sGs@F-k)1SAfWmt;V4T5_pfUH$#lUDaFCSH=JHZSD8s'
    '+wU(H8e7uSUlp=r5L7lN2*O4bV(5gvwaKH{3j+`-fX&c~?;-l!;=$0f1CTy5g`D_dgIlrpk;hOOgRHVDIb%1B5UPg6D)i?C2vdg4<dhKxBd8g2'
    'l8~lDGCp^ZRAS|MG~^K<u6hnCAk<9|RW?mK-Z+i-+#9(Fl7nI7xD6{o&yN)=;)BHVhZgc64kK$*SD>P*td=G~k@kp#oNrOq{Lsc%xl@5EJ4iA8'
    'R=cHZOH18uv)$HVD$CW`NGLt&8N$AohG2+>v<=gSWQg0Kd~wsX_9GlHVJ4HI+y<T<!$FsXUD=(0oBd|DrR(jc4zq5}5D7S!0YAZ^)Ev%XM-Yyh'
    'a4b9MAlNzRd?~Ko?`ypt94~Mu3fw|!PUg5%2&YXrljTOZEVr|J!Mb`6&K0o50(L$%7joD|gi9t|X0tggN`k-(M%Fr~;$JC+b~LTkX~ES3sus|C'
    'YOdwb>j*bYxS4JH2fArT(AbOF(Ry&JU}^=knHoK3E+Mo`XtVj886@l0z(&XAv4xTCyyHXY<m{pwo=_9+HbeJ+IbCZ~&3c7gpXBQGT;?{y9TV;*'
    'W4M>qi*5q#p^Y}&&(@b!MqU9{#_%Akz|I4DXoxYBvUY(-V_0=}9fJTKk711*Qk=vCdJ?bGXIRoiVp%IlWhJeYl|(MP(`wntr^?<&jW<MLXRNGD'
    '=3C2?xgbpDKlhADhcuZk)A!>q>ew5J'
  ),
  'zip': (
    'c-qBQ%a7Yc7@s`W$%bxrw?LOJWuc`&7TRp$#CdeL%@P)0jKnrP6mc<*<Hl|sr=LC93ZzAqP%HHSe*zLGE^y$)m4BgC4;(-(LPFwzxN>C1<GA*$'
    'wkcU8M)Fu1&+jqc%=e9Vl~fv`Y!)48OXxV#T-~(xjE%mAwc_<_w%pF6k7Dg+QrAbeZRpq<IbQBvw{N&cf5*~s4$yiB5{2$OA-kd%Zy46V#E{hS'
    'h_DvbF}7?kr@BUOY}tJk8;&<})jcr>sY0QfAs~;;)CLBm86+p$BMraD26HgiO^`Vy5V|Sy)~}Btqa-n8FDpn%D9PI}uOyYkZOGj*sgb8J9P7Y>'
    'PfXnOEX{+wNu<oQ$*9V(Xl9fIh9#fk7A({5ID<cp;h7FR>o2C~Ocrw@Mj*lpBX}+#I7z!zM({j_QyqB0*CzzN{#p!PffpJ4r2u}Kc4rv;WejIK'
    '@Je@)!QHXrSk6El8kz&I#%QYW8lx!$H0!i`ozc93;amsKck^+YJ<Ww;j75SC#!?Dc%Cr+1O9ex<15)<{V{yhqwWnd-G&~i%ntsjbLyfToJNM4W'
    '8H5{G_XTRuU;<4du)fZSFJRd0z}9#lF8Yxs>%$s7d~nJC-YRtI(S+@Nc+-#Mp5c1r;6YnSc-^GGweZ$H?3m#|&w;o1K_&x9Z|wDoyGkZ|@8O@H'
    'eNR5pXZO$qSV6fk0g6{f?oh*OpeMJ5AP>rv?}xvB{+zCfK8N$IqWUAg;B2d!Z4I2E;b6I4;Zo~~TCGYAv~Iv3bg{|D8dyfH&_M4KY>a5K%I(cr'
    'bSKTWFt!cq;nv09P6|Xtc&vv!x)iG_8zs4Y;Rpr@Ws5vNQU_m(^<SuDc8Y_oxP!9XZlKxqx3{VGox8t&Lj+NJiuQI~Ta?>dM+raCzuBVtSFe8k'
    '?F{;rqw7<>O!m}+ozpYuSC6j$(2xJe!{6s;(3k$__}Bi6_)qr0dT_>=e*PEHX6PX-XZ2Z4RB}}L?pK2krq`b}Bt9yD{_;J;wMYg0RHJ_ns@0d<'
    '#eZp}RBJRPu_@K6^@b#tYLZlMlq9KHmnxM~vr!kzO){hDm+3Fg3f~ookAm+qLCuCfqgTSx0q6XG5RZ;t04p(MB83jSM0k>D5nqjwT#k|)xH)*9'
    'XdzyX@!X5>gckr0k5<uq4E|vnakZPrMyp^P`xB2X^Vnzx#j)?taafVZMypR8d!NTvcx<$CaJmAAtv<Qu`#e_SvC(YhbTb^b#$%)Twiu6d1bfIi'
    'i>AR^4BW}0DG9o(2*SBZI;YNu$OZ0QPqFvk*-3d4=<gcZI2NRZKQ<>Y%z{6k&HV>Tn90-'
  ),
  'torchscript': (
    'c-obe$#2s@6vpku-Q3cJE>I|imMy)c&gM1;)CyI-qzY*f!hn!*>}l-Au{-uS6-Y?sfYe+#AkIjfxbR1Sgy;>aLL5;+mAG+3oS8||IvzJHj-F<0'
    'eZM!8nfJazF3OEC<k`LB-G7#x`_hf)B>HhEj;b3~Fsms@nHBJd1srb+0j9S1?KOwz+;L2TVHOvI`i+fOZ`$gU470ru)KBa$O|{jhh$^UmQ2E}|'
    'R-a~=um7{3On5)W{xoQNMk3REg3RuLUilnh7!rdN6W=VG+Ywckk&VB~GM@*Chs?~A$1#blfgHuK466j$nly&rWy6)%J=2tnidx=M98K13y9^_F'
    '2`6XPRT%Yi#p`3-vf>q6^Gx8zO~V3;!>=?3$kmtW#NZY%N;-laY6FoyWSA~5JD}(prY0j`xwa!$lRWH<#iTAwxLB!_0PJcY{IY2)=w{<154$B6'
    'YXsOMMe(R^dXUdW&?@ZBF|izrr?Ffl$D$oowM`SK$gnM!zu{=W0oszG;v?vrSwm~^ghVc;Xeci1*YVPNm)=O7fCD;@GpxeFdP+oMM{iI=I$P5t'
    'd9Mgh){muV!Qnq0OHo0pZrM(SzfNX(JWFUi93jV}cLdf=!qMisW8rmA>A_8=;OVA#JS;vV^<jzQS>$@<3Q#O~HbAH0M3X+})3qi&DfPC{RmFkl'
    '18@djXu?xrcv>3963eT|^?wdr8JC$_1{%EBNYcF1727HuUFoHIUJ+hy=DmXRqS#T+t4C)Z!!Z*Nwm@aJ=k{TnjkdIaitimM7IGVXKx2C^OSi}c'
    'k{D>gs=#q^$)xz8{OPrWaZ=4BhFavshX~lDxJ&~f69l1;pO!zw@SMbC3ly)nv<n<VF^xwGDN)(b5~7&RiphkS6vR{}Ev5xg6htAD6f*Ookey4<'
    '&u7yaAz8?=k&$S7Z#{gr$)QqCOS81c`fNJnxHL=qo6l+?_oZ3ddwupr$cbr|_F<oWA9Ce?-}BFqL(?qn&pvyJrQMolX`l94i4D6pP17ar)AzVG'
    '1y84-%iT}$oC_5{4b#Q%!|%9bT7kytHt_LZ+~1m_kn13;GJW{>18@Fr2YLGqfkF9A'
  ),
}
REAL_STATE = {
  'fc.weight': [[0.5, -2.0]],
  'fc.bias': [3.0],
  'bn.weight': [1.0],
  'bn.bias': [0.0],
  'bn.running_mean': [7.0],
  'bn.running_var': [1.0],
  'bn.num_batches_tracked': 0,
}


@pytest.fixture
def write(tmp_path):
  def write(content, name='file.pkl'):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name

  return write


@pytest.fixture(scope='module')
def snapshot():
  """(bytes, {network: {name: array}}) of tiny networks; float16 networks keep their weights
  channels-last."""
  made, truth = files.small_snapshot(fp16=True)
  return files.pickled(made, 4), truth


def assert_equal_bits(actual, expected):
  assert list(actual) == list(expected)
  for name, x in expected.items():
    assert actual[name].dtype == x.dtype and actual[name].shape == x.shape, name
    assert actual[name].tobytes() == x.tobytes(), name


# ---- what is read


def test_official_snapshot_is_bit_equal(shared):
  folder = shared / 'fixtures' / 'stylegan2'
  content = read(folder / 'a_tiny_cond32.nosrc.pkl')
  with np.load(folder / 'a_tiny_cond32.params.npz') as file:
    for network in ('G', 'D', 'G_ema', 'augment_pipe'):
      prefix = f'{network}/'
      truth = {
        name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)
      }
      assert len(truth) > 2
      assert_equal_bits(state_dict(content[network]), truth)
  assert content['training_set_kwargs']['resolution'] == 32
  generator = content['G_ema']
  assert isinstance(generator, Inert) and generator.class_name == 'Generator'
  assert generator.state['_init_kwargs']['mapping_kwargs'] == {'num_layers': 2}
  assert dict(modules(generator))['synthesis.b8.conv0'].state['act_gain'] == math.sqrt(2)


@pytest.mark.parametrize('kind', REAL)
def test_files_of_torch(kind, write):
  state = state_dict(read(write(zlib.decompress(base64.b85decode(REAL[kind])), 'x.pth')))
  assert list(state) == list(REAL_STATE)
  for name, value in REAL_STATE.items():
    np.testing.assert_array_equal(state[name], value)
    assert state[name].dtype == (np.int64 if name.endswith('tracked') else np.float32)


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_protocols_and_layouts(protocol, write):
  made, truth = files.small_snapshot(fp16=True)
  content = read(write(files.pickled(made, protocol)))
  for network, tensors in truth.items():
    state = state_dict(content[network])
    assert_equal_bits({name: state[name] for name in tensors}, tensors)
    assert len(state) == len(tensors)
  assert (
    content['augment_pipe'] is None
    and content['training_set_kwargs'] == made['training_set_kwargs']
  )


@pytest.mark.parametrize('container', [files.legacy, files.zipped, files.pickled])
def test_types_and_views(container, write):
  numbers = np.arange(24).reshape(2, 3, 4)
  tensors = {
    name: (numbers % 2).astype(ml_dtypes.bfloat16 if name == 'bfloat16' else name)
    for name in files.STORAGES
  }
  tensors |= dict(
    scalar=np.float32(3.5), empty=np.zeros((0, 3), np.float32), one=np.ones((1, 1, 1), np.float32)
  )
  state = read(write(container({name: files.Tensor(x) for name, x in tensors.items()}), 'x.pth'))
  assert_equal_bits(state, {name: np.asarray(x) for name, x in tensors.items()})

  transposed = files.Tensor(np.arange(6, dtype=np.float32).reshape(2, 3))
  transposed.shape, transposed.strides = (3, 2), (1, 3)
  tied = files.Tensor(np.arange(3, dtype=np.float32))
  state = read(write(container({'t': transposed, 'a': tied, 'b': tied}), 'x.pth'))
  np.testing.assert_array_equal(state['t'], [[0, 3], [1, 4], [2, 5]])
  np.testing.assert_array_equal(state['a'], state['b'])


def test_state_dict_follows_torch(write):
  inner = files.Persistent(
    'Inner',
    dict(weight=files.Tensor(np.ones(2, np.float32)), bias=None),
    dict(kept=files.Tensor(np.zeros(1, np.float32)), hidden=files.Tensor(np.zeros(1, np.float32))),
  )
  inner.state['_non_persistent_buffers_set'] = {'hidden'}
  outer = files.Persistent(
    'Outer', {}, dict(own=files.Tensor(np.ones((), np.float32))), dict(a=inner, none=None, b=inner)
  )
  module = read(write(files.pickled(outer)))
  assert list(state_dict(module)) == ['own', 'a.weight', 'a.kept', 'b.weight', 'b.kept']
  plain = {'x': np.ones(3)}
  assert state_dict(plain) is plain
  with pytest.raises(SnapshotError, match="'epoch' is a int, expected the tensors"):
    state_dict({'x': np.ones(3), 'epoch': 3})
  with pytest.raises(SnapshotError, match='found a list'):
    state_dict([])


# ---- hostile files


class Call:
  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


class Forged:
  """Writes instructions by hand."""

  def __init__(self):
    self.code = b'\x80\x02'

  def __getattr__(self, name):
    codes = dict(
      reduce=b'R',
      build=b'b',
      new=b'\x81',
      empty=b')',
      dict=b'}',
      list=b']',
      mark=b'(',
      tuple=b't',
      set=b's',
      pair=b'\x86',
      single=b'\x85',
      none=b'N',
      stop=b'.',
      append=b'a',
      dup=b'2',
      inst=b'i',
      obj=b'o',
    )
    self.code += codes[name]
    return self

  def name(self, module, name):
    self.code += f'c{module}\n{name}\n'.encode()
    return self

  def text(self, text):
    self.code += b'X' + struct.pack('<I', len(text.encode())) + text.encode()
    return self

  def number(self, n):
    data = n.to_bytes(16, 'little', signed=True)
    self.code += b'\x8a\x10' + data
    return self

  def raw(self, code):
    self.code += code
    return self


def tensor(offset=0, size=(2,), stride=(1,), numel=2, data=None, storage=None):
  """A pickle of one tensor with numbers to choose; its storage holds `data`."""
  inner = files.legacy(files.Storage(np.zeros(numel, np.float32))) if storage is None else storage
  forged = (
    Forged()
    .name('torch._utils', '_rebuild_tensor_v2')
    .mark.name('torch.storage', '_load_from_bytes')
  )
  forged.raw(b'B' + struct.pack('<I', len(inner)) + inner).single.reduce.number(offset)
  for numbers in (size, stride):
    forged = forged.mark
    for n in numbers:
      forged.number(n)
    forged = forged.tuple
  return forged.raw(b'\x89').name('collections', 'OrderedDict').empty.reduce.tuple.reduce.stop.code


def storage_claiming(numel):
  whole = files.legacy(files.Storage(np.zeros(2, np.float32)))
  size = struct.pack('<q', 2)
  assert whole.count(size) == 1
  # The count stands in the persistent id, as one byte, and before the data.
  return whole.replace(b'K\x02N', b'\x8a\x08' + struct.pack('<q', numel) + b'N').replace(
    size, struct.pack('<q', numel)
  )


def deep_modules():
  module = files.Persistent('Leaf')
  for _ in range(100):
    module = files.Persistent('M', modules=dict(a=module, b=module))
  return module


def in_a_storage(payload):
  return tensor(storage=files.legacy(payload))


def nested_storages():
  inner = files.legacy(files.Storage(np.zeros(2, np.float32)))
  call = (
    Forged()
    .name('torch.storage', '_load_from_bytes')
    .raw(b'B' + struct.pack('<I', len(inner)) + inner)
    .single.reduce
  )
  system = dict(protocol_version=1001, little_endian=True, type_sizes={})
  head = b''.join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, system))
  return tensor(storage=head + call.stop.code + pickle.dumps([], 2))


def inert(marker):
  """{name: bytes} of programs that are read as objects that do nothing; what would run leaves the
  file `marker`."""
  command = f'touch {marker}'
  system, opened = Call(os.system, command), Call(builtins.open, str(marker), 'w')
  chain = Call(os.system, Call(getattr, Call(__import__, 'os'), 'name'))
  return {
    'system': pickle.dumps(system, 2),
    'system by protocol 4': pickle.dumps(system, 4),
    'eval': pickle.dumps(Call(eval, f"open('{marker}', 'w')"), 2),
    'exec': pickle.dumps(Call(exec, f"open('{marker}', 'w')"), 4),
    'open': pickle.dumps(opened, 4),
    'getattr': pickle.dumps(Call(getattr, Call(__import__, 'os'), 'system'), 4),
    'a chain': pickle.dumps({'a': chain, 'b': [chain, {'c': system}]}, 4),
    'dotted': b'\x80\x04\x8c\x02os\x8c\x0bpath.exists\x93.',
    'dotted below what is known': b'\x80\x04\x8c\x0ctorch._utils\x8c\x0d_rebuild_para\x93.',
    'attribute of what is known': (
      b'\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_parameter.__globals__\x93.'
    ),
    'torch.load': Forged().name('torch', 'load').stop.code,
    'object dtype': Forged()
    .name('numpy', 'dtype')
    .text('O8')
    .raw(b'\x89\x88\x87')
    .reduce.stop.code,
    'a class beyond TorchScript': Forged().name('__torch__', 'Net').empty.new.stop.code,
    'call of a string': Forged().text('os.system').text(command).single.reduce.stop.code,
    'call of a type': Forged().name('torch', 'FloatStorage').empty.reduce.stop.code,
    'call of what a call gives': (
      Forged()
      .name('builtins', 'getattr')
      .name('os', 'path')
      .single.reduce.text(command)
      .single.reduce.stop.code
    ),
    'object of a function': Forged().name('_codecs', 'encode').empty.new.stop.code,
    'object with words': (
      Forged()
      .name('subprocess', 'Popen')
      .empty.dict.text('args')
      .text(command)
      .set.raw(b'\x92')
      .stop
    ).code,
    'attributes that are a program': (
      Forged().name('os', 'system').empty.new.name('os', 'system').text(command).single.reduce.build
    ).stop.code,
    'attributes for a dict': (
      Forged()
      .name('collections', 'OrderedDict')
      .empty.reduce.dict.text('update')
      .none.set.build.stop.code
    ),
    'items for a class': (
      Forged().name('os', 'environ').empty.new.text('PATH').text('x').set.stop.code
    ),
    'a program in a zip': files.zipped(system),
    'a key that is a tuple': pickle.dumps({(1,): 2, 'a': system}),
  }


def hostile():
  """{name: (bytes, words of the refusal)}."""
  system = Call(os.system, 'true')
  pickles = {
    'attributes for a function': (
      Forged()
      .name('torch._utils', '_rebuild_parameter')
      .dict.text('__code__')
      .none.set.build.stop.code,
      'attributes to what has none',
    ),
    'an array of another size': (
      Forged()
      .name('numpy.core.multiarray', '_reconstruct')
      .name('numpy', 'ndarray')
      .raw(b'K\0\x85C\x01b\x87')
      .reduce.raw(b'(K\x01K\x03\x85')
      .name('numpy', 'dtype')
      .text('f4')
      .raw(b'\x89\x88\x87')
      .reduce.raw(b'\x89C\x041234t')
      .build.stop.code,
      'not of its size',
    ),
    'INST': (Forged().mark.raw(b'ios\nsystem\n').stop.code, '0x69'),
    'OBJ': (Forged().mark.name('dnnlib.util', 'EasyDict').obj.stop.code, '0x6f'),
    'extension registry': (Forged().raw(b'\x82\x01').stop.code, '0x82'),
    'buffers out of band': (Forged().raw(b'\x97').stop.code, '0x97'),
    'persistent id': (Forged().text('x').raw(b'Q').stop.code, 'unknown storage'),
    'persistent id of protocol 0': (Forged().raw(b'Px\n').stop.code, '0x50'),
    'bytes of a size': (
      Forged().name('__builtin__', 'bytes').number(10**12).single.reduce.stop.code,
      'other arguments',
    ),
    'encoding': (
      Forged().name('_codecs', 'encode').text('x').text('zlib').pair.reduce.stop.code,
      'not latin1',
    ),
    'protocol 0': (pickle.dumps([1], 0), 'protocol 0 or 1'),
    'protocol 6': (b'\x80\x06N.', 'protocol 6'),
    'no value': (b'\x80\x02.', 'ends in the middle'),
    'no mark': (b'\x80\x02t.', 'takes values where there are none'),
    'unknown memo': (b'\x80\x02h\x05.', 'has not made'),
    'two pickles': (pickle.dumps(1) + pickle.dumps(system), 'bytes follow its end'),
    'a program in a storage': (in_a_storage(system), 'is something else'),
    'a storage in a storage': (nested_storages(), 'is something else'),
    'negative offset': (tensor(offset=-1), 'impossible offset'),
    'offset beyond': (tensor(offset=1), 'beyond its storage'),
    'negative size': (tensor(size=(-2,)), 'impossible offset'),
    'zero stride': (tensor(size=(2, 2), stride=(1, 0)), 'impossible offset'),
    'negative stride': (tensor(stride=(-1,)), 'impossible offset'),
    'overlap': (tensor(size=(2, 2), stride=(1, 1), numel=3), 'overlaps'),
    'size beyond': (tensor(size=(3,)), 'beyond its storage'),
    'huge size': (tensor(size=(1 << 40,)), 'beyond its storage'),
    'size and stride that wrap around': (
      tensor(size=(1 << 33, 1 << 33), stride=(1 << 33, 1)),
      'beyond its storage',
    ),
    'empty but huge': (tensor(size=(0, 1 << 60), stride=(1, 1)), 'impossible size'),
    'ranks': (tensor(size=(2, 1), stride=(1,)), 'impossible offset'),
    'huge storage': (tensor(storage=storage_claiming(1 << 60)), 'beyond the end'),
    'negative storage': (tensor(storage=storage_claiming(-4)), 'unknown storage'),
    'big-endian': (
      tensor(
        storage=files.legacy(files.Storage(np.zeros(2, np.float32))).replace(
          b'q\x02\x88', b'q\x02\x89'
        )
      ),
      'big-endian',
    ),
    'huge string': (b'\x80\x04\x8d' + struct.pack('<Q', 1 << 60) + b'abc.', 'beyond its end'),
    'huge bytes': (b'\x80\x04\x8e' + struct.pack('<Q', 1 << 62) + b'abc.', 'beyond its end'),
    'huge frame': (b'\x80\x04\x95' + struct.pack('<Q', 1 << 60) + b'N.', 'frame'),
    'bytes beyond the end': (
      b'\x80\x02B' + struct.pack('<I', 0xFFFFFFFF) + b'abc.',
      'beyond its end',
    ),
    'TensorFlow': (
      Forged().name('dnnlib.tflib.network', 'Network').empty.new.stop.code,
      'legacy.py',
    ),
  }
  zips = {
    'big-endian zip': (files.zipped({}, byteorder='big'), 'big-endian'),
    'compressed zip': (files.zipped({}, compression=zipfile.ZIP_DEFLATED), 'compressed'),
    'a zip of something else': (zip_of({'a.txt': b'x'}), 'without <name>/data.pkl'),
    'a zip without its end': (
      files.zipped({'a': files.Tensor(np.ones(3, np.float32))})[:-30],
      'without its end',
    ),
    'a zip without a storage': (
      zip_of(
        {
          'x/data.pkl': Forged()
          .mark.text('storage')
          .name('torch', 'FloatStorage')
          .text('0')
          .text('cpu')
          .number(1 << 50)
          .tuple.raw(b'Q')
          .stop.code
        }
      ),
      'is missing',
    ),
    'a zip whose storage is short': (
      zip_of(
        {
          'x/data.pkl': Forged()
          .mark.text('storage')
          .name('torch', 'FloatStorage')
          .text('0')
          .text('cpu')
          .number(1 << 50)
          .tuple.raw(b'Q')
          .stop.code,
          'x/data/0': b'1234',
        }
      ),
      'of another size',
    ),
  }
  return pickles | zips


def zip_of(entries):
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w') as archive:
    for name, content in entries.items():
      archive.writestr(name, content)
  return out.getvalue()


def read_within_bounds(path):
  """read, which must take no more than three times the file's size, or a little more than it for
  small files."""
  size = path.stat().st_size
  tracemalloc.start()
  try:
    return read(path)
  finally:
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= max(3 * size, size + torch_files.LEAST_BUDGET), (
      f'{peak} bytes for a file of {size}'
    )


@pytest.mark.parametrize('name', hostile())
def test_hostile_files_are_refused(name, write):
  content, words = hostile()[name]
  path = write(content)
  with pytest.raises(SnapshotError, match=words) as caught:
    read_within_bounds(path)
  assert str(caught.value).startswith(f'{path}') and '\n' not in str(caught.value)


@pytest.mark.parametrize('name', inert('x'))
def test_programs_are_read_as_objects_that_do_nothing(name, write, tmp_path):
  marker = tmp_path / 'marker'
  content = inert(marker)[name]
  path = write(content)
  read_within_bounds(path)
  with pytest.raises(SnapshotError, match='no G_ema in it') as caught:
    load_generator(path)
  assert '\n' not in str(caught.value)
  assert not marker.exists()
  if name in ('system', 'system by protocol 4', 'eval', 'exec', 'open'):
    try:
      pickle.loads(content)
    finally:
      assert marker.exists()  # the same bytes do run where Python loads them


def test_programs_beside_a_network_do_nothing(write, tmp_path):
  """Nor in its attributes."""
  marker = tmp_path / 'marker'
  snapshot, truth = files.small_snapshot()
  program = Call(os.system, f'touch {marker}')
  snapshot['D'] = {'x': program, (1, 2): [program]}
  snapshot['G_ema'].state['hook'] = program
  loaded = load_generator(write(files.pickled(snapshot, 4)))
  np.testing.assert_array_equal(
    loaded.variables['buffers']['w_avg'], truth['G_ema']['mapping.w_avg']
  )
  assert not marker.exists()


def test_source_inside_a_module_is_not_run(write, tmp_path):
  module = files.Persistent('Net')
  module.source = f"open({str(tmp_path / 'marker')!r}, 'w')\n"
  assert read(write(files.pickled({'G': module})))['G'].class_name == 'Net'
  assert not (tmp_path / 'marker').exists()


BOMBS = {
  'dicts': lambda n: b'\x80\x02' + b'}' * n + b'.',
  'sets': lambda n: b'\x80\x04' + b'\x8f' * n + b'.',
  'marks': lambda n: b'\x80\x02' + b'(' * n + b'.',
  'nested lists': lambda n: b'\x80\x02' + b']' * n + b'a' * n + b'.',
  'nested tuples': lambda n: b'\x80\x02)' + b'\x85' * n + b'.',
  'memo': lambda n: b'\x80\x04]' + b'\x94' * n + b'.',
  'sparse memo': lambda n: (
    b'\x80\x02]'
    + b''.join(b'r' + struct.pack('<I', 7919 * i % (1 << 32)) for i in range(n // 5))
    + b'.'
  ),
  'one long string': lambda n: (
    b'\x80\x02X' + struct.pack('<I', n) + b'a' * (n - 4) + '🙂'.encode() + b'.'
  ),
  'one long key': lambda n: (
    b'\x80\x02}X' + struct.pack('<I', n) + b'\1' * n + b'NsX' + struct.pack('<I', 1) + b'a.'
  ),
  'one long name': lambda n: b'\x80\x04X' + struct.pack('<I', n) + b'\1' * n + b'\x94h\0\x93.',
  'a list of one list': lambda n: b'\x80\x02]q\0' + b'h\0a' * (n // 3) + b'.',
  'copies of a set': lambda n: (
    b'\x80\x02]('
    + b''.join(b'X\4\0\0\0%04d' % (i % 10000) for i in range(n // 40))
    + b'eq\0'
    + b'c__builtin__\nset\nq\1'
    + b'h\1h\0\x85R' * (n // 20)
    + b'.'
  ),
  'copies of bytes': lambda n: (
    b'\x80\x02X'
    + struct.pack('<I', n // 2)
    + b'a' * (n // 2)
    + b'q\0c_codecs\nencode\nq\1'
    + b'X\6\0\0\0latin1q\2'
    + b'h\1h\0h\2\x86R' * (n // 18)
    + b'.'
  ),
  'objects': lambda n: b'\x80\x02cm\nC\nq\0' + b'h\0)\x81' * (n // 4) + b'.',
  'calls': lambda n: b'\x80\x02cm\nC\nq\0)q\1' + b'h\0h\1R' * (n // 5) + b'.',
  'objects that share attributes': lambda n: (
    b'\x80\x02cm\nC\nq\0}('
    + b''.join(b'X\4\0\0\0%04dN' % (i % 10000) for i in range(min(n // 40, 10000)))
    + b'uq\1'
    + b'h\0)\x81h\1b' * (n // 14)
    + b'.'
  ),
  'arrays': lambda n: (
    b'\x80\x04cnumpy.core.numeric\n_frombuffer\nq\0(B'
    + struct.pack('<I', n // 2)
    + b'a' * (n // 2)
    + b'cnumpy\ndtype\nX\2\0\0\0u1\x85RJ'
    + struct.pack('<I', n // 2)
    + b'\x85X\1\0\0\0Ctq\1'
    + b'h\0h\1R' * (n // 10)
    + b'.'
  ),
  'many tensors': lambda n: tensor(numel=n // 8)[:-1] + b'0.',
}


@pytest.mark.parametrize('name', BOMBS)
@pytest.mark.parametrize(
  'size, least', [(1 << 15, 4 << 20), pytest.param(20 << 20, 32 << 20, marks=pytest.mark.slow)]
)
def test_memory_is_bounded(name, size, least, write, monkeypatch):
  monkeypatch.setattr(torch_files, 'LEAST_BUDGET', least)
  path = write(BOMBS[name](size))
  try:
    read_within_bounds(path)
  except SnapshotError:
    pass


@pytest.mark.parametrize('kind', ['_parameters', '_buffers', '_modules'])
def test_modules_that_share_modules_are_not_gone_through_for_ever(kind):
  """A few modules, each twice in the next, are millions of names; what they carry is looked at as
  often."""
  module = Inert('Leaf', dict(_parameters={}, _buffers={}, _modules={}))
  for _ in range(40):
    state = dict(_parameters={}, _buffers={}, _modules={})
    state[kind] |= {f'x{i}': None for i in range(2000)}
    state['_modules'] |= dict(a=module, b=module)
    module = Inert('M', state)
  with pytest.raises(SnapshotError, match='expected a network'):
    state_dict(module)


def test_objects_that_share_their_attributes_are_not_gone_through_for_ever(write):
  attributes = b''.join(b'X\5\0\0\0a%04dN' % i for i in range(9999))
  objects = b'c__torch__\nM\n)\x81h\0b' * 3000
  content = b'\x80\x02}q\0(' + attributes + b'u' + objects + b'.'
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w') as archive:
    archive.writestr('x/data.pkl', content)
    archive.writestr('x/constants.pkl', b'')
  with pytest.raises(SnapshotError, match='asks for more memory'):
    read(write(out.getvalue(), 'x.pt'))


def test_long_names_are_not_put_together():
  leaf = Inert('Leaf', dict(_parameters={'w' * 1000: np.zeros(1)}, _buffers={}, _modules={}))
  with pytest.raises(SnapshotError, match='not a dict of names'):
    state_dict(Inert('M', dict(_parameters={}, _buffers={}, _modules=dict(a=leaf))))


def test_what_doubles_stays_small(write):
  laughs = b'\x80\x02()q\0' + b'h\0h\0\x86q\0' * 200 + b't.'
  assert len(read_within_bounds(write(laughs))) == 201
  # As a key, whose hash would take 2 ** 200 steps.
  assert read_within_bounds(write(b'\x80\x02}' + laughs[2:-1] + b'Ns.')) == {}
  with pytest.raises(SnapshotError, match='nested too deeply'):
    state_dict(read_within_bounds(write(files.pickled(deep_modules()))))
  loop = files.Persistent('Loop')
  cyclic = read(write(files.pickled(loop)))
  cyclic.state['_modules']['again'] = cyclic
  with pytest.raises(SnapshotError, match='contains itself'):
    state_dict(cyclic)


def test_a_large_file_costs_itself(write):
  """Its tensors are views, whatever their number."""
  big = files.Tensor(np.arange(3_000_000, dtype=np.float32))
  for container in (files.legacy, files.zipped):
    path = write(container({'a': big, 'b': big}), 'x.pth')
    tracemalloc.start()
    state = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * path.stat().st_size
    assert not state['a'].flags.writeable and state['b'][-1] == 2_999_999


@pytest.mark.parametrize(
  'content, words',
  [
    (b'', 'is empty'),
    (b'\n<!DOCTYPE html><html><body>Sign in</body></html>', 'is a web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\n', 'git lfs pull'),
    (b'\x1f\x8b\x08\0', 'gunzip'),
    (b'\x89PNG\r\n', 'is a picture'),
    (b'hello there', 'none of the files of weights'),
  ],
)
def test_other_files(content, words, write):
  with pytest.raises(SnapshotError, match=words):
    read(write(content))


def test_no_file(tmp_path):
  with pytest.raises(SnapshotError, match='none.pkl: no such file'):
    read(tmp_path / 'none.pkl')
  with pytest.raises(SnapshotError, match='is a folder'):
    read(tmp_path)


# ---- damage


def damaged(content, rng):
  """(bytes, how many were touched; None where the file was cut)."""
  kind = rng.integers(3)
  if kind == 0:
    return content[: rng.integers(len(content))], None
  data = bytearray(content)
  if kind == 1:
    where = rng.choice(len(data), rng.integers(1, 4), replace=False)
    for i in where:
      data[i] ^= 1 << rng.integers(8)
    return bytes(data), len(where)
  start, length = rng.integers(len(data)), rng.integers(1, 64)
  run = rng.bytes(length)[: len(data) - start]
  data[start : start + len(run)] = run
  return bytes(data), len(run)


def check_damage(whole, truth, count, seed, path):
  """Each damage ends in SnapshotError, or the tensors differ in no more numbers than bytes were
  touched."""
  rng, outcomes = np.random.default_rng(seed), {'refused': 0, 'read': 0, 'loaded': 0}
  for i in range(count):
    data, touched = damaged(whole, rng)
    path.write_bytes(data)
    try:
      content = (read if i % 5 else read_within_bounds)(
        path
      )  # measuring takes ten times as long as reading
      outcomes['read'] += 1
      generator = load_generator(path)
      outcomes['loaded'] += 1
    except SnapshotError as e:
      assert str(e).startswith(f'{path}') and '\n' not in str(e)
      outcomes['refused'] += 1
      continue
    assert touched is not None, f'damage {i}: half a file was read'
    for x in flat(generator.variables).values():
      assert np.isfinite(x).all(), f'damage {i}'
    state = state_dict(content['G_ema'])
    assert state.keys() == truth.keys()
    differ = sum((state[name] != truth[name]).sum() for name in truth)
    assert differ <= touched, f'damage {i}: {differ} numbers differ, {touched} bytes were touched'
  return outcomes


def flat(tree, prefix=''):
  if not isinstance(tree, dict):
    return {prefix: tree}
  return {k: v for name, sub in tree.items() for k, v in flat(sub, f'{prefix}/{name}').items()}


def test_damage(snapshot, tmp_path):
  content, truth = snapshot
  outcomes = check_damage(content, truth['G_ema'], 60, 0, tmp_path / 'x.pkl')
  assert outcomes['refused'] > 20 and outcomes['loaded'] > 0, outcomes


@pytest.mark.slow
@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_a_thousand_damages_of_small_files(protocol, tmp_path):
  made, truth = files.small_snapshot()
  outcomes = check_damage(
    files.pickled(made, protocol), truth['G_ema'], 334, protocol, tmp_path / 'x.pkl'
  )
  assert outcomes['loaded'] > 20, outcomes


@pytest.mark.slow
def test_a_thousand_damages_of_the_official_file(shared, tmp_path):
  path = shared / 'fixtures' / 'stylegan2' / 'a_tiny_cond32.nosrc.pkl'
  outcomes = check_damage(
    path.read_bytes(), state_dict(read(path)['G_ema']), 1000, 9, tmp_path / 'x.pkl'
  )
  assert outcomes['loaded'] > 50, outcomes


@pytest.mark.parametrize('container', [files.legacy, files.zipped])
def test_damage_of_other_containers(container, tmp_path):
  """A zip archive has checksums, so what is read of it is right."""
  rng, truth = (
    np.random.default_rng(1),
    {f'layer{i}.weight': np.full((5, 7), i, np.float32) for i in range(6)},
  )
  content, path = (
    container({name: files.Tensor(x) for name, x in truth.items()}),
    tmp_path / 'x.pth',
  )
  loaded = 0
  for i in range(200):
    data, touched = damaged(content, rng)
    path.write_bytes(data)
    try:
      state = state_dict(read_within_bounds(path))
    except SnapshotError:
      continue
    assert touched is not None
    loaded += 1
    if container is files.zipped:
      for name, x in truth.items():
        np.testing.assert_array_equal(state[name], x, err_msg=f'damage {i}')
  assert loaded > 0
