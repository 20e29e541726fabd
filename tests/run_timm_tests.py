"""Run timm's own, unmodified tests/test_models.py on our names.

    python tests/run_timm_tests.py [NAME_PATTERN ...]

By default spot_vit_tiny*, spot_vit_pico*, spot_retrofit, relevance_deit_tiny* and dht_vit_pico*.

Downloads timm's source distribution of the installed version with pip, which holds the tests. This file is also the
pytest plugin that makes timm's listing functions see our models only, and classify them as the ViTs they are.
"""
from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, List, Sequence, Union

import pytest
import timm

import timm_spot  # noqa: F401  registers the models
from timm_spot.tasks.evaluation.families import name_patterns

Patterns = Union[str, Sequence[str]]
_TORCHSCRIPT = 'timm deprecates TorchScript and a scripted model would call back into Python: torch.export is the way'
_LEFT_OUT = {
    'test_model_forward_torchscript': _TORCHSCRIPT,
    'test_model_forward_fx_torchscript': _TORCHSCRIPT,
}
_list_models, _list_pretrained = timm.list_models, timm.list_pretrained


def _select(names: Sequence[str], keep: Patterns, drop: Patterns) -> List[str]:
    """Names that match timm's patterns for `vit_*` and `deit_*` by what follows the prefix of their family."""
    def matches(name: str, patterns: Patterns) -> bool:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        as_vit = name.replace('spot_retrofit', 'vit_retrofit')
        prefixes = [pattern.removesuffix('*') for pattern in name_patterns()]
        as_vit = as_vit.removeprefix(max((p for p in prefixes if as_vit.startswith(p)), key=len, default=''))
        return any(fnmatch.fnmatch(as_vit, p) for p in patterns)

    ours = [n for n in names if any(fnmatch.fnmatch(n, p) for p in os.environ['SPOT_NAMES'].split())]
    return [n for n in ours if (not keep or matches(n, keep)) and not (drop and matches(n, drop))]


def _list_ours(
        filter: Patterns = '',
        module: Patterns = '',
        pretrained: bool = False,
        exclude_filters: Patterns = '',
        include_tags: bool = False,
        **_: Any,
) -> List[str]:
    if module and 'vision_transformer' not in ([module] if isinstance(module, str) else module):
        return []
    ours = _list_models(name_patterns(), pretrained=pretrained, include_tags=include_tags)
    return _select(ours, filter, exclude_filters)


def _list_our_pretrained(filter: Patterns = '', exclude_filters: Patterns = '') -> List[str]:
    return _select(_list_pretrained(name_patterns()), filter, exclude_filters)


if 'SPOT_NAMES' in os.environ:
    timm.list_models, timm.list_pretrained = _list_ours, _list_our_pretrained


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    """Skip what cannot apply: TorchScript."""
    for item in items:
        test = item.name.partition('[')[0]
        reason = _LEFT_OUT.get(test)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def main() -> int:
    names = ' '.join(sys.argv[1:]) or 'spot_vit_tiny* spot_vit_pico* spot_retrofit relevance_deit_tiny* dht_vit_pico*'
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm', '--dest', folder,
             f'timm=={timm.__version__}'], check=True)
        archive, = Path(folder).glob('timm-*.tar.gz')
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter='data')
        tests = Path(folder) / archive.name.removesuffix('.tar.gz') / 'tests' / 'test_models.py'
        environment = dict(os.environ, SPOT_NAMES=names, PYTHONPATH=str(Path(__file__).parent))
        # test_model_load_pretrained downloads weights from the Hub. How many tokens a dHT model makes depends on the
        # pixels, which FX and the meta device (non_std) cannot follow; its features are tokens with their mask and
        # regions, where the test of pruning takes them for one tensor.
        which = 'spot_ or relevance_ or (dht_ and not (fx or non_std or prune))'
        which = f'({which}) and not load_pretrained'
        command = [sys.executable, '-m', 'pytest', '-q', '-rs', '-p', 'run_timm_tests', '-k', which, str(tests)]
        return subprocess.run(command, env=environment, cwd=tests.parents[1], check=False).returncode


if __name__ == '__main__':
    sys.exit(main())
