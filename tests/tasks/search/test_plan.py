from __future__ import annotations

import json

import pytest
import timm
import torch
from PIL import Image

from timm_spot.tasks.pictures.datasets import Pictures
from timm_spot.tasks.search.plan import make_plan
from timm_spot.tasks.search.settings import Search


@pytest.fixture
def pictures(tmp_path):
    for i in range(3):
        (tmp_path / 'data' / f'class{i}').mkdir(parents=True)
        Image.new('RGB', (64, 64), (80 * i, 9, 9)).save(tmp_path / 'data' / f'class{i}' / '0.png')
    return Pictures(str(tmp_path / 'data'))


def make_model(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('spot_vit_pico_patch8_64', num_classes=3, embed_dim=32, depth=1, **kwargs).eval()


def plan(model, pictures, init='isotropic', saliency=None, n_tokens=4, seed=0, batch_size=2, **search):
    return make_plan(model, pictures, Search(**search), init, saliency, n_tokens, seed, batch_size)


def differing(a, b):
    a, b = a.key(), b.key()
    assert set(a) == set(b)
    return {name for name in a if a[name] != b[name]}


def test_a_key_is_plain_and_the_same_for_the_same_plan(pictures):
    a, b = plan(make_model(), pictures), plan(make_model(), Pictures(pictures.source))
    assert a.key() == json.loads(json.dumps(a.key())) == b.key()
    assert a.labelled and a.n_tokens == 4


def test_a_key_holds_every_setting_of_the_search(pictures):
    a = plan(make_model(), pictures)
    changes = dict(
        steps=4, lr=1e-2, optimizer='sgd', optimizer_kwargs=dict(weight_decay=0.), objective='entropy', keep='best',
        bounds='clamp', patience=2, tol=0.1, record=False, amp_dtype=torch.bfloat16, chunk_size=1,
        optimize=('position', 'size'))
    assert set(changes) == set(vars(Search()))
    for name, value in changes.items():
        assert differing(a, plan(make_model(), pictures, **{name: value})) == {'search'}


def test_a_key_holds_the_saliency_where_it_counts(pictures):
    ramp = torch.linspace(0, 1, 64).expand(64, -1)

    def to_map(images):
        return images.mean(dim=1)

    class Network(torch.nn.Module):
        def __init__(self, power):
            super().__init__()
            self.power = power

        def forward(self, images):
            return images.mean(dim=1).abs() ** self.power

    for one, other, named in (
            (ramp, ramp.T.contiguous(), {'saliency'}), (to_map, 'spectral_residual', {'saliency'}),
            (Network(1), Network(2), {'saliency'})):
        a, b = (make_model(saliency=saliency) for saliency in (one, other))
        assert differing(plan(a, pictures, 'salient'), plan(b, pictures, 'salient')) == named
        assert differing(plan(a, pictures), plan(b, pictures)) == set(), 'a lattice looks at no map'
    model = make_model(saliency='spectral_residual')
    assert differing(plan(model, pictures, 'salient'), plan(model, pictures, 'salient', 'spectral')) == {'saliency'}


def test_a_key_holds_the_prior_of_the_models_own_placer(pictures):
    a = plan(make_model(sampler='uniform'), pictures, 'sampled')
    assert differing(a, plan(make_model(sampler='uniform'), pictures, 'sampled')) == set()
    assert differing(a, plan(make_model(sampler='uniform', seed=1), pictures, 'sampled')) == {'placer'}
    assert differing(a, plan(make_model(sampler='sobol'), pictures, 'sampled')) == {'placer'}


def test_a_key_holds_the_sizes_of_the_start(pictures):
    plain, covering = make_model(), make_model(coverage=1.)
    assert 'coverage' not in plan(plain, pictures).key() and plan(covering, pictures).key()['coverage'] == 1.
    covering.set_placement(coverage=(0., 1.), eval_coverage=0.5)
    assert plan(covering, pictures).key()['coverage'] == 0.5
    mixed = plan(plain, pictures, 'coarse+center').key()
    plain.set_placement(n_coarse=2)
    assert (mixed['n_coarse'], plan(plain, pictures, 'coarse+center').key()['n_coarse']) == (1, 2)
    a, b = (plan(make_model(coverage=coverage), pictures, 'sampled') for coverage in (0.5, 1.))
    assert differing(a, b) == {'placer'}


def test_starts_with_sizes_are_refused_under_one_size(pictures):
    with pytest.raises(ValueError, match=r"'coarse\+center' at coverage=0\.0 asks for sizes, but under"):
        plan(make_model(convention='spot'), pictures, 'coarse+center')


def test_an_objective_that_is_a_function_has_no_key(pictures):
    with pytest.raises(TypeError, match='must be a name'):
        plan(make_model(), pictures, objective=lambda logits: logits.sum(dim=1))


def test_a_key_holds_the_weights_of_an_attention_saliency(pictures, tmp_path):
    keys = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        vit = timm.create_model('vit_tiny_patch16_224', depth=1, img_size=32, embed_dim=12, num_heads=1, num_classes=2)
        timm.models.save_for_hf(vit, tmp_path / 'vit', model_args=dict(depth=1, img_size=32, embed_dim=12, num_heads=1))
        keys.append(plan(make_model(), pictures, 'salient', f'attention:local-dir:{tmp_path}/vit').key())
    assert keys[0] == keys[1] and {k for k in keys[0] if keys[0][k] != keys[2][k]} == {'saliency'}
