from __future__ import annotations

import re
from pathlib import Path

import pytest

from timm_spot.tasks import extras
from timm_spot.tasks.extras import install_hint, need

PYPROJECT = Path(__file__).parents[2] / 'pyproject.toml'


@pytest.mark.parametrize('name, says', [
    ('matplotlib', "this needs matplotlib: pip install 'timm-spot[viz]' (in a clone: pip install '.[viz]')."),
    ('sklearn.datasets', "this needs sklearn: pip install 'timm-spot[train]' (in a clone: pip install '.[train]')."),
    ('onnxruntime', "this needs onnxruntime: pip install 'timm-spot[export]' (in a clone: pip install '.[export]')."),
    ('datasets', 'this needs datasets: pip install datasets'),
    ('timm', None),
    (None, None),
])
def test_hint_names_the_extra(name, says):
    assert install_hint(ModuleNotFoundError('No module', name=name)) == says


def test_a_hint_that_is_one_already_stays():
    assert install_hint(ModuleNotFoundError('x: pip install y', name='matplotlib')) == 'x: pip install y'


def test_need_passes_what_is_there_and_says_how_to_get_the_rest(monkeypatch):
    need('json')
    monkeypatch.setitem(extras._EXTRAS, 'no_such_module', 'viz')
    with pytest.raises(ModuleNotFoundError, match=r"this needs no_such_module: pip install 'timm-spot\[viz\]'"):
        need('no_such_module')


def test_every_extra_that_is_named_exists():
    section = PYPROJECT.read_text('utf-8').split('[project.optional-dependencies]')[1].split('\n[')[0]
    assert set(extras._EXTRAS.values()) <= set(re.findall(r'^(\w+) = ', section, re.MULTILINE))
