"""The notebook runs from top to bottom, and is kept without outputs."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PATH = ROOT / 'palm_jax' / 'notebooks' / 'first_steps.ipynb'
nbformat = pytest.importorskip('nbformat', reason="nbformat is not installed ('.[test]')")


def test_every_cell_is_python_without_outputs():
  notebook = nbformat.read(PATH, as_version=4)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      compile(cell.source, str(PATH), 'exec')
      assert not cell.outputs and cell.execution_count is None


@pytest.mark.slow
def test_it_runs(monkeypatch):
  """About two minutes; its encoder sees more than the untrained one."""
  nbclient = pytest.importorskip('nbclient')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.delenv('XLA_FLAGS')  # of the tests: eight devices, slow code
  notebook = nbformat.read(PATH, as_version=4)
  nbclient.NotebookClient(notebook, timeout=900, resources={'metadata': {'path': ROOT}}).execute()
  codes = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert sum('image/png' in out.get('data', {}) for cell in codes for out in cell.outputs) == 2
  (found,) = [
    eval(out.data['text/plain'])
    for cell in codes
    for out in cell.outputs
    if 'untrained' in out.get('data', {}).get('text/plain', '')
  ]
  assert found['pretrained'] > found['untrained'] + 0.03, found
