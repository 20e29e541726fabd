"""`timm-spot evaluate` on what people keep in folders, and under which labels."""
from __future__ import annotations

import csv

import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import SMALL
from picture_files import write_all, write_classes

from timm_spot.cli import main

WORDS = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']


def save(folder, **keywords):
    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', **keywords, **SMALL)
    timm.models.save_for_hf(model, folder, model_args=dict(**keywords, **SMALL))
    return f'local-dir:{folder}'


def evaluate(folder, model, out, *arguments):
    return CliRunner().invoke(main, [
        'evaluate', str(folder), '--model', model, '--out', str(out), '--samplers', 'grid', '--budgets', '4',
        *map(str, arguments)])


def rows(out):
    with (out / 'results.csv').open() as file:
        return list(csv.DictReader(file))


def test_all_kinds_of_bad_pictures_are_skipped_by_name(tmp_path):
    folder, model = write_classes(tmp_path / 'data'), save(tmp_path / 'model')
    bad = write_all(folder / '7')
    result = evaluate(folder, model, tmp_path / 'out', '--skip-broken')
    assert result.exit_code == 0, result.output
    assert all(f'skipped: {folder}/7/{name} ' in result.output for name in bad)
    row, = rows(tmp_path / 'out')
    assert (row['images'], row['skipped']) == ('20', str(len(bad)))


@pytest.mark.parametrize('channels', [1, 4])
def test_models_of_other_channels(tmp_path, channels):
    folder, model = write_classes(tmp_path / 'data'), save(tmp_path / 'model', in_chans=channels)
    result = evaluate(folder, model, tmp_path / 'out')
    if channels == 1:
        assert result.exit_code == 0, result.output
        assert rows(tmp_path / 'out')[0]['images'] == '20'
    else:
        assert result.exit_code == 1 and 'reads images of 4 channels (in_chans=4)' in result.output


def test_other_class_names_than_the_models(tmp_path):
    """A folder of digits in words gave 7.5 % without a message, and all of them under a class map."""
    folder, model = write_classes(tmp_path / 'data', 1), save(tmp_path / 'model')
    result = evaluate(folder, model, tmp_path / 'numbers')
    assert result.exit_code == 0, result.output
    for label, word in enumerate(WORDS):
        (folder / str(label)).rename(folder / word)
    result = evaluate(folder, model, tmp_path / 'out')
    assert result.exit_code == 1 and 'Traceback' not in result.output
    assert "has the classes eight, five, four, nine, one and 5 more; the model's are 0, 1, 2, 3, 4" in result.output
    assert not (tmp_path / 'out' / 'results.csv').exists()
    (tmp_path / 'map.txt').write_text('\n'.join(WORDS))
    result = evaluate(folder, model, tmp_path / 'out', '--class-map', tmp_path / 'map.txt')
    assert result.exit_code == 0, result.output
    assert rows(tmp_path / 'out')[0]['nll'] == rows(tmp_path / 'numbers')[0]['nll']


@pytest.mark.parametrize('name, says', [
    ('none.txt', 'is no file'), ('map', 'must be a .txt'), ('other.txt', 'names no folder')])
def test_a_class_map_that_is_none_is_one_line(tmp_path, name, says):
    folder, model = write_classes(tmp_path / 'data', 1), save(tmp_path / 'model')
    for file in ('map', 'other.txt'):
        (tmp_path / file).write_text('cat\ndog\n')
    result = evaluate(folder, model, tmp_path / 'out', '--class-map', tmp_path / name)
    assert result.exit_code == 1 and says in result.output and 'Traceback' not in result.output
    assert len(result.output.strip().splitlines()) == 1
