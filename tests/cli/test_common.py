from __future__ import annotations

import io
import os
import warnings

import click
import pytest
import timm
from click.testing import CliRunner
from conftest import SMALL

from timm_spot.cli import common


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


def test_a_name_that_is_no_utf8_in_a_message_is_printed_as_escapes(tmp_path):
    name = os.fsdecode(bytes(tmp_path) + b'/\xff.png')
    result = CliRunner().invoke(common.main, ['draw', 'a.png', '--out', f'{name}/b.png'])
    assert result.exit_code == 1 and f'there is no folder {tmp_path}/\\xff.png to write b.png to' in result.stderr
    result = CliRunner().invoke(common.main, ['draw', name, '--out', str(tmp_path / 'b.png')])
    assert result.exit_code == 1 and f'{tmp_path}/\\xff.png' in result.stderr and 'Traceback' not in result.output


@pytest.mark.parametrize('options, says', [
    (dict(seed=1), "a dHT model's tokens are regions that it finds itself: leave out --seed"),
    (dict(sampler='uniform', placer='sampled'), 'leave out --sampler and --placer'),
])
def test_options_that_a_family_has_no_use_for_are_refused_before_weights_load(monkeypatch, options, says):
    def refuse(*args, **kwargs):
        raise AssertionError('weights were looked for')

    monkeypatch.setattr(timm.models._builder, 'load_pretrained', refuse)
    with pytest.raises(ValueError, match=says):
        common.create_placed_model('dht_vit_small_patch16_in1k', **options)
    with pytest.raises(ValueError, match='dht_vit_small_patch16_in1k is a dHT model, whose tokens are regions that it'):
        common.create_subpixel_model('dht_vit_small_patch16_in1k')


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1'])
def test_letters_that_a_locale_lacks_stop_no_command(encoding, monkeypatch):
    """Names of classes, of weights and in tables, on both streams."""
    @common.main.command('print-it')
    def command() -> None:
        click.echo('\u6a21 \u00b1')
        click.echo('\u6a21', err=True)

    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors='strict') for _ in range(2)]
    monkeypatch.setattr('sys.stdout', streams[0])
    monkeypatch.setattr('sys.stderr', streams[1])
    try:
        common.main(['print-it'], standalone_mode=False)
    finally:
        del common.main.commands['print-it']
    for stream in streams:
        stream.flush()
        assert b'\\u6a21' in stream.buffer.getvalue() or '\u6a21'.encode() in stream.buffer.getvalue()
