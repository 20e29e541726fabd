from __future__ import annotations

import numpy as np
import pytest
import torch

from timm_spot.tasks.deploy.onnx_family import open_classifier
from timm_spot.tasks.evaluation.families import family_of
from timm_spot.tasks.evaluation.request import Request
from timm_spot.tasks.evaluation.ways import ImageBatch
from timm_spot.tasks.kept import weights_digest
from timm_spot.tasks.pictures.images import model_transform


def test_a_file_in_the_place_of_a_model(tiny, float_file, fixed_file):
    model = open_classifier(float_file)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), tiny(images), rtol=0, atol=1e-4)
    assert model.num_classes == 3 and str(model_transform(model)) == str(model_transform(tiny))
    assert weights_digest(model) != weights_digest(open_classifier(fixed_file))
    assert family_of(model).name == 'frozen' and family_of(tiny).name == 'subpixel'


def test_bytes_come_back_from_normalised_images(tiny, fixed_file):
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    model = open_classifier(fixed_file)
    answer = model(tiny.patch_embed.normalize(pixels))
    np.testing.assert_array_equal(answer.numpy(), model.file(pixels.numpy()))


def test_rows_are_its_own_placement_at_each_budget(tiny, float_file, fixed_file):
    model = open_classifier(float_file)
    family = family_of(model)
    ways = list(family.ways(model, Request(samplers=('uniform',), budgets=(4, 9))))
    assert [(way.kind, way.sampler, way.n_tokens, way.stochastic) for way in ways] == [
        ('sampler', 'isotropic', 4, False), ('sampler', 'isotropic', 9, False)]
    assert 0 < ways[0].flops < ways[1].flops
    images = torch.randn(2, 3, 64, 64)
    batch = ImageBatch(images, torch.zeros(2), torch.arange(2), ['a', 'b'], 0)
    lattice = torch.tensor([[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]])
    torch.testing.assert_close(
        model.forward_head(ways[0].tokens(model, batch)), tiny(images, lattice), rtol=0, atol=1e-4)
    fixed = open_classifier(fixed_file)
    way, = family.ways(fixed, Request(budgets=(4, 9)))
    assert way.n_tokens == 9 and way.flops == pytest.approx(ways[1].flops)


def test_what_a_file_has_not(float_file, fixed_file):
    with pytest.raises(ValueError, match=r'n_tokens=4: fixed\.onnx has 9 tokens alone'):
        open_classifier(fixed_file, 4)
    model = open_classifier(float_file)
    with pytest.raises(ValueError, match=r'n_tokens=5000 exceeds'):
        list(family_of(model).ways(model, Request(budgets=(5000,))))
    with pytest.raises(ValueError, match=r"amp='bfloat16': any\.onnx has the precision"):
        list(family_of(model).ways(model, Request(budgets=(4,), amp='bfloat16')))
