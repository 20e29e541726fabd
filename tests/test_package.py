"""The package as a whole: what importing it does and costs, and the names it offers."""
from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import timm_spot

CODE = """
import json, sys, warnings
warnings.simplefilter('error')
import timm
before = set(sys.modules), set(timm.list_models())
import timm_spot
modules = sorted(m for m in set(sys.modules) - before[0] if not m.startswith('timm_spot'))
names = sorted(set(timm.list_models()) - before[1])
print(json.dumps(dict(modules=modules, names=names)))
"""
# What users type. A name is added here on purpose, and never taken away.
PUBLIC = [
    'DhtSegmenter', 'HierarchicalTokenizer', 'OnnxModel', 'OracleResult', 'Placer', 'Prior', 'RasterToVector',
    'Regions', 'RelevanceTask', 'add_placer', 'animate', 'attention_saliency', 'compile', 'draw_hierarchy',
    'draw_placement', 'draw_priors', 'draw_pruning', 'draw_reconstruction', 'draw_region_means', 'draw_regions',
    'draw_seen', 'draw_trajectory', 'export_model', 'list_placers', 'list_samplers', 'load_saliency',
    'optimize_positions', 'push_to_hub', 'register_placer', 'register_sampler', 'retrofit', 'sample_positions',
    'sample_windows', 'sparsify', 'spectral_residual', 'vectorize',
]
TREE = ast.parse(Path(timm_spot.__file__).read_text('utf-8'))


def test_import_registers_models_and_loads_nothing_else():
    result = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, check=True, timeout=300)
    answer = json.loads(result.stdout)
    assert answer['modules'] == []
    assert answer['names'] and all(name.startswith(('spot_', 'relevance_', 'dht_')) for name in answer['names'])


def test_public_names_are_frozen():
    offered = {
        name for name in dir(timm_spot) if not name.startswith('_')
        and getattr(getattr(timm_spot, name), '__module__', '').startswith('timm_spot')}
    assert offered == set(PUBLIC)


@pytest.mark.parametrize('name', PUBLIC)
def test_public_names_are_documented(name):
    value = getattr(timm_spot, name)
    assert callable(value) and inspect.getdoc(value)


def test_what_an_editor_sees_is_what_loads_on_first_use():
    """The imports under TYPE_CHECKING and the table by which names load say the same, and both are true."""
    block, = (node for node in TREE.body if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING')
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)  # a re-export, says PEP 484
    assert seen == {name: f'tasks.{module}' for name, module in timm_spot._TASKS.items()}
    for name, module in timm_spot._TASKS.items():
        value = getattr(importlib.import_module(f'timm_spot.tasks.{module}'), name)
        assert getattr(timm_spot, name) is value and value.__module__ == f'timm_spot.tasks.{module}'


def test_the_package_says_that_it_is_typed():
    assert (Path(timm_spot.__file__).parent / 'py.typed').is_file()
