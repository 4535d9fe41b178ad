"""Each kind of source is written here from known pixels and read back; interpolations against
loops."""

import numpy as np
import pytest
from PIL import Image

from palm_jax.base.errors import UserError
from palm_jax.data import decoding
from palm_jax.data.arrays import Split
from palm_jax.evaluate.image_sets import check_source, image_set, interpolate, load_images


def pictures(n, height=32, width=None, channels=3, seed=0):
  return np.random.default_rng(seed).integers(
    0, 256, (n, height, width or height, channels), np.uint8
  )


def write(folder, images, names=None):
  folder.mkdir(parents=True, exist_ok=True)
  for i, image in enumerate(images):
    Image.fromarray(image.squeeze()).save(folder / (names[i] if names else f'{i:03}.png'))
  return folder


def bilinear(square, size):
  """The triangle filter of a width that grows with the reduction, in float64: (S, S, C) -> (size,
  size, C)."""
  scale = len(square) / size
  centres, at = (np.arange(size) + 0.5) * scale, np.arange(len(square)) + 0.5
  weights = np.maximum(0, 1 - np.abs(at - centres[:, None]) / max(scale, 1))
  weights /= weights.sum(1, keepdims=True)
  return np.einsum('ai,bj,ijc->abc', weights, weights, square.astype(np.float64))


# ---- files


@pytest.mark.parametrize('labels', [None, 0, -1])
def test_npz_with_labels_or_without(tmp_path, labels):
  images = pictures(7)
  more = {} if labels is None else dict(labels=np.full(7, labels))
  np.savez(tmp_path / 'x.npz', images=images, **more)
  got, description = load_images(str(tmp_path / 'x.npz'), 32)
  np.testing.assert_array_equal(got, images)
  assert description.startswith('images of x.npz (sha256 ') and description.endswith('; 7 images')


def test_npz_with_a_test_part(tmp_path):
  np.savez(tmp_path / 'x.npz', train_images=pictures(5, seed=1), test_images=pictures(3))
  got, description = load_images(str(tmp_path / 'x.npz'), 32)
  np.testing.assert_array_equal(got, pictures(3))
  assert description.startswith('test_images of x.npz')


def test_two_npz_are_train_and_test(tmp_path):
  for name, n, seed in (('a', 6, 1), ('b', 4, 0)):
    np.savez(tmp_path / f'{name}.npz', images=pictures(n, seed=seed), labels=np.arange(n) % 2)
  got, description = load_images(f'{tmp_path}/a.npz,{tmp_path}/b.npz', 32)
  np.testing.assert_array_equal(got, pictures(4))
  assert 'test part of a.npz' in description and description.endswith('; 4 images')


def test_a_named_data_set_gives_its_test_part():
  got, description = load_images('digits', 8, channels=1)
  assert got.shape == (360, 8, 8, 1) and got.dtype == np.uint8
  assert description.startswith('test part of digits of scikit-learn') and description.endswith(
    '; 360 images'
  )


def test_pictures_of_the_right_size_stay_as_they_are(tmp_path):
  images = pictures(12)
  write(tmp_path / 'set' / 'b' / 'deep', images[4:])
  write(tmp_path / 'set' / 'a', images[:4])
  write(tmp_path / 'set' / '.hidden', images[:1])
  (tmp_path / 'set' / 'a' / 'notes.txt').write_text('no picture')
  got, description = load_images(str(tmp_path / 'set'), 32)
  np.testing.assert_array_equal(got, images)  # in the order of their paths
  assert description == 'folder set, as they are; 12 images'


@pytest.mark.parametrize('height, width', [(90, 61), (64, 64), (61, 90), (20, 25)])
def test_pictures_are_cropped_and_averaged(tmp_path, height, width):
  images = pictures(2, height, width)
  got, description = load_images(str(write(tmp_path / 'set', images)), 32)
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  wanted = [bilinear(image[top : top + side, left : left + side], 32) for image in images]
  np.testing.assert_allclose(got, wanted, atol=1)  # Pillow rounds after each of the two directions
  assert np.abs(got - np.asarray(wanted)).mean() < 0.5
  assert f'central squares of side {side}, then Pillow bilinear (antialiased) to 32' in description


def test_pictures_beside_resized_data_are_resized_as_they_were(tmp_path):
  images = pictures(3, 50, 90)
  data = np.stack([decoding.fit_array(image, 16) for image in images])
  folder = str(write(tmp_path / 'set', images))
  got, description = load_images(folder, 16, lanczos=True)
  np.testing.assert_array_equal(got, data)
  assert 'Lanczos' in description
  other, _ = image_set(folder, Split(data, np.zeros(3, np.int64)))
  assert np.abs(other - data.astype(int)).mean() > 1


def test_lsun_becomes_csis_lsun_fix(tmp_path):
  """torchvision's Resize(256) of a picture whose shorter side is 256, CenterCrop(256),
  Resize(32)."""
  images = pictures(2, 256, 341)
  got, _ = load_images(str(write(tmp_path / 'set', images)), 32)
  crops = [Image.fromarray(image).crop((42, 0, 298, 256)) for image in images]
  np.testing.assert_array_equal(
    got, [np.asarray(crop.resize((32, 32), Image.Resampling.BILINEAR)) for crop in crops]
  )


def test_pictures_of_many_kinds(tmp_path):
  """JPEG, WEBP, palette and grey pictures of several sizes become colour ones, or all grey."""
  folder = write(tmp_path / 'set', np.full((1, 50, 40, 3), 200, np.uint8), ['a.jpg'])
  write(folder, np.full((1, 33, 70, 3), 100, np.uint8), ['b.WEBP'])
  write(folder, np.full((1, 32, 32, 1), 50, np.uint8), ['c.png'])
  Image.fromarray(np.full((64, 64, 3), 51, np.uint8)).convert('P').save(folder / 'd.png')
  got, description = load_images(str(folder), 32)
  np.testing.assert_allclose(
    got, np.broadcast_to(np.array([200, 100, 50, 51])[:, None, None, None], got.shape), atol=3
  )
  assert 'squares of side 32 to 64' in description
  assert load_images(str(folder), 16, channels=1)[0].shape == (4, 16, 16, 1)


def test_a_folder_with_train_and_test_gives_its_test_part(tmp_path):
  write(tmp_path / 'set' / 'train' / 'cat', pictures(4, seed=1))
  write(tmp_path / 'set' / 'val' / 'cat', pictures(3))
  got, _ = load_images(str(tmp_path / 'set'), 32)
  np.testing.assert_array_equal(got, pictures(3))


def test_celeba(tmp_path):
  names = [f'{i:06}.jpg' for i in (1, 2, 182638, 202599)]
  images = np.zeros((4, 218, 178, 3), np.uint8)
  levels = np.array([10, 60, 110, 160], np.uint8)
  images[:, 20:198] = levels[:, None, None, None]  # the central 178 rows
  folder = write(tmp_path / 'img_align_celeba', images, names)
  got, description = load_images(f'celeba:{folder}', 32)
  assert (
    len(got) == 4
    and 'all pictures (list_eval_partition.txt not found)' in description
    and 'side 178' in description
  )
  np.testing.assert_allclose(got[:, 2:-2].mean((1, 2, 3)), [10, 60, 110, 160], atol=2)
  np.testing.assert_allclose(got[3, 0].mean(), 160, atol=12)  # nothing of the black beyond
  for place in (folder, tmp_path):
    (place / 'list_eval_partition.txt').write_text(
      '000001.jpg 0\n000002.jpg 1\n182638.jpg 2\n202599.jpg 2\n'
    )
    chosen, description = load_images(f'celeba:{folder}', 32)
    np.testing.assert_array_equal(chosen, got[2:])
    assert 'test part of list_eval_partition.txt' in description and description.endswith(
      '; 2 images'
    )
    (place / 'list_eval_partition.txt').write_text('999999.jpg 2\n')
    with pytest.raises(UserError, match='none of the test pictures'):
      load_images(f'celeba:{folder}', 32)
    (place / 'list_eval_partition.txt').unlink()
  with pytest.raises(UserError, match=r'000.png is 100x90, expected 178x178 or more'):
    load_images(f'celeba:{write(tmp_path / "small", pictures(1, 90, 100))}', 32)


# ---- interpolations


def as_csi(images, labels):
  """alinlab/CSI evals/ood_pre.py's loop over batches of 100 in order, with a rounding at the
  end."""
  batches, last = [], None
  for start in range(0, len(images), 100):
    x = images[start : start + 100] / 255
    batches.append(x if last is None else (x + last[: len(x)]) / 2)
    last = x
  return np.concatenate(batches) * 255


def test_csi_equals_its_loop():
  split = Split(pictures(350, 8), np.arange(350) % 7)
  got, description = interpolate(split, 'csi')
  np.testing.assert_array_equal(got[:100], split.images[:100])
  np.testing.assert_allclose(got, as_csi(*split), atol=0.5 + 1e-6)
  assert 'the first 100 as they are' in description and description.endswith('; 350 images')
  assert '0.0% of the pairs within one class' in description  # 100 = 2 modulo 7
  assert '100.0% of the pairs' in interpolate(split._replace(labels=split.labels * 0), 'csi')[1]


def test_csi_costs_a_hundredth_of_ten_thousand():
  """What is not interpolated is told from its own double by chance: .99 A + .005 with 100 of
  10,000."""
  images = pictures(10_000, 2, channels=1)
  score = lambda x: -np.abs(x.astype(float) - 127.5).mean((1, 2, 3))  # averages are greyer
  above = lambda good, bad: (
    (np.searchsorted(np.sort(good), bad).sum() + np.searchsorted(np.sort(good), bad, 'right').sum())
    / 2
  )
  auroc = lambda good, bad: above(good, bad) / (len(good) * len(bad))
  whole, csi = (
    interpolate(Split(images, np.zeros(10_000, int)), mode)[0] for mode in ('pairs', 'csi')
  )
  at = auroc(score(images), score(whole))
  assert at > 0.7
  assert auroc(score(images), score(csi)) == pytest.approx(0.99 * at + 0.005, abs=0.01)


@pytest.mark.parametrize('count', [2, 3, 100, 1500])
def test_pairs_are_one_cycle_through_all_images(count):
  # Levels far apart: an average of two even numbers tells which two.
  levels = 2 * np.arange(count)
  images = np.stack([levels % 64 * 4, levels // 64 * 4], 1).astype(np.uint8).reshape(count, 1, 2, 1)
  sums = (
    interpolate(Split(images, np.zeros(count, int)), 'pairs')[0].astype(int).reshape(count, 2) * 2
  )
  partners = []
  for total, own in zip(sums, images.reshape(count, 2).astype(int), strict=True):
    other = total - own
    [match] = np.flatnonzero((images.reshape(count, 2) == other).all(1))
    partners.append(match)
  seen, at = set(), 0
  while at not in seen:
    seen.add(at)
    at = partners[at]
  assert len(seen) == count


def test_pairs_of_sorted_data_are_of_all_classes():
  split = Split(pictures(2000, 2, channels=1), np.repeat(np.arange(10), 200))
  share = float(interpolate(split, 'pairs')[1].split('% of the pairs')[0].split()[-1])
  assert abs(share - 10) < 3
  assert '50.0% of the pairs within one class' not in interpolate(split, 'pairs')[1]


def test_halves_go_to_the_even_level():
  images = np.array([0, 1, 2, 3, 254, 255], np.uint8).reshape(1, 6, 1, 1)
  both = Split(np.concatenate([images, images + (images < 255)]), np.zeros(2, int))
  got = interpolate(both, 'pairs')[0].reshape(2, 6)
  np.testing.assert_array_equal(got, [[0, 2, 2, 4, 254, 255]] * 2)  # .5, 1.5, 2.5, 3.5, 254.5, 255


@pytest.mark.parametrize('mode, count', [('pairs', 1), ('csi', 100)])
def test_too_few_images_to_interpolate(mode, count):
  with pytest.raises(UserError, match=f'needs {count + 1} .* there are {count}'):
    interpolate(Split(pictures(count, 2), np.zeros(count, int)), mode)


# ---- sets, and what is refused


def test_a_set_is_as_the_images_it_is_compared_with(tmp_path):
  split = Split(pictures(120, 8, channels=1), np.arange(120) % 3)
  for mode in ('pairs', 'csi'):
    np.testing.assert_array_equal(
      image_set(f'interp:{mode}', split)[0], interpolate(split, mode)[0]
    )
  assert image_set('digits', split)[0].shape == (360, 8, 8, 1)
  wide = Split(pictures(5, 8, 10), np.zeros(5, int))
  assert image_set('interp:pairs', wide)[0].shape == (5, 8, 10, 3)
  with pytest.raises(UserError, match='8x10, expected square ones'):
    image_set('digits', wide)


def test_bare_names_lie_in_the_data_folder(tmp_path):
  with pytest.raises(UserError, match=f'svhn is not in {tmp_path}'):
    load_images('svhn', 32, tmp_path)


@pytest.mark.parametrize(
  'source, message',
  [
    ('interp:mixup', "'interp:mixup' is unknown: expected interp:pairs or interp:csi"),
    ('/nowhere/x.npz', '/nowhere/x.npz: no such file or folder'),
    ('nowhere/pictures', 'nowhere/pictures: no such file or folder'),
    ('celeba:nowhere', 'nowhere: no such file or folder'),
  ],
)
def test_absent_sources_are_seen_early(source, message):
  for read in (check_source, lambda source: load_images(source, 32)):
    with pytest.raises(UserError, match=message) as error:
      read(source)
    assert '\n' not in str(error.value)


def test_sources_that_may_be_there_pass():
  for source in (
    'interp:csi',
    'svhn',
    'tfds:svhn_cropped',
    'tfds:imagenet_resized/32x32',
    'a.npz,b.npz',
    '/',
    __file__,
  ):
    check_source(source)
  with pytest.raises(UserError, match="unknown data 'shvn': did you mean svhn"):
    load_images('shvn', 32)


@pytest.mark.parametrize(
  'make, message',
  [
    (
      lambda path: np.savez(path / 'x.npz', pictures=pictures(2)),
      r'holds pictures; expected images',
    ),
    (lambda path: np.savez(path / 'x.npz'), r'holds nothing; expected images'),
    (
      lambda path: np.savez(path / 'x.npz', images=pictures(2) / 255),
      r'images are float64, expected uint8',
    ),
    (
      lambda path: np.savez(path / 'x.npz', images=pictures(2)[..., 0]),
      r'grey images need a channel axis',
    ),
    (lambda path: np.savez(path / 'x.npz', images=pictures(0)), r'nothing in it'),
    (lambda path: np.savez(path / 'x.npz', images=np.uint8(3)), r'images have shape \(\)'),
    (lambda path: np.savez(path / 'x.npz', images=np.array([None])), r'not a readable .npz'),
    (lambda path: (path / 'x.npz').write_bytes(b'PK damaged'), r'not a readable .npz'),
    (
      lambda path: np.savez(path / 'x.npz', images=pictures(2, 28)),
      r'\(28, 28, 3\), expected \(32, 32, 3\).*: resize them',
    ),
    (
      lambda path: np.savez(path / 'x.npz', images=pictures(2, channels=1)),
      r'\(32, 32, 1\), .* make colour of grey in them',
    ),
  ],
)
def test_invalid_npz(tmp_path, make, message):
  make(tmp_path)
  with pytest.raises(UserError, match=message) as error:
    load_images(str(tmp_path / 'x.npz'), 32)
  assert '\n' not in str(error.value) and 'x.npz' in str(error.value)


def test_invalid_folders(tmp_path):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='empty holds no .png, .jpg.* files, nor labelled data'):
    load_images(str(tmp_path / 'empty'), 32)
  with pytest.raises(UserError, match='name the folder of the aligned CelebA'):
    load_images(f'celeba:{tmp_path / "empty"}', 32)
  write(tmp_path / 'broken', pictures(1))
  (tmp_path / 'broken' / 'z.png').write_bytes(b'no picture')
  with pytest.raises(UserError, match='z.png: not a readable image'):
    load_images(str(tmp_path / 'broken'), 32)
  write(tmp_path / 'deep', pictures(1))
  Image.fromarray(np.full((32, 32), 999, np.uint16)).save(tmp_path / 'deep' / 'z.png')
  with pytest.raises(UserError, match='z.png has pixels of type I;16, expected 8 bits a channel'):
    load_images(str(tmp_path / 'deep'), 32)
  with pytest.raises(UserError, match=r'make grey of colour in them'):
    np.savez(tmp_path / 'x.npz', images=pictures(2))
    load_images(str(tmp_path / 'x.npz'), 32, channels=1)
