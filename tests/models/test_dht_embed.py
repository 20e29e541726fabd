from __future__ import annotations

import pytest
import torch
from dht_golden import MAIN, load, make_model

from timm_spot.models import HierarchicalEmbed
from timm_spot.models.dht_embed import pad_tokens
from timm_spot.ops.regions.features import region_windows


@pytest.mark.parametrize('name', MAIN)
@torch.no_grad()
def test_golden(name):
    tensors, config = load(name)
    model = make_model(
        tensors, config, depth=1, num_heads=2, normalize_windows=config['normalize_interpolation'])
    features, _ = model._embed(tensors['image'])
    if 'extractor/features' in tensors:
        vectors = torch.cat([
            v.flatten(1) for v in model.patch_embed.region_vectors(features.regions) if v is not None], dim=1)
        torch.testing.assert_close(vectors, tensors['extractor/features'], atol=1e-4, rtol=0)
    if 'extractor/masks' in tensors:
        regions = features.regions
        masks = region_windows(regions.injected, regions.segmentation, regions.boxes, regions.image, 8)[1]
        torch.testing.assert_close(masks, tensors['extractor/masks'], atol=1e-5, rtol=0)
    assert torch.equal(features.mask, tensors['embedder/mask'])
    real = features.tokens * features.mask[:, :, None]
    torch.testing.assert_close(real, tensors['embedder/tokens'], atol=1e-4, rtol=0)


def test_padding():
    tokens, mask = pad_tokens(
        torch.arange(1., 5.)[:, None], torch.tensor([1, 3]), torch.tensor([0, 1, 1, 1]))
    assert tokens[..., 0].tolist() == [[1, 0, 0], [2, 3, 4]]
    assert mask.tolist() == [[True, False, False], [True, True, True]]


def test_budget_is_exact():
    embed = HierarchicalEmbed(img_size=32, patch_size=4, embed_dim=8, n_tokens=20).eval()
    assert embed.num_patches == 20
    images = torch.randn(2, 3, 32, 32)
    images[1] = 0.
    with torch.no_grad():
        tokens, mask, regions = embed(images)
    assert tokens.shape == (2, 20, 8)
    assert regions.counts.tolist() == [20, 1] and mask.sum(1).tolist() == [20, 1]
    with pytest.raises(ValueError, match='n_tokens=0'):
        embed.set_budget(0)


def test_default_budget_is_that_of_the_image():
    embed = HierarchicalEmbed(img_size=(96, 128), patch_size=4, embed_dim=8).eval()
    assert embed.num_patches == 198


@pytest.mark.parametrize('name, value', [('patch_size', (4, 8)), ('in_chans', 1)])
def test_wrong_settings(name, value):
    with pytest.raises(ValueError, match=name):
        HierarchicalEmbed(**{name: value})
