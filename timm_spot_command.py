"""The `timm-spot` command as it starts: what needs no model is answered before timm is imported, which takes seconds.

That is `--version`, the list of commands and the completion of their names. It lies beside the package because all that
is imported from inside of it imports timm, whose registry the models have to be in. Names and descriptions are read
from the source of `timm_spot/cli/`; nothing is said twice.
"""
from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import click

_COMPLETE = '_TIMM_SPOT_COMPLETE'  # set by the shell when it asks, see click's documentation


def main() -> None:
    """Run the command, or answer what can be answered without it."""
    if _is_light(sys.argv[1:]):
        outline()(prog_name='timm-spot')
    else:
        from timm_spot.cli import main as command

        command(prog_name='timm-spot')


def _is_light(arguments: list[str]) -> bool:
    if _COMPLETE in os.environ:
        words, at = os.environ.get('COMP_WORDS', '').split(), os.environ.get('COMP_CWORD', '')
        if os.environ[_COMPLETE].endswith('_source'):
            return True
        # bash and zsh give the number of the word that is completed; fish the word itself, which is the last.
        return int(at) <= 1 if at.isdigit() else len(words) - bool(at) <= 1
    return arguments in ([], ['-h'], ['--help'], ['--version'])


def outline() -> click.Group:
    """The command with its sub-commands' names and descriptions, none of which does anything."""
    folder = Path(find_spec('timm_spot').submodule_search_locations[0], 'cli')  # type: ignore[union-attr,index]
    common = _tree(folder / 'common.py').body
    about = next(ast.get_docstring(f) for f in common if isinstance(f, ast.FunctionDef) and f.name == 'main')
    found = click.Group(
        help=about, context_settings=dict(help_option_names=['-h', '--help'], max_content_width=120),
        commands=[
            click.Command(name, help=text) for file in sorted(folder.glob('*.py'))
            for name, text in _commands(_tree(file))])
    return click.version_option(version('timm-spot'))(found)


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text('utf-8'))


def _commands(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names and descriptions of the functions under `@main.command()`."""
    texts = {
        node.targets[0].id: node.value for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    for function in tree.body:
        for decorator in getattr(function, 'decorator_list', []):
            if not (isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == 'main.command'):
                continue
            given = next((k.value for k in decorator.keywords if k.arg == 'help'), None)
            if isinstance(given, ast.Name):  # a text that is put together: its first string begins it
                strings = [n.value for n in ast.walk(texts[given.id]) if isinstance(n, ast.Constant)]
                text = next(s for s in strings if isinstance(s, str) and s.strip())
            else:
                text = ast.get_docstring(function) or ''
            names = [a.value for a in decorator.args if isinstance(a, ast.Constant)]
            yield (names or [function.name.replace('_', '-')])[0], text


if __name__ == '__main__':
    main()
