"""Each form in which a set of pictures may come: what is read of it, or why it is refused."""

import gzip
import io
import json
import logging
import os
import pathlib
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, features

from configs import atari, cifar
from palm_jax import runner, workdir
from palm_jax.base.errors import UserError
from palm_jax.data import arrays, decoding, safe_pickle
from palm_jax.data import parquet as parquet_module
from palm_jax.data.identity import fingerprint
from palm_jax.data.load import load
from tests import test_data

READ = {}
REFUSED = {}
# Of the set in the test of digests, by the version before data.size.
OLD_DIGEST = 'e8a0026724cd917cf94448a98cc2217f1033b501b9ad521336e42ad8f1b7ea98'


def form(forms, *values):
  """Registers a builder: (folder, value) -> name of the set, and what to expect of it."""

  def register(build):
    for value in values or (None,):
      name = build.__name__ if value is None else f'{build.__name__}-{value}'
      forms[name] = (build, value)
    return build

  return register


def read(*values):
  """Builders return (path, pictures by class, and perhaps options of `load`, tolerance)."""
  return form(READ, *values)


def refused(*values):
  """Builders return (path, what the message matches, and perhaps what `load` is called with)."""
  return form(REFUSED, *values)


def shots(size=(8, 8), channels=3):
  """Five pictures of each of two classes: {class: [(H, W, C)]}."""
  rng = np.random.default_rng(0)
  draw = lambda: list(rng.integers(0, 256, (5, *size, channels), np.uint8))
  return {'cat': draw(), 'dog': draw()}


def encode(image, kind='PNG', **options):
  """The bytes of a picture: an array (H, W, C), or one of Pillow's."""
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def files_of(shots, pattern='{name}/{i}.png', kind='PNG', convert=lambda x: x, **options):
  """{name: bytes} of class folders."""
  return {
    pattern.format(name=name, i=i): encode(convert(image), kind, **options)
    for name, images in shots.items()
    for i, image in enumerate(images)
  }


def folder(root, files):
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return root


def packed(path, files):
  """A .zip, or a .tar of the kind that its name says."""
  if path.suffix == '.zip':
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
      for name, content in files.items():
        file.writestr(name, content)
    return path
  kind = path.suffix[1:].replace('tgz', 'gz').replace('tar', '')
  with tarfile.open(path, f'w:{kind}') as file:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      file.addfile(info, io.BytesIO(content))
  return path


def listed(labels):
  return {'dataset.json': json.dumps({'labels': labels}).encode()}


# ---- archives

ARCHIVES = 'x.zip', 'x.tar', 'x.tar.gz', 'x.tgz', 'x.tar.bz2', 'x.tar.xz'


@read(*ARCHIVES)
def packed_classes(tmp, name):
  junk = {'__MACOSX/cat/._0.png': b'x', '.git/x.png': b'x', 'cat/Thumbs.db': b'x'}
  return packed(tmp / name, files_of(shots()) | junk), shots()


@read(*ARCHIVES[:3])
def packed_dataset_tool(tmp, name):
  """Its folders are numbers of files, whatever their class."""
  files = files_of(shots(), 'set/00000/{name}{i}.png')
  labels = [[key.removeprefix('set/'), int('dog' in key)] for key in files]
  files |= {'set/dataset.json': json.dumps({'labels': labels}).encode()}
  cats, dogs = shots().values()
  return packed(tmp / name, files), {'0': cats, '1': dogs}


@read()
def packed_without_labels(tmp, _):
  files = files_of(shots(), '00000/{name}{i}.png') | listed(None)
  return packed(tmp / 'x.zip', files), {'0': sum(shots().values(), [])}


@read()
def packed_on_windows(tmp, _):
  path = packed(tmp / 'x.zip', files_of(shots(), 'set/{name}/{i}.png'))
  # zipfile itself writes no such names.
  path.write_bytes(path.read_bytes().replace(b'set/cat/', b'set\\cat\\'))
  return path, shots()


@read()
def packed_parts(tmp, _):
  both = files_of(shots(), 'set/train/{name}/{i}.png') | files_of(
    shots(), 'set/val/{name}/a/{i}.png'
  )
  return packed(tmp / 'x.tgz', both), {name: 2 * images for name, images in shots().items()}


@refused('x.zip', 'x.tar', 'x.tar.gz', 'x.tar.xz')
def packed_and_cut(tmp, name):
  path = packed(tmp / name, files_of(shots((32, 32))))
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  return path, r'damaged or not a \.(zip|tar.*) \(.*(make or )?fetch it again'


@refused()
def packed_with_a_flipped_bit(tmp, _):
  path = packed(tmp / 'x.zip', files_of(shots()))
  content = bytearray(path.read_bytes())
  content[content.index(b'IDAT') + 20] ^= 1
  path.write_bytes(content)
  return path, r'cat/0.png is damaged \(BadZipFile: Bad CRC-32'


@refused('../a/0.png', '/a/0.png', 'a/../../0.png', 'C:/a/0.png', '..\\a\\0.png')
def packed_names_that_lead_out(tmp, name):
  path = packed(tmp / 'x.zip', files_of(shots()) | {name: encode(shots()['cat'][0])})
  return path, 'the name .* leads out of the archive'


@refused()
def packed_names_that_lead_out_of_a_tar(tmp, _):
  return packed(tmp / 'x.tar', {'../x.png': b''}), r"the name '../x.png' leads out of the archive"


@refused(tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
def packed_links(tmp, kind):
  path = packed(tmp / 'x.tar', files_of(shots()))
  with tarfile.open(path, 'a') as file:
    link = tarfile.TarInfo('cat/9.png')
    link.type, link.linkname = kind, '/etc/passwd'
    file.addfile(link)
  return path, "'cat/9.png' is a link or device, expected files only"


@refused()
def packed_links_of_a_zip(tmp, _):
  path = packed(tmp / 'x.zip', files_of(shots()))
  with zipfile.ZipFile(path, 'a') as file:
    info = zipfile.ZipInfo('cat/9.png')
    info.external_attr = 0o120777 << 16
    file.writestr(info, '/etc/passwd')
  return path, "'cat/9.png' is a link or device"


@refused()
def packed_with_a_password(tmp, _):
  path = packed(tmp / 'x.zip', {'cat/0.png': b'x'})
  content = bytearray(path.read_bytes())
  content[content.index(b'PK\1\2') + 8] |= 1
  path.write_bytes(content)
  return path, "'cat/0.png' is encrypted.*without a password"


@refused('x.zip', 'x.tar.gz')
def packed_bombs(tmp, name):
  path = packed(tmp / name, {'cat/0.png': bytes(1 << 21)})
  return path, 'says that it holds 0.0 GB: no pictures'


@refused()
def packed_headers_that_ask_for_memory(tmp, _):
  header = tarfile.TarInfo('x')
  header.type, header.size = tarfile.XHDTYPE, 2**40
  (tmp / 'x.tar').write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
  return tmp / 'x.tar', 'damaged or not a .tar .*1,099,511,627,776 bytes in one piece'


@refused(tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)
def packed_headers_that_ask_for_memory_when_unpacked(tmp, kind):
  header = tarfile.TarInfo('x')
  header.type, header.size = kind, 1 << 29  # of zeros, half a MB on the disk
  (tmp / 'x.tar.gz').write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)))
  return tmp / 'x.tar.gz', 'damaged or not a .tar.gz .*536,870,912 bytes in one piece'


@refused()
def packed_large_members(tmp, _):
  header = tarfile.TarInfo('cat/0.png')
  header.size = 2**40
  (tmp / 'x.tar').write_bytes(header.tobuf() + bytes(1024))
  return tmp / 'x.tar', "'cat/0.png' has 1,099,511,627,776 bytes, expected"


@refused('x.zip', 'x.tar', 'x.tar.gz')
def packed_nothing(tmp, name):
  return packed(tmp / name, {}), 'holds no CIFAR folder and no folders; expected one folder'


@refused()
def packed_without_folders(tmp, _):
  path = packed(tmp / 'x.zip', {'0.png': b'', '1.png': b''})
  return path, 'no folders; expected .* without labels in one folder'


@refused('missing', 'unlisted', 'text', 'deep')
def packed_with_wrong_labels(tmp, what):
  files = files_of(shots(), '00000/{name}{i}.png')
  labels = [[name, 0] for name in files]
  changed, message = {
    'missing': ([*labels, ['00000/zebra.png', 1]], 'dataset.json names 00000/zebra.png, which is'),
    'unlisted': (labels[1:], '00000/cat0.png has no label in dataset.json'),
    'text': ([[name, 'cat'] for name in files], 'dataset.json cannot be read .ValueError'),
    'deep': ([], ''),
  }[what]
  content = b'[' * 100_000 if what == 'deep' else listed(changed)['dataset.json']
  path = packed(tmp / 'x.zip', files | {'dataset.json': content})
  return path, message or 'dataset.json cannot be read .RecursionError'


# ---- folders


@read('{name}/a/{i}.png', '{name}/{i}/b/c.png', 'all/{name}/{i}.png', 'x/y/{name}/{i}/z.png')
def nested(tmp, pattern):
  return folder(tmp / 'set', files_of(shots(), pattern)), shots()


@read()
def nested_and_not(tmp, _):
  """Pictures lie directly in the folder of a class, and deeper."""
  files = files_of(shots()) | files_of(shots(), '{name}/more/{i}.png')
  return folder(tmp / 'set', files), {name: 2 * images for name, images in shots().items()}


@read()
def nested_parts(tmp, _):
  cats, dogs = shots().values()
  files = files_of(shots(), 'train/images/{name}/x/{i}.png')
  files |= files_of({'dog': dogs[:1]}, 'test/images/{name}/y/z/{i}.png')
  return folder(tmp / 'set', files), {'cat': cats, 'dog': [*dogs, dogs[0]]}


@read()
def nested_links(tmp, _):
  """A link to the folder itself has no end."""
  root = folder(tmp / 'set', files_of(shots()))
  (root / 'cat' / 'again').symlink_to(root, target_is_directory=True)
  (root / 'emu').symlink_to(folder(tmp / 'emus', {'0.png': encode(shots()['dog'][0])}))
  return root, shots() | {'emu': shots()['dog'][:1]}


@read()
def nested_links_to_each_other(tmp, _):
  root = folder(tmp / 'set', files_of(shots()))
  for one, other in (('cat', 'dog'), ('dog', 'cat')):
    (root / one / other).symlink_to(root / other, target_is_directory=True)
  cats, dogs = shots().values()
  return root, {'cat': cats + dogs, 'dog': dogs + cats}


@pytest.mark.parametrize(
  'train, test', [('Train', 'TEST'), ('Training', 'Testing'), ('train', 'valid')]
)
def test_parts_have_other_names_too(tmp_path, train, test):
  files = files_of(shots(), train + '/{name}/{i}.png')
  root = folder(tmp_path / 'set', files | files_of(shots(), test + '/{name}/{i}.png'))
  got = load(root)
  assert got.class_names == ('cat', 'dog') and len(got.train.labels) == len(got.test.labels) == 10
  assert f'{train} and {test}' in got.source


def test_a_test_part_without_labels_is_not_the_test_part(tmp_path):
  files = files_of(shots(), 'train/{name}/{i}.png') | files_of(shots(), 'val/{name}/{i}.png')
  loose = files_of(shots(), 'test/{name}{i}.png')
  got = load(folder(tmp_path / 'set', files | loose))
  assert len(got.test.labels) == 10 and 'train and val' in got.source


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
  root = folder(tmp_path / 'set', files_of(shots(), '{name}/a/{i}.png'))
  scandir = os.scandir

  def refuse(path):
    if str(path).endswith('dog/a'):
      raise PermissionError(13, 'Permission denied', str(path))
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refuse)
  test_data.refused(r'dog/a cannot be listed \(.*Permission denied.*make it readable', root)
  assert fingerprint(str(root)) is None


@read()
def one_class(tmp, _):
  cats = {'cat': shots()['cat']}
  return folder(tmp / 'set', files_of(cats, '{name}/a/{i}.png')), {'a': cats['cat']}


@refused()
def only_a_test_part(tmp, _):
  return folder(tmp, files_of(shots(), 'test/{name}/{i}.png')), 'would have the classes test'


# ---- formats and modes

LOSSLESS = dict(bmp='BMP', tif='TIFF', TIFF='TIFF', webp='WEBP', ppm='PPM', tga='TGA', pcx='PCX')


@read(*LOSSLESS)
def formats(tmp, suffix):
  options = dict(lossless=True) if suffix == 'webp' else {}
  pattern = '{name}/{i}.' + suffix
  # Rows of 55 x 3 take 168 bytes in a .bmp, which is not 16 bits a channel.
  files = files_of(shots((6, 55)), pattern, LOSSLESS[suffix], **options)
  return folder(tmp / 'set', files), shots((6, 55))


@read('gif', 'pgm', 'png')
def grey_formats(tmp, suffix):
  kind = dict(gif='GIF', pgm='PPM', png='PNG')[suffix]
  files = files_of(shots(channels=1), '{name}/{i}.' + suffix, kind)
  if suffix != 'gif':
    return folder(tmp / 'set', files), shots(channels=1)
  # A palette, which is colour whatever colours it has.
  return folder(tmp / 'set', files), {
    k: list(np.repeat(v, 3, -1)) for k, v in shots(channels=1).items()
  }


@read()
def bits(tmp, _):
  black_or_white = {k: [x // 128 * 255 for x in v] for k, v in shots(channels=1).items()}
  convert = lambda x: Image.fromarray(x[..., 0]).convert('1')
  return folder(tmp / 'set', files_of(black_or_white, convert=convert)), black_or_white


@read()
def palettes(tmp, _):
  """Four colours each, one of which is said to be see-through, but is not used."""
  rng = np.random.default_rng(1)
  palette = rng.integers(0, 256, (5, 3), np.uint8)
  where = {name: list(rng.integers(0, 4, (5, 8, 8), np.uint8)) for name in ('cat', 'dog')}

  def convert(x):
    image = Image.frombytes('P', (8, 8), x.tobytes())
    image.putpalette(palette.tobytes())
    return image

  files = files_of(where, convert=convert, transparency=4)
  return folder(tmp / 'set', files), {k: [palette[x] for x in v] for k, v in where.items()}


@read('LA', 'RGBA')
def opaque(tmp, mode):
  colour = shots(channels=len(mode) - 1)
  convert = lambda x: np.concatenate([x, np.full_like(x[..., :1], 255)], -1)
  return folder(tmp / 'set', files_of(colour, convert=convert)), colour


@read('JPEG', 'TIFF')
def inks(tmp, kind):
  """CMYK: what light is left after the inks, one after the other."""
  ink = {'cat': np.array([200, 30, 90, 20]), 'dog': np.array([0, 250, 10, 100])}
  light = {k: (255 - x[:3]) * (255 - x[3]) / 255 for k, x in ink.items()}
  many = lambda x: [np.broadcast_to(x, (8, 8, len(x)))] * 5
  convert = lambda x: Image.fromarray(x.astype(np.uint8), 'CMYK')
  ink, light = ({k: many(x) for k, x in each.items()} for each in (ink, light))
  files = files_of(ink, '{name}/{i}.' + kind.lower(), kind, convert)
  return folder(tmp / 'set', files), light, {}, 3


@read('PNG', 'TIFF', 'WEBP', 'JPEG')
def turned(tmp, kind):
  """EXIF's 6: the first row is seen at the right, the first column at the top."""
  exif = Image.Exif()
  exif[0x0112] = 6
  light = {'cat': [[[250, 0, 0]], [[0, 90, 0]]], 'dog': [[[9, 9, 99]], [[0, 0, 250]]]}
  blocks = {k: np.kron(x, np.ones((16, 16, 1), int)).astype(np.uint8) for k, x in light.items()}
  options = dict(WEBP=dict(lossless=True), JPEG=dict(subsampling=0, quality=95)).get(kind, {})
  upright = {k: [np.rot90(x, -1)] * 5 for k, x in blocks.items()}
  raw = {k: [x] * 5 for k, x in blocks.items()}
  files = files_of(raw, '{name}/{i}.' + kind.lower(), kind, exif=exif, **options)
  return folder(tmp / 'set', files), upright, {}, 4 if kind == 'JPEG' else 0


@read()
def turned_behind_the_pixels(tmp, _):
  """A PNG's EXIF data may stand at its end, where only squares can still be turned."""
  exif = Image.Exif()
  exif[0x0112] = 3

  def late(content):
    start = content.index(b'eXIf') - 4
    size = 12 + int.from_bytes(content[start : start + 4], 'big')
    end = content.index(b'IEND') - 4
    return content[:start] + content[start + size : end] + content[start:][:size] + content[end:]

  files = {name: late(content) for name, content in files_of(shots(), exif=exif).items()}
  return folder(tmp / 'set', files), {k: [x[::-1, ::-1] for x in v] for k, v in shots().items()}


@read()
def damaged_exif(tmp, _):
  return folder(tmp / 'set', files_of(shots(), exif=b'Exif\0\0nothing at all')), shots()


def odd(tmp, name, content):
  """A sound set with another picture in it."""
  return folder(tmp / 'set', files_of(shots()) | {f'cat/{name}': content})


@refused('I;16', 'I', 'F')
def deep(tmp, mode):
  image = Image.new(mode, (8, 8), 7)
  return odd(tmp, 'odd.tif', encode(image, 'TIFF')), f'has pixels of type {mode}, expected 8'


@refused('png', 'ppm', 'sgi', 'jp2')
def deep_colour(tmp, suffix):
  """Pillow reads 16 bits of colour, but would cut them."""
  content = b'P6 8 8 65535\n' + bytes(8 * 8 * 6)
  colour = Image.new('RGB', (8, 8))
  if suffix == 'sgi':
    content = encode(colour, 'SGI', bpc=2)
  if suffix == 'jp2':
    if not features.check('jpg_2000'):
      pytest.skip('this Pillow reads no JPEG 2000')
    content = encode(colour, 'JPEG2000')
    bits = b'\7\1\1' * 3  # 8 of each channel, less 1
    assert bits in content
    content = content.replace(bits, b'\x0f\1\1' * 3)
  if suffix == 'png':
    content = bytearray(encode(Image.new('RGB', (8, 8))))
    content[24] = 16  # bits a channel
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, 'big')
  return odd(tmp, f'odd.{suffix}', bytes(content)), 'has more than 8 bits a channel, expected 8'


@refused('GIF', 'WEBP', 'TIFF', 'PNG')
def films(tmp, kind):
  frames = [Image.fromarray(x) for x in shots()['dog'][:3]]
  content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
  name = f'odd.{kind.lower()}'
  return odd(tmp, name, content), f'{name} has 3 frames, expected one'


@refused('P', 'LA', 'RGBA')
def see_through(tmp, mode):
  if mode == 'P':
    content = encode(Image.new('P', (8, 8)), transparency=0)
  else:
    content = encode(Image.new(mode, (8, 8), (9,) * len(mode)))
  return odd(tmp, 'odd.png', content), 'odd.png has transparent pixels'


@refused('x.zip', 'x.tar.gz', 'set')
def broken_pictures(tmp, name):
  files = files_of(shots()) | {'dog/odd.gif': b'not an image'}
  path = folder(tmp / name, files) if name == 'set' else packed(tmp / name, files)
  return path, 'dog/odd.gif: not a readable image'


@refused()
def programs_for_printers(tmp, _):
  """Pillow would start Ghostscript."""
  content = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n'
  return odd(tmp, 'odd.png', content), 'odd.png: not a readable image'


# ---- sizes


def lanczos(image, size):
  """(size, size, C): the central square, each axis weighted by the windowed sinc of width 3."""
  side = min(image.shape[:2])
  top, left = ((length - side) // 2 for length in image.shape[:2])
  scale = side / size
  centres = (np.arange(size)[:, None] + 0.5) * scale
  at = (np.arange(side)[None] + 0.5 - centres) / max(scale, 1)
  weights = np.where(abs(at) < 3, np.sinc(at) * np.sinc(at / 3), 0)
  weights /= weights.sum(1, keepdims=True)
  square = image[top : top + side, left : left + side]
  # Pillow rounds between the two.
  wide = np.einsum('ij,kjc->kic', weights, square).round().clip(0, 255)
  return np.einsum('ij,jkc->ikc', weights, wide).round().clip(0, 255)


def mixed():
  """One picture of each class, ten times: wide and tall."""
  cat, dog = shots((40, 32))['cat'][0], shots((9, 12))['dog'][0]
  return {'cat': [cat] * 5, 'dog': [dog] * 5}


@read('folder', 'x.zip', 'x.parquet')
def mixed_sizes(tmp, name):
  files = files_of(mixed())
  if name == 'folder':
    path = folder(tmp / 'set', files)
  elif name == 'x.zip':
    path = packed(tmp / name, files)
  else:
    path = parquet(tmp / name, mixed())
  return path, {k: [lanczos(x, 16) for x in v] for k, v in mixed().items()}, dict(size=16), 1


@read()
def resized_arrays(tmp, _):
  images = {k: [v[0]] * 5 for k, v in shots((12, 9)).items()}
  both = np.concatenate(list(images.values()))
  np.savez(tmp / 'x.npz', images=both, labels=np.repeat([0, 1], 5), class_names=['cat', 'dog'])
  want = {k: [lanczos(x, 4) for x in v] for k, v in images.items()}
  return tmp / 'x.npz', want, dict(size=4), 1


@read()
def cropped_only(tmp, _):
  """Where the shorter side is right, pixels are those of the file."""
  want = {k: [x[:, 2:10] for x in v] for k, v in shots((8, 13)).items()}
  return folder(tmp / 'set', files_of(shots((8, 13)))), want, dict(size=8)


@refused('x.zip', 'x.tar', 'set')
def two_sizes(tmp, name):
  files = files_of(shots()) | {'dog/9.png': encode(np.zeros((9, 12, 3), np.uint8))}
  path = folder(tmp / name, files) if name == 'set' else packed(tmp / name, files)
  return path, 'dog/9.png is 12x9, most images are 8x8.*--config.data.size=8'


# ---- parquet


def parquet(path, shots, form='struct', labels='label', numbers=None, names=('cat', 'dog')):
  """A file of the Hugging Face Hub."""
  encoded = [encode(x) for images in shots.values() for x in images]
  if form == 'struct':
    encoded = [dict(bytes=x, path=f'{i}.png') for i, x in enumerate(encoded)]
  if numbers is None:
    numbers = [i for i, images in enumerate(shots.values()) for _ in images]
  columns = {'image': encoded}
  if labels:
    columns[labels] = numbers
  table = pyarrow.table(columns)
  if names:
    features = {labels: dict(names=list(names), _type='ClassLabel')}
    about = json.dumps(dict(info=dict(features=features)))
    table = table.replace_schema_metadata({'huggingface': about})
  path.parent.mkdir(parents=True, exist_ok=True)
  pyarrow.parquet.write_table(table, path)
  return path


@read('label', 'labels', 'fine_label')
def parquet_file(tmp, labels):
  form = 'raw' if labels == 'labels' else 'struct'
  return parquet(tmp / 'x.parquet', shots(), form, labels), shots()


@read('', 'data/')
def parquet_folder(tmp, below):
  first = {'cat': shots()['cat'], 'dog': []}
  second = {'cat': [], 'dog': shots()['dog']}
  parquet(tmp / f'set/{below}train-00000-of-00002.parquet', first)
  parquet(tmp / f'set/{below}train-00001-of-00002.parquet', second)
  parquet(tmp / f'set/{below}test-00000-of-00001.parquet', second)
  parquet(tmp / f'set/{below}validation-00000-of-00001.parquet', first)
  return tmp / 'set', {'cat': shots()['cat'], 'dog': 2 * shots()['dog']}


@refused('fold{}/train-0', 'fold{}/data/train-0', 'fold{}/train/0')
def parquet_of_several_sets(tmp, name):
  """As the hub's configurations lie: the test pictures of one would be trained on in another."""
  for fold in (0, 1):
    parquet(tmp / f'set/{name.format(fold)}.parquet', shots())
    parquet(tmp / f'set/{name.format(fold).replace("train", "test")}.parquet', shots())
  return tmp / 'set', r'(train|test).parquet files in fold0.*, fold1.*: give one of these folders'


@read()
def parquet_shards_in_folders(tmp, _):
  both = shots()
  parquet(tmp / 'set/train/a/0.parquet', {'cat': both['cat'], 'dog': []})
  parquet(tmp / 'set/train/b/0.parquet', {'cat': [], 'dog': both['dog']})
  return tmp / 'set', both


def test_parquet_beyond_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
  path, _ = parquet_folder(tmp_path, '')
  size = sum(file.stat().st_size for file in path.glob('t*'))
  monkeypatch.setattr(parquet_module, 'machine_memory', lambda: size)
  load(str(path))
  monkeypatch.setattr(parquet_module, 'machine_memory', lambda: size - 1)
  with pytest.raises(UserError, match='its files take .* GiB of memory: give fewer'):
    load(str(path))


@pytest.mark.parametrize(
  'train, test',
  [
    ('train_0', 'test_0'),
    ('cifar10_train', 'cifar10_test'),
    ('default/partial-train/0000', 'default/partial-test/0000'),
    ('Training', 'Valid'),
  ],
)
def test_parts_in_names_of_parquet(tmp_path, train, test):
  parquet(tmp_path / f'set/{train}.parquet', shots())
  parquet(tmp_path / f'set/{test}.parquet', {'cat': shots()['cat'], 'dog': []})
  folder(tmp_path, {'set/preview.png': encode(shots()['cat'][0])})
  got = load(tmp_path / 'set')
  assert (len(got.train.labels), len(got.test.labels)) == (10, 5)


def test_parquet_without_labels_of_the_test_part(tmp_path, caplog):
  parquet(tmp_path / 'set/train-0.parquet', shots())
  parquet(tmp_path / 'set/test-0.parquet', shots(), numbers=[-1] * 10)
  got = load(tmp_path / 'set')
  assert (len(got.train.labels), len(got.test.labels)) == (8, 2)
  parquet(tmp_path / 'set/validation-0.parquet', {'cat': shots()['cat'], 'dog': []})
  got = load(tmp_path / 'set')
  assert (len(got.train.labels), len(got.test.labels)) == (10, 5)
  assert 'test-0.parquet is not read: its labels are all below 0' in caplog.text


@read()
def parquet_coarse(tmp, _):
  path = parquet(tmp / 'x.parquet', shots(), labels='coarse_label', names=())
  cats, dogs = shots().values()
  return path, {'0': cats, '1': dogs}, dict(label_set='coarse')


@read()
def parquet_without_labels(tmp, _):
  path = parquet(tmp / 'x.parquet', shots(), labels='', names=())
  return path, {'0': sum(shots().values(), [])}


@refused(['cat', 'dog'] * 5, [True, False] * 5, [0.0, 1.0] * 5, ['cat'] * 10)
def parquet_labels_of_other_kinds(tmp, labels):
  path = parquet(tmp / 'x.parquet', shots(), numbers=labels, names=())
  if len(set(labels)) == 1:  # as pandas writes categories
    table = pyarrow.parquet.read_table(path)
    table = table.set_column(1, 'label', table['label'].dictionary_encode())
    pyarrow.parquet.write_table(table, path)
  return path, r'expected whole numbers in one called label .* number the classes'


@refused('no image', 'no label', 'path', 'bytes', 'null', 'cut', 'text', 'empty', 'other', 'test')
def parquet_files(tmp, what):
  path = tmp / 'x.parquet'
  write = lambda **columns: pyarrow.parquet.write_table(pyarrow.table(columns), path)
  one = encode(shots()['cat'][0])
  if what == 'no image':
    write(text=['a'], label=[1])
    return (
      path,
      r'the columns text \(string\), label \(int64\); expected pictures in',
    )
  if what == 'no label':
    write(image=[one], kind=[1])
    return path, 'expected whole numbers in one called label or labels or fine_label'
  if what == 'path':
    write(
      image=pyarrow.array(
        [dict(bytes=None, path='/etc/passwd')],
        pyarrow.struct([('bytes', pyarrow.binary()), ('path', pyarrow.string())]),
      ),
      label=[1],
    )
    return path, 'row 0 has no bytes in image, only a path'
  if what == 'bytes':
    write(image=[one, b'nothing', one], label=[1, 0, 1])
    return path, r'x.parquet: row 1: not a readable image'
  if what == 'null':
    write(image=[one, one], label=[1, None])
    return path, 'row 1 has no label'
  if what == 'empty':
    parquet(path, {'cat': [shots()['cat'][0]]})
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path)[:0], path)
    return path, 'has no rows'
  if what == 'other':
    parquet(tmp / 'set/train-0.parquet', shots())
    return parquet(tmp / 'set/test-0.parquet', shots(), names='ab').parent, 'classes differently'
  if what == 'test':
    return parquet(tmp / 'set/test-0.parquet', shots()).parent, r'no train.parquet files, only test'
  path.write_bytes(b'PAR1 nothing' if what == 'text' else parquet(path, shots()).read_bytes()[:-99])
  return path, 'damaged or not a .parquet'


# ---- CIFAR by numpy 2, labels with gaps


@read(0, 2, 4, 5)
def cifar_of_numpy_2(tmp, protocol):
  """What people write who change the published files: texts for keys, arrays for labels."""
  kind = 'cifar-10-batches-py'
  _, train, test = test_data.cifar(kind)
  images, labels = (np.concatenate(pair) for pair in zip(train[:2], test[:2], strict=True))
  names = [f'data_batch_{i}' for i in range(1, 6)] + ['test_batch']
  planes = np.split(images.transpose(0, 3, 1, 2).reshape(len(images), -1), 6)
  parts = np.split(labels, 6)
  forms = [list, np.asarray, lambda x: [int(y) for y in x], lambda x: x.astype('>i4')] * 2
  files = {'batches.meta': pickle.dumps({'label_names': test_data.TEN}, protocol)}
  for name, pixels, numbers, convert in zip(names, planes, parts, forms, strict=False):
    pixels = np.asfortranarray(pixels) if 'test' in name else pixels
    content = pickle.dumps({'data': pixels, 'labels': convert(numbers)}, protocol)
    assert protocol > 2 or b'numpy._core' in content
    files[name] = content
  root = test_data.write_folder(tmp / kind, files)
  return root, {n: list(images[labels == i]) for i, n in enumerate(test_data.TEN)}


@read()
def labels_with_gaps(tmp, _):
  images = np.concatenate(list(shots().values()))
  np.savez(tmp / 'x.npz', images=images, labels=np.repeat([0, 5], 5))
  cats, dogs = shots().values()
  return tmp / 'x.npz', {'0': cats, '1': [], '2': [], '3': [], '4': [], '5': dogs}


# ---- the tests


@pytest.mark.parametrize('name', READ)
def test_read(tmp_path, name):
  build, value = READ[name]
  path, want, options, tolerance = (*build(tmp_path, value), {}, 0)[:4]
  before = sorted(tmp_path.rglob('*'))
  got = load(path, **options)
  assert sorted(tmp_path.rglob('*')) == before  # nothing is unpacked
  assert got.class_names == tuple(want)
  images = np.concatenate([got.train.images, got.test.images]).astype(int)
  labels = np.concatenate([got.train.labels, got.test.labels])
  assert len(images) == sum(map(len, want.values()))
  for label, pictures in enumerate(want.values()):
    found = images[labels == label]
    expected = np.array(pictures).reshape(-1, *images.shape[1:])
    assert len(found) == len(expected)
    if tolerance:  # all of a class are one picture
      assert np.abs(found - expected).max() <= tolerance
    else:
      assert sorted(x.tobytes() for x in found) == sorted(x.tobytes() for x in expected.astype(int))
  assert ('Lanczos' in got.source) == ('size' in options)


@pytest.mark.parametrize('name', REFUSED)
def test_refused(tmp_path, name, monkeypatch):
  build, value = REFUSED[name]
  path, match, options = (*build(tmp_path, value), {})[:3]
  if 'bombs' in name:
    monkeypatch.setattr(arrays, 'LARGE', 1 << 20)
  before = sorted(tmp_path.rglob('*'))
  test_data.refused(match, path, **options)
  assert sorted(tmp_path.rglob('*')) == before


def test_enough_forms():
  assert len(READ) + len(REFUSED) > 60


def test_what_is_skipped_is_said_in_one_line(tmp_path, caplog):
  caplog.set_level(logging.WARNING)
  junk = {name: b'x' for name in ('a.txt', 'cat/b.pdf', 'dog/c', '.hidden', 'd.png')}
  load(folder(tmp_path / 'set', files_of(shots()) | junk))
  load(folder(tmp_path / 'sound', files_of(shots())))
  build, _ = READ['labels_with_gaps']
  load(build(tmp_path, None)[0])
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == 2
  assert '4 files skipped' in said[0] and 'a.txt, cat/b.pdf, d.png and 1 more' in said[0]
  assert '4 of 6 classes have no image (1, 2, 3, ...)' in said[1]


def test_pyarrow_is_asked_for_in_one_line(tmp_path, monkeypatch):
  path = parquet(tmp_path / 'x.parquet', shots())
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  test_data.refused('x.parquet needs pyarrow; run: pip install pyarrow', path)


@pytest.mark.skipif(not features.check('avif'), reason='this Pillow writes no AVIF')
def test_the_bits_of_avif():
  """By the box that says them: Pillow writes 8 alone, and opens 10 as if they were 8."""
  content = encode(Image.new('RGB', (8, 8)), 'AVIF')
  assert decoding._bits_of_avif(content) == [8, 8, 8]
  deep = content.replace(b'pixi\0\0\0\0\3\10\10\10', b'pixi\0\0\0\0\3\12\12\12')
  assert decoding._bits_of_avif(deep) == [10, 10, 10]
  assert decoding._bits_of_avif(b'') == decoding._bits_of_avif(b'pixi') == []


def test_pickles_of_a_few_bytes_take_no_memory_or_time():
  text = b'X' + struct.pack('<I', 1 << 16) + b'x' * (1 << 16) + b'q\0'
  again = b'h\x01h\0h\x02\x86R'
  encodes = b'\x80\x02X\6\0\0\0latin1q\2c_codecs\nencode\nq\1' + text + 9 * again + b'.'
  with pytest.raises(pickle.UnpicklingError, match='encodes more text than it holds'):
    safe_pickle.load(encodes)
  nested = b'\x80\x02}N\x85q\0' + 60 * b'h\0h\0\x86q\0' + b'K\1s.'
  with pytest.raises(pickle.UnpicklingError, match='a key in it is no text'):
    safe_pickle.load(nested)
  with pytest.raises((pickle.UnpicklingError, KeyError)):
    safe_pickle.load(b'\x80\x02N2\x86.')  # DUP
  with pytest.raises((pickle.UnpicklingError, EOFError)):  # an exabyte
    safe_pickle.load(b'\x80\5\x96' + struct.pack('<Q', 1 << 60) + b'abc.')


def test_pickles_run_nothing_else():
  for value in (b'cnumpy._core.multiarray\nfromfile\n.', b'c_codecs\ndecode\n.'):
    with pytest.raises(pickle.UnpicklingError, match='which was not run'):
      safe_pickle.load(value)
  with pytest.raises(pickle.UnpicklingError, match="as 'rot13'"):
    safe_pickle.load(b'c_codecs\nencode\n(Vx\nVrot13\ntR.')
  with pytest.raises(ValueError, match="type 'O8'"):
    safe_pickle.to_numpy(safe_pickle.load(pickle.dumps(np.array([None]), 2)))


def test_digests_stay_those_of_older_versions_unless_more_is_read(tmp_path):
  root = folder(tmp_path / 'set', {'cat/0.png': b'12', 'dog/1.jpg': b'3', 'logo.gif': b''})
  old = fingerprint(str(root))
  assert old == OLD_DIGEST
  assert fingerprint(str(root), size=0) == old != fingerprint(str(root), size=8)
  folder(root, {'notes/a/b/c.txt': b''})
  assert fingerprint(str(root)) != old
  folder(root, {'.DS_Store': b'1', 'cat/._0.png': b'2'})
  listed = fingerprint(str(root))
  (root / '.DS_Store').write_bytes(b'other')
  assert fingerprint(str(root)) == listed
  seen = {old}
  for name in ('dog/2.gif', 'dog/deeper/3.png'):  # both were skipped
    listed = fingerprint(str(folder(root, {name: b''})))
    assert listed not in seen
    seen.add(listed)


def test_digests_follow_links_and_labels(tmp_path):
  root = tmp_path / 'set'
  root.mkdir()
  (root / 'cat').symlink_to(folder(tmp_path / 'cats', {'0.png': b'1'}))
  seen = [fingerprint(str(root))]
  folder(tmp_path / 'cats', {'1.png': b'1'})
  seen.append(fingerprint(str(root)))
  for label in (0, 1):  # of one size
    folder(root, listed([['cat/0.png', label]]))
    seen.append(fingerprint(str(root)))
  assert len(set(seen)) == 4
  test_data.write_svhn(tmp_path / 'svhn')
  for name in ('train_32x32.mat', 'test_32x32.mat'):
    before = fingerprint(str(tmp_path / 'svhn' / 'train_32x32.mat'))
    assert before == fingerprint(str(tmp_path / 'svhn'))
    file = tmp_path / 'svhn' / name
    file.write_bytes(file.read_bytes()[:-1] + b'?')
    assert fingerprint(str(tmp_path / 'svhn' / 'train_32x32.mat')) != before


def test_old_workdirs_resume(tmp_path):
  jobs = [runner.find('probe')]
  config = cifar.get_config('small')
  old = json.loads(config.to_json_best_effort())
  assert old['data'].pop('size') == 0
  (tmp_path / 'config.json').write_text(json.dumps(old))
  (tmp_path / 'probe').mkdir()
  workdir.claim(tmp_path, config, jobs)
  config.data.size = 32
  with pytest.raises(UserError, match=r'data.size: 0 there, 32 now'):
    workdir.claim(tmp_path, config, jobs)


def test_collected_frames_have_their_size(tmp_path):
  config = atari.get_config('Pong')
  config.data.size = 64
  with pytest.raises(UserError, match='data.size=64 with data.name=collect.*set data.size to 0'):
    runner.run(config, 'collect', tmp_path / 'run')
  assert not pathlib.Path(tmp_path / 'run').exists()
