from __future__ import annotations

import pytest
import timm
import torch

from timm_spot.tasks.evaluation.flops import count_flops


def by_hand(tokens, dim, depth, window, nodes, classes):
    """Two operations for each multiplication of windows, positions, qkv, both attention products, projection, MLP."""
    length = tokens + 1
    embed = tokens * dim * (3 * window ** 2 + nodes ** 2)
    block = 4 * length * dim ** 2 + 2 * length ** 2 * dim + 8 * length * dim ** 2
    return 2 * (embed + depth * block + dim * classes)


@pytest.mark.parametrize('n_tokens', [9, 64])
def test_subpixel_vit(pico, n_tokens):
    pico.set_placement(n_tokens=n_tokens)
    with torch.inference_mode():
        counted = count_flops(pico, torch.zeros(1, 3, 64, 64))
    assert counted == pytest.approx(by_hand(n_tokens, 128, 5, 8, 16, 10), rel=0.01)


def test_base_vit_has_its_published_count():
    # `Training data-efficient image transformers`, https://arxiv.org/abs/2012.12877: 17.6 G multiply-additions.
    with torch.device('meta'):
        vit = timm.create_model('vit_base_patch16_224').eval()
        counted = count_flops(vit, torch.zeros(1, 3, 224, 224))
    assert counted / 2e9 == pytest.approx(17.6, rel=0.01)
