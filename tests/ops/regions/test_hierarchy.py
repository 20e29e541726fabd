from __future__ import annotations

import pytest
import torch
from dht_golden import MAIN, load, make_tokenizer, same_partition


@pytest.mark.parametrize('name', MAIN)
@torch.no_grad()
def test_golden_levels(name):
    tensors, _ = load(name)
    tokenizer = make_tokenizer(name)
    if 'pixel_features' in tensors:
        features = tensors['pixel_features'].permute(0, 3, 1, 2)
    else:
        features = tokenizer.conv(tensors['image'])
    B, _, H, W = features.shape
    hierarchy = tokenizer.build(features)
    partitions = hierarchy.segmentations((B, H, W))
    for i in range(B):
        counts = tensors[f'img{i}/vertex_counts'].tolist()
        for t, (level, partition) in enumerate(zip(hierarchy.levels[:len(counts) - 1], partitions), 1):
            key, mine = f'img{i}/level{t}', level.image == i
            seg = partition[i] - partition[i].min()
            assert mine.sum() == counts[t]
            assert torch.equal(seg, tensors[f'{key}/seg'].long())
            if f'{key}/best' in tensors:
                best = level.best[hierarchy.levels[0].parent.view(B, H, W)]
                assert same_partition(best[i], tensors[f'{key}/best'])
            if f'{key}/features' not in tensors:
                continue
            below = hierarchy.levels[t - 2].image == i if t > 1 else slice(i * H * W, (i + 1) * H * W)
            torch.testing.assert_close(level.weight[below], tensors[f'{key}/weight'], atol=3e-5, rtol=0)
            torch.testing.assert_close(level.features[:, mine].T, tensors[f'{key}/features'], atol=3e-5, rtol=0)
            torch.testing.assert_close(level.variances[:, mine].T, tensors[f'{key}/variance'], atol=3e-5, rtol=0)
            torch.testing.assert_close(level.criterion[mine], tensors[f'{key}/criterion'], atol=0, rtol=1e-5)
            assert torch.equal(level.sizes[mine], tensors[f'{key}/size'].long())
            assert torch.equal(level.boxes[:, mine], tensors[f'{key}/box'].long())
        # An image that has stopped stays as it is while others go on.
        assert [(level.image == i).sum() for level in hierarchy.levels[len(counts) - 1:]] == (
            [counts[-1]] * (len(hierarchy.levels) - len(counts) + 1))
        torch.testing.assert_close(
            hierarchy.whole.criterion[i, None], tensors[f'img{i}/whole/criterion'], atol=0, rtol=1e-5)
        whole = hierarchy.whole.best[hierarchy.levels[0].parent.view(B, H, W)]
        assert same_partition(whole[i], tensors[f'img{i}/whole/best'])


@torch.no_grad()
def test_a_stopped_image_keeps_its_vertices():
    """Beside an image that goes on, the vertices of a stopped one have the features they had alone."""
    tokenizer = make_tokenizer('random_64x64')
    features = load('random_64x64')[0]['pixel_features'].permute(0, 3, 1, 2)
    flat = torch.zeros_like(features[:1])  # one vertex after the first level
    together = tokenizer.build(torch.cat([flat, features[:1]]))
    alone = tokenizer.build(flat)
    assert len(together.levels) > len(alone.levels)
    mine = together.levels[-1].image == 0
    # Up to rounding, as the sums of a batch have another shape; an image that went on would move by far more.
    torch.testing.assert_close(
        together.levels[-1].features[:, mine], alone.levels[-1].features, atol=1e-6, rtol=1e-6)
