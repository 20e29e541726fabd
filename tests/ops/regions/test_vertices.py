from __future__ import annotations

import pytest
import torch
from dht_golden import make_tokenizer

from timm_spot.ops.regions.vertices import vertices_for_budget


@pytest.mark.parametrize('target', [1, 60, 300, 1024, 2000])
@torch.no_grad()
def test_the_coarsest_level_that_has_enough(target):
    tokenizer = make_tokenizer('released_64x64')
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[1] = images[1].mean()  # flat: one vertex from level 1 on
    features = tokenizer.conv(images)
    hierarchy = tokenizer.build(features)
    pieces = vertices_for_budget(hierarchy, features, target)
    partitions = [torch.arange(2 * 32 * 32).view(2, 32, 32), *hierarchy.segmentations((2, 32, 32))[:2]]
    for i in range(2):
        counts = [len(p[i].unique()) for p in partitions]
        level = max([t for t, n in enumerate(counts) if n >= target], default=0)
        mine = pieces.segmentation[i]
        assert torch.equal(mine - mine.min(), partitions[level][i] - partitions[level][i].min())
        assert (pieces.image == i).sum() == counts[level]
        table = hierarchy.levels[level - 1].features if level else features.transpose(0, 1).flatten(1)
        assert torch.equal(pieces.features[:, mine], table[:, partitions[level][i]])
    assert torch.equal(pieces.sizes, torch.bincount(pieces.segmentation.flatten()))
    y, x = (pieces.segmentation[0] == 0).nonzero().T
    assert pieces.boxes[:, 0].tolist() == [y.min(), x.min(), y.max(), x.max()]
    u, v = pieces.edges
    assert (u < v).all() and torch.equal(pieces.image[u], pieces.image[v])
