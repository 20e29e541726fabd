"""Run timm's own, unmodified tests/test_models.py on our names.

    python tests/run_timm_tests.py [NAME_PATTERN ...]

By default spot_vit_tiny*, spot_vit_pico*, spot_retrofit and dht_vit_pico*.

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

import timm

import timm_spot  # noqa: F401  registers the models

Patterns = Union[str, Sequence[str]]
_list_models, _list_pretrained = timm.list_models, timm.list_pretrained


def _select(names: Sequence[str], keep: Patterns, drop: Patterns) -> List[str]:
    """Names that match timm's patterns for `vit_*` by what follows `spot_` or `dht_`."""
    def matches(name: str, patterns: Patterns) -> bool:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        as_vit = name.replace('spot_retrofit', 'vit_retrofit').removeprefix('spot_').removeprefix('dht_')
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
    names = _list_models(['spot_*', 'dht_*'], pretrained=pretrained, include_tags=include_tags)
    return _select(names, filter, exclude_filters)


def _list_our_pretrained(filter: Patterns = '', exclude_filters: Patterns = '') -> List[str]:
    return _select(_list_pretrained('spot_*') + _list_pretrained('dht_*'), filter, exclude_filters)


if 'SPOT_NAMES' in os.environ:
    timm.list_models, timm.list_pretrained = _list_ours, _list_our_pretrained


def main() -> int:
    names = ' '.join(sys.argv[1:]) or 'spot_vit_tiny* spot_vit_pico* spot_retrofit dht_vit_pico*'
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
        # pixels, which FX, TorchScript and the meta device (non_std) cannot follow; its features are tokens with their
        # mask and regions, where the test of pruning takes them for one tensor.
        chosen = '(spot_ or (dht_ and not (fx or torchscript or non_std or prune))) and not load_pretrained'
        command = ['-m', 'pytest', '-q', '-p', 'run_timm_tests', '-k', chosen, str(tests)]
        return subprocess.run([sys.executable, *command], env=environment, cwd=tests.parents[1], check=False).returncode


if __name__ == '__main__':
    sys.exit(main())
