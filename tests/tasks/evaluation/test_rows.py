from __future__ import annotations

import pytest

from timm_spot.tasks.evaluation.rows import KEY, Row

ROW = Row('sampler', 'digits', 'f6ce', 'validation', 'pico', '7fc4', 'grid', 9, seeds=(0, 1), settings='12ab')


def test_columns_tell_rows_apart_and_are_complete():
    assert set(KEY) == set(vars(ROW)) and Row.from_cells(ROW.to_cells()) == ROW
    others = dict(
        kind='placer', settings='34cd', seeds=(0,), keep_rate=0.5, n_tokens=None, r='8 0', share=0.6, coverage=0.5,
        similarity=0.9)
    for name, value in others.items():
        other = Row(**{**vars(ROW), name: value})
        assert Row.from_cells(other.to_cells()) == other != ROW


@pytest.mark.parametrize('sampler, kind', [
    ('grid', 'sampler'), ('oracle isotropic', 'oracle'), ('patch-drop', 'baseline'), ('regions', 'regions'),
    ('as it is', 'as it is')])
def test_version_0_1_told_kinds_by_names(sampler, kind):
    cells = dict(ROW.to_cells(), sampler=sampler)
    del cells['kind'], cells['settings'], cells['r'], cells['share'], cells['similarity']
    found = Row.from_cells(cells)
    assert (found.kind, found.settings, found.competes) == (kind, '', kind != 'oracle')
    # Rows of today say it themselves.
    assert Row.from_cells(dict(cells, kind='sampler')).kind == 'sampler'


def test_a_number_that_is_none():
    with pytest.raises(ValueError):
        Row.from_cells(dict(ROW.to_cells(), n_tokens='nine'))


def test_a_title_names_model_placement_and_pruning():
    assert ROW.title == 'pico, grid, 9 tokens'
    assert Row(**{**vars(ROW), 'scorer': 'norm', 'keep_rate': 0.5}).title == 'pico, grid, 9 tokens, norm at 0.5'
    assert Row(**{**vars(ROW), 'scorer': 'merge', 'r': '8'}).title == 'pico, grid, 9 tokens, merge, r 8'
    assert Row(**{**vars(ROW), 'scorer': 'merge', 'similarity': 0.9}).title == (
        'pico, grid, 9 tokens, merge, similarity 0.9')
