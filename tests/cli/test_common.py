from __future__ import annotations

import warnings

import click
import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import SMALL

from timm_spot.cli import common
from timm_spot.cli.options import amp_option


@pytest.mark.parametrize('error', [
    ValueError('what it was'), RuntimeError('what it was'), FileNotFoundError('what it was'),
    TypeError('what it was'),
])
def test_what_a_user_can_put_right_is_one_line(error):
    with pytest.raises(click.ClickException, match='what it was'), common.clean_errors():
        raise error


@pytest.mark.parametrize('stumble', [
    lambda: None + 1, lambda: {}['key'], lambda: [][0], lambda: 1 / 0, lambda: None.shape,
    lambda: __import__('timm_spot.no_such_module'),
])
def test_an_error_of_the_program_keeps_its_traceback(stumble):
    with pytest.raises((TypeError, LookupError, ZeroDivisionError, AttributeError, ImportError)), common.clean_errors():
        stumble()


@pytest.mark.parametrize('module, says', [
    ('matplotlib.pyplot', r"this needs matplotlib: pip install 'timm-spot\[viz\]'"),
    ('accelerate', r"pip install 'timm-spot\[evaluate\]'"),
    ('onnxscript', r"pip install 'timm-spot\[export\]'"),
    ('sklearn.datasets', r"pip install 'timm-spot\[train\]'"),
    ('datasets', 'this needs datasets: pip install datasets'),
])
def test_a_missing_extra_is_told_with_its_install_line(module, says, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, module.partition('.')[0], None)
    with pytest.raises(click.ClickException, match=says), common.clean_errors():
        __import__(module)


def test_warnings_are_lines_for_as_long_as_a_command_runs():
    @common.main.command('warn-of-it')
    def command() -> None:
        warnings.showwarning(UserWarning('beware'), UserWarning, 'file', 1)

    shown = warnings.showwarning
    try:
        result = CliRunner().invoke(common.main, ['warn-of-it'])
    finally:
        del common.main.commands['warn-of-it']
    assert result.stderr == 'warning: beware\n'
    assert warnings.showwarning is shown


def test_older_spellings_are_taken_but_not_shown():
    @click.command()
    @amp_option
    def command(amp: str) -> None:
        click.echo(f'{amp}')

    for spelling in ('--amp', '--amp-dtype'):
        assert CliRunner().invoke(command, [spelling, 'bfloat16']).output == 'bfloat16\n'
    shown = CliRunner().invoke(command, ['--help']).output
    assert '--amp ' in shown and '--amp-dtype' not in shown


def test_amp_runs_the_model_under_autocast():
    x, linear = torch.ones(1, 4), torch.nn.Linear(4, 4)
    with common.autocast('cpu', 'bfloat16'):
        assert linear(x).dtype == torch.bfloat16
    with common.autocast('cpu', None):
        assert linear(x).dtype == torch.float32


def test_a_config_of_nonsense_keywords_is_named(tmp_path):
    timm.models.save_for_hf(timm.create_model('spot_vit_pico_patch8_64', **SMALL), tmp_path / 'saved')
    config = tmp_path / 'saved' / 'config.json'
    config.write_text(config.read_text().replace('"embed_dim"', '"embed_dimm"'))
    with pytest.raises(click.ClickException, match=r'saved cannot be made: .*embed_dimm'), common.clean_errors():
        common.create_model(str(tmp_path / 'saved'))


def test_without_weights_none_are_looked_for(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('weights were looked for')

    monkeypatch.setattr(timm.models._builder, 'load_pretrained', refuse)
    model = common.create_model('spot_vit_pico_patch8_64', pretrained=False, n_tokens=9)
    assert model.n_tokens == 9 and not model.training
