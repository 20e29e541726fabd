from __future__ import annotations

import math

import pytest
import torch
from dht_golden import MAIN, load, make_tokenizer, same_partition
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot.ops.regions.hierarchy import build_hierarchy


def similarity(variances):
    return torch.zeros(variances.shape[1])


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
    torch.testing.assert_close(
        together.levels[-1].features[:, mine], alone.levels[-1].features, atol=0, rtol=0)


@torch.no_grad()
def test_a_stopped_image_keeps_its_variances():
    """They tell a vertex's similarity to itself, and a region's criterion: both are what they are alone."""
    tokenizer = make_tokenizer('random_64x64')
    rough = load('random_64x64')[0]['pixel_features'].permute(0, 3, 1, 2)[:1]
    tokenizer.min_avg_region = 64
    smooth = rough.cumsum(2).cumsum(3) / 100.  # merges faster, and stops first
    together, alone = tokenizer.build(torch.cat([smooth, rough])), tokenizer.build(smooth)
    assert len(together.levels) > len(alone.levels) and alone.levels[-1].variances.any()
    for level in together.levels[len(alone.levels) - 1:]:
        mine = level.image == 0
        assert mine.sum() == len(alone.levels[-1].sizes)
        torch.testing.assert_close(level.variances[:, mine], alone.levels[-1].variances, atol=0, rtol=0)
        torch.testing.assert_close(level.sizes[mine], alone.levels[-1].sizes, atol=0, rtol=0)


@pytest.mark.parametrize('shape, pieces', [
    # One region where -(ln 5 + penalty of m pixels without variance) >= -sqrt(m): -2.34 and -2 at four pixels, -2.08
    # and -2.24 at five.
    ((1, 1), 1), ((1, 2), 2), ((1, 3), 3), ((2, 2), 4), ((1, 4), 4), ((1, 5), 1), ((5, 1), 1), ((1, 6), 1),
    ((2, 3), 1)])
def test_flat_images_of_a_few_pixels_by_hand(shape, pieces):
    hierarchy = build_hierarchy(torch.zeros(1, 3, *shape), similarity)
    assert hierarchy.levels == []
    found = hierarchy.pieces
    assert len(found.sizes) == pieces and found.sizes.sum() == math.prod(shape)
    if pieces == 1:
        assert found.segmentation.unique().tolist() == [0] and found.edges.shape == (2, 0)
        assert found.boxes.flatten().tolist() == [0, 0, shape[0] - 1, shape[1] - 1]


def test_a_rough_image_of_a_few_pixels_is_its_pixels():
    rough = 1000. * torch.tensor([1., -1., 1., -1., 1.]).expand(1, 3, 1, 5)
    found = build_hierarchy(rough, similarity).pieces
    assert found.segmentation.flatten().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(found.features, rough[0, :, 0])
    # Beside a flat one, which is one region, in one batch.
    found = build_hierarchy(torch.cat([torch.zeros_like(rough), rough]), similarity).pieces
    assert found.segmentation.flatten().tolist() == [0] * 5 + [1, 2, 3, 4, 5]
    assert found.image.tolist() == [0] + [1] * 5
    assert found.edges.tolist() == [[1, 2, 3, 4], [2, 3, 4, 5]]


@pytest.mark.parametrize('limit', [dict(min_avg_region=64), dict(min_avg_region=10 ** 9), dict(max_levels=0)])
def test_no_level_at_all(limit):
    features = torch.zeros(2, 3, 8, 8, requires_grad=True)
    hierarchy = build_hierarchy(features, similarity, **limit)
    assert hierarchy.levels == [] and hierarchy.segmentations((2, 8, 8)) == []
    assert hierarchy.pieces.segmentation.flatten(1).unique(dim=1).tolist() == [[0], [1]]
    assert hierarchy.pieces.sizes.tolist() == [64, 64]
    hierarchy.pieces.features.sum().backward()
    assert torch.equal(features.grad, torch.full_like(features, 1 / 64))  # each piece has its image's mean


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(0, 40), st.integers(0, 3), st.sampled_from([1., 30., 1000.]),
    st.integers(0, 99))
def test_small_images_alone_and_in_a_batch(height, width, min_avg_region, max_levels, spread, seed):
    features = spread * torch.randn(3, 2, height, width, generator=torch.Generator().manual_seed(seed))
    features[1] = 0.
    limits = dict(min_avg_region=min_avg_region, max_levels=max_levels)
    together = build_hierarchy(features, similarity, **limits).pieces
    for i in range(3):
        alone = build_hierarchy(features[i:i + 1], similarity, **limits).pieces
        segmentation = together.segmentation[i]
        assert torch.equal(segmentation - segmentation.min(), alone.segmentation[0])
        assert torch.equal(together.sizes[together.image == i], alone.sizes)
        assert torch.equal(together.features[:, together.image == i], alone.features)


def pairs_and_quads():
    """A row of 64 pixels: pairs are equal, quads are alike, each other's neighbours are not."""
    pair = torch.arange(32).repeat_interleave(2)
    return (10. * (pair // 2) + 0.5 * (pair % 2)).expand(1, 3, 1, 64)


def test_levels_by_hand():
    """Pairs are no better than pixels, quads are: an image goes on after a first level that no region gave way to."""
    hierarchy = build_hierarchy(pairs_and_quads(), similarity, cmp=0., max_levels=2)
    assert [len(level.sizes) for level in hierarchy.levels] == [32, 16]
    assert torch.equal(hierarchy.segmentations((1, 1, 64))[1].flatten(), torch.arange(16).repeat_interleave(4))
    assert hierarchy.levels[0].criterion.max() < -8.  # the square root of the pixels
    assert hierarchy.pieces.sizes.tolist() == [4] * 16
    assert hierarchy.pieces.edges.tolist() == [list(range(15)), list(range(1, 16))]


@pytest.mark.parametrize('min_avg_region, levels', [(64, 0), (63, 1), (32, 1), (31, 2)])
def test_it_stops_at_so_many_regions(min_avg_region, levels):
    features = pairs_and_quads()
    assert len(build_hierarchy(features, similarity, 0., min_avg_region=min_avg_region, max_levels=2).levels) == levels
