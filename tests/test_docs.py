"""README and docs/: links lead somewhere, what they show runs, or at least exists."""
from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import shlex
from pathlib import Path

import click
import pytest
import timm
from commands import run
from PIL import Image

import timm_spot
from timm_spot.cli import main
from timm_spot.models import placement
from timm_spot.tasks.evaluation import studies

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md'), *(ROOT / 'recipes').glob('*.md')])
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCES = re.compile(r'^```(\w*)\n(.*?)^```', re.S | re.M)
# Names of others' files and places, and what takes minutes: their options are checked, they are not run.
NOT_RUN = re.compile(r'photo\.jpg|/data/|downloaded\.pth|\bevaluate\b|\boracle\b|\bplay\b')


def text_of(page):
    return page.read_text('utf-8')


def blocks(page, language='python'):
    return [code for kind, code in FENCES.findall(text_of(page)) if kind == language]


def commands(page):
    """Arguments of every `timm-spot` in a block of code, fenced or indented."""
    lines = re.sub(r'\\\n\s*', ' ', text_of(page)).splitlines()
    found = []
    for line in lines:
        command = re.match(r'(?:    |\$ |uv run )?timm-spot (.+)', line)
        if command and '$' not in command[1] and '...' not in command[1]:
            found.append(shlex.split(command[1], comments=True))
    return found


def anchor(heading):
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).strip().lower()
    return re.sub(r'[^\w\- ]', '', text.replace('`', '')).replace(' ', '-')


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    prose = FENCES.sub('', text_of(page))
    for target in re.findall(r'\]\(([^)\s]+)\)', prose):
        if target.startswith(('http://', 'https://')):
            continue
        name, _, part = target.partition('#')
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if part:
            headings = re.findall(r'^#+ (.+)$', FENCES.sub('', text_of(file)), re.M)
            assert part in map(anchor, headings), target


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_commands_and_their_options_exist(page):
    for name, *arguments in commands(page):
        command = main.commands[name]
        with click.Context(command, info_name=name) as context:
            command.make_parser(context).parse_args(list(arguments))


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_blocks_are_python_and_name_what_there_is(page):
    for code in blocks(page):
        compile(code, page.name, 'exec')
        for name in re.findall(r'\btimm_spot\.(\w+)\(', code):
            assert hasattr(timm_spot, name), name


def test_the_site_names_pages_and_functions_that_there_are():
    """That it names all of them is what `make docs` asks for, see docs/hooks.py."""
    nav = (ROOT / 'mkdocs.yml').read_text('utf-8').split('\nnav:')[1]
    assert all((ROOT / 'docs' / name).is_file() for name in re.findall(r'[\w/]+\.md', nav))
    api = ''.join(text_of(page) for page in (ROOT / 'docs' / 'api').glob('*.md'))
    shown = re.findall(r'^::: (\S+\.\S+)$', api, re.M)
    assert len(shown) == len(set(shown)) > 30
    for name in shown:
        module, _, attribute = name.rpartition('.')
        assert callable(getattr(importlib.import_module(module), attribute)), name


def test_readme_is_short():
    assert len(text_of(ROOT / 'README.md').split()) < 900


# ---------------------------------------------------------------------------------------------------------------------
# What is shown runs


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder in which README's commands find what they name."""
    (tmp_path / 'examples' / 'photos').mkdir(parents=True)
    (tmp_path / 'examples' / 'digits').symlink_to(ROOT / 'examples' / 'digits')
    name = 'examples/photos/cowbike.jpg'
    with Image.open(ROOT / name) as photo:  # small, so that drawing it takes no minutes
        photo.resize((128, 128)).save(tmp_path / name)
    (tmp_path / 'build').mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    """Weights of the Hub stay random; registries forget what a page adds."""
    create = timm.create_model

    def create_offline(name, pretrained=False, **keywords):
        is_here = name.startswith('local-dir:') or 'pico' in name
        return create(name, pretrained=pretrained and is_here, **keywords)

    monkeypatch.setattr(timm, 'create_model', create_offline)
    for name in ('retrofit', 'sparsify'):
        function = getattr(timm_spot, name)

        def without_weights(*args, function=function, **keywords):
            keywords.pop('pretrained', None)
            return function(*args, **keywords)

        monkeypatch.setattr(timm_spot, name, without_weights)
    monkeypatch.setattr(placement, '_PLACERS', dict(placement._PLACERS))
    monkeypatch.setattr(studies, 'STUDIES', dict(studies.STUDIES))


def follow(page, left_out=NOT_RUN):
    """Run a page from top to bottom, as who reads it does; what it prints, and its names."""
    names, printed = {}, []
    for kind, code in FENCES.findall(text_of(page)):
        if kind == 'python':
            exec(compile(code, page.name, 'exec'), names)
        elif kind == '':
            for line in re.sub(r'\\\n\s*', ' ', code).splitlines():
                if line.startswith('timm-spot ') and not left_out.search(line):
                    result = run(*shlex.split(line, comments=True)[1:])
                    assert result.exit_code == 0, (line, result.output)
                    printed.append(result.output)
    return names, printed


def test_readme_runs(clone, offline, capsys):
    left_out = re.compile(rf'{NOT_RUN.pattern}|\bexport\b')  # the tutorial on serving runs the same
    _, printed = follow(ROOT / 'README.md', left_out)
    assert 'tensor([4])' in capsys.readouterr().out
    assert len(printed) == 4 and (clone / 'svg/cowbike.svg').exists() and (clone / 'placement.png').exists()


@pytest.mark.parametrize('name', ['predict', 'fine_tune', 'reproduce', 'serve', 'draw'])
def test_tutorials_run(name, clone, offline, capsys):
    names, printed = follow(ROOT / 'docs' / 'tutorials' / f'{name}.md')
    out = capsys.readouterr().out
    if name == 'predict':
        assert out.split() == ['4', '4'] and names['logits'].shape == (1, 10)
        assert (clone / 'build/placement.png').exists() and (clone / 'build/priors.png').exists()
    elif name == 'fine_tune':
        assert float(out.split()[1]) < 0.3
        answers = [line.split()[:2] for line in printed[0].splitlines()]
        assert len(answers) == 10 and all(Path(file).parent.name == kind for file, kind in answers)
    elif name == 'reproduce':
        assert 'center - isotropic' in printed[0]
    elif name == 'serve':
        assert out.strip() == '4'
    else:
        assert out.strip() == 'True' and (clone / 'build/small/cowbike.svg').stat().st_size <= 30_000


IMAGES = 'torch.randn(2, 3, 64, 64)'
PRELUDE = f"""
import timm, timm_spot, torch
images, labels = {IMAGES}, torch.tensor([3, 7])
model = timm.create_model('spot_vit_pico_patch8_64', pretrained=True, n_tokens=9).eval()
"""
# Pages whose blocks run on these names; the others show files, data sets or large models that are not here.
RUNNABLE = ['oracle', 'placers', 'play', 'samplers', 'size', 'studies']


@pytest.mark.parametrize('name', RUNNABLE)
def test_blocks_of_other_pages_run(name, offline):
    names = {}
    exec(PRELUDE, names)
    for code in blocks(ROOT / 'docs' / f'{name}.md'):
        with contextlib.redirect_stdout(None):
            exec(compile(code, f'{name}.md', 'exec'), names)


def test_calls_in_other_pages_have_keywords_that_there_are():
    """`timm_spot.f(..., keyword=...)`: wherever the signature says which there are, the keyword is one of them."""
    for page in PAGES:
        for code in blocks(page):
            for node in ast.walk(ast.parse(code)):
                if not (isinstance(node, ast.Call) and re.fullmatch(r'timm_spot\.\w+', ast.unparse(node.func))):
                    continue
                function = getattr(timm_spot, node.func.attr)
                parameters = inspect.signature(function).parameters
                if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
                    continue
                assert {k.arg for k in node.keywords} <= set(parameters), ast.unparse(node)


