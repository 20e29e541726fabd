from __future__ import annotations

import heapq

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_spot.ops.regions import ward
from timm_spot.ops.regions.budget import Tokens
from timm_spot.ops.regions.graph import grid_edges, pixel_boxes, unique_edges
from timm_spot.ops.regions.ward import merge_by_ward, merged_groups, ward_merges


def pixels(images):
    """Every pixel of (B, C, H, W) a region."""
    B, _, H, W = images.shape
    ids = torch.arange(B * H * W).view(B, H, W)
    return dict(
        sums=images.transpose(0, 1).flatten(1).double(), sizes=torch.ones(B * H * W, dtype=torch.long),
        image=ids.flatten() // (H * W), edges=unique_edges(grid_edges(ids)))


def squared_error(values, group):
    n = int(group.max()) + 1
    means = torch.zeros(len(values), n).double().index_add_(1, group, values) / torch.bincount(group)
    return (values - means[:, group]).square().sum().item()


def by_heap(sums, sizes, edges, target):
    """The same, one merge after the other: the reference."""
    sums, sizes = list(sums.T), sizes.tolist()
    groups = {i: {i} for i in range(len(sizes))}
    near = {i: set() for i in groups}
    heap = []

    def push(u, v):
        m, n = sizes[u], sizes[v]
        heapq.heappush(heap, ((m * n / (m + n) * (sums[u] / m - sums[v] / n).square().sum()).item(), u, v))

    for u, v in edges.T.tolist():
        near[u].add(v)
        near[v].add(u)
        push(u, v)
    while len(groups) > target:
        _, u, v = heapq.heappop(heap)
        if u not in groups or v not in groups:
            continue
        new = len(sizes)
        sums.append(sums[u] + sums[v])
        sizes.append(sizes[u] + sizes[v])
        groups[new] = groups.pop(u) | groups.pop(v)
        near[new] = (near.pop(u) | near.pop(v)) - {u, v}
        for w in near[new]:
            near[w] = near[w] - {u, v} | {new}
            push(w, new)
    group = torch.empty(edges.max() + 1, dtype=torch.long)
    for number, members in enumerate(groups.values()):
        group[list(members)] = number
    return group


def test_costs_are_what_the_squared_error_grows_by():
    parts = pixels(torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(0)))
    merges = ward_merges(**parts, target=1)
    assert merges.pairs.shape == (2, 62)
    for k in (0, 1, 20, 40, 61, 62):
        group, _ = merged_groups(63, merges.pairs[:, :k])
        assert group.max() + 1 == 63 - k
        # Specks that join one region in the same round are counted as if each had been the only one.
        assert squared_error(parts['sums'], group) == pytest.approx(merges.costs[:k].sum().item(), rel=0.02, abs=1e-9)


@pytest.mark.parametrize('target', [4, 16, 40])
def test_as_good_as_a_heap(target):
    """Rounds take some pairs out of turn; what that costs is small."""
    image = torch.nn.functional.interpolate(
        torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(3)), (20, 24), mode='bicubic')
    parts = pixels(image)
    group, _ = merged_groups(480, ward_merges(**parts, target=target).pairs)
    reference = by_heap(parts['sums'], parts['sizes'], parts['edges'], target)
    assert squared_error(parts['sums'], group) < 1.1 * squared_error(parts['sums'], reference)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 60), st.integers(0, 99), st.booleans())
def test_exact_counts_and_no_neighbours_in_the_batch(height, width, target, seed, flat):
    images = torch.rand(3, 2, height, width, generator=torch.Generator().manual_seed(seed))
    if flat:
        images[1:] = images[1:].round()
    n = height * width
    together, _ = merged_groups(3 * n, ward_merges(**pixels(images), target=target, noise=1e-4).pairs)
    for i in range(3):
        alone, _ = merged_groups(n, ward_merges(**pixels(images[i:i + 1]), target=target, noise=1e-4).pairs)
        mine = together[i * n:(i + 1) * n]
        assert torch.equal(mine - mine.min(), alone)
        assert alone.max() + 1 == min(n, target)


def test_noise_merges_the_small_first_where_all_is_flat():
    parts = pixels(torch.zeros(1, 1, 16, 16))
    sizes = torch.bincount(merged_groups(256, ward_merges(**parts, target=8, noise=1.).pairs)[0])
    assert sizes.max() <= 4 * sizes.min()


def test_a_background_takes_in_all_its_specks_at_once(monkeypatch):
    """Each round it chooses one of them only: a round for each speck took a thousand times as long."""
    image = torch.zeros(1, 1, 64, 64)
    image[0, 0, ::4, ::4] = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) + 1.
    group = (image.flatten() > 0) * (1 + torch.arange(64 * 64))
    group = group.unique(return_inverse=True)[1]
    parts = pixels(image)
    sums = torch.zeros(1, 257).double().index_add_(1, group, parts['sums'])
    rounds = []
    whole = ward._ward_costs
    monkeypatch.setattr(ward, '_ward_costs', lambda *a: rounds.append(1) or whole(*a))
    merges = ward_merges(
        sums, torch.bincount(group), torch.zeros(257).long(), unique_edges(group[parts['edges']]), target=1)
    assert len(merges.costs) == 256 and len(rounds) < 12


def test_arguments_are_left_as_they_are():
    parts = pixels(torch.rand(1, 3, 4, 4))
    before = {k: v.clone() for k, v in parts.items()}
    ward_merges(**parts, target=2)
    assert all(torch.equal(v, before[k]) for k, v in parts.items())


def test_tokens_are_joined():
    parts = pixels(torch.tensor([0., 1., 5., 6.5]).view(1, 1, 1, 4))
    tokens = Tokens(
        torch.arange(4), torch.tensor([[0., 2., 4., 8.]]).expand(3, -1), parts['sizes'], pixel_boxes(1, 1, 4),
        parts['image'], parts['edges'])
    merged = merge_by_ward(tokens, parts['sums'], target=2)
    assert merged.parent.tolist() == [0, 0, 1, 1] and merged.sizes.tolist() == [2, 2]
    assert merged.colors.tolist() == [[1., 6.]] * 3
    assert merged.boxes.T.tolist() == [[0, 0, 0, 1], [0, 2, 0, 3]] and merged.edges.tolist() == [[0], [1]]
