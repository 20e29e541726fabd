"""The notebook runs from top to bottom, offline, and keeps outputs that a reader can do without running it."""
from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parent.parent / 'notebooks' / 'get_started.ipynb'


def kinds(cell) -> set:
    """What a cell shows: printed text, pictures."""
    return {'text' if o.output_type == 'stream' else 'picture' for o in cell.outputs}


# Jupyter's own sockets, of no interest here.
@pytest.mark.filterwarnings('ignore::ResourceWarning', 'ignore::DeprecationWarning:(jupyter|nbclient|zmq|tornado).*')
def test_get_started_runs_and_was_saved_with_its_outputs(monkeypatch, tmp_path):
    monkeypatch.setenv('PYTHONPATH', str(NOTEBOOK.parent.parent))
    monkeypatch.setenv('PYTHONWARNINGS', 'ignore')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_HOME', str(tmp_path))  # empty: nothing to find but what the package brings
    monkeypatch.setenv('HOME', str(tmp_path))  # where IPython keeps its history; a home may be read-only
    saved = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(saved)
    fresh = nbformat.from_dict(saved)
    for cell in fresh.cells:
        if cell.cell_type == 'code':
            cell.outputs = []
    nbclient.NotebookClient(
        fresh, timeout=120, kernel_name='python3', resources=dict(metadata=dict(path=NOTEBOOK.parent))).execute()
    code = [(a, b) for a, b in zip(saved.cells, fresh.cells) if a.cell_type == 'code']
    assert [a.execution_count for a, _ in code] == list(range(1, len(code) + 1))
    for a, b in code:
        assert kinds(a) == kinds(b) != set(), a.source
        assert not any(o.output_type == 'stream' and o.name == 'stderr' for o in (*a.outputs, *b.outputs)), a.source
