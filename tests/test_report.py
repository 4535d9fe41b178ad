"""The report page: nothing from elsewhere, every number in its file, sections of what is there,
hostile text, bounded size."""

import base64
import html.parser
import io
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from palm_jax import report, runner, study
from palm_jax.base import devices, pictures
from palm_jax.base.checkpoints import Checkpoints
from palm_jax.base.errors import UserError
from palm_jax.base.files import write_json
from palm_jax.base.results import write_result
from palm_jax.data.arrays import Data, Split
from palm_jax.encoder import make_encoder
from palm_jax.evaluate import features
from palm_jax.report import charts, feature_map, read
from palm_jax.report import pictures as report_pictures
from palm_jax.report import sections as report_sections
from palm_jax.study import numbers
from tests.jobs import finish
from tests.worlds import nature_config

HOSTILE = '<script>alert("x")</script> & \'<b>'
VOID = {'meta', 'img', 'br', 'link', 'input'}


def config(**overrides):
  c = nature_config()
  c.report, c.features = report.default_config(), features.default_config()
  c.report.update(dict(num_points=40, umap='never'))
  for name, value in overrides.items():
    c[name] = value
  return c


def probe_results(clean=0.5, names=('PALM encoder', 'untrained encoder', 'pixels'), data='made up'):
  rows = [
    dict(
      features=name,
      F=7,
      method=method,
      labels='fine',
      num_classes=3,
      fraction=fraction,
      draw=draw,
      n_test=60,
      accuracy={
        'clean': clean + i / 70 + draw / 90 + (method == 'lbfgs') / 50,
        'salt_pepper:0.1/2': clean / 3,
      },
      half_width=0.01234 + i / 1000,
    )
    for method in ('sgd', 'lbfgs')
    for i, name in enumerate(names)
    for fraction, draw in ((1.0, 0), (0.1, 0), (0.1, 1))
  ]
  return dict(
    job='probe',
    rows=rows,
    protocol=dict(data=data, split='test', knn_k=200, l2_grid=[0.1, 1.0]),
    devices='1 x cpu',
  )


def ood_results():
  part = lambda mean, sd: dict(mean=mean, sd=sd, values=[mean])
  encoders = 'PALM encoder', 'untrained encoder'
  rows = [
    dict(
      encoder=encoder,
      score=score,
      set=name,
      n_id=60,
      n=60,
      trials=5,
      auroc=part(0.1 * i + 0.61, None if score == 'knn' else 0.0123),
      aupr_in=part(0.7, 0.02),
      aupr_out=part(0.41, 0.03),
      fpr_at_95_tpr=part(0.93, None),
    )
    for i, encoder in enumerate(encoders)
    for score in ('msp', 'knn')
    for name in ('svhn', 'interp:pairs')
  ]
  return dict(
    job='ood',
    rows=rows,
    accuracy={encoder: part(0.8 - i / 3, 0.01) for i, encoder in enumerate(encoders)},
    paper=dict(source='Table 1', rows={'PALM': {'svhn': [97.9, 0.2]}, 'CSI': {'svhn': [96.5]}}),
    protocol=dict(data='made up'),
  )


def diversity_results():
  names = (
    'unique_nn',
    'symmetric',
    'hit_once',
    'precision',
    'recall',
    'density',
    'coverage',
    'FID',
  )
  rows = [
    {
      'set': name,
      'features': 'encoder',
      'n': 60,
      **{
        f'encoder-{key}{end}': value / (i + 1) / (j + 1)
        for i, key in enumerate(names)
        for end, value in (('', 0.5123), ('_sd', 0.0234))
      },
    }
    for j, name in enumerate(('explored', 'independent'))
  ]
  return dict(
    job='diversity',
    rows=rows,
    ceiling=0.6321,
    paper=dict(explored=58.87, independent=50.16),
    protocol=dict(features=['encoder'], n=60, data='made up'),
  )


def quality_results():
  rows = [
    {
      'set': name,
      'n_real': 6000,
      'n': 500,
      'proxy-FID': 0.20671,
      'proxy-KID': -1.234e-5,
      'proxy-KID_sd': 0.00012,
    }
    for name in ('generator', 'test images')
  ]
  return dict(
    job='quality', rows=rows, recognised={'generator': 0.6483}, protocol=dict(features='proxy')
  )


def study_results():
  c = study.default_config()
  c.update(
    dict(
      measures=(('linear accuracy', ''), ('effective rank', '')), orderings=('PALM > beta zero',)
    )
  )
  values = {
    ('linear accuracy', 'PALM'): [0.4123, 0.4157],
    ('linear accuracy', 'beta zero'): [0.3512, 0.3499],
    ('effective rank', 'PALM'): [71.25, 66.5],
  }
  lines = [
    dict(
      arm=arm,
      x=2500 if measure == 'linear accuracy' else '',
      seed=seed,
      measure=measure,
      value=value,
    )
    for (measure, arm), of_seeds in values.items()
    for seed, value in enumerate(of_seeds)
  ]
  return dict(
    job='study',
    study='s',
    axis='samples',
    grid=False,
    **numbers.summarise(c, lines),
    protocol=dict(reference='PALM'),
  )


RESULTS = dict(
  probe=probe_results,
  study=study_results,
  ood=ood_results,
  diversity=diversity_results,
  quality=quality_results,
  pretrain=lambda: dict(metrics=dict(loss=-0.912345), env_steps=12800, devices='1 x cpu'),
  novelty=lambda: dict(depth=[dict(a=1.25), dict(a=None)], words='blue', protocol=dict(k=3)),
)


def write(folder, results=(), c=None, lines=0):
  """A workdir without a checkpoint."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text((c or config()).to_json_best_effort())
  for name in results:
    (folder / 'results').mkdir(exist_ok=True)
    content = results[name] if isinstance(results, dict) else RESULTS[name]()
    (folder / 'results' / f'{name}.json').write_text(json.dumps(content))
  if lines:
    (folder / 'pretrain').mkdir(exist_ok=True)
    rows = [
      dict(
        step=i,
        env_steps=100.0 * i,
        loss=-1 + 1 / i,
        critic_loss=1000.0 / i,
        reward=None if i == 2 else 1.5,
        strange=i,
      )
      for i in range(1, lines + 1)
    ]
    (folder / 'pretrain' / 'metrics.jsonl').write_text(
      ''.join(json.dumps(row) + '\n' for row in rows) + '{"step": 7, "cut'
    )
  return folder


def make(folder, c=None, data=None):
  """(what the job returns, the page)."""
  returned = finish(report.JOB, c or config(), folder, data, devices.make_mesh(1))
  return returned, (folder / 'report.html').read_text()


class Page(html.parser.HTMLParser):
  """A page taken apart: tags with attributes, tables as rows of (text, attributes), and whether
  each tag is closed."""

  def __init__(self, text):
    super().__init__()
    self.tags = []
    self.tables = []
    self.marked = []
    self._open = []
    self.feed(text)
    self.close()
    assert not self._open, f'not closed: {self._open}'

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.append((tag, attrs))
    if tag == 'table':
      self.tables.append([])
    elif tag == 'tr':
      self.tables[-1].append([])
    cell = ['', attrs]
    if tag in ('th', 'td'):
      self.tables[-1][-1].append(cell)
    if 'data-at' in attrs:
      self.marked.append(cell)
    if tag not in VOID:
      self._open.append((tag, cell))

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self._open.pop()[0] == tag

  def handle_data(self, text):
    for _, cell in self._open:
      cell[0] += text

  def table(self, title):
    """Texts of the table of that title."""
    titles = [attrs['aria-label'] for tag, attrs in self.tags if tag == 'table']
    return [[text for text, _ in row] for row in self.tables[titles.index(title)]]


def value_at(folder, file, pointer):
  value = json.loads((folder / file).read_text())
  for key in pointer.split('/')[1:]:
    key = key.replace('~1', '/').replace('~0', '~')
    value = value[int(key)] if isinstance(value, list) else value[key]
  return value


@pytest.fixture(scope='module')
def full(tmp_path_factory):
  """A workdir with every kind of result, metrics and pictures; its page."""
  folder = write(tmp_path_factory.mktemp('full') / 'run', list(RESULTS), lines=60)
  rng = np.random.default_rng(0)
  film = rng.integers(0, 256, (6, 16, 40, 3), np.uint8)
  for step in (100, 3000):
    pictures.save_webp(folder / 'pretrain' / 'rollouts' / f'{step:010d}.webp', film)
    pictures.save_png(folder / 'pretrain' / 'rollouts' / f'{step:010d}.png', film[0])
  pictures.save_png(folder / 'generator' / 'samples' / '000002.png', film[1])
  returned, text = make(folder)
  return folder, returned, text, Page(text)


def test_asks_nobody_and_is_well_formed(full):
  _, returned, text, page = full
  assert returned['bytes'] == len(text.encode()) and not returned['notes']
  assert not {'script', 'iframe', 'link', 'object', 'embed', 'base', 'form'} & {
    tag for tag, _ in page.tags
  }
  for tag, attrs in page.tags:
    for name, value in attrs.items():
      assert not name.startswith('on')
      if name in ('src', 'srcset', 'href', 'data', 'action', 'poster', 'style', 'xlink:href'):
        assert (
          value.startswith(('data:image/', '#', 'https://arxiv.org/abs/')) or '//' not in value
        ), (tag, name, value[:80])
        assert not value.startswith('https') or (tag, name) == ('a', 'href')
  assert 'url(' not in text and '@import' not in text
  [policy] = [
    attrs['content']
    for tag, attrs in page.tags
    if attrs.get('http-equiv') == 'Content-Security-Policy'
  ]
  assert policy.startswith("default-src 'none'")
  assert all(attrs['alt'] for tag, attrs in page.tags if tag == 'img')
  assert all(attrs.get('scope') in ('row', 'col') for tag, attrs in page.tags if tag == 'th')
  ids = [attrs['id'] for _, attrs in page.tags if 'id' in attrs]
  assert ids == returned['sections'] and len(set(ids)) == len(ids)
  assert [
    attrs['href'][1:] for tag, attrs in page.tags if tag == 'a' and attrs['href'].startswith('#')
  ] == ids


def test_notes_say_which_settings_were_changed(tmp_path):
  """Not those of jobs that judge, which may change, nor the arms that only a study's result has."""
  assert set(read.JUDGES) == {name for name in runner.names() if runner.find(name).judges}
  now = dict(name='x', seed=0, sac=dict(gamma=0.9), concepts=dict(concepts=8))
  keep = lambda job, config: write_result(
    tmp_path / 'results' / f'{job}.json', dict(job=job), {}, config
  )
  write_json(tmp_path / 'config.json', now)
  had = now | dict(study=dict(seeds=[0]), concepts=dict(concepts=4))
  keep('study', had)
  assert not read.read_run('x', tmp_path).notes
  keep('probe', now | dict(seed=1))
  keep('concepts', had)
  assert [note.partition(';')[0] for note in read.read_run('x', tmp_path).notes] == [
    'x: config.json is not what concepts had: concepts.concepts',
    'x: config.json is not what probe had: seed',
  ]


def test_every_number_is_in_its_file(full):
  folder, _, _, page = full
  files = set()
  for text, attrs in page.marked:
    files.add(attrs['data-file'])
    value = value_at(folder, attrs['data-file'], attrs['data-at'])
    assert attrs['title'].startswith(f'{attrs["data-file"]} {attrs["data-at"]} = ')
    shown, *spread = text.split(' ± ')
    if isinstance(value, float) and attrs['data-file'] != 'config.json':
      assert any(
        math.isclose(float(shown.replace(',', '')), scale * value, rel_tol=6e-4, abs_tol=tolerance)
        for scale, tolerance in ((1, 0), (100, 0.00501))
      ), (attrs, text)
      assert float(attrs['title'].rpartition(' = ')[2]) == value
    elif isinstance(value, int) and not isinstance(value, bool):
      assert int(shown.replace(',', '')) == value
    elif isinstance(value, list):
      assert shown.replace(',', '').split() == [str(x).replace(',', '') for x in value]
    else:
      assert shown in (str(value), '-')
    assert bool(spread) == ('data-spread' in attrs)
    if spread:
      sd = value_at(folder, attrs['data-file'], attrs['data-spread'])
      assert any(
        math.isclose(float(spread[0]), scale * sd, rel_tol=0.06, abs_tol=tolerance)
        for scale, tolerance in ((1, 0), (100, 0.00501))
      )
  assert files == {'config.json', *(f'results/{name}.json' for name in RESULTS)}
  # And the other way: no cell with a digit in the tables of results that does not say where its
  # number is.
  results = [
    page.table(title)
    for title in ('Accuracy, %, with all labels', 'AUROC, %', 'Coverage of training images, %')
  ]
  assert sum(map(len, results)) > 12
  for table, rows in zip(
    page.tables, [attrs for tag, attrs in page.tags if tag == 'table'], strict=True
  ):
    if rows['aria-label'] not in (
      "Unlike the package's defaults, which are of the paper's size",
      'Other settings',
    ):
      for row in table[1:]:
        for text, attrs in row[1:]:
          words = {'Table 1', '0.1', '0', '1'}  # of keys: a source, shares of labels and draws
          assert 'data-at' in attrs or not re.search(r'\d', text) or text in words, text


def test_numbers_stand_where_they_belong(full):
  *_, page = full
  table = page.table('Accuracy, %, with all labels')
  assert table[0] == ['features', 'method', 'clean', 'salt_pepper:0.1/2']
  assert table[1] == ['PALM encoder', 'linear, SGD', '50.00 ± 1.23', '16.67'] and len(table) == 7
  few = page.table('Accuracy, %, with a share of the labels')
  assert (
    few[0][2:4] == ['share of labels', 'draw']
    and few[2][2:5] == ['0.1', '1', '51.11 ± 1.23']
    and len(few) == 13
  )
  table = page.table('AUROC, %')
  assert table[0] == ['encoder', 'score', 'svhn', 'interp:pairs', 'ID accuracy']
  assert table[1] == ['PALM encoder', 'msp', '61.00 ± 1.23', '61.00 ± 1.23', '80.00 ± 1.00']
  assert table[-2:] == [
    ['PALM, paper', 'Table 1', '97.9 ± 0.2', '-', '-'],
    ['CSI, paper', 'Table 1', '96.5', '-', '-'],
  ]
  table = page.table('Coverage of training images, %')
  assert (
    table[1][:5] == ['explored', 'encoder', '60', '51.23 ± 2.34', '58.87']
    and table[-1][4 - 1] == '63.21'
  )
  table = page.table('Generated pictures against training images')
  assert table[1] == ['generator', '6,000', '500', '0.2067', '-1.234e-05 ± 0.00012']
  table = page.table('linear accuracy')
  assert table == [
    ['arm', 'x', 'seeds', 'mean', 'bootstrap from', 'to', 'minus PALM', 'bootstrap from', 'to'],
    ['PALM', '2,500', '2', '0.414', '0.4123', '0.4157', '-', '-', '-'],
    ['beta zero', '2,500', '2', '0.3506', '0.3499', '0.3512', '-0.06345', '-0.0658', '-0.0611'],
  ]
  assert page.table('Claims')[1] == [
    'PALM > beta zero',
    'holds',
    '2,500',
    '0.06345',
    '0.03359',
    '0.09331',
    '2',
  ]
  assert page.table('novelty') == [
    ['', 'value'],
    ['depth.0.a', '1.25'],
    ['depth.1.a', '-'],
    ['words', 'blue'],
  ]


def test_the_headline_compares_like_with_like(full):
  linear, ood, coverage = report_sections.cards(read.read_run('run', full[0]))
  assert linear[1].text == '52.00' and linear[2] == 'PALM encoder, linear, L-BFGS'
  assert [(name, number.text) for name, number in linear[3]] == [
    ('untrained encoder', '53.43'),
    ('pixels', '54.86'),
    ('PALM encoder, linear, SGD', '50.00'),
  ]
  assert ood[1].text == '61.00 ± 1.23' and [(name, number.text) for name, number in ood[3]] == [
    ('interp:pairs', '61.00 ± 1.23'),
    ('svhn, untrained encoder', '71.00 ± 1.23'),
    ('svhn, PALM in the paper', '97.9 ± 0.2'),
  ]
  assert [coverage[1].text, *(number.text for _, number in coverage[3])] == [
    '51.23 ± 2.34',
    '25.61 ± 1.17',
    '63.21',
  ]


def test_what_is_not_comparable_says_so(tmp_path, full):
  assert 'are not comparable' in full[2]
  result = diversity_results()
  result['protocol'].update(features=['inception'], n=10_000)
  for row in result['rows']:
    row['features'] = 'inception'
  _, text = make(write(tmp_path / 'a', dict(diversity=result)))
  assert 'not comparable' not in text
  assert 'Published' not in text
  _, text = make(
    write(tmp_path / 'b', dict(probe=probe_results(data='cifar10_train.npz; 50000 train')))
  )
  table = Page(text).table('Published, for comparison: accuracy, %, ResNet-18')
  assert ['SimSiam', '90.51', '66.04'] in [
    row[:3] for row in table
  ] and 'not comparable with numbers on JPEG copies' in text
  assert 'Published' not in full[2]  # no CIFAR


@pytest.mark.parametrize('name', RESULTS)
def test_a_section_is_there_only_if_its_result_is(tmp_path, name):
  returned, text = make(write(tmp_path / 'run', [name]))
  own = {'pretrain': 'training', 'novelty': 'other'}.get(name, name)
  glance = ['headline'] if name in ('probe', 'ood', 'diversity') else []
  assert returned['sections'] == [*glance, 'config', own]
  assert text.count('results/') and not any(
    f'results/{other}.json' in text for other in RESULTS if other != name
  )


def test_an_empty_workdir_has_only_settings(tmp_path):
  returned, text = make(write(tmp_path / 'run'))
  assert returned['sections'] == ['config'] and 'none yet of' in text


def test_curves(full):
  *_, text, page = full
  labels = [
    attrs['aria-label'] for tag, attrs in page.tags if tag == 'svg' and 'aria-label' in attrs
  ]
  assert labels[0] == 'SimSiam loss against env steps: run ends at -0.9833'
  assert any(
    chart.startswith('Critic loss against env steps, logarithmic') for chart in labels
  )  # 1000 to 17
  assert any(chart.startswith('strange against') for chart in labels)  # hidden
  assert 'NaN' not in text and 'nan' not in re.sub(r'"[^"]*"', '', text).split()


def test_chart_puts_points_where_they_belong():
  svg = charts.chart(
    't', [(0, 'a', [0, 50, 100], [0.0, None, 10.0]), (1, 'b', [0, 100], [5.0, 5.0])], 'steps'
  )
  paths = re.findall(r'class="c r(\d)" d="([^"]*)"', svg)
  [(x0, y0), (x1, y1)] = [
    tuple(map(float, point.split())) for point in paths[0][1].strip('M').split('M')
  ]  # a gap between
  [(_, y2), _] = [tuple(map(float, point.split())) for point in paths[1][1].strip('M').split('L')]
  assert [i for i, _ in paths] == ['0', '1']
  assert (x0, x1) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
  assert y0 > y2 > y1 and math.isclose(y2, (y0 + y1) / 2, abs_tol=0.11)
  marks = {
    text: float(y)
    for y, text in re.findall(r'H\d+"/><text x="\d+" y="([\d.]+)" text-anchor="end">([^<]*)<', svg)
  }
  assert math.isclose(marks['10'] - 3.5, y1, abs_tol=0.11) and math.isclose(
    marks['0'] - 3.5, y0, abs_tol=0.11
  )
  assert 'logarithmic' in charts.chart('t', [(0, 'a', [0, 1], [0.01, 10.0])], 'steps')
  assert charts.chart('t', [(0, 'a', [0, 1], [None, None])], 'steps') == ''


@pytest.mark.parametrize(
  'low, high',
  [(0, 1), (-1, 1), (3.14, 3.15), (0, 50e6), (-1e-7, 3e-7), (0.06, 0.1), (1e5, 1.0001e5)],
)
def test_ticks_are_few_round_and_within(low, high):
  found = np.array(charts.ticks(low, high))
  assert (
    2 <= len(found) <= 5
    and found.min() >= low - 1e-9 * abs(low)
    and found.max() <= high + 1e-9 * abs(high)
  )
  step = np.diff(found)
  np.testing.assert_allclose(step, step[0], rtol=1e-6)
  assert any(
    math.isclose(step[0] / 10 ** math.floor(math.log10(step[0]) + 1e-9), f, rel_tol=1e-6)
    for f in (1, 2, 2.5, 5)
  )
  assert 10 - 1e-9 <= min(charts.log_ticks(10.0, 2000.0)) and len(charts.log_ticks(1e-9, 1e9)) <= 7


def test_thinning_keeps_peaks_and_ends():
  ys = list(np.sin(np.arange(10_000) / 300))
  ys[1234], ys[8000] = 50.0, -50.0
  xs, kept = charts.thinned(list(range(10_000)), ys)
  assert len(xs) <= 302 and (xs[0], xs[-1]) == (0, 9999) and xs == sorted(xs)
  assert (
    max(kept) == 50.0
    and min(kept) == -50.0
    and all(ys[x] == y for x, y in zip(xs, kept, strict=True))
  )
  ys[4000:6000] = [None] * 2000
  xs, kept = charts.thinned(list(range(10_000)), ys)
  assert any(y is None and 4000 <= x < 6000 for x, y in zip(xs, kept, strict=True))


def test_two_workdirs_side_by_side(tmp_path):
  other = config()
  other.name = 'second'
  other.environment.alpha = 0.125
  other.encoder.features = 24
  other.quality.num_real = 9
  first = write(tmp_path / 'a', dict(probe=probe_results(0.2)), lines=5)
  results = dict(
    probe=probe_results(0.4, names=('PALM encoder', 'new')), novelty=RESULTS['novelty']()
  )
  second = write(tmp_path / 'b', results, other, lines=9)
  c = config()
  c.report.compare = (str(second),)
  returned, text = make(first, c)
  page = Page(text)
  assert (
    returned['sections'] == ['headline', 'config', 'probe', 'pretrain-curves', 'other']
    and '2 runs compared' in text
  )
  differ = page.table('Where the runs differ')
  assert differ[0] == ['setting', 'a', 'b'] and differ[1:] == [
    ['name', 'cifar', 'second'],
    ['environment.alpha', str(c.environment.alpha), '0.125'],
    ['encoder.features', '16', '24'],
  ]
  assert ['quality.num_real', '0', '9'] in page.table('Differences elsewhere')
  same = {row[0]: row[1:] for row in page.table('Other settings')}
  assert same['environment.beta'] == [str(c.environment.beta)] * 2 and not same.keys() & {
    'environment.alpha',
    'name',
  }
  table = page.table('Accuracy, %, with all labels')
  assert table[0][2:] == ['a', 'a, salt_pepper:0.1/2', 'b', 'b, salt_pepper:0.1/2']
  rows = {tuple(row[:2]): row[2:] for row in table[1:]}
  assert rows['PALM encoder', 'linear, SGD'] == ['20.00 ± 1.23', '6.67', '40.00 ± 1.23', '13.33']
  assert rows['pixels', 'linear, SGD'][2:] == ['-', '-'] and rows['new', 'linear, SGD'][:2] == [
    '-',
    '-',
  ]
  for _, attrs in page.marked:
    value = value_at(
      dict(a=first, b=second)[attrs['data-run']], attrs['data-file'], attrs['data-at']
    )
    assert attrs['title'].rpartition(' = ')[2] in (str(value), json.dumps(value))
  assert page.table('The runs')[0] == ['', 'a', 'b']
  labels = [
    attrs['aria-label'] for tag, attrs in page.tags if tag == 'svg' and 'aria-label' in attrs
  ]
  assert labels[0].endswith('a ends at -0.8; b ends at -0.8889')


def test_a_setting_that_one_run_lacks_is_a_difference(tmp_path):
  folders = [write(tmp_path / name) for name in 'ab']
  older = json.loads((folders[1] / 'config.json').read_text())
  del older['simsiam']['symmetric']
  (folders[1] / 'config.json').write_text(json.dumps(older))
  c = config()
  c.report.compare = (str(folders[1]),)
  page = Page(make(folders[0], c)[1])
  assert page.table('Where the runs differ')[1:] == [['simsiam.symmetric', 'True', 'absent']]


def test_a_workdir_beside_may_lie_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  first = write(tmp_path / 'a')
  write(tmp_path / 'b')
  c = config()
  c.report.compare = ('~/b',)
  report.check(c, 1)
  assert '2 runs compared' in make(first, c)[1]


def test_names_tell_workdirs_apart(tmp_path):
  folders = [write(tmp_path / x / y) for x, y in (('p', 'run'), ('q', 'run'), ('q', 'other'))]
  assert [run.name for run in read.read_runs(folders)] == ['p/run', 'q/run', 'q/other']
  assert [run.name for run in read.read_runs(folders[1:])] == ['run', 'other']
  with pytest.raises(UserError, match='twice'):
    read.read_runs([folders[0], folders[0]])


def test_one_run_is_compared_with_the_defaults(full):
  page = full[3]
  table = {
    row[0]: row[1:]
    for row in page.table("Unlike the package's defaults, which are of the paper's size")[1:]
  }
  assert table['encoder.name'] == ['nature', 'resnet18'] and table['encoder.features'] == [
    '16',
    '512',
  ]
  assert (
    table['sac.hidden'] == ['16, 16', '1,024, 1,024'] and 'encoder.zero_init_residual' not in table
  )


def test_hostile_text_is_text(tmp_path):
  c = config()
  c.name = c.data.name = c.generator.path = HOSTILE
  result = probe_results(names=(HOSTILE, 'PALM encoder'), data=HOSTILE + ' cifar')
  result['protocol'][HOSTILE] = {HOSTILE: HOSTILE}
  unknown = {HOSTILE: {HOSTILE: [HOSTILE, '\ud800']}}
  ood = json.loads(json.dumps(ood_results()).replace('svhn', '<img src=x onerror=y>'))
  folder = write(tmp_path / '<i>run', {'probe': result, '<u>new': unknown, 'ood': ood}, c, lines=3)
  with (folder / 'pretrain' / 'metrics.jsonl').open('a') as file:
    file.write('\n' + json.dumps({'step': 9, 'env_steps': 900.0, HOSTILE: 3.0}) + '\n')
  plain = {
    tag
    for tag, _ in Page(
      make(write(tmp_path / 'plain', ['probe', 'ood', 'novelty'], lines=3))[1]
    ).tags
  }
  _, text = make(folder, c)
  page = Page(text)
  assert {tag for tag, _ in page.tags} == plain  # no tag comes of the text
  assert all(not name.startswith('on') for _, attrs in page.tags for name in attrs)
  assert HOSTILE not in text and text.count('&lt;script&gt;') > 5
  assert any(HOSTILE in cell for table in page.tables for row in table for cell, _ in row)


@pytest.mark.parametrize(
  'damage', ['{"job": "probe", "rows": [', '[1, 2]', '', b'\xff\xfe\x00', 'null']
)
def test_damaged_results_become_a_note(tmp_path, caplog, damage):
  folder = write(tmp_path / 'run', ['ood'])
  (folder / 'results' / 'probe.json').write_bytes(
    damage if isinstance(damage, bytes) else damage.encode()
  )
  returned, text = make(folder)
  assert len(returned['notes']) == 1 and 'results/probe.json cannot be read' in returned['notes'][0]
  assert 'results/probe.json cannot be read' in text and returned['sections'] == [
    'headline',
    'config',
    'ood',
  ]
  assert 'results/probe.json cannot be read' in caplog.text


@pytest.mark.parametrize('name', ['probe', 'ood', 'diversity', 'quality'])
@pytest.mark.parametrize(
  'content',
  [
    dict(sets={'PALM encoder': dict(knn=dict(test_accuracy=0.5312))}),
    dict(rows=[], protocol={}),
    dict(rows=[3], protocol={}),
    dict(rows=[dict(set=None)], protocol={}),
    dict(rows=[dict(set='a', n=3)]),
    {},
  ],
)
def test_results_of_another_shape_are_plain_values(tmp_path, name, content):
  returned, text = make(write(tmp_path / 'run', {name: content}))
  assert returned['sections'] == ['config', 'other'] and not returned['notes']
  assert name in text and ('0.5312' in text) == ('sets' in content)


def test_numbers_that_are_missing_or_strange_are_shown_as_such(tmp_path):
  result = probe_results()
  result['rows'][0]['accuracy'] = dict(clean=float('nan'))
  result['rows'][1]['accuracy'] = dict(clean='half')
  del result['rows'][3]['half_width']
  ood = ood_results()
  del ood['accuracy'], ood['rows'][0]['auroc']['mean']
  diversity = diversity_results()
  del diversity['ceiling'], diversity['paper'], diversity['rows'][0]['encoder-unique_nn']
  _, text = make(write(tmp_path / 'run', dict(probe=result, ood=ood, diversity=diversity)))
  page = Page(text)
  assert page.table('Accuracy, %, with all labels')[1][2:] == ['nan ± 1.23', '-']
  assert page.table('Accuracy, %, with all labels')[2][2] == '51.43'
  assert page.table('AUROC, %')[1][2:] == ['-', '61.00 ± 1.23', '-']


def test_a_study_shows_its_figure(tmp_path):
  folder = write(tmp_path / 'run', ['study'])
  pictures.save_png(folder / 'figure.png', np.full((30, 40, 3), 77, np.uint8))
  (uri,) = [attrs['src'] for tag, attrs in Page(make(folder)[1]).tags if tag == 'img']
  assert base64.b64decode(uri.partition(',')[2]) == (folder / 'figure.png').read_bytes()


def test_pictures_are_the_newest_and_bounded(full, tmp_path):
  folder, *_, page = full
  sources = [attrs['src'] for tag, attrs in page.tags if tag == 'img']
  assert len(sources) == 3
  newest = folder / 'pretrain' / 'rollouts' / '0000003000.webp'
  assert report_pictures.embed(newest, 10**6) == sources[0] and 'after 3,000 env steps' in full[2]
  noise = np.random.default_rng(1).integers(0, 256, (900, 1200, 3), np.uint8)
  pictures.save_png(tmp_path / 'large.png', noise)
  assert (tmp_path / 'large.png').stat().st_size > 3_000_000
  uri = report_pictures.embed(tmp_path / 'large.png', 150_000)
  assert uri.startswith('data:image/webp;base64,') and len(uri) < 150_000 * 4 / 3 + 40
  pictures.save_webp(tmp_path / 'film.webp', [noise[i : i + 200, :300] for i in range(0, 600, 50)])
  uri = report_pictures.embed(tmp_path / 'film.webp', 100_000)
  with Image.open(io.BytesIO(base64.b64decode(uri.partition(',')[2]))) as film:
    assert film.n_frames == 12 and film.width < 300
  assert report_pictures.embed(tmp_path / 'large.png', 100) is None


def test_a_page_of_many_large_pictures_stays_small(tmp_path):
  noise = np.random.default_rng(1).integers(0, 256, (1000, 1400, 3), np.uint8)
  folders = [write(tmp_path / name) for name in 'abc']
  for folder in folders:
    pictures.save_png(folder / 'pretrain' / 'rollouts' / '0000000100.png', noise)
    pictures.save_png(folder / 'generator' / 'samples' / '000100.png', noise)
  (folders[0] / 'pretrain' / 'rollouts' / '0000000100.webp').write_bytes(b'RIFF....WEBPnothing')
  c = config()
  c.report.compare = tuple(map(str, folders[1:]))
  returned, text = make(folders[0], c)
  assert text.count('<img') == 6 and 500_000 < returned['bytes'] < 9_000_000
  assert len(returned['notes']) == 1 and '0000000100.webp is no picture' in returned['notes'][0]


def test_pca_is_that_of_scikit_learn():
  h = np.random.default_rng(0).normal(size=(50, 12)) * np.arange(1, 13)
  points, shares = feature_map.pca(h.astype(np.float32), 3)
  theirs = PCA(3, svd_solver='full').fit(h.astype(np.float32).astype(np.float64))
  expected = theirs.transform(h.astype(np.float32).astype(np.float64))
  np.testing.assert_allclose(points * np.sign((points * expected).sum(0)), expected, atol=1e-9)
  np.testing.assert_allclose(shares, theirs.explained_variance_ratio_, rtol=1e-10)
  points, shares = feature_map.pca(np.ones((5, 3)))
  assert np.isfinite(points).all() and np.isfinite(shares).all()


def test_nearest_are_those_of_scikit_learn():
  h = np.random.default_rng(0).normal(size=(60, 5))
  queries = [3, 40, 59]
  expected = (
    NearestNeighbors(n_neighbors=8, metric='cosine').fit(h).kneighbors(h[queries])[1][:, 1:]
  )
  np.testing.assert_array_equal(feature_map.nearest(h, queries, 7), expected)
  h[5] = h[3]  # its twin comes first, itself never
  assert feature_map.nearest(h, [3])[0, 0] == 5 and 3 not in feature_map.nearest(h, [3])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A workdir with the checkpoint of a small encoder, and data for it."""
  folder, rng = write(tmp_path_factory.mktemp('trained') / 'run'), np.random.default_rng(0)
  c = config()
  variables = make_encoder(c.encoder).init(
    jax.random.key(3), jnp.zeros((1, 36, 36, 1)), train=False
  )
  with Checkpoints(folder / 'pretrain' / 'checkpoints') as checkpoints:
    checkpoints.save(5, {'encoder': variables}, {})
  split = lambda n: Split(
    rng.integers(0, 256, (n, 36, 36, 1), np.uint8), rng.integers(0, 3, n).astype(np.int32)
  )
  return folder, Data(split(8), split(64), ('one', '<two>', 'three'), 'noise & labels')


def test_map_and_neighbours(trained):
  folder, data = trained
  returned, text = make(folder, data=data)
  page = Page(text)
  assert returned['sections'] == ['config', 'map'] and not returned['notes']
  assert text.count('PCA of 40 test images (checkpoint step 5)') == 2  # heading and label
  counts = [
    len(re.findall('h0', path)) for path in re.findall(r'class="p k\d" d="([^"]*h0M[^"]*)"', text)
  ]
  assert sum(counts) == 40 and len(counts) == 3
  strips = [attrs for tag, attrs in page.tags if tag == 'img']
  assert len(strips) == 3 and strips[1]['alt'].startswith('Test image of <two>, and its nearest: ')
  encoder = features.load_encoder(config(), folder, (36, 36, 1))
  h = features.cached(encoder, data.test.images, folder / 'features', devices.make_mesh(1))
  found = NearestNeighbors(n_neighbors=8, metric='cosine').fit(h).kneighbors(h)[1][:, 1:]
  told = lambda row: (
    'Test image of one, and its nearest: '
    f'{", ".join(data.class_names[data.test.labels[i]] for i in found[row])}'
  )
  assert strips[0]['alt'] in map(told, np.flatnonzero(data.test.labels == 0))
  for label, strip in enumerate(strips):
    with Image.open(io.BytesIO(base64.b64decode(strip['src'].partition(',')[2]))) as image:
      corners = np.asarray(image)[1, 1 :: image.width // 8]
    names = strip['alt'].partition('nearest: ')[2].split(', ')
    expected = [
      feature_map.RIGHT if name == data.class_names[label] else feature_map.WRONG for name in names
    ]
    np.testing.assert_array_equal(corners, [feature_map.GREY, *expected])


def test_no_map_without_data_or_for_other_images(trained):
  folder, data = trained
  assert make(folder)[0]['sections'] == ['config']
  others = data._replace(test=Split(np.zeros((9, 40, 52, 1), np.uint8), np.zeros(9, np.int32)))
  returned, text = make(folder, data=others)
  assert (
    returned['sections'] == ['config'] and 'no map' in returned['notes'][0] and 'no map' in text
  )


def test_scatter_of_many_classes_leaves_the_rest_grey():
  points = np.random.default_rng(0).normal(size=(60, 2))
  figure = charts.scatter('t', points, np.arange(60) % 12, [f'c{i}' for i in range(12)], ['x', 'y'])
  assert figure.count('class="p k-"') == 2 and 'grey: the other classes' in figure
  assert (
    charts.scatter('t', np.zeros((3, 2)), [0, 0, 0], ['a'], ['', '']).count('h0') == 4
  )  # and one of the legend


def test_frames_tell_right_from_wrong():
  images = np.zeros((4, 8, 8, 1), np.uint8)
  out = feature_map.framed(images[0], feature_map.WRONG)
  assert (
    out.shape == (80, 80, 3) and tuple(out[1, 1]) == feature_map.WRONG and not out[4:-4, 4:-4].any()
  )
  assert feature_map.framed(np.zeros((84, 84, 4), np.uint8), feature_map.RIGHT).shape == (92, 92, 3)


@pytest.mark.parametrize(
  'key, value, message',
  [
    ('umap', 'sometimes', "report.umap='sometimes' is unknown"),
    ('num_points', 2, 'report.num_points=2 is too small'),
    ('compare', ('/nowhere',), '/nowhere holds no config.json'),
  ],
)
def test_invalid_settings(key, value, message):
  c = config()
  c.report[key] = value
  with pytest.raises(UserError, match=message):
    report.check(c, 1)


def test_damaged_config_is_an_error(tmp_path):
  folder = write(tmp_path / 'run')
  (folder / 'config.json').write_text('{"name": ')
  with pytest.raises(UserError, match='config.json cannot be read'):
    make(folder)
  assert not (folder / 'report.html').exists()
