from __future__ import annotations

import csv
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import SMALL
from PIL import Image
from torch import nn

import timm_spot
from timm_spot.cli import main
from timm_spot.tasks.drawing.kinds import KINDS, Kind
from timm_spot.tasks.evaluation import families
from timm_spot.tasks.evaluation.families import Family, family_of, list_families, name_patterns, register_family
from timm_spot.tasks.evaluation.plan import plan_rows
from timm_spot.tasks.evaluation.request import Request
from timm_spot.tasks.evaluation.ways import ImageBatch, Way
from timm_spot.tasks.pictures.datasets import Pictures


@pytest.fixture
def folder(tmp_path):
    for label in range(10):
        (tmp_path / 'data' / str(label)).mkdir(parents=True)
        Image.effect_noise((64, 64), 20 + 9 * label).convert('RGB').save(tmp_path / 'data' / str(label) / '0.png')
    return tmp_path / 'data'


# A family in one file: a model whose tokens are the mean colours of a lattice of fields.
class Fields(nn.Module):
    num_classes = 10
    pretrained_cfg = dict(
        architecture='toy_fields', input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.,
        label_names=tuple('0123456789'))

    def __init__(self):
        super().__init__()
        self.n_tokens = 16
        self.head = nn.Linear(3, 10)

    def forward_features(self, images, n_tokens=None):
        side = math.isqrt(n_tokens or self.n_tokens)
        return F.adaptive_avg_pool2d(images, (side, side)).flatten(2).transpose(1, 2)

    def forward_head(self, tokens, pre_logits=False):
        return tokens.mean(1) if pre_logits else self.head(tokens.amax(1))

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


@timm.models.register_model
def toy_fields(pretrained=False, **kwargs):
    torch.manual_seed(0)
    return Fields()


def fields_ways(model, request):
    for n in request.budgets:
        yield Way('fields', 'fields', n, partial(lambda model, batch, n: model.forward_features(batch.images, n), n=n))


def draw_fields(subject, settings, path):
    side = math.isqrt(subject.model.n_tokens)
    colours = F.adaptive_avg_pool2d(subject.picture, (side, side)).mul(255).byte()
    Image.fromarray(colours.permute(1, 2, 0).numpy()).save(path)


@pytest.fixture
def fields(monkeypatch):
    monkeypatch.setattr(families, '_FAMILIES', list(families._FAMILIES))
    monkeypatch.setitem(KINDS, 'fields', Kind(draw_fields, 'mean colours of fields'))
    return register_family(Family(
        name='toy', patterns=('toy_*',), suits=lambda model: isinstance(model, Fields), ways=fields_ways,
        kinds=('fields',), set_budget=lambda model, n_tokens: setattr(model, 'n_tokens', n_tokens)))


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_family_of_ones_own_is_evaluated_drawn_and_predicted(fields, folder, tmp_path):
    result = run('evaluate', folder, '--model', 'toy_fields', '--budgets', '4,9', '--out', tmp_path / 'out')
    assert result.exit_code == 0, result.output
    found = list(csv.DictReader((tmp_path / 'out' / 'results.csv').read_text().splitlines()))
    assert [(row['kind'], row['sampler'], row['n_tokens']) for row in found] == [
        ('fields', 'fields', '4'), ('fields', 'fields', '9')]
    assert '| fields | ' in result.output and 'fields' in (tmp_path / 'out' / 'report.html').read_text()

    picture = folder / '0' / '0.png'
    result = run('draw', picture, '--model', 'toy_fields', '--n-tokens', 9, '--out', tmp_path / 'drawn.png')
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / 'drawn.png') as drawn:
        assert drawn.size == (3, 3)

    result = run('predict', picture, '--model', 'toy_fields', '--n-tokens', 4, '--save-placement', tmp_path / 'p.png')
    assert result.exit_code == 0 and result.stdout.count('%') == 5, result.output
    with Image.open(tmp_path / 'p.png') as drawn:
        assert drawn.size == (2, 2)
    result = run('predict', picture, '--model', 'toy_fields', '--sampler', 'sobol')
    assert result.exit_code == 1 and "a toy model's tokens lie where it finds them itself" in result.output
    result = run('draw', picture, '--model', 'toy_fields', '--kind', 'seen', '--out', tmp_path / 'none.png')
    assert result.exit_code == 1 and 'does not suit' in result.output


def test_the_last_family_that_suits_counts(fields, pico):
    assert family_of(toy_fields()) is fields and list_families()[-1] is fields
    assert name_patterns()[-1] == 'toy_*'
    with pytest.raises(ValueError, match="name='toy' is already a family"):
        register_family(fields)


@pytest.mark.parametrize('name, family, kind', [
    ('spot_vit_pico_patch8_64', 'subpixel', 'placement'),
    ('relevance_spot_vit_pico_patch8_64', 'subpixel', 'placement'),
    ('dht_vit_pico_patch8_64', 'dHT', 'regions'), ('relevance_deit_tiny_patch16_224', 'pruned', None),
    ('test_vit', 'dense', None), ('test_resnet', 'dense', None)])
def test_every_timm_model_has_a_family(name, family, kind):
    found = family_of(timm.create_model(name, device='meta'))
    assert found.name == family and next(iter(found.kinds), None) == kind
    ours = timm.list_models(name_patterns())
    assert (name in ours) == (family != 'dense')
    assert set(found.kinds) <= set(KINDS)


def test_budgets_are_set_by_the_family(pico):
    torch.manual_seed(0)
    dht = timm.create_model('dht_vit_pico_patch8_64', embed_dim=32, depth=1)
    for model in (pico, dht):
        family_of(model).set_budget(model, 9)
        assert model.n_tokens == 9
    vit = timm.create_model('test_vit')
    with pytest.raises(ValueError, match='n_tokens=9: VisionTransformer has a token for each patch and no budget'):
        family_of(vit).set_budget(vit, 9)


def test_a_placer_of_ones_own_has_a_row_at_each_budget(folder, monkeypatch):
    from timm_spot.models import placement

    monkeypatch.setattr(placement, '_PLACERS', dict(placement._PLACERS))

    @timm_spot.register_placer('diagonal')
    class Diagonal(timm_spot.Placer):
        def __init__(self, train_prior, eval_prior):
            super().__init__(train_prior, eval_prior)
            self.shift = nn.Parameter(torch.tensor(0.01))

        def forward(self, images):
            n = self.budget(images.shape[-2:])
            at = (torch.arange(n, device=images.device) + 0.5) / n + self.shift
            return at[:, None].expand(len(images), -1, 2)

    torch.manual_seed(0)
    model = timm.create_model('spot_vit_pico_patch8_64', placer='diagonal', n_tokens=7, **SMALL).eval()
    planned = plan_rows({'model': model}, Pictures(str(folder)), Request(samplers=('grid',), budgets=(4, 9)))
    assert [(p.row.kind, p.row.sampler, p.row.n_tokens) for p in planned] == [
        ('sampler', 'grid', 4), ('sampler', 'grid', 9), ('placer', 'diagonal', 4), ('placer', 'diagonal', 9)]
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    at = ((torch.arange(4) + 0.5) / 4 + 0.01)[:, None].expand(2, -1, 2)
    batch = ImageBatch(images, torch.zeros(2), torch.arange(2), ['', ''], seed=0)
    with torch.inference_mode():
        torch.testing.assert_close(planned[2].tokens(model, batch), model.forward_features(images, at))
    assert model.n_tokens == 7
