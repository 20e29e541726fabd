from __future__ import annotations

import pytest
import timm
import torch

import timm_spot
from timm_spot.models.pruning_vit import RelevanceSubpixelVisionTransformer, RelevanceVisionTransformer


def test_an_instance_stays_as_it_is():
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = vit(images)
    model = timm_spot.sparsify(vit, keep_rate=0.5, scorer='norm')
    assert type(model) is RelevanceVisionTransformer and not isinstance(vit, RelevanceVisionTransformer)
    assert model.blocks[0] is not vit.blocks[0] and not model.training
    assert torch.equal(vit(images), expected)
    with pytest.raises(TypeError, match='a model that is already built takes no pretrained'):
        timm_spot.sparsify(vit, pretrained=True)


def test_a_subpixel_vit_keeps_its_placement(pico):
    model = timm_spot.sparsify(pico, keep_rate=0.5, scorer='norm')
    assert type(model) is RelevanceSubpixelVisionTransformer
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(model.place(images), pico.place(images))
    model.set_placement(n_tokens=9)
    assert [index.shape[1] for index in model.kept_tokens(images)] == [5, 2, 1]  # halves, rounded half up


@pytest.mark.parametrize('name, reason', [
    ('resnet18', 'it is a ResNet, not a timm VisionTransformer'),
    ('eva02_tiny_patch14_224', 'it is a Eva'),
    ('deit_tiny_distilled_patch16_224', 'distillation token'),
    ('relevance_deit_tiny_patch16_224', 'drops tokens already: set_keep_rate'),
])
def test_other_models_are_refused_by_name_and_reason(name, reason):
    with torch.device('meta'):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=f'^{name} .*{reason}'):
        timm_spot.sparsify(model)
    with pytest.raises(TypeError, match='got int'):
        timm_spot.sparsify(3)
