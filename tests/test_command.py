"""`timm-spot` as it starts: light where it can be, and then it says what the command itself says."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import run

import timm_spot_command as command
from timm_spot.cli import main

ROOT = Path(__file__).parents[1]

CODE = """
import sys
import timm_spot_command
sys.argv[0] = 'timm-spot'
try:
    timm_spot_command.main()
finally:
    print('torch' in sys.modules, file=sys.stderr)
"""


def start(*arguments, **environment):
    return subprocess.run(
        [sys.executable, '-c', CODE, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT), **environment))


def test_help_is_that_of_the_command():
    light = CliRunner().invoke(command.outline(), ['--help'], prog_name='timm-spot')
    whole = CliRunner().invoke(main, ['--help'], prog_name='timm-spot')
    assert light.exit_code == whole.exit_code == 0
    assert light.output == whole.output


@pytest.mark.parametrize('arguments, says', [
    (['--help'], '  predict '), ([], '  predict '), (['--version'], 'timm-spot, version ')])
def test_torch_stays_away(arguments, says):
    result = start(*arguments)
    assert says in result.stdout + result.stderr and result.stderr.endswith('False\n')


def test_names_are_completed_without_torch():
    result = start(_TIMM_SPOT_COMPLETE='bash_complete', COMP_WORDS='timm-spot pr', COMP_CWORD='1')
    assert result.stdout.split() == ['plain,predict'] and result.stderr == 'False\n'
    result = start(_TIMM_SPOT_COMPLETE='bash_source')
    assert '_TIMM_SPOT_COMPLETE=bash_complete' in result.stdout and result.stderr == 'False\n'


@pytest.mark.parametrize('words, at, light', [
    ('timm-spot pr', '1', True), ('timm-spot', '1', True), ('timm-spot predict --n', '2', False),
    ('timm-spot pr', 'pr', True), ('timm-spot', '', True), ('timm-spot predict --n', '--n', False)])
def test_options_are_left_to_the_command(words, at, light, monkeypatch):
    monkeypatch.setenv('_TIMM_SPOT_COMPLETE', 'fish_complete')
    monkeypatch.setenv('COMP_WORDS', words)
    monkeypatch.setenv('COMP_CWORD', at)
    assert command._is_light([]) is light


def test_everything_else_is_the_command(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['timm-spot', 'predict', '--help'])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0 and run('predict', '--help').exit_code == 0
