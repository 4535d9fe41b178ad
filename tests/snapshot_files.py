"""Writes files in PyTorch's formats without PyTorch: snapshots of stylegan2-ada-pytorch and of
stylegan3, and files of torch.save.

What a file names (torch._utils._rebuild_tensor_v2 and so on) stands in for the real thing while it
is pickled: pickle only looks the names up.
"""

import collections
import io
import pickle
import struct
import sys
import types
import zipfile
from unittest import mock

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
  'float16': 'HalfStorage',
  'float32': 'FloatStorage',
  'float64': 'DoubleStorage',
  'int64': 'LongStorage',
  'uint8': 'ByteStorage',
  'bool': 'BoolStorage',
  'bfloat16': 'BFloat16Storage',
}


def _stand_in(module, name, kind=None):
  made = kind if kind else lambda *args: None
  made.__module__, made.__name__, made.__qualname__ = module, name, name
  return made


class EasyDict(dict):
  pass


_stand_in('dnnlib.util', 'EasyDict', EasyDict)
PERSISTENT = _stand_in('torch_utils.persistence', '_reconstruct_persistent_obj')
PARAMETER = _stand_in('torch._utils', '_rebuild_parameter')
TENSOR = _stand_in('torch._utils', '_rebuild_tensor_v2')
LOAD = _stand_in('torch.storage', '_load_from_bytes')
TYPES = {
  name: _stand_in('torch', storage, type(storage, (), {})) for name, storage in STORAGES.items()
}
NAMES = [EasyDict, PERSISTENT, PARAMETER, TENSOR, LOAD, *TYPES.values()]


def looked_up():
  """Within it the stand-ins can be pickled."""
  modules = {}
  for made in NAMES:
    parts = made.__module__.split('.')
    for i in range(len(parts)):
      name = '.'.join(parts[: i + 1])
      modules.setdefault(name, types.ModuleType(name))
    setattr(modules[made.__module__], made.__name__, made)
  return mock.patch.dict(sys.modules, modules)


def foreign(module, name, base=object):
  """A class of somebody's program, whose instances can be pickled."""
  for made in NAMES:
    if (made.__module__, made.__name__) == (module, name):
      return made
  NAMES.append(_stand_in(module, name, type(name, (base,), {})))
  return NAMES[-1]


def plain_module(module, persistent):
  """A Persistent as an object of a class that carries no source: `module` has the class."""
  made = foreign(module, persistent.class_name)()
  made.__dict__.update(persistent.state)
  made.__dict__['_modules'] = {
    name: plain_module(module, inner) for name, inner in persistent.state['_modules'].items()
  }
  return made


class Storage:
  """A storage as a plain pickle holds it: the bytes of a torch file of its own."""

  def __init__(self, array):
    self.array = array

  def __reduce__(self):
    return LOAD, (legacy(self),)


class Tensor:
  """channels_last as torch lays out 4-dimensional weights for float16 on GPUs."""

  def __init__(self, array, channels_last=False, parameter=False):
    array = np.asarray(array)
    if channels_last and array.ndim == 4:
      array = np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    else:
      array = np.array(array, order='C')
    self.shape, self.strides = (
      array.shape,
      tuple(max(s // array.itemsize, 1) for s in array.strides),
    )
    flat = array.transpose(0, 2, 3, 1) if channels_last and array.ndim == 4 else array
    self.storage, self.parameter = Storage(np.ascontiguousarray(flat).reshape(-1)), parameter

  def __reduce__(self):
    if self.parameter:
      plain = Tensor.__new__(Tensor)
      plain.__dict__.update(self.__dict__, parameter=False)
      return PARAMETER, (plain, False, collections.OrderedDict())
    return TENSOR, (self.storage, 0, self.shape, self.strides, False, collections.OrderedDict())


class Persistent:
  """A module with its source inside."""

  def __init__(
    self, class_name, parameters=(), buffers=(), modules=(), args=(), kwargs=(), **attributes
  ):
    self.class_name = class_name
    self.state = dict(
      training=False,
      _parameters=collections.OrderedDict(parameters),
      _buffers=collections.OrderedDict(buffers),
      _non_persistent_buffers_set=set(),
      _forward_hooks=collections.OrderedDict(),
      _is_full_backward_hook=None,
      _modules=collections.OrderedDict(modules),
      **attributes,
      _init_args=tuple(args),
      _init_kwargs=dict(kwargs),
    )
    self.source = 'raise SystemExit("run")\n'

  def __reduce__(self):
    return PERSISTENT, (
      dict(
        type='class',
        version=6,
        module_src=self.source,
        class_name=self.class_name,
        state=self.state,
      ),
    )


class _Pickler(pickle.Pickler):
  """Storages by name, as torch.save writes them."""

  def __init__(self, file, protocol, extra):
    super().__init__(file, protocol)
    self.storages, self.extra = {}, extra

  def persistent_id(self, obj):
    if not isinstance(obj, Storage):
      return None
    key, _ = self.storages.setdefault(id(obj), (str(len(self.storages)), obj))
    return 'storage', TYPES[obj.array.dtype.name], key, 'cpu', obj.array.size, *self.extra


def pickled(obj, protocol=3):
  with looked_up():
    return pickle.dumps(obj, protocol)


def legacy(obj, protocol=2):
  """A file of torch.save before 1.6."""
  out = io.BytesIO()
  for part in (
    MAGIC,
    1001,
    dict(protocol_version=1001, little_endian=True, type_sizes=dict(short=2, int=4, long=4)),
  ):
    pickle.dump(part, out, protocol)
  with looked_up():
    pickler = _Pickler(out, protocol, (None,))
    pickler.dump(obj)
  storages = dict(pickler.storages.values())
  pickle.dump(sorted(storages), out, protocol)
  for key in sorted(storages):
    out.write(struct.pack('<q', storages[key].array.size) + storages[key].array.tobytes())
  return out.getvalue()


def zipped(obj, protocol=2, byteorder='little', compression=zipfile.ZIP_STORED):
  """A file of torch.save since 1.6."""
  content, out = io.BytesIO(), io.BytesIO()
  with looked_up():
    pickler = _Pickler(content, protocol, ())
    pickler.dump(obj)
  with zipfile.ZipFile(out, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', content.getvalue())
    archive.writestr('archive/byteorder', byteorder)
    for key, storage in pickler.storages.values():
      archive.writestr(f'archive/data/{key}', storage.array.tobytes())
    archive.writestr('archive/version', '3\n')
  return out.getvalue()


# ---- networks


FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.float32) / 64


class Builder:
  """Random networks as the original pickles them; each parameter is drawn so that it matters.

  Attributes:
    tensors: {name: float32 array} of everything built.
  """

  def __init__(self, seed, conv_clamp=None, fp16=False, lr_multiplier=0.01):
    self.rng, self.tensors = np.random.default_rng(seed), {}
    self.conv_clamp, self.fp16, self.lr_multiplier = conv_clamp, fp16, lr_multiplier

  def module(self, class_name, name, parameters=None, buffers=None, modules=None, **attributes):
    def wrap(tensors, parameter):
      wrapped = {}
      for key, x in (tensors or {}).items():
        x = np.asarray(x, np.float32)
        self.tensors[f'{name}.{key}'] = x
        wrapped[key] = Tensor(x, channels_last=self.fp16, parameter=parameter)
      return wrapped

    return Persistent(
      class_name, wrap(parameters, True), wrap(buffers, False), modules or {}, **attributes
    )

  def draw(self, *shape, scale=1.0, mean=0.0):
    return mean + scale * self.rng.normal(size=shape)

  def dense(self, name, inputs, outputs, activation='linear', multiplier=1.0, bias=0.0):
    return self.module(
      'FullyConnectedLayer',
      name,
      dict(
        weight=self.draw(outputs, inputs, scale=1 / multiplier),
        bias=self.draw(outputs, mean=bias, scale=0.3 / multiplier),
      ),
      activation=activation,
      weight_gain=multiplier / np.sqrt(inputs),
      bias_gain=multiplier,
    )

  def conv(self, name, inputs, outputs, size, activation='lrelu', down=1, bias=True, clamp=True):
    return self.module(
      'Conv2dLayer',
      name,
      dict(
        weight=self.draw(outputs, inputs, size, size),
        **(dict(bias=self.draw(outputs, scale=0.3)) if bias else {}),
      ),
      dict(resample_filter=FILTER),
      activation=activation,
      up=1,
      down=down,
      padding=size // 2,
      conv_clamp=self.conv_clamp if clamp else None,
      weight_gain=1 / np.sqrt(inputs * size**2),
      act_gain=np.sqrt(2) if activation == 'lrelu' else 1,
    )

  def mapping(self, name, z_dim, c_dim, w_dim, layers, embed, hidden, num_ws):
    modules = {}
    if c_dim:
      modules['embed'] = self.dense(f'{name}.embed', c_dim, embed)
    widths = [z_dim + (embed if c_dim else 0), *[hidden] * (layers - 1), w_dim]
    for i in range(layers):
      modules[f'fc{i}'] = self.dense(
        f'{name}.fc{i}', widths[i], widths[i + 1], 'lrelu', self.lr_multiplier
      )
    return self.module(
      'MappingNetwork',
      name,
      {},
      {} if num_ws is None else dict(w_avg=self.draw(w_dim)),
      modules,
      z_dim=z_dim,
      c_dim=c_dim,
      w_dim=w_dim,
      num_ws=num_ws,
      num_layers=layers,
      w_avg_beta=0.995,
    )

  def style_layer(self, name, inputs, outputs, w_dim, resolution, up):
    affine = self.dense(f'{name}.affine', w_dim, inputs, bias=1.0)
    return self.module(
      'SynthesisLayer',
      name,
      dict(
        weight=self.draw(outputs, inputs, 3, 3),
        noise_strength=self.draw(scale=0.3),
        bias=self.draw(outputs, scale=0.3),
      ),
      dict(resample_filter=FILTER, noise_const=self.draw(resolution, resolution)),
      dict(affine=affine),
      resolution=resolution,
      up=up,
      use_noise=True,
      activation='lrelu',
      conv_clamp=self.conv_clamp,
      padding=1,
      act_gain=np.sqrt(2),
    )

  def generator(
    self, z_dim, w_dim, c_dim, channels, image_channels, layers=8, embed=None, hidden=None
  ):
    """channels: at 4, 8, ..."""
    resolution, num_ws, blocks = 2 << len(channels), 2 * len(channels), {}
    for i, width in enumerate(channels):
      name, size = f'synthesis.b{4 << i}', 4 << i
      inputs, modules = channels[max(i - 1, 0)], {}
      if i:
        modules['conv0'] = self.style_layer(f'{name}.conv0', inputs, width, w_dim, size, 2)
      modules['conv1'] = self.style_layer(f'{name}.conv1', width, width, w_dim, size, 1)
      affine = self.dense(f'{name}.torgb.affine', w_dim, width, bias=1.0)
      modules['torgb'] = self.module(
        'ToRGBLayer',
        f'{name}.torgb',
        dict(
          weight=self.draw(image_channels, width, 1, 1), bias=self.draw(image_channels, scale=0.3)
        ),
        {},
        dict(affine=affine),
        conv_clamp=self.conv_clamp,
        weight_gain=1 / np.sqrt(width),
      )
      blocks[f'b{size}'] = self.module(
        'SynthesisBlock',
        name,
        {} if i else dict(const=self.draw(width, 4, 4)),
        dict(resample_filter=FILTER),
        modules,
        resolution=size,
        architecture='skip',
        use_fp16=self.fp16,
        channels_last=self.fp16,
      )
    sizes = dict(
      z_dim=z_dim, c_dim=c_dim, w_dim=w_dim, img_resolution=resolution, img_channels=image_channels
    )
    synthesis = self.module('SynthesisNetwork', 'synthesis', {}, {}, blocks, num_ws=num_ws)
    mapping = self.mapping(
      'mapping', z_dim, c_dim, w_dim, layers, embed or w_dim, hidden or w_dim, num_ws
    )
    return self.module(
      'Generator',
      '',
      {},
      {},
      dict(synthesis=synthesis, mapping=mapping),
      **sizes,
      num_ws=num_ws,
      kwargs=dict(
        sizes,
        mapping_kwargs=EasyDict(num_layers=layers),
        synthesis_kwargs=EasyDict(conv_clamp=self.conv_clamp),
      ),
    )

  def generator3(
    self,
    z_dim,
    w_dim,
    c_dim,
    layers,
    image_channels,
    kernel=3,
    radial=False,
    mapping_layers=2,
    output_scale=0.25,
    first=(5, 8),
  ):
    """A StyleGAN3 of random filters, which nobody designed and which are not symmetric.

    Args:
      layers: of each layer but ToRGB (width, size, up, down, whether critically sampled).
      first: width and size of the Fourier features.
    """
    width, size = first
    rate, names = 4.0, []
    affine = self.dense('synthesis.input.affine', w_dim, 4)
    modules = dict(
      input=self.module(
        'SynthesisInput',
        'synthesis.input',
        dict(weight=self.draw(width, width)),
        dict(
          transform=np.eye(3) + np.outer([1, 1, 0], self.draw(3, scale=0.2)),
          freqs=self.draw(width, 2),
          phases=self.draw(width),
        ),
        dict(affine=affine),
        w_dim=w_dim,
        channels=width,
        size=np.array([size, size]),
        sampling_rate=np.float64(rate),
        bandwidth=np.float64(1),
      )
    )
    for i, layer in enumerate([*layers, (image_channels, layers[-1][1], 1, 1, True)]):
      before = dict(i=i, channels=width, size=size, rate=rate)
      last = i == len(layers)
      name = f'L{i}_{layer[1]}_{layer[0]}'
      modules[name] = self.filtered_layer(
        f'synthesis.{name}', w_dim, before, layer, 1 if last else kernel, radial, last
      )
      names.append(name)
      width, size, rate = layer[0], layer[1], rate * layer[2] / layer[3]
    sizes = dict(
      z_dim=z_dim, c_dim=c_dim, w_dim=w_dim, img_resolution=size, img_channels=image_channels
    )
    num_ws = len(names) + 1
    synthesis = self.module(
      'SynthesisNetwork',
      'synthesis',
      {},
      {},
      modules,
      w_dim=w_dim,
      num_ws=num_ws,
      img_resolution=size,
      img_channels=image_channels,
      num_layers=len(layers),
      output_scale=output_scale,
      layer_names=names,
    )
    mapping = self.mapping('mapping', z_dim, c_dim, w_dim, mapping_layers, w_dim, w_dim, num_ws)
    return self.module(
      'Generator',
      '',
      {},
      {},
      dict(synthesis=synthesis, mapping=mapping),
      **sizes,
      num_ws=num_ws,
      kwargs=dict(sizes, mapping_kwargs=EasyDict(num_layers=mapping_layers)),
    )

  def filtered_layer(self, name, w_dim, before, layer, kernel, radial, last):
    """A SynthesisLayer of StyleGAN3; before: its index and what it takes."""
    i, inputs, size, rate = before.values()
    outputs, out_size, up, down, critical = layer
    up_taps, down_taps = (1 if factor == 1 else 3 * factor for factor in (up, down))
    down_radial = radial and not critical
    shapes = dict(
      up_filter=(up_taps,) if up_taps > 1 else None,
      down_filter=(down_taps,) * (1 + down_radial) if down_taps > 1 else None,
    )
    total = (out_size - 1) * down + 1 + up_taps + down_taps - 2 - (size + kernel - 1) * up
    low = (total + up) // 2
    made = self.module(
      'SynthesisLayer',
      name,
      dict(weight=self.draw(outputs, inputs, kernel, kernel), bias=self.draw(outputs, scale=0.3)),
      dict(
        magnitude_ema=self.rng.uniform(0.5, 2),
        **{k: 2 * self.rng.uniform(size=x) / np.prod(x) for k, x in shapes.items() if x},
      ),
      dict(affine=self.dense(f'{name}.affine', w_dim, inputs, bias=1.0)),
      w_dim=w_dim,
      is_torgb=last,
      is_critically_sampled=critical,
      use_fp16=self.fp16,
      in_channels=inputs,
      out_channels=outputs,
      in_size=np.array([size, size]),
      out_size=np.array([out_size, out_size]),
      in_sampling_rate=rate,
      out_sampling_rate=rate * up / down,
      tmp_sampling_rate=rate * up,
      in_cutoff=np.float64(1 + max(i - 1, 0)),
      out_cutoff=np.float64(1 + i),
      in_half_width=np.float64(2),
      out_half_width=np.float64(2),
      conv_kernel=kernel,
      conv_clamp=self.conv_clamp,
      up_factor=up,
      up_taps=up_taps,
      down_factor=down,
      down_taps=down_taps,
      down_radial=down_radial,
      padding=[low, total - low, low, total - low],
    )
    made.state['_buffers'].update({k: None for k, x in shapes.items() if not x})
    return made

  def discriminator(
    self, c_dim, channels, image_channels, architecture='resnet', layers=8, group=4
  ):
    modules, resolution = {}, 2 << len(channels)
    for i in reversed(range(1, len(channels))):
      name, width, half = f'b{4 << i}', channels[i], channels[i - 1]
      block = {}
      if i == len(channels) - 1:
        block['fromrgb'] = self.conv(f'{name}.fromrgb', image_channels, width, 1)
      block['conv0'] = self.conv(f'{name}.conv0', width, width, 3)
      block['conv1'] = self.conv(f'{name}.conv1', width, half, 3, down=2)
      if architecture == 'resnet':
        block['skip'] = self.conv(
          f'{name}.skip', width, half, 1, 'linear', 2, bias=False, clamp=False
        )
      modules[name] = self.module(
        'DiscriminatorBlock',
        name,
        {},
        dict(resample_filter=FILTER),
        block,
        architecture=architecture,
        use_fp16=self.fp16,
      )
    width = channels[0]
    if c_dim:
      modules['mapping'] = self.mapping('mapping', 0, c_dim, width, layers, width, width, None)
    epilogue = dict(
      mbstd=self.module('MinibatchStdLayer', 'b4.mbstd', group_size=group, num_channels=1),
      conv=self.conv('b4.conv', width + 1, width, 3),
      fc=self.dense('b4.fc', 16 * width, width, 'lrelu'),
      out=self.dense('b4.out', width, width if c_dim else 1),
    )
    modules['b4'] = self.module(
      'DiscriminatorEpilogue', 'b4', {}, {}, epilogue, architecture=architecture
    )
    sizes = dict(c_dim=c_dim, img_resolution=resolution, img_channels=image_channels)
    return self.module('Discriminator', '', {}, {}, modules, **sizes, kwargs=sizes)


def small_snapshot(seed=0, **settings):
  """Tiny conditional networks -> (dict to be pickled, {network: {name: array}})."""
  networks, truth = {}, {}
  for i, name in enumerate(('G', 'D', 'G_ema')):
    builder = Builder([seed, i], **settings)
    if name == 'D':
      networks[name] = builder.discriminator(3, (6, 4), 3, layers=0, group=2)
    else:
      networks[name] = builder.generator(5, 6, 3, (6, 4), 3, layers=2)
    truth[name] = builder.tensors
  return dict(
    training_set_kwargs=dict(path='/data/x.zip', xflip=False), **networks, augment_pipe=None
  ), truth
