"""What CONTRIBUTING shows a newcomer runs as it stands."""
from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import SMALL

from timm_spot.models import placement
from timm_spot.ops import samplers
from timm_spot.tasks.evaluation import families, studies
from timm_spot.tasks.evaluation.study_pictures import StudyPictures

TEXT = (Path(__file__).parents[1] / 'CONTRIBUTING.md').read_text('utf-8')
BLOCKS = dict(re.findall(r'^## (A [^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```', TEXT, re.S | re.M))
PICO = 'spot_vit_pico_patch8_64'


@pytest.fixture
def run(monkeypatch):
    """Runs a block, with registries that forget it afterwards."""
    monkeypatch.setattr(samplers, '_SAMPLERS', dict(samplers._SAMPLERS))
    monkeypatch.setattr(placement, '_PLACERS', dict(placement._PLACERS))
    monkeypatch.setattr(studies, 'STUDIES', dict(studies.STUDIES))
    monkeypatch.setattr(families, '_FAMILIES', list(families._FAMILIES))

    def run(title):
        names = {'__name__': 'newcomer'}
        exec(compile(BLOCKS[title], f'CONTRIBUTING.md, {title}', 'exec'), names)
        return names

    return run


def test_each_addition_takes_fewer_than_25_lines():
    lengths = {title: len(block.splitlines()) for title, block in BLOCKS.items()}
    assert set(lengths) == {
        'A sampler of your own', 'A placement network', 'A study on a folder of pictures', 'A family of models'}
    assert max(lengths.values()) < 25, lengths


def test_a_sampler(run):
    run('A sampler of your own')
    model = timm.create_model(PICO, sampler='diagonal', n_tokens=5).eval()
    y, x = model.place(torch.zeros(2, 3, 64, 64))[1].unbind(dim=-1)
    assert torch.equal(y, x)
    torch.testing.assert_close(y.diff(), torch.full((4,), 0.2))


def test_a_placement_network(run):
    run('A placement network')
    torch.manual_seed(0)
    model = timm.create_model(PICO, placer='attentive', n_tokens=5, train_only='placer')
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {'placer.look.weight', 'placer.look.bias'}
    images = torch.randn(2, 3, 64, 64)
    assert model.place(images).shape == (2, 5, 2) and not torch.equal(*model.place(images))
    model(images).square().sum().backward()
    assert model.placer.look.weight.grad.any()


def test_a_study(run, tmp_path):
    run('A study on a folder of pictures')
    torch.manual_seed(0)
    model = timm.create_model(PICO, **SMALL).eval()
    pictures = StudyPictures(torch.tensor([1, 2, 3]), lambda model: torch.randn(3, 3, 64, 64), digest='noise')
    first, second = studies.run_study('middle', {'small': model}, pictures, (4, 9), tmp_path)
    assert (first.model, first.n_tokens, second.n_tokens) == ('small', 4, 9)


def test_a_family(run):
    model = run('A family of models')['Rows']()
    family = families.family_of(model)
    assert family.name == 'rows' and 'rows_*' in families.name_patterns()
    family.set_budget(model, 3)
    assert model.n_tokens == 3
    images = torch.arange(8.).view(1, 1, 4, 2)
    way, = family.ways(model, SimpleNamespace(budgets=(2,)))
    assert way.tokens(model, SimpleNamespace(images=images)).tolist() == [[[1.5], [5.5]]]


def test_the_glossary_has_one_line_for_each_word():
    words = re.findall(r'^\| ([a-z, ]+) \| ', TEXT[TEXT.index('## Words'):TEXT.index('## Rules')], re.M)
    assert len(words) == len(set(words)) and {'position', 'placement', 'pruning', 'region', 'family'} <= set(words)
