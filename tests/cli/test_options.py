"""The command line as one language: an option means the same wherever it stands."""
from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from timm_spot.cli import main, options, params

MEANINGS = {
    '--n-tokens': params.BUDGET,
    '--seed': params.SEED,
    '--batch-size': params.COUNT,
    '--device': params.DeviceName,
    '--sampler': (params.SamplerName, params.StartName),  # a search may also start at the model's own placer
    '--saliency': params.SaliencyName,
    '--placer': params.PlacerName,
    '--weights': params.InputFile,
    '--model': params.ModelName,
    '--amp': click.Choice,
}
EXPECTED = {
    'predict': {'--model', '--weights', '--n-tokens', '--sampler', '--saliency', '--placer', '--seed', '--batch-size',
                '--device', '--amp'},
    'draw': {'--model', '--weights', '--n-tokens', '--sampler', '--saliency', '--placer', '--seed', '--device',
             '--amp'},
    'oracle': {'--model', '--weights', '--n-tokens', '--sampler', '--saliency', '--placer', '--seed', '--batch-size',
               '--device', '--amp'},
    'evaluate': {'--model', '--n-tokens', '--sampler', '--seed', '--saliency', '--batch-size', '--device', '--amp'},
    'study': {'--model', '--weights', '--n-tokens', '--device'},
    'export': {'--weights', '--n-tokens', '--sampler', '--placer', '--seed'},
    'convert': {'--model'},
    'play': {'--model', '--weights'},
}


def spellings(command: click.Command) -> dict[str, click.Parameter]:
    return {spelling: option for option in command.params for spelling in option.opts}


@pytest.mark.parametrize('name', EXPECTED)
def test_an_option_means_the_same_everywhere(name):
    found = spellings(main.commands[name])
    assert {spelling for spelling in found if spelling in MEANINGS} == EXPECTED[name]
    for spelling in EXPECTED[name]:
        meaning, type_ = MEANINGS[spelling], found[spelling].type
        type_ = type_.item if isinstance(type_, params.Items) else type_  # of a list
        assert type_ is meaning if isinstance(meaning, params.Number) else isinstance(type_, meaning), spelling


def test_no_command_has_such_an_option_of_its_own_unseen():
    assert {name for name, command in main.commands.items() if MEANINGS.keys() & spellings(command)} == set(EXPECTED)


def test_older_spellings_are_taken_but_not_shown():
    @click.command()
    @options.amp_option
    def command(amp: str) -> None:
        click.echo(f'{amp}')

    for spelling in ('--amp', '--amp-dtype'):
        assert CliRunner().invoke(command, [spelling, 'bfloat16']).output == 'bfloat16\n'
    shown = CliRunner().invoke(command, ['--help']).output
    assert '--amp ' in shown and '--amp-dtype' not in shown


def test_every_command_has_its_help():
    for name in main.commands:
        result = CliRunner().invoke(main, [name, '--help'])
        assert result.exit_code == 0 and f'{name} [OPTIONS]' in result.output, result.output
    assert CliRunner().invoke(main, ['--version']).output.startswith('main, version ')
