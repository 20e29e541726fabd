"""The house as CONTRIBUTING describes it: rings, rooms, sizes, names of tests."""
from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'timm_spot'
FILES = sorted(PACKAGE.rglob('*.py'))
NAMES = {'.'.join(f.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): f for f in FILES}
# A folder may import those before it, a room of tasks/ those before it too; publishing and vectorize stand beside them.
RINGS = ['ops', 'models', 'tasks', 'cli']
ROOMS = [
    'extras', 'kept', 'processes', 'pictures', 'search', 'drawing', 'evaluation', 'deploy', 'predict', 'publishing',
    'play']
LINES, FUNCTION_LINES, PARAMETERS = 350, 60, 12
LONG_CALLS = {  # too many parameters, and lines of docstring for them
    'timm_spot.tasks.search.optimize:optimize_positions': 'its call is kept: every keyword is one of the search',
    'timm_spot.models.dht_tokenizer:HierarchicalTokenizer.__init__': "the authors' settings by their names, and one",
    'timm_spot.models.dht_embed:HierarchicalEmbed.__init__': "timm's own signature, of an `embed_layer`",
}
# Modules that only gather names or start the program, and those whose test has another home.
WITHOUT_TEST = {
    'timm_spot.__main__': 'tests/test_main.py starts it',
    'timm_spot.cli.__main__': 'starts the command, as tests/cli do',
    'timm_spot.models._timm': 'imports only; tests of all models fall with it',
}
# Tests of what several modules do together.
OF_SEVERAL = {'models/test_adapters.py'}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(NAMES[name].read_text('utf-8'))


def imports(name: str) -> Iterator[Tuple[str, str, bool]]:
    """(module, name in it or '', inside a function or under TYPE_CHECKING) of every import of our own in a module."""
    package = name if NAMES[name].name == '__init__.py' else name.rpartition('.')[0]
    top = {id(node) for node in tree(name).body}
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from ((a.name, '', id(node) not in top) for a in node.names if a.name.startswith('timm_spot'))
        elif isinstance(node, ast.ImportFrom):
            parts = package.split('.')[:len(package.split('.')) - node.level + 1] if node.level else []
            module = '.'.join([*parts, *([node.module] if node.module else [])])
            if module.split('.')[0] != 'timm_spot':
                continue
            for alias in node.names:
                whole = f'{module}.{alias.name}'
                yield (whole, '', id(node) not in top) if whole in NAMES else (module, alias.name, id(node) not in top)


def place(name: str, depth: int) -> str:
    return (name.split('.') + ['', '', ''])[depth]


def test_imports_only_point_inwards():
    wrong = []
    for name in NAMES:
        for module, used, _ in imports(name):
            if module == 'timm_spot' and used not in ('', '__version__'):  # '': so that the models are registered
                wrong.append(f'{name} imports {used} from the package, not from its module')
            ring, other = place(name, 1), place(module, 1)
            if ring in RINGS and module != 'timm_spot' and RINGS.index(other) > RINGS.index(ring):
                wrong.append(f'{name} imports {module}')
    assert wrong == []


def test_rooms_of_tasks_have_an_order():
    wrong = []
    for name in NAMES:
        for module, _, _ in imports(name):
            room, other = place(name, 2), place(module, 2)
            if place(name, 1) != 'tasks' or place(module, 1) != 'tasks' or room == other or not other:
                continue
            allowed = ROOMS[:ROOMS.index(room)] if room in ROOMS else ROOMS
            if other not in allowed:
                wrong.append(f'{name} imports {module}')
    assert wrong == []


def test_imports_run_in_no_circle():
    graph = {
        name: {module for module, _, late in imports(name) if not late and module in NAMES and module != name}
        for name in NAMES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_no_module_imports_another_s_private_names():
    wrong = [
        f'{name} imports {used} of {module}' for name in NAMES for module, used, _ in imports(name)
        if used.startswith('_') and not used.startswith('__')]
    assert wrong == []


def test_no_module_is_too_long():
    lines = {name: len(file.read_text('utf-8').splitlines()) for name, file in NAMES.items()}
    assert {name: n for name, n in lines.items() if n > LINES} == {}


def functions(name: str) -> Iterator[Tuple[str, ast.FunctionDef]]:
    def walk(node: ast.AST, path: List[str]) -> Iterator[Tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{name}:{'.'.join([*path, child.name])}", child
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            yield from walk(child, [*path, child.name] if named else path)

    return walk(tree(name), [])


def test_no_function_is_too_long():
    lengths = {key: node.end_lineno - node.lineno + 1 for name in NAMES for key, node in functions(name)}
    long = {key: n for key, n in lengths.items() if n > FUNCTION_LINES}
    assert {key: n for key, n in long.items() if key not in LONG_CALLS} == {}


def test_no_parameter_list_is_too_long():
    counts = {
        key: len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        for name in NAMES for key, node in functions(name)}
    long = {key for key, n in counts.items() if n > PARAMETERS}
    assert long - set(LONG_CALLS) == set()
    assert set(LONG_CALLS) - long == set(), 'these exceptions are none any more'


def test_every_module_has_a_test_of_its_name():
    missing = []
    for name, file in NAMES.items():
        test = ROOT / 'tests' / file.relative_to(PACKAGE).parent / f'test_{file.stem.lstrip("_")}.py'
        if file.name != '__init__.py' and name not in WITHOUT_TEST and not test.exists():
            missing.append(f'{name}: {test.relative_to(ROOT)}')
    assert missing == []


def test_every_test_file_is_of_a_module():
    """Or of the package, its examples and what surrounds it."""
    tests = {
        f.relative_to(ROOT / 'tests').as_posix() for folder in ('ops', 'models', 'tasks', 'cli')
        for f in (ROOT / 'tests' / folder).rglob('test_*.py')}
    modules = {
        (f.relative_to(PACKAGE).parent / f'test_{f.stem.lstrip("_")}.py').as_posix()
        for f in FILES if f.name != '__init__.py'}
    packages = {(f.parent.relative_to(PACKAGE) / f'test_{f.parent.name}.py').as_posix() for f in FILES}
    known = {name.removesuffix('.py') for name in modules | packages}
    # A long one may be cut by subject: test_evaluate.py, test_evaluate_pictures.py.
    assert sorted(t for t in tests - OF_SEVERAL if not any(t.startswith((f'{k}.', f'{k}_')) for k in known)) == []


@pytest.mark.parametrize('name', ['ops', 'models', 'tasks', 'cli', 'tasks.evaluation'])
def test_contributing_names_each_room(name):
    text = (ROOT / 'CONTRIBUTING.md').read_text('utf-8')
    assert f"`timm_spot/{name.replace('.', '/')}/`" in text
