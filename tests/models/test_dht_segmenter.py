from __future__ import annotations

import pytest
import timm
import torch
from dht_golden import load, tokenizer_settings

import timm_spot


@pytest.fixture
def golden():
    tensors, config = load('dense_64x64')
    backbone = timm.create_model(
        'dht_vit_pico_patch8_64', embed_dim=32, depth=2, num_heads=4, qk_norm=True, pos_size=4, pos_scale=8,
        n_tokens=config['target'], strict=False, tokenizer=tokenizer_settings(config))
    model = timm_spot.DhtSegmenter(backbone, 5, last_blocks=2, mlp=True)
    weights = {k.removeprefix('model.'): v for k, v in tensors.items() if k.startswith('model.')}
    return tensors, model.load_authors(weights).eval()


@torch.no_grad()
def test_golden(golden):
    tensors, model = golden
    features = model.forward_features(tensors['image'])
    assert torch.equal(features.mask, tensors['mask'])
    assert torch.equal(features.regions.segmentation, tensors['seg'].long())
    torch.testing.assert_close(features.tokens * features.mask[:, :, None], tensors['normed'], atol=1e-4, rtol=0)
    logits = model.head(features.tokens)
    torch.testing.assert_close(logits[features.mask], tensors['token_logits'][features.mask], atol=1e-4, rtol=0)
    # Rows under the mask without class tokens are the regions, in the order of their ids.
    pixels = tensors['token_logits'][:, 1:][tensors['mask'][:, 1:]][tensors['seg'].long()].permute(0, 3, 1, 2)
    torch.testing.assert_close(model(tensors['image']), pixels, atol=1e-4, rtol=0)


def test_loss_falls(golden):
    tensors, model = golden
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        loss = model.loss(tensors['image'], tensors['labels'].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_weights_that_do_not_suit_are_refused(golden):
    tensors, model = golden
    weights = {k.removeprefix('model.'): v for k, v in tensors.items() if k.startswith('model.')}
    del weights['norm.weight']
    with pytest.raises(ValueError, match=r'(?s)do not suit this model.*"norm.weight"'):
        model.load_authors(weights)
    with pytest.raises(ValueError, match='state_dict holds a NoneType'):
        model.load_authors(None)


def test_wrong_backbone():
    with pytest.raises(TypeError, match='got VisionTransformer'):
        timm_spot.DhtSegmenter(timm.create_model('vit_tiny_patch16_224', depth=1), 5)
    with pytest.raises(ValueError, match='last_blocks=2 must lie in'):
        timm_spot.DhtSegmenter(timm.create_model('dht_vit_pico_patch8_64', depth=1), 5, last_blocks=2)
