"""Pictures in files: which they are, and the pixels of one, or of many as one array.

One rule for each kind: 1, L and LA are grey; P, RGB, RGBA, CMYK and other colours become RGB, and
all are colour where one is; see-through pixels, more than 8 bits a channel and films are refused;
EXIF turns are made.
"""

import collections
import functools
import io
import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from palm_jax.base import devices
from palm_jax.base.errors import UserError, one_line
from palm_jax.base.signals import raise_if_interrupted

FIRST_SUFFIXES = '.png', '.jpg', '.jpeg', '.webp'  # all that older versions read
IMAGE_SUFFIXES = (
  *FIRST_SUFFIXES,
  *('.bmp', '.dib', '.gif', '.tif', '.tiff', '.jpe', '.jfif', '.mpo', '.jp2', '.j2k', '.avif'),
  *('.ppm', '.pgm', '.pbm', '.pnm', '.tga', '.pcx', '.sgi', '.qoi', '.dds', '.ico', '.xbm'),
)
SHOWN_SUFFIXES = '.png, .jpg, .webp, .bmp, .gif, .tif or other picture'  # for messages
# Pillow's other readers run programs (EPS), read headers only, or know layers that are no films.
_FORMATS = (
  *('PNG', 'JPEG', 'MPO', 'WEBP', 'BMP', 'DIB', 'GIF', 'TIFF', 'JPEG2000', 'AVIF', 'PPM', 'TGA'),
  *('PCX', 'SGI', 'QOI', 'DDS', 'ICO', 'XBM'),
)
TURNS = {'exif', 'Raw profile type exif', 'XML:com.adobe.xmp'}  # where a PNG has them
HEAD = 1 << 16  # bytes of a file in which it says how many bits it has
_GREY = '1', 'L', 'LA'


class Source(NamedTuple):
  """A picture that may be read, more than once."""

  where: str  # for messages
  open: Callable[[], pathlib.Path | io.BytesIO]


class Header(NamedTuple):
  """What a picture says of itself."""

  size: tuple[int, int]  # width, height, as it is to be seen
  mode: str  # Pillow's


def is_picture(path: pathlib.PurePath) -> bool:
  """Whether the name is that of a picture file."""
  return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.')


def read_pixels(file: str | os.PathLike | Source, mode: str) -> np.ndarray:
  """(H, W) or (H, W, 3) uint8 of a picture.

  Args:
    file: path of it, or where it is.
    mode: Pillow's: 'L' grey, 'RGB' colour.

  Raises:
    UserError: not readable, transparent, or as `read_header`.
  """
  read_header(file)
  return np.asarray(_picture(_source(file), mode))


def read_header(file: str | os.PathLike | Source) -> Header:
  """Size and mode of a picture, without its pixels.

  Raises:
    UserError: not readable, a film, or of more than 8 bits a channel.
  """
  source = _source(file)
  try:
    with Image.open(source.open(), formats=_formats()) as image:
      # An MPO is a photograph first; what follows are previews and maps of it.
      frames = 1 if image.format == 'MPO' else getattr(image, 'n_frames', 1)
      deep = image.mode.startswith(('I', 'F')) or _is_deep(image)
      width, height = image.size
      if _orientation(image) >= 5:  # those turn by a quarter
        width, height = height, width
      header = Header((width, height), image.mode)
  except UserError:
    raise
  except Exception as error:
    raise _unreadable(source, error) from error
  if frames > 1:
    raise UserError(
      f'{source.where} has {frames} frames, expected one; save those wanted one by one'
    )
  if header.mode.startswith(('I', 'F')):
    raise UserError(
      f'{source.where} has pixels of type {header.mode}, expected 8 bits a channel; convert it'
    )
  if deep:  # Pillow would cut them
    raise UserError(f'{source.where} has more than 8 bits a channel, expected 8; convert it')
  return header


def read_all(parts: Sequence[Sequence[Source]], size: int) -> tuple[list[np.ndarray], str]:
  """The pictures of each part.

  Args:
    parts: of the set, such as train and test; not all empty.
    size: side of the squares that `fit` makes of them; 0 leaves them as they are.

  Returns:
    ([(N, H, W, 1 or 3) uint8], how they were resized, for protocols: '' where they were not).

  Raises:
    UserError: as `read_header` and `read_pixels`; or several sizes, where `size` is 0.
  """
  sources = [source for part in parts for source in part]
  headers = [read_header(source) for source in sources]
  width, height = collections.Counter(header.size for header in headers).most_common(1)[0][0]
  if size:
    how = fitted({header.size for header in headers}, size)
    width = height = size
  else:
    how = ''
    for source, header in zip(sources, headers, strict=True):
      if header.size != (width, height):
        raise UserError(
          f'{source.where} is {"x".join(map(str, header.size))}, most images are '
          f'{width}x{height}; expected one size: resize or remove it, or crop and resize all by '
          f'--config.data.size={min(width, height)}'
        )
  mode = 'L' if all(header.mode in _GREY for header in headers) else 'RGB'
  check_room(len(sources), (height, width, len(mode)))
  arrays = []
  for part in parts:
    images = np.empty((len(part), height, width, len(mode)), np.uint8)
    for image, source in zip(images, part, strict=True):
      picture = _picture(source, mode)
      if size:
        picture = fit(picture, size)
      if picture.size != (width, height):  # EXIF data behind the pixels of a PNG
        raise UserError(f'{source.where} is turned by data at its end; save it again')
      image[:] = np.asarray(picture).reshape(image.shape)
    arrays.append(images)
  return arrays, how


def fit(picture: Image.Image, size: int) -> Image.Image:
  """The central square of a picture, brought to (size, size) by Pillow's antialiased Lanczos."""
  side = min(picture.size)
  # Whole pixels, so that nothing is blurred where no size changes.
  left, top = ((length - side) // 2 for length in picture.size)
  square = picture.crop((left, top, left + side, top + side))
  return square.resize((size, size), Image.Resampling.LANCZOS)


def fit_array(image: np.ndarray, size: int) -> np.ndarray:
  """`fit` of an (H, W, C) uint8 array, each channel alone -> (size, size, C) uint8."""
  planes = [np.asarray(fit(Image.fromarray(plane), size)) for plane in np.moveaxis(image, -1, 0)]
  return np.stack(planes, axis=-1)


def check_room(count: int, shape: tuple[int, int, int]) -> None:
  """Raises UserError where `count` pictures (H, W, C) do not fit the memory of this machine."""
  memory = devices.machine_memory()
  need = count * math.prod(shape)
  if need > memory:
    raise UserError(
      f'{count} pictures of {shape} (height, width, channels) take {need / 2**30:.1f} GiB of '
      f'{memory / 2**30:.1f} GiB: lower --config.data.size, or give fewer'
    )


def fitted(sizes: set[tuple[int, int]], size: int) -> str:
  """What `fit` does to pictures of these (width, height), for protocols; '' where nothing."""
  if sizes == {(size, size)}:
    return ''
  sides = sorted({min(pair) for pair in sizes})
  span = f'{sides[0]}' if len(sides) == 1 else f'{sides[0]} to {sides[-1]}'
  return f', central squares of side {span}, then Pillow Lanczos (antialiased) to {size}'


@functools.cache
def _formats():
  """Those that this Pillow was built with."""
  Image.init()
  return tuple(name for name in _FORMATS if name in Image.OPEN)


def _source(file):
  if isinstance(file, Source):
    return file
  return Source(str(file), lambda: pathlib.Path(file))


def _picture(source, mode):
  try:
    with Image.open(source.open(), formats=_formats()) as image:
      see_through = False
      if image.has_transparency_data:
        see_through = np.asarray(image.convert('RGBA'))[..., 3].min() < 255
      image.load()
      turned = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
      picture = turned.convert(mode)
  except UserError:
    raise
  except Exception as error:
    raise _unreadable(source, error) from error
  if see_through:
    raise UserError(
      f'{source.where} has transparent pixels, whose colour means nothing; paint it onto a '
      'background first'
    )
  return picture


def _unreadable(source, error):
  """What to raise for whatever Pillow raised: that depends on the damaged bytes."""
  raise_if_interrupted(error)
  return UserError(
    f'{source.where}: not a readable image ({one_line(error)}); replace or remove it'
  )


def _orientation(image) -> int:
  """EXIF's, 1 to 8, where the picture is still to be turned."""
  if image.format == 'TIFF':  # Pillow has done it
    return 1
  # Of a PNG that may stand behind the pixels, which only `load` reads.
  if image.format == 'PNG' and not TURNS & image.info.keys() and image.tile:
    return 1
  try:
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception as error:  # Damaged EXIF data are no damaged picture.
    raise_if_interrupted(error)
    return 1
  return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _is_deep(image) -> bool:
  """Whether the file has more bits a channel than the picture that Pillow makes of it."""
  for tile in image.tile:
    arguments: Any = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
    # Names such as RGB;16B; BGR;16 has 16 bits for all three.
    names = [x for x in arguments if isinstance(x, str) and not x.startswith('BGR;')]
    if tile[0] == 'SGI16' or any(re.search(r';(16|32)', name) for name in names):
      return True
    if image.format == 'PPM' and any(isinstance(x, int) and x > 255 for x in arguments):
      return True
  if image.format == 'DDS':
    return 'BC6H' in str(getattr(image, 'pixel_format', ''))
  return image.format in _BITS and max(_BITS[image.format](_head(image)), default=0) > 8


def _head(image):
  at = image.fp.tell()
  image.fp.seek(0)
  head = image.fp.read(HEAD)
  image.fp.seek(at)
  return head


def _bits_of_jpeg_2000(head):
  """Of each channel: Ssiz of the marker SIZ, which follows SOC (ISO/IEC 15444-1, A.5.1)."""
  _, found, siz = head.partition(b'\xff\x4f\xff\x51')
  count = int.from_bytes(siz[36:38], 'big') if found else 0
  return [(bits & 127) + 1 for bits in siz[38 : 38 + 3 * count : 3]]


def _bits_of_avif(head):
  """Of each channel: the box `pixi` (ISO/IEC 23008-12, 6.5.6)."""
  _, found, pixi = head.partition(b'pixi')
  return list(pixi[5 : 5 + pixi[4]]) if found and len(pixi) > 4 else []


# Of readers whose modes do not tell.
_BITS = dict(JPEG2000=_bits_of_jpeg_2000, AVIF=_bits_of_avif)
